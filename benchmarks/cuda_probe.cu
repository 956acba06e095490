// What the device's barriers and launches cost, as one line of JSON: microseconds of a barrier of a block, of a
// cluster of 2 to 16 blocks and of all blocks at once; of a step that hands h on within a warp and within a block; of a
// launch.
//
//     nvcc -std=c++17 -O3 -arch=native cuda_probe.cu -o cuda_probe && ./cuda_probe
//
// A barrier's cost is the slope between a short and a long chain of them, so that the launch drops out.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace cg = cooperative_groups;

static void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "error: %s\n", cudaGetErrorString(error));
    std::exit(1);
}

__global__ void empty() {}

__global__ void block_barrier(int count, float* out) {
    __shared__ float word;
    if (threadIdx.x == 0) word = 0;
    for (int i = 0; i < count; ++i) __syncthreads();
    if (threadIdx.x == 0) out[blockIdx.x] = word;
}

__device__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp2f(-1.44269504f * x)); }
__device__ float tanh_of(float x) { return 1.0f - __fdividef(2.0f, 1.0f + exp2f(2.88539008f * x)); }

// The chain of a step without its products: h out to the others, theirs in, the gates' sums, c, h.
__device__ float activate(float sum, float& c) {
    c = sigmoid(sum) * c + sigmoid(sum + 0.5f) * tanh_of(sum - 0.5f);
    return sigmoid(sum + 0.25f) * tanh_of(c);
}

__global__ void warp_step(int count, float* out) {
    float h = 0.01f * threadIdx.x, c = 0;
    for (int i = 0; i < count; ++i) {
        float sum = 0;
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) sum += 0.1f * __shfl_sync(0xffffffffu, h, (threadIdx.x + 8 * lane) & 31);
        h = activate(sum, c);
    }
    out[blockIdx.x * 32 + threadIdx.x] = h;
}

__global__ void block_step(int count, float* out) {
    __shared__ float shared[2][1024];
    float h = 0.001f * threadIdx.x, c = 0;
    for (int i = 0; i < count; ++i) {
        shared[i & 1][threadIdx.x] = h;
        __syncthreads();
        float sum = 0;
#pragma unroll
        for (int part = 0; part < 4; ++part)
            sum += 0.1f * shared[i & 1][(threadIdx.x + part * (blockDim.x / 4)) % blockDim.x];
        h = activate(sum, c);
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = h;
}

__global__ void cluster_barrier(int count, float* out) {
#if __CUDA_ARCH__ >= 900
    const auto cluster = cg::this_cluster();
    for (int i = 0; i < count; ++i) cluster.sync();
    if (threadIdx.x == 0) out[blockIdx.x] = static_cast<float>(count);
#endif
}

// Every block raises a flag of its own; each looks at all of them.
__global__ void grid_barrier(int count, int* flags) {
    for (int i = 1; i <= count; ++i) {
        __syncthreads();
        if (threadIdx.x == 0)
            asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flags + blockIdx.x), "r"(i) : "memory");
        if (threadIdx.x < gridDim.x) {
            int seen;
            do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(flags + threadIdx.x) : "memory");
            while (seen < i);
        }
        __syncthreads();
    }
}

template <class Run>
static float median_us(Run run) {
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i < 12; ++i) {
        check(cudaEventRecord(begin));
        run();
        check(cudaGetLastError());
        check(cudaEventRecord(end));
        check(cudaEventSynchronize(end));
        float milliseconds = 0;
        check(cudaEventElapsedTime(&milliseconds, begin, end));
        if (i >= 2) times.push_back(milliseconds * 1e3f);
    }
    std::nth_element(times.begin(), times.begin() + 5, times.end());
    return times[5];
}

// Microseconds of one of what `run(count)` does `count` times.
template <class Run>
static float slope_us(Run run) {
    const int few = 1000, many = 9000;
    const float short_us = median_us([&] { run(few); });
    return (median_us([&] { run(many); }) - short_us) / static_cast<float>(many - few);
}

int main() {
    cudaDeviceProp device;
    check(cudaGetDeviceProperties(&device, 0));
    const int blocks = device.multiProcessorCount;
    float* out;
    int* flags;
    check(cudaMalloc(&out, sizeof(float) * 1024 * static_cast<std::size_t>(blocks)));
    check(cudaMalloc(&flags, sizeof(int) * 1024));

    std::printf("{\"multiprocessors\": %d", blocks);
    for (int threads : {128, 256, 512, 1024})
        std::printf(", \"block_%d_us\": %.5f", threads,
                    slope_us([&](int count) { block_barrier<<<blocks, threads>>>(count, out); }));
    std::printf(", \"warp_step_us\": %.5f", slope_us([&](int count) { warp_step<<<blocks, 32>>>(count, out); }));
    std::printf(", \"block_step_us\": %.5f", slope_us([&](int count) { block_step<<<blocks, 256>>>(count, out); }));

    // All of the grid has to be there at once: one block a multiprocessor, and a launch that refuses otherwise.
    if (blocks <= 1024 && device.cooperativeLaunch) {
        const int threads = std::max(256, (blocks + 31) / 32 * 32);
        std::printf(", \"grid_us\": %.5f", slope_us([&](int count) {
                        check(cudaMemsetAsync(flags, 0, sizeof(int) * 1024));
                        void* arguments[] = {&count, &flags};
                        check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(&grid_barrier), dim3(blocks),
                                                          dim3(threads), arguments, 0, nullptr));
                    }));
    }
    if (device.major >= 9) {
        check(cudaFuncSetAttribute(cluster_barrier, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
        for (int size : {2, 4, 8, 16}) {
            cudaLaunchAttribute attribute = {};
            attribute.id = cudaLaunchAttributeClusterDimension;
            attribute.val.clusterDim.x = size;
            attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
            cudaLaunchConfig_t config = {};
            config.gridDim = dim3(size);
            config.blockDim = dim3(256);
            config.attrs = &attribute;
            config.numAttrs = 1;
            int clusters = 0;
            if (cudaOccupancyMaxActiveClusters(&clusters, cluster_barrier, &config) != cudaSuccess || clusters == 0) {
                cudaGetLastError();  // this device has no room for one of that size
                continue;
            }
            std::printf(", \"clusters_of_%d\": %d, \"cluster_%d_us\": %.5f", size, clusters, size,
                        slope_us([&](int count) { check(cudaLaunchKernelEx(&config, cluster_barrier, count, out)); }));
        }
    }
    const int launches = 1000;
    std::printf(", \"launch_us\": %.5f}\n", median_us([&] {
                                                for (int i = 0; i < launches; ++i) empty<<<1, 32>>>();
                                            }) / launches);
}
