// The torch-free session through its C API: nanoseconds a time step, as JSON.
//
//     cellstep_benchmark_runtime MODEL.cellstep INPUT.f32 OUTPUT.f32 MILLISECONDS
//
// INPUT holds float32 values, (steps, input_size); OUTPUT gets those of the whole sequence, (steps, output_size), so
// that the caller can check them. Then it runs "step", one step a call, and "run", all steps in one call, each from
// the initial state over the whole input, for so many milliseconds. A clock costs as much as a small step, so what is
// timed is the whole input; a sample is that time over the number of steps. "first" is the first sample.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "cellstep/runtime.h"

namespace {

using Clock = std::chrono::steady_clock;

[[noreturn]] void fail(const std::string& text) {
    std::fprintf(stderr, "error: %s\n", text.c_str());
    std::exit(2);
}

void check(cellstep_status status, const std::string& what) {
    if (status != CELLSTEP_OK) fail(what + ": " + cellstep_status_text(status));
}

std::vector<float> read_values(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    if (!file || bytes.empty() || bytes.size() % sizeof(float) != 0)
        fail("expected float32 values in '" + path + "'; check the file");
    const float* values = reinterpret_cast<const float*>(bytes.data());
    return {values, values + bytes.size() / sizeof(float)};
}

template <class Call>
void print_times(const char* name, std::size_t steps, double milliseconds, const Call& call) {
    std::vector<double> samples;
    const auto begin = Clock::now();
    do {
        const auto start = Clock::now();
        call();
        const std::chrono::duration<double, std::nano> passed = Clock::now() - start;
        samples.push_back(passed.count() / static_cast<double>(steps));
    } while (std::chrono::duration<double, std::milli>(Clock::now() - begin).count() < milliseconds);
    const double first = samples.front();
    std::sort(samples.begin(), samples.end());
    const auto at = [&](double share) {
        return samples[static_cast<std::size_t>(share * static_cast<double>(samples.size() - 1) + 0.5)];
    };
    std::printf(
        "\"%s\": {\"first\": %.2f, \"min\": %.2f, \"median\": %.2f, \"p99\": %.2f, \"p999\": %.2f, \"calls\": %zu}",
        name, first, samples.front(), at(0.5), at(0.99), at(0.999), samples.size());
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 5) fail("usage: cellstep_benchmark_runtime MODEL.cellstep INPUT.f32 OUTPUT.f32 MILLISECONDS");
    const std::string path = argv[1];
    const double milliseconds = std::atof(argv[4]);
    cellstep_model* model = nullptr;
    check(cellstep_model_load_file(path.c_str(), &model), path);
    cellstep_model_info info{};
    check(cellstep_model_get_info(model, &info), path);
    cellstep_session* session = nullptr;
    check(cellstep_session_create(model, &session), path);

    const std::vector<float> x = read_values(argv[2]);
    const std::size_t steps = x.size() / info.input_size;
    if (x.size() != steps * info.input_size)
        fail("expected rows of " + std::to_string(info.input_size) + " values; got " + std::to_string(x.size()) +
             " values; check the file");
    std::vector<float> y(steps * info.output_size);

    std::printf("{\"instruction_set\": \"%s\", \"steps\": %zu, ", cellstep_instruction_set(), steps);
    print_times("step", steps, milliseconds, [&] {
        cellstep_session_reset(session);
        for (std::size_t step = 0; step < steps; ++step)
            cellstep_session_step(session, x.data() + step * info.input_size, y.data() + step * info.output_size);
    });
    std::printf(", ");
    const std::vector<float> by_step = y;
    print_times("run", steps, milliseconds, [&] {
        cellstep_session_reset(session);
        cellstep_session_run(session, x.data(), steps, y.data());
    });
    std::printf("}\n");
    if (y != by_step) fail("expected the same outputs from steps and from the whole sequence; they differ");

    std::ofstream file(argv[3], std::ios::binary);
    file.write(reinterpret_cast<const char*>(y.data()), static_cast<std::streamsize>(y.size() * sizeof(float)));
    if (!file.flush()) fail(std::string("expected to write '") + argv[3] + "'; check the directory");
    cellstep_session_destroy(session);
    cellstep_model_destroy(model);
    return 0;
}
