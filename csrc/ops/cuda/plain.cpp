#include <algorithm>

#include "layers.h"

namespace cellstep {
namespace cuda {

namespace {

/// Values of W_ih x that lie in memory at once where nobody keeps them.
constexpr std::int64_t chunk_values = std::int64_t(1) << 26;

Tensor first_rows(const Tensor& tensor, std::int64_t rows) { return ops::rows_of(tensor, 0, rows, tensor.size(1)); }

/// Step number `turn` of those that a direction runs.
Step step_of(const Batch& batch, bool reverse, int turn) {
    const int last = batch.steps.steps - 1;
    const int at = reverse ? last - turn : turn, before = reverse ? at + 1 : at - 1, behind = reverse ? at - 1 : at + 1;
    const auto there = [&](int step) { return step >= 0 && step <= last; };
    return {batch.steps,
            reverse,
            at,
            batch.rows(at),
            batch.first(at),
            there(before) ? before : -1,
            there(before) ? batch.rows(before) : 0,
            there(before) ? batch.first(before) : 0,
            there(behind) ? behind : -1,
            there(behind) ? batch.rows(behind) : 0};
}

/// Memory for the sums of a stage's state: the state itself where it is of that type.
Tensor wide_state(const Tensor& c) {
    if (c.element_size() > 2) return c;
    return empty_of(ops::ScalarType::Float, c, {c.size(0), c.size(1)});
}

/// A direction's part of (P, D R) values.
const void* part_of(const Maybe& values, std::int64_t column) {
    if (!values) return nullptr;
    return static_cast<const unsigned char*>(values->const_data_ptr()) + column * values->element_size();
}

}  // namespace

void plain_forward(const char* op, const Device& device, const StageForward& stage) {
    const Stack& stack = stage.stack;
    const Batch& batch = stack.batch;
    const DataType type = data_type(stack.x);
    const bool reverse = stack.backwards(stage.direction);
    const std::int64_t number = stack.stage(stage.layer, stage.direction);
    const Weights& weights = stack.stages[static_cast<std::size_t>(number)];
    const std::int64_t units = stack.units(), recurrent = stack.recurrent(), rows = batch.steps.batch;
    const std::int64_t gate_rows = 4 * units, tokens = stack.tokens();
    const Tensor h = part(stack.h, number), c = part(stack.c, number);
    const auto initial = [&](const Maybe& values) -> const void* {
        if (!values) return nullptr;
        return static_cast<const unsigned char*>(values->const_data_ptr()) + number * units * values->element_size();
    };

    const Tensor c_state = wide_state(stage.c_n);
    void* c_n = c_state.const_data_ptr() == stage.c_n.const_data_ptr() ? nullptr : stage.c_n.mutable_data_ptr();
    check_launch(op,
                 cell_begin({type, batch.steps, reverse, static_cast<int>(units), static_cast<int>(recurrent),
                             h.const_data_ptr(), c.const_data_ptr(), initial(stack.initial_h), initial(stack.initial_c),
                             stage.h_n.mutable_data_ptr(), c_state.mutable_data_ptr(), c_n, device.stream()}));

    const Tensor to_sums = transpose_of(weights.weight_ih), to_products = transpose_of(weights.weight_hh);
    const std::int64_t most = stage.gates ? tokens : std::min(tokens, std::max(rows, chunk_values / gate_rows));
    const Tensor sums = stage.gates ? *stage.gates : ops::empty(stack.x, {most, gate_rows});
    const Tensor products = ops::empty(stack.x, {rows, gate_rows});
    const Maybe hidden = stack.weight_hr ? Maybe(ops::empty(stack.x, {rows, units})) : std::nullopt;
    const std::int64_t column = stage.direction * recurrent;
    Tensor y = stage.y;

    std::int64_t begin = 0, end = 0;  // the tokens whose sums are there
    for (int turn = 0; turn < batch.steps.steps; ++turn) {
        const Step at = step_of(batch, reverse, turn);
        if (at.rows == 0) continue;
        if (at.first < begin || at.first >= end) {
            // As many whole steps as there is memory for.
            int edge = at.step;
            if (reverse) {
                end = batch.first(at.step + 1);
                while (edge > 0 && end - batch.first(edge - 1) <= most) --edge;
                begin = batch.first(edge);
            } else {
                begin = at.first;
                while (edge + 1 < batch.steps.steps && batch.first(edge + 2) - begin <= most) ++edge;
                end = batch.first(edge + 1);
            }
            ops::multiply(ops::rows_of(stage.input, begin, end - begin, stage.input.size(1)), to_sums,
                          ops::rows_of(sums, 0, end - begin, gate_rows));
        }
        ops::multiply(first_rows(stage.h_n, at.rows), to_products, first_rows(products, at.rows));
        CellForward cell{type,
                         at,
                         static_cast<int>(units),
                         sums.const_data_ptr(),
                         products.const_data_ptr(),
                         weight_view_of(weights.bias_ih, units),
                         weight_view_of(weights.bias_hh, units),
                         initial(stack.initial_h),
                         initial(stack.initial_c),
                         stage.h_n.mutable_data_ptr(),
                         c_state.mutable_data_ptr(),
                         c_n,
                         const_cast<void*>(part_of(stage.y, column)),
                         stage.y.size(1),
                         0,
                         memory_of(stage.gates),
                         memory_of(stage.cells),
                         begin,
                         device.stream()};
        if (hidden) {
            cell.h_state = nullptr;
            cell.y = hidden->mutable_data_ptr();
            cell.y_row = units;
            cell.y_first = at.first;
        }
        check_launch(op, cell_forward(cell));
        if (!hidden) continue;
        Tensor output = ops::rows_of(y, at.first, at.rows, recurrent), state = first_rows(stage.h_n, at.rows);
        ops::multiply(first_rows(*hidden, at.rows), transpose_of(*stack.weight_hr), output);
        torch::stable::copy_(state, output);
    }
}

void plain_backward(const char* op, const Device& device, const StageBackward& stage) {
    const Stack& stack = stage.stack;
    const Batch& batch = stack.batch;
    const DataType type = data_type(stack.x);
    const bool reverse = stack.backwards(stage.direction);
    const std::int64_t number = stack.stage(stage.layer, stage.direction);
    const Tensor& weight_hh = stack.stages[static_cast<std::size_t>(number)].weight_hh;
    const int units = static_cast<int>(stack.units()), recurrent = static_cast<int>(stack.recurrent());
    const Tensor c = part(stack.c, number);
    const Tensor c_state = wide_state(stage.grad_c);
    const Tensor products = ops::empty(stack.x, {batch.steps.batch, recurrent});
    const bool projected = stack.weight_hr.has_value();
    const Tensor whole = projected ? ops::empty(stack.x, {batch.steps.batch, units}) : products;
    const void* grad_y = part_of(stage.grad_y, std::int64_t(stage.direction) * recurrent);

    for (int turn = batch.steps.steps; turn-- > 0;) {
        const Step at = step_of(batch, reverse, turn);
        if (at.rows == 0) continue;
        if (projected) {
            check_launch(
                op, project_backward({type, at, recurrent, grad_y, data_of(stage.grad_h_n), products.const_data_ptr(),
                                      stage.grad_outputs->mutable_data_ptr(), device.stream()}));
            ops::multiply(ops::rows_of(*stage.grad_outputs, at.first, at.rows, recurrent), *stack.weight_hr,
                          first_rows(whole, at.rows));
        }
        check_launch(
            op, cell_backward({type, at, units, c.const_data_ptr(), nullptr, stage.gates.const_data_ptr(),
                               stage.cells.const_data_ptr(), grad_y, std::int64_t(stack.directions) * recurrent,
                               data_of(stage.grad_cells), data_of(stage.grad_h_n), data_of(stage.grad_c_n),
                               whole.const_data_ptr(), projected, c_state.mutable_data_ptr(),
                               stage.grad_sums.mutable_data_ptr(), stage.grad_h.mutable_data_ptr(), device.stream()}));
        ops::multiply(ops::rows_of(stage.grad_sums, at.first, at.rows, 4 * units), weight_hh,
                      first_rows(products, at.rows));
    }
    check_launch(op, cell_finish({type, batch.steps, reverse, batch.steps.steps > 0 ? batch.rows(0) : 0, units,
                                  recurrent, products.const_data_ptr(), c_state.const_data_ptr(),
                                  data_of(stage.grad_h_n), data_of(stage.grad_c_n), stage.grad_h.mutable_data_ptr(),
                                  stage.grad_c.mutable_data_ptr(), device.stream()}));
}

}  // namespace cuda
}  // namespace cellstep
