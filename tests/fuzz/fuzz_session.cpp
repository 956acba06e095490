// Any sequence of calls of a session and a pool, on a model that the first byte chooses. Beside the session goes a twin
// in memory of its own that does nothing but single steps: where a model is not bidirectional, both must give the same
// bits, whatever lies in inputs and states.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "cellstep/runtime.h"
#include "support.h"

using fuzz::Input;
using fuzz::Memory;
using fuzz::same;

namespace {

/// The models of the folder, in the order of their names. They stay until the end.
const std::vector<cellstep_model*>& models() {
    static const auto& all = *new const std::vector<cellstep_model*>([] {
        std::vector<std::filesystem::path> paths;
        for (const auto& entry : std::filesystem::directory_iterator(CELLSTEP_FUZZ_MODELS))
            if (entry.path().extension() == ".cellstep") paths.push_back(entry.path());
        std::sort(paths.begin(), paths.end());
        std::vector<cellstep_model*> loaded;
        for (const auto& path : paths) {
            cellstep_model* model = nullptr;
            FUZZ_CHECK(cellstep_model_load_file(path.string().c_str(), &model) == CELLSTEP_OK);
            loaded.push_back(model);
        }
        FUZZ_CHECK(!loaded.empty());
        return loaded;
    }());
    return all;
}

/// Threads that are none: the tasks one after the other, forwards or backwards.
void run_tasks(void* context, std::size_t count, cellstep_task task, void* argument) {
    const bool backwards = *static_cast<bool*>(context);
    for (std::size_t at = 0; at < count; ++at) task(argument, backwards ? count - 1 - at : at);
}

struct Session {
    cellstep_session* handle = nullptr;
    std::unique_ptr<Memory> memory;  // null: of the heap

    Session() = default;
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    ~Session() { cellstep_session_destroy(handle); }

    void create(const cellstep_model* model) { FUZZ_CHECK(cellstep_session_create(model, &handle) == CELLSTEP_OK); }
    void init(const cellstep_model* model, std::size_t steps) {
        const std::size_t bytes = cellstep_memory_required_for(model, steps);
        FUZZ_CHECK(bytes > 0);
        memory = std::make_unique<Memory>(bytes, 8);
        cellstep_session* none = nullptr;
        FUZZ_CHECK(cellstep_session_init_for(model, steps, memory->data(), bytes - 1, &none) == CELLSTEP_ERROR_MEMORY);
        FUZZ_CHECK(none == nullptr);
        FUZZ_CHECK(cellstep_session_init_for(model, steps, memory->data(), bytes, &handle) == CELLSTEP_OK);
    }
};

class Player {
public:
    Player(const cellstep_model* model, Input& input) : model_(model), input_(input) {
        FUZZ_CHECK(cellstep_model_get_info(model, &info_) == CELLSTEP_OK);
        // A pool is for models that go step by step.
        one_way_ = cellstep_pool_memory_required(model, 1) > 0;
        limit_ = 0;
        const unsigned how = input.byte();
        if (how % 2 == 0) {
            session_.create(model);
        } else {
            limit_ = how / 2 % 3 == 0 ? 0 : 1 + how / 8;
            session_.init(model, limit_);
        }
        twin_.init(model, 1);
    }

    ~Player() { cellstep_pool_destroy(pool_); }
    Player(const Player&) = delete;
    Player& operator=(const Player&) = delete;

    void play() {
        for (int calls = 0; calls < 40 && !input_.empty(); ++calls) call(input_.byte() % 16);
        compare_states();
    }

private:
    void call(unsigned which) {
        switch (which) {
            case 0:
                return run(1, false);
            case 1:
                return run(input_.byte() % 80, false);
            case 2:
                return run(1 + input_.byte() % 80, true);
            case 3:
                return forecast(1 + input_.byte() % 80);
            case 4:
                return begin_slide();
            case 5:
            case 6:
                return slide(1 + input_.byte() % 24);
            case 7:
                return set_state();
            case 8:
                FUZZ_CHECK(cellstep_session_reset(session_.handle) == CELLSTEP_OK);
                FUZZ_CHECK(cellstep_session_reset(twin_.handle) == CELLSTEP_OK);
                return;
            case 9:
                return set_parallel();
            case 10:
                return swap();
            case 11:
                return selftest();
            case 12:
                return make_pool();
            case 13:
            case 14:
                return step_pool();
            default:
                return long_run();
        }
    }

