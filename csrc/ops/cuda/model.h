/// The launches that run what is around plain LSTM layers, and layers with options: what each kernel reads and writes,
/// free of torch. Shapes as in kernels.h. T is float or double; all memory is the device's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace cellstep {
namespace cuda {

/// The numbers are those of core/kernels.h.
enum class Activation : int { linear, relu, sigmoid, tanh, hard_sigmoid, hardsigmoid, elu, softmax };

/// activate.cu: an activation of `rows` contiguous rows of `width` values; softmax over each row. y may be x.
struct Activate {
    DataType type;
    Activation activation;
    std::int64_t rows;
    std::int64_t width;
    const void* x;
    void* y;
    void* stream;
};
const char* activate_values(const Activate& call);

/// Rows of a (steps, batch, features) array through their strides, counted in values.
template <class T>
struct Rows {
    T* data;
    std::int64_t step;
    std::int64_t row;
};

/// A dense layer with what may stand before and behind it, y = act((x - offset) scale W + b) scale' + offset' + x', for
/// each row of each step. Each sum is one chain in order of the inputs.
template <class T>
struct DenseRows {
    std::int64_t batch;
    std::int64_t steps;    ///< that are answered: all, or 1, the one behind which a row's length ends
    std::int64_t inputs;   ///< of x
    std::int64_t outputs;  ///< inputs where there are no weights
    Rows<const T> x;       ///< step 0: the same for each step
    std::int64_t feature;  ///< from one input to the next
    std::int64_t part;     ///< inputs that lie in one piece, and how far the pieces lie apart
    std::int64_t part_stride;
    const T* scaling;  ///< offsets, then scales of the inputs, or null
    const T* weights;  ///< (1 + inputs, outputs): the bias, then the transposed weight; or null: y is x
    Activation activation;
    const T* output_scaling;       ///< offsets, then scales, or null
    const std::uint32_t* columns;  ///< of `skipped` that are added to y, or null
    Rows<const T> skipped;         ///< of skipped_columns
    std::int64_t skipped_feature;
    std::int64_t skipped_columns;
    Rows<T> y;                    ///< features contiguous
    const std::int64_t* lengths;  ///< (N), or null; past its length a row is answered with zeros
    std::int64_t last_step;       ///< of x, where there are no lengths
};

/// How an image stores the weights of a layer.
enum class Stored : int { full, bfloat16, float16, int8 };

/// Weights of one direction of a layer as core/pack.h lays them out, and where they go in torch's layout.
template <class T>
struct Unpack {
    const unsigned char* packed;
    Stored stored;
    bool coupled;  ///< of the four gates f is left out
    std::int64_t input_size;
    std::int64_t hidden_size;
    std::int64_t recurrent_size;
    T* weight_ih;         ///< (G H, I), G = 4, or 3 if coupled
    T* weight_hh;         ///< (G H, R)
    T* bias;              ///< (G H)
    const T* projection;  ///< null, or (H, R)
    T* weight_hr;         ///< (R, H)
};

constexpr int unpacks_at_once = 16;

/// unpack.cu: some dense rows and some unpacking in one launch; either may be nothing.
template <class T>
struct Prepare {
    DenseRows<T> rows;  ///< batch 0: none
    int unpacks;
    Unpack<T> unpack[unpacks_at_once];
};
template <class T>
const char* prepare(const Prepare<T>& call, void* stream);

/// unpack.cu: values of a state, from a place among others to another, or from a row that all begin with.
template <class T>
struct StateRows {
    const T* from;  ///< null: zeros
    std::int64_t from_row;
    T* to;
    std::int64_t to_row;
    std::int64_t width;
};

constexpr int states_at_once = 32;

template <class T>
struct CopyStates {
    std::int64_t batch;
    int count;
    StateRows<T> states[states_at_once];
};
template <class T>
const char* copy_states(const CopyStates<T>& call, void* stream);

/// unpack.cu: y (steps, batch, width) += x, of contiguous rows, as a residual layer does.
template <class T>
struct AddRows {
    std::int64_t batch;
    std::int64_t steps;
    std::int64_t width;
    const T* x;
    Rows<T> y;
};
template <class T>
const char* add_rows(const AddRows<T>& call, void* stream);

/// variant.cu: layer normalisation of the sums over the inputs, in place, before the first step.
template <class T>
struct VariantInputs {
    std::int64_t rows;
    std::int64_t hidden_size;
    bool coupled;
    bool expanded;     ///< the gains of a coupled layer have a place for f as well
    const T* norm_ih;  ///< (G H)
    T* sums;           ///< (rows, G H)
};
template <class T>
const char* variant_inputs(const VariantInputs<T>& call, void* stream);

/// variant.cu: one step of a layer with options behind its products; python/cellstep/formula.py has the formula.
template <class T>
struct VariantStep {
    std::int64_t batch;
    std::int64_t hidden_size;
    std::int64_t recurrent_size;
    bool coupled;
    Activation gate;
    Activation candidate;
    Activation output;
    T cell_clip;
    T zoneout_h;
    T zoneout_c;
    const T* input_sums;   ///< (N, G H): W_ih x, normalised if the layer does that
    const T* hidden_sums;  ///< (N, G H): W_hh h_in
    const T* projected;    ///< (N, R): W_hr m, of a projection
    const T* bias_ih;      ///< (G H), or null like the next six
    const T* bias_hh;
    const T* peephole;  ///< gates i, (f,) o
    const T* norm_hh;   ///< (G H)
    const T* norm_c;    ///< (H)
    const T* norm_c_bias;
    bool expanded;  ///< peephole and norms of a coupled layer have a place for f as well
    const T* mask_h;
    const T* mask_g;
    const T* keep_h;  ///< of this step
    const T* keep_c;
    const std::int64_t* lengths;
    std::int64_t step;
    const unsigned char* reset;  ///< flags of this step, or null
    std::int64_t reset_step;     ///< the step whose flags they are
    const unsigned char* next_reset;
    std::int64_t next_reset_step;
    std::int64_t reset_row;  ///< from a row's flag to that of the next row
    const T* initial_h;      ///< (R), or null: zero
    const T* initial_c;
    T* h;     ///< (N, R), updated in place
    T* h_in;  ///< (N, R): what the next step's product reads: h, reset and masked
    T* c;     ///< (N, H), updated in place
    T* m;     ///< (N, H): o out(c'), which a projection reads; scratch with norms
    Rows<T> y;
    Rows<T> cells;  ///< or null
};

/// h_in before the first step, from h and next_reset.
template <class T>
const char* variant_begin(const VariantStep<T>& step, void* stream);
/// The gates; h too, unless there is a projection.
template <class T>
const char* variant_step(const VariantStep<T>& step, bool projects, void* stream);
/// h, behind a projection.
template <class T>
const char* variant_project(const VariantStep<T>& step, void* stream);

/// cluster_variant.cu: all steps of a layer with options and no projection in one launch, the weights over several
/// blocks, in float.
struct VariantCall {
    VariantStep<float> step;  ///< what every step has; input_sums, reset, keep_*, y and cells are those of step 0, h_in
                              ///< what variant_begin left; hidden_sums, projected and m are not used
    std::int64_t steps;
    bool reverse;                 ///< from the last step to the first
    std::int64_t reset_distance;  ///< from a step's flags to those of the next
    WeightView weight_hh;         ///< of a coupled layer three gates
    int* progress;                ///< cluster_variant_progress_words zeros on the device
    int multiprocessors;
    void* stream;
};
bool cluster_variant_fits(const VariantCall& call, ClusterForm form = {});
bool cluster_variant_pays(const VariantCall& call);  ///< fits, and is likely faster than step by step
std::size_t cluster_variant_progress_words(const VariantCall& call, ClusterForm form = {});
const char* cluster_variant_forward(const VariantCall& call, ClusterForm form = {});

}  // namespace cuda
}  // namespace cellstep
