/// How a kernel reads and writes the state that goes from one piece of a sequence to the next.
#pragma once

#include "device.h"
#include "kernels.h"

namespace cellstep {
namespace cuda {

/// A carried value, or where none is carried that of an array; zero where there is neither.
template <class T>
__device__ inline float carried_or(const float* carried, const void* data, std::int64_t place) {
    return carried ? carried[place] : data ? to_float(static_cast<const T*>(data)[place]) : 0.0f;
}

__device__ inline void carry(const Carried& to, std::int64_t place, float h, float c) {
    if (!to.h) return;
    to.h[place] = h;
    to.c[place] = c;
}

}  // namespace cuda
}  // namespace cellstep
