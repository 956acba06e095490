// csrc/ops/cuda/block.cu on the processor against loops in double. Prints what differs; the exit status says whether.
//
// With an argument, runs that many cases instead of all; with another, all of that hidden size and short.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "kernels.h"

namespace {

using namespace cellstep::cuda;
using Values = std::vector<double>;

std::mt19937 random_bits(7);
int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }

/// Values of a data type; begins as NaN.
struct Array {
    DataType type;
    std::vector<unsigned char> bytes;

    Array(DataType type_, std::size_t count) : type(type_), bytes(count * value_bytes(type_), 0xff) {}
    double operator[](std::size_t at) const {
        const unsigned char* data = bytes.data() + at * value_bytes(type);
        if (type == DataType::float32) return read<float>(data);
        if (type == DataType::float16) return read<__half>(data);
        return read<__nv_bfloat16>(data);
    }
    void set(std::size_t at, double value) {
        unsigned char* data = bytes.data() + at * value_bytes(type);
        const auto narrow = static_cast<float>(value);
        if (type == DataType::float32) std::memcpy(data, &narrow, 4);
        if (type == DataType::float16) write(data, from_float<__half>(narrow));
        if (type == DataType::bfloat16) write(data, from_float<__nv_bfloat16>(narrow));
    }
    void fill(double scale) {
        std::uniform_real_distribution<double> values(-scale, scale);
        for (std::size_t at = 0; at < bytes.size() / value_bytes(type); ++at) set(at, values(random_bits));
    }
    template <class T>
    static double read(const unsigned char* data) {
        T value;
        std::memcpy(&value, data, sizeof(T));
        return static_cast<double>(to_float(value));
    }
    template <class T>
    static void write(unsigned char* data, T value) {
        std::memcpy(data, &value, sizeof(T));
    }
};

struct Case {
    DataType type;
    int hidden, inputs, layers, directions, batch, steps;
    bool reverse, lengths, packed, reset, initial, save, sums, panels, biased;
    int multiprocessors;
};

std::string text(const Case& c) {
    static const char* const names[] = {"float32", "float64", "float16", "bfloat16"};
    char line[256];
    std::snprintf(
        line, sizeof(line),
        "%s H %d I %d L %d D %d N %d T %d reverse %d lengths %d packed %d reset %d initial %d save %d sums %d "
        "panels %d biased %d multiprocessors %d",
        names[static_cast<int>(c.type)], c.hidden, c.inputs, c.layers, c.directions, c.batch, c.steps, c.reverse,
        c.lengths, c.packed, c.reset, c.initial, c.save, c.sums, c.panels, c.biased, c.multiprocessors);
    return line;
}

struct Weight {
    Array data;
    WeightView view;
};

/// (4 H, columns), as torch has it, or in panels of 16 units.
Weight weight(const Case& c, int columns, double scale) {
    const std::int64_t H = c.hidden, K = columns, panels = (H + 15) / 16;
    Weight made{Array(c.type, static_cast<std::size_t>(4 * panels * 16 * K)), {}};
    made.data.fill(scale);
    made.view = c.panels ? WeightView{nullptr, 16, panels > 0 ? 64 * K : 0, 1, 64} : weight_view(nullptr, H, K);
    made.view.data = made.data.bytes.data();
    return made;
}

double at(const Weight& weight, int gate, int unit, int column) {
    const WeightView& v = weight.view;
    return weight
        .data[static_cast<std::size_t>(gate * v.gate + unit / 16 * v.panel + unit % 16 * v.unit + column * v.column)];
}

int failures = 0;

void compare(const Case& c, const char* name, const Array& found, const Values& expected, double scale) {
    // float32: sums of up to 350 products of values below 1 and activations good to 1e-7, over 7 steps at most; 16
    // bits: the rounding of an answer, and of the layers' outputs on the way to it.
    const double bound = c.type == DataType::float32 ? 3e-6 : c.type == DataType::float16 ? 2e-3 : 1.6e-2;
    for (std::size_t k = 0; k < expected.size(); ++k) {
        const double error = std::abs(found[k] - expected[k]);
        if (error <= bound * std::max(scale, std::abs(expected[k]))) continue;
        std::printf("%s: expected %s[%zu] %.9g; got %.9g\n", text(c).c_str(), name, k, expected[k], found[k]);
        ++failures;
        return;
    }
}

