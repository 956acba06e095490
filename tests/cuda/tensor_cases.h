/// Kernels against the formula in double, rounded where they round: those on tensor cores h, outputs and gate gradients
/// to 16 bits each step. Then nearly all values are the very same, as float32 sums seldom fall on the other
/// side of a rounding, and a wrong weight, row or step shows.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "kernels.h"

using namespace cellstep::cuda;

namespace {

std::uint64_t digest = 1469598103934665603u;
int cases = 0;

struct Case {
    int H, I, N, T, L, D;
    bool packed, lengths, reset, initials, reverse, save, sums, panels, biased;
    int multiprocessors;
    bool wide;  ///< h and gate gradients go from step to step in float
};

[[noreturn]] void fail(const Case& c, const char* what, long at, double found, double expected) {
    std::printf(
        "H %d I %d N %d T %d L %d D %d packed %d lengths %d reset %d initials %d reverse %d save %d sums %d panels %d "
        "biased %d multiprocessors %d wide %d: %s[%ld] is %g, expected %g\n",
        c.H, c.I, c.N, c.T, c.L, c.D, c.packed, c.lengths, c.reset, c.initials, c.reverse, c.save, c.sums, c.panels,
        c.biased, c.multiprocessors, c.wide, what, at, found, expected);
    std::exit(1);
}

template <class T>
double rounded(double x) {
    return to_float(from_float<T>(static_cast<float>(x)));
}

template <class T>
struct Array {
    std::vector<T> values;

    explicit Array(long count = 0) : values(static_cast<std::size_t>(count) + 1, poison()) {}
    static T poison() {
        if constexpr (sizeof(T) == 4)
            return std::nanf("");
        else
            return T{0x7fff};  // NaN in both types
    }
    T* data() { return values.data(); }
    double operator[](long at) const { return to_float(values[static_cast<std::size_t>(at)]); }
    void set(long at, double x) { values[static_cast<std::size_t>(at)] = from_float<T>(static_cast<float>(x)); }
    void fill(std::mt19937& random, double scale) {
        std::uniform_real_distribution<double> uniform(-scale, scale);
        for (std::size_t at = 0; at + 1 < values.size(); ++at) set(static_cast<long>(at), uniform(random));
    }
};

/// As it must come: `values` beyond a call's reach stay NaN, here and there.
using Expected = std::vector<double>;

template <class T>
void compare(const Case& c, const char* what, Array<T>& found, const Expected& expected, double tolerance,
             double share = 0.03) {
    double largest = 0;
    for (const double x : expected) largest = std::fmax(largest, std::fabs(x));
    long others = 0;
    for (std::size_t at = 0; at < expected.size(); ++at) {
        const long place = static_cast<long>(at);
        const double value = found[place], right = expected[at];
        std::uint32_t bits = 0;
        std::memcpy(&bits, &found.values[at], sizeof(T));
        digest = (digest ^ bits) * 1099511628211u;
        if (std::isnan(right) != std::isnan(value)) fail(c, what, place, value, right);
        if (std::isnan(right)) continue;
        if (std::fabs(value - right) > tolerance * (1 + largest)) fail(c, what, place, value, right);
        if (value != rounded<T>(right)) ++others;
    }
    if (sizeof(T) == 2 && static_cast<double>(others) > 4 + share * static_cast<double>(expected.size()))
        fail(c, what, -1, static_cast<double>(others), 0);
    if (!std::isnan(found[static_cast<long>(expected.size())])) fail(c, what, -2, 0, 0);
}

/// (4 H, K) weights, and where they lie.
template <class T>
struct Matrix {
    std::vector<double> at;  // (4, H, K)
    Array<T> storage;
    WeightView view;

