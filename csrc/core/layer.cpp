#include "core/layer.h"

#include <cstring>

#include "core/kernels.h"

namespace cellstep {
namespace core {

namespace {

template <class T>
void zero(T* values, std::size_t count) {
    for (std::size_t at = 0; at < count; ++at) values[at] = T(0);
}

/// The rows of x one after the other: x itself if they lie so, else a copy in `rows`.
template <class T>
const T* gather(const SequenceView<T>& x, std::size_t steps, std::size_t batch, std::size_t features, T* rows) {
    const std::ptrdiff_t row_size = static_cast<std::ptrdiff_t>(features);
    if (x.feature_stride == 1 && (batch == 1 || x.row_stride == row_size) &&
        (steps == 1 || x.step_stride == row_size * static_cast<std::ptrdiff_t>(batch)))
        return x.data;
    T* target = rows;
    for (std::size_t step = 0; step < steps; ++step) {
        for (std::size_t row = 0; row < batch; ++row) {
            const T* source = x.data + static_cast<std::ptrdiff_t>(step) * x.step_stride +
                              static_cast<std::ptrdiff_t>(row) * x.row_stride;
            for (std::size_t k = 0; k < features; ++k, source += x.feature_stride) *target++ = *source;
        }
    }
    return rows;
}

/// The input part of all gate sums, panel by panel, begun with the bias or with zero.
template <class T>
void project(const T* packed, std::size_t rows, std::size_t input_size, std::size_t hidden_size,
             std::size_t recurrent_size, bool bias, const T* x, T* sums) {
    std::size_t width = 0;
    for (std::size_t unit = 0; unit < hidden_size; unit += width) {
        width = panel_width(hidden_size - unit);
        const std::size_t columns = gate_count * width;
        const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(columns);
        for (std::size_t row = 0; row < rows; ++row) {
            if (bias)
                std::memcpy(sums + row * columns, packed, columns * sizeof(T));
            else
                zero(sums + row * columns, columns);
        }
        kernels<T>().product({rows, columns, input_size, x, static_cast<std::ptrdiff_t>(input_size), 1,
                              packed + columns, stride, sums, stride});
        packed += columns * (1 + input_size + recurrent_size);
        sums += columns * rows;
    }
}

}  // namespace

std::size_t layer_scratch(std::size_t steps, std::size_t batch, std::size_t input_size, std::size_t hidden_size) {
    return steps * batch * (gate_count * padded_size(hidden_size) + input_size);
}

std::size_t variant_scratch(std::size_t steps, std::size_t batch, std::size_t input_size, std::size_t hidden_size) {
    // Gate sums of a step, c, o and h before the projection, and twice h behind it, which is no larger.
    return layer_scratch(steps, batch, input_size, hidden_size) +
           batch * (gate_count * padded_size(hidden_size) + 5 * hidden_size);
}

template <class T>
void layer_forward(const LayerForward<T>& layer, T* scratch) {
    const std::size_t rows = layer.steps * layer.batch;
    T* sums = scratch;
    const T* x = gather(layer.x, layer.steps, layer.batch, layer.input_size,
                        scratch + rows * gate_count * padded_size(layer.hidden_size));
    project(layer.packed, rows, layer.input_size, layer.hidden_size, layer.hidden_size, true, x, sums);
    kernels<T>().sweep({layer.steps, layer.batch, layer.input_size, layer.hidden_size, layer.packed, sums, layer.h,
                        static_cast<std::ptrdiff_t>(layer.hidden_size), layer.c, layer.y.data, layer.y.step_stride,
                        layer.y.row_stride, layer.gates, layer.cells});
}

template <class T>
void variant_forward(const VariantForward<T>& layer, T* scratch) {
    const std::size_t rows = layer.steps * layer.batch;
    T* sums = scratch;
    T* x_rows = scratch + rows * gate_count * padded_size(layer.hidden_size);
    const T* x = gather(layer.x, layer.steps, layer.batch, layer.input_size, x_rows);
    project(layer.packed, rows, layer.input_size, layer.hidden_size, layer.recurrent_size, !layer.options.norm_ih, x,
            sums);
    kernels<T>().variant_sweep({layer.steps, layer.batch, layer.input_size, layer.hidden_size, layer.recurrent_size,
                                layer.packed, sums, layer.h, layer.c, layer.y.data, layer.y.step_stride,
                                layer.y.row_stride, layer.cells, x_rows + rows * layer.input_size, layer.options,
                                layer.masks});
}

template <class T>
void layer_backward(const LayerBackward<T>& layer) {
    const Kernels<T>& kernel = kernels<T>();
    const std::size_t units = layer.hidden_size;
    const std::size_t inputs = layer.input_size;
    const std::size_t state = layer.batch * units;
    const std::size_t gates = gate_count * units;
    const std::ptrdiff_t gate_stride = static_cast<std::ptrdiff_t>(gates);
    const std::ptrdiff_t unit_stride = static_cast<std::ptrdiff_t>(units);
    const std::ptrdiff_t input_stride = static_cast<std::ptrdiff_t>(inputs);

    for (std::size_t step = layer.steps; step-- > 0;) {
        const T* grad_y = layer.grad_y + step * state;
        for (std::size_t at = 0; at < state; ++at) layer.grad_h[at] += grad_y[at];
        if (layer.grad_cells) {
            const T* grad_cells = layer.grad_cells + step * state;
            for (std::size_t at = 0; at < state; ++at) layer.grad_c[at] += grad_cells[at];
        }
        T* grad_gates = layer.grad_gates + step * layer.batch * gates;
        kernel.step_backward({layer.batch, units, layer.gates + step * layer.batch * gates, layer.cells + step * state,
                              step ? layer.cells + (step - 1) * state : layer.c0, layer.grad_h, layer.grad_c,
                              grad_gates});
        zero(layer.grad_h, state);
        kernel.product({layer.batch, units, gates, grad_gates, gate_stride, 1, layer.weight_hh.data,
                        layer.weight_hh.row_stride, layer.grad_h, unit_stride});
    }

    const std::size_t rows = layer.steps * layer.batch;
    zero(layer.grad_x, rows * inputs);
    kernel.product({rows, inputs, gates, layer.grad_gates, gate_stride, 1, layer.weight_ih.data,
                    layer.weight_ih.row_stride, layer.grad_x, input_stride});
    zero(layer.grad_weight_ih, gates * inputs);
    kernel.product({gates, inputs, rows, layer.grad_gates, 1, gate_stride, layer.x, input_stride, layer.grad_weight_ih,
                    input_stride});
    zero(layer.grad_weight_hh, gates * units);
    kernel.product({gates, units, layer.batch, layer.grad_gates, 1, gate_stride, layer.h0, unit_stride,
                    layer.grad_weight_hh, unit_stride});
    if (layer.steps > 1) {
        kernel.product({gates, units, rows - layer.batch, layer.grad_gates + layer.batch * gates, 1, gate_stride,
                        layer.y, unit_stride, layer.grad_weight_hh, unit_stride});
    }
    zero(layer.grad_bias, gates);
    for (std::size_t row = 0; row < rows; ++row) {
        const T* source = layer.grad_gates + row * gates;
        for (std::size_t gate = 0; gate < gates; ++gate) layer.grad_bias[gate] += source[gate];
    }
}

template <class T>
void dense_forward(std::size_t rows, std::size_t in_size, std::size_t out_size, const T* packed, const T* x,
                   std::ptrdiff_t x_stride, T* y, std::ptrdiff_t y_stride) {
    for (std::size_t row = 0; row < rows; ++row)
        std::memcpy(y + static_cast<std::ptrdiff_t>(row) * y_stride, packed, out_size * sizeof(T));
    kernels<T>().product({rows, out_size, in_size, x, x_stride, 1, packed + out_size,
                          static_cast<std::ptrdiff_t>(out_size), y, y_stride});
}

template <class T>
void pack_dense(std::size_t in_size, std::size_t out_size, MatrixView<T> weight, const T* bias, T* packed) {
    for (std::size_t out = 0; out < out_size; ++out) {
        packed[out] = bias ? bias[out] : T(0);
        for (std::size_t in = 0; in < in_size; ++in) packed[(1 + in) * out_size + out] = weight(out, in);
    }
}

template <class T>
void apply_activation(Activation activation, std::size_t rows, std::size_t width, T* values) {
    kernels<T>().activate(activation, rows, width, values);
}

template void apply_activation<float>(Activation, std::size_t, std::size_t, float*);
template void apply_activation<double>(Activation, std::size_t, std::size_t, double*);
template void variant_forward<float>(const VariantForward<float>&, float*);
template void variant_forward<double>(const VariantForward<double>&, double*);
template void layer_forward<float>(const LayerForward<float>&, float*);
template void layer_forward<double>(const LayerForward<double>&, double*);
template void layer_backward<float>(const LayerBackward<float>&);
template void layer_backward<double>(const LayerBackward<double>&);
template void dense_forward<float>(std::size_t, std::size_t, std::size_t, const float*, const float*, std::ptrdiff_t,
                                   float*, std::ptrdiff_t);
template void dense_forward<double>(std::size_t, std::size_t, std::size_t, const double*, const double*, std::ptrdiff_t,
                                    double*, std::ptrdiff_t);
template void pack_dense<float>(std::size_t, std::size_t, MatrixView<float>, const float*, float*);
template void pack_dense<double>(std::size_t, std::size_t, MatrixView<double>, const double*, double*);

}  // namespace core
}  // namespace cellstep
