// An amplifier model over a WAV file, block by block as an audio host calls it, and how far it is from its deadline.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "effect.h"
#include "wav.h"

namespace {

/// Microseconds a sample of RTNeural for 1 -> H -> 1, its sizes fixed when it was compiled, on a two-core AVX2 machine.
constexpr std::pair<unsigned, double> rtneural[] = {{8, 0.069},  {16, 0.128}, {20, 0.243},
                                                    {32, 0.229}, {40, 0.329}, {64, 1.222}};

/// Ten seconds of a plucked string, once a second.
Wav plucked_string() {
    Wav wav;
    wav.samples.resize(10 * wav.rate);
    for (std::size_t t = 0; t < wav.samples.size(); ++t) {
        const double seconds = static_cast<double>(t % wav.rate) / wav.rate;
        double sum = 0;
        for (int k = 1; k <= 8; ++k)
            sum += std::sin(6.283185307179586 * 110 * k * seconds) * std::exp(-k * seconds) / k;
        wav.samples[t] = static_cast<float>(0.4 * sum);
    }
    return wav;
}

void report(const Effect& effect, const Wav& wav, std::vector<double> blocks) {
    const double audio = static_cast<double>(wav.samples.size()) / wav.rate * 1e6;
    const double computing = std::accumulate(blocks.begin(), blocks.end(), 0.0);
    const double deadline = 1e6 * Effect::block_size / wav.rate;
    std::sort(blocks.begin(), blocks.end());
    const double median = blocks[blocks.size() / 2];
    const double late = blocks[blocks.size() - 1 - blocks.size() / 1000];
    const cellstep_model_info& info = effect.info();
    std::printf("%u x %u units on %s; %zu samples at %u Hz in blocks of %zu\n", info.num_layers, info.hidden_size,
                cellstep_instruction_set(), wav.samples.size(), static_cast<unsigned>(wav.rate), Effect::block_size);
    std::printf("real-time factor: %.0f (seconds of audio a second of computing)\n", audio / computing);
    std::printf("a block, due in %.0f us: median %.2f us (%.2f%%), 99.9%% %.2f us (%.2f%%), worst %.2f us (%.2f%%)\n",
                deadline, median, 100 * median / deadline, late, 100 * late / deadline, blocks.back(),
                100 * blocks.back() / deadline);
    std::printf("a sample: %.3f us", median / Effect::block_size);
    for (const auto& [units, published] : rtneural)
        if (info.num_layers == 1 && info.input_size == 1 && info.hidden_size == units)
            std::printf("; RTNeural compiled for these sizes, on another machine: %.3f us", published);
    std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) try {
    if (argc < 2 || argc == 3) {
        std::fprintf(stderr, "usage: %s MODEL.cellstep [IN.wav OUT.wav [KNOB...]]\n", argv[0]);
        return 2;
    }
    std::vector<float> knobs;
    for (int k = 4; k < argc; ++k) {
        char* end = nullptr;
        knobs.push_back(std::strtof(argv[k], &end));
        if (end == argv[k] || *end != '\0')
            throw std::runtime_error("expected knobs that are numbers; got '" + std::string(argv[k]) + "'");
    }
    Effect effect(argv[1], std::move(knobs));
    Wav wav = argc > 3 ? read_wav(argv[2]) : plucked_string();
    if (wav.samples.empty()) throw std::runtime_error("expected samples; the file has none");
    std::vector<float> output(wav.samples.size());
    std::vector<double> blocks((output.size() + Effect::block_size - 1) / Effect::block_size);

    for (std::size_t k = 0; k < blocks.size(); ++k) {
        const std::size_t first = k * Effect::block_size;
        const std::size_t count = std::min(Effect::block_size, output.size() - first);
        const auto start = std::chrono::steady_clock::now();
        effect.process(wav.samples.data() + first, output.data() + first, count);
        blocks[k] = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
    }

    report(effect, wav, std::move(blocks));
    wav.samples = std::move(output);
    if (argc > 3) write_wav(argv[3], wav);
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
}
