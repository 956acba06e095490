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

/// grad_cells: for the c of every step, if anything came for it. -> gradients of x, h, c, weight_ih, weight_hh and of
/// either bias (4 H).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer_backward(
    Tensor grad_y, Tensor grad_h, Tensor grad_c, std::optional<Tensor> grad_cells, Tensor x, Tensor h, Tensor c,
    Tensor weight_ih, Tensor weight_hh, Tensor y, Tensor gates, Tensor cells);

/// A layer with options, forward alone: x (T, N, I), h (N, R), c (N, H) -> y (T, N, R), h, c, and c of every step
/// (T, N, H), empty unless `save_cells`. python/cellstep/formula.py has the formula and the shapes of the others.
std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_variant(
    Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, std::optional<Tensor> bias_ih,
    std::optional<Tensor> bias_hh, std::optional<Tensor> weight_hr, std::optional<Tensor> weight_peephole,
    std::optional<Tensor> norm_ih, std::optional<Tensor> norm_hh, std::optional<Tensor> norm_c,
    std::optional<Tensor> norm_c_bias, std::optional<Tensor> reset, std::optional<Tensor> initial_h,
    std::optional<Tensor> initial_c, std::optional<Tensor> mask_h, std::optional<Tensor> mask_g,
    std::optional<Tensor> keep_h, std::optional<Tensor> keep_c, bool coupled, double cell_clip, double zoneout_h,
    double zoneout_c, std::int64_t gate_activation, std::int64_t activation, std::int64_t output_activation,
    bool save_cells);

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
std::tuple<Tensor, Tensor, Tensor> run_model(Tensor image, Tensor x, std::optional<Tensor> h, std::optional<Tensor> c,
                                             std::int64_t output_size, std::int64_t answers,
                                             std::optional<Tensor> lengths, std::optional<Tensor> reset);

}  // namespace ops
}  // namespace cellstep
