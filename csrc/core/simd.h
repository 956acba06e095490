/// The vector types of the instruction set that a file is compiled for.
///
/// Everything here lies in `cellstep::core::CELLSTEP_ISA`, a namespace named after the instruction set
/// (`baseline`, `avx2`, `avx512`): the same source is compiled once for each, and without a name of its own
/// the linker would merge the copies and could keep the one that the machine cannot run.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef CELLSTEP_ISA
#define CELLSTEP_ISA baseline
#endif

#if !defined(CELLSTEP_STRICT)
#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_MVE) && (__ARM_FEATURE_MVE & 2)
#include <arm_mve.h>
#elif defined(__aarch64__) || (defined(__ARM_NEON) && defined(__ARM_FEATURE_FMA))
#include <arm_neon.h>
#endif
#endif

// Where one value's fma is an instruction. Clang says nothing of it on RISC-V.
#if !defined(CELLSTEP_STRICT)
#if defined(__FMA__) || defined(__aarch64__) || defined(__FP_FAST_FMAF) || defined(__ARM_FEATURE_FMA) || \
    __riscv_flen >= 32
#define CELLSTEP_FMA_FLOAT 1
#endif
#if defined(__FMA__) || defined(__aarch64__) || defined(__FP_FAST_FMA) || __riscv_flen >= 64
#define CELLSTEP_FMA_DOUBLE 1
#endif
#endif

/// For functions that pass vectors: a call would send them through memory. Where code is to be small they are called.
#if defined(CELLSTEP_COMPACT) && defined(__OPTIMIZE_SIZE__)
#define CELLSTEP_INLINE inline
#else
#define CELLSTEP_INLINE inline __attribute__((always_inline))
#endif

