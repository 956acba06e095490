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
    const Parallel* parallel;     ///< null: this thread alone
    const T* prepared = nullptr;  ///< null, or (steps, prepared_size): what prepare_step gave for each step of the one
                                  ///< row of the batch; of x only the skipped columns are read then
};

/// A model made ready to run, so that a call finds all sizes and places known.
template <class T>
struct Plan;

/// Bytes of memory that a plan lies in.
template <class T>
std::size_t plan_bytes(const Image& image);

/// Writes a plan to `memory`, plan_bytes of it, aligned to 64 bytes: for calls of at most `steps` steps, of `batch`
/// rows, and on these threads or none. The image's dtype must be T. Where the model is not bidirectional, the number of
/// steps decides about nothing but how they are shared by threads.
template <class T>
const Plan<T>* make_plan(const Image& image, std::size_t steps, std::size_t batch, const Parallel* parallel,
                         void* memory) CELLSTEP_NONBLOCKING;

/// Values of scratch memory that every call of such a plan needs, in 64 bits, as size_t may not hold it; in steps and
/// rows of up to 2^24 no sum on the way overflows. A long call is cut into chunks that stay in cache, so this does not
/// grow with the steps, unless the model is bidirectional.
template <class T>
std::uint64_t plan_scratch(const Image& image, std::size_t steps, std::size_t batch, const Parallel* parallel);

/// No bit of the result hangs on how a stream is cut into calls, on the batch or on the threads.
template <class T>
void run_model(const Plan<T>& plan, const ModelRun<T>& run, T* scratch) CELLSTEP_NONBLOCKING;

/// Values that prepare_step writes.
template <class T>
std::uint64_t prepared_size(const Image& image) CELLSTEP_NONBLOCKING;

/// Writes what hangs on one step of x (input_size) alone: the step as the first LSTM layer sees it, and where memory is
/// no matter the input part of that layer's gate sums for each direction. Each gate sum is one chain over bias, inputs
/// and hidden values, so a run that goes on from here ends in the same bits.
template <class T>
void prepare_step(const Plan<T>& plan, const T* x, T* prepared, T* scratch) CELLSTEP_NONBLOCKING;

/// Writes the state of fresh streams, zero or learned: h (state_layers, batch, h_size), c (state_layers, batch,
/// c_size).
template <class T>
void initial_state(const Image& image, std::size_t batch, T* h, T* c) CELLSTEP_NONBLOCKING;

/// Values of scratch memory for the run_model below.
template <class T>
std::size_t model_scratch(const Image& image, std::size_t steps, std::size_t batch, const Parallel* parallel);

/// The same for a caller who keeps no plan.
template <class T>
void run_model(const Image& image, const ModelRun<T>& run, T* scratch) CELLSTEP_NONBLOCKING;

}  // namespace core
}  // namespace cellstep
