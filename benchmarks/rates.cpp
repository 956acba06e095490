// What this machine can do: fused multiply-adds and reads of memory a second, on 1 to N threads, as JSON.
//
//     rates THREADS MILLISECONDS
//
// The vectors are the compiler's, of the width that -march=native offers; an empty asm statement that claims to read
// and write a register keeps the optimiser from seeing that the numbers are of no use.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr const char* kName = "AVX-512";
constexpr std::size_t kBytes = 64;
#define IN_REGISTER "v"
#elif defined(__AVX2__) && defined(__FMA__)
constexpr const char* kName = "AVX2";
constexpr std::size_t kBytes = 32;
#define IN_REGISTER "x"
#elif defined(__aarch64__)
constexpr const char* kName = "NEON";
constexpr std::size_t kBytes = 16;
#define IN_REGISTER "w"
#else
constexpr const char* kName = "SSE2, multiply and add apart";
constexpr std::size_t kBytes = 16;
#define IN_REGISTER "x"
#endif

typedef float Vector __attribute__((vector_size(kBytes)));
constexpr std::size_t kLanes = kBytes / sizeof(float);

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

#define EACH(DO) DO(a) DO(b) DO(c) DO(d) DO(e) DO(f) DO(g) DO(h) DO(i) DO(j) DO(k) DO(l)

/// Floating-point operations of so many rounds, two a multiply-add and lane. Twelve chains hide the latency of one.
__attribute__((noinline)) double multiply_add(std::size_t rounds) {
    Vector factor = Vector{} + 0.5f;
    Vector term = Vector{} + 1.0f;
    asm volatile("" : "+" IN_REGISTER(factor), "+" IN_REGISTER(term));
#define START(sum) Vector sum = term;
#define STEP(sum)              \
    sum = sum * factor + term; \
    asm volatile("" : "+" IN_REGISTER(sum));
    EACH(START)
    for (std::size_t round = 0; round < rounds; ++round) {
        EACH(STEP)
    }
    return 2.0 * 12.0 * static_cast<double>(rounds * kLanes);
}

/// Bytes of so many passes over a buffer.
__attribute__((noinline)) double read(const std::vector<Vector>& buffer, std::size_t passes) {
    for (std::size_t pass = 0; pass < passes; ++pass) {
        for (std::size_t at = 0; at + 8 <= buffer.size(); at += 8) {
#pragma GCC unroll 8
            for (std::size_t k = 0; k < 8; ++k) asm volatile("" : : IN_REGISTER(buffer[at + k]));
        }
    }
    return static_cast<double>(passes * buffer.size() * sizeof(Vector));
}

/// The best rate that `work(amount)` reaches on all threads together, in units a second.
double best_rate(std::size_t threads, double seconds, const std::vector<std::function<double(std::size_t)>>& work) {
    std::size_t amount = 1;
    for (;;) {
        const auto begin = Clock::now();
        work[0](amount);
        if (seconds_since(begin) > 1e-3) break;
        amount *= 2;
    }
    double best = 0;
    const auto begin = Clock::now();
    do {
        std::atomic<std::size_t> waiting{threads};
        std::vector<double> units(threads);
        std::vector<double> times(threads);
        const auto one = [&](std::size_t at) {
            --waiting;
            while (waiting != 0) {
            }
            const auto start = Clock::now();
            units[at] = work[at](amount);
            times[at] = seconds_since(start);
        };
        std::vector<std::thread> others;
        for (std::size_t at = 1; at < threads; ++at) others.emplace_back(one, at);
        one(0);
        for (std::thread& other : others) other.join();
        double all = 0;
        for (const double count : units) all += count;
        best = std::max(best, all / *std::max_element(times.begin(), times.end()));
    } while (seconds_since(begin) < seconds);
    return best;
}

}  // namespace

int main(int argc, char** argv) {
    const std::size_t most_threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
    const double seconds = (argc > 2 ? std::max(1, std::atoi(argv[2])) : 100) * 1e-3;
    using Work = std::function<double(std::size_t)>;

    std::printf("{\"vectors\": \"%s\", \"flops\": [", kName);
    for (std::size_t threads = 1; threads <= most_threads; ++threads)
        std::printf("%s%.4g", threads > 1 ? ", " : "",
                    best_rate(threads, seconds, std::vector<Work>(threads, multiply_add)));
    std::printf("], \"bandwidth\": [");
    for (std::size_t size = 8 * 1024; size <= 64 * 1024 * 1024; size += size / 2) {
        const std::vector<Vector> buffer((size + sizeof(Vector) - 1) / sizeof(Vector), Vector{} + 1.0f);
        const Work pass = [&](std::size_t passes) { return read(buffer, passes); };
        std::printf("%s[%zu, %.4g]", size > 8 * 1024 ? ", " : "", buffer.size() * sizeof(Vector),
                    best_rate(1, seconds, {pass}));
    }
    std::printf("]}\n");
    return 0;
}
