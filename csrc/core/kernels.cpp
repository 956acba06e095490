// Compiled once for each instruction set, with CELLSTEP_ISA naming it.
#include "core/kernels.h"

#include "core/activations.h"
#include "core/pack.h"
#include "core/simd.h"

namespace cellstep {
namespace core {
namespace CELLSTEP_ISA {

/// Loads and stores of a vector whose last lanes may lie past the end of the row.
template <class V, class T>
inline V load_part(const T* source, std::size_t count) {
    if (count >= sizeof(V) / sizeof(T)) return load<V>(source);
    V value{};
    for (std::size_t lane = 0; lane < count; ++lane) value[lane] = source[lane];
    return value;
}

template <class V, class T>
inline void store_part(T* target, V value, std::size_t count) {
    if (count >= sizeof(V) / sizeof(T)) return store(target, value);
    for (std::size_t lane = 0; lane < count; ++lane) target[lane] = value[lane];
}

/// A block of Rows by Vectors registers of C stays in registers over the whole depth.
template <class T, int Rows, int Vectors>
inline void product_tile(const Product<T>& p, std::size_t row, std::size_t column) {
    constexpr int lanes = native_lanes<T>;
    using V = Vector<T, lanes>;
    const T* a[Rows];
    T* c[Rows];
    V sum[Rows][Vectors];
    for (int r = 0; r < Rows; ++r) {
        a[r] = p.a + static_cast<std::ptrdiff_t>(row + r) * p.a_row_stride;
        c[r] = p.c + static_cast<std::ptrdiff_t>(row + r) * p.c_stride + column;
        for (int v = 0; v < Vectors; ++v) sum[r][v] = load<V>(c[r] + v * lanes);
    }
    const T* b = p.b + column;
    for (std::size_t k = 0; k < p.depth; ++k, b += p.b_stride) {
        V weight[Vectors];
        for (int v = 0; v < Vectors; ++v) weight[v] = load<V>(b + v * lanes);
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(k) * p.a_depth_stride;
        for (int r = 0; r < Rows; ++r) {
            const V value = broadcast<V>(a[r][at]);
            for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(value, weight[v], sum[r][v]);
        }
    }
    for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < Vectors; ++v) store(c[r] + v * lanes, sum[r][v]);
}

template <class T, int Vectors>
inline void product_columns(const Product<T>& p, std::size_t column) {
    std::size_t row = 0;
    for (; row + 6 <= p.rows; row += 6) product_tile<T, 6, Vectors>(p, row, column);
    switch (p.rows - row) {
        case 5:
            return product_tile<T, 5, Vectors>(p, row, column);
        case 4:
            return product_tile<T, 4, Vectors>(p, row, column);
        case 3:
            return product_tile<T, 3, Vectors>(p, row, column);
        case 2:
            return product_tile<T, 2, Vectors>(p, row, column);
        case 1:
            return product_tile<T, 1, Vectors>(p, row, column);
        default:
            return;
    }
}

/// The last columns, fewer than a vector: a chunk of B at a time is copied to whole, zero-padded vectors, so that they
/// take the same tile. C is stored between chunks, which changes no bit of the sums.
template <class T>
inline void product_tail(const Product<T>& p, std::size_t column) {
    constexpr std::size_t lanes = static_cast<std::size_t>(native_lanes<T>);
    constexpr std::size_t chunk = 64;
    using V = Vector<T, native_lanes<T>>;
    const std::size_t count = p.columns - column;
    T b[chunk * lanes];
    T c[6 * lanes];
    for (std::size_t k = 0; k < p.depth; k += chunk) {
        const std::size_t depth = p.depth - k < chunk ? p.depth - k : chunk;
        for (std::size_t at = 0; at < depth; ++at)
            store(b + at * lanes, load_part<V>(p.b + static_cast<std::ptrdiff_t>(k + at) * p.b_stride + column, count));
        for (std::size_t row = 0; row < p.rows; row += 6) {
            const std::size_t rows = p.rows - row < 6 ? p.rows - row : 6;
            T* target = p.c + static_cast<std::ptrdiff_t>(row) * p.c_stride + column;
            for (std::size_t r = 0; r < rows; ++r)
                store(c + r * lanes, load_part<V>(target + static_cast<std::ptrdiff_t>(r) * p.c_stride, count));
            const T* a = p.a + static_cast<std::ptrdiff_t>(row) * p.a_row_stride +
                         static_cast<std::ptrdiff_t>(k) * p.a_depth_stride;
            product_columns<T, 1>({rows, lanes, depth, a, p.a_row_stride, p.a_depth_stride, b, lanes, c, lanes}, 0);
            for (std::size_t r = 0; r < rows; ++r)
                store_part(target + static_cast<std::ptrdiff_t>(r) * p.c_stride, load<V>(c + r * lanes), count);
        }
    }
}

template <class T>
inline void product(const Product<T>& p) {
    constexpr std::size_t lanes = static_cast<std::size_t>(native_lanes<T>);
    // As many accumulators as the register file holds beside a row of B: 32 registers with AVX-512, else 16.
    constexpr int block = native_bytes == 64 ? 4 : 2;
    std::size_t column = 0;
    if (p.rows == 1) {
        // One row has only its columns to hide the latency of the multiply-adds behind.
        for (; column + 8 * lanes <= p.columns; column += 8 * lanes) product_tile<T, 1, 8>(p, 0, column);
    }
    for (; column + block * lanes <= p.columns; column += block * lanes) product_columns<T, block>(p, column);
    for (; column + lanes <= p.columns; column += lanes) product_columns<T, 1>(p, column);
    if (column < p.columns) product_tail(p, column);
}

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

extern const Kernels<float> kernels_float = {product<float>, sweep<float>, step_backward<float>};
extern const Kernels<double> kernels_double = {product<double>, sweep<double>, step_backward<double>};

}  // namespace CELLSTEP_ISA
}  // namespace core
}  // namespace cellstep
