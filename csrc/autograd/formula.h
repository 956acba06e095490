/// The layer as a formula on torch's own operators: what the gradients differentiate where no kernel is their gradient.
/// Twin of python/cellstep/formula.py, which gives the sources of the formulas and the shapes.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstddef>
#include <cstdint>

namespace cellstep {
namespace autograd {

/// The tensors of lstm_variant in the order of its arguments, undefined where one is absent.
constexpr std::size_t layer_tensor_count = 20;
using LayerTensors = std::array<at::Tensor, layer_tensor_count>;

/// What else the operator takes; by default a layer without options.
struct LayerOptions {
    bool coupled = false;
    double cell_clip = 0, zoneout_h = 0, zoneout_c = 0;
    std::int64_t gate_activation = 2, activation = 3, output_activation = 3;
};

/// y, h, c and c of every step.
using LayerResults = std::array<at::Tensor, 4>;

/// One layer in one direction, step by step.
LayerResults lstm_steps(const LayerTensors& tensors, const LayerOptions& options);

/// Gradients of lstm_steps with respect to each tensor from those of its results; undefined is none. They are
/// differentiable themselves where grad mode is on.
LayerTensors lstm_steps_gradients(const LayerTensors& tensors, const LayerOptions& options, const LayerResults& grads);

/// Gradient of an activation from its value y.
at::Tensor activate_backward(const at::Tensor& grad, const at::Tensor& y, std::int64_t activation);

}  // namespace autograd
}  // namespace cellstep
