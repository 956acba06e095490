/// What one unit of a layer with options finds in a step, free of where its sums and its state lie: the kernels of
/// single steps and the one of whole sequences both stand on it. python/cellstep/formula.py has the formula.
#pragma once

#include "activations.h"

namespace cellstep {
namespace cuda {

/// What layer normalisation makes of the values of a row: (x - mean) inverse gain.
template <class T>
struct Normal {
    T mean;
    T inverse;

    __device__ T operator()(T x) const { return (x - mean) * inverse; }
};

/// From the mean of `count` values and the sum of their squared differences from it.
template <class T>
__device__ Normal<T> normal_of(T mean, T squares, T count) {
    return {mean, T(1) / static_cast<T>(sqrt(squares / count + T(1e-5)))};
}

/// Where gate i, f, g or o stands in arrays that have no f of a coupled layer.
template <class T>
__device__ int gate_place(const VariantStep<T>& s, int gate) {
    return s.coupled && gate > 1 ? gate - 1 : gate;
}

template <class T>
__device__ bool has_gate(const VariantStep<T>& s, int gate) {
    return !s.coupled || gate != 1;
}

/// What a unit has beside its rows of the matrices; zeros where the layer has none. Gates come as i, f, g, o.
template <class T>
struct UnitWeights {
    T bias_ih[4];
    T bias_hh[4];
    T norm_hh[4];
    T peephole[3];  ///< of i, f, o
    T norm_c;
    T norm_c_bias;
};

template <class T>
__device__ UnitWeights<T> unit_weights(const VariantStep<T>& s, std::int64_t unit) {
    UnitWeights<T> w{};
    const std::int64_t units = s.hidden_size;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
        if (!has_gate(s, gate)) continue;
        const std::int64_t at = gate_place(s, gate) * units + unit;
        if (s.bias_ih) w.bias_ih[gate] = s.bias_ih[at];
        if (s.bias_hh) w.bias_hh[gate] = s.bias_hh[at];
        if (s.norm_hh) w.norm_hh[gate] = s.norm_hh[s.expanded ? gate * units + unit : at];
    }
    if (s.peephole) {
        w.peephole[0] = s.peephole[unit];
        if (!s.coupled) w.peephole[1] = s.peephole[units + unit];
        w.peephole[2] = s.peephole[(s.coupled && !s.expanded ? 1 : 2) * units + unit];
    }
    if (s.norm_c) {
        w.norm_c = s.norm_c[unit];
        w.norm_c_bias = s.norm_c_bias[unit];
    }
    return w;
}

/// The sum of a gate without its peephole. `input` is normalised already, where the layer normalises.
template <class T>
__device__ T gate_sum(const VariantStep<T>& s, const UnitWeights<T>& w, int gate, T input, T hidden,
                      const Normal<T>& of_hidden) {
    if (s.norm_hh) hidden = of_hidden(hidden) * w.norm_hh[gate];
    return (input + w.bias_ih[gate]) + (hidden + w.bias_hh[gate]);
}

/// c', before zoneout, from the sums of i, f and g. Activations are much code, so that one piece of it serves all.
template <class T>
__device__ T new_c(const VariantStep<T>& s, const UnitWeights<T>& w, T i, T f, T g, T c, T mask_g) {
    if (s.peephole) {
        i += w.peephole[0] * c;
        f += w.peephole[1] * c;
    }
#pragma unroll 1
    for (int gate = 0; gate < 3; ++gate) {
        const T value = activated(gate == 2 ? s.candidate : s.gate, i);
        i = f;
        f = g;
        g = value;
    }
    if (s.coupled) f = T(1) - i;
    T value = f * c + i * (g * mask_g);
    if (s.cell_clip > T(0)) {
        value = value < -s.cell_clip ? -s.cell_clip : value;
        value = value > s.cell_clip ? s.cell_clip : value;
    }
    return value;
}

/// o out(c'), from the sum of o.
template <class T>
__device__ T new_h(const VariantStep<T>& s, const UnitWeights<T>& w, T o, T c, const Normal<T>& of_c) {
    if (s.peephole) o += w.peephole[2] * c;
    T seen = s.norm_c ? of_c(c) * w.norm_c + w.norm_c_bias : c;
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
        const T value = activated(part == 1 ? s.output : s.gate, o);
        o = seen;
        seen = value;
    }
    return o * seen;
}

/// Zoneout: what a state is behind the step, from what it was and what came; `keep`: of this value, in training.
template <class T>
__device__ T kept(T before, T now, bool has_keep, T keep, T zoneout) {
    if (has_keep) return keep * before + (T(1) - keep) * now;
    return zoneout > T(0) ? zoneout * before + (T(1) - zoneout) * now : now;
}

}  // namespace cuda
}  // namespace cellstep
