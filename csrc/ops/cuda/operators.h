/// The operators' kernels on CUDA, one file each; csrc/ops/operators.h has their shapes. All take float32, float64,
/// float16 or bfloat16, with sums and the cell state inside a call in float32, in float64 for float64; any strides.
/// They throw std::runtime_error for what does not fit, run on the current stream of the input's device, and wait for
/// nothing.
#pragma once

#include <tuple>
#include <vector>

#include "tensor.h"

namespace cellstep {
namespace cuda {}  // namespace cuda
}  // namespace cellstep
