/// Runs a whole model image: scaling, LSTM layers, dense head, scaling back.
#pragma once

#include <cstddef>

#include "core/image.h"
#include "core/layer.h"

namespace cellstep {
namespace core {

template <class T>
struct ModelRun {
    std::size_t steps;
    std::size_t batch;
    SequenceView<T> x;    ///< (steps, batch, input_size)
    T* h;                 ///< (num_layers, batch, hidden_size), updated in place
    T* c;                 ///< the same
    SequenceTarget<T> y;  ///< (steps, batch, output_size); if last_only (1, batch, output_size)
    bool last_only;       ///< the head runs on the last step alone
};

/// Values of scratch memory that run_model needs for a call of this size. A long call is cut into chunks that stay
/// in cache, so this stops growing with `steps`.
template <class T>
std::size_t model_scratch(const Image& image, std::size_t steps, std::size_t batch);

/// The image's dtype must be T. The result does not hang on how a stream is cut into calls, nor on the batch.
template <class T>
void run_model(const Image& image, const ModelRun<T>& run, T* scratch);

}  // namespace core
}  // namespace cellstep
