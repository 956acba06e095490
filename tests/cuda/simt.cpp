#include "simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#if defined(CELLSTEP_SIMT_RACES)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

Place* here = nullptr;

void stop(const char* reason) {
    std::fprintf(stderr, "simt: %s\n", reason);
    std::abort();
}

namespace {

constexpr std::size_t stack_bytes = 64 * 1024;
constexpr std::size_t exchange_bytes = 64;
constexpr std::size_t guard_bytes = 256;  // on either side of a block's shared memory
constexpr unsigned char guard = 0xa5;
constexpr long longest_delay = 16384;     // turns that other threads have meanwhile
constexpr long longest_wait = 2'000'000;  // pauses without a thread that does anything else

// What orders accesses, told to the thread sanitizer: whatever came before publish(p) comes before observe(p) is over.
#if defined(CELLSTEP_SIMT_RACES)
void publish(void* point) { __tsan_release(point); }
void observe(void* point) { __tsan_acquire(point); }
#else
void publish(void*) {}
void observe(void*) {}
#endif

/// A stack to run on, as the sanitizers see it.
struct Strand {
#if defined(CELLSTEP_SIMT_RACES)
    void* thread = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* frames = nullptr;
#endif
    const void* bottom = nullptr;
    std::size_t bytes = 0;
};

/// Just before a jump from one strand to another, which is not come back from where `last`.
void leave([[maybe_unused]] Strand& from, [[maybe_unused]] Strand& to, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &from.frames, to.bottom, to.bytes);
#endif
#if defined(CELLSTEP_SIMT_RACES)
    __tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync);
#endif
}

/// Just behind a jump to `to`; fills in the bounds of the stack that it came from.
void arrive([[maybe_unused]] Strand& to, [[maybe_unused]] Strand& from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(to.frames, &from.bottom, &from.bytes);
#endif
}

struct Block;

/// Why a fiber gave up the processor. The host's stack alone keeps the books: the thread sanitizer would take what a
/// fiber does to a list for a race among the threads of the kernel.
enum class Wish { end, pause, block_sync, cluster_sync, exchange };

struct Fiber {
    Place place;
    Block* block;
    ucontext_t context;
    jmp_buf at;
    bool begun = false;
    std::unique_ptr<unsigned char[]> stack;
    Strand strand;
};

struct Warp {
    int waiting = 0;
    int lanes = 0;
    unsigned meeting = 0;
    Meeting kind = Meeting::sync;
    std::size_t bytes = 0;
    unsigned char values[2][32 * exchange_bytes];
    std::vector<Fiber*> asleep;
};

/// Threads that meet at a barrier.
struct Barrier {
    std::vector<Fiber*> asleep;
    std::size_t threads = 0;
    bool whole = true;  // none has ended
    unsigned meeting = 0;
    char points[2];  // publish and observe, of meetings in turn

    void wait(Wish why);
    void come(Fiber* fiber);
    void end();
};

struct Cluster {
    Barrier barrier;
    std::vector<unsigned char*> shared;  // by rank; null of a block that has ended
    std::size_t blocks = 0;
};

struct Block {
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    std::unique_ptr<unsigned char[]> memory;  // shared memory between two guards
    std::size_t alive = 0;
    Barrier barrier;
    std::shared_ptr<Cluster> cluster;
};

std::mt19937_64 order;
std::vector<Fiber*> runnable;
Fiber* running = nullptr;
jmp_buf scheduler;
Strand host;
char begin, end;  // publish and observe, of a launch
const std::function<void()>* body = nullptr;
Wish wish = Wish::end;
long pauses = 0;

void yield(Wish why) {
    wish = why;
    if (_setjmp(running->at) == 0) {
        leave(running->strand, host, false);
        _longjmp(scheduler, 1);
    }
    arrive(running->strand, host);
}

void entry() {
    arrive(running->strand, host);
    observe(&begin);
    (*body)();
    publish(&end);
    wish = Wish::end;
    leave(running->strand, host, true);
    _longjmp(scheduler, 1);
}

void wake(std::vector<Fiber*>& asleep) {
    runnable.insert(runnable.end(), asleep.begin(), asleep.end());
    asleep.clear();
}

void Barrier::wait(Wish why) {
    pauses = 0;
    if (!whole) stop("a thread waits at a barrier that one that has ended did not come to");
    char* point = &points[meeting & 1];
    publish(point);
    yield(why);
    observe(point);
}

void Barrier::come(Fiber* fiber) {
    asleep.push_back(fiber);
    if (asleep.size() < threads) return;
    ++meeting;
    wake(asleep);
}

void Barrier::end() {
    whole = false;
    if (!asleep.empty()) stop("a thread ended without a barrier that others of its block or cluster wait at");
}

long setting(const char* name, long otherwise) {
    const char* text = std::getenv(name);
    return text ? std::atol(text) : otherwise;
}

