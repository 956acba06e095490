/// The loops that depend on the instruction set, behind a table of function pointers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/nonblocking.h"
#include "core/pack.h"

namespace cellstep {
namespace core {

/// C[m, n] += A[m, k] B[k, n], each element one chain of multiply-adds in order of k.
/// A is read through its strides; the rows of B and C are contiguous.
template <class T>
struct Product {
    std::size_t rows;     ///< m
    std::size_t columns;  ///< n
    std::size_t depth;    ///< k
    const T* a;
    std::ptrdiff_t a_row_stride;
    std::ptrdiff_t a_depth_stride;
    const T* b;
    std::ptrdiff_t b_stride;
    T* c;
    std::ptrdiff_t c_stride;
    // For the gate sums of a step, in the same chains, if there is a `start`; columns are whole vectors then.
    const T* start = nullptr;         ///< a row that every row of C begins with, in place of what C holds
    std::size_t first_depth = 0;      ///< rows of B that come before those above, for
    const T* first = nullptr;         ///< (m, first_depth), rows contiguous
    std::ptrdiff_t first_stride = 0;  ///< from row to row of it
};

/// y = x W^T + b, each element one chain of multiply-adds: the bias, then the inputs in order.
template <class T>
struct Dense {
    std::size_t rows;
    std::size_t inputs;
    std::size_t outputs;
    const T* packed;  ///< (1 + inputs, outputs): the bias, then the transposed weight
    const T* x;       ///< (rows, inputs), row stride x_stride
    std::ptrdiff_t x_stride;
    T* y;  ///< (rows, outputs), row stride y_stride
    std::ptrdiff_t y_stride;
};

/// One step of a plain layer for the units from first_unit to last_unit.
template <class T>
struct Step {
    std::size_t rows;
    std::size_t input_size;
    std::size_t hidden_size;
    std::size_t recurrent_size;  ///< hidden_size, as this is a plain layer
    std::size_t first_unit;      ///< a multiple of 16
    std::size_t last_unit;       ///< a multiple of 16, or hidden_size
    WeightType weights;
    const void* packed;  ///< the layer in the layout of pack.h
    const T* x;          ///< (rows, input_size), row stride x_stride; not read if there are sums
    std::ptrdiff_t x_stride;
    const T* h;  ///< (rows, hidden_size) before the step, row stride h_stride
    std::ptrdiff_t h_stride;
    T* sums;                ///< null, or for each panel (sums_rows, 4 width): bias and input part; overwritten
    std::size_t sums_rows;  ///< rows of all steps that the sums are for
    std::size_t sums_row;   ///< the first row of this step
    const T* c;             ///< (rows, hidden_size) before the step
    T* c_next;              ///< (rows, hidden_size) after it; may be c
    T* h_next;              ///< (rows, hidden_size) after it, row stride h_next_stride; must not overlap h
    std::ptrdiff_t h_next_stride;
    T* gates;                ///< null, or (rows, 4 hidden_size): activated i, f, g, o
    T* scratch;              ///< 64 (rows + input_size + hidden_size) values
    bool backwards = false;  ///< whether the panels are read from the last to the first
    bool fast = false;       ///< the fast variant of sigmoid and tanh, see activations.h
};

/// One step back through gates and state, element by element.
template <class T>
struct StepBackward {
    std::size_t rows;
    std::size_t hidden_size;
    const T* gates;      ///< (rows, 4 hidden_size), as saved
    const T* cell;       ///< (rows, hidden_size), c after the step
    const T* cell_prev;  ///< (rows, hidden_size), c before the step
    const T* grad_h;  ///< (rows, hidden_size), row stride grad_h_stride: for the h of the step, by way of the next one
    std::ptrdiff_t grad_h_stride;
    const T* grad_y;     ///< null, or (rows, hidden_size): for the h of the step, as an output
    const T* grad_cell;  ///< null, or (rows, hidden_size): for the c of the step, as an output
    T* grad_c;           ///< (rows, hidden_size): in for c after the step, out for c before it
    T* grad_gates;       ///< (rows, 4 hidden_size): out, for the sums before the activations
    T* grad_bias;        ///< (4 hidden_size): the sums of grad_gates over the rows are added to it
    T* hidden;           ///< null, or (rows, hidden_size): out, o tanh(c)
};

/// The numbers are those of deploy files and operators; softmax is for rows of outputs alone.
enum class Activation : unsigned char { linear, relu, sigmoid, tanh, hard_sigmoid, hardsigmoid, elu, softmax };
constexpr unsigned activation_count = 8;

/// What a layer has beyond the plain LSTM; all values of one gate lie together, gates in order i, f, g, o. The formula
/// is in python/cellstep/formula.py.
template <class T>
struct LayerOptions {
    bool coupled = false;
    Activation gate = Activation::sigmoid;
    Activation candidate = Activation::tanh;
    Activation output = Activation::tanh;
    T cell_clip = 0;
    T zoneout_h = 0;
    T zoneout_c = 0;
    const T* projection = nullptr;   ///< (hidden_size, recurrent_size): weight_hr transposed, or null
    const T* peephole = nullptr;     ///< (3 hidden_size): i, f, o, or null
    const T* norm_ih = nullptr;      ///< (4 hidden_size), or null like the next three
    const T* norm_hh = nullptr;      ///< (4 hidden_size)
    const T* norm_c = nullptr;       ///< (hidden_size)
    const T* norm_c_bias = nullptr;  ///< (hidden_size)
    bool fast = false;               ///< the fast variant of sigmoid and tanh, see activations.h
};

/// What a call to a layer may bring along; each may be null.
template <class T>
struct LayerMasks {
    const unsigned char* reset = nullptr;  ///< (steps, batch) through its strides: rows to clear before the step
    std::ptrdiff_t reset_step_stride = 0;
    std::ptrdiff_t reset_row_stride = 0;
    std::size_t reset_first = 0;   ///< the first step whose flags are read
    const T* initial_h = nullptr;  ///< (recurrent_size): what cleared rows get; null: zero
    const T* initial_c = nullptr;  ///< (hidden_size)
    const T* mask_h = nullptr;     ///< (batch, recurrent_size), times the h that comes back
    const T* mask_g = nullptr;     ///< (batch, hidden_size), times the candidate
    const T* keep_h = nullptr;     ///< (steps, batch, recurrent_size): share of the old h, in place of zoneout_h
    const T* keep_c = nullptr;     ///< (steps, batch, hidden_size): the same of c
};

/// The recurrence of a layer with options, once the input projection lies in `sums`.
template <class T>
struct VariantSweep {
    std::size_t steps;
    std::size_t batch;
    std::size_t input_size;
    std::size_t hidden_size;
    std::size_t recurrent_size;  ///< values of h: hidden_size, or less behind a projection
    WeightType weights;
    const void* packed;  ///< the layer in the layout of pack.h
    T* sums;  ///< for each panel (steps * batch, 4 width): input part, with the bias unless there is norm_ih;
              ///< overwritten
    T* h;     ///< (batch, recurrent_size), updated in place
    T* c;     ///< (batch, hidden_size), updated in place
    T* y;     ///< (steps, batch, recurrent_size), the h of every step
    std::ptrdiff_t y_step_stride;
    std::ptrdiff_t y_row_stride;
    T* cells;    ///< null, or (steps, batch, hidden_size): the c of every step
    T* scratch;  ///< variant_scratch values
    LayerOptions<T> options;
    LayerMasks<T> masks;
};

/// What of a step is formed from int8 weights.
enum class Int8Part : unsigned char {
    whole,          ///< what the other weights' step does
    inputs,         ///< the input part alone, to `sums`
    biased_inputs,  ///< bias and input part, to `sums`
    recurrent,      ///< the hidden part, added to `sums`
};

template <class T>
struct Int8Step {
    Step<T> step;
    Int8Part part;
};

template <class T>
struct Kernels {
    void (*product)(const Product<T>&) CELLSTEP_NONBLOCKING;
    /// Writes `count` weights of a narrow type in the type that is computed in; `stored` is read as that type.
    void (*widen)(WeightType type, const void* stored, std::size_t count, T* widened) CELLSTEP_NONBLOCKING;
    void (*step)(const Step<T>&) CELLSTEP_NONBLOCKING;
    /// The step of int8 weights, see int8_step.h. Null for double.
    void (*int8_step)(const Int8Step<T>&) CELLSTEP_NONBLOCKING;
    void (*step_backward)(const StepBackward<T>&) CELLSTEP_NONBLOCKING;
    void (*variant_sweep)(const VariantSweep<T>&) CELLSTEP_NONBLOCKING;
    void (*dense)(const Dense<T>&) CELLSTEP_NONBLOCKING;
    /// Applies an activation to `rows` contiguous rows of `width` values in place.
    void (*activate)(Activation activation, std::size_t rows, std::size_t width, T* values) CELLSTEP_NONBLOCKING;
    /// A number that changes when the bytes do; not the same on every instruction set.
    std::uint64_t (*digest)(const void* data, std::size_t size, std::uint64_t seed) CELLSTEP_NONBLOCKING;
};

/// The kernels of the best instruction set that this machine has, chosen when the library is loaded. The environment
/// variable CELLSTEP_CPU (baseline, avx2, avx2vnni, avx512 or avx512vnni) lowers the choice; what the machine lacks is
/// never chosen. The names in vnni differ from those without in the products of int8 weights alone.
template <class T>
const Kernels<T>& kernels() CELLSTEP_NONBLOCKING;

/// Name of the instruction set in use: "baseline", "avx2" or "avx512" on x86-64, else "native".
const char* instruction_set();

}  // namespace core
}  // namespace cellstep