    std::vector<float> outputs(std::size_t steps) { return std::vector<float>(steps * info_.output_size, 7.0f); }

    /// What the twin gives step by step.
    std::vector<float> step_by_step(const std::vector<float>& x, const unsigned char* reset, std::size_t steps) {
        std::vector<float> y = outputs(steps);
        for (std::size_t step = 0; step < steps; ++step) {
            if (reset && reset[step]) FUZZ_CHECK(cellstep_session_reset(twin_.handle) == CELLSTEP_OK);
            FUZZ_CHECK(cellstep_session_step(twin_.handle, x.data() + step * info_.input_size,
                                             y.data() + step * info_.output_size) == CELLSTEP_OK);
        }
        return y;
    }

    /// Only a bidirectional session in memory of its own may refuse a number of steps.
    bool ran(cellstep_status status) {
        if (status == CELLSTEP_ERROR_STEPS) FUZZ_CHECK(!one_way_ && session_.memory);
        FUZZ_CHECK(status == CELLSTEP_OK || status == CELLSTEP_ERROR_STEPS);
        return status == CELLSTEP_OK;
    }

    void run(std::size_t steps, bool with_resets) {
        const std::vector<float> x = input_.values(steps * info_.input_size);
        std::vector<unsigned char> reset(steps);
        if (with_resets)
            for (auto& flag : reset) flag = input_.byte() % 4 == 0;
        run(x, with_resets ? reset.data() : nullptr, steps);
    }

    void run(const std::vector<float>& x, const unsigned char* reset, std::size_t steps) {
        std::vector<float> y = outputs(steps);
        if (!ran(cellstep_session_run_reset(session_.handle, x.data(), reset, steps, y.data()))) return;
        if (one_way_) FUZZ_CHECK(same(y, step_by_step(x, reset, steps)));
    }

    void forecast(std::size_t steps) {
        const std::vector<float> x = input_.values(steps * info_.input_size);
        std::vector<float> y = outputs(1);
        if (!ran(cellstep_session_forecast(session_.handle, x.data(), steps, y.data()))) return;
        if (!one_way_) return;
        const std::vector<float> every = step_by_step(x, nullptr, steps);
        FUZZ_CHECK(same(y.data(), every.data() + (steps - 1) * info_.output_size, info_.output_size));
    }

    void begin_slide() {
        const std::size_t window = input_.byte() % 24;
        cellstep_status status = CELLSTEP_OK;
        if (input_.byte() % 2) {
            const std::size_t bytes = cellstep_slide_memory_required(model_, window);
            slots_.push_back(std::make_unique<Memory>(bytes, 8));
            status = cellstep_session_slide_init(session_.handle, window, slots_.back()->data(), bytes);
        } else {
            status = cellstep_session_slide_begin(session_.handle, window);
        }
        if (window == 0 && info_.window == 0) {
            FUZZ_CHECK(status == CELLSTEP_ERROR_ARGUMENT);
            return;
        }
        if (!ran(status)) return;
        window_ = window ? window : info_.window;
        seen_.clear();
    }

    void slide(std::size_t steps) {
        std::vector<float> y = outputs(1);
        for (std::size_t step = 0; step < steps; ++step) {
            const std::vector<float> x = input_.values(info_.input_size);
            const cellstep_status status = cellstep_session_slide(session_.handle, x.data(), y.data());
            if (window_ == 0) {
                FUZZ_CHECK(status == CELLSTEP_ERROR_ARGUMENT);
                return;
            }
            seen_.insert(seen_.end(), x.begin(), x.end());
            const std::size_t count = seen_.size() / info_.input_size;
            FUZZ_CHECK(status == (count < window_ ? CELLSTEP_PENDING : CELLSTEP_OK));
        }
        if (seen_.size() < window_ * info_.input_size) return;
        // The same window in a session of its own, from the initial state.
        Session other;
        other.create(model_);
        std::vector<float> whole = outputs(1);
        const float* const first = seen_.data() + seen_.size() - window_ * info_.input_size;
        FUZZ_CHECK(cellstep_session_forecast(other.handle, first, window_, whole.data()) == CELLSTEP_OK);
        FUZZ_CHECK(same(y, whole));
    }

