// One model, many threads: sessions and pools of their own on each, and calls that are shared between threads. Built
// with ThreadSanitizer. Prints "equal" if every thread had the same answers.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "cellstep/runtime.hpp"

using namespace cellstep::runtime;

namespace {

constexpr std::size_t streams = 40;

/// A thread for each task.
void run_tasks(void*, std::size_t count, cellstep_task task, void* argument) {
    std::vector<std::thread> threads;
    for (std::size_t index = 1; index < count; ++index) threads.emplace_back(task, argument, index);
    task(argument, 0);
    for (std::thread& thread : threads) thread.join();
}

/// All answers of one thread.
std::vector<float> answers(const Model& model, const Model& other, std::size_t steps, bool shared) {
    const cellstep_model_info info = model.info();
    const std::size_t each = streams * info.input_size;
    std::vector<float> x(steps * each);
    for (std::size_t at = 0; at < x.size(); ++at) x[at] = static_cast<float>(at * 7 % 23) * 0.125f - 1.25f;
    Session session;
    check(session.create(model));
    if (shared) check(session.set_parallel(3, nullptr, run_tasks));
    std::vector<float> all;
    const auto take = [&](std::size_t count) {
        all.resize(all.size() + count);
        return View<float>(all.data() + all.size() - count, count);
    };
    const View<const float> sequence(x.data(), steps * info.input_size);
    check(session.run(sequence, take(steps * info.output_size)));
    check(session.forecast(sequence, take(info.output_size)));
    check(session.selftest());
    check(session.slide_begin(4));
    for (std::size_t step = 0; step < 6; ++step) {
        float* const y = take(info.output_size).data();
        const View<const float> newest(x.data() + step * info.input_size, info.input_size);
        if (session.slide(newest, {y, info.output_size}) != CELLSTEP_PENDING) continue;
        std::memset(y, 0, info.output_size * sizeof(float));
    }
    check(session.swap_model(other));
    check(session.run(sequence, take(steps * info.output_size)));
    if (model.pool_memory(streams) == 0) return all;  // bidirectional
    Pool pool;
    check(pool.create(model, streams));
    if (shared) check(pool.set_parallel(3, nullptr, run_tasks));
    for (std::size_t step = 0; step < 3; ++step)
        check(pool.step(View<const float>(x.data() + step * each, each), take(streams * info.output_size)));
    return all;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4) return 2;
    Model model, other;
    check(model.load(argv[1]));
    check(other.map(argv[2]));
    const std::size_t steps = static_cast<std::size_t>(std::atoi(argv[3]));
    std::vector<std::vector<float>> all(4);
    std::vector<std::thread> threads;
    for (std::size_t at = 0; at < all.size(); ++at)
        threads.emplace_back([&, at] { all[at] = answers(model, other, steps, at % 2); });
    for (std::thread& thread : threads) thread.join();
    for (const std::vector<float>& one : all)
        if (one.size() != all[0].size() || std::memcmp(one.data(), all[0].data(), one.size() * sizeof(float)) != 0)
            return 1;
    std::puts("equal");
    return 0;
}
