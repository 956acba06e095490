// Compiled once for each instruction set, with CELLSTEP_ISA naming it.
#include "core/kernels.h"

#include "core/activations.h"
#include "core/backward_step.h"
#include "core/dense.h"
#include "core/digest.h"
#include "core/int8_step.h"
#include "core/pack.h"
#include "core/product.h"
#include "core/step.h"
#include "core/variant_sweep.h"

namespace cellstep {
namespace core {
namespace CELLSTEP_ISA {

extern const Kernels<float> kernels_float = {product<float>, widen_weights<float>,    step<float>,
                                             int8_step,      step_backward<float>,    variant_sweep<float>,
                                             dense<float>,   apply_activation<float>, digest};
extern const Kernels<double> kernels_double = {product<double>, widen_weights<double>,    step<double>,
                                               nullptr,         step_backward<double>,    variant_sweep<double>,
                                               dense<double>,   apply_activation<double>, digest};

}  // namespace CELLSTEP_ISA
}  // namespace core
}  // namespace cellstep