template <class Run>
void same_bits(const Case& c, const std::vector<Array*>& answers, const Run& run) {
    std::vector<std::vector<unsigned char>> before;
    for (Array* answer : answers) {
        before.push_back(answer->bytes);
        std::fill(answer->bytes.begin(), answer->bytes.end(), 0xff);
    }
    setenv("CELLSTEP_SIMT_SEED", std::to_string(pick(1, 1000)).c_str(), 1);
    static const char* const limits[] = {"1", "3", "8", "20"};
    setenv("CELLSTEP_SIMT_BLOCKS", limits[pick(0, 3)], 1);
    run();
    for (std::size_t k = 0; k < answers.size(); ++k) {
        if (answers[k]->bytes == before[k]) continue;
        std::printf("%s: expected the same bits in another order of threads\n", text(c).c_str());
        ++failures;
        return;
    }
}

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

void check(const Case& c) {
    const int H = c.hidden, L = c.layers, D = c.directions, N = c.batch, T = c.steps;
    const auto size = [](auto... sizes) { return (std::size_t(1) * ... * static_cast<std::size_t>(sizes)); };

    std::vector<int> lengths(static_cast<std::size_t>(N), T);
    if (c.lengths || c.packed)
        for (int& length : lengths) length = pick(c.packed ? 1 : 0, T);
    if (c.packed) {
        std::sort(lengths.rbegin(), lengths.rend());
        if (N > 0) lengths[0] = T;
    }
    std::vector<int> offsets;
    int P = 0;
    for (int t = 0; t < T; ++t) {
        offsets.push_back(P);
        for (int n = 0; n < N; ++n) P += !c.packed || lengths[static_cast<std::size_t>(n)] > t;
    }
    const auto token = [&](int t, int n) { return offsets[static_cast<std::size_t>(t)] + n; };
    std::vector<unsigned char> reset(size(T, N));
    for (unsigned char& flag : reset) flag = pick(0, 3) == 0;
    const auto parts = [&](int t, int n) { return c.reset && reset[static_cast<std::size_t>(t * N + n)] != 0; };

    std::vector<std::vector<Weight>> weights;  // by stage
    for (int stage = 0; stage < L * D; ++stage) {
        const double scale = 1.5 / std::sqrt(H);
        weights.push_back({});
        weights.back().push_back(weight(c, stage < D ? c.inputs : D * H, scale));
        weights.back().push_back(weight(c, H, scale));
        weights.back().push_back(weight(c, 1, scale));
        weights.back().push_back(weight(c, 1, scale));
    }
    Array x(c.type, size(P, c.inputs)), sums(c.type, size(D, P, 4, H)), h(c.type, size(L, D, N, H)),
        cell(c.type, size(L, D, N, H)), initial_h(c.type, size(L, D, H)), initial_c(c.type, size(L, D, H));
    for (Array* given : {&x, &sums, &h, &cell, &initial_h, &initial_c}) given->fill(1.0);
    for (int n = 0; n < N && !c.packed; ++n)  // nothing past a row's length is read
        for (int t = lengths[static_cast<std::size_t>(n)]; t < T; ++t)
            for (int k = 0; k < c.inputs; ++k) x.set(size(token(t, n), c.inputs) + static_cast<std::size_t>(k), NAN);

    Array outputs(c.type, size(L - 1, P, D, H)), y(c.type, size(P, D, H)), h_n(c.type, size(L, D, N, H)),
        c_n(c.type, size(L, D, N, H)), gates(c.type, size(L, D, P, 4, H)), cells(c.type, size(L, D, P, H));

    Forward call{};
    call.type = c.type;
    call.steps = {T,
                  N,
                  P,
                  c.packed ? offsets.data() : nullptr,
                  c.lengths || c.packed ? lengths.data() : nullptr,
                  c.reset ? reset.data() : nullptr};
    call.input_size = c.inputs;
    call.hidden_size = H;
    call.layers = L;
    call.directions = D;
    call.reverse = c.reverse;
    for (std::size_t stage = 0; stage < weights.size(); ++stage) {
        call.stages[stage] = {weights[stage][0].view, weights[stage][1].view, weights[stage][2].view,
                              weights[stage][3].view};
        if (!c.biased) call.stages[stage].bias_ih.data = call.stages[stage].bias_hh.data = nullptr;
        if (c.sums) call.stages[stage].weight_ih.data = nullptr;
    }
    call.x = c.sums ? nullptr : x.bytes.data();
    call.sums = !c.sums ? nullptr : P > 0 ? static_cast<const void*>(sums.bytes.data()) : &call;
    call.h = h.bytes.data();
    call.c = cell.bytes.data();
    call.initial_h = c.initial ? initial_h.bytes.data() : nullptr;
    call.initial_c = c.initial ? initial_c.bytes.data() : nullptr;
    call.outputs = outputs.bytes.data();
    call.y = y.bytes.data();
    call.h_n = h_n.bytes.data();
    call.c_n = c_n.bytes.data();
    call.gates = c.save ? gates.bytes.data() : nullptr;
    call.cells = c.save ? cells.bytes.data() : nullptr;
    call.multiprocessors = c.multiprocessors;
    if (!block_fits(call)) {
        std::printf("%s: expected block_fits\n", text(c).c_str());
        ++failures;
        return;
    }
    const auto run = [&] {
        std::vector<int> progress(block_progress_words(call));
        call.progress = progress.data();
        if (const char* error = block_forward(call)) {
            std::printf("%s: %s\n", text(c).c_str(), error);
            ++failures;
        }
    };
    run();

    // In double, with the answers of a layer rounded as they are stored.
    Values in(size(P, c.inputs)), want_h(size(L, D, N, H)), want_c(want_h), want_gates(size(L, D, P, 4, H)),
        want_cells(size(L, D, P, H));
    for (std::size_t k = 0; k < in.size(); ++k) in[k] = x[k];
    int I = c.inputs;
    for (int layer = 0; layer < L; ++layer) {
        Values out(size(P, D, H));
        for (int stage = layer * D; stage < (layer + 1) * D; ++stage) {
            const int direction = stage - layer * D;
            const bool falls = D == 2 ? direction == 1 : c.reverse;
            const std::vector<Weight>& w = weights[static_cast<std::size_t>(stage)];
            for (int n = 0; n < N; ++n) {
                const int length = lengths[static_cast<std::size_t>(n)];
                Values now(static_cast<std::size_t>(H)), held(now), next(now);
                for (int u = 0; u < H; ++u) {
                    now[static_cast<std::size_t>(u)] = h[size(stage * N + n, H) + static_cast<std::size_t>(u)];
                    held[static_cast<std::size_t>(u)] = cell[size(stage * N + n, H) + static_cast<std::size_t>(u)];
                }
                for (int step = 0; step < length; ++step) {
                    const int t = falls ? length - 1 - step : step;
                    if (falls ? t + 1 < length && parts(t + 1, n) : parts(t, n)) {
                        for (int u = 0; u < H; ++u) {
                            const std::size_t place = size(stage, H) + static_cast<std::size_t>(u);
                            now[static_cast<std::size_t>(u)] = c.initial ? initial_h[place] : 0.0;
                            held[static_cast<std::size_t>(u)] = c.initial ? initial_c[place] : 0.0;
                        }
                    }
                    for (int u = 0; u < H; ++u) {
                        double gate[4];
                        for (int g = 0; g < 4; ++g) {
                            double sum = c.biased ? at(w[2], g, u, 0) + at(w[3], g, u, 0) : 0.0;
                            if (c.sums)
                                sum +=
                                    sums[size(direction * P + token(t, n), 4, H) + static_cast<std::size_t>(g * H + u)];
                            for (int k = 0; k < I && !c.sums; ++k)
                                sum += at(w[0], g, u, k) * in[size(token(t, n), I) + static_cast<std::size_t>(k)];
                            for (int k = 0; k < H; ++k) sum += at(w[1], g, u, k) * now[static_cast<std::size_t>(k)];
                            gate[g] = g == 2 ? std::tanh(sum) : sigmoid(sum);
                            want_gates[size(stage * P + token(t, n), 4, H) + static_cast<std::size_t>(g * H + u)] =
                                gate[g];
                        }
                        double& state = held[static_cast<std::size_t>(u)];
                        state = gate[1] * state + gate[0] * gate[2];
                        want_cells[size(stage * P + token(t, n), H) + static_cast<std::size_t>(u)] = state;
                        next[static_cast<std::size_t>(u)] = gate[3] * std::tanh(state);
                        out[size(token(t, n), D, H) + static_cast<std::size_t>(direction * H + u)] =
                            next[static_cast<std::size_t>(u)];
                    }
                    now = next;
                }
                for (int u = 0; u < H; ++u) {
                    want_h[size(stage * N + n, H) + static_cast<std::size_t>(u)] = now[static_cast<std::size_t>(u)];
                    want_c[size(stage * N + n, H) + static_cast<std::size_t>(u)] = held[static_cast<std::size_t>(u)];
                }
            }
        }
        if (layer + 1 == L) {
            compare(c, "y", y, out, 1.0);
        } else {
            Array part(c.type, out.size());
            std::copy_n(
                outputs.bytes.begin() + static_cast<std::ptrdiff_t>(size(layer, out.size(), value_bytes(c.type))),
                part.bytes.size(), part.bytes.begin());
            compare(c, "outputs", part, out, 1.0);
            for (std::size_t k = 0; k < out.size(); ++k) out[k] = part[k];
        }
        in = out;
        I = D * H;
    }
    compare(c, "h_n", h_n, want_h, 1.0);
    compare(c, "c_n", c_n, want_c, 1.0);
    if (c.save) {
        compare(c, "gates", gates, want_gates, 1.0);
        compare(c, "cells", cells, want_cells, 1.0);
    }
    same_bits(c, {&outputs, &y, &h_n, &c_n, &gates, &cells}, run);
    if (!c.save || L > 1) return;

    // The way back, from the gates and cells that the way forward saved.
    Array grad_outputs(c.type, size(P, D, H)), grad_cells(c.type, size(D, P, H)), grad_h_n(c.type, size(D, N, H)),
        grad_c_n(c.type, size(D, N, H)), grad_sums(c.type, size(D, P, 4, H)), grad_h(c.type, size(D, N, H)),
        grad_c(c.type, size(D, N, H));
    for (Array* given : {&grad_outputs, &grad_cells, &grad_h_n, &grad_c_n}) given->fill(1.0);
    const int given = pick(0, 15);
    Backward back{};
    back.type = c.type;
    back.steps = call.steps;
    back.hidden_size = H;
    back.directions = D;
    back.reverse = c.reverse;
    for (int d = 0; d < D; ++d) back.weight_hh[d] = call.stages[d].weight_hh;
    back.c = call.c;
    back.initial_c = call.initial_c;
    back.gates = gates.bytes.data();
    back.cells = cells.bytes.data();
    back.grad_outputs = given & 1 ? grad_outputs.bytes.data() : nullptr;
    back.grad_cells = given & 2 ? grad_cells.bytes.data() : nullptr;
    back.grad_h_n = given & 4 ? grad_h_n.bytes.data() : nullptr;
    back.grad_c_n = given & 8 ? grad_c_n.bytes.data() : nullptr;
    back.grad_sums = grad_sums.bytes.data();
    back.grad_h = grad_h.bytes.data();
    back.grad_c = grad_c.bytes.data();
    back.multiprocessors = c.multiprocessors;
    if (!block_fits(back)) {
        std::printf("%s: expected block_fits backward\n", text(c).c_str());
        ++failures;
        return;
    }
    const auto run_back = [&] {
        if (const char* error = block_backward(back)) {
            std::printf("%s: %s\n", text(c).c_str(), error);
            ++failures;
        }
    };
    run_back();
    Values want_sums(size(D, P, 4, H)), want_grad_h(size(D, N, H)), want_grad_c(want_grad_h);
    for (int d = 0; d < D; ++d) {
        const bool falls = D == 2 ? d == 1 : c.reverse;
        for (int n = 0; n < N; ++n) {
            const int length = lengths[static_cast<std::size_t>(n)];
            Values to_h(static_cast<std::size_t>(H)), to_c(to_h);
            for (std::size_t u = 0; u < to_h.size(); ++u) {
                to_h[u] = given & 4 ? grad_h_n[size(d * N + n, H) + u] : 0.0;
                to_c[u] = given & 8 ? grad_c_n[size(d * N + n, H) + u] : 0.0;
            }
            for (int step = length - 1; step >= 0; --step) {
                const int t = falls ? length - 1 - step : step;
                const int before = falls ? t + 1 : t - 1;
                const bool cut = falls ? t + 1 < length && parts(t + 1, n) : parts(t, n);
                Values to_sums(size(4, H));
                for (std::size_t u = 0; u < to_h.size(); ++u) {
                    double gate[4];
                    for (std::size_t g = 0; g < 4; ++g)
                        gate[g] = gates[size(d * P + token(t, n), 4, H) + g * to_h.size() + u];
                    const double now = cells[size(d * P + token(t, n), H) + u];
                    const double past = cut         ? (c.initial ? initial_c[size(d, H) + u] : 0.0)
                                        : step == 0 ? cell[size(d * N + n, H) + u]
                                                    : cells[size(d * P + token(before, n), H) + u];
                    double dh = to_h[u], dc = to_c[u];
                    if (given & 1) dh += grad_outputs[size(token(t, n), D, H) + size(d, H) + u];
                    if (given & 2) dc += grad_cells[size(d * P + token(t, n), H) + u];
                    dc += dh * gate[3] * (1.0 - std::tanh(now) * std::tanh(now));
                    to_sums[u] = dc * gate[2] * gate[0] * (1.0 - gate[0]);
                    to_sums[to_h.size() + u] = dc * past * gate[1] * (1.0 - gate[1]);
                    to_sums[2 * to_h.size() + u] = dc * gate[0] * (1.0 - gate[2] * gate[2]);
                    to_sums[3 * to_h.size() + u] = dh * std::tanh(now) * gate[3] * (1.0 - gate[3]);
                    to_c[u] = cut ? 0.0 : dc * gate[1];
                }
                for (int u = 0; u < H; ++u) {
                    double sum = 0.0;
                    for (int k = 0; k < 4 * H; ++k)
                        sum += at(weights[static_cast<std::size_t>(d)][1], k / H, k % H, u) *
                               to_sums[static_cast<std::size_t>(k)];
                    to_h[static_cast<std::size_t>(u)] = cut ? 0.0 : sum;
                }
                std::copy(to_sums.begin(), to_sums.end(),
                          want_sums.begin() + static_cast<std::ptrdiff_t>(size(d * P + token(t, n), 4, H)));
            }
            for (std::size_t u = 0; u < to_h.size(); ++u) {
                want_grad_h[size(d * N + n, H) + u] = to_h[u];
                want_grad_c[size(d * N + n, H) + u] = to_c[u];
            }
        }
    }
    compare(c, "grad_sums", grad_sums, want_sums, 1.0);
    compare(c, "grad_h", grad_h, want_grad_h, 1.0);
    compare(c, "grad_c", grad_c, want_grad_c, 1.0);
    same_bits(c, {&grad_sums, &grad_h, &grad_c}, run_back);
}

}  // namespace

