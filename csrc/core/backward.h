/// Backward through ragged_forward and layer_forward: the sweep back in time, which gives the gradients of all gate
/// sums, a chunk of steps at a time. Those of inputs and weights are matrix products of a chunk's, which are the
/// caller's, while the chunk is still in cache:
///   grad_x = grad_gates weight_ih,  grad_weight_ih += grad_gates^T x,  grad_weight_hh += grad_gates^T h_prev,
/// and behind a projection grad_weight_hr += grad_outputs^T hidden.
#pragma once

#include <cstddef>

#include "core/pack.h"
#include "core/parallel.h"
#include "core/ragged.h"

namespace cellstep {
namespace core {

template <class T>
struct LayerBackward {
    PackedSteps steps;  ///< a padded batch is one whose rows all have every step
    std::size_t hidden_size;
    std::size_t recurrent_size;  ///< values of h: hidden_size, or less behind a projection
    MatrixView<T> weight_hh;     ///< (4 hidden_size, recurrent_size)
    MatrixView<T> weight_hr;     ///< (recurrent_size, hidden_size), or no data
    const T* c;                  ///< (batch, hidden_size) before the first step, contiguous like all that follow
    const T* gates;              ///< (tokens, 4 hidden_size), as saved
    const T* cells;              ///< (tokens, hidden_size), as saved
    const T* grad_y;             ///< null, or (tokens, recurrent_size)
    const T* grad_cells;         ///< null, or (tokens, hidden_size): for the c of every step
    T* grad_h;                   ///< (batch, recurrent_size): in for the last h, out for the first
    T* grad_c;                   ///< (batch, hidden_size): in for the last c, out for the first
    T* grad_bias;                ///< (4 hidden_size), out: for either bias
    const T* h;                  ///< (batch, recurrent_size) before the first step
    const T* y;                  ///< (tokens, recurrent_size), the h of every step
    T* grad_gates;               ///< (chunk, 4 hidden_size), out: for the sums before the activations
    T* h_prev;                   ///< null, or (chunk, recurrent_size), out: the h that a step began with
    T* grad_outputs;             ///< (chunk, recurrent_size), out behind a projection: for the h of every step
    T* hidden;                   ///< (chunk, hidden_size), out behind a projection: o tanh(c)
    const Parallel* parallel;
};

/// Most tokens of a chunk.
std::size_t backward_chunk(const PackedSteps& steps, std::size_t hidden_size);

/// Values of scratch memory that layer_backward needs; does not grow with the steps.
template <class T>
std::size_t backward_scratch(const LayerBackward<T>& layer);

/// The sweep, the rows shared between the threads. After each chunk it calls done(context, token, tokens) for the
/// tokens from `token` on. The order of summation, and with it the last bits of grad_bias, hang on the number of
/// threads.
template <class T>
void layer_backward(const LayerBackward<T>& layer, T* scratch,
                    void (*done)(void* context, std::size_t token, std::size_t tokens), void* context);

}  // namespace core
}  // namespace cellstep
