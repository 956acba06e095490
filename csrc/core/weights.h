/// How the weights of a packed layer are stored, and their way back to the type that is computed in.
#pragma once

#include "core/pack.h"
#include "core/simd.h"

namespace cellstep {
namespace core {
namespace CELLSTEP_ISA {

/// Weights of the type that is computed in.
template <class T>
struct FullWeights {
    static constexpr WeightType type = WeightType::full;
    using Stored = T;
    template <class V>
    static V widen(const T* source) {
        return load<V>(source);
    }
};

/// The upper half of a float32 (bfloat16).
struct Bfloat16Weights {
    static constexpr WeightType type = WeightType::bfloat16;
    using Stored = std::uint16_t;
    template <class V>
    static V widen(const std::uint16_t* source) {
        constexpr int lanes = sizeof(V) / sizeof(float);
        // By name, as gcc 12 makes several instructions of the conversion below.
#if defined(__AVX512F__)
        if constexpr (lanes == 16)
            return bit_cast<V>(
                _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, load<__m256i>(source)), 16));
#endif
#if defined(__AVX2__)
        if constexpr (lanes == 8)
            return bit_cast<V>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(source)), 16));
#endif
        using Wide = Vector<std::uint32_t, lanes>;
        const auto narrow = load<Vector<std::uint16_t, lanes>>(source);
        return bit_cast<V>(convert<Wide>(narrow) << 16);
    }
};

/// IEEE 754 binary16, finite.
struct Float16Weights {
    static constexpr WeightType type = WeightType::float16;
    using Stored = std::uint16_t;
    template <class V>
    static V widen(const std::uint16_t* source) {
        constexpr int lanes = sizeof(V) / sizeof(float);
#if defined(__AVX512F__)
        // The plain intrinsic begins with an undefined register, of which gcc 12 warns.
        if constexpr (lanes == 16) return bit_cast<V>(_mm512_maskz_cvtph_ps(0xffff, load<__m256i>(source)));
#endif
#if defined(__F16C__)
        if constexpr (lanes == 8) return bit_cast<V>(_mm256_cvtph_ps(load<__m128i>(source)));
#endif
        // A subnormal gets an exponent that float32 has normal numbers for, and loses the hidden one by subtraction.
        using Wide = Vector<std::uint32_t, lanes>;
        const Wide bits = convert<Wide>(load<Vector<std::uint16_t, lanes>>(source));
        Wide magnitude = (bits & 0x7fffu) << 13;
        const auto subnormal = magnitude < (1u << 23);
        magnitude += 112u << 23;
        const Wide lifted = magnitude + (1u << 23);
        const V normal = bit_cast<V>(magnitude);
        const V small = bit_cast<V>(lifted) - broadcast<V>(0x1p-14f);
        const Wide value = bit_cast<Wide>(subnormal ? small : normal);
        return bit_cast<V>(value | (bits & 0x8000u) << 16);
    }
};

}  // namespace CELLSTEP_ISA
}  // namespace core
}  // namespace cellstep
