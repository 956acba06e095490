/// tensor.cu on the emulated device.
#include "tensor_cases.h"

namespace {

struct Start {
    const char* operator()(Forward& call) const {
        if (!tensor_fits(call)) return "tensor_fits";
        std::vector<int> progress(tensor_progress_words(call));
        call.progress = progress.data();
        return tensor_forward(call);
    }
    const char* operator()(Backward& call) const { return tensor_fits(call) ? tensor_backward(call) : "tensor_fits"; }
};

}  // namespace

/// Without an argument every size; with one, a few cases that take all ways through the code.
int main(int count, char**) {
    const bool few = count > 1;
    const int all_sizes[] = {1, 3, 8, 16, 17, 24, 50, 64, 65, 96, 100, 128, 129, 160, 192, 200, 208, 220};
    const int few_sizes[] = {5, 17, 136};
    unsigned seed = 1;
    for (const int H : few ? std::vector<int>(few_sizes, few_sizes + 3)
                           : std::vector<int>(all_sizes, all_sizes + sizeof(all_sizes) / sizeof(int))) {
        // Ways to give rows and steps: 0 padded, 1 lengths, 2 packed; each with and without what else there is.
        for (int way = 0; way < 3; ++way) {
            Case c = {};
            c.H = H;
            c.packed = way == 2;
            c.lengths = way == 1;
            c.N = H > 150 ? 9 : 11 + 13 * (static_cast<int>(seed) % 3);
            c.T = H > 150 ? 3 : 6;
            c.biased = seed % 5 != 0;
            c.panels = seed % 3 == 0;
            c.initials = seed % 4 < 2;
            c.save = way != 2 || seed % 4 == 1;
            c.reset = !c.packed && seed % 3 != 1;
            c.multiprocessors = way == 1 ? 2 : 132;
            c.I = 1 + static_cast<int>(seed * 7 % 40);
            c.L = H > 64 ? 1 + static_cast<int>(seed % 2) * (H <= 96) : 1 + static_cast<int>(seed % 4);
            c.D = H <= 64 ? 1 + static_cast<int>(seed / 2 % 2) : 1;
            c.reverse = c.D == 1 && seed % 2 == 1;
            if (H <= 160) both(c, seed, false, Start());
            c.L = 1;
            c.D = 1 + static_cast<int>(seed % 2);
            c.sums = true;
            both(c, seed + 100, H <= 208, Start());
            ++seed;
        }
    }
    // One row, one step, no step, no row; an input wider than a thread holds ahead.
    const Case odd[] = {
        {20, 3, 1, 1, 2, 1, false, false, false, false, false, true, false, false, true, 132},
        {20, 3, 5, 0, 1, 2, false, false, false, false, false, true, false, false, true, 132},
        {20, 3, 0, 4, 2, 1, false, false, false, false, false, true, false, false, true, 132},
        {8, 300, 40, 5, 1, 1, false, true, true, true, true, true, false, false, true, 1},
        {8, 77, 40, 4, 4, 2, true, false, false, false, false, true, false, false, true, 1},
        {16, 16, 33, 9, 4, 2, false, true, true, true, false, true, false, false, true, 20},
    };
    for (const Case& c : odd)
        for (int twice = 0; twice < 2; ++twice) both(c, seed++, c.L == 1, Start());
    std::printf("%d cases, digest %016llx\n", cases, static_cast<unsigned long long>(digest));
}
