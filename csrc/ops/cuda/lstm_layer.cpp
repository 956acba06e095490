// A layer over padded rows is one over packed rows that all have every step.
#include "operators.h"

namespace cellstep {
namespace cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer(Tensor x, Tensor h, Tensor c, Tensor weight_ih,
                                                              Tensor weight_hh, Maybe bias_ih, Maybe bias_hh,
                                                              bool save) {
    const char* op = "lstm_layer";
    ops::check_input(op, "x", x, 3);
    ops::check_input(op, "h", h, 2);
    const std::int64_t steps = x.size(0), batch = x.size(1);
    if (steps == 0)
        ops::fail(op, ": expected at least one step, got x of shape ", ops::shape_text(x), ": leave out empty calls");
    ops::check_argument(op, "h", h, x, {batch, h.size(1)});
    const auto [y, h_n, c_n, gates, cells] = lstm_packed(ops::as_rows(x), std::nullopt, h, c, weight_ih, weight_hh,
                                                         bias_ih, bias_hh, std::nullopt, false, save, save);
    const auto in_steps = [&](const Tensor& rows) {
        const std::int64_t width = rows.size(1);
        return ops::view_of(rows, {steps, batch, width}, {batch * width, width, 1});
    };
    return {in_steps(y), h_n, c_n, save ? in_steps(gates) : gates, save ? in_steps(cells) : cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer_backward(
    Maybe grad_y, Maybe grad_h, Maybe grad_c, Maybe grad_cells, Tensor x, Tensor h, Tensor c, Tensor weight_ih,
    Tensor weight_hh, Tensor y, Tensor gates, Tensor cells, bool to_x, bool to_weights) {
    const char* op = "lstm_layer_backward";
    ops::check_input(op, "x", x, 3);
    ops::check_input(op, "h", h, 2);
    const std::int64_t steps = x.size(0), batch = x.size(1), inputs = x.size(2), units = h.size(1);
    ops::check_argument(op, "y", y, x, {steps, batch, units});
    ops::check_argument(op, "cells", cells, x, {steps, batch, units});
    ops::check_argument(op, "gates", gates, x, {steps, batch, 4 * units});
    for (auto* tensor : {&grad_y, &grad_cells}) {
        if (!*tensor) continue;
        ops::check_argument(op, tensor == &grad_y ? "grad_y" : "grad_cells", **tensor, x, {steps, batch, units});
        *tensor = ops::as_rows(**tensor);
    }
    const auto [grad_x, grad_h0, grad_c0, grad_weight_ih, grad_weight_hh, grad_bias, none] = lstm_packed_backward(
        grad_y, grad_h, grad_c, grad_cells, ops::as_rows(x), std::nullopt, h, c, weight_ih, weight_hh, std::nullopt,
        ops::as_rows(y), ops::as_rows(gates), ops::as_rows(cells), false, to_x, to_weights);
    const Tensor to_input = to_x ? ops::view_of(grad_x, {steps, batch, inputs}, {batch * inputs, inputs, 1}) : grad_x;
    return {to_input, grad_h0, grad_c0, grad_weight_ih, grad_weight_hh, grad_bias};
}

}  // namespace cuda
}  // namespace cellstep
