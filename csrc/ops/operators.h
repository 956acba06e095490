/// The operators' kernels on the CPU, one file each in cpu/. Shapes: T steps, N rows, I inputs, H hidden units, L
/// layers, O outputs. All take float32 or float64, any strides, and throw std::runtime_error for what does not fit.
#pragma once

#include <optional>
#include <tuple>

#include "ops/options.h"
#include "ops/tensor.h"

namespace cellstep {
namespace ops {

/// x (T, N, I), h and c (N, H) -> y (T, N, H), h (N, H), c (N, H), gates (T, N, 4 H) and cells (T, N, H), the last two
/// empty unless `save`.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer(Tensor x, Tensor h, Tensor c, Tensor weight_ih,
                                                              Tensor weight_hh, std::optional<Tensor> bias_ih,
                                                              std::optional<Tensor> bias_hh, bool save);

/// Gradients of y, h, c and of the c of every step, where any came -> gradients of x, h, c, weight_ih, weight_hh and of
/// either bias (4 H). That of x is empty unless `to_x`, those of the weights unless `to_weights`.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer_backward(
    std::optional<Tensor> grad_y, std::optional<Tensor> grad_h, std::optional<Tensor> grad_c,
    std::optional<Tensor> grad_cells, Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor y,
    Tensor gates, Tensor cells, bool to_x, bool to_weights);

/// A plain layer, perhaps with a projection to R values, over packed sequences: x (P, I) holds the rows of the first
/// step, then those of the second and so on; batch_sizes (T) int64 tells how many rows each step has, not rising;
/// without it every step has all N. h (N, R) and c (N, H) -> y (P, R), h (N, R) and c (N, H) behind each row's last
/// step, gates (P, 4 H) unless not `save_gates`, and cells (P, H) unless not `save_cells`, else empty. `reverse`: from
/// the last step to the first.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_packed(Tensor x, std::optional<Tensor> batch_sizes, Tensor h,
                                                               Tensor c, Tensor weight_ih, Tensor weight_hh,
                                                               std::optional<Tensor> bias_ih,
                                                               std::optional<Tensor> bias_hh,
                                                               std::optional<Tensor> weight_hr, bool reverse,
                                                               bool save_gates, bool save_cells);

/// As lstm_layer_backward; the last gradient is that of weight_hr, empty without one.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_packed_backward(
    std::optional<Tensor> grad_y, std::optional<Tensor> grad_h, std::optional<Tensor> grad_c,
    std::optional<Tensor> grad_cells, Tensor x, std::optional<Tensor> batch_sizes, Tensor h, Tensor c, Tensor weight_ih,
    Tensor weight_hh, std::optional<Tensor> weight_hr, Tensor y, Tensor gates, Tensor cells, bool reverse, bool to_x,
    bool to_weights);

/// options.h has the shapes.
std::tuple<Tensor, Tensor, Tensor, Tensor> variant_layer(Variant call);

/// x (..., I), weight (O, I), bias (O) -> x weight^T + bias, (..., O), each sum in order of the inputs.
Tensor dense(Tensor x, Tensor weight, std::optional<Tensor> bias);

/// An activation by its number in core/kernels.h on every value of x; softmax over the last axis.
Tensor activate(Tensor x, std::int64_t activation);

/// image: the bytes of a deploy file (core/image.h); x (N, T, I), or (T, N, I) unless batch_first -> y likewise, the
/// output of every step, and the state after the last; without h and c from the model's initial state.
std::tuple<Tensor, Tensor, Tensor> lstm_stack(Tensor image, Tensor x, std::optional<Tensor> h, std::optional<Tensor> c,
                                              bool batch_first);

/// image: as above; x (N, T, I), h (S, N, h_size) and c (S, N, c_size), or the initial state -> y (N, T, O),
/// or (N, O) unless every step is answered, and the state after the last step. `answers` as core/image.h numbers them.
/// lengths (N) int64: the steps of each row; reset (N, T) bool: rows to put to the initial state before the step.
/// x (N, I) -> y (N, O) is one step, with answers 0 and neither of the two.
std::tuple<Tensor, Tensor, Tensor> run_model(Tensor image, Tensor x, std::optional<Tensor> h, std::optional<Tensor> c,
                                             std::int64_t output_size, std::int64_t answers,
                                             std::optional<Tensor> lengths, std::optional<Tensor> reset);

}  // namespace ops
}  // namespace cellstep
