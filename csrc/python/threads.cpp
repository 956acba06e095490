#include "threads.h"

namespace cellstep {
namespace python {

namespace {

/// Looks that a thread takes before it sleeps, some fifty microseconds: longer than a task of the engine, so that who
/// came too late for one call is awake for the next.
constexpr int looks = 2000;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

template <class Done>
void look(Done done) {
    for (int at = 0; at < looks && !done(); ++at) pause();
}

}  // namespace

Threads::Threads(std::size_t threads) {
    try {
        for (std::size_t at = 1; at < threads; ++at) workers_.emplace_back([this] { work(); });
    } catch (...) {
        stop();
        throw;
    }
}

Threads::~Threads() { stop(); }

void Threads::Release::operator()(Threads* threads) const {
#if !defined(_WIN32)
    if (threads->process_ != getpid()) return;
#endif
    delete threads;
}

void Threads::stop() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopped_ = true;
        calls_.fetch_add(1);
    }
    begin_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void Threads::take_tasks() {
    for (std::size_t index = next_.fetch_add(1); index < count_; index = next_.fetch_add(1)) task_(argument_, index);
}

void Threads::work() {
    std::size_t seen = 0;
    for (;;) {
        look([&] { return calls_.load(std::memory_order_relaxed) != seen; });
        {
            std::unique_lock<std::mutex> lock(mutex_);
            begin_.wait(lock, [&] { return calls_.load() != seen; });
            if (stopped_) return;
            seen = calls_.load();
            if (!open_) continue;
            busy_.fetch_add(1);
        }
        take_tasks();
        const std::lock_guard<std::mutex> lock(mutex_);
        if (busy_.fetch_sub(1) == 1) end_.notify_one();
    }
}

void Threads::run(void* threads, std::size_t count, void (*task)(void*, std::size_t), void* argument) {
    Threads& self = *static_cast<Threads*>(threads);
    {
        const std::lock_guard<std::mutex> lock(self.mutex_);
        self.task_ = task;
        self.argument_ = argument;
        self.count_ = count;
        self.next_.store(0);
        self.open_ = true;
        self.calls_.fetch_add(1);
    }
    self.begin_.notify_all();
    self.take_tasks();
    look([&] { return self.busy_.load(std::memory_order_relaxed) == 0; });
    std::unique_lock<std::mutex> lock(self.mutex_);
    self.open_ = false;
    self.end_.wait(lock, [&] { return self.busy_.load() == 0; });
}

}  // namespace python
}  // namespace cellstep
