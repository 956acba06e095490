/// One LSTM layer over a whole sequence on raw pointers.
///
/// For each step, with gate order i, f, g, o (Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al.
/// 2000, as in torch.nn.LSTM):
///   i, f, o = sigmoid(W x + b_ih + U h + b_hh),  g = tanh(the same),  c = f c + i g,  h = o tanh(c).
///
/// Nothing here allocates or throws: scratch memory is the caller's, and sizes are checked by the callers.
#pragma once

#include <cstddef>

#include "core/kernels.h"
#include "core/pack.h"
#include "core/parallel.h"

namespace cellstep {
namespace core {

/// A (steps, batch, features) array that is read through its strides, counted in values.
template <class T>
struct SequenceView {
    const T* data;
    std::ptrdiff_t step_stride;
    std::ptrdiff_t row_stride;
    std::ptrdiff_t feature_stride;
};

/// A (steps, batch, features) array that is written; the features of a row are contiguous.
template <class T>
struct SequenceTarget {
    T* data;
    std::ptrdiff_t step_stride;
    std::ptrdiff_t row_stride;
};

/// The input part of the gate sums of steps of one row, as project_row gives it: `step_stride` values from one to the
/// next.
template <class T>
struct InputSums {
    const T* data = nullptr;
    std::ptrdiff_t step_stride = 0;
};

template <class T>
struct LayerForward {
    std::size_t steps;
    std::size_t batch;
    std::size_t input_size;
    std::size_t hidden_size;
    WeightType weights;
    const void* packed;   ///< the layer in the layout of pack.h
    SequenceView<T> x;    ///< (steps, batch, input_size); negative strides run a sequence backwards
    const T* h;           ///< (batch, hidden_size) before the first step; must not lie in y
    T* c;                 ///< (batch, hidden_size), updated in place
    SequenceTarget<T> y;  ///< (steps, batch, hidden_size)
    T* gates;             ///< null, or (steps, batch, 4 hidden_size): activated i, f, g, o for backward
    T* cells;             ///< null, or (steps, batch, hidden_size): c of every step
    LayerMasks<T> masks;  ///< of which a plain layer reads the flags to reset and the initial state
    const Parallel* parallel = nullptr;
    InputSums<T> sums = {};  ///< unless null, x is not read
    bool fast = false;       ///< the fast variant of sigmoid and tanh, see activations.h
};

/// Values of scratch memory that layer_forward needs for a call of this size; does not grow with long sequences.
std::uint64_t layer_scratch(std::uint64_t steps, std::uint64_t batch, std::uint64_t input_size,
                            std::uint64_t hidden_size, const Parallel* parallel = nullptr) CELLSTEP_NONBLOCKING;

/// Runs a layer. A few rows have the input projection of a chunk of steps as one matrix product before the recurrence,
/// so that its weights are read once for the chunk; with more rows a step reads them once for all. Every gate sum is
/// one chain of multiply-adds over bias, inputs and hidden values, so no bit of the result hangs on how a sequence is
/// cut into calls, on which other rows are in the batch, or on the threads.
template <class T>
void layer_forward(const LayerForward<T>& layer, T* scratch) CELLSTEP_NONBLOCKING;

/// One step of a plain layer, ready but for the units; `scratch` as layer_scratch counts it.
template <class T>
void layer_step(const Step<T>& step, const Parallel* parallel) CELLSTEP_NONBLOCKING;

/// A layer with options; h is updated in place, unlike above.
template <class T>
struct VariantForward {
    std::size_t steps;
    std::size_t batch;
    std::size_t input_size;
    std::size_t hidden_size;
    std::size_t recurrent_size;  ///< values of h: hidden_size, or less behind a projection
    WeightType weights;
    const void* packed;   ///< the layer in the layout of pack.h
    SequenceView<T> x;    ///< (steps, batch, input_size)
    T* h;                 ///< (batch, recurrent_size), updated in place; must not lie in y
    T* c;                 ///< (batch, hidden_size), updated in place
    SequenceTarget<T> y;  ///< (steps, batch, recurrent_size)
    T* cells;             ///< null, or (steps, batch, hidden_size): c of every step
    LayerOptions<T> options;
    LayerMasks<T> masks;
    InputSums<T> sums = {};  ///< unless null, x is not read
};

/// Writes the input part of one row's gate sums, 4 padded_size(hidden_size) values, begun with the bias or with zero,
/// as a layer with norm_ih wants them. `scratch`: 64 input_size values.
template <class T>
void project_row(WeightType weights, const void* packed, std::size_t input_size, std::size_t hidden_size,
                 std::size_t recurrent_size, bool bias, const T* x, T* sums, T* scratch) CELLSTEP_NONBLOCKING;

/// Values of scratch memory that variant_forward needs for a call of this size.
std::uint64_t variant_scratch(std::uint64_t steps, std::uint64_t batch, std::uint64_t input_size,
                              std::uint64_t hidden_size) CELLSTEP_NONBLOCKING;

/// Runs a layer with options; what holds for the bits of layer_forward holds here.
template <class T>
void variant_forward(const VariantForward<T>& layer, T* scratch) CELLSTEP_NONBLOCKING;

/// y = x W^T + b for `rows` rows, each sum in order of the inputs. `packed` is a (1 + in_size, out_size) matrix: the
/// bias, then the transposed weight.
template <class T>
void dense_forward(std::size_t rows, std::size_t in_size, std::size_t out_size, const T* packed, const T* x,
                   std::ptrdiff_t x_stride, T* y, std::ptrdiff_t y_stride) CELLSTEP_NONBLOCKING;

/// Applies an activation to `rows` contiguous rows of `width` values in place.
template <class T>
void apply_activation(Activation activation, std::size_t rows, std::size_t width, T* values) CELLSTEP_NONBLOCKING;

/// Writes (1 + in_size) * out_size values to `packed`; weight is (out_size, in_size), bias may be null.
template <class T>
void pack_dense(std::size_t in_size, std::size_t out_size, MatrixView<T> weight, const T* bias, T* packed);

}  // namespace core
}  // namespace cellstep