std::unique_ptr<Block> start(dim3 index, dim3 grid, dim3 size, std::size_t shared, std::shared_ptr<Cluster> cluster) {
    auto block = std::make_unique<Block>();
    const unsigned count = size.x * size.y * size.z;
    block->memory.reset(new unsigned char[shared + 2 * guard_bytes]);
    unsigned char* memory = block->memory.get() + guard_bytes;
    std::memset(block->memory.get(), guard, shared + 2 * guard_bytes);
    std::memset(memory, 0xff, shared);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(block->memory.get(), guard_bytes);
    __asan_poison_memory_region(memory + shared, guard_bytes);
#endif
    block->alive = block->barrier.threads = count;
    block->cluster = std::move(cluster);
    const auto rank = static_cast<int>(block->cluster->blocks++);
    block->cluster->shared[static_cast<std::size_t>(rank)] = memory;
    block->cluster->barrier.threads += count;
    block->warps.resize(count / 32);
    for (Warp& warp : block->warps) warp.lanes = 32;
    for (unsigned at = 0; at < count; ++at) {
        auto fiber = std::make_unique<Fiber>();
        fiber->place = {{at % size.x, at / size.x % size.y, at / size.x / size.y}, index, size, grid, memory, rank};
        fiber->block = block.get();
        fiber->stack.reset(new unsigned char[stack_bytes]);
        fiber->strand.bottom = fiber->stack.get();
        fiber->strand.bytes = stack_bytes;
#if defined(CELLSTEP_SIMT_RACES)
        fiber->strand.thread = __tsan_create_fiber(0);
#endif
        runnable.push_back(fiber.get());
        block->fibers.push_back(std::move(fiber));
    }
    return block;
}

/// A block's end.
void check(Block& block, std::size_t shared) {
    unsigned char* memory = block.memory.get();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory, shared + 2 * guard_bytes);
#endif
    for (std::size_t at = 0; at < guard_bytes; ++at)
        if (memory[at] != guard || memory[guard_bytes + shared + at] != guard)
            stop("a block wrote beside its shared memory");
#if defined(CELLSTEP_SIMT_RACES)
    for (auto& fiber : block.fibers) __tsan_destroy_fiber(fiber->strand.thread);
#endif
}

Warp& warp_of(Fiber* fiber) {
    const Place& place = fiber->place;
    const unsigned at = (place.thread.z * place.block_size.y + place.thread.y) * place.block_size.x + place.thread.x;
    return fiber->block->warps[at / 32];
}

/// Runs a fiber until it yields or ends.
void resume(Fiber* fiber) {
    running = fiber;
    here = &fiber->place;
    if (_setjmp(scheduler) != 0) {
        Strand gone;
        arrive(host, gone);
        return;
    }
    leave(host, fiber->strand, false);
    if (fiber->begun) _longjmp(fiber->at, 1);
    fiber->begun = true;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = stack_bytes;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, entry, 0);
    setcontext(&fiber->context);
}

}  // namespace

void block_sync() { running->block->barrier.wait(Wish::block_sync); }

unsigned char* shared_of(int rank) {
    const auto& shared = running->block->cluster->shared;
    const auto at = static_cast<std::size_t>(rank);
    if (at >= shared.size() || !shared[at]) stop("a block reached for the shared memory of one that is not there");
    return shared[at];
}

void cluster_sync() { running->block->cluster->barrier.wait(Wish::cluster_sync); }

const unsigned char* exchange(const void* value, std::size_t bytes, Meeting kind) {
    if (bytes > exchange_bytes) stop("expected at most 64 bytes a lane in an exchange");
    pauses = 0;
    Warp& warp = warp_of(running);
    if (warp.lanes < 32) stop("a shuffle, a multiply or a warp_sync whose other lanes have ended");
    if (warp.waiting == 0) {
        warp.kind = kind;
        warp.bytes = bytes;
    } else if (warp.kind != kind || warp.bytes != bytes) {
        stop("lanes of one warp meet for different things: a shuffle, a multiply or a warp_sync lacks lanes");
    }
    unsigned char* values = warp.values[warp.meeting & 1];
    std::memcpy(values + (running->place.thread.x & 31u) * bytes, value, bytes);
    publish(values);
    yield(Wish::exchange);
    observe(values);
    return values;
}

void warp_sync() {
    const int nothing = 0;
    exchange(&nothing, sizeof(nothing), Meeting::sync);
}

void pause() {
    if (++pauses > longest_wait) stop("a block waits for another one that does not come: no thread does anything else");
    yield(Wish::pause);
}

