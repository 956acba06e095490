#include "layers.h"
#include "operators.h"

namespace cellstep {
namespace cuda {

namespace {

/// (N, K) as (1, N, K), contiguous.
Tensor as_stage(const Tensor& tensor) {
    const Tensor values = ops::as_contiguous(tensor);
    return ops::view_of(values, {1, values.size(0), values.size(1)}, {values.numel(), values.size(1), 1});
}
Maybe as_stage(const Maybe& tensor) { return tensor ? Maybe(as_stage(*tensor)) : std::nullopt; }

Tensor off_stage(const Tensor& tensor) { return part(tensor, 0); }

Stack one_layer(const char* op, const Device& device, const Tensor& x, const Maybe& batch_sizes, const Tensor& h,
                const Tensor& c, const Tensor& weight_ih, const Tensor& weight_hh, const Maybe& bias_ih,
                const Maybe& bias_hh, const Maybe& weight_hr, bool reverse) {
    ops::check_input(op, "h", h, 2);
    ops::check_input(op, "c", c, 2);
    const std::int64_t batch = h.size(0), units = c.size(1), recurrent = h.size(1);
    if (!weight_hr && recurrent != units)
        ops::fail(op, ": expected h of ", units, " values like c, got ", ops::shape_text(h),
                  ": pass weight_hr for a projection");
    ops::check_argument(op, "h", h, x, {batch, recurrent});
    ops::check_argument(op, "c", c, x, {batch, units});
    ops::check_argument(op, "weight_ih", weight_ih, x, {4 * units, x.size(1)});
    ops::check_argument(op, "weight_hh", weight_hh, x, {4 * units, recurrent});
    if (weight_hr) ops::check_argument(op, "weight_hr", *weight_hr, x, {recurrent, units});
    if (bias_ih) ops::check_argument(op, "bias_ih", *bias_ih, x, {4 * units});
    if (bias_hh) ops::check_argument(op, "bias_hh", *bias_hh, x, {4 * units});
    return {packed(op, device, x.size(0), batch, batch_sizes, x),
            1,
            1,
            reverse,
            {{weight_ih, weight_hh, bias_ih, bias_hh}},
            weight_hr,
            ops::as_contiguous(x),
            as_stage(h),
            as_stage(c),
            std::nullopt,
            std::nullopt};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_packed(Tensor x, Maybe batch_sizes, Tensor h, Tensor c,
                                                               Tensor weight_ih, Tensor weight_hh, Maybe bias_ih,
                                                               Maybe bias_hh, Maybe weight_hr, bool reverse,
                                                               bool save_gates, bool save_cells) {
    const char* op = "lstm_packed";
    ops::check_input(op, "x", x, 2);
    const Device device(x);
    const Answers answers =
        forward(op, device,
                one_layer(op, device, x, batch_sizes, h, c, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, reverse),
                save_gates, save_cells);
    const auto saved = [&](const Maybe& values) { return values ? off_stage(*values) : ops::empty(x, {0}); };
    return {answers.y, off_stage(answers.h_n), off_stage(answers.c_n), saved(answers.gates), saved(answers.cells)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_packed_backward(
    Maybe grad_y, Maybe grad_h, Maybe grad_c, Maybe grad_cells, Tensor x, Maybe batch_sizes, Tensor h, Tensor c,
    Tensor weight_ih, Tensor weight_hh, Maybe weight_hr, Tensor y, Tensor gates, Tensor cells, bool reverse, bool to_x,
    bool to_weights) {
    const char* op = "lstm_packed_backward";
    ops::check_input(op, "x", x, 2);
    const Device device(x);
    const Stack stack = one_layer(op, device, x, batch_sizes, h, c, weight_ih, weight_hh, std::nullopt, std::nullopt,
                                  weight_hr, reverse);
    const std::int64_t tokens = stack.tokens(), batch = h.size(0), units = stack.units(), recurrent = stack.recurrent();
    ops::check_argument(op, "y", y, x, {tokens, recurrent});
    ops::check_argument(op, "gates", gates, x, {tokens, 4 * units});
    ops::check_argument(op, "cells", cells, x, {tokens, units});
    const auto check = [&](const char* name, const Maybe& gradient, std::int64_t rows, std::int64_t width) {
        if (gradient) ops::check_argument(op, name, *gradient, x, {rows, width});
    };
    check("grad_y", grad_y, tokens, recurrent);
    check("grad_h", grad_h, batch, recurrent);
    check("grad_c", grad_c, batch, units);
    check("grad_cells", grad_cells, tokens, units);
    if (grad_y) grad_y = ops::as_contiguous(*grad_y);
    const Gradients gradients = backward(op, device, stack,
                                         {ops::as_contiguous(y), std::nullopt, as_stage(gates), as_stage(cells), grad_y,
                                          as_stage(grad_h), as_stage(grad_c), as_stage(grad_cells)},
                                         to_x, to_weights, true);
    const auto answer = [&](const Maybe& gradient) { return gradient ? *gradient : ops::empty(x, {0}); };
    const StageGradients& stage = gradients.stages[0];
    return {answer(gradients.x),        off_stage(gradients.h),  off_stage(gradients.c),
            answer(stage.weight_ih),    answer(stage.weight_hh), *stage.bias,
            answer(gradients.weight_hr)};
}

}  // namespace cuda
}  // namespace cellstep
