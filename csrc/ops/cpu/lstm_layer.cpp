#include "core/layer.h"

#include <cstring>

#include "ops/operators.h"

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
    const auto memory = scratch<T>(packed + core::layer_scratch(steps, batch, inputs, units));
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
                            nullptr},
                           memory.get() + packed);
    if (batch > 0)
        std::memcpy(mutable_data<T>(h_n), data<T>(y) + (steps - 1) * batch * units, batch * units * sizeof(T));
}

template <class T>
void backward(const Tensor& grad_y, const Tensor& grad_h, const Tensor& grad_c, const std::optional<Tensor>& grad_cells,
              const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& weight_ih, const Tensor& weight_hh,
              const Tensor& y, const Tensor& gates, const Tensor& cells, const Tensor& grad_x,
              const Tensor& grad_weight_ih, const Tensor& grad_weight_hh, const Tensor& grad_bias) {
    const std::size_t rows = size(x, 0) * size(x, 1);
    const std::size_t units = size(h, 1);
    const auto memory = scratch<T>(rows * core::gate_count * units);
    core::layer_backward<T>({size(x, 0),
                             size(x, 1),
                             size(x, 2),
                             units,
                             matrix<T>(weight_ih),
                             matrix<T>(weight_hh),
                             data<T>(x),
                             data<T>(h),
                             data<T>(c),
                             data<T>(y),
                             data<T>(gates),
                             data<T>(cells),
                             data<T>(grad_y),
                             grad_cells ? data<T>(*grad_cells) : nullptr,
                             mutable_data<T>(grad_h),
                             mutable_data<T>(grad_c),
                             mutable_data<T>(grad_x),
                             mutable_data<T>(grad_weight_ih),
                             mutable_data<T>(grad_weight_hh),
                             mutable_data<T>(grad_bias),
                             memory.get()});
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
    Tensor grad_y, Tensor grad_h, Tensor grad_c, std::optional<Tensor> grad_cells, Tensor x, Tensor h, Tensor c,
    Tensor weight_ih, Tensor weight_hh, Tensor y, Tensor gates, Tensor cells) {
    const char* op = "lstm_layer_backward";
    check_input(op, "x", x, 3);
    check_input(op, "h", h, 2);
    const std::int64_t steps = x.size(0);
    const std::int64_t batch = x.size(1);
    const std::int64_t inputs = x.size(2);
    const std::int64_t units = h.size(1);
    const std::int64_t gate_rows = 4 * units;
    for (const auto& [name, tensor] : {std::pair{"grad_h", &grad_h}, {"grad_c", &grad_c}, {"h", &h}, {"c", &c}})
        check_argument(op, name, *tensor, x, {batch, units});
    for (const auto& [name, tensor] : {std::pair{"grad_y", &grad_y}, {"y", &y}, {"cells", &cells}})
        check_argument(op, name, *tensor, x, {steps, batch, units});
    check_argument(op, "gates", gates, x, {steps, batch, gate_rows});
    check_argument(op, "weight_ih", weight_ih, x, {gate_rows, inputs});
    check_argument(op, "weight_hh", weight_hh, x, {gate_rows, units});
    for (Tensor* tensor : {&x, &h, &c, &weight_ih, &weight_hh, &y, &gates, &cells, &grad_y})
        *tensor = as_contiguous(*tensor);
    if (grad_cells) {
        check_argument(op, "grad_cells", *grad_cells, x, {steps, batch, units});
        grad_cells = as_contiguous(*grad_cells);
    }
    grad_h = copy_of(grad_h);
    grad_c = copy_of(grad_c);
    const Tensor grad_x = empty(x, {steps, batch, inputs});
    const Tensor grad_weight_ih = empty(x, {gate_rows, inputs});
    const Tensor grad_weight_hh = empty(x, {gate_rows, units});
    const Tensor grad_bias = empty(x, {gate_rows});
    const auto kernel = is_float(x) ? backward<float> : backward<double>;
    kernel(grad_y, grad_h, grad_c, grad_cells, x, h, c, weight_ih, weight_hh, y, gates, cells, grad_x, grad_weight_ih,
           grad_weight_hh, grad_bias);
    return {grad_x, grad_h, grad_c, grad_weight_ih, grad_weight_hh, grad_bias};
}

}  // namespace ops
}  // namespace cellstep
