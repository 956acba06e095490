/// What cellstep-run and cellstep-embed share: options, windows, streaming, output, latency.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "csv.h"

namespace cellstep {
namespace tools {

struct Options {
    std::string model;
    std::string input;
    std::string output;  ///< empty: standard output
    bool stream = false;
    std::size_t window = 0;  ///< 0: the model's own
    std::size_t stride = 1;
    std::size_t repeat = 0;
    int threads = 1;
    std::string device = "cpu";  ///< or "cuda"
    std::vector<std::string> libraries;
};

/// A model that takes one window or one step at a time.
class Runner {
public:
    virtual ~Runner() = default;

    /// Answers a window from the initial state: (steps, input_size) in and (output_size) out, or (steps, output_size)
    /// from a model that answers every step.
    virtual void forecast(const float* x, std::size_t steps, float* y) = 0;
    /// Moves the stream one step, (input_size) in and (output_size) out.
    virtual void step(const float* x, float* y) = 0;
    /// Puts the stream back to the initial state.
    virtual void reset() = 0;

    std::size_t input_size = 0;  ///< 0: not known, as many as the CSV has columns
    std::size_t output_size = 0;
    std::size_t window = 0;  ///< 0: not known
    bool every_step = false;
    std::vector<std::string> feature_names;
    std::vector<std::string> output_names;
};

struct Program {
    const char* name;
    const char* model;    ///< what the model argument is, for the usage line
    bool takes_libtorch;  ///< knows --threads, --device and --library
    std::function<std::unique_ptr<Runner>(const Options&)> load;
};

/// The whole of main: 0, or 2 after one line on standard error.
int run_program(const Program& program, int argc, char** argv);

}  // namespace tools
}  // namespace cellstep
