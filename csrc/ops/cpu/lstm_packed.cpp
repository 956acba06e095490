#include <algorithm>
#include <cstring>

#include "core/backward.h"
#include "core/ragged.h"
#include "ops/operators.h"
#include "ops/threads.h"

namespace cellstep {
namespace ops {

namespace {

using Maybe = std::optional<Tensor>;

/// Checks batch_sizes against the tokens of x and the rows of h.
core::PackedSteps packed_steps(const char* op, const Tensor& x, Maybe& batch_sizes, std::int64_t batch, bool reverse) {
    const std::int64_t tokens = x.size(0);
    const auto rows = static_cast<std::size_t>(batch);
    if (!batch_sizes) {
        if (batch == 0 ? tokens != 0 : tokens % batch != 0)
            fail(op, ": expected x of ", batch, " rows a step like h, got ", tokens, " rows: pass batch_sizes");
        return {batch == 0 ? 0 : static_cast<std::size_t>(tokens / batch), rows, nullptr, reverse};
    }
    if (!batch_sizes->is_cpu() || batch_sizes->scalar_type() != ScalarType::Long || batch_sizes->dim() != 1)
        fail(op, ": expected batch_sizes as int64 on the CPU, one for each step, got another type, device or shape");
    batch_sizes = as_contiguous(*batch_sizes);
    const auto* sizes = data<std::int64_t>(*batch_sizes);
    const std::int64_t steps = batch_sizes->size(0);
    std::int64_t sum = 0;
    for (std::int64_t step = 0; step < steps; ++step) {
        const std::int64_t most = step == 0 ? batch : sizes[step - 1];
        if (sizes[step] < 0 || sizes[step] > most)
            fail(op, ": expected batch_sizes from 0 to the ", batch,
                 " rows of h and none larger than the one before, got ", sizes[step], " at ", step,
                 ": sort the rows by falling length");
        sum += sizes[step];
    }
    if (sum != tokens)
        fail(op, ": expected x of ", sum, " rows, the sum of batch_sizes, got ", shape_text(x), ": pack it again");
    return {static_cast<std::size_t>(steps), rows, sizes, reverse};
}

/// weight_hr (R, H) transposed, for the forward product.
template <class T>
void transpose_into(const Tensor& weight, T* target) {
    const auto values = matrix<T>(weight);
    const std::size_t outputs = size(weight, 0);
    const std::size_t units = size(weight, 1);
    for (std::size_t unit = 0; unit < units; ++unit)
        for (std::size_t out = 0; out < outputs; ++out) target[unit * outputs + out] = values(out, unit);
}

template <class T>
void forward(const core::PackedSteps& steps, const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& weight_ih,
             const Tensor& weight_hh, const Maybe& bias_ih, const Maybe& bias_hh, const Maybe& weight_hr,
             const Tensor& y, const Maybe& gates, const Maybe& cells) {
    const std::size_t inputs = size(x, 1);
    const std::size_t units = size(c, 1);
    const std::size_t recurrent = size(h, 1);
    const Threads threads;
    core::RaggedForward<T> layer{steps,
                                 inputs,
                                 units,
                                 recurrent,
                                 nullptr,
                                 nullptr,
                                 data<T>(x),
                                 mutable_data<T>(h),
                                 mutable_data<T>(c),
                                 mutable_data<T>(y),
                                 gates ? mutable_data<T>(*gates) : nullptr,
                                 cells ? mutable_data<T>(*cells) : nullptr,
                                 threads.get()};
    const std::size_t packed = core::packed_size(inputs, units, recurrent);
    const std::size_t projection = weight_hr ? units * recurrent : 0;
    const auto memory = scratch<T>(packed + projection + core::ragged_scratch<T>(layer));
    core::pack_layer<T>({inputs, units, recurrent, false, matrix<T>(weight_ih), matrix<T>(weight_hh),
                         data_or_null<T>(bias_ih), data_or_null<T>(bias_hh)},
                        memory.get());
    layer.packed = memory.get();
    if (weight_hr) {
        transpose_into<T>(*weight_hr, memory.get() + packed);
        layer.projection = memory.get() + packed;
    }
    core::ragged_forward<T>(layer, memory.get() + packed + projection);
}

/// What a backward pass reads and writes.
struct Backward {
    core::PackedSteps steps;
    Tensor x, h, c, weight_ih, weight_hh;
    Maybe weight_hr;
    Tensor y, gates, cells;
    Maybe grad_y, grad_cells;
    Tensor grad_h, grad_c, grad_bias;
    Maybe grad_x, grad_weight_ih, grad_weight_hh, grad_weight_hr;
    // Of a chunk of steps.
    Tensor grad_gates;
    Maybe h_prev, grad_outputs, hidden;
    bool begun = false;

