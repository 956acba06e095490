#include "core/backward.h"

#include <cstring>

#include "core/denormals.h"
#include "core/kernels.h"

namespace cellstep {
namespace core {

namespace {

/// Columns of a weight in scratch memory: whole vectors of any instruction set, so that no product has a tail.
constexpr std::size_t padded_columns(std::size_t columns) { return (columns + 15) / 16 * 16; }

/// Depth of a block of a weight that stays in the first level of cache while the rows pass by.
constexpr std::size_t block_depth = 128;

template <class T>
void pack_padded(MatrixView<T> weight, std::size_t rows, std::size_t columns, T* target) {
    const std::size_t stride = padded_columns(columns);
    for (std::size_t row = 0; row < rows; ++row, target += stride) {
        if (weight.column_stride == 1) {
            std::memcpy(target, weight.data + static_cast<std::ptrdiff_t>(row) * weight.row_stride,
                        columns * sizeof(T));
        } else {
            for (std::size_t column = 0; column < columns; ++column) target[column] = weight(row, column);
        }
        std::memset(target + columns, 0, (stride - columns) * sizeof(T));
    }
}

/// target (rows, padded) = a (rows, depth) times a padded weight (depth, padded).
template <class T>
void multiply(std::size_t rows, std::size_t depth, std::size_t columns, const T* a, std::ptrdiff_t a_stride,
              const T* weight, T* target) {
    const std::size_t padded = padded_columns(columns);
    const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(padded);
    std::memset(target, 0, rows * padded * sizeof(T));
    for (std::size_t k = 0; k < depth; k += block_depth) {
        const std::size_t block = depth - k < block_depth ? depth - k : block_depth;
        kernels<T>().product({rows, padded, block, a + k, a_stride, 1, weight + k * padded, stride, target, stride});
    }
}

/// The scratch memory of a call.
template <class T>
struct Memory {
    T* weight_hh;
    T* weight_hr;
    T* grad_h;       ///< (batch, padded recurrent_size)
    T* grad_hidden;  ///< (batch, padded hidden_size), behind a projection
    T* grad_bias;    ///< (shares, 4 hidden_size)
    std::size_t size;

