#include "core/layer.h"

#include <cstring>

#include "ops/operators.h"
#include "ops/threads.h"

namespace cellstep {
namespace ops {

namespace {

template <class T>
void forward(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& weight_ih, const Tensor& weight_hh,
             const std::optional<Tensor>& bias_ih, const std::optional<Tensor>& bias_hh, const Tensor& y,
             const Tensor& h_n, bool save, const Tensor& gates, const Tensor& cells) {
    const std::size_t steps = size(x, 0);
    const std::size_t batch = size(x, 1);
    const std::size_t inputs = size(x, 2);
    const std::size_t units = size(h, 1);
    const std::size_t packed = core::packed_size(inputs, units, units);
    const Threads threads;
    const auto memory = scratch<T>(packed + core::layer_scratch(steps, batch, inputs, units, threads.get()));
    core::pack_layer<T>({inputs, units, units, false, matrix<T>(weight_ih), matrix<T>(weight_hh),
                         bias_ih ? data<T>(*bias_ih) : nullptr, bias_hh ? data<T>(*bias_hh) : nullptr},
                        memory.get());
    const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(units);
    const std::ptrdiff_t step = static_cast<std::ptrdiff_t>(batch * units);
    core::layer_forward<T>({steps,
                            batch,
                            inputs,
                            units,
                            core::WeightType::full,
                            memory.get(),
                            {data<T>(x), x.stride(0), x.stride(1), x.stride(2)},
                            data<T>(h),
                            mutable_data<T>(c),
                            {mutable_data<T>(y), step, row},
                            save ? mutable_data<T>(gates) : nullptr,
                            save ? mutable_data<T>(cells) : nullptr,
                            {},
                            threads.get()},
                           memory.get() + packed);
    if (batch > 0)
        std::memcpy(mutable_data<T>(h_n), data<T>(y) + (steps - 1) * batch * units, batch * units * sizeof(T));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer(Tensor x, Tensor h, Tensor c, Tensor weight_ih,
                                                              Tensor weight_hh, std::optional<Tensor> bias_ih,
                                                              std::optional<Tensor> bias_hh, bool save) {
    const char* op = "lstm_layer";
    check_input(op, "x", x, 3);
    check_input(op, "h", h, 2);
    const std::int64_t steps = x.size(0);
    const std::int64_t batch = x.size(1);
    const std::int64_t units = h.size(1);
    const std::int64_t gate_rows = 4 * units;
    if (steps == 0) fail(op, ": expected at least one step, got x of shape ", shape_text(x), ": leave out empty calls");
    check_argument(op, "h", h, x, {batch, units});
    check_argument(op, "c", c, x, {batch, units});
    check_argument(op, "weight_ih", weight_ih, x, {gate_rows, x.size(2)});
    check_argument(op, "weight_hh", weight_hh, x, {gate_rows, units});
    for (auto* bias : {&bias_ih, &bias_hh}) {
        if (!*bias) continue;
        check_argument(op, bias == &bias_ih ? "bias_ih" : "bias_hh", **bias, x, {gate_rows});
        *bias = as_contiguous(**bias);
    }
    if (rows_are_shared(steps, batch, x.size(2), units)) {
        const auto [y, h_n, c_n, gates, cells] = lstm_packed(as_rows(x), std::nullopt, h, c, weight_ih, weight_hh,
                                                             bias_ih, bias_hh, std::nullopt, false, save, save);
        const auto in_steps = [&](const Tensor& rows) {
            const std::int64_t width = rows.size(1);
            return view_of(rows, {steps, batch, width}, {batch * width, width, 1});
        };
        return {in_steps(y), h_n, c_n, save ? in_steps(gates) : gates, save ? in_steps(cells) : cells};
    }
    h = as_contiguous(h);
    const Tensor c_n = copy_of(c);
    const Tensor h_n = empty(x, {batch, units});
    const Tensor y = empty(x, {steps, batch, units});
    const Tensor gates = save ? empty(x, {steps, batch, gate_rows}) : empty(x, {0});
    const Tensor cells = save ? empty(x, {steps, batch, units}) : empty(x, {0});
    const auto kernel = is_float(x) ? forward<float> : forward<double>;
    kernel(x, h, c_n, weight_ih, weight_hh, bias_ih, bias_hh, y, h_n, save, gates, cells);
    return {y, h_n, c_n, gates, cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer_backward(
    std::optional<Tensor> grad_y, std::optional<Tensor> grad_h, std::optional<Tensor> grad_c,
    std::optional<Tensor> grad_cells, Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor y,
    Tensor gates, Tensor cells, bool to_x, bool to_weights) {
    const char* op = "lstm_layer_backward";
    check_input(op, "x", x, 3);
    check_input(op, "h", h, 2);
    const std::int64_t steps = x.size(0);
    const std::int64_t batch = x.size(1);
    const std::int64_t inputs = x.size(2);
    const std::int64_t units = h.size(1);
    check_argument(op, "y", y, x, {steps, batch, units});
    check_argument(op, "cells", cells, x, {steps, batch, units});
    check_argument(op, "gates", gates, x, {steps, batch, 4 * units});
    for (auto* tensor : {&grad_y, &grad_cells}) {
        if (!*tensor) continue;
        check_argument(op, tensor == &grad_y ? "grad_y" : "grad_cells", **tensor, x, {steps, batch, units});
        *tensor = as_rows(**tensor);
    }
    // All steps have all rows: the packed layout is that of the padded one.
    const auto [grad_x, grad_h0, grad_c0, grad_weight_ih, grad_weight_hh, grad_bias, none] =
        lstm_packed_backward(grad_y, grad_h, grad_c, grad_cells, as_rows(x), std::nullopt, h, c, weight_ih, weight_hh,
                             std::nullopt, as_rows(y), as_rows(gates), as_rows(cells), false, to_x, to_weights);
    const Tensor to_input = to_x ? view_of(grad_x, {steps, batch, inputs}, {batch * inputs, inputs, 1}) : grad_x;
    return {to_input, grad_h0, grad_c0, grad_weight_ih, grad_weight_hh, grad_bias};
}

}  // namespace ops
}  // namespace cellstep
