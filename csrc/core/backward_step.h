/// One step of a plain layer back in time, for the instruction set that a file is compiled for.
#pragma once

#include "core/activations.h"
#include "core/kernels.h"
#include "core/product.h"

namespace cellstep {
namespace core {
namespace CELLSTEP_ISA {

/// With the derivatives of sigmoid and tanh in terms of their values:
///   grad_o = grad_h tanh(c) o (1 - o),   grad_c += grad_h o (1 - tanh(c)^2),
///   grad_i = grad_c g i (1 - i),  grad_f = grad_c c_prev f (1 - f),  grad_g = grad_c i (1 - g^2),
/// and grad_c f goes on to the step before (Hochreiter and Schmidhuber 1997; Gers et al. 2000 for f).
template <class T>
inline void step_backward(const StepBackward<T>& s) CELLSTEP_NONBLOCKING {
    constexpr int lanes = native_lanes<T>;
    using V = Vector<T, lanes>;
    const std::size_t units = s.hidden_size;
    const V one = broadcast<V>(T(1));
    for (std::size_t row = 0; row < s.rows; ++row) {
        const T* gates = s.gates + row * gate_count * units;
        T* grad_gates = s.grad_gates + row * gate_count * units;
        const T* grad_h_row = s.grad_h + static_cast<std::ptrdiff_t>(row) * s.grad_h_stride;
        for (std::size_t unit = 0; unit < units; unit += static_cast<std::size_t>(lanes)) {
            const std::size_t count = units - unit;
            // What forward has saved lies far away by now, and no stream of it is long enough to be foreseen.
            for (std::size_t gate = 0; gate < gate_count; ++gate)
                __builtin_prefetch(gates + (2 * gate_count + gate) * units + unit);
            __builtin_prefetch(s.cell_prev + (row + 2) * units + unit);
            if (s.grad_y) __builtin_prefetch(s.grad_y + (row + 2) * units + unit);
            const std::size_t at = row * units + unit;
            const V i = load_part<V>(gates + unit, count);
            const V f = load_part<V>(gates + units + unit, count);
            const V g = load_part<V>(gates + 2 * units + unit, count);
            const V o = load_part<V>(gates + 3 * units + unit, count);
            const V tanh_c = tanh<T, lanes>(load_part<V>(s.cell + at, count));
            const V hidden = o * tanh_c;
            if (s.hidden) store_part(s.hidden + at, hidden, count);
            V grad_h = load_part<V>(grad_h_row + unit, count);
            if (s.grad_y) grad_h += load_part<V>(s.grad_y + at, count);
            V grad_c = load_part<V>(s.grad_c + at, count);
            if (s.grad_cell) grad_c += load_part<V>(s.grad_cell + at, count);
            grad_c = fma(grad_h, fma(-hidden, tanh_c, o), grad_c);
            const V grad_input = grad_c * i;
            const V grad[gate_count] = {grad_input * g * (one - i),
                                        grad_c * load_part<V>(s.cell_prev + at, count) * f * (one - f),
                                        fma(-(grad_input * g), g, grad_input), grad_h * hidden * (one - o)};
            store_part(s.grad_c + at, grad_c * f, count);
            for (std::size_t gate = 0; gate < gate_count; ++gate) {
                store_part(grad_gates + gate * units + unit, grad[gate], count);
                T* bias = s.grad_bias + gate * units + unit;
                store_part(bias, load_part<V>(bias, count) + grad[gate], count);
            }
        }
    }
}

}  // namespace CELLSTEP_ISA
}  // namespace core
}  // namespace cellstep
