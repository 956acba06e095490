#include "program.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <iostream>

namespace cellstep {
namespace tools {

namespace {

std::string usage(const Program& program) {
    std::string text = std::string("usage: ") + program.name + " " + program.model +
                       " INPUT.csv [--stream] [--window N] [--stride N] [--repeat N] [--output FILE]";
    if (program.takes_libtorch) text += " [--threads N] [--device cpu|cuda] [--library LIB]...";
    return text;
}

std::string help(const Program& program) {
    std::string text = usage(program) +
                       "\n\n"
                       "Forecasts from every window of a CSV file and writes the forecasts as CSV.\n\n"
                       "  --stream       one step at a time, carrying the state: an answer for every row\n"
                       "  --window N     rows of a window; default: what the model was trained for\n"
                       "  --stride N     rows from one window to the next; default 1\n"
                       "  --repeat N     then time N calls and print their latency to standard error\n"
                       "  --output FILE  write there instead of to standard output\n";
    if (program.takes_libtorch)
        text +=
            "  --threads N    threads inside torch; default 1\n"
            "  --device D     cpu or cuda; default cpu\n"
            "  --library LIB  load a library that registers further operators; may be repeated\n";
    return text + "  --version      print the version\n";
}

std::size_t number(const std::string& flag, const std::string& text) {
    std::size_t value = 0;
    const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || stop != text.data() + text.size() || value == 0 || value > 1000000000)
        throw UserError("expected a whole number from 1 to 1000000000 after " + flag + "; got '" + text + "'");
    return value;
}

Options parse(const Program& program, const std::vector<std::string>& arguments) {
    Options options;
    std::vector<std::string> files;
    for (std::size_t at = 0; at < arguments.size(); ++at) {
        const std::string& flag = arguments[at];
        const auto value = [&]() -> const std::string& {
            if (at + 1 == arguments.size()) throw UserError("expected a value after " + flag + "; got none");
            return arguments[++at];
        };
        if (flag.size() < 2 || flag[0] != '-')
            files.push_back(flag);
        else if (flag == "--stream")
            options.stream = true;
        else if (flag == "--window")
            options.window = number(flag, value());
        else if (flag == "--stride")
            options.stride = number(flag, value());
        else if (flag == "--repeat")
            options.repeat = number(flag, value());
        else if (flag == "--output")
            options.output = value();
        else if (program.takes_libtorch && flag == "--threads")
            options.threads = static_cast<int>(number(flag, value()));
        else if (program.takes_libtorch && flag == "--device") {
            options.device = value();
            if (options.device != "cpu" && options.device != "cuda")
                throw UserError("expected cpu or cuda after --device; got '" + options.device + "'");
        } else if (program.takes_libtorch && flag == "--library")
            options.libraries.push_back(value());
        else
            throw UserError("expected one of the flags that --help lists; got '" + flag + "'; " + usage(program));
    }
    if (files.size() != 2)
        throw UserError("expected a model and a CSV file; got " + std::to_string(files.size()) + " arguments; " +
                        usage(program));
    options.model = files[0];
    options.input = files[1];
    return options;
}

std::string quoted(const std::string& name) {
    if (name.find_first_of(",\"\r\n") == std::string::npos) return name;
    std::string text = "\"";
    for (const char c : name) text += c == '"' ? std::string("\"\"") : std::string(1, c);
    return text + "\"";
}

void add_row(std::string& out, std::size_t row, const float* y, std::size_t count) {
    char text[32];
    out += std::to_string(row);
    for (std::size_t k = 0; k < count; ++k) {
        std::snprintf(text, sizeof(text), ",%.9g", static_cast<double>(y[k]));
        out += text;
    }
    out += '\n';
}

/// Microseconds of one call.
template <class Call>
double timed(const Call& call) {
    const auto begin = std::chrono::steady_clock::now();
    call();
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
}

void print_latency(double first, std::vector<double> times) {
    std::sort(times.begin(), times.end());
    const auto percentile = [&](double share) {
        return times[static_cast<std::size_t>(share * static_cast<double>(times.size() - 1) + 0.5)];
    };
    std::fprintf(stderr,
                 "latency in us over %zu calls: first %.2f, median %.2f, 99%% %.2f, 99.9%% %.2f, maximum %.2f\n",
                 times.size(), first, percentile(0.5), percentile(0.99), percentile(0.999), times.back());
}

void write(const std::string& path, const std::string& text) {
    if (path.empty()) {
        std::cout << text << std::flush;
        if (!std::cout) throw UserError("expected to write to standard output; it does not take it; check the pipe");
        return;
    }
    std::ofstream file(path, std::ios::binary);
    file << text << std::flush;
    if (!file) throw UserError("expected to write '" + path + "'; it cannot be written; check the directory");
}

void run(const Program& program, const Options& options) {
    const std::unique_ptr<Runner> runner = program.load(options);
    const Table table = read_csv(options.input, runner->feature_names, runner->input_size);
    const std::size_t window = options.stream ? 1 : options.window ? options.window : runner->window;
    if (window == 0) throw UserError("expected a window length; the model names none; pass --window N or --stream");
    if (table.rows < window)
        throw UserError("expected at least " + std::to_string(window) + " data rows for a window; '" + options.input +
                        "' has " + std::to_string(table.rows) + "; give more rows or a shorter --window");

    const std::size_t answers = runner->every_step ? window : 1;
    const std::size_t outputs = runner->output_size;
    std::vector<float> y(answers * outputs);
    const auto call = [&](std::size_t first) {
        if (options.stream)
            runner->step(table.row(first), y.data());
        else
            runner->forecast(table.row(first), window, y.data());
    };
    // The first call pays for everything that is lazy; it is also the warm-up of all that follow.
    const double first_call = timed([&] { call(0); });
    runner->reset();

    std::string out = "row";
    for (std::size_t k = 0; k < outputs; ++k)
        out += "," + (runner->output_names.empty() ? "y" + std::to_string(k) : quoted(runner->output_names[k]));
    out += '\n';
    const std::size_t stride = options.stream ? 1 : options.stride;
    for (std::size_t first = 0; first + window <= table.rows; first += stride) {
        call(first);
        for (std::size_t answer = 0; answer < answers; ++answer)
            add_row(out, first + window - answers + answer, y.data() + answer * outputs, outputs);
    }
    write(options.output, out);

    if (options.repeat == 0) return;
    std::vector<double> times(options.repeat);
    for (double& time : times) time = timed([&] { call(0); });
    print_latency(first_call, times);
}

}  // namespace

int run_program(const Program& program, int argc, char** argv) {
    const std::vector<std::string> arguments(argv + 1, argv + argc);
    try {
        for (const std::string& argument : arguments) {
            if (argument == "--help" || argument == "-h") {
                std::cout << help(program);
                return 0;
            }
            if (argument == "--version") {
                std::cout << program.name << " " << CELLSTEP_VERSION_STRING << "\n";
                return 0;
            }
        }
        run(program, parse(program, arguments));
        return 0;
    } catch (const std::exception& error) {
        std::string text = error.what();
        std::replace(text.begin(), text.end(), '\n', ' ');
        std::cerr << "error: " << text << std::endl;
        return 2;
    }
}

}  // namespace tools
}  // namespace cellstep