void run(dim3 grid, dim3 size, std::size_t shared, const std::function<void()>& kernel, unsigned cluster,
         bool together) {
    const unsigned count = size.x * size.y * size.z;
    if (count == 0 || count > 1024 || size.x % 32 != 0) stop("expected blocks of 32 to 1,024 threads, whole warps");
    if (shared > 227 * 1024) stop("expected at most 227 KB of shared memory a block");
    const std::size_t blocks = static_cast<std::size_t>(grid.x) * grid.y * grid.z;
    if (blocks == 0) stop("expected a grid with at least one block, as the driver does");
    if (cluster == 0 || cluster > 16 || grid.x % cluster != 0)
        stop("expected clusters of 1 to 16 blocks and a grid of whole ones");
    const auto room = static_cast<std::size_t>(setting("CELLSTEP_SIMT_BLOCKS", 8));
    const std::size_t most = together ? blocks : std::max<std::size_t>(room, cluster);
    static std::uint64_t launches = 0;  // each has an order of its own
    order.seed(static_cast<std::uint64_t>(setting("CELLSTEP_SIMT_SEED", 0)) + (launches++ << 32));
    body = &kernel;
    runnable.clear();
    pauses = 0;
#if defined(CELLSTEP_SIMT_RACES)
    host.thread = __tsan_get_current_fiber();
#endif
    std::vector<unsigned> starts(blocks / cluster);
    for (std::size_t at = 0; at < starts.size(); ++at) starts[at] = static_cast<unsigned>(at * cluster);
    if (setting("CELLSTEP_SIMT_SEED", 0) != 0) std::shuffle(starts.begin(), starts.end(), order);
    std::vector<std::unique_ptr<Block>> resident;
    std::size_t next = 0;
    const Warp* held_up = nullptr;  // only compared, as its block may have ended
    long delay = static_cast<long>(order() % longest_delay);
    for (;;) {
        while (resident.size() + cluster <= most && next < starts.size()) {
            const auto group = std::make_shared<Cluster>();
            group->shared.resize(cluster);
            for (unsigned at = starts[next], rank = 0; rank < cluster; ++rank, ++at)
                resident.push_back(
                    start({at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y}, grid, size, shared, group));
            ++next;
            publish(&begin);
        }
        if (resident.empty()) return;
        if (runnable.empty()) stop("all threads wait at barriers that not all of their block or warp come to");
        std::size_t pick = order() % runnable.size();
        if (--delay < 0) {
            // Now and then a warp stands still while the others go on.
            held_up = held_up ? nullptr : &warp_of(runnable[pick]);
            delay = static_cast<long>(order() % (held_up ? longest_delay : 2 * longest_delay));
        }
        for (int tries = 0; tries < 4 && &warp_of(runnable[pick]) == held_up; ++tries) pick = order() % runnable.size();
        Fiber* fiber = runnable[pick];
        runnable[pick] = runnable.back();
        runnable.pop_back();
        resume(fiber);
        Block* block = fiber->block;
        Warp& warp = warp_of(fiber);
        if (wish == Wish::pause) {
            runnable.push_back(fiber);
        } else if (wish == Wish::block_sync) {
            block->barrier.come(fiber);
        } else if (wish == Wish::cluster_sync) {
            block->cluster->barrier.come(fiber);
        } else if (wish == Wish::exchange) {
            warp.asleep.push_back(fiber);
            if (++warp.waiting == warp.lanes) {
                warp.waiting = 0;
                ++warp.meeting;
                wake(warp.asleep);
            }
        }
        if (wish != Wish::end) continue;
        observe(&end);
        pauses = 0;
        --warp.lanes;
        if (warp.waiting > 0) stop("a thread ended while others of its warp wait for it");
        block->barrier.end();
        block->cluster->barrier.end();
        if (--block->alive > 0) continue;
        check(*block, shared);
        block->cluster->shared[static_cast<std::size_t>(fiber->place.cluster_rank)] = nullptr;
        for (std::size_t at = 0; at < resident.size(); ++at) {
            if (resident[at].get() != block) continue;
            resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(at));
            break;
        }
    }
}

namespace {

struct Stream {
    std::deque<std::function<void()>> work;
    long put = 0, done = 0;
};
struct Mark {
    Stream* stream;
    long count;
};
Stream streams[8];
std::mt19937_64 pace;

void run_to(Stream& stream, long count) {
    while (stream.done < count) {
        const auto work = std::move(stream.work.front());
        stream.work.pop_front();
        work();
        ++stream.done;
    }
}

/// With a seed some stream comes on.
void come_on() {
    const long seed = setting("CELLSTEP_SIMT_SEED", 0);
    if (seed == 0) return;
    if (std::all_of(std::begin(streams), std::end(streams), [](const Stream& stream) { return stream.work.empty(); }))
        pace.seed(static_cast<std::uint64_t>(seed));
    Stream& stream = streams[pace() % std::size(streams)];
    const long open = stream.put - stream.done;
    run_to(stream, stream.done + static_cast<long>(pace() % static_cast<std::uint64_t>(open + 1)));
}

}  // namespace

void* stream_beside(int number) { return &streams[number]; }

void put(void* stream, std::function<void()> work) {
    if (!stream) return work();
    auto& to = *static_cast<Stream*>(stream);
    to.work.push_back(std::move(work));
    ++to.put;
    come_on();
}

void* mark(void* stream) {
    auto* of = static_cast<Stream*>(stream);
    return new Mark{of, of ? of->put : 0};
}

void wait_for(void* stream, void* mark) {
    const Mark at = *static_cast<Mark*>(mark);
    put(stream, [at] {
        if (at.stream) run_to(*at.stream, at.count);
    });
}

void forget(void* mark) { delete static_cast<Mark*>(mark); }

}  // namespace simt
