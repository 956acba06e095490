/// What the kernels use of CUDA, and nothing beside it, so that a processor can stand in for the device: with
/// CELLSTEP_EMULATED the kernels compile as C++ against tests/cuda/simt.h, which runs every thread of a launch.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(CELLSTEP_EMULATED)
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace cellstep {
namespace cuda {

constexpr unsigned all_lanes = 0xffffffffu;

/// The dynamic shared memory of the block, aligned to 16 bytes.
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

__device__ inline void block_sync() { __syncthreads(); }
__device__ inline void warp_sync() { __syncwarp(); }

/// All 32 lanes of the warp take part.
template <class T>
__device__ inline T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(all_lanes, value, mask);
}

template <class T>
__device__ inline T shuffle(T value, int lane) {
    return __shfl_sync(all_lanes, value, lane);
}

/// The value, which the compiler takes for a new one: what is found from it is found again in each turn of a loop,
/// where it would otherwise stay in registers.
__device__ inline int found_anew(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

/// Words by which blocks of one launch tell each other how far they are.
__device__ inline int load_acquire(const int* word) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

__device__ inline void store_release(int* word, int value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

/// Returns the value before.
__device__ inline int fetch_add(int* word, int value) { return atomicAdd(word, value); }

/// Between two looks at a word that another block is to change.
__device__ inline void pause() { __nanosleep(32); }

/// 2^x and 1 / x to within 2 and 1 units in the last place (PTX ISA, ex2.approx and rcp.approx).
__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// To within 2^-11 (PTX ISA, tanh.approx).
__device__ inline float tanh_approx(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// d (16, 8) += a (16, 16) b (16, 8), the fragments as the PTX ISA lays them out for mma.m16n8k16.
__device__ inline void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], __half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                    __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline float to_float(float x) { return x; }
__device__ inline double to_float(double x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
    return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <class T>
__device__ inline T from_float(double x) {
    return static_cast<T>(x);
}

/// Bytes of shared memory that a block may have on the current device.
inline std::size_t shared_limit() {
    int device = 0, bytes = 48 * 1024;
    if (cudaGetDevice(&device) == cudaSuccess)
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return static_cast<std::size_t>(bytes);
}

/// Starts a kernel of one argument; `shared` bytes of dynamic shared memory, more than 48 KB too. Returns null, or what
/// the driver says.
template <class Argument>
const char* launch(void (*kernel)(Argument), dim3 grid, dim3 block, std::size_t shared, void* stream,
                   const Argument& argument) {
    cudaError_t error = cudaSuccess;
    if (shared > 48 * 1024)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error == cudaSuccess) {
        void* arguments[] = {const_cast<Argument*>(&argument)};
        error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared,
                                 static_cast<cudaStream_t>(stream));
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace cellstep
#endif

namespace cellstep {
namespace cuda {

/// What sums are kept in: float, and double for double.
template <class T>
struct Wide {
    using type = float;
};
template <>
struct Wide<double> {
    using type = double;
};

/// sigmoid and tanh to about 1e-7, in two operations of the special function unit each.
__device__ inline float sigmoid_of(float x) { return reciprocal_approx(1.0f + exp2_approx(-1.44269504f * x)); }
__device__ inline float tanh_of(float x) {
    return 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(2.88539008f * x));
}
__device__ inline double sigmoid_of(double x) { return 1.0 / (1.0 + exp(-x)); }
__device__ inline double tanh_of(double x) { return tanh(x); }

}  // namespace cuda
}  // namespace cellstep
