/// What the tests of kernels share whose weights lie over several blocks.
#pragma once

#include "tensor_cases.h"

namespace {

/// Ways to give rows and steps: 0 padded, 1 lengths, 2 packed; each with and without what else there is.
Case case_of(int H, int N, int T, unsigned seed, int multiprocessors, int directions) {
    const int way = static_cast<int>(seed % 3);
    Case c = {};
    c.H = H;
    c.N = N;
    c.T = T;
    c.I = 1;
    c.L = 1;
    c.D = directions ? directions : 1 + static_cast<int>(seed / 3 % 2);
    c.packed = way == 2;
    c.lengths = way == 1;
    c.biased = seed % 5 != 0;
    c.panels = seed % 4 == 0;
    c.initials = seed % 4 < 2;
    c.save = seed % 7 != 0;
    c.reset = !c.packed && seed % 8 != 1;
    c.reverse = c.D == 1 && seed % 2 == 1;
    c.sums = true;
    c.multiprocessors = multiprocessors;
    return c;
}

/// Starts a call with as many words of progress as it asks for, behind which nothing may be written.
template <class Call>
const char* with_progress(Call& call, std::size_t words, const char* (*start)(const Call&, ClusterForm),
                          ClusterForm form) {
    std::vector<int> progress(words + 1);
    call.progress = progress.data();
    const int last = progress.back() = 12345;
    if (const char* error = start(call, form)) return error;
    return progress.back() == last ? nullptr : "wrote behind progress";
}

/// One step of one layer with its sums given, on a device of 132 multiprocessors: to ask what fits.
Forward call_of(int H, int N, DataType type) {
    static const float something = 0;
    Forward call = {};
    call.type = type;
    call.steps.steps = 1;
    call.steps.batch = N;
    call.steps.tokens = N;
    call.hidden_size = H;
    call.layers = 1;
    call.directions = 1;
    call.sums = &something;
    call.multiprocessors = 132;
    return call;
}

/// The way back of the same.
Backward back_of(int H, int N, DataType type) {
    const Forward call = call_of(H, N, type);
    Backward back = {};
    back.type = call.type;
    back.steps = call.steps;
    back.hidden_size = H;
    back.directions = call.directions;
    back.multiprocessors = call.multiprocessors;
    return back;
}

/// Prints the least and the largest size that fit, and gaps between them.
template <class Fits>
void print_largest(const std::string& what, const Fits& fits) {
    int least = 0, most = 0;
    for (int H = 1; H <= 2100; ++H)
        if (fits(H)) {
            if (most && most + 1 != H) std::printf("%s: %d fits, %d does not\n", what.c_str(), H, H - 1);
            least = least ? least : H;
            most = H;
        }
    std::printf("%s: H %d to %d\n", what.c_str(), least, most);
}

}  // namespace
