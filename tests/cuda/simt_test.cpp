// The emulator itself: what is right must pass, and each planted mistake must be found. The first argument names the
// case; test_simt.py knows what each has to say.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "device.h"

namespace {

using namespace cellstep::cuda;

struct Ints {
    int* data;
    int count;
};

void expect(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "wrong: %s\n", what);
    std::exit(1);
}

/// Each thread gives its number to the next one through shared memory.
template <bool synced>
void rotate(Ints call) {
    int* shared = reinterpret_cast<int*>(shared_memory());
    const int at = static_cast<int>(threadIdx.x), count = static_cast<int>(blockDim.x);
    shared[at] = at;
    if (synced) block_sync();
    call.data[static_cast<int>(blockIdx.x) * count + at] = shared[(at + 1) % count];
}

/// Reads what a warp of its block wrote, behind a barrier of its own warp alone.
void warp_barrier_only(Ints call) {
    int* shared = reinterpret_cast<int*>(shared_memory());
    const int at = static_cast<int>(threadIdx.x), count = static_cast<int>(blockDim.x);
    shared[at] = at;
    warp_sync();
    call.data[static_cast<int>(blockIdx.x) * count + at] = shared[at ^ 32];
}

void all_blocks_write_one_word(Ints call) {
    if (threadIdx.x == 0) call.data[0] = static_cast<int>(blockIdx.x);
}

/// Block by block, in the order of `first`, adds its number behind the one before.
template <bool ticketed>
void chain(Ints call) {
    int* shared = reinterpret_cast<int*>(shared_memory());
    if (threadIdx.x == 0) shared[0] = ticketed ? fetch_add(call.data, 1) : static_cast<int>(blockIdx.x);
    block_sync();
    const int mine = shared[0];
    if (threadIdx.x == 0) {
        while (load_acquire(call.data + 1) != mine) pause();
        call.data[2 + mine] = mine == 0 ? 1 : call.data[1 + mine] + 1;
        store_release(call.data + 1, mine + 1);
    }
}

/// A barrier of the whole grid, which has more blocks than run at once.
void wait_for_all_blocks(Ints call) {
    if (threadIdx.x != 0) return;
    fetch_add(call.data, 1);
    while (load_acquire(call.data) != static_cast<int>(gridDim.x)) pause();
}

/// Each thread gives its number to its twin in the cluster's next block.
template <bool synced, bool stays>
void around_cluster(Ints call) {
    int* shared = reinterpret_cast<int*>(shared_memory());
    const int at = static_cast<int>(threadIdx.x), count = static_cast<int>(blockDim.x), rank = cluster_rank();
    remote(shared, (rank + 1) % 4)[at] = static_cast<int>(blockIdx.x) * count + at;
    if (synced) cluster_sync();
    call.data[static_cast<int>(blockIdx.x) * count + at] = shared[at];
    cluster_sync();
    if (!stays) return;
    call.data[static_cast<int>(blockIdx.x) * count + at] += remote(shared, (rank + 2) % 4)[at] * 1000;
    cluster_sync();
}

/// Reads where another block may be through already.
void cluster_that_ends(Ints call) {
    int* shared = reinterpret_cast<int*>(shared_memory());
    shared[threadIdx.x] = 1;
    cluster_sync();
    if (cluster_rank() != 0) return;
    for (int turn = 0; turn < 20; ++turn) pause();
    call.data[threadIdx.x] = remote(shared, 3)[threadIdx.x];
}

void unread_memory(Ints call) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    if (threadIdx.x != 3) shared[threadIdx.x] = 1;
    block_sync();
    float sum = 0;
    for (unsigned at = 0; at < blockDim.x; ++at) sum += shared[at];
    call.data[threadIdx.x] = sum == sum ? 0 : 1;
}

template <int at>
void write_beside(Ints) {
    volatile unsigned char* shared = shared_memory();
    if (threadIdx.x == 0) shared[at] = 1;
}

void barrier_of_half(Ints) {
    if (threadIdx.x < 32) block_sync();
}

void barrier_after_return(Ints) {
    if (threadIdx.x == 5) return;
    block_sync();
}

void shuffle_of_half(Ints call) {
    int value = static_cast<int>(threadIdx.x);
    if (threadIdx.x < 16) value = shuffle_xor(value, 1);
    block_sync();
    call.data[threadIdx.x] = value;
}

void shuffle_meets_sync(Ints call) {
    int value = static_cast<int>(threadIdx.x);
    if (threadIdx.x < 16)
        value = shuffle_xor(value, 1);
    else
        warp_sync();
    call.data[threadIdx.x] = value;
}

void shuffles(Ints call) {
    const int at = static_cast<int>(threadIdx.x);
    int sum = at;
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    call.data[at] = sum * 100 + shuffle(at, 7);
}

