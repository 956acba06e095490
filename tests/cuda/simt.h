/// CUDA's threads on a processor: csrc/ops/cuda/device.h includes this with CELLSTEP_EMULATED, and a launch then runs
/// every thread of every block on fibers of the calling thread.
///
/// What a device would get wrong in silence shows here. Shared memory begins as NaN; a block's threads run, and its
/// launch's blocks start, in an order that hangs on CELLSTEP_SIMT_SEED (0, the default, starts blocks in order). The
/// program ends with a line on why where a block waits for one that cannot start, a barrier or a shuffle is not come to
/// by all, or a block wrote beside its shared memory. CELLSTEP_SIMT_BLOCKS (default 8) blocks run at once, as if the
/// device had no room for more.
///
/// Streams: what is put to the null stream, the caller's, runs at once. What is put to another one runs as late as what
/// waits for it allows, or with a seed at any time between, so that a wait that is missing gives wrong values.
///
/// Races: simt.cpp compiled with -DCELLSTEP_SIMT_RACES and without a sanitizer, everything else with
/// -fsanitize=thread, tells the thread sanitizer which CUDA thread runs and what its barriers order; it then reports
/// reads and writes of shared and global memory that nothing orders. (A shuffle counts as a warp_sync there.)
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct __half {
    std::uint16_t bits;
};
struct __nv_bfloat16 {
    std::uint16_t bits;
};

namespace simt {

/// Where the running thread is.
struct Place {
    dim3 thread, block, block_size, grid_size;
    unsigned char* shared;
    int cluster_rank;
};
extern Place* here;

void block_sync();
void warp_sync();
/// What the lanes of a warp come together for; all 32 for the same.
enum class Meeting { shuffle, sync, multiply };
/// Gives `bytes` of this lane to the warp; the answer holds those of its 32 lanes, one behind the other, until the
/// warp meets the next time.
const unsigned char* exchange(const void* value, std::size_t bytes, Meeting kind = Meeting::shuffle);
/// Of all threads of the cluster.
void cluster_sync();
/// Shared memory of a block of the cluster, which must not have ended.
unsigned char* shared_of(int rank);
/// Lets other threads run.
void pause();
/// Ends the program.
[[noreturn]] void stop(const char* reason);
/// `cluster` blocks, neighbours in x, start together; all blocks of the grid if `together`.
void run(dim3 grid, dim3 block, std::size_t shared, const std::function<void()>& kernel, unsigned cluster = 1,
         bool together = false);

void* stream_beside(int number);
/// To a stream, or run at once where it is null.
void put(void* stream, std::function<void()> work);
void* mark(void* stream);
void wait_for(void* stream, void* mark);
void forget(void* mark);

}  // namespace simt

#define threadIdx (::simt::here->thread)
#define blockIdx (::simt::here->block)
#define blockDim (::simt::here->block_size)
#define gridDim (::simt::here->grid_size)

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