namespace cellstep {
namespace core {
namespace CELLSTEP_ISA {

/// Bytes of the widest vector register; those of a float where there is none or, with CELLSTEP_COMPACT, of 16 at most.
#if defined(CELLSTEP_COMPACT) && !defined(__SSE2__) && !defined(__ARM_NEON) && !defined(__wasm_simd128__) && \
    !(defined(__ARM_FEATURE_MVE) && (__ARM_FEATURE_MVE & 2))
constexpr int native_bytes = 4;
#elif defined(CELLSTEP_COMPACT)
constexpr int native_bytes = 16;
#elif defined(__AVX512F__)
constexpr int native_bytes = 64;
#elif defined(__AVX__)
constexpr int native_bytes = 32;
#else
constexpr int native_bytes = 16;
#endif

/// Vector registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int native_registers = 32;
#else
constexpr int native_registers = 16;
#endif

/// Whether fma() rounds once.
#if defined(CELLSTEP_FMA_FLOAT)
constexpr bool has_fma = true;
#else
constexpr bool has_fma = false;
#endif

template <class T, int Lanes>
struct VectorOf {
    typedef T type __attribute__((vector_size(Lanes * sizeof(T))));
};

/// One lane is the plain type: compilers keep vectors of one value in other registers.
template <class T>
struct VectorOf<T, 1> {
    using type = T;
};

/// A vector of `Lanes` values of T, with the operators of the compiler's vector extension.
template <class T, int Lanes>
using Vector = typename VectorOf<T, Lanes>::type;

template <class T>
constexpr int native_lanes = native_bytes > static_cast<int>(sizeof(T)) ? native_bytes / static_cast<int>(sizeof(T))
                                                                        : 1;

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

/// Of one lane directly: through memcpy it would pass through a register for integers.
template <class V, class T>
inline V load(const T* source) {
    if constexpr (is_same<V, T>) {
        return *source;
    } else {
        V value;
        __builtin_memcpy(&value, source, sizeof(V));
        return value;
    }
}

template <class V, class T>
inline void store(T* target, V value) {
    if constexpr (is_same<V, T>)
        *target = value;
    else
        __builtin_memcpy(target, &value, sizeof(V));
}

/// Subtracting zero keeps the sign of a negative zero, which adding zero would lose.
template <class V, class T>
inline V broadcast(T value) {
    return value - V{};
}

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
    To to;
    __builtin_memcpy(&to, &from, sizeof(To));
    return to;
}

/// One lane of a vector, also where it is the only one.
template <class T, class V>
inline T lane_of(const V& value, int lane) {
    T values[sizeof(V) / sizeof(T)];
    __builtin_memcpy(values, &value, sizeof(V));
    return values[lane];
}

template <class To, class From>
struct Conversion {
    static To of(From from) { return __builtin_convertvector(from, To); }
};
#define CELLSTEP_CONVERSION(To, From)                             \
    template <>                                                   \
    struct Conversion<To, From> {                                 \
        static To of(From from) { return static_cast<To>(from); } \
    };
CELLSTEP_CONVERSION(float, std::int32_t)
CELLSTEP_CONVERSION(std::uint32_t, std::uint16_t)
CELLSTEP_CONVERSION(unsigned char, std::int32_t)
#undef CELLSTEP_CONVERSION

/// Converts lane by lane.
template <class To, class From>
inline To convert(From from) {
    return Conversion<To, From>::of(from);
}

/// A vector as two of half its width. Where the instruction set has moves between them they are given below: through
/// memory the wider load would wait for both stores.
template <class T, int Lanes>
struct Halves {
    using V = Vector<T, Lanes>;
    using Half = Vector<T, Lanes / 2>;
    static V join(Half low, Half high) {
        const Half parts[2] = {low, high};
        V joined;
        __builtin_memcpy(&joined, parts, sizeof(joined));
        return joined;
    }
    static Half low(V value) {
        Half part;
        __builtin_memcpy(&part, &value, sizeof(part));
        return part;
    }
    static Half high(V value) {
        Half parts[2];
        __builtin_memcpy(parts, &value, sizeof(parts));
        return parts[1];
    }
};

/// The larger of each pair of lanes; b where either is NaN.
template <class V>
inline V maximum(V a, V b) {
    return a > b ? a : b;
}

/// The smaller; b where either is NaN.
template <class V>
inline V minimum(V a, V b) {
    return a < b ? a : b;
}

/// a * b + c, rounded once where the instruction set has a fused multiply-add and twice where it has not.
/// The files are compiled with -ffp-contract=off, so nothing else is ever fused: the sums are the same bits
/// whatever the compiler's taste.
template <class V>
inline V fma(V a, V b, V c) {
    return a * b + c;
}

#if !defined(CELLSTEP_STRICT)
#if defined(__FMA__)
template <>
struct Halves<float, 8> {
    using V = Vector<float, 8>;
    using Half = Vector<float, 4>;
    static V join(Half low, Half high) { return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1); }
    static Half low(V value) { return _mm256_castps256_ps128(value); }
    static Half high(V value) { return _mm256_extractf128_ps(value, 1); }
};
template <>
struct Halves<double, 4> {
    using V = Vector<double, 4>;
    using Half = Vector<double, 2>;
    static V join(Half low, Half high) { return _mm256_insertf128_pd(_mm256_castpd128_pd256(low), high, 1); }
    static Half low(V value) { return _mm256_castpd256_pd128(value); }
    static Half high(V value) { return _mm256_extractf128_pd(value, 1); }
};
#if defined(__AVX512F__)
template <>
struct Halves<float, 16> {
    using V = Vector<float, 16>;
    using Half = Vector<float, 8>;
    static V join(Half low, Half high) {
        return _mm512_maskz_insertf32x8(0xffff, _mm512_castps256_ps512(low), high, 1);
    }
    static Half low(V value) { return _mm512_maskz_extractf32x8_ps(255, value, 0); }
    static Half high(V value) { return _mm512_maskz_extractf32x8_ps(255, value, 1); }
};
template <>
struct Halves<double, 8> {
    using V = Vector<double, 8>;
    using Half = Vector<double, 4>;
    static V join(Half low, Half high) { return _mm512_maskz_insertf64x4(0xff, _mm512_castpd256_pd512(low), high, 1); }
    static Half low(V value) { return _mm512_maskz_extractf64x4_pd(15, value, 0); }
    static Half high(V value) { return _mm512_maskz_extractf64x4_pd(15, value, 1); }
};
template <>
inline Vector<float, 16> fma(Vector<float, 16> a, Vector<float, 16> b, Vector<float, 16> c) {
    return _mm512_fmadd_ps(a, b, c);
}
template <>
inline Vector<double, 8> fma(Vector<double, 8> a, Vector<double, 8> b, Vector<double, 8> c) {
    return _mm512_fmadd_pd(a, b, c);
}
// gcc makes two instructions of a comparison and a choice.
template <>
inline Vector<float, 16> maximum(Vector<float, 16> a, Vector<float, 16> b) {
    return _mm512_maskz_max_ps(0xffff, a, b);
}
template <>
inline Vector<float, 16> minimum(Vector<float, 16> a, Vector<float, 16> b) {
    return _mm512_maskz_min_ps(0xffff, a, b);
}
template <>
inline Vector<double, 8> maximum(Vector<double, 8> a, Vector<double, 8> b) {
    return _mm512_maskz_max_pd(0xff, a, b);
}
template <>
inline Vector<double, 8> minimum(Vector<double, 8> a, Vector<double, 8> b) {
    return _mm512_maskz_min_pd(0xff, a, b);
}
#endif
template <>
inline Vector<float, 8> maximum(Vector<float, 8> a, Vector<float, 8> b) {
    return _mm256_max_ps(a, b);
}
template <>
inline Vector<float, 8> minimum(Vector<float, 8> a, Vector<float, 8> b) {
    return _mm256_min_ps(a, b);
}
template <>
inline Vector<float, 4> maximum(Vector<float, 4> a, Vector<float, 4> b) {
    return _mm_max_ps(a, b);
}
template <>
inline Vector<float, 4> minimum(Vector<float, 4> a, Vector<float, 4> b) {
    return _mm_min_ps(a, b);
}
template <>
inline Vector<float, 8> fma(Vector<float, 8> a, Vector<float, 8> b, Vector<float, 8> c) {
    return _mm256_fmadd_ps(a, b, c);
}
template <>
inline Vector<double, 4> fma(Vector<double, 4> a, Vector<double, 4> b, Vector<double, 4> c) {
    return _mm256_fmadd_pd(a, b, c);
}
template <>
inline Vector<float, 4> fma(Vector<float, 4> a, Vector<float, 4> b, Vector<float, 4> c) {
    return _mm_fmadd_ps(a, b, c);
}
template <>
inline Vector<double, 2> fma(Vector<double, 2> a, Vector<double, 2> b, Vector<double, 2> c) {
    return _mm_fmadd_pd(a, b, c);
}
#elif defined(__ARM_FEATURE_MVE) && (__ARM_FEATURE_MVE & 2)
template <>
inline Vector<float, 4> fma(Vector<float, 4> a, Vector<float, 4> b, Vector<float, 4> c) {
    return bit_cast<Vector<float, 4> >(
        vfmaq_f32(bit_cast<float32x4_t>(c), bit_cast<float32x4_t>(a), bit_cast<float32x4_t>(b)));
}
#elif defined(__aarch64__) || (defined(__ARM_NEON) && defined(__ARM_FEATURE_FMA))
template <>
inline Vector<float, 4> fma(Vector<float, 4> a, Vector<float, 4> b, Vector<float, 4> c) {
    return vfmaq_f32(c, a, b);
}
#if defined(__aarch64__)
template <>
inline Vector<double, 2> fma(Vector<double, 2> a, Vector<double, 2> b, Vector<double, 2> c) {
    return vfmaq_f64(c, a, b);
}
#endif
#elif defined(CELLSTEP_FMA_FLOAT)
template <>
inline Vector<float, 4> fma(Vector<float, 4> a, Vector<float, 4> b, Vector<float, 4> c) {
    for (int lane = 0; lane < 4; ++lane) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return c;
}
#endif

#if defined(CELLSTEP_FMA_FLOAT)
template <>
inline float fma(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
}
#endif
#if defined(CELLSTEP_FMA_DOUBLE)
template <>
inline double fma(double a, double b, double c) {
    return __builtin_fma(a, b, c);
}
#endif
#endif

}  // namespace CELLSTEP_ISA
}  // namespace core
}  // namespace cellstep
