/// The operators' kernels on the CPU, one file each in cpu/. Shapes: T steps, N rows, I inputs, H hidden units, L
/// layers, O outputs. All take float32 or float64, any strides, and throw std::runtime_error for what does not fit.
#pragma once

#include <optional>
#include <tuple>

#include "ops/tensor.h"

namespace cellstep {
namespace ops {

/// x (N, I), h and c (N, H) -> h (N, H), c (N, H), gates (N, 4 H), or an empty tensor unless `save`.
std::tuple<Tensor, Tensor, Tensor> lstm_cell(Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh,
                                             std::optional<Tensor> bias_ih, std::optional<Tensor> bias_hh, bool save);

/// -> gradients of x, h, c, weight_ih, weight_hh and of either bias (4 H).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_cell_backward(Tensor grad_h, Tensor grad_c, Tensor x,
                                                                              Tensor h, Tensor c, Tensor weight_ih,
                                                                              Tensor weight_hh, Tensor c_next,
                                                                              Tensor gates);

/// x (T, N, I), h and c (N, H) -> y (T, N, H), h (N, H), c (N, H), gates (T, N, 4 H) and cells (T, N, H), the last two
/// empty unless `save`.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer(Tensor x, Tensor h, Tensor c, Tensor weight_ih,
                                                              Tensor weight_hh, std::optional<Tensor> bias_ih,
                                                              std::optional<Tensor> bias_hh, bool save);

/// -> gradients of x, h, c, weight_ih, weight_hh and of either bias (4 H).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer_backward(Tensor grad_y, Tensor grad_h,
                                                                               Tensor grad_c, Tensor x, Tensor h,
                                                                               Tensor c, Tensor weight_ih,
                                                                               Tensor weight_hh, Tensor y, Tensor gates,
                                                                               Tensor cells);

/// x (..., I), weight (O, I), bias (O) -> x weight^T + bias, (..., O), each sum in order of the inputs.
Tensor dense(Tensor x, Tensor weight, std::optional<Tensor> bias);

/// image: the bytes of a deploy file (core/image.h); x (N, T, I), h and c (L, N, H) -> y (N, T, O), or (N, 1, O) if
/// last_only, and the state after the last step.
std::tuple<Tensor, Tensor, Tensor> run_model(Tensor image, Tensor x, Tensor h, Tensor c, std::int64_t output_size,
                                             bool last_only);

}  // namespace ops
}  // namespace cellstep
