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

/// A pointer that came from memory, said to be to global memory, so that its loads are not generic ones.
template <class T>
__device__ inline T* in_global(T* pointer) {
    __builtin_assume(__isGlobal(pointer));
    return pointer;
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

/// 16 bytes from global to shared memory, read from the cache that blocks share, so that it may be what another block
/// wrote and told of; there behind a wait_for_copies of the same thread.
__device__ inline void copy_16(unsigned char* shared, const unsigned char* from) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
        "l"(from)
        : "memory");
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/// Returns the value before.
__device__ inline int fetch_add(int* word, int value) { return atomicAdd(word, value); }

/// Between two looks at a word that another block is to change.
__device__ inline void pause() { __nanosleep(32); }

/// Looks at what another block is to change, 32 ns and more apart (some hundred where the look goes through the cache):
/// minutes, more than any block is behind another one, even where a tool slows them.
constexpr int longest_wait = 1 << 30;

/// Waits until another block has brought the word to `least`; what it then is. The driver reports an error for a launch
/// whose blocks wait without end.
__device__ inline int wait_until(const int* word, int least) {
    int value = load_acquire(word);
    for (int looks = 1; value < least; ++looks) {
        if (looks == longest_wait) __trap();
        pause();
        value = load_acquire(word);
    }
    return value;
}

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

// A cluster is a group of blocks whose shared memory is one another's (compute capability 9.0 on).

__device__ inline int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/// Behind it, what any thread of the cluster wrote before is seen by all.
__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// The same place in the shared memory of the cluster's block `rank`.
template <class T>
__device__ inline T* remote(T* shared, int rank) {
    std::uint64_t address;
    asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<std::uint64_t>(shared)), "r"(rank));
    return reinterpret_cast<T*>(address);
}

/// Counts the bytes that blocks of a cluster send to this one, phase by phase, each of as many bytes: a word of shared
/// memory. One thread begins it, and the cluster meets before anything is sent.
using Arrivals = std::uint64_t;

__device__ inline unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

__device__ inline void begin_arrivals(Arrivals* arrivals) {
    asm volatile(
        "mbarrier.init.shared.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(shared_address(arrivals))
        : "memory");
}

/// Once for each phase, by one thread, when the phase before is over.
__device__ inline void expect_arrivals(Arrivals* arrivals, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(arrivals)), "r"(bytes)
                 : "memory");
}

/// Puts 16, 8 or 4 bytes to the same place in the cluster's block `rank`, whose arrivals count them.
__device__ inline void send_word(unsigned char* shared, const uint4& value, Arrivals* arrivals, int rank) {
    asm volatile(
        "{\n.reg .b32 to, word;\nmapa.shared::cluster.u32 to, %0, %2;\nmapa.shared::cluster.u32 word, %1, %2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [to], {%3, %4, %5, %6}, [word];\n}" ::"r"(
            shared_address(shared)),
        "r"(shared_address(arrivals)), "r"(rank), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
        : "memory");
}

__device__ inline void send_word(unsigned char* shared, const uint2& value, Arrivals* arrivals, int rank) {
    asm volatile(
        "{\n.reg .b32 to, word;\nmapa.shared::cluster.u32 to, %0, %2;\nmapa.shared::cluster.u32 word, %1, %2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [to], {%3, %4}, [word];\n}" ::"r"(
            shared_address(shared)),
        "r"(shared_address(arrivals)), "r"(rank), "r"(value.x), "r"(value.y)
        : "memory");
}

__device__ inline void send_word(unsigned char* shared, unsigned value, Arrivals* arrivals, int rank) {
    asm volatile(
        "{\n.reg .b32 to, word;\nmapa.shared::cluster.u32 to, %0, %2;\nmapa.shared::cluster.u32 word, %1, %2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [to], %3, [word];\n}" ::"r"(
            shared_address(shared)),
        "r"(shared_address(arrivals)), "r"(rank), "r"(value)
        : "memory");
}