    Matrix(std::mt19937& random, int H, int K, double scale, bool panels) : at(static_cast<std::size_t>(4) * H * K) {
        const int whole = (H + 15) / 16 * 16;
        storage = Array<T>(static_cast<long>(4) * whole * K);
        view = weight_view(storage.data(), H, K);
        // As a deploy file has them: for each 16 units K columns of 4 gates of 16 units.
        if (panels) view = {storage.data(), 16, std::int64_t(64) * K, 1, 64};
        std::uniform_real_distribution<double> uniform(-scale, scale);
        for (int gate = 0; gate < 4; ++gate)
            for (int unit = 0; unit < H; ++unit)
                for (int k = 0; k < K; ++k) {
                    const double value = rounded<T>(uniform(random));
                    at[(static_cast<std::size_t>(gate) * H + unit) * K + k] = value;
                    storage.set(gate * view.gate + unit / 16 * view.panel + unit % 16 * view.unit + k * view.column,
                                value);
                }
    }
};

/// 16 bits: two units in the last place of 1. float32: sums of at most 2,000 products of values below 1 in chains of a
/// hundred, and activations good to 1e-7.
constexpr double tolerance_of(DataType type) {
    return type == DataType::float32 ? 2e-6 : type == DataType::float16 ? 2e-3 : 1.6e-2;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

/// A batch's steps: lengths, tokens and flags.
struct Batch {
    std::vector<int> length, offsets;
    std::vector<unsigned char> reset;
    long tokens;
    Steps steps;

    Batch(std::mt19937& random, const Case& c) {
        for (int n = 0; n < c.N; ++n)
            length.push_back(c.packed || c.lengths ? static_cast<int>(random() % (c.T + 1)) : c.T);
        if ((c.packed || c.lengths) && c.N > 0) length[0] = c.T;
        if (c.packed) std::sort(length.begin(), length.end(), [](int a, int b) { return a > b; });
        int sum = 0;
        for (int t = 0; t < c.T; ++t) {
            offsets.push_back(sum);
            for (const int l : length) sum += l > t;
        }
        tokens = c.packed ? sum : static_cast<long>(c.T) * c.N;
        for (int at = 0; at < c.T * c.N; ++at) reset.push_back(c.reset && random() % 3 == 0);
        steps = {c.T,
                 c.N,
                 tokens,
                 c.packed ? offsets.data() : nullptr,
                 c.packed || c.lengths ? length.data() : nullptr,
                 c.reset ? reset.data() : nullptr};
    }
    long token(const Case& c, int t, int n) const { return (c.packed ? offsets[t] : t * c.N) + n; }
    bool flag(const Case& c, int t, int n) const { return reset[static_cast<std::size_t>(t) * c.N + n] != 0; }
    /// Whether row n goes into step t from the initial state.
    bool fresh(const Case& c, bool backwards, int t, int n) const {
        if (!c.reset) return false;
        return backwards ? t + 1 < length[n] && flag(c, t + 1, n) : flag(c, t, n);
    }
};

template <class T>
void poison_past(const Case& c, const Batch& batch, Array<T>& array, long parts, long width) {
    if (!c.lengths) return;
    for (long part = 0; part < parts; ++part)
        for (int t = 0; t < c.T; ++t)
            for (int n = 0; n < c.N; ++n)
                for (long at = 0; at < width && t >= batch.length[n]; ++at)
                    array.values[(part * batch.tokens + batch.token(c, t, n)) * width + at] = Array<T>::poison();
}

/// `start` runs a call: null, or why not.
template <class T, class Start>
void forward(const Case& c, DataType type, unsigned seed, const Start& start) {
    std::mt19937 random(seed);
    const Batch batch(random, c);
    const long P = batch.tokens, H = c.H, stages = c.L * c.D, width = c.D * H;
    std::vector<Matrix<T>> ih, hh, bias_ih, bias_hh;
    Forward call = {};
    for (int stage = 0; stage < stages; ++stage) {
        const int columns = stage < c.D ? c.I : static_cast<int>(width);
        ih.emplace_back(random, c.H, columns, 1.5 / std::sqrt(columns), c.panels);
        hh.emplace_back(random, c.H, c.H, 2.0 / std::sqrt(c.H), c.panels);
        bias_ih.emplace_back(random, c.H, 1, 0.5, false);
        bias_hh.emplace_back(random, c.H, 1, 0.5, false);
    }
    for (int stage = 0; stage < stages; ++stage) {
        call.stages[stage].weight_ih = ih[stage].view;
        call.stages[stage].weight_hh = hh[stage].view;
        if (c.biased) {
            call.stages[stage].bias_ih = bias_ih[stage].view;
            call.stages[stage].bias_hh = bias_hh[stage].view;
        }
    }
    Array<T> x(P * c.I), sums(c.D * P * 4 * H), h(stages * c.N * H), s(stages * c.N * H), initial_h(stages * H),
        initial_c(stages * H);
    x.fill(random, 2);
    sums.fill(random, 1);
    h.fill(random, 1);
    s.fill(random, 1);
    initial_h.fill(random, 1);
    initial_c.fill(random, 1);
    poison_past(c, batch, x, 1, c.I);
    poison_past(c, batch, sums, c.D, 4 * H);
    Array<T> outputs((c.L - 1) * P * width), y(P * width), h_n(stages * c.N * H), c_n(stages * c.N * H),
        gates(stages * P * 4 * H), cells(stages * P * H);

    call.type = type;
    call.steps = batch.steps;
    call.input_size = c.I;
    call.hidden_size = c.H;
    call.layers = c.L;
    call.directions = c.D;
    call.reverse = c.reverse;
    call.x = x.data();
    call.sums = c.sums ? sums.data() : nullptr;
    call.h = h.data();
    call.c = s.data();
    call.initial_h = c.initials ? initial_h.data() : nullptr;
    call.initial_c = c.initials ? initial_c.data() : nullptr;
    call.outputs = outputs.data();
    call.y = y.data();
    call.h_n = h_n.data();
    call.c_n = c_n.data();
    call.gates = c.save ? gates.data() : nullptr;
    call.cells = c.save ? cells.data() : nullptr;
    call.multiprocessors = c.multiprocessors;
    if (const char* error = start(call)) fail(c, error, 0, 0, 0);

    const double nan = std::nan("");
    Expected e_outputs((c.L - 1) * P * width, nan), e_y(P * width, nan), e_h(stages * c.N * H, nan),
        e_c(stages * c.N * H, nan), e_gates(c.save ? stages * P * 4 * H : 0, nan),
        e_cells(c.save ? stages * P * H : 0, nan);
    for (int layer = 0; layer < c.L; ++layer)
        for (int d = 0; d < c.D; ++d) {
            const int stage = layer * c.D + d;
            const bool backwards = c.D == 2 ? d == 1 : c.reverse;
            const long columns = layer == 0 ? c.I : width;
            Expected& out = layer + 1 == c.L ? e_y : e_outputs;
            const long out_at = layer + 1 == c.L ? 0 : layer * P * width;
            for (int n = 0; n < c.N; ++n) {
                const long place = (static_cast<long>(stage) * c.N + n) * H;
                std::vector<double> now(H), cell(H), next(H);
                for (long u = 0; u < H; ++u) now[u] = h[place + u], cell[u] = s[place + u];
                for (int step = 0; step < c.T; ++step) {
                    const int t = backwards ? c.T - 1 - step : step;
                    const long token = batch.token(c, t, n);
                    if (t >= batch.length[n]) {
                        for (long u = 0; u < H && c.lengths; ++u) {
                            out[out_at + token * width + d * H + u] = 0;
                            if (c.save) e_cells[(stage * P + token) * H + u] = 0;
                            for (int g = 0; g < 4 && c.save; ++g) e_gates[((stage * P + token) * 4 + g) * H + u] = 0;
                        }
                        continue;
                    }
                    if (batch.fresh(c, backwards, t, n))
                        for (long u = 0; u < H; ++u) {
                            now[u] = c.initials ? initial_h[stage * H + u] : 0;
                            cell[u] = c.initials ? initial_c[stage * H + u] : 0;
                        }
                    for (long u = 0; u < H; ++u) {
                        double a[4];
                        for (long g = 0; g < 4; ++g) {
                            a[g] = c.biased ? bias_ih[stage].at[g * H + u] + bias_hh[stage].at[g * H + u] : 0;
                            if (c.sums) a[g] += sums[((d * P + token) * 4 + g) * H + u];
                            for (long k = 0; k < columns && !c.sums; ++k)
                                a[g] += ih[stage].at[(g * H + u) * columns + k] *
                                        (layer == 0 ? x[token * c.I + k]
                                                    : e_outputs[(layer - 1) * P * width + token * width + k]);
                            for (long k = 0; k < H; ++k) a[g] += hh[stage].at[(g * H + u) * H + k] * now[k];
                        }
                        for (int g = 0; g < 4; ++g) a[g] = g == 2 ? std::tanh(a[g]) : sigmoid(a[g]);
                        cell[u] = a[1] * cell[u] + a[0] * a[2];
                        next[u] = a[3] * std::tanh(cell[u]);
                        if (!c.wide) next[u] = rounded<T>(next[u]);
                        out[out_at + token * width + d * H + u] = next[u];
                        if (!c.save) continue;
                        e_cells[(stage * P + token) * H + u] = cell[u];
                        for (int g = 0; g < 4; ++g) e_gates[((stage * P + token) * 4 + g) * H + u] = a[g];
                    }
                    now = next;
                }
                for (long u = 0; u < H; ++u) e_h[place + u] = now[u], e_c[place + u] = cell[u];
            }
        }
    const double tolerance = tolerance_of(type);
    compare(c, "outputs", outputs, e_outputs, tolerance);
    compare(c, "y", y, e_y, tolerance);
    compare(c, "h_n", h_n, e_h, tolerance);
    compare(c, "c_n", c_n, e_c, tolerance);
    compare(c, "gates", gates, e_gates, tolerance);
    compare(c, "cells", cells, e_cells, tolerance);
    ++cases;
}

template <class T, class Start>
void backward(const Case& c, DataType type, unsigned seed, bool few, const Start& start) {
    std::mt19937 random(seed);
    const Batch batch(random, c);
    const long P = batch.tokens, H = c.H, width = c.D * H;
    std::vector<Matrix<T>> hh;
    for (int d = 0; d < c.D; ++d) hh.emplace_back(random, c.H, c.H, 2.0 / std::sqrt(c.H), c.panels);
    Array<T> s(c.D * c.N * H), initial_c(c.D * H), gates(c.D * P * 4 * H), cells(c.D * P * H), grad_y(P * width),
        grad_cells(c.D * P * H), grad_h_n(c.D * c.N * H), grad_c_n(c.D * c.N * H), grad_sums(c.D * P * 4 * H),
        grad_h(c.D * c.N * H), grad_c(c.D * c.N * H);
    for (Array<T>* array : {&s, &initial_c, &cells, &grad_y, &grad_cells, &grad_h_n, &grad_c_n}) array->fill(random, 1);
    std::uniform_real_distribution<double> uniform(0, 1);
    for (long at = 0; at < c.D * P * 4 * H; ++at)
        gates.set(at, at / H % 4 == 2 ? 2 * uniform(random) - 1 : uniform(random));
    poison_past(c, batch, gates, c.D, 4 * H);
    poison_past(c, batch, cells, c.D, H);
    poison_past(c, batch, grad_y, 1, width);
    poison_past(c, batch, grad_cells, c.D, H);
    Backward call = {};
    call.type = type;
    call.steps = batch.steps;
    call.hidden_size = c.H;
    call.directions = c.D;
    call.reverse = c.reverse;
    for (int d = 0; d < c.D; ++d) call.weight_hh[d] = hh[d].view;
    call.c = s.data();
    call.initial_c = c.initials ? initial_c.data() : nullptr;
    call.gates = gates.data();
    call.cells = cells.data();
    call.grad_outputs = few ? nullptr : grad_y.data();
    call.grad_cells = c.save ? grad_cells.data() : nullptr;
    call.grad_h_n = c.save ? grad_h_n.data() : nullptr;
    call.grad_c_n = few ? nullptr : grad_c_n.data();
    call.grad_sums = grad_sums.data();
    call.grad_h = grad_h.data();
    call.grad_c = grad_c.data();
    call.multiprocessors = c.multiprocessors;
    if (const char* error = start(call)) fail(c, error, 0, 0, 0);

    const double nan = std::nan("");
    Expected e_sums(c.D * P * 4 * H, nan), e_h(c.D * c.N * H, nan), e_c(c.D * c.N * H, nan);
    for (int d = 0; d < c.D; ++d)
        for (int n = 0; n < c.N; ++n) {
            const bool backwards = c.D == 2 ? d == 1 : c.reverse;
            const long place = (static_cast<long>(d) * c.N + n) * H;
            const int length = batch.length[n];
            std::vector<double> dh(H), dc(H);
            for (long u = 0; u < H; ++u)
                dh[u] = c.save ? grad_h_n[place + u] : 0, dc[u] = few ? 0 : grad_c_n[place + u];
            for (int t = length; t < c.T && c.lengths; ++t)
                for (long at = 0; at < 4 * H; ++at) e_sums[(d * P + batch.token(c, t, n)) * 4 * H + at] = 0;
            for (int step = 0; step < length; ++step) {
                const int t = backwards ? step : length - 1 - step;
                const long token = d * P + batch.token(c, t, n);
                const bool fresh = batch.fresh(c, backwards, t, n);
                double* const da = &e_sums[token * 4 * H];
                for (long u = 0; u < H; ++u) {
                    double gate[4];
                    for (int g = 0; g < 4; ++g) gate[g] = gates[(token * 4 + g) * H + u];
                    const bool first = backwards ? t + 1 == length : t == 0;
                    const int before_t = backwards ? t + 1 : t - 1;
                    const double before = fresh   ? (c.initials ? initial_c[d * H + u] : 0)
                                          : first ? s[place + u]
                                                  : cells[(d * P + batch.token(c, before_t, n)) * H + u];
                    const double tanh_c = std::tanh(cells[token * H + u]);
                    const double dy = dh[u] + (few ? 0 : grad_y[(token - d * P) * width + d * H + u]);
                    const double all =
                        dc[u] + dy * gate[3] * (1 - tanh_c * tanh_c) + (c.save ? grad_cells[token * H + u] : 0);
                    da[0 * H + u] = all * gate[2] * gate[0] * (1 - gate[0]);
                    da[1 * H + u] = all * before * gate[1] * (1 - gate[1]);
                    da[2 * H + u] = all * gate[0] * (1 - gate[2] * gate[2]);
                    da[3 * H + u] = dy * tanh_c * gate[3] * (1 - gate[3]);
                    for (int g = 0; g < 4 && !c.wide; ++g) da[g * H + u] = rounded<T>(da[g * H + u]);
                    dc[u] = fresh ? 0 : all * gate[1];
                }
                for (long k = 0; k < H; ++k) {
                    dh[k] = 0;
                    for (long at = 0; at < 4 * H && !fresh; ++at) dh[k] += hh[d].at[at * H + k] * da[at];
                }
            }
            for (long u = 0; u < H; ++u) e_h[place + u] = dh[u], e_c[place + u] = dc[u];
        }
    const double tolerance = tolerance_of(type);
    const double share = 0.1;  // small gradients, whose roundings are as fine as the error of the sums, are many
    compare(c, "grad_sums", grad_sums, e_sums, tolerance, share);
    compare(c, "grad_h", grad_h, e_h, tolerance, share);
    compare(c, "grad_c", grad_c, e_c, tolerance, share);
    ++cases;
}

template <class Start>
void both(const Case& c, unsigned seed, bool back, const Start& start) {
    if (seed % 2)
        forward<__half>(c, DataType::float16, seed, start);
    else
        forward<__nv_bfloat16>(c, DataType::bfloat16, seed, start);
    if (!back) return;
    if (seed % 2)
        backward<__nv_bfloat16>(c, DataType::bfloat16, seed, seed % 4 == 3, start);
    else
        backward<__half>(c, DataType::float16, seed, seed % 4 == 2, start);
}

}  // namespace