/// cute's layouts of SM80_16x8x16_F32F16F16F32_TN (CUTLASS, cute/atom/mma_traits_sm80.hpp): lane and value to the
/// place in a matrix whose rows (of A and D) or columns (of B) lie next to one another. Value 2 w + e is half e of
/// word w.
int digit(int value, int from, int size) { return value / from % size; }
int place_a(int lane, int v) {
    return digit(lane, 1, 4) * 32 + digit(lane, 4, 8) + digit(v, 1, 2) * 16 + digit(v, 2, 2) * 8 + digit(v, 4, 2) * 128;
}
int place_b(int lane, int v) {
    return digit(lane, 1, 4) * 16 + digit(lane, 4, 8) + digit(v, 1, 2) * 8 + digit(v, 2, 2) * 64;
}
int place_d(int lane, int v) {
    return digit(lane, 1, 4) * 32 + digit(lane, 4, 8) + digit(v, 1, 2) * 16 + digit(v, 2, 2) * 8;
}

struct Product {
    const int *a, *b;  // a[m + 16 k], b[n + 8 k]
    float* d;          // d[m + 16 n]
    bool wrong;        // two words of A in each other's place
};

template <class T>
std::uint32_t pair(int low, int high) {
    const T values[2] = {from_float<T>(static_cast<float>(low)), from_float<T>(static_cast<float>(high))};
    std::uint32_t word;
    std::memcpy(&word, values, 4);
    return word;
}

template <class T>
void multiply(Product call) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    std::uint32_t a[4], b[2];
    float d[4];
    for (int w = 0; w < 4; ++w) a[w] = pair<T>(call.a[place_a(lane, 2 * w)], call.a[place_a(lane, 2 * w + 1)]);
    for (int w = 0; w < 2; ++w) b[w] = pair<T>(call.b[place_b(lane, 2 * w)], call.b[place_b(lane, 2 * w + 1)]);
    if (call.wrong) std::swap(a[1], a[2]);
    for (int v = 0; v < 4; ++v) d[v] = call.d[place_d(lane, v)];
    multiply_add(d, a, b, T{});
    for (int v = 0; v < 4; ++v) call.d[place_d(lane, v)] = d[v];
}

/// Warp 0 of both blocks sends 8 bytes three times; warp 1 looks for the first when the last has come.
void late_for_arrivals(Ints call) {
    auto* const arrivals = reinterpret_cast<Arrivals*>(shared_memory());
    int* const word = reinterpret_cast<int*>(shared_memory() + 16);
    if (threadIdx.x == 0) begin_arrivals(arrivals);
    cluster_sync();
    if (threadIdx.x >= 32) {
        if (threadIdx.x == 32) {
            wait_until(call.data + blockIdx.x, 3);
            wait_for_arrivals(arrivals, 0, 8);
        }
    } else if (threadIdx.x == 0) {
        for (int phase = 0; phase < 3; ++phase) {
            for (int rank = 0; rank < 2; ++rank)
                send_word(reinterpret_cast<unsigned char*>(word + cluster_rank()), 7u, arrivals, rank);
            wait_for_arrivals(arrivals, phase, 8);
            store_release(call.data + blockIdx.x, phase + 1);
        }
    }
    cluster_sync();
}

/// The number of wrong values of d += a b.
template <class T>
int wrong_products(bool planted) {
    std::vector<int> a(16 * 16), b(8 * 16);
    std::vector<float> d(16 * 8);
    // Small whole numbers, whose products and sums every type and order has exactly.
    for (std::size_t at = 0; at < a.size(); ++at) a[at] = static_cast<int>(at * 7 % 31) - 15;
    for (std::size_t at = 0; at < b.size(); ++at) b[at] = static_cast<int>(at * 11 % 29) - 14;
    for (std::size_t at = 0; at < d.size(); ++at) d[at] = static_cast<float>(at);
    launch(multiply<T>, 1, 32, 0, nullptr, Product{a.data(), b.data(), d.data(), planted});
    int wrong = 0;
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 8; ++n) {
            int sum = m + 16 * n;
            for (int k = 0; k < 16; ++k)
                sum += a[static_cast<std::size_t>(m + 16 * k)] * b[static_cast<std::size_t>(n + 8 * k)];
            wrong += d[static_cast<std::size_t>(m + 16 * n)] != static_cast<float>(sum);
        }
    return wrong;
}

/// What happened at the places that can round in more than one way.
void check_halves() {
    const float values[] = {1.0f + 1.0f / 2048, 1.0f + 3.0f / 2048, 65519.0f, 65520.0f, 6.0e-8f, -0.0f};
    const std::uint16_t halves[] = {0x3c00, 0x3c02, 0x7bff, 0x7c00, 0x0001, 0x8000};
    for (int at = 0; at < 6; ++at) expect(from_float<__half>(values[at]).bits == halves[at], "a float16");
    const float wide[] = {1.0f + 1.0f / 256, 1.0f + 3.0f / 256, 3.4e38f, -0.0f};
    const std::uint16_t brains[] = {0x3f80, 0x3f82, 0x7f80, 0x8000};
    for (int at = 0; at < 4; ++at) expect(from_float<__nv_bfloat16>(wide[at]).bits == brains[at], "a bfloat16");
}

