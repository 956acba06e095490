/// A layer with options over a sequence: all steps in one launch, or a product and a kernel a step, two of each behind
/// a projection.
#pragma once

#include "model.h"
#include "tensor.h"

namespace cellstep {
namespace cuda {

/// T is float or double, and so are all tensors; 16-bit layers are widened first.
template <class T>
struct VariantRun {
    VariantStep<T> step;  ///< what every step has, and of y, cells and keep_* the first
    std::int64_t steps;
    bool reverse;                ///< from the last step to the first
    Tensor input_sums;           ///< (T N, G H): W_ih x; normalised in place
    const T* norm_ih;            ///< (G H), or null
    Tensor weight_hh;            ///< (G H, R)
    Maybe weight_hr;             ///< (R, H)
    Tensor h_in;                 ///< (N, R), scratch as the next two
    Tensor m;                    ///< (N, H)
    const unsigned char* reset;  ///< (T, N) through its strides, or null
    std::int64_t reset_step;     ///< from a step's flags to those of the next
    int multiprocessors;
};

template <class T>
void run_variant(const char* op, VariantRun<T> run, void* stream);

}  // namespace cuda
}  // namespace cellstep
