/// A few threads that wait for work, for the sessions of the Python module.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace cellstep {
namespace python {

/// Runs tasks on the thread that asks and on `threads - 1` others. A process made by fork has none of the others: there
/// all tasks run on the thread that asks.
class Threads {
public:
    /// Throws std::system_error where the system gives no more threads.
    explicit Threads(std::size_t threads);
    ~Threads();
    Threads(const Threads&) = delete;
    Threads& operator=(const Threads&) = delete;

    /// Deletes the threads, but in a forked process, where that would wait for the threads that are not there.
    struct Release {
        void operator()(Threads* threads) const;
    };

    std::size_t threads() const { return workers_.size() + 1; }

    /// What the runtime calls; `threads` is a Threads.
    static void run(void* threads, std::size_t count, void (*task)(void*, std::size_t), void* argument);

private:
    void work();
    void take_tasks();
    void stop();

    std::mutex mutex_;
    std::condition_variable begin_;
    std::condition_variable end_;
    std::atomic<std::size_t> calls_{0};  ///< of run, so far
    std::atomic<std::size_t> busy_{0};   ///< workers that may still look at the task
    bool open_ = false;                  ///< whether a worker may join the call
    bool stopped_ = false;

    void (*task_)(void*, std::size_t) = nullptr;
    void* argument_ = nullptr;
    std::size_t count_ = 0;
    std::atomic<std::size_t> next_{0};
    std::vector<std::thread> workers_;
#if !defined(_WIN32)
    pid_t process_ = getpid();
#endif
};

}  // namespace python
}  // namespace cellstep
