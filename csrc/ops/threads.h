/// Torch's threads for the core.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstddef>
#include <cstdint>

#include "core/parallel.h"
#include "core/ragged.h"

namespace cellstep {
namespace ops {

/// The threads of the process, as torch.set_num_threads sets their number, for the time of one call. Inside of a
/// parallel region of torch the tasks run one after the other on the thread that asks.
class Threads {
public:
    Threads() : parallel_{torch::stable::get_num_threads(), nullptr, &run} {}

    /// What the core takes: null where there is but one thread.
    const core::Parallel* get() const { return parallel_.threads > 1 ? &parallel_ : nullptr; }

private:
    static void run(void*, std::size_t count, void (*task)(void* argument, std::size_t index), void* argument) {
        torch::stable::parallel_for(0, static_cast<std::int64_t>(count), 1, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t index = begin; index < end; ++index) task(argument, static_cast<std::size_t>(index));
        });
    }

    core::Parallel parallel_;
};

/// Whether torch's threads share the rows of a padded batch.
inline bool rows_are_shared(std::int64_t steps, std::int64_t batch, std::int64_t input_size, std::int64_t hidden_size) {
    const Threads threads;
    const auto units = static_cast<std::size_t>(hidden_size);
    std::size_t begin[core::max_row_shares + 1];
    return core::row_shares({static_cast<std::size_t>(steps), static_cast<std::size_t>(batch), nullptr, false},
                            threads.get(), core::token_work(static_cast<std::size_t>(input_size), units, units),
                            begin) > 1;
}

}  // namespace ops
}  // namespace cellstep
