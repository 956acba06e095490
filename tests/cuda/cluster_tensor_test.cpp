/// cluster_tensor.cu on the emulated device.
#include "parts_cases.h"

namespace {

struct Start {
    ClusterForm form;

    const char* operator()(Forward& call) const { return run(call, cluster_tensor_forward); }
    const char* operator()(Backward& call) const { return run(call, cluster_tensor_backward); }

private:
    template <class Call>
    const char* run(Call& call, const char* (*start)(const Call&, ClusterForm)) const {
        if (!cluster_tensor_fits(call, form)) return "cluster_tensor_fits";
        return with_progress(call, cluster_tensor_progress_words(call, form), start, form);
    }
};

void ways(int H, int N, int T, unsigned seed, ClusterForm form, int multiprocessors = 132, int directions = 0) {
    const Case c = case_of(H, N, T, seed, multiprocessors, directions);
    both(c, seed, true, Start{form});
}

/// Which sizes each form takes.
void sizes() {
    const DataType type = DataType::bfloat16;
    for (const bool back : {false, true})
        for (const auto exchange : {ClusterForm::cluster, ClusterForm::grid})
            print_largest(
                std::string(back ? "backward" : "forward") + (exchange == ClusterForm::cluster ? " cluster" : " grid"),
                [&](int H) {
                    return back ? cluster_tensor_fits(back_of(H, 16, type), {exchange, 0})
                                : cluster_tensor_fits(call_of(H, 16, type), {exchange, 0});
                });
    Forward without_sums = call_of(64, 16, type);
    without_sums.sums = nullptr;
    if (cluster_tensor_fits(without_sums) || cluster_tensor_fits(call_of(64, 16, DataType::float32)))
        std::printf("fits what it cannot do\n");
}

}  // namespace

/// cluster, grid, chosen: sweeps; few: some of all, for other seeds and sanitizers; sizes: which H fit.
int main(int count, char** arguments) {
    const std::string what = count > 1 ? arguments[1] : "few";
    unsigned seed = 1;
    if (what == "sizes") sizes();
    if (what == "cluster") {
        // Every number of parts and, of the last pass, of rows.
        for (int parts = 2; parts <= 16; ++parts)
            ways(8 + parts * 5, 1 + parts * 5 % 18, 5, seed++, {ClusterForm::cluster, parts});
        ways(8, 11, 5, seed++, {ClusterForm::cluster, 16});
        for (const int H : {250, 300, 512})
            for (int way = 0; way < 3; ++way) {
                const int parts[3][3] = {{4, 7, 16}, {5, 11, 16}, {8, 13, 16}};
                const int at = H <= 256 ? 0 : H <= 300 ? 1 : 2;
                ways(H, H > 256 ? 3 : 11, H > 256 ? 3 : 5, seed++, {ClusterForm::cluster, parts[at][way]}, 132,
                     H > 256 ? 1 : 0);
            }
    }
    if (what == "grid") {
        for (int parts = 2; parts <= 20; ++parts)
            ways(8 + parts * 5, 1 + parts * 5 % 18, 5, seed++, {ClusterForm::grid, parts});
        // Launches one behind the other, as few blocks may run at once; sizes of a long row.
        ways(60, 70, 4, seed++, {ClusterForm::grid, 3}, 7);
        ways(60, 70, 4, seed++, {ClusterForm::grid, 4}, 4);
        ways(300, 2, 3, seed++, {ClusterForm::grid, 7}, 132, 1);
    }
    if (what == "chosen") {
        for (const int H : {20, 130, 260}) ways(H, 9, 3, seed++, {});
        ways(40, 300, 3, seed++, {}, 132, 2);
    }
    if (what == "few") {
        for (const int parts : {2, 7}) ways(44, parts == 2 ? 11 : 3, 4, seed++, {ClusterForm::cluster, parts});
        for (const int parts : {3, 5}) ways(44, parts == 3 ? 11 : 2, 4, seed++, {ClusterForm::grid, parts});
        ways(70, 18, 4, seed++, {ClusterForm::cluster, 4});
        ways(70, 18, 4, seed++, {ClusterForm::grid, 2}, 2);
    }
    // One row, one step; no step; no row.
    if (what != "sizes")
        for (const auto exchange : {ClusterForm::cluster, ClusterForm::grid}) {
            ways(20, 1, 1, seed++, {exchange, 2});
            ways(20, 5, 0, seed++, {exchange, 2});
            ways(20, 0, 4, seed++, {exchange, 2});
        }
    std::printf("%d cases, digest %016llx\n", cases, static_cast<unsigned long long>(digest));
}
