/// One LSTM layer over sequences of different lengths, packed as torch's PackedSequence has them: the rows of the first
/// step, then those of the second, and so on; no place is lost to padding. Rows stand in the order of falling length,
/// so that the rows of a step are the first of those of the step before.
///
/// Nothing here allocates or throws: scratch memory is the caller's, and sizes are checked by the callers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/kernels.h"
#include "core/parallel.h"

namespace cellstep {
namespace core {

/// The steps of packed sequences, in the order of a sweep over them.
struct PackedSteps {
    std::size_t steps;
    std::size_t batch;         ///< rows of the first step, no other has more
    const std::int64_t* rows;  ///< (steps), not rising; or null: all rows in every step
    bool reverse;              ///< whether the layer runs from the last step to the first

    std::size_t rows_of(std::size_t step) const { return rows ? static_cast<std::size_t>(rows[step]) : batch; }
};

/// Rows from `first` to `last` of one step.
struct StepRows {
    std::size_t step;
    std::size_t token;       ///< place of row `first` among the tokens of all steps
    std::size_t rows;        ///< rows of the range that have this step
    std::size_t prev_token;  ///< the same row in the step before, in the order in which the layer runs
    std::size_t prev_rows;   ///< rows of the range that have both steps; the others begin here
};

/// Steps from `begin` to `end`, with the place of their first row among all tokens.
struct StepRange {
    std::size_t begin;
    std::size_t end;
    std::size_t token;
    std::size_t tokens;  ///< rows of these steps together
};

inline StepRange all_steps(const PackedSteps& steps) {
    StepRange range{0, steps.steps, 0, 0};
    for (std::size_t step = 0; step < steps.steps; ++step) range.tokens += steps.rows_of(step);
    return range;
}

/// Calls visit(StepRows) for the rows from `first` to `last`, step by step as the layer runs, or the other way round
/// if `back`; steps without rows are left out.
template <class Visit>
void for_each_step(const PackedSteps& steps, const StepRange& range, bool back, std::size_t first, std::size_t last,
                   Visit visit) {
    const bool upwards = steps.reverse == back;
    std::size_t begin = upwards ? range.token : range.token + range.tokens;  // place of the step's first row
    const auto within = [&](std::size_t rows) { return rows < first ? 0 : (rows < last ? rows : last) - first; };
    for (std::size_t count = 0; count < range.end - range.begin; ++count) {
        const std::size_t step = upwards ? range.begin + count : range.end - 1 - count;
        const std::size_t all = steps.rows_of(step);
        if (!upwards) begin -= all;
        StepRows part{step, begin + first, within(all), 0, 0};
        if (steps.reverse && step + 1 < steps.steps) {
            part.prev_token = part.token + all;
            part.prev_rows = within(steps.rows_of(step + 1));
        } else if (!steps.reverse && step > 0) {
            part.prev_token = part.token - steps.rows_of(step - 1);
            part.prev_rows = part.rows;
        }
        if (part.rows > 0) visit(part);
        if (upwards) begin += all;
    }
}

/// Most threads that the rows are shared between.
constexpr std::size_t max_row_shares = 64;

/// Shares of the rows for the threads, none where one thread is faster; row begin[k] is the first of share k. The
/// shares have about as many tokens, each of which takes `work` multiply-adds.
std::size_t row_shares(const PackedSteps& steps, const Parallel* parallel, std::size_t work,
                       std::size_t (&begin)[max_row_shares + 1]);

/// Multiply-adds of a token.
constexpr std::size_t token_work(std::size_t input_size, std::size_t hidden_size, std::size_t recurrent_size) {
    return 4 * hidden_size * (input_size + recurrent_size);
}

template <class T>
struct RaggedForward {
    PackedSteps steps;
    std::size_t input_size;
    std::size_t hidden_size;
    std::size_t recurrent_size;  ///< values of h: hidden_size, or less behind a projection
    const T* packed;             ///< the layer in the layout of pack.h
    const T* projection;         ///< null, or (hidden_size, recurrent_size): weight_hr transposed
    const T* x;                  ///< (tokens, input_size), contiguous like all that follow
    T* h;                        ///< (batch, recurrent_size), updated in place
    T* c;                        ///< (batch, hidden_size), updated in place
    T* y;                        ///< (tokens, recurrent_size)
    T* gates;                    ///< null, or (tokens, 4 hidden_size): activated i, f, g, o for backward
    T* cells;                    ///< null, or (tokens, hidden_size): c of every step
    const Parallel* parallel;
};

/// Values of scratch memory that ragged_forward needs; does not grow with the steps. The pointers are not read.
template <class T>
std::size_t ragged_scratch(const RaggedForward<T>& layer);

/// Runs a layer, the rows shared between the threads. What holds for the bits of layer_forward holds here.
template <class T>
void ragged_forward(const RaggedForward<T>& layer, T* scratch);

}  // namespace core
}  // namespace cellstep
