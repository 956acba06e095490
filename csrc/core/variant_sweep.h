/// The recurrence with options and the activations of heads, for the instruction set that a file is compiled for.
#pragma once

#include <cstring>

#include "core/activations.h"
#include "core/pack.h"
#include "core/product.h"
#include "core/step.h"

namespace cellstep {
namespace core {
namespace CELLSTEP_ISA {

template <class T, int Lanes>
inline Vector<T, Lanes> clamp(Vector<T, Lanes> x, T least, T most) {
    using V = Vector<T, Lanes>;
    const V low = broadcast<V>(least);
    const V high = broadcast<V>(most);
    x = x < low ? low : x;
    return x > high ? high : x;
}

/// Elementwise; softmax, which is not, is left to apply_activation.
template <class T, int Lanes>
inline Vector<T, Lanes> activated(Activation activation, Vector<T, Lanes> x) {
    using V = Vector<T, Lanes>;
    switch (activation) {
        case Activation::relu:
            return x < V{} ? V{} : x;
        case Activation::sigmoid:
            return sigmoid<T, Lanes>(x);
        case Activation::tanh:
            return tanh<T, Lanes>(x);
        case Activation::hard_sigmoid:
            return clamp<T, Lanes>(x * broadcast<V>(T(0.2)) + broadcast<V>(T(0.5)), T(0), T(1));
        case Activation::hardsigmoid:
            return clamp<T, Lanes>(x + broadcast<V>(T(3)), T(0), T(6)) / broadcast<V>(T(6));
        case Activation::elu:
            return elu<T, Lanes>(x);
        default:
            return x;
    }
}

/// The same as a quotient where it is one: the products of gates are then what step.h makes of them, to the bit.
template <class T, int Lanes>
inline Fraction<Vector<T, Lanes>> activated_fraction(Activation activation, Vector<T, Lanes> x, bool fast) {
    if (fast && activation == Activation::sigmoid) return fast_sigmoid_fraction<T, Lanes>(x);
    if (fast && activation == Activation::tanh) return fast_tanh_fraction<T, Lanes>(x);
    if (activation == Activation::sigmoid) return sigmoid_fraction<T, Lanes>(x);
    if (activation == Activation::tanh) return tanh_fraction<T, Lanes>(x);
    return {activated<T, Lanes>(activation, x), broadcast<Vector<T, Lanes>>(T(1))};
}

/// exp of differences to the largest value, so that nothing overflows; summed in order.
template <class T>
inline void softmax(std::size_t width, T* values) {
    constexpr int lanes = native_lanes<T>;
    using V = Vector<T, lanes>;
    T largest = values[0];
    for (std::size_t at = 1; at < width; ++at) largest = values[at] > largest ? values[at] : largest;
    const V floor = broadcast<V>(ExpConstants<T>::vanishes);
    for (std::size_t at = 0; at < width; at += static_cast<std::size_t>(lanes)) {
        const V x = maximum(floor, load_part<V>(values + at, width - at) - broadcast<V>(largest));
        const SplitExp<V> split = split_exp<T, lanes, true>(x);
        store_part(values + at, fma(split.scale, split.expm1, split.scale), width - at);
    }
    T sum = T(0);
    for (std::size_t at = 0; at < width; ++at) sum += values[at];
    for (std::size_t at = 0; at < width; ++at) values[at] /= sum;
}

template <class T>
inline void apply_activation(Activation activation, std::size_t rows, std::size_t width,
                             T* values) CELLSTEP_NONBLOCKING {
    if (activation == Activation::linear) return;
    if (activation == Activation::softmax) {
        for (std::size_t row = 0; row < rows; ++row) softmax<T>(width, values + row * width);
        return;
    }
    constexpr int lanes = native_lanes<T>;
    using V = Vector<T, lanes>;
    const std::size_t count = rows * width;
    for (std::size_t at = 0; at < count; at += static_cast<std::size_t>(lanes))
        store_part(values + at, activated<T, lanes>(activation, load_part<V>(values + at, count - at)), count - at);
}

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

/// Mean and inverse deviation, as torch.nn.LayerNorm defines them: biased variance, 1e-5 added to it.
template <class T>
struct Moments {
    T mean;
    T inverse;
};

constexpr double norm_eps = 1e-5;

/// Calls visit(unit, width, padded) for each panel; `padded` units lie in the panels before it.
template <class Visit>
inline void for_each_panel(std::size_t hidden_size, Visit visit) {
    std::size_t width = 0;
    std::size_t padded = 0;
    for (std::size_t unit = 0; unit < hidden_size; unit += width, padded += width) {
        width = panel_width(hidden_size - unit);
        visit(unit, width, padded);
    }
}

/// Moments of one row of gate sums, spread over panels of `rows` rows each. Coupled layers have no f.
template <class T>
inline Moments<T> gate_moments(const T* sums, std::size_t rows, std::size_t row, std::size_t hidden_size,
                               bool coupled) {
    const auto over = [&](auto add) {
        for_each_panel(hidden_size, [&](std::size_t unit, std::size_t width, std::size_t padded) {
            const T* panel = sums + gate_count * (padded * rows + row * width);
            const std::size_t count = hidden_size - unit < width ? hidden_size - unit : width;
            for (std::size_t gate = 0; gate < gate_count; ++gate)
                for (std::size_t lane = 0; lane < count && !(coupled && gate == 1); ++lane)
                    add(panel[gate * width + lane]);
        });
    };
    const T count = static_cast<T>(hidden_size * (coupled ? 3 : 4));
    T sum = T(0);
    over([&](T value) { sum += value; });
    const T mean = sum / count;
    T squares = T(0);
    over([&](T value) { squares += (value - mean) * (value - mean); });
    return {mean, T(1) / root(squares / count + T(norm_eps))};
}

template <class T>
inline Moments<T> moments(const T* values, std::size_t count) {
    T sum = T(0);
    for (std::size_t at = 0; at < count; ++at) sum += values[at];
    const T mean = sum / static_cast<T>(count);
    T squares = T(0);
    for (std::size_t at = 0; at < count; ++at) squares += (values[at] - mean) * (values[at] - mean);
    return {mean, T(1) / root(squares / static_cast<T>(count) + T(norm_eps))};
}

/// sums = bias + LN(input part) norm_ih + LN(recurrent part) norm_hh, for the rows of one step.
template <class T>
inline void normalise_gates(const VariantSweep<T>& s, std::size_t step, const T* recurrent) {
    const std::size_t rows = s.steps * s.batch;
    for (std::size_t row = 0; row < s.batch; ++row) {
        const unsigned char* packed = first_panel(s.weights, s.packed, s.input_size);
        const Moments<T> a = gate_moments<T>(s.sums, rows, step * s.batch + row, s.hidden_size, s.options.coupled);
        const Moments<T> r = gate_moments<T>(recurrent, s.batch, row, s.hidden_size, s.options.coupled);
        for_each_panel(s.hidden_size, [&](std::size_t unit, std::size_t width, std::size_t padded) {
            T* to = s.sums + gate_count * (padded * rows + (step * s.batch + row) * width);
            const T* from = recurrent + gate_count * (padded * s.batch + row * width);
            const T* bias = reinterpret_cast<const T*>(packed);
            packed += panel_stride<T>(s.weights, width, s.input_size, s.recurrent_size);
            const std::size_t count = s.hidden_size - unit < width ? s.hidden_size - unit : width;
            for (std::size_t gate = 0; gate < gate_count; ++gate) {
                const T* gain_a = s.options.norm_ih + gate * s.hidden_size + unit;
                const T* gain_r = s.options.norm_hh + gate * s.hidden_size + unit;
                for (std::size_t lane = 0; lane < count; ++lane) {
                    const std::size_t at = gate * width + lane;
                    to[at] = bias[at] + (to[at] - a.mean) * a.inverse * gain_a[lane] +
                             (from[at] - r.mean) * r.inverse * gain_r[lane];
                }
            }
        });
    }
}

/// Gates of one row and panel: c of the step, before zoneout, to new_c, and o, as a quotient, to `over` and `under`.
/// `unit` is the first of `width` in the panel.
template <class T, int lanes>
inline void gate_panel(const VariantSweep<T>& s, std::size_t row, std::size_t unit, std::size_t width, const T* sums,
                       T* new_c, T* over, T* under) CELLSTEP_NONBLOCKING {
    using V = Vector<T, lanes>;
    const LayerOptions<T>& options = s.options;
    const std::size_t units = s.hidden_size;
    for (std::size_t lane = 0; lane < width && unit + lane < units; lane += static_cast<std::size_t>(lanes)) {
        const std::size_t at = unit + lane;
        const std::size_t count = units - at;
        const V c = load_part<V>(s.c + row * units + at, count);
        V i = load<V>(sums + lane);
        V f = load<V>(sums + width + lane);
        V output = load<V>(sums + 3 * width + lane);
        if (options.peephole) {
            i = fma(load_part<V>(options.peephole + at, count), c, i);
            f = fma(load_part<V>(options.peephole + units + at, count), c, f);
        }
        const Fraction<V> in = activated_fraction<T, lanes>(options.gate, i, options.fast);
        if (options.coupled) {
            f = broadcast<V>(T(1)) - in.over / in.under;
        } else {
            const Fraction<V> keep = activated_fraction<T, lanes>(options.gate, f, options.fast);
            f = keep.over / keep.under;
        }
        Fraction<V> g = activated_fraction<T, lanes>(options.candidate, load<V>(sums + 2 * width + lane), options.fast);
        if (s.masks.mask_g) g.over *= load_part<V>(s.masks.mask_g + row * units + at, count);
        V next = fma(f, c, (in.over * g.over) / (in.under * g.under));
        if (options.cell_clip > T(0)) next = clamp<T, lanes>(next, -options.cell_clip, options.cell_clip);
        if (options.peephole) output = fma(load_part<V>(options.peephole + 2 * units + at, count), next, output);
        const Fraction<V> o = activated_fraction<T, lanes>(options.gate, output, options.fast);
        store_part(new_c + at, next, count);
        store_part(over + at, o.over, count);
        store_part(under + at, o.under, count);
    }
}

/// old = keep old + (1 - keep) fresh; `keep` is one value for all, or an array of one each.
template <class T>
inline void zone_out(std::size_t count, T probability, const T* keep, const T* fresh, T* old) {
    if (!keep && probability == T(0)) {
        std::memcpy(old, fresh, count * sizeof(T));
        return;
    }
    constexpr int lanes = native_lanes<T>;
    using V = Vector<T, lanes>;
    const V one = broadcast<V>(T(1));
    for (std::size_t at = 0; at < count; at += static_cast<std::size_t>(lanes)) {
        const V share = keep ? load_part<V>(keep + at, count - at) : broadcast<V>(probability);
        const V value =
            fma(share, load_part<V>(old + at, count - at), (one - share) * load_part<V>(fresh + at, count - at));
        store_part(old + at, value, count - at);
    }
}

template <class T>
inline void clear_rows(const VariantSweep<T>& s, std::size_t step) {
    for (std::size_t row = 0; row < s.batch; ++row) {
        if (!s.masks.reset[static_cast<std::ptrdiff_t>(step) * s.masks.reset_step_stride +
                           static_cast<std::ptrdiff_t>(row) * s.masks.reset_row_stride])
            continue;
        T* h = s.h + row * s.recurrent_size;
        T* c = s.c + row * s.hidden_size;
        for (std::size_t at = 0; at < s.recurrent_size; ++at) h[at] = s.masks.initial_h ? s.masks.initial_h[at] : T(0);
        for (std::size_t at = 0; at < s.hidden_size; ++at) c[at] = s.masks.initial_c ? s.masks.initial_c[at] : T(0);
    }
}

/// h before the projection: o times the activated, perhaps normalised, c. Overwrites new_c's row only in `m`.
template <class T>
inline void hidden_row(const LayerOptions<T>& options, std::size_t units, const T* new_c, const T* over, const T* under,
                       T* m) {
    constexpr int lanes = native_lanes<T>;
    using V = Vector<T, lanes>;
    Moments<T> moment{T(0), T(1)};
    if (options.norm_c) moment = moments<T>(new_c, units);
    for (std::size_t at = 0; at < units; at += static_cast<std::size_t>(lanes)) {
        const std::size_t count = units - at;
        V c = load_part<V>(new_c + at, count);
        if (options.norm_c)
            c = (c - broadcast<V>(moment.mean)) * broadcast<V>(moment.inverse) *
                    load_part<V>(options.norm_c + at, count) +
                load_part<V>(options.norm_c_bias + at, count);
        const Fraction<V> squashed = activated_fraction<T, lanes>(options.output, c, options.fast);
        // A lane past the end would divide by zero; no lane of it is stored.
        store_part(
            m + at,
            (load_part<V>(over + at, count) * squashed.over) / (load_part<V>(under + at, count) * squashed.under),
            count);
    }
}

/// Adds the hidden part of a step to its sums, or to zero in `recurrent` where it is normalised by itself. `widened`:
/// memory for the weights of a panel.
template <class T>
inline void add_recurrent(const VariantSweep<T>& s, std::size_t step, const T* h, T* recurrent, T* widened) {
    const std::size_t depth = s.input_size + s.recurrent_size;
    Step<T> part{};
    part.rows = s.batch;
    part.input_size = s.input_size;
    part.hidden_size = s.hidden_size;
    part.recurrent_size = s.recurrent_size;
    part.last_unit = s.hidden_size;
    part.weights = s.weights;
    part.packed = s.packed;
    part.h = h;
    part.sums = s.sums;
    part.sums_rows = s.steps * s.batch;
    part.sums_row = step * s.batch;
    if (s.options.norm_hh) {
        for (std::size_t at = 0; at < s.batch * gate_count * padded_size(s.hidden_size); ++at) recurrent[at] = T(0);
        part.sums = recurrent;
        part.sums_rows = s.batch;
        part.sums_row = 0;
    }
    if (s.weights == WeightType::int8) {
        part.h_stride = static_cast<std::ptrdiff_t>(s.recurrent_size);
        part.scratch = widened;
        return kernels<T>().int8_step({part, Int8Part::recurrent});
    }
    if constexpr (panels_at_once<T> > 0)
        if (s.batch == 1) return row_of_weights<T>(part, KeepSums<T>{part});
    const unsigned char* packed = static_cast<const unsigned char*>(s.packed);
    for_each_panel(s.hidden_size, [&](std::size_t, std::size_t width, std::size_t padded) {
        const std::size_t columns = gate_count * width;
        const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(columns);
        T* sums = part.sums + gate_count * padded * part.sums_rows + part.sums_row * columns;
        const T* weights = full_weights<T>(s.weights, packed, columns, depth, widened) + s.input_size * columns;
        product<T>({s.batch, columns, s.recurrent_size, h, static_cast<std::ptrdiff_t>(s.recurrent_size), 1, weights,
                    stride, sums, stride});
        packed += panel_bytes<T>(s.weights, width, depth);
    });
}

template <class T>
inline void variant_sweep(const VariantSweep<T>& s) CELLSTEP_NONBLOCKING {
    const std::size_t rows = s.steps * s.batch;
    const std::size_t units = s.hidden_size;
    const std::ptrdiff_t recurrent_stride = static_cast<std::ptrdiff_t>(s.recurrent_size);
    T* recurrent = s.scratch;
    T* new_c = recurrent + gate_count * padded_size(units) * s.batch;
    T* over = new_c + s.batch * units;
    T* under = over + s.batch * units;
    T* m = under + s.batch * units;
    T* masked_h = m + s.batch * units;
    T* projected = masked_h + s.batch * s.recurrent_size;
    T* weights = projected + s.batch * s.recurrent_size;
    for (std::size_t step = 0; step < s.steps; ++step) {
        if (s.masks.reset && step >= s.masks.reset_first) clear_rows<T>(s, step);
        const T* h = s.h;
        if (s.masks.mask_h) {
            for (std::size_t at = 0; at < s.batch * s.recurrent_size; ++at) masked_h[at] = s.h[at] * s.masks.mask_h[at];
            h = masked_h;
        }
        add_recurrent<T>(s, step, h, recurrent, weights);
        if (s.options.norm_ih) normalise_gates<T>(s, step, recurrent);
        for_each_panel(units, [&](std::size_t unit, std::size_t width, std::size_t padded) {
            for (std::size_t row = 0; row < s.batch; ++row) {
                const T* sums = s.sums + gate_count * (padded * rows + (step * s.batch + row) * width);
                constexpr int most = native_lanes<T>;
                const auto panel = width == 16 ? gate_panel < T, most < 16 ? most : 16 > : width == 8 ? gate_panel < T,
                           most < 8 ? most : 8 > : gate_panel < T, most < 4 ? most : 4 > ;
                panel(s, row, unit, width, sums, new_c + row * units, over + row * units, under + row * units);
            }
        });
        for (std::size_t row = 0; row < s.batch; ++row)
            hidden_row<T>(s.options, units, new_c + row * units, over + row * units, under + row * units,
                          m + row * units);
        const T* new_h = m;
        if (s.options.projection) {
            for (std::size_t at = 0; at < s.batch * s.recurrent_size; ++at) projected[at] = T(0);
            product<T>({s.batch, s.recurrent_size, units, m, static_cast<std::ptrdiff_t>(units), 1,
                        s.options.projection, recurrent_stride, projected, recurrent_stride});
            new_h = projected;
        }
        const std::size_t h_count = s.batch * s.recurrent_size;
        const std::size_t c_count = s.batch * units;
        zone_out<T>(c_count, s.options.zoneout_c, s.masks.keep_c ? s.masks.keep_c + step * c_count : nullptr, new_c,
                    s.c);
        zone_out<T>(h_count, s.options.zoneout_h, s.masks.keep_h ? s.masks.keep_h + step * h_count : nullptr, new_h,
                    s.h);
        for (std::size_t row = 0; row < s.batch; ++row)
            std::memcpy(s.y + static_cast<std::ptrdiff_t>(step) * s.y_step_stride +
                            static_cast<std::ptrdiff_t>(row) * s.y_row_stride,
                        s.h + row * s.recurrent_size, s.recurrent_size * sizeof(T));
        if (s.cells) std::memcpy(s.cells + step * c_count, s.c, c_count * sizeof(T));
    }
}

}  // namespace CELLSTEP_ISA
}  // namespace core
}  // namespace cellstep