    void set_state() {
        const std::vector<float> h = input_.values(std::size_t{info_.num_layers} * info_.h_size);
        const std::vector<float> c = input_.values(std::size_t{info_.num_layers} * info_.hidden_size);
        for (const Session* each : {&session_, &twin_})
            FUZZ_CHECK(cellstep_session_set_state(each->handle, h.data(), c.data()) == CELLSTEP_OK);
        std::vector<float> h_out(h.size());
        std::vector<float> c_out(c.size());
        FUZZ_CHECK(cellstep_session_get_state(session_.handle, h_out.data(), c_out.data()) == CELLSTEP_OK);
        FUZZ_CHECK(std::memcmp(h.data(), h_out.data(), h.size() * sizeof(float)) == 0);
        FUZZ_CHECK(std::memcmp(c.data(), c_out.data(), c.size() * sizeof(float)) == 0);
    }

    void set_parallel() {
        static constexpr std::size_t counts[] = {1, 2, 3, 8, 1000, SIZE_MAX / 2 + 1, SIZE_MAX, 0};
        const unsigned how = input_.byte();
        backwards_ = how & 8;
        const std::size_t threads = counts[how % 8];
        const bool use = !(how & 16);
        const cellstep_status status =
            how & 32 && pool_
                ? cellstep_pool_set_parallel(pool_, threads, &backwards_, use ? run_tasks : nullptr)
                : cellstep_session_set_parallel(session_.handle, threads, &backwards_, use ? run_tasks : nullptr);
        FUZZ_CHECK(status == (use && threads == 0 ? CELLSTEP_ERROR_ARGUMENT : CELLSTEP_OK));
    }

    void swap() {
        const cellstep_model* other = models()[input_.byte() % models().size()];
        const cellstep_status status = cellstep_session_swap_model(session_.handle, other);
        FUZZ_CHECK(cellstep_session_swap_model(twin_.handle, other) == status);
        if (status == CELLSTEP_ERROR_SHAPE) return;
        FUZZ_CHECK(status == CELLSTEP_OK);
        model_ = other;
        FUZZ_CHECK(cellstep_model_get_info(other, &info_) == CELLSTEP_OK);
        seen_.clear();
    }

    void selftest() {
        float error = 0.0f;
        // After a swap the memory of a bidirectional session may be too small for the other model's test vector.
        if (!ran(cellstep_session_selftest(session_.handle, &error))) return;
        FUZZ_CHECK(error >= 0.0f);
        FUZZ_CHECK(cellstep_session_reset(twin_.handle) == CELLSTEP_OK);
    }

    void make_pool() {
        cellstep_pool_destroy(pool_);
        pool_ = nullptr;
        singles_.clear();
        const std::size_t streams = 1 + input_.byte() % 20;
        pool_model_ = model_;
        if (!one_way_) {
            FUZZ_CHECK(cellstep_pool_create(model_, streams, &pool_) == CELLSTEP_ERROR_BIDIRECTIONAL);
            return;
        }
        if (input_.byte() % 2) {
            const std::size_t bytes = cellstep_pool_memory_required(model_, streams);
            pool_memory_ = std::make_unique<Memory>(bytes, 8);
            FUZZ_CHECK(cellstep_pool_init(model_, streams, pool_memory_->data(), bytes - 1, &pool_) ==
                       CELLSTEP_ERROR_MEMORY);
            FUZZ_CHECK(cellstep_pool_init(model_, streams, pool_memory_->data(), bytes, &pool_) == CELLSTEP_OK);
        } else {
            FUZZ_CHECK(cellstep_pool_create(model_, streams, &pool_) == CELLSTEP_OK);
        }
        for (std::size_t stream = 0; stream < streams; ++stream) {
            singles_.push_back(std::make_unique<Session>());
            singles_.back()->init(model_, 1);
        }
    }

