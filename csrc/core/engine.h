/// Runs a whole model image: scaling, dense layers, LSTM layers, heads, scaling back, skip.
#pragma once

#include "core/image.h"
#include "core/layer.h"

namespace cellstep {
namespace core {

template <class T>
struct ModelRun {
    std::size_t steps;
    std::size_t batch;
    SequenceView<T> x;        ///< (steps, batch, input_size)
    std::size_t state_batch;  ///< rows of the whole batch in h and c, of which these may be some
    T* h;                     ///< (state_layers, state_batch, h_size), updated in place
    T* c;                     ///< (state_layers, state_batch, c_size), updated in place
    SequenceTarget<T> y;      ///< (steps, batch, output_size), or (1, batch, output_size) unless every step is answered
    Answers answers;          ///< every, whatever the header says, for a stream
    const unsigned char*
        reset;  ///< null, or (steps, batch) through its strides: rows to put to the initial state first
    std::ptrdiff_t reset_step_stride;
    std::ptrdiff_t reset_row_stride;
    const Parallel* parallel;  ///< null: this thread alone
};

/// Whether a layer runs backwards in time as well, so that a sequence cannot be cut into calls.
bool is_bidirectional(const Image& image);

/// Values of scratch memory that run_model needs for a call of this size on these threads. A long call is cut into
/// chunks that stay in cache, so this stops growing with `steps`, unless the model is bidirectional or shared by many
/// threads.
template <class T>
std::size_t model_scratch(const Image& image, std::size_t steps, std::size_t batch, const Parallel* parallel);

/// Writes the state of fresh streams, zero or learned: h (state_layers, batch, h_size), c (state_layers, batch,
/// c_size).
template <class T>
void initial_state(const Image& image, std::size_t batch, T* h, T* c);

/// The image's dtype must be T. No bit of the result hangs on how a stream is cut into calls, on the batch or on the
/// threads.
template <class T>
void run_model(const Image& image, const ModelRun<T>& run, T* scratch);

}  // namespace core
}  // namespace cellstep
