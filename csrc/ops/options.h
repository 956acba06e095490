/// What lstm_variant is called with, and its checks; the kernels are each library's own.
#pragma once

#include <array>
#include <optional>
#include <tuple>

#include "ops/tensor.h"

namespace cellstep {
namespace ops {

/// The arguments of lstm_variant, checked. Those that may be missing are contiguous, all but `reset`.
struct Variant {
    const char* op;
    Tensor x, h, c, weight_ih, weight_hh;
    std::optional<Tensor> bias_ih, bias_hh, weight_hr, weight_peephole, norm_ih, norm_hh, norm_c, norm_c_bias;
    std::optional<Tensor> reset, initial_h, initial_c, mask_h, mask_g, keep_h, keep_c;
    bool coupled;
    double cell_clip, zoneout_h, zoneout_c;
    core::Activation gate, candidate, output;
    bool save_cells;

    /// Those that may be missing, all but `reset`.
    std::array<std::optional<Tensor>*, 14> options() {
        return {&bias_ih,     &bias_hh,   &weight_hr, &weight_peephole, &norm_ih, &norm_hh, &norm_c,
                &norm_c_bias, &initial_h, &initial_c, &mask_h,          &mask_g,  &keep_h,  &keep_c};
    }
};

/// A layer with options, forward alone: x (T, N, I), h (N, R), c (N, H) -> y (T, N, R), h, c, and c of every step
/// (T, N, H), empty unless `save_cells`. python/cellstep/formula.py has the formula and the shapes of the others.
/// `run`: a library's function from a Variant to these four.
template <auto run>
std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_variant(
    Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, std::optional<Tensor> bias_ih,
    std::optional<Tensor> bias_hh, std::optional<Tensor> weight_hr, std::optional<Tensor> weight_peephole,
    std::optional<Tensor> norm_ih, std::optional<Tensor> norm_hh, std::optional<Tensor> norm_c,
    std::optional<Tensor> norm_c_bias, std::optional<Tensor> reset, std::optional<Tensor> initial_h,
    std::optional<Tensor> initial_c, std::optional<Tensor> mask_h, std::optional<Tensor> mask_g,
    std::optional<Tensor> keep_h, std::optional<Tensor> keep_c, bool coupled, double cell_clip, double zoneout_h,
    double zoneout_c, std::int64_t gate_activation, std::int64_t activation, std::int64_t output_activation,
    bool save_cells) {
    const char* op = "lstm_variant";
    check_input(op, "x", x, 3);
    check_input(op, "h", h, 2);
    check_input(op, "c", c, 2);
    const std::int64_t steps = x.size(0);
    const std::int64_t batch = x.size(1);
    const std::int64_t units = c.size(1);
    const std::int64_t recurrent = h.size(1);
    const std::int64_t rows = (coupled ? 3 : 4) * units;
    if (steps == 0) fail(op, ": expected at least one step, got x of shape ", shape_text(x), ": leave out empty calls");
    if (recurrent > units || (recurrent < units && !weight_hr))
        fail(op, ": expected h of ", units, " values, or fewer and weight_hr, got ", shape_text(h));
    check_argument(op, "h", h, x, {batch, recurrent});
    check_argument(op, "c", c, x, {batch, units});
    check_argument(op, "weight_ih", weight_ih, x, {rows, x.size(2)});
    check_argument(op, "weight_hh", weight_hh, x, {rows, recurrent});
    for (const std::int64_t code : {gate_activation, activation, output_activation})
        if (code < 0 || code >= static_cast<std::int64_t>(core::Activation::softmax))
            fail(op, ": expected activations below ", static_cast<int>(core::Activation::softmax), ", got ", code);
    if (reset) check_mask(op, "reset", *reset, {steps, batch});
    if (reset && !is_together(*reset, x)) fail(op, ": expected reset on the device of x, got another: move it");
    if (norm_ih.has_value() != norm_hh.has_value() || norm_ih.has_value() != norm_c.has_value() ||
        norm_ih.has_value() != norm_c_bias.has_value())
        fail(op, ": expected norm_ih, norm_hh, norm_c and norm_c_bias together, or none of them");
    const auto check = [&](const char* name, std::optional<Tensor>& tensor, std::initializer_list<std::int64_t> sizes) {
        if (!tensor) return;
        check_argument(op, name, *tensor, x, sizes);
        tensor = as_contiguous(*tensor);
    };
    check("bias_ih", bias_ih, {rows});
    check("bias_hh", bias_hh, {rows});
    check("weight_hr", weight_hr, {recurrent, units});
    check("weight_peephole", weight_peephole, {rows - units});
    check("norm_ih", norm_ih, {rows});
    check("norm_hh", norm_hh, {rows});
    check("norm_c", norm_c, {units});
    check("norm_c_bias", norm_c_bias, {units});
    check("initial_h", initial_h, {recurrent});
    check("initial_c", initial_c, {units});
    check("mask_h", mask_h, {batch, recurrent});
    check("mask_g", mask_g, {batch, units});
    check("keep_h", keep_h, {steps, batch, recurrent});
    check("keep_c", keep_c, {steps, batch, units});
    const auto gate = core::Activation(gate_activation), candidate = core::Activation(activation),
               output = core::Activation(output_activation);
    return run(
        {op,      x,       h,         c,           weight_ih, weight_hh, bias_ih,   bias_hh, weight_hr, weight_peephole,
         norm_ih, norm_hh, norm_c,    norm_c_bias, reset,     initial_h, initial_c, mask_h,  mask_g,    keep_h,
         keep_c,  coupled, cell_clip, zoneout_h,   zoneout_c, gate,      candidate, output,  save_cells});
}

}  // namespace ops
}  // namespace cellstep