/// Waits until the bytes of `phase`, counted from 0, have come; none may be two phases behind. A look takes up to 1 us;
/// as wait_until, not without end.
__device__ inline void wait_for_arrivals(Arrivals* arrivals, int phase, int) {
    for (int looks = 0;; ++looks) {
        int done;
        asm volatile(
            "{\n.reg .pred done;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2, 1000;\n"
            "selp.s32 %0, 1, 0, done;\n}"
            : "=r"(done)
            : "r"(shared_address(arrivals)), "r"(phase & 1)
            : "memory");
        if (done) return;
        if (looks == longest_wait) __trap();
    }
}

/// Bytes of shared memory that a block may have on the current device.
inline std::size_t shared_limit() {
    int device = 0, bytes = 48 * 1024;
    if (cudaGetDevice(&device) == cudaSuccess)
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return static_cast<std::size_t>(bytes);
}

/// Lets a kernel have all the shared memory there is. It is the same for each launch, as the function keeps it and
/// other threads launch it too.
inline cudaError_t allow_shared(const void* function) {
    return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(shared_limit()));
}

/// Starts a kernel of one argument; `shared` bytes of dynamic shared memory, more than 48 KB too; `together`: with the
/// promise that all blocks run at once, so that they may wait for one another. Returns null, or what the driver says.
template <class Argument>
const char* launch(void (*kernel)(Argument), dim3 grid, dim3 block, std::size_t shared, void* stream,
                   const Argument& argument, bool together = false) {
    const void* function = reinterpret_cast<const void*>(kernel);
    void* arguments[] = {const_cast<Argument*>(&argument)};
    cudaError_t error = shared > 48 * 1024 ? allow_shared(function) : cudaSuccess;
    const auto queue = static_cast<cudaStream_t>(stream);
    if (error == cudaSuccess)
        error = together ? cudaLaunchCooperativeKernel(function, grid, block, arguments, shared, queue)
                         : cudaLaunchKernel(function, grid, block, arguments, shared, queue);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class Argument>
cudaError_t prepare_clusters(void (*kernel)(Argument), unsigned cluster, dim3 grid, dim3 block, std::size_t shared,
                             void* stream, cudaLaunchConfig_t& config, cudaLaunchAttribute& attribute) {
    cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel));
    if (error == cudaSuccess && cluster > 8)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    return error;
}

/// As launch, `cluster` blocks that are neighbours in x making a cluster, of up to 16.
template <class Argument>
const char* launch_clusters(void (*kernel)(Argument), unsigned cluster, dim3 grid, dim3 block, std::size_t shared,
                            void* stream, const Argument& argument) {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attribute;
    cudaError_t error = prepare_clusters(kernel, cluster, grid, block, shared, stream, config, attribute);
    if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, argument);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

/// Clusters that the device has room for at once: none where it knows no clusters.
template <class Argument>
int most_clusters(void (*kernel)(Argument), unsigned cluster, dim3 block, std::size_t shared) {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attribute;
    int count = 0, device = 0, known = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&known, cudaDevAttrClusterLaunch, device) != cudaSuccess || !known)
        return 0;
    if (prepare_clusters(kernel, cluster, dim3(cluster), block, shared, nullptr, config, attribute) != cudaSuccess ||
        cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) {
        cudaGetLastError();
        return 0;
    }
    return count;
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

/// The compiler takes it for a new value each time, so that what is found from it is found again where it is needed,
/// and does not stay in registers, which are for weights.
__device__ inline int this_thread() { return found_anew(static_cast<int>(threadIdx.x)); }

/// sigmoid and tanh to about 1e-7, in two operations of the special function unit each.
__device__ inline float sigmoid_of(float x) { return reciprocal_approx(1.0f + exp2_approx(-1.44269504f * x)); }
__device__ inline float tanh_of(float x) {
    return 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(2.88539008f * x));
}
__device__ inline double sigmoid_of(double x) { return 1.0 / (1.0 + exp(-x)); }
__device__ inline double tanh_of(double x) { return tanh(x); }

}  // namespace cuda
}  // namespace cellstep