namespace cellstep {
namespace cuda {

inline unsigned char* shared_memory() { return simt::here->shared; }
inline void block_sync() { simt::block_sync(); }
inline void warp_sync() { simt::warp_sync(); }

template <class T>
T shuffle(T value, int lane) {
    T found;
    std::memcpy(&found, simt::exchange(&value, sizeof(T)) + static_cast<std::size_t>(lane & 31) * sizeof(T), sizeof(T));
    return found;
}

template <class T>
T shuffle_xor(T value, int mask) {
    return shuffle(value, static_cast<int>(threadIdx.x & 31u) ^ mask);
}

inline int load_acquire(const int* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
inline void store_release(int* word, int value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }
inline void copy_16(unsigned char* shared, const unsigned char* from) { std::memcpy(shared, from, 16); }
inline void wait_for_copies() {}
inline int fetch_add(int* word, int value) { return __atomic_fetch_add(word, value, __ATOMIC_RELAXED); }
inline void pause() { simt::pause(); }
inline int wait_until(const int* word, int least) {
    int value;
    while ((value = load_acquire(word)) < least) pause();
    return value;
}
inline int found_anew(int value) { return value; }
template <class T>
T* in_global(T* pointer) {
    return pointer;
}

inline int cluster_rank() { return simt::here->cluster_rank; }
inline void cluster_sync() { simt::cluster_sync(); }
template <class T>
T* remote(T* shared, int rank) {
    auto* here = reinterpret_cast<unsigned char*>(shared);
    return reinterpret_cast<T*>(simt::shared_of(rank) + (here - simt::here->shared));
}

/// Here a word counts all bytes that ever came.
using Arrivals = std::uint64_t;
inline void begin_arrivals(Arrivals* arrivals) { __atomic_store_n(arrivals, 0, __ATOMIC_RELEASE); }
inline void expect_arrivals(Arrivals*, int) {}
template <class Word>
void send_word(unsigned char* shared, const Word& value, Arrivals* arrivals, int rank) {
    std::memcpy(remote(shared, rank), &value, sizeof(value));
    __atomic_fetch_add(remote(arrivals, rank), sizeof(value), __ATOMIC_RELEASE);
}
inline void wait_for_arrivals(Arrivals* arrivals, int phase, int bytes) {
    const auto phases = [&] { return __atomic_load_n(arrivals, __ATOMIC_ACQUIRE) / static_cast<Arrivals>(bytes); };
    while (phases() <= static_cast<Arrivals>(phase)) pause();
    // The device tells the phases apart by one bit.
    if (phases() > static_cast<Arrivals>(phase) + 1) simt::stop("a thread is two phases of arrivals behind");
}

/// Bytes of shared memory that a block may have: that of an H100.
inline std::size_t shared_limit() { return 227 * 1024; }

inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline float tanh_approx(float x) { return std::tanh(x); }

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(__half x) {
    _Float16 value;
    std::memcpy(&value, &x.bits, 2);
    return static_cast<float>(value);
}
inline float to_float(__nv_bfloat16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline __half from_float<__half>(float x) {
    const _Float16 value = static_cast<_Float16>(x);
    __half half;
    std::memcpy(&half.bits, &value, 2);
    return half;
}
template <>
inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {0x7fff};
    return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <class T>
T from_float(double x) {
    return static_cast<T>(x);
}

/// The fragments of mma.m16n8k16 as the PTX ISA lays them out over the lanes.
template <class T>
void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], T) {
    std::uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const unsigned char* all = simt::exchange(mine, sizeof(mine), simt::Meeting::multiply);
    const auto value = [all](unsigned lane, unsigned word, unsigned half) {
        T found;
        std::memcpy(&found, all + (lane * 6 + word) * 4 + half * 2, 2);
        return to_float(found);
    };
    const unsigned lane = threadIdx.x & 31u;
    for (unsigned place = 0; place < 4; ++place) {
        const unsigned row = lane / 4, column = lane % 4 * 2 + place % 2;
        float sum = d[place];
        for (unsigned k = 0; k < 16; ++k)
            sum += value(row * 4 + k % 8 / 2, place / 2 + k / 8 * 2, k % 2) *
                   value(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
        d[place] = sum;
    }
}

template <class Argument>
const char* launch(void (*kernel)(Argument), dim3 grid, dim3 block, std::size_t shared, void* stream,
                   const Argument& argument, bool together = false) {
    simt::put(stream, [=] { simt::run(grid, block, shared, [&] { kernel(argument); }, 1, together); });
    return nullptr;
}

template <class Argument>
const char* launch_clusters(void (*kernel)(Argument), unsigned cluster, dim3 grid, dim3 block, std::size_t shared,
                            void* stream, const Argument& argument) {
    if (cluster < 2) simt::stop("clusters of one block cannot send");
    simt::put(stream, [=] { simt::run(grid, block, shared, [&] { kernel(argument); }, cluster); });
    return nullptr;
}

/// As an H100 has room: one of 16 blocks in each of seven processing clusters, one of 8 in twice as many.
template <class Argument>
int most_clusters(void (*)(Argument), unsigned cluster, dim3, std::size_t) {
    return cluster > 16 ? 0 : static_cast<int>(7 * (16 / cluster));
}

}  // namespace cuda
}  // namespace cellstep
