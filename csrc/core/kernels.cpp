// Compiled once for each instruction set, with CELLSTEP_ISA naming it.
#include "core/kernels.h"

#include "core/activations.h"
#include "core/backward_step.h"
#include "core/pack.h"
#include "core/product.h"
#include "core/step.h"
#include "core/variant_sweep.h"

namespace cellstep {
namespace core {
namespace CELLSTEP_ISA {

extern const Kernels<float> kernels_float = {product<float>,       widen_weights<float>, step<float>,
                                             step_backward<float>, variant_sweep<float>, apply_activation<float>};
extern const Kernels<double> kernels_double = {product<double>,       widen_weights<double>, step<double>,
                                               step_backward<double>, variant_sweep<double>, apply_activation<double>};

}  // namespace CELLSTEP_ISA
}  // namespace core
}  // namespace cellstep
