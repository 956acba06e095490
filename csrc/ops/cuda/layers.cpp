#include "layers.h"

#include <limits>

#include "choose.h"
#include "pieces.h"

namespace cellstep {
namespace cuda {

namespace {

constexpr std::int64_t most = std::numeric_limits<int>::max();

void check_size(const char* op, const char* what, std::int64_t count) {
    if (count > most) ops::fail(op, ": expected at most 2,147,483,647 ", what, ", got ", count, ": split the batch");
}

const void* at_stage(const Maybe& values, std::int64_t stage) {
    if (!values) return nullptr;
    const std::int64_t bytes = values->numel() / values->size(0) * static_cast<std::int64_t>(values->element_size());
    return static_cast<const unsigned char*>(values->const_data_ptr()) + stage * bytes;
}

void* at_stage(const Tensor& values, std::int64_t stage) { return const_cast<void*>(at_stage(Maybe(values), stage)); }

/// The stages of some layers, from `layer` on.
Forward call_of(const Device& device, const Stack& stack, int layer, int layers) {
    Forward call{};
    call.type = data_type(stack.x);
    call.steps = stack.batch.with_lengths();
    call.input_size = static_cast<int>(layer == 0 ? stack.inputs() : stack.directions * stack.units());
    call.hidden_size = static_cast<int>(stack.units());
    call.layers = layers;
    call.directions = stack.directions;
    call.reverse = stack.reverse;
    const std::int64_t first = stack.stage(layer, 0);
    for (int stage = 0; stage < layers * stack.directions; ++stage) {
        const Weights& weights = stack.stages[static_cast<std::size_t>(first + stage)];
        call.stages[stage] = {
            weight_view_of(weights.weight_ih, stack.units()), weight_view_of(weights.weight_hh, stack.units()),
            weight_view_of(weights.bias_ih, stack.units()), weight_view_of(weights.bias_hh, stack.units())};
    }
    call.h = at_stage(Maybe(stack.h), first);
    call.c = at_stage(Maybe(stack.c), first);
    call.initial_h = at_stage(stack.initial_h, first);
    call.initial_c = at_stage(stack.initial_c, first);
    call.multiprocessors = device.multiprocessors();
    call.stream = device.stream();
    return call;
}

void set_targets(Forward& call, const Answers& answers, std::int64_t first) {
    call.h_n = at_stage(answers.h_n, first);
    call.c_n = at_stage(answers.c_n, first);
    call.gates = const_cast<void*>(at_stage(answers.gates, first));
    call.cells = const_cast<void*>(at_stage(answers.cells, first));
}

/// Words that are zero, by which the blocks of each of `launches` launches wait for one another.
template <class Call>
Maybe set_progress(Call& call, Kernel kernel, std::int64_t launches, const Tensor& x) {
    const auto words = static_cast<std::int64_t>(progress_words(kernel, call));
    if (words == 0) return std::nullopt;
    Tensor progress = empty_of(ops::ScalarType::Int, x, {launches, words});
    torch::stable::zero_(progress);
    call.progress = ops::mutable_data<int>(progress);
    return progress;
}

/// `count` values behind an array's beginning.
template <class Void>
Void* behind(Void* data, const Tensor& of_type, std::int64_t count) {
    using Byte = std::conditional_t<std::is_const_v<Void>, const unsigned char, unsigned char>;
    return data ? static_cast<Byte*>(data) + count * of_type.element_size() : nullptr;
}

Tensor input_of(const Stack& stack, const Maybe& outputs, int layer) {
    return layer == 0 ? stack.x : part(*outputs, layer - 1);
}
Tensor output_of(const Stack& stack, const Maybe& outputs, const Tensor& y, int layer) {
    return layer + 1 == stack.layers ? y : part(*outputs, layer);
}

/// What pieces of a layer's sequence hand to one another: one is read while the other is written.
class Hands {
public:
    Hands(const Stack& stack, int pieces)
        : pieces_(pieces),
          values_(stack.c.numel() / stack.layers),
          memory_(empty_of(ops::ScalarType::Float, stack.c, {pieces > 1 ? stack.layers : 0, 4 * values_})) {}

