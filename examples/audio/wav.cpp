#include "wav.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

namespace {

constexpr unsigned pcm = 1;
constexpr unsigned ieee_float = 3;
constexpr unsigned extensible = 0xfffe;

using Bytes = std::vector<unsigned char>;

std::uint32_t number(const Bytes& bytes, std::size_t at, std::size_t size) {
    std::uint32_t value = 0;
    for (std::size_t k = 0; k < size; ++k) value |= std::uint32_t{bytes[at + k]} << (8 * k);
    return value;
}

void append(Bytes& bytes, std::uint32_t value, std::size_t size) {
    for (std::size_t k = 0; k < size; ++k) bytes.push_back(static_cast<unsigned char>(value >> (8 * k)));
}

void append(Bytes& bytes, const char* name) { bytes.insert(bytes.end(), name, name + 4); }

[[noreturn]] void refuse(const std::string& path, const std::string& text) {
    throw std::runtime_error("'" + path + "': expected a mono WAV file of 16, 24, 32 bits or float32; " + text);
}

float scale(int bits) { return std::ldexp(1.0f, bits - 1); }

}  // namespace

Wav read_wav(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    const Bytes bytes{std::istreambuf_iterator<char>(file), {}};
    if (!file) refuse(path, "it cannot be read");
    if (bytes.size() < 12 || std::memcmp(bytes.data(), "RIFF", 4) != 0 || std::memcmp(&bytes[8], "WAVE", 4) != 0)
        refuse(path, "it has another header");

    Wav wav;
    bool described = false;
    for (std::size_t at = 12; at + 8 <= bytes.size();) {
        const std::size_t left = bytes.size() - at - 8;
        std::size_t size = number(bytes, at + 4, 4);
        const auto is = [&](const char* name) { return std::memcmp(&bytes[at], name, 4) == 0; };
        const std::size_t content = at + 8;
        if (is("fmt ") && size >= 16 && size <= left) {
            unsigned format = number(bytes, content, 2);
            if (format == extensible && size >= 26) format = number(bytes, content + 24, 2);
            const unsigned channels = number(bytes, content + 2, 2);
            wav.rate = number(bytes, content + 4, 4);
            wav.bits = static_cast<int>(number(bytes, content + 14, 2));
            wav.is_float = format == ieee_float;
            if (channels != 1) refuse(path, "it has " + std::to_string(channels) + " channels");
            if (wav.rate == 0) refuse(path, "it names no sample rate");
            const bool known = wav.is_float ? wav.bits == 32 : wav.bits == 16 || wav.bits == 24 || wav.bits == 32;
            if ((format != pcm && format != ieee_float) || !known)
                refuse(path, "it has format " + std::to_string(format) + " of " + std::to_string(wav.bits) + " bits");
            described = true;
        } else if (is("data")) {
            if (!described) refuse(path, "its samples come before their format");
            size = size < left ? size : left;  // a recording that was cut off, or written to a pipe
            const std::size_t width = static_cast<std::size_t>(wav.bits) / 8;
            wav.samples.resize(size / width);
            for (std::size_t t = 0; t < wav.samples.size(); ++t) {
                const std::uint32_t raw = number(bytes, content + t * width, width) << (32 - wav.bits);
                if (wav.is_float)
                    std::memcpy(&wav.samples[t], &raw, sizeof(raw));
                else
                    wav.samples[t] =
                        static_cast<float>(static_cast<std::int32_t>(raw) >> (32 - wav.bits)) / scale(wav.bits);
            }
            return wav;
        }
        if (size > left) break;
        at = content + size + size % 2;
    }
    refuse(path, "it has no samples");
}

void write_wav(const std::string& path, const Wav& wav) {
    const std::uint32_t width = static_cast<std::uint32_t>(wav.bits) / 8;
    const std::uint32_t size = static_cast<std::uint32_t>(wav.samples.size()) * width;
    Bytes bytes;
    bytes.reserve(44 + size + size % 2);
    append(bytes, "RIFF");
    append(bytes, 36 + size + size % 2, 4);
    append(bytes, "WAVE");
    append(bytes, "fmt ");
    append(bytes, 16, 4);
    append(bytes, wav.is_float ? ieee_float : pcm, 2);
    append(bytes, 1, 2);
    append(bytes, wav.rate, 4);
    append(bytes, wav.rate * width, 4);
    append(bytes, width, 2);
    append(bytes, static_cast<std::uint32_t>(wav.bits), 2);
    append(bytes, "data");
    append(bytes, size, 4);
    for (const float sample : wav.samples) {
        if (wav.is_float) {
            std::uint32_t raw;
            std::memcpy(&raw, &sample, sizeof(raw));
            append(bytes, raw, 4);
        } else {
            const double most = scale(wav.bits);
            const double value = std::nearbyint(static_cast<double>(sample) * most);
            const double clipped = value < -most ? -most : value > most - 1 ? most - 1 : value;
            append(bytes, static_cast<std::uint32_t>(static_cast<std::int64_t>(clipped)), width);
        }
    }
    if (size % 2) bytes.push_back(0);
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    if (!file.flush()) throw std::runtime_error("'" + path + "': expected a file that can be written; check the path");
}