    void step_pool() {
        if (!pool_) return;
        cellstep_model_info info;
        FUZZ_CHECK(cellstep_model_get_info(pool_model_, &info) == CELLSTEP_OK);
        const std::size_t streams = singles_.size();
        const unsigned how = input_.byte();
        std::vector<float> h(std::size_t{info.num_layers} * info.h_size);
        std::vector<float> c(std::size_t{info.num_layers} * info.hidden_size);
        if (how & 1) {
            const std::size_t stream = input_.byte() % (streams + 1);
            h = input_.values(h.size());
            c = input_.values(c.size());
            const cellstep_status status = cellstep_pool_set_state(pool_, stream, h.data(), c.data());
            FUZZ_CHECK(status == (stream < streams ? CELLSTEP_OK : CELLSTEP_ERROR_ARGUMENT));
            if (stream < streams) cellstep_session_set_state(singles_[stream]->handle, h.data(), c.data());
        }
        if (how & 2) {
            FUZZ_CHECK(cellstep_pool_reset(pool_) == CELLSTEP_OK);
            for (const auto& single : singles_) cellstep_session_reset(single->handle);
        }
        const std::vector<float> x = input_.values(streams * info.input_size);
        std::vector<unsigned char> reset(streams);
        if (how & 4)
            for (auto& flag : reset) flag = input_.byte() % 4 == 0;
        std::vector<float> y(streams * info.output_size, 7.0f);
        FUZZ_CHECK(cellstep_pool_step(pool_, x.data(), how & 4 ? reset.data() : nullptr, y.data()) == CELLSTEP_OK);
        for (std::size_t stream = 0; stream < streams; ++stream) {
            cellstep_session* single = singles_[stream]->handle;
            std::vector<float> alone(info.output_size);
            if (reset[stream]) cellstep_session_reset(single);
            FUZZ_CHECK(cellstep_session_step(single, x.data() + stream * info.input_size, alone.data()) == CELLSTEP_OK);
            FUZZ_CHECK(same(alone.data(), y.data() + stream * info.output_size, alone.size()));
            FUZZ_CHECK(cellstep_pool_get_state(pool_, stream, h.data(), c.data()) == CELLSTEP_OK);
            std::vector<float> h_alone(h.size());
            std::vector<float> c_alone(c.size());
            FUZZ_CHECK(cellstep_session_get_state(single, h_alone.data(), c_alone.data()) == CELLSTEP_OK);
            FUZZ_CHECK(same(h, h_alone) && same(c, c_alone));
        }
    }

    /// So many steps that threads share the layers as a wavefront.
    void long_run() {
        if (long_runs_++ > 0) return;
        const std::size_t steps = 200 + 10 * input_.byte();
        run(input_.values(steps * info_.input_size), nullptr, steps);
    }

    void compare_states() {
        if (!one_way_) return;
        std::vector<float> state[2][2];
        for (int each = 0; each < 2; ++each) {
            state[each][0].resize(std::size_t{info_.num_layers} * info_.h_size);
            state[each][1].resize(std::size_t{info_.num_layers} * info_.hidden_size);
            cellstep_session_get_state((each ? twin_ : session_).handle, state[each][0].data(), state[each][1].data());
        }
        FUZZ_CHECK(same(state[0][0], state[1][0]) && same(state[0][1], state[1][1]));
    }

    const cellstep_model* model_;
    Input& input_;
    cellstep_model_info info_;
    bool one_way_;
    std::size_t limit_;
    std::size_t window_ = 0;
    std::vector<float> seen_;                     // inputs of the sliding window
    std::vector<std::unique_ptr<Memory>> slots_;  // of sliding windows
    bool backwards_ = false;
    int long_runs_ = 0;
    Session session_;
    Session twin_;
    cellstep_pool* pool_ = nullptr;
    const cellstep_model* pool_model_ = nullptr;
    std::unique_ptr<Memory> pool_memory_;
    std::vector<std::unique_ptr<Session>> singles_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Input input(data, size);
    const std::size_t model = input.byte() % models().size();
    Player(models()[model], input).play();
    return 0;
}
