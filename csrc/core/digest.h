/// A digest of memory, for telling whether it has changed; for the instruction set that a file is compiled for.
///
/// Words are mixed with keys that depend on their place and multiplied half by half, as in XXH3 (Collet 2019), so that
/// values that change places change it too. It is no defence against somebody who wants the same digest.
#pragma once

#include <cstring>

#include "core/simd.h"

namespace cellstep {
namespace core {
namespace CELLSTEP_ISA {

using Words = Vector<std::uint64_t, native_bytes / 8>;

/// The product of the lower halves.
inline Words multiply_low(Words a, Words b) {
#if defined(__AVX512F__)
    return bit_cast<Words>(_mm512_maskz_mul_epu32(0xff, bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
    return bit_cast<Words>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
    constexpr std::uint64_t low = 0xffffffffu;
    return (a & low) * (b & low);
#endif
}

inline std::uint64_t digest(const void* data, std::size_t size, std::uint64_t seed) CELLSTEP_NONBLOCKING {
    constexpr std::size_t bytes = sizeof(Words);
    constexpr int streams = 4;
    const auto* at = static_cast<const unsigned char*>(data);
    Words sum[streams];
    Words key[streams];
    for (int s = 0; s < streams; ++s) {
        for (std::size_t lane = 0; lane < bytes / 8; ++lane) {
            sum[s][lane] = seed + static_cast<std::uint64_t>(s);
            key[s][lane] = 0x9e3779b97f4a7c15u * (2 * (static_cast<std::uint64_t>(s) * 8 + lane) + 1);
        }
    }
    const auto mix = [&](int s, Words words) {
        const Words keyed = words ^ key[s];
        sum[s] += multiply_low(keyed, keyed >> 32) + words;
        key[s] += 0xbe4ba423396cfeb9u;
    };
    std::size_t left = size;
    for (; left >= streams * bytes; left -= streams * bytes, at += streams * bytes)
        for (int s = 0; s < streams; ++s) mix(s, load<Words>(at + static_cast<std::size_t>(s) * bytes));
    for (int s = 0; left > 0; ++s) {
        const std::size_t part = left < bytes ? left : bytes;
        Words words{};
        std::memcpy(&words, at, part);
        mix(s, words);
        at += part;
        left -= part;
    }
    std::uint64_t result = size;
    for (int s = 0; s < streams; ++s)
        for (std::size_t lane = 0; lane < bytes / 8; ++lane)
            result = (result ^ sum[s][lane]) * 0x9fb21c651e98df25u ^ (result >> 29);
    return result;
}

}  // namespace CELLSTEP_ISA
}  // namespace core
}  // namespace cellstep
