// Compiled once for each instruction set, with CELLSTEP_ISA naming it.
#include "core/kernels.h"

#include "core/activations.h"
#include "core/pack.h"
#include "core/product.h"
#include "core/variant_sweep.h"

namespace cellstep {
namespace core {
namespace CELLSTEP_ISA {

/// Activates Lanes units of one row and moves their state by one step. `sums` points at the lanes of gate i.
template <class T, int Lanes>
inline void activate(const T* sums, std::size_t width, std::size_t count, T* c, T* h, T* gates, std::size_t units,
                     T* cell) {
    using V = Vector<T, Lanes>;
    const V i = sigmoid<T, Lanes>(load<V>(sums));
    const V f = sigmoid<T, Lanes>(load<V>(sums + width));
    const V g = tanh<T, Lanes>(load<V>(sums + 2 * width));
    const V o = sigmoid<T, Lanes>(load<V>(sums + 3 * width));
    const V c_next = fma(f, load_part<V>(c, count), i * g);
    store_part(c, c_next, count);
    store_part(h, o * tanh<T, Lanes>(c_next), count);
    if (gates) {
        store_part(gates, i, count);
        store_part(gates + units, f, count);
        store_part(gates + 2 * units, g, count);
        store_part(gates + 3 * units, o, count);
        store_part(cell, c_next, count);
    }
}

template <class T, int Width>
inline void activate_panel(const Sweep<T>& s, std::size_t step, std::size_t unit, const T* sums) {
    constexpr int lanes = native_lanes<T> < Width ? native_lanes<T> : Width;
    for (std::size_t row = 0; row < s.batch; ++row) {
        T* h = s.y + static_cast<std::ptrdiff_t>(step) * s.y_step_stride +
               static_cast<std::ptrdiff_t>(row) * s.y_row_stride;
        const std::size_t at = step * s.batch + row;
        const T* row_sums = sums + row * gate_count * Width;
        for (std::size_t lane = 0; lane < Width && unit + lane < s.hidden_size; lane += lanes) {
            const std::size_t first = unit + lane;
            activate<T, lanes>(row_sums + lane, Width, s.hidden_size - first, s.c + row * s.hidden_size + first,
                               h + first, s.gates ? s.gates + at * gate_count * s.hidden_size + first : nullptr,
                               s.hidden_size, s.cells ? s.cells + at * s.hidden_size + first : nullptr);
        }
    }
}

template <class T>
inline void sweep(const Sweep<T>& s) {
    const std::size_t rows = s.steps * s.batch;
    const std::size_t depth = 1 + s.input_size + s.hidden_size;
    const T* h = s.h;
    std::ptrdiff_t h_stride = s.h_stride;
    for (std::size_t step = 0; step < s.steps; ++step) {
        std::size_t width = 0;
        std::size_t padded = 0;
        for (std::size_t unit = 0; unit < s.hidden_size; unit += width, padded += width) {
            width = panel_width(s.hidden_size - unit);
            const std::size_t columns = gate_count * width;
            T* sums = s.sums + gate_count * padded * rows + step * s.batch * columns;
            const T* recurrent = s.packed + gate_count * padded * depth + (1 + s.input_size) * columns;
            const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(columns);
            product<T>({s.batch, columns, s.hidden_size, h, h_stride, 1, recurrent, stride, sums, stride});
            if (width == 16)
                activate_panel<T, 16>(s, step, unit, sums);
            else if (width == 8)
                activate_panel<T, 8>(s, step, unit, sums);
            else
                activate_panel<T, 4>(s, step, unit, sums);
        }
        h = s.y + static_cast<std::ptrdiff_t>(step) * s.y_step_stride;
        h_stride = s.y_row_stride;
    }
}

/// With s the sum before the activation and the derivatives of sigmoid and tanh in terms of their values:
///   grad_o = grad_h tanh(c) o (1 - o),   grad_c += grad_h o (1 - tanh(c)^2),
///   grad_i = grad_c g i (1 - i),  grad_f = grad_c c_prev f (1 - f),  grad_g = grad_c i (1 - g^2),
/// and grad_c f goes on to the step before (Hochreiter and Schmidhuber 1997; Gers et al. 2000 for f).
template <class T>
inline void step_backward(const StepBackward<T>& s) {
    constexpr int lanes = native_lanes<T>;
    using V = Vector<T, lanes>;
    const std::size_t units = s.hidden_size;
    const V one = broadcast<V>(T(1));
    for (std::size_t row = 0; row < s.batch; ++row) {
        const T* gates = s.gates + row * gate_count * units;
        T* grad_gates = s.grad_gates + row * gate_count * units;
        for (std::size_t unit = 0; unit < units; unit += static_cast<std::size_t>(lanes)) {
            const std::size_t count = units - unit;
            const std::size_t at = row * units + unit;
            const V i = load_part<V>(gates + unit, count);
            const V f = load_part<V>(gates + units + unit, count);
            const V g = load_part<V>(gates + 2 * units + unit, count);
            const V o = load_part<V>(gates + 3 * units + unit, count);
            const V tanh_c = tanh<T, lanes>(load_part<V>(s.cell + at, count));
            const V c_prev = load_part<V>(s.cell_prev + at, count);
            const V grad_h = load_part<V>(s.grad_h + at, count);
            const V grad_c = load_part<V>(s.grad_c + at, count) + grad_h * o * (one - tanh_c * tanh_c);
            store_part(grad_gates + unit, grad_c * g * i * (one - i), count);
            store_part(grad_gates + units + unit, grad_c * c_prev * f * (one - f), count);
            store_part(grad_gates + 2 * units + unit, grad_c * i * (one - g * g), count);
            store_part(grad_gates + 3 * units + unit, grad_h * tanh_c * o * (one - o), count);
            store_part(s.grad_c + at, grad_c * f, count);
        }
    }
}

extern const Kernels<float> kernels_float = {product<float>, sweep<float>, step_backward<float>, variant_sweep<float>,
                                             apply_activation<float>};
extern const Kernels<double> kernels_double = {product<double>, sweep<double>, step_backward<double>,
                                               variant_sweep<double>, apply_activation<double>};

}  // namespace CELLSTEP_ISA
}  // namespace core
}  // namespace cellstep