    Memory(const LayerBackward<T>& layer, std::size_t shares, T* scratch) : size(0) {
        const auto take = [&](std::size_t count) {
            T* begin = scratch ? scratch + size : nullptr;
            size += count;
            return begin;
        };
        const std::size_t gates = gate_count * layer.hidden_size;
        const bool projected = layer.weight_hr.data != nullptr;
        weight_hh = take(gates * padded_columns(layer.recurrent_size));
        weight_hr = take(projected ? layer.recurrent_size * padded_columns(layer.hidden_size) : 0);
        grad_h = take(layer.steps.batch * padded_columns(layer.recurrent_size));
        grad_hidden = take(projected ? layer.steps.batch * padded_columns(layer.hidden_size) : 0);
        grad_bias = take(shares * gates);
    }
};

template <class T>
std::size_t shares_of(const LayerBackward<T>& layer, std::size_t (&begin)[max_row_shares + 1]) {
    return row_shares(layer.steps, layer.parallel, token_work(0, layer.hidden_size, layer.recurrent_size), begin);
}

template <class T>
void sweep_rows(const LayerBackward<T>& layer, const Memory<T>& memory, const StepRange& chunk, std::size_t first,
                std::size_t last, T* grad_bias) {
    const FlushDenormals flush;
    const std::size_t units = layer.hidden_size;
    const std::size_t recurrent = layer.recurrent_size;
    const std::size_t gates = gate_count * units;
    const bool projected = layer.weight_hr.data != nullptr;
    const std::size_t row_size = padded_columns(recurrent);
    const std::size_t hidden_row = projected ? padded_columns(units) : row_size;
    T* grad_h = memory.grad_h + first * row_size;
    T* grad_c = layer.grad_c + first * units;
    T* grad_hidden = projected ? memory.grad_hidden + first * hidden_row : grad_h;

    for_each_step(layer.steps, chunk, true, first, last, [&](const StepRows& at) {
        const std::size_t place = at.token - chunk.token;
        const T* grad_y = layer.grad_y ? layer.grad_y + at.token * recurrent : nullptr;
        if (projected) {
            T* grad_outputs = layer.grad_outputs + place * recurrent;
            for (std::size_t row = 0; row < at.rows; ++row)
                for (std::size_t k = 0; k < recurrent; ++k)
                    grad_outputs[row * recurrent + k] =
                        grad_h[row * row_size + k] + (grad_y ? grad_y[row * recurrent + k] : T(0));
            multiply(at.rows, recurrent, units, grad_outputs, static_cast<std::ptrdiff_t>(recurrent), memory.weight_hr,
                     grad_hidden);
            grad_y = nullptr;
        }
        T* grad_gates = layer.grad_gates + place * gates;
        // The rows that were there in the step before, then those that began here.
        const auto step_back = [&](std::size_t from, std::size_t rows, const T* cell_prev, const T* h_prev) {
            if (rows == 0) return;
            const std::size_t token = at.token + from;
            if (layer.h_prev)
                std::memcpy(layer.h_prev + (place + from) * recurrent, h_prev, rows * recurrent * sizeof(T));
            kernels<T>().step_backward(
                {rows, units, layer.gates + token * gates, layer.cells + token * units, cell_prev,
                 grad_hidden + from * hidden_row, static_cast<std::ptrdiff_t>(hidden_row),
                 grad_y ? grad_y + from * units : nullptr,
                 layer.grad_cells ? layer.grad_cells + token * units : nullptr, grad_c + from * units,
                 grad_gates + from * gates, grad_bias, projected ? layer.hidden + (place + from) * units : nullptr});
        };
        step_back(0, at.prev_rows, layer.cells + at.prev_token * units, layer.y + at.prev_token * recurrent);
        step_back(at.prev_rows, at.rows - at.prev_rows, layer.c + (first + at.prev_rows) * units,
                  layer.h + (first + at.prev_rows) * recurrent);
        multiply(at.rows, gates, recurrent, grad_gates, static_cast<std::ptrdiff_t>(gates), memory.weight_hh, grad_h);
    });
}

/// The steps below `end`, or from `end` on if the sweep goes up, that make the next chunk.
StepRange next_chunk(const PackedSteps& steps, std::size_t most, const StepRange& last) {
    StepRange chunk = last;
    chunk.tokens = 0;
    if (steps.reverse) {
        chunk.begin = chunk.end = last.end;
        chunk.token = last.token + last.tokens;
        while (chunk.end < steps.steps && (chunk.tokens == 0 || chunk.tokens + steps.rows_of(chunk.end) <= most))
            chunk.tokens += steps.rows_of(chunk.end++);
        return chunk;
    }
    chunk.end = chunk.begin = last.begin;
    while (chunk.begin > 0 && (chunk.tokens == 0 || chunk.tokens + steps.rows_of(chunk.begin - 1) <= most))
        chunk.tokens += steps.rows_of(--chunk.begin);
    chunk.token -= chunk.tokens;
    return chunk;
}

}  // namespace

std::size_t backward_chunk(const PackedSteps& steps, std::size_t hidden_size) {
    // The gradients of a chunk's gate sums fill half of a second level of cache, as machines have it that train.
    constexpr std::size_t values = 1u << 18;
    const std::size_t most = values / (gate_count * hidden_size);
    return most > steps.batch ? most : steps.batch;
}

template <class T>
std::size_t backward_scratch(const LayerBackward<T>& layer) {
    std::size_t begin[max_row_shares + 1];
    return Memory<T>(layer, shares_of(layer, begin), nullptr).size;
}

template <class T>
void layer_backward(const LayerBackward<T>& layer, T* scratch,
                    void (*done)(void* context, std::size_t token, std::size_t tokens), void* context) {
    std::size_t begin[max_row_shares + 1];
    const std::size_t shares = shares_of(layer, begin);
    const Memory<T> memory(layer, shares, scratch);
    const std::size_t recurrent = layer.recurrent_size;
    const std::size_t row_size = padded_columns(recurrent);
    const std::size_t gates = gate_count * layer.hidden_size;
    pack_padded(layer.weight_hh, gates, recurrent, memory.weight_hh);
    if (layer.weight_hr.data) pack_padded(layer.weight_hr, recurrent, layer.hidden_size, memory.weight_hr);
    for (std::size_t row = 0; row < layer.steps.batch; ++row)
        std::memcpy(memory.grad_h + row * row_size, layer.grad_h + row * recurrent, recurrent * sizeof(T));
    std::memset(memory.grad_bias, 0, shares * gates * sizeof(T));

    const StepRange all = all_steps(layer.steps);
    const std::size_t most = backward_chunk(layer.steps, layer.hidden_size);
    StepRange chunk = layer.steps.reverse ? StepRange{0, 0, 0, 0} : StepRange{all.end, all.end, all.tokens, 0};
    for (std::size_t left = all.tokens; left > 0; left -= chunk.tokens) {
        chunk = next_chunk(layer.steps, most, chunk);
        for_each(layer.parallel, shares, [&](std::size_t share) {
            sweep_rows(layer, memory, chunk, begin[share], begin[share + 1], memory.grad_bias + share * gates);
        });
        done(context, chunk.token, chunk.tokens);
    }

    for (std::size_t row = 0; row < layer.steps.batch; ++row)
        std::memcpy(layer.grad_h + row * recurrent, memory.grad_h + row * row_size, recurrent * sizeof(T));
    for (std::size_t at = 0; at < gates; ++at) {
        T sum = memory.grad_bias[at];
        for (std::size_t share = 1; share < shares; ++share) sum += memory.grad_bias[share * gates + at];
        layer.grad_bias[at] = sum;
    }
}

template std::size_t backward_scratch<float>(const LayerBackward<float>&);
template std::size_t backward_scratch<double>(const LayerBackward<double>&);
template void layer_backward<float>(const LayerBackward<float>&, float*, void (*)(void*, std::size_t, std::size_t),
                                    void*);
template void layer_backward<double>(const LayerBackward<double>&, double*, void (*)(void*, std::size_t, std::size_t),
                                     void*);

}  // namespace core
}  // namespace cellstep
