#include "layers.h"
#include "operators.h"

namespace cellstep {
namespace cuda {

namespace {

/// Checks a call, and describes it.
Stack stack_of(const char* op, const Device& device, const Tensor& x, const Maybe& batch_sizes, const Maybe& lengths,
               const Maybe& reset, const Tensor& h, const Tensor& c, const Maybe& initial_h, const Maybe& initial_c,
               const std::vector<Tensor>& weights, bool biased, bool bidirectional) {
    const bool is_packed = x.dim() == 2;
    if (is_packed != batch_sizes.has_value())
        ops::fail(op, ": expected x (T, N, I), or x (P, I) and batch_sizes, got x of shape ", ops::shape_text(x),
                  batch_sizes ? " and batch_sizes: leave them out" : " without batch_sizes: pass them");
    if (is_packed && (lengths || reset))
        ops::fail(op, ": expected lengths and reset of padded rows alone, got them with batch_sizes: leave them out");
    ops::check_input(op, "h", h, 3);
    const std::int64_t batch = h.size(1), units = h.size(2);
    const int directions = bidirectional ? 2 : 1;
    const std::size_t each = biased ? 4 : 2;
    const std::size_t count = weights.size() / each;
    if (count == 0 || weights.size() % (each * static_cast<std::size_t>(directions)) != 0)
        ops::fail(op, ": expected ", each * static_cast<std::size_t>(directions), " weights for each layer, got ",
                  weights.size(), " in all: pass weight_ih and weight_hh", biased ? ", bias_ih and bias_hh" : "",
                  " of each direction");
    const auto stages = static_cast<std::int64_t>(count);
    const std::int64_t width = is_packed ? x.size(1) : x.size(2);
    ops::check_argument(op, "h", h, x, {stages, batch, units});
    ops::check_argument(op, "c", c, x, {stages, batch, units});
    if (initial_h) ops::check_argument(op, "initial_h", *initial_h, x, {stages, units});
    if (initial_c) ops::check_argument(op, "initial_c", *initial_c, x, {stages, units});
    std::vector<Weights> parts;
    for (std::size_t stage = 0; stage < count; ++stage) {
        const Tensor* all = weights.data() + stage * each;
        const std::int64_t inputs = stage < static_cast<std::size_t>(directions) ? width : directions * units;
        ops::check_argument(op, "weight_ih", all[0], x, {4 * units, inputs});
        ops::check_argument(op, "weight_hh", all[1], x, {4 * units, units});
        if (biased) ops::check_argument(op, "bias_ih", all[2], x, {4 * units});
        if (biased) ops::check_argument(op, "bias_hh", all[3], x, {4 * units});
        parts.push_back({all[0], all[1], biased ? Maybe(all[2]) : std::nullopt, biased ? Maybe(all[3]) : std::nullopt});
    }
    if (!is_packed) {
        if (x.size(0) == 0)
            ops::fail(op, ": expected at least one step, got x of shape ", ops::shape_text(x),
                      ": leave out empty calls");
        if (x.size(1) != batch)
            ops::fail(op, ": expected x of ", batch, " rows like h, got shape ", ops::shape_text(x),
                      ": check batch_first");
        if (lengths) {
            if (!ops::is_together(*lengths, x) || lengths->scalar_type() != ops::ScalarType::Long)
                ops::fail(op, ": expected lengths as int64 on ", ops::where,
                          " like x, got another type or device: convert them with .to(x.device, torch.int64)");
            ops::check_argument(op, "lengths", *lengths, *lengths, {batch});
        }
        if (reset) ops::check_mask(op, "reset", *reset, {x.size(0), batch});
        if (reset && !ops::is_together(*reset, x))
            ops::fail(op, ": expected reset on the device of x, got another: move it");
    }
    const auto contiguous = [](const Maybe& values) { return values ? Maybe(ops::as_contiguous(*values)) : values; };
    return {is_packed ? packed(op, device, x.size(0), batch, batch_sizes, x)
                      : padded(op, device, x.size(0), batch, lengths, reset),
            static_cast<int>(count) / directions,
            directions,
            false,
            parts,
            std::nullopt,
            is_packed ? ops::as_contiguous(x) : ops::as_rows(x),
            ops::as_contiguous(h),
            ops::as_contiguous(c),
            contiguous(initial_h),
            contiguous(initial_c)};
}

void check_x(const char* op, const Tensor& x) { ops::check_input(op, "x", x, x.dim() == 2 ? 2 : 3); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layers(Tensor x, Maybe batch_sizes, Maybe lengths,
                                                                       Maybe reset, Tensor h, Tensor c, Maybe initial_h,
                                                                       Maybe initial_c, std::vector<Tensor> weights,
                                                                       bool biased, bool bidirectional, bool save) {
    const char* op = "lstm_layers";
    check_x(op, x);
    const Device device(x);
    const Stack stack = stack_of(op, device, x, batch_sizes, lengths, reset, h, c, initial_h, initial_c, weights,
                                 biased, bidirectional);
    const Answers answers = forward(op, device, stack, save, save);
    const std::int64_t width = answers.y.size(1);
    const auto saved = [&](const Maybe& values) { return values ? *values : ops::empty(x, {0}); };
    const bool inner = save && stack.layers > 1;
    if (x.dim() == 2)
        return {answers.y,
                answers.h_n,
                answers.c_n,
                inner ? answers.outputs : ops::empty(x, {0}),
                saved(answers.gates),
                saved(answers.cells)};
    const std::int64_t steps = x.size(0), batch = x.size(1), row = width, step = batch * width;
    const Tensor y = ops::view_of(answers.y, {steps, batch, width}, {step, row, 1});
    const Tensor outputs =
        inner ? ops::view_of(answers.outputs, {stack.layers - 1, steps, batch, width}, {steps * step, step, row, 1})
              : ops::empty(x, {0});
    return {y, answers.h_n, answers.c_n, outputs, saved(answers.gates), saved(answers.cells)};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_layers_backward(
    Maybe grad_y, Maybe grad_h, Maybe grad_c, Maybe grad_cells, Tensor x, Maybe batch_sizes, Maybe lengths, Maybe reset,
    Tensor h, Tensor c, std::vector<Tensor> weights, bool biased, bool bidirectional, Tensor y, Tensor outputs,
    Tensor gates, Tensor cells, bool to_x) {
    const char* op = "lstm_layers_backward";
    check_x(op, x);
    const Device device(x);
    const Stack stack = stack_of(op, device, x, batch_sizes, lengths, reset, h, c, std::nullopt, std::nullopt, weights,
                                 biased, bidirectional);
    const std::int64_t tokens = stack.tokens(), units = stack.units(), batch = stack.batch.steps.batch;
    const std::int64_t stages = std::int64_t(stack.layers) * stack.directions, width = stack.directions * units;
    // (T, N, K) as (P, K).
    const auto as_tokens = [&](const char* name, const Tensor& values) {
        if (x.dim() == 2)
            ops::check_argument(op, name, values, x, {tokens, width});
        else
            ops::check_argument(op, name, values, x, {x.size(0), batch, width});
        return ops::rows_of(ops::as_contiguous(values), 0, tokens, width);
    };
    const auto checked = [&](const char* name, const Maybe& values,
                             std::initializer_list<std::int64_t> sizes) -> Maybe {
        if (!values) return values;
        ops::check_argument(op, name, *values, x, sizes);
        return ops::as_contiguous(*values);
    };
    Maybe inner;
    if (stack.layers > 1) {
        if (x.dim() == 2)
            ops::check_argument(op, "outputs", outputs, x, {stack.layers - 1, tokens, width});
        else
            ops::check_argument(op, "outputs", outputs, x, {stack.layers - 1, x.size(0), batch, width});
        inner =
            ops::view_of(ops::as_contiguous(outputs), {stack.layers - 1, tokens, width}, {tokens * width, width, 1});
    }
    const Given given{as_tokens("y", y),
                      inner,
                      *checked("gates", gates, {stages, tokens, 4 * units}),
                      *checked("cells", cells, {stages, tokens, units}),
                      grad_y ? Maybe(as_tokens("grad_y", *grad_y)) : std::nullopt,
                      checked("grad_h", grad_h, {stages, batch, units}),
                      checked("grad_c", grad_c, {stages, batch, units}),
                      checked("grad_cells", grad_cells, {stack.directions, tokens, units})};
    const Gradients gradients = backward(op, device, stack, given, to_x, true, biased);
    std::vector<Tensor> to_weights;
    for (const StageGradients& stage : gradients.stages) {
        to_weights.push_back(*stage.weight_ih);
        to_weights.push_back(*stage.weight_hh);
        if (!biased) continue;
        to_weights.push_back(*stage.bias);
        to_weights.push_back(ops::copy_of(*stage.bias));
    }
    const std::int64_t inputs = stack.inputs();
    const Tensor to_input = !to_x ? ops::empty(x, {0})
                            : x.dim() == 2
                                ? *gradients.x
                                : ops::view_of(*gradients.x, {x.size(0), batch, inputs}, {batch * inputs, inputs, 1});
    return {to_input, gradients.h, gradients.c, to_weights};
}

}  // namespace cuda
}  // namespace cellstep
