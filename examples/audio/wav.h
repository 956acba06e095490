/// Mono WAV files of 16, 24 or 32 bits or of float32 samples.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct Wav {
    std::uint32_t rate = 48000;
    int bits = 32;
    bool is_float = true;
    std::vector<float> samples;  ///< whole numbers are read as -1 to 1
};

/// Throws std::runtime_error.
Wav read_wav(const std::string& path);

/// In the format that `wav` names; whole numbers are clipped. Throws std::runtime_error.
void write_wav(const std::string& path, const Wav& wav);