template <int times, int plus>
void change(Ints call) {
    const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    call.data[at] = call.data[at] * times + plus;
}

/// ((0 + 1) 2 + 1) over three streams, if what one does is waited for.
void over_streams(const Ints& call, bool waits) {
    void *const first = simt::stream_beside(0), *const second = simt::stream_beside(1);
    const auto follow = [](void* stream, void* other) {
        void* const mark = simt::mark(other);
        simt::wait_for(stream, mark);
        simt::forget(mark);
    };
    launch(change<1, 1>, 2, 32, 0, first, call);
    if (waits) follow(second, first);
    launch(change<2, 0>, 2, 32, 0, second, call);
    follow(nullptr, second);
    launch(change<1, 1>, 2, 32, 0, nullptr, call);
    for (int at = 0; at < 64; ++at) expect(call.data[at] == 3, "a value from another stream");
}

}  // namespace

int main(int, char** arguments) {
    const std::string name = arguments[1];
    constexpr int blocks = 12, threads = 64;
    std::vector<int> data(blocks * threads + 2);
    const Ints call{data.data(), static_cast<int>(data.size())};
    const auto go = [&](void (*kernel)(Ints), int grid, int block) {
        launch(kernel, dim3(static_cast<unsigned>(grid)), dim3(static_cast<unsigned>(block)), 256, nullptr, call);
    };
    if (name == "right") {
        go(rotate<true>, blocks, threads);
        for (int at = 0; at < blocks * threads; ++at)
            expect(data[static_cast<std::size_t>(at)] == (at + 1) % threads, "a value behind a barrier");
        launch_clusters(around_cluster<true, true>, 4, blocks, threads, 256, nullptr, call);
        for (int at = 0; at < blocks * threads; ++at) {
            const int block = at / threads, first = block / 4 * 4, rank = block % 4;
            const int before = (first + (rank + 3) % 4) * threads + at % threads;
            const int other = (first + (rank + 1) % 4) * threads + at % threads;
            expect(data[static_cast<std::size_t>(at)] == before + 1000 * other, "a value from another block");
        }
        go(shuffles, 1, 32);
        for (int at = 0; at < 32; ++at) expect(data[static_cast<std::size_t>(at)] == 496 * 100 + 7, "a shuffle");
        expect(wrong_products<__half>(false) == 0, "a product of float16");
        expect(wrong_products<__nv_bfloat16>(false) == 0, "a product of bfloat16");
        expect(wrong_products<__half>(true) > 0, "a wrong fragment that makes no difference");
        check_halves();
    } else if (name == "tickets" || name == "no_tickets") {
        go(name == "tickets" ? chain<true> : chain<false>, blocks, 32);
        for (int at = 0; at < blocks; ++at)
            expect(data[static_cast<std::size_t>(2 + at)] == at + 1, "a chain of blocks");
    } else if (name == "no_sync") {
        go(rotate<false>, blocks, threads);
    } else if (name == "warp_barrier_only") {
        go(warp_barrier_only, blocks, threads);
    } else if (name == "one_word") {
        go(all_blocks_write_one_word, blocks, 32);
    } else if (name == "no_cluster_sync") {
        launch_clusters(around_cluster<false, false>, 4, blocks, threads, 256, nullptr, call);
    } else if (name == "cluster_that_ends") {
        launch_clusters(cluster_that_ends, 4, blocks, threads, 256, nullptr, call);
    } else if (name == "late_for_arrivals") {
        launch_clusters(late_for_arrivals, 2, 2, threads, 256, nullptr, call);
    } else if (name == "cluster_of_one") {
        launch_clusters(cluster_that_ends, 1, blocks, threads, 256, nullptr, call);
    } else if (name == "all_blocks") {
        go(wait_for_all_blocks, blocks, 32);
    } else if (name == "all_blocks_together") {
        launch(wait_for_all_blocks, blocks, 32, 256, nullptr, call, true);
    } else if (name == "unread_memory") {
        go(unread_memory, 1, threads);
        expect(data[0] == 0, "a sum of shared memory that was not written");
    } else if (name == "beyond") {
        go(write_beside<256>, 1, 32);
    } else if (name == "before") {
        go(write_beside<-1>, 1, 32);
    } else if (name == "barrier_of_half") {
        go(barrier_of_half, 1, threads);
    } else if (name == "barrier_after_return") {
        go(barrier_after_return, 1, threads);
    } else if (name == "shuffle_of_half") {
        go(shuffle_of_half, 1, 32);
    } else if (name == "shuffle_meets_sync") {
        go(shuffle_meets_sync, 1, 32);
    } else if (name == "streams" || name == "no_wait") {
        over_streams(call, name == "streams");
    } else if (name == "no_grid") {
        go(barrier_of_half, 0, 32);
    } else {
        return 2;
    }
    std::uint64_t bits = 0;
    for (const int value : data) bits = bits * 1099511628211u + static_cast<std::uint64_t>(value);
    std::printf("%016llx\n", static_cast<unsigned long long>(bits));
}
