/// cluster_float.cu and cluster_float_backward.cu on the emulated device.
#include "parts_cases.h"

namespace {

struct Start {
    ClusterForm form;

    const char* operator()(Forward& call) const { return run(call, cluster_float_forward); }
    const char* operator()(Backward& call) const { return run(call, cluster_float_backward); }

private:
    template <class Call>
    const char* run(Call& call, const char* (*start)(const Call&, ClusterForm)) const {
        if (!cluster_float_fits(call, form)) return "cluster_float_fits";
        return with_progress(call, cluster_float_progress_words(call, form), start, form);
    }
};

void ways(int H, int N, int T, unsigned seed, ClusterForm form, int multiprocessors = 132, int directions = 0) {
    Case c = case_of(H, N, T, seed, multiprocessors, directions);
    c.wide = true;
    const Start start{form};
    const auto both_ways = [&](auto zero, DataType type) {
        forward<decltype(zero)>(c, type, seed, start);
        backward<decltype(zero)>(c, type, seed, seed % 4 == 3, start);
    };
    if (seed % 5 == 1)
        both_ways(__half(), DataType::float16);
    else if (seed % 5 == 3)
        both_ways(__nv_bfloat16(), DataType::bfloat16);
    else
        both_ways(float(), DataType::float32);
}

/// Which sizes each form takes.
void sizes() {
    const DataType type = DataType::float32;
    for (const bool back : {false, true})
        for (const auto exchange : {ClusterForm::cluster, ClusterForm::grid})
            for (const int N : {1, 16})
                print_largest(std::string(back ? "backward" : "forward") +
                                  (exchange == ClusterForm::cluster ? " cluster, " : " grid, ") + std::to_string(N) +
                                  " rows",
                              [&](int H) {
                                  return back ? cluster_float_fits(back_of(H, N, type), {exchange, 0})
                                              : cluster_float_fits(call_of(H, N, type), {exchange, 0});
                              });
    Forward without_sums = call_of(64, 16, type);
    without_sums.sums = nullptr;
    if (cluster_float_fits(without_sums) || cluster_float_fits(call_of(64, 16, DataType::float64)))
        std::printf("fits what it cannot do\n");
}

}  // namespace

/// cluster, grid, chosen: sweeps; few: some of all, for other seeds and sanitizers; sizes: which H fit.
int main(int count, char** arguments) {
    const std::string what = count > 1 ? arguments[1] : "few";
    unsigned seed = 1;
    if (what == "sizes") sizes();
    if (what == "cluster") {
        for (int parts = 2; parts <= 16; ++parts)
            ways(5 + parts * 6, 1 + parts * 3 % 11, 5, seed++, {ClusterForm::cluster, parts});
        // One row of lanes that send less than 16 bytes.
        for (const int H : {3, 100, 256}) ways(H, 1, 4, seed++, {ClusterForm::cluster, 16});
        // More rows than clusters find room for at once.
        for (const int N : {14, 28, 50}) ways(70, N, 2, seed++, {ClusterForm::cluster, 16}, 132, 1);
        ways(528, 2, 2, seed++, {ClusterForm::cluster, 16}, 132, 1);
    }
    if (what == "grid") {
        for (int parts = 1; parts <= 20; parts += 1 + parts / 6)
            ways(8 + parts * 5, 1 + parts * 5 % 17, 5, seed++, {ClusterForm::grid, parts});
        // Launches one behind the other, as few blocks may run at once; sizes of a long row.
        ways(60, 20, 4, seed++, {ClusterForm::grid, 3}, 7);
        ways(60, 20, 4, seed++, {ClusterForm::grid, 4}, 4);
        // One tile of rows, in panels of every size, with few and many weights in registers and beside them.
        for (const int N : {1, 2, 4, 13}) {
            ways(100, N, 2, seed++, {ClusterForm::grid, 3}, 3, 1);
            ways(190, N, 2, seed++, {ClusterForm::grid, 3}, 3, 1);
            ways(190, N, 2, seed++, {ClusterForm::grid, 2}, 2, 1);
        }
        ways(521, 2, 2, seed++, {ClusterForm::grid, 33}, 132, 1);
    }
    if (what == "chosen") {
        for (const int H : {20, 130, 260}) ways(H, 9, 3, seed++, {});
        for (const int N : {1, 2, 3, 5, 40}) ways(40, N, 3, seed++, {}, 132, 2);
        ways(12, 300, 3, seed++, {}, 132, 2);
    }
    if (what == "few") {
        for (const int parts : {2, 3, 7}) ways(9 + parts * 2, 5, 4, seed++, {ClusterForm::cluster, parts});
        for (const int parts : {3, 5}) ways(22, 5, 4, seed++, {ClusterForm::grid, parts});
        ways(26, 1, 4, seed++, {ClusterForm::cluster, 13});
        ways(14, 9, 4, seed++, {ClusterForm::grid, 2}, 2);
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