    /// Piece `turn` of those that a layer runs.
    template <class Call>
    void set(Call& call, int layer, int turn) const {
        if (turn > 0) call.from = at(layer, turn - 1);
        if (turn + 1 < pieces_) call.to = at(layer, turn);
    }

private:
    Carried at(int layer, int turn) const {
        float* const begin = ops::mutable_data<float>(memory_) + (4 * layer + turn % 2 * 2) * values_;
        return {begin, begin + values_};
    }

    int pieces_;
    std::int64_t values_;
    Tensor memory_;
};

/// Layer by layer, their gate sums found by torch's products, in pieces of time: while a layer runs one, the products
/// of the next are found, and the layer behind runs the one before.
void forward_in_pieces(const char* op, const Device& device, const Stack& stack, Kernel kernel,
                       const Forward& layer_call, const Answers& answers) {
    const Tensor& x = stack.x;
    const std::int64_t units = stack.units(), gate_rows = 4 * units, width = stack.directions * units;
    const Pieces pieces(op, device, stack.batch, piece_steps(op, device, stack, kernel));
    const int count = pieces.count();
    // Where layers run side by side each has sums of its own, of one piece that is read and one that is found.
    const int kept = count > 1 ? 2 : 1, apart = count > 1 ? stack.layers : 1;
    const std::int64_t most = pieces.most_tokens();
    const Tensor sums = ops::empty(x, {std::int64_t(apart) * kept * stack.directions * most, gate_rows});
    const Hands hands(stack, count);
    Forward first = layer_call;
    const Maybe progress = set_progress(first, kernel, std::int64_t(stack.layers) * count, x);
    std::vector<std::vector<void*>> done(static_cast<std::size_t>(stack.layers));
    Streams streams(op, device, count > 1);

    const auto run = [&](int layer, int piece) {
        const auto at = static_cast<std::size_t>(piece), of = static_cast<std::size_t>(layer);
        if (layer > 0) streams.wait(streams.call(), done[of - 1][at]);
        if (piece >= kept) streams.wait(streams.call(), done[of][at - static_cast<std::size_t>(kept)]);
        const std::int64_t begin = pieces.first(piece), tokens = pieces.tokens(piece), stage = stack.stage(layer, 0);
        const std::int64_t sums_row = (std::int64_t(layer % apart) * kept + piece % kept) * stack.directions * most;
        const Tensor input = input_of(stack, answers.outputs, layer);
        for (int direction = 0; tokens > 0 && direction < stack.directions; ++direction)
            ops::multiply(ops::view_of(input, {tokens, input.size(1)}, {input.size(1), 1}, begin * input.size(1)),
                          transpose_of(stack.stages[static_cast<std::size_t>(stage + direction)].weight_ih),
                          ops::rows_of(sums, sums_row + direction * most, tokens, gate_rows));
        Forward call = call_of(device, stack, layer, 1);
        set_targets(call, answers, stage);
        call.steps = pieces.steps(piece);
        call.sums = behind(sums.const_data_ptr(), x, sums_row * gate_rows);
        call.y = behind(output_of(stack, answers.outputs, answers.y, layer).mutable_data_ptr(), x, begin * width);
        call.gates = behind(call.gates, x, begin * gate_rows);
        call.cells = behind(call.cells, x, begin * units);
        hands.set(call, layer, piece);
        if (progress)
            call.progress =
                ops::mutable_data<int>(*progress) + (std::int64_t(layer) * count + piece) * progress->size(1);
        call.stream = streams.layer(layer);
        streams.wait(call.stream, streams.mark(streams.call()));
        check_launch(op, start(kernel, call));
        done[of].push_back(streams.mark(call.stream));
    };
    for (int turn = 0; turn < count + stack.layers - 1; ++turn)
        for (int layer = 0; layer < stack.layers; ++layer)
            if (turn >= layer && turn - layer < count) run(layer, turn - layer);
}

Tensor zeros(const Tensor& x, std::initializer_list<std::int64_t> sizes) { return ops::zeros(x, sizes); }

}  // namespace

Batch padded(const char* op, const Device& device, std::int64_t steps, std::int64_t batch, const Maybe& lengths,
             const Maybe& reset) {
    check_size(op, "steps", steps);
    check_size(op, "rows", batch);
    Batch answer{};
    answer.steps = {static_cast<int>(steps), static_cast<int>(batch), steps * batch, nullptr, nullptr, nullptr};
    if (lengths && batch > 0) {
        const Tensor values = ops::as_contiguous(*lengths);
        answer.device_lengths = empty_of(ops::ScalarType::Int, values, {batch});
        answer.steps.lengths = ops::data<int>(*answer.device_lengths);
        check_launch(op, cut_lengths(ops::data<std::int64_t>(values), answer.steps.batch, answer.steps.steps,
                                     ops::mutable_data<int>(*answer.device_lengths), device.stream()));
    }
    if (reset) {
        answer.reset = ops::as_contiguous(*reset);
        answer.steps.reset = static_cast<const unsigned char*>(answer.reset->const_data_ptr());
    }
    return answer;
}

Batch packed(const char* op, const Device& device, std::int64_t tokens, std::int64_t batch, const Maybe& batch_sizes,
             const Tensor& x) {
    check_size(op, "rows", batch);
    check_size(op, "tokens of packed rows", tokens);
    if (!batch_sizes) {
        if (batch == 0 ? tokens != 0 : tokens % batch != 0)
            ops::fail(op, ": expected x of ", batch, " rows a step like h, got ", tokens, " rows: pass batch_sizes");
        return padded(op, device, batch == 0 ? 0 : tokens / batch, batch, std::nullopt, std::nullopt);
    }
    if (!batch_sizes->is_cpu() || batch_sizes->scalar_type() != ops::ScalarType::Long || batch_sizes->dim() != 1)
        ops::fail(op,
                  ": expected batch_sizes as int64 on the CPU, one for each step, got another type, device or shape");
    const Tensor values = ops::as_contiguous(*batch_sizes);
    const auto* sizes = ops::data<std::int64_t>(values);
    const std::int64_t steps = values.size(0);
    check_size(op, "steps", steps);
    Batch answer{};
    answer.offsets.reserve(static_cast<std::size_t>(steps) + 1);
    std::int64_t sum = 0;
    for (std::int64_t step = 0; step < steps; ++step) {
        const std::int64_t largest = step == 0 ? batch : sizes[step - 1];
        if (sizes[step] < 0 || sizes[step] > largest)
            ops::fail(op, ": expected batch_sizes from 0 to the ", batch,
                      " rows of h and none larger than the one before, got ", sizes[step], " at ", step,
                      ": sort the rows by falling length");
        answer.offsets.push_back(static_cast<int>(sum));
        sum += sizes[step];
        if (sum > tokens) break;
    }
    if (sum != tokens)
        ops::fail(op, ": expected x of as many rows as batch_sizes tell in sum, got ", ops::shape_text(x),
                  ": pack it again");
    answer.offsets.push_back(static_cast<int>(sum));
    answer.steps = {static_cast<int>(steps), static_cast<int>(batch), tokens, nullptr, nullptr, nullptr};
    if (steps > 0) {
        answer.device_offsets = empty_of(ops::ScalarType::Int, x, {steps});
        answer.steps.offsets = ops::data<int>(*answer.device_offsets);
        check_launch(op, put_ints(answer.offsets.data(), steps, ops::mutable_data<int>(*answer.device_offsets),
                                  device.stream()));
        if (batch > 0) {
            answer.device_lengths = empty_of(ops::ScalarType::Int, x, {batch});
            check_launch(op,
                         packed_lengths(answer.steps, ops::mutable_data<int>(*answer.device_lengths), device.stream()));
        }
    }
    return answer;
}

Answers forward(const char* op, const Device& device, const Stack& stack, bool save_gates, bool save_cells) {
    const Tensor& x = stack.x;
    const std::int64_t tokens = stack.tokens(), units = stack.units(), batch = stack.batch.steps.batch;
    const std::int64_t stages = std::int64_t(stack.layers) * stack.directions;
    const std::int64_t width = stack.directions * stack.recurrent();
    Answers answers{ops::empty(x, {tokens, width}),
                    ops::empty(x, {stages, batch, stack.recurrent()}),
                    ops::empty(x, {stages, batch, units}),
                    ops::empty(x, {stack.layers - 1, tokens, width}),
                    save_gates ? Maybe(ops::empty(x, {stages, tokens, 4 * units})) : std::nullopt,
                    save_cells ? Maybe(ops::empty(x, {stages, tokens, units})) : std::nullopt};
    if (tokens == 0) {
        torch::stable::copy_(answers.h_n, stack.h);
        torch::stable::copy_(answers.c_n, stack.c);
        return answers;
    }

    Forward layer_call = call_of(device, stack, 0, 1);
    layer_call.sums = x.const_data_ptr();  // those that choose only ask whether there are any
    std::optional<Forward> whole_call;
    if (stages <= max_stages && !pieces_forced(op)) {
        whole_call = call_of(device, stack, 0, stack.layers);
        whole_call->x = x.const_data_ptr();
        whole_call->outputs = answers.outputs.mutable_data_ptr();
        whole_call->y = answers.y.mutable_data_ptr();
        set_targets(*whole_call, answers, 0);
    }
    const Choice choice =
        stack.weight_hr ? Choice{Kernel::plain, false} : choose(op, whole_call ? &*whole_call : nullptr, layer_call);
    if (choice.whole) {
        const Maybe progress = set_progress(*whole_call, choice.kernel, 1, x);
        check_launch(op, start(choice.kernel, *whole_call));
        return answers;
    }
    if (choice.kernel != Kernel::plain) {
        forward_in_pieces(op, device, stack, choice.kernel, layer_call, answers);
        return answers;
    }
    for (int layer = 0; layer < stack.layers; ++layer)
        for (int direction = 0; direction < stack.directions; ++direction) {
            const std::int64_t stage = stack.stage(layer, direction);
            plain_forward(op, device,
                          {stack, layer, direction, input_of(stack, answers.outputs, layer),
                           output_of(stack, answers.outputs, answers.y, layer), part(answers.h_n, stage),
                           part(answers.c_n, stage), part(answers.gates, stage), part(answers.cells, stage)});
        }
    return answers;
}

Gradients backward(const char* op, const Device& device, const Stack& stack, const Given& given, bool to_x,
                   bool to_weights, bool to_biases) {
    const Tensor& x = stack.x;
    const DataType type = data_type(x);
    const std::int64_t tokens = stack.tokens(), units = stack.units(), recurrent = stack.recurrent();
    const std::int64_t batch = stack.batch.steps.batch, gate_rows = 4 * units, width = stack.directions * recurrent;
    const std::int64_t stages = std::int64_t(stack.layers) * stack.directions;
    const bool empty = tokens == 0;
    const auto wanted = [&](bool there, std::initializer_list<std::int64_t> sizes) -> Maybe {
        if (!there) return std::nullopt;
        return empty ? zeros(x, sizes) : ops::empty(x, sizes);
    };
    Gradients gradients{wanted(to_x, {tokens, x.size(1)}),
                        ops::empty(x, {stages, batch, recurrent}),
                        ops::empty(x, {stages, batch, units}),
                        {},
                        wanted(to_weights && stack.weight_hr, {recurrent, units})};
    for (int stage = 0; stage < stages; ++stage) {
        const std::int64_t inputs = stage < stack.directions ? x.size(1) : width;
        gradients.stages.push_back({wanted(to_weights, {gate_rows, inputs}), wanted(to_weights, {gate_rows, recurrent}),
                                    wanted(to_biases, {gate_rows})});
    }
    if (empty) {
        for (const bool is_h : {true, false}) {
            Tensor& target = is_h ? gradients.h : gradients.c;
            const Maybe& gradient = is_h ? given.grad_h : given.grad_c;
            if (gradient)
                torch::stable::copy_(target, *gradient);
            else
                torch::stable::zero_(target);
        }
        return gradients;
    }

    const auto call_of_layer = [&](int layer, const Maybe& grad_y) {
        const std::int64_t first = stack.stage(layer, 0);
        Backward call{};
        call.type = type;
        call.steps = stack.batch.with_lengths();
        call.hidden_size = static_cast<int>(units);
        call.directions = stack.directions;
        call.reverse = stack.reverse;
        for (int direction = 0; direction < stack.directions; ++direction)
            call.weight_hh[direction] =
                weight_view_of(stack.stages[static_cast<std::size_t>(first + direction)].weight_hh, units);
        call.c = at_stage(Maybe(stack.c), first);
        call.gates = at_stage(Maybe(given.gates), first);
        call.cells = at_stage(Maybe(given.cells), first);
        call.grad_outputs = data_of(grad_y);
        call.grad_cells = layer + 1 == stack.layers ? data_of(given.grad_cells) : nullptr;
        call.grad_h_n = at_stage(given.grad_h, first);
        call.grad_c_n = at_stage(given.grad_c, first);
        call.grad_h = at_stage(gradients.h, first);
        call.grad_c = at_stage(gradients.c, first);
        call.multiprocessors = device.multiprocessors();
        call.stream = device.stream();
        return call;
    };
    Backward last_call = call_of_layer(stack.layers - 1, given.grad_y);
    const Kernel kernel = stack.weight_hr ? Kernel::plain : choose(op, last_call);
    const Pieces pieces(op, device, stack.batch, piece_steps(op, device, stack, kernel));
    const int count = pieces.count();
    // A layer's products for its weights are found while the next one runs, and in pieces all layers run side by side.
    const bool beside = count > 1 || (stack.layers > 1 && kernel != Kernel::plain && products_pay(op, stack));
    const int apart = count > 1 ? stack.layers : beside ? 2 : 1;
    const Tensor all_grad_sums = ops::empty(x, {apart * stack.directions, tokens, gate_rows});
    const auto grad_sums_of = [&](int layer, int direction) {
        return part(all_grad_sums, layer % apart * stack.directions + direction);
    };
    const Tensor before = to_weights ? ops::empty(x, {tokens, recurrent}) : ops::empty(x, {0, 0});
    const Tensor sums = empty_of(type == DataType::float64 ? ops::ScalarType::Double : ops::ScalarType::Float, x,
                                 {to_biases ? column_pieces(tokens) : 0, gate_rows});
    const Maybe grad_outputs = stack.weight_hr ? Maybe(ops::empty(x, {tokens, recurrent})) : std::nullopt;
    const Hands hands(stack, count);
    const Maybe progress =
        kernel == Kernel::plain ? std::nullopt : set_progress(last_call, kernel, std::int64_t(stack.layers) * count, x);
    std::vector<Maybe> grad_inputs(static_cast<std::size_t>(stack.layers));
    std::vector<std::vector<void*>> found(static_cast<std::size_t>(stack.layers));  // of grad_inputs, by piece
    Streams streams(op, device, beside);

    // One product over all tokens each: to add up those of pieces in 16 bits would lose digits.
    const auto to_parameters = [&](int layer) {
        const std::int64_t first = stack.stage(layer, 0);
        Tensor input = input_of(stack, given.outputs, layer);
        const Tensor y = output_of(stack, given.outputs, given.y, layer);
        if (layer == 0 && to_weights && stack.batch.steps.lengths) {
            // What lies past a row's length may be anything, and zero times that nothing.
            input = ops::empty(x, {tokens, x.size(1)});
            check_launch(op, keep_lengths(type, stack.batch.steps, static_cast<int>(x.size(1)), x.const_data_ptr(),
                                          input.mutable_data_ptr(), device.stream()));
        }
        for (int direction = 0; direction < stack.directions; ++direction) {
            const Tensor grads = grad_sums_of(layer, direction);
            const StageGradients& targets = gradients.stages[static_cast<std::size_t>(first + direction)];
            if (to_biases)
                check_launch(op,
                             column_sums(type, tokens, static_cast<int>(gate_rows), grads.const_data_ptr(),
                                         sums.mutable_data_ptr(), targets.bias->mutable_data_ptr(), device.stream()));
            if (!to_weights) continue;
            ops::multiply(transpose_of(grads), input, *targets.weight_ih);
            const auto* outputs = static_cast<const unsigned char*>(y.const_data_ptr());
            check_launch(op, hidden_before({type, stack.batch.steps, stack.backwards(direction),
                                            static_cast<int>(recurrent), at_stage(Maybe(stack.h), first + direction),
                                            at_stage(stack.initial_h, first + direction),
                                            outputs + direction * recurrent * y.element_size(), width,
                                            before.mutable_data_ptr(), device.stream()}));
            ops::multiply(transpose_of(grads), before, *targets.weight_hh);
        }
        if (gradients.weight_hr) {
            const Tensor hidden = ops::empty(x, {tokens, units});
            check_launch(op, hidden_again(type, tokens, static_cast<int>(units), given.gates.const_data_ptr(),
                                          given.cells.const_data_ptr(), hidden.mutable_data_ptr(), device.stream()));
            ops::multiply(transpose_of(*grad_outputs), hidden, *gradients.weight_hr);
        }
    };
    const auto sweep = [&](int layer, int piece, void* stream) {
        const std::int64_t begin = pieces.first(piece), first = stack.stage(layer, 0);
        const bool last = layer + 1 == stack.layers;
        const Maybe& grad_y = last ? given.grad_y : grad_inputs[static_cast<std::size_t>(layer + 1)];
        if (kernel == Kernel::plain) {
            for (int direction = 0; direction < stack.directions; ++direction)
                plain_backward(
                    op, device,
                    {stack, layer, direction, part(given.gates, first + direction),
                     part(given.cells, first + direction), grad_y,
                     last ? part(given.grad_cells, direction) : std::nullopt, part(given.grad_h, first + direction),
                     part(given.grad_c, first + direction), grad_sums_of(layer, direction),
                     part(gradients.h, first + direction), part(gradients.c, first + direction), grad_outputs});
            return;
        }
        Backward call = call_of_layer(layer, grad_y);
        call.steps = pieces.steps(piece);
        // A piece begins with the cells of the step before it.
        if (piece > 0) call.c = behind(call.cells, x, stack.batch.first(pieces.first_step(piece) - 1) * units);
        call.gates = behind(call.gates, x, begin * gate_rows);
        call.cells = behind(call.cells, x, begin * units);
        call.grad_outputs = behind(call.grad_outputs, x, begin * width);
        call.grad_cells = behind(call.grad_cells, x, begin * units);
        call.grad_sums = behind(grad_sums_of(layer, 0).mutable_data_ptr(), x, begin * gate_rows);
        hands.set(call, layer, count - 1 - piece);
        if (progress)
            call.progress =
                ops::mutable_data<int>(*progress) + (std::int64_t(layer) * count + piece) * progress->size(1);
        call.stream = stream;
        check_launch(op, start(kernel, call));
    };
    const auto run = [&](int layer, int piece) {
        const auto of = static_cast<std::size_t>(layer);
        const std::int64_t begin = pieces.first(piece), length = pieces.tokens(piece), first = stack.stage(layer, 0);
        const bool last = layer + 1 == stack.layers;
        Maybe& grad_input = grad_inputs[of];
        if (!grad_input) grad_input = layer == 0 ? gradients.x : Maybe(ops::empty(x, {tokens, width}));
        void* const stream = streams.layer(layer);
        const auto turn = static_cast<std::size_t>(count - 1 - piece);
        if (!last)
            streams.wait(stream, found[of + 1][turn]);
        else if (turn == 0)
            streams.wait(stream, streams.mark(streams.call()));
        sweep(layer, piece, stream);
        void* const swept = streams.mark(stream);
        if (beside && piece == 0 && !last) to_parameters(layer + 1);
        streams.wait(streams.call(), swept);
        if (piece == 0 && !last) grad_inputs[of + 1].reset();
        for (int direction = 0; grad_input && length > 0 && direction < stack.directions; ++direction) {
            const Tensor& weight = stack.stages[static_cast<std::size_t>(first + direction)].weight_ih;
            const std::int64_t inputs = weight.size(1);
            ops::multiply(
                ops::view_of(grad_sums_of(layer, direction), {length, gate_rows}, {gate_rows, 1}, begin * gate_rows),
                weight, ops::view_of(*grad_input, {length, inputs}, {inputs, 1}, begin * inputs), direction > 0);
        }
        found[of].push_back(streams.mark(streams.call()));
        if (piece == 0 && (!beside || layer == 0)) to_parameters(layer);
    };
    // From the last piece and the last layer on, each layer a piece behind the one above it.
    for (int turn = 0; turn < count + stack.layers - 1; ++turn)
        for (int layer = stack.layers; layer-- > 0;) {
            const int piece = count - 1 - (turn - (stack.layers - 1 - layer));
            if (piece >= 0 && piece < count) run(layer, piece);
        }
    return gradients;
}

}  // namespace cuda
}  // namespace cellstep
