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

/// Copies x to contiguous rows, scaled to what the layer was trained on.
template <class T>
void gather(const LayerForward<T>& layer, T* rows) {
    for (std::size_t step = 0; step < layer.steps; ++step) {
        for (std::size_t row = 0; row < layer.batch; ++row) {
            const T* source = layer.x.data + static_cast<std::ptrdiff_t>(step) * layer.x.step_stride +
                              static_cast<std::ptrdiff_t>(row) * layer.x.row_stride;
            for (std::size_t k = 0; k < layer.input_size; ++k, source += layer.x.feature_stride) {
                T value = *source;
                if (layer.offset) value -= layer.offset[k];
                if (layer.scale) value *= layer.scale[k];
                *rows++ = value;
            }
        }
    }
}

}  // namespace

std::size_t layer_scratch(std::size_t steps, std::size_t batch, std::size_t input_size, std::size_t hidden_size) {
    return steps * batch * (gate_count * padded_size(hidden_size) + input_size);
}

template <class T>
void layer_forward(const LayerForward<T>& layer, T* scratch) {
    const Kernels<T>& kernel = kernels<T>();
    const std::size_t rows = layer.steps * layer.batch;
    const std::size_t depth = 1 + layer.input_size + layer.hidden_size;
    T* sums = scratch;
    T* x = scratch + rows * gate_count * padded_size(layer.hidden_size);
    gather(layer, x);

    const T* panel = layer.packed;
    T* panel_sums = sums;
    std::size_t width = 0;
    for (std::size_t unit = 0; unit < layer.hidden_size; unit += width) {
        width = panel_width(layer.hidden_size - unit);
        const std::size_t columns = gate_count * width;
        const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(columns);
        for (std::size_t row = 0; row < rows; ++row)
            std::memcpy(panel_sums + row * columns, panel, columns * sizeof(T));
        kernel.product({rows, columns, layer.input_size, x, static_cast<std::ptrdiff_t>(layer.input_size), 1,
                        panel + columns, stride, panel_sums, stride});
        panel += columns * depth;
        panel_sums += columns * rows;
    }

    kernel.sweep({layer.steps, layer.batch, layer.input_size, layer.hidden_size, layer.packed, sums, layer.h,
                  static_cast<std::ptrdiff_t>(layer.hidden_size), layer.c, layer.y.data, layer.y.step_stride,
                  layer.y.row_stride, layer.gates, layer.cells});
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
