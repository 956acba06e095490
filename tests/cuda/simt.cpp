#include "simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

namespace simt {

Place* here = nullptr;

namespace {

constexpr std::size_t stack_bytes = 64 * 1024;
constexpr std::size_t exchange_bytes = 64;
constexpr long longest_wait = 20'000'000;  // pauses without a thread that does anything else

[[noreturn]] void stop(const char* reason) {
    std::fprintf(stderr, "simt: %s\n", reason);
    std::abort();
}

struct Block;

struct Fiber {
    Place place;
    Block* block;
    ucontext_t context;
    jmp_buf at;
    bool begun = false;
    std::unique_ptr<unsigned char[]> stack;
};

struct Warp {
    int waiting = 0;
    int lanes = 0;
    unsigned meeting = 0;
    unsigned char values[2][32 * exchange_bytes];
    std::vector<Fiber*> asleep;
};

struct Block {
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    std::unique_ptr<unsigned char[]> shared;
    std::size_t alive = 0;
    std::vector<Fiber*> asleep;  // at the block's barrier
};

std::mt19937_64 order;
std::vector<Fiber*> runnable;
Fiber* running = nullptr;
jmp_buf scheduler;
const std::function<void()>* body = nullptr;
bool finished = false;
long pauses = 0;

void yield() {
    if (_setjmp(running->at) == 0) _longjmp(scheduler, 1);
}

void entry() {
    (*body)();
    finished = true;
    _longjmp(scheduler, 1);
}

void wake(std::vector<Fiber*>& asleep) {
    runnable.insert(runnable.end(), asleep.begin(), asleep.end());
    asleep.clear();
}

long setting(const char* name, long otherwise) {
    const char* text = std::getenv(name);
    return text ? std::atol(text) : otherwise;
}

std::unique_ptr<Block> start(dim3 index, dim3 grid, dim3 size, std::size_t shared) {
    auto block = std::make_unique<Block>();
    const unsigned count = size.x * size.y * size.z;
    block->shared.reset(new unsigned char[shared + 16]);
    std::memset(block->shared.get(), 0xff, shared + 16);
    block->alive = count;
    block->warps.resize(count / 32);
    for (Warp& warp : block->warps) warp.lanes = 32;
    for (unsigned at = 0; at < count; ++at) {
        auto fiber = std::make_unique<Fiber>();
        fiber->place = {
            {at % size.x, at / size.x % size.y, at / size.x / size.y}, index, size, grid, block->shared.get()};
        fiber->block = block.get();
        fiber->stack.reset(new unsigned char[stack_bytes]);
        runnable.push_back(fiber.get());
        block->fibers.push_back(std::move(fiber));
    }
    return block;
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
    finished = false;
    if (_setjmp(scheduler) != 0) return;
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

void block_sync() {
    pauses = 0;
    Block& block = *running->block;
    block.asleep.push_back(running);
    if (block.asleep.size() == block.alive) wake(block.asleep);
    yield();
}

const unsigned char* exchange(const void* value, std::size_t bytes) {
    if (bytes > exchange_bytes) stop("expected at most 64 bytes a lane in an exchange");
    pauses = 0;
    Warp& warp = warp_of(running);
    unsigned char* values = warp.values[warp.meeting & 1];
    std::memcpy(values + (running->place.thread.x & 31u) * bytes, value, bytes);
    warp.asleep.push_back(running);
    if (++warp.waiting == warp.lanes) {
        warp.waiting = 0;
        ++warp.meeting;
        wake(warp.asleep);
    }
    yield();
    return values;
}

void warp_sync() {
    const int nothing = 0;
    exchange(&nothing, sizeof(nothing));
}

void pause() {
    if (++pauses > longest_wait) stop("a block waits for another one that does not come: no thread does anything else");
    runnable.push_back(running);
    yield();
}

void run(dim3 grid, dim3 size, std::size_t shared, const std::function<void()>& kernel) {
    const unsigned count = size.x * size.y * size.z;
    if (count == 0 || count > 1024 || size.x % 32 != 0) stop("expected blocks of 32 to 1,024 threads, whole warps");
    if (shared > 227 * 1024) stop("expected at most 227 KB of shared memory a block");
    const std::size_t blocks = static_cast<std::size_t>(grid.x) * grid.y * grid.z;
    if (blocks == 0) stop("expected a grid with at least one block, as the driver does");
    const auto most = static_cast<std::size_t>(setting("CELLSTEP_SIMT_BLOCKS", 8));
    order.seed(static_cast<std::uint64_t>(setting("CELLSTEP_SIMT_SEED", 0)));
    body = &kernel;
    runnable.clear();
    pauses = 0;
    std::vector<std::unique_ptr<Block>> resident;
    std::size_t next = 0;
    for (;;) {
        while (resident.size() < most && next < blocks) {
            const auto at = static_cast<unsigned>(next++);
            resident.push_back(start({at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y}, grid, size, shared));
        }
        if (resident.empty()) return;
        if (runnable.empty()) stop("all threads wait at barriers that not all of their block or warp come to");
        const std::size_t pick = order() % runnable.size();
        Fiber* fiber = runnable[pick];
        runnable[pick] = runnable.back();
        runnable.pop_back();
        resume(fiber);
        if (!finished) continue;
        Block* block = fiber->block;
        Warp& warp = warp_of(fiber);
        --warp.lanes;
        if (warp.waiting > 0) stop("a thread ended while others of its warp wait for it");
        if (--block->alive > 0) {
            if (block->asleep.size() == block->alive) wake(block->asleep);
            continue;
        }
        for (std::size_t at = 0; at < resident.size(); ++at) {
            if (resident[at].get() != block) continue;
            resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(at));
            break;
        }
    }
}

}  // namespace simt
