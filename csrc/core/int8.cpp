// The step of int8 weights for instruction sets that have products for it; compiled once for each.
#include "core/int8_step.h"

namespace cellstep {
namespace core {
namespace CELLSTEP_ISA {

extern void (*const kernel)(const Int8Step<float>&) CELLSTEP_NONBLOCKING;
void (*const kernel)(const Int8Step<float>&) CELLSTEP_NONBLOCKING = int8_step;

}  // namespace CELLSTEP_ISA
}  // namespace core
}  // namespace cellstep
