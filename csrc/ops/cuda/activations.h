/// Every activation on a device, to a few units in the last place.
#pragma once

#include <math.h>

#include "device.h"
#include "model.h"

namespace cellstep {
namespace cuda {

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float expm1_of(float x) { return expm1f(x); }
__device__ inline double expm1_of(double x) { return expm1(x); }
__device__ inline float exact_tanh(float x) { return tanhf(x); }
__device__ inline double exact_tanh(double x) { return tanh(x); }

/// Each but softmax; NaN for NaN.
template <class T>
__device__ T activated(Activation activation, T x) {
    switch (activation) {
        case Activation::relu:
            return x < T(0) ? T(0) : x;
        case Activation::sigmoid:
            return T(1) / (T(1) + exp_of(-x));
        case Activation::tanh:
            return exact_tanh(x);
        case Activation::hard_sigmoid: {
            const T y = T(0.2) * x + T(0.5);
            return y < T(0) ? T(0) : y > T(1) ? T(1) : y;
        }
        case Activation::hardsigmoid: {
            const T y = x + T(3);
            return (y < T(0) ? T(0) : y > T(6) ? T(6) : y) / T(6);
        }
        case Activation::elu:
            return x < T(0) ? expm1_of(x) : x;
        default:
            return x;
    }
}

/// Combines a value of each thread of a block in one order; all threads get the result. `memory` holds 32 values; the
/// block has whole warps and blockDim.x threads.
template <class T, class Combine>
__device__ T block_combine(T value, T* memory, Combine combine) {
    for (int mask = 16; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
    const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
    block_sync();  // the memory may still be read
    if (threadIdx.x % 32 == 0) memory[warp] = value;
    block_sync();
    T result = memory[0];
    for (int at = 1; at < warps; ++at) result = combine(result, memory[at]);
    return result;
}

struct Add {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
};

/// NaN wins, as it does in torch.
struct Larger {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return a > b || a != a ? a : b;
    }
};

}  // namespace cuda
}  // namespace cellstep