    /// The large products of a chunk; its weight gradients are added to those of the chunks before.
    void chunk_done(std::int64_t token, std::int64_t tokens) {
        const auto part = [&](const Tensor& values, std::int64_t first) {
            return rows_of(values, first, tokens, values.size(1));
        };
        const Tensor gradients = part(grad_gates, 0);
        if (grad_x) multiply(gradients, weight_ih, part(*grad_x, token));
        if (grad_weight_ih) multiply(transposed(gradients), part(x, token), *grad_weight_ih, begun);
        if (grad_weight_hh) multiply(transposed(gradients), part(*h_prev, 0), *grad_weight_hh, begun);
        if (grad_weight_hr) multiply(transposed(part(*grad_outputs, 0)), part(*hidden, 0), *grad_weight_hr, begun);
        begun = true;
    }

    template <class T>
    void run() {
        const Threads threads;
        const auto out = [](const Maybe& tensor) { return tensor ? mutable_data<T>(*tensor) : nullptr; };
        const core::LayerBackward<T> layer{steps,
                                           size(c, 1),
                                           size(h, 1),
                                           matrix<T>(weight_hh),
                                           weight_hr ? matrix<T>(*weight_hr) : core::MatrixView<T>{nullptr, 0, 0},
                                           data<T>(c),
                                           data<T>(gates),
                                           data<T>(cells),
                                           data_or_null<T>(grad_y),
                                           data_or_null<T>(grad_cells),
                                           mutable_data<T>(grad_h),
                                           mutable_data<T>(grad_c),
                                           mutable_data<T>(grad_bias),
                                           data<T>(h),
                                           data<T>(y),
                                           mutable_data<T>(grad_gates),
                                           out(h_prev),
                                           out(grad_outputs),
                                           out(hidden),
                                           threads.get()};
        const auto memory = scratch<T>(core::backward_scratch<T>(layer));
        core::layer_backward<T>(
            layer, memory.get(),
            [](void* self, std::size_t token, std::size_t tokens) {
                static_cast<Backward*>(self)->chunk_done(static_cast<std::int64_t>(token),
                                                         static_cast<std::int64_t>(tokens));
            },
            this);
    }
};

void check_layer(const char* op, const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& weight_ih,
                 const Tensor& weight_hh, const Maybe& weight_hr) {
    check_input(op, "x", x, 2);
    check_input(op, "h", h, 2);
    check_input(op, "c", c, 2);
    const std::int64_t batch = h.size(0);
    const std::int64_t units = c.size(1);
    const std::int64_t recurrent = h.size(1);
    if (!weight_hr && recurrent != units)
        fail(op, ": expected h of ", units, " values like c, got ", shape_text(h), ": pass weight_hr for a projection");
    check_argument(op, "h", h, x, {batch, recurrent});
    check_argument(op, "c", c, x, {batch, units});
    check_argument(op, "weight_ih", weight_ih, x, {4 * units, x.size(1)});
    check_argument(op, "weight_hh", weight_hh, x, {4 * units, recurrent});
    if (weight_hr) check_argument(op, "weight_hr", *weight_hr, x, {recurrent, units});
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_packed(Tensor x, Maybe batch_sizes, Tensor h, Tensor c,
                                                               Tensor weight_ih, Tensor weight_hh, Maybe bias_ih,
                                                               Maybe bias_hh, Maybe weight_hr, bool reverse,
                                                               bool save_gates, bool save_cells) {
    const char* op = "lstm_packed";
    check_layer(op, x, h, c, weight_ih, weight_hh, weight_hr);
    const std::int64_t tokens = x.size(0);
    const std::int64_t units = c.size(1);
    const auto steps = packed_steps(op, x, batch_sizes, h.size(0), reverse);
    for (auto* bias : {&bias_ih, &bias_hh}) {
        if (!*bias) continue;
        check_argument(op, bias == &bias_ih ? "bias_ih" : "bias_hh", **bias, x, {4 * units});
        *bias = as_contiguous(**bias);
    }
    x = as_contiguous(x);
    // Rows that all have every step, on one thread: lstm_layer reads weight_ih once for many steps where rows are few.
    const std::int64_t batch = h.size(0);
    if (!steps.rows && !weight_hr && !reverse && tokens > 0 && save_gates == save_cells &&
        !rows_are_shared(tokens / batch, batch, x.size(1), units)) {
        const auto [y, h_n, c_n, gates, cells] =
            lstm_layer(view_of(x, {tokens / batch, batch, x.size(1)}, {batch * x.size(1), x.size(1), 1}), h, c,
                       weight_ih, weight_hh, bias_ih, bias_hh, save_gates);
        return {as_rows(y), h_n, c_n, save_gates ? as_rows(gates) : gates, save_cells ? as_rows(cells) : cells};
    }
    const Tensor h_n = copy_of(h);
    const Tensor c_n = copy_of(c);
    const Tensor y = empty(x, {tokens, h.size(1)});
    const Tensor gates = save_gates ? empty(x, {tokens, 4 * units}) : empty(x, {0});
    const Tensor cells = save_cells ? empty(x, {tokens, units}) : empty(x, {0});
    const auto kernel = is_float(x) ? forward<float> : forward<double>;
    kernel(steps, x, h_n, c_n, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, y,
           save_gates ? Maybe(gates) : std::nullopt, save_cells ? Maybe(cells) : std::nullopt);
    return {y, h_n, c_n, gates, cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_packed_backward(
    Maybe grad_y, Maybe grad_h, Maybe grad_c, Maybe grad_cells, Tensor x, Maybe batch_sizes, Tensor h, Tensor c,
    Tensor weight_ih, Tensor weight_hh, Maybe weight_hr, Tensor y, Tensor gates, Tensor cells, bool reverse, bool to_x,
    bool to_weights) {
    const char* op = "lstm_packed_backward";
    check_layer(op, x, h, c, weight_ih, weight_hh, weight_hr);
    const std::int64_t tokens = x.size(0);
    const std::int64_t inputs = x.size(1);
    const std::int64_t batch = h.size(0);
    const std::int64_t units = c.size(1);
    const std::int64_t recurrent = h.size(1);
    const std::int64_t gate_rows = 4 * units;
    check_argument(op, "y", y, x, {tokens, recurrent});
    check_argument(op, "gates", gates, x, {tokens, gate_rows});
    check_argument(op, "cells", cells, x, {tokens, units});
    const auto steps = packed_steps(op, x, batch_sizes, batch, reverse);
    const auto check = [&](const char* name, Maybe& gradient, std::initializer_list<std::int64_t> sizes) {
        if (!gradient) return;
        check_argument(op, name, *gradient, x, sizes);
        gradient = as_contiguous(*gradient);
    };
    check("grad_y", grad_y, {tokens, recurrent});
    check("grad_h", grad_h, {batch, recurrent});
    check("grad_c", grad_c, {batch, units});
    check("grad_cells", grad_cells, {tokens, units});
    for (Tensor* tensor : {&x, &h, &c, &y, &gates, &cells}) *tensor = as_contiguous(*tensor);

    const std::int64_t chunk =
        std::min(tokens, static_cast<std::int64_t>(core::backward_chunk(steps, static_cast<std::size_t>(units))));
    const auto wanted = [&](bool there, std::initializer_list<std::int64_t> sizes) {
        return there ? Maybe(empty(x, sizes)) : std::nullopt;
    };
    const bool projected = weight_hr.has_value();
    Backward pass{steps,
                  x,
                  h,
                  c,
                  as_contiguous(weight_ih),  // a product may add in another order where strides differ
                  weight_hh,
                  weight_hr,
                  y,
                  gates,
                  cells,
                  grad_y,
                  grad_cells,
                  grad_h ? copy_of(*grad_h) : zeros(x, {batch, recurrent}),
                  grad_c ? copy_of(*grad_c) : zeros(x, {batch, units}),
                  empty(x, {gate_rows}),
                  wanted(to_x, {tokens, inputs}),
                  wanted(to_weights, {gate_rows, inputs}),
                  wanted(to_weights, {gate_rows, recurrent}),
                  wanted(to_weights && projected, {recurrent, units}),
                  empty(x, {chunk, gate_rows}),
                  wanted(to_weights, {chunk, recurrent}),
                  wanted(projected, {chunk, recurrent}),
                  wanted(projected, {chunk, units})};
    is_float(x) ? pass.run<float>() : pass.run<double>();
    const auto answer = [&](const Maybe& gradient) {
        if (!gradient) return empty(x, {0});
        if (tokens == 0) std::memset(gradient->mutable_data_ptr(), 0, gradient->numel() * gradient->element_size());
        return *gradient;
    };
    return {answer(pass.grad_x),
            pass.grad_h,
            pass.grad_c,
            answer(pass.grad_weight_ih),
            answer(pass.grad_weight_hh),
            pass.grad_bias,
            answer(pass.grad_weight_hr)};
}

}  // namespace ops
}  // namespace cellstep