int main(int count, char** arguments) {
    int left = count > 1 ? std::atoi(arguments[1]) : 1 << 30, done = 0;
    const int only = count > 2 ? std::atoi(arguments[2]) : 0;
    const int sizes[] = {1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 50, 64, 65, 96, 97, 100, 128, 129, 150, 155, 160};
    const DataType types[] = {DataType::float32, DataType::float32, DataType::float16, DataType::bfloat16};
    for (int round = 0; round < 12 && left > 0; ++round) {
        for (const int size : sizes) {
            if (left-- <= 0) break;
            const int H = only ? only : size;
            Case c{};
            c.type = types[pick(0, 3)];
            c.hidden = H;
            c.directions = pick(1, 2);
            c.layers = round % 2 == 1 || H > 110 ? 1 : pick(1, H <= 64 ? 4 : 2);
            c.sums = c.layers == 1 && (H > 128 || pick(0, 2) == 0);
            c.inputs = pick(1, std::min(2 * H, 64));
            if (H > 64 && c.layers > 1) {  // as much as there is room for
                c.directions = 1;
                c.inputs = std::min(c.inputs, H);
            }
            c.batch = pick(0, 9) == 0 ? 0 : pick(1, 7);
            c.steps = pick(0, 9) == 0 ? 1 : pick(1, 7);
            if (only) {
                c.steps = std::min(c.steps, 2);
                c.batch = std::min(c.batch, 2);
            }
            c.reverse = c.directions == 1 && pick(0, 1) == 1;
            c.packed = pick(0, 3) == 0;
            c.lengths = !c.packed && pick(0, 1) == 1;
            c.reset = !c.packed && pick(0, 1) == 1;
            c.initial = pick(0, 1) == 1;
            c.save = pick(0, 3) != 0;
            c.panels = pick(0, 2) == 0;
            c.biased = pick(0, 3) != 0;
            // One, two or four rows a block.
            const int stages = c.layers * c.directions, wish = pick(0, 2);
            c.multiprocessors = wish == 0 ? 132 : wish == 1 ? stages * ((c.batch + 1) / 2) : 1;
            setenv("CELLSTEP_SIMT_SEED", "0", 1);
            setenv("CELLSTEP_SIMT_BLOCKS", "8", 1);
            check(c);
            ++done;
        }
    }
    std::printf("%d cases, %d differ\n", done, failures);
    return failures == 0 ? 0 : 1;
}
