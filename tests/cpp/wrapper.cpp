// cellstep/runtime.hpp: owners, views and both kinds of errors. Prints the answers to five steps.
#include <array>
#include <cstdio>
#include <vector>
#if __cplusplus >= 202002L
#include <span>
#endif

#include "cellstep/runtime.hpp"

using namespace cellstep::runtime;

#define EXPECT(condition)                                                     \
    if (!(condition)) {                                                       \
        std::fprintf(stderr, "line %d: expected %s\n", __LINE__, #condition); \
        return 1;                                                             \
    }

int main(int argc, char** argv) {
    EXPECT(argc == 2);
    Model model;
    EXPECT(!model && model.info().input_size == 0);
    EXPECT(model.load("no such file") == CELLSTEP_ERROR_FILE && !model);
    EXPECT(model.load(argv[1]) == CELLSTEP_OK && model);
    const cellstep_model_info info = model.info();
    std::vector<float> x(info.input_size), y(info.output_size);

    Session empty;
    EXPECT(empty.step(x, y) == CELLSTEP_ERROR_ARGUMENT && empty.run(x, y) == CELLSTEP_ERROR_ARGUMENT);
    Session first;
    EXPECT(first.create(model) == CELLSTEP_OK);
    Session session = std::move(first);
    EXPECT(!first && session && session.selftest() == CELLSTEP_OK);
    EXPECT(session.step(View<const float>(x.data(), x.size() - 1), y) == CELLSTEP_ERROR_ARGUMENT);
    EXPECT(session.step(x, View<float>(y.data(), 0)) == CELLSTEP_ERROR_ARGUMENT);

    std::vector<unsigned char> memory(model.pool_memory(2) + 8);
    Pool pool, refused;
    EXPECT(refused.init(model, 2, Memory(memory.data(), 8)) == CELLSTEP_ERROR_MEMORY && !refused);
    EXPECT(pool.init(model, 2, memory) == CELLSTEP_OK && pool.streams() == 2);
    std::vector<float> both(2 * x.size()), answers(2 * y.size());
    const std::array<unsigned char, 2> reset{0, 1};

    for (int step = 0; step < 5; ++step) {
        for (float& value : x) value = 0.5f * static_cast<float>(step);
        for (std::size_t at = 0; at < both.size(); ++at) both[at] = x[at % x.size()];
        EXPECT(session.step(x, y) == CELLSTEP_OK);
        EXPECT(pool.step(both, answers, reset) == CELLSTEP_OK);
        for (std::size_t at = 0; at < y.size(); ++at) EXPECT(answers[at] == y[at]);
        std::printf("%d,%.9g\n", step, static_cast<double>(y[0]));
    }
#if __cplusplus >= 202002L
    const std::vector<float> constant = x;
    EXPECT(session.step(std::span<const float>(constant), std::span<float>(y)) == CELLSTEP_OK);
#endif
    std::vector<float> h(info.num_layers * info.h_size), c(info.num_layers * info.hidden_size);
    EXPECT(session.get_state(h, c) == CELLSTEP_OK && pool.set_state(1, h, c) == CELLSTEP_OK);
    EXPECT(pool.set_state(2, h, c) == CELLSTEP_ERROR_ARGUMENT);
    EXPECT(session.get_state(c, View<float>()) == CELLSTEP_ERROR_ARGUMENT);
    const Model moved = std::move(model);  // its session still runs
    EXPECT(session.run(both, answers, reset) == CELLSTEP_OK && session.swap_model(moved) == CELLSTEP_OK);
#if defined(CELLSTEP_EXCEPTIONS)
    check(session.reset());
    try {
        check(session.step({}, y));
        return 1;
    } catch (const Error& error) {
        EXPECT(error.status() == CELLSTEP_ERROR_ARGUMENT && error.what());
    }
#endif
    return 0;
}
