/// Sequences cut into pieces of time, a launch each, and the streams on which layers work on theirs side by side.
#pragma once

#include <vector>

#include "choose.h"
#include "layers.h"

namespace cellstep {
namespace cuda {

/// Steps of a piece: all of a batch's where the kernel does not go on from what a launch before it left, or where
/// cutting is not likely to pay. CELLSTEP_CUDA_CHUNK in the environment sets it, for tests; 0: do not cut.
int piece_steps(const char* op, const Device& device, const Stack& stack, Kernel kernel);

/// Whether CELLSTEP_CUDA_CHUNK asks for pieces, and with that for one layer a launch.
bool pieces_forced(const char* op);

/// Whether products for weights are likely to be worth a stream of their own.
bool products_pay(const char* op, const Stack& stack);

/// What kernels read of each piece, as if it was a batch of its own.
class Pieces {
public:
    Pieces(const char* op, const Device& device, const Batch& batch, int length);

    int count() const { return (batch_.steps.steps + length_ - 1) / length_; }
    int first_step(int piece) const { return piece * length_; }
    int step_count(int piece) const;
    std::int64_t first(int piece) const { return batch_.first(first_step(piece)); }  ///< its first token
    std::int64_t tokens(int piece) const { return batch_.first(first_step(piece) + step_count(piece)) - first(piece); }
    std::int64_t most_tokens() const;
    Steps steps(int piece) const;

private:
    const Batch& batch_;
    int length_;
    Maybe lengths_;  ///< (pieces, N) int32
    Maybe offsets_;  ///< (T) int32, from the first token of each step's piece on
};

/// The streams of a call. Torch's products stay on the call's own, for which it has the memory that they work in; a
/// layer's recurrence is put to one beside it. What both use is allocated on the call's stream and lives until that has
/// waited for the others, as it does when this ends: so the allocator is right, and a graph captures them all.
class Streams {
public:
    /// Without `beside` all is put to the call's stream.
    Streams(const char* op, const Device& device, bool beside) : op_(op), device_(device), beside_(beside) {}
    ~Streams();
    Streams(const Streams&) = delete;
    Streams& operator=(const Streams&) = delete;

    void* call() const { return device_.stream(); }
    void* layer(int number);
    /// What has been put to the stream so far; null where there is but one stream.
    void* mark(void* stream);
    void wait(void* stream, void* event);

private:
    const char* op_;
    const Device& device_;
    bool beside_;
    std::vector<void*> layers_;
    std::vector<void*> marks_;
};

}  // namespace cuda
}  // namespace cellstep
