/// Logistic sigmoid and hyperbolic tangent on vectors, without libm, so that they are the same bits everywhere.
///
/// Both rest on exp of a non-positive argument, split as x = n ln 2 + r with |r| <= ln(2)/2 (Cody and Waite,
/// Software Manual for the Elementary Functions, 1980) and the Taylor series of expm1(r), whose first left-out
/// term is below a quarter of a unit in the last place. A non-positive argument cannot overflow.
#pragma once

#include "core/simd.h"

namespace cellstep {
namespace core {
namespace CELLSTEP_ISA {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
    using Bits = std::int32_t;
    static constexpr float log2_e = 0x1.715476p+0f;
    static constexpr float ln2_high = 0x1.62e4p-1f;  // the low bits are zero, so n * ln2_high is exact
    static constexpr float ln2_low = 0x1.7f7d1cp-20f;
    static constexpr float round_to_int = 0x1.8p+23f;  // adding it leaves round(x) in the low bits
    static constexpr int mantissa_bits = 23;
    static constexpr float underflow = -87.0f;  // exp of less is flushed to zero before it is denormal
    static constexpr int terms = 6;
    static constexpr float series[terms] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f};
};

template <>
struct ExpConstants<double> {
    using Bits = std::int64_t;
    static constexpr double log2_e = 0x1.71547652b82fep+0;
    static constexpr double ln2_high = 0x1.62e42fefa0000p-1;
    static constexpr double ln2_low = 0x1.cf79abc9e3b3ap-40;
    static constexpr double round_to_int = 0x1.8p+52;
    static constexpr int mantissa_bits = 52;
    static constexpr double underflow = -708.0;
    static constexpr int terms = 12;
    static constexpr double series[terms] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                             1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                             1.0 / 120,        1.0 / 24,        1.0 / 6,        0.5};
};

/// exp(x) = scale * (1 + expm1), with scale a power of two.
template <class V>
struct SplitExp {
    V scale;
    V expm1;
};

template <class T, int Lanes>
inline SplitExp<Vector<T, Lanes>> split_exp(Vector<T, Lanes> x) {
    using C = ExpConstants<T>;
    using V = Vector<T, Lanes>;
    using I = Vector<typename C::Bits, Lanes>;
    const V shift = broadcast<V>(C::round_to_int);
    const V shifted = fma(x, broadcast<V>(C::log2_e), shift);
    const V n = shifted - shift;
    V r = fma(n, broadcast<V>(-C::ln2_high), x);
    r = fma(n, broadcast<V>(-C::ln2_low), r);
    // Pairs of terms first, then by powers of r^2: half the latency of Horner's scheme for as many operations.
    const V square = r * r;
    V q = fma(broadcast<V>(C::series[0]), r, broadcast<V>(C::series[1]));
    for (int term = 2; term < C::terms; term += 2)
        q = fma(q, square, fma(broadcast<V>(C::series[term]), r, broadcast<V>(C::series[term + 1])));
    const I one = bit_cast<I>(broadcast<V>(T(1)));
    return {bit_cast<V>((bit_cast<I>(shifted) << C::mantissa_bits) + one), fma(square, q, r)};
}

template <class T, int Lanes>
inline Vector<T, Lanes> magnitude(Vector<T, Lanes> x) {
    using I = Vector<typename ExpConstants<T>::Bits, Lanes>;
    const I sign = bit_cast<I>(broadcast<Vector<T, Lanes>>(T(-0.0)));
    return bit_cast<Vector<T, Lanes>>(bit_cast<I>(x) & ~sign);
}

/// A value as a quotient, so that the product of two values takes one division.
template <class V>
struct Fraction {
    V over;
    V under;
};

/// 1 / (1 + exp(-x)); NaN for NaN; exactly zero below the range of normal numbers. The denominator is 1 to 2.
template <class T, int Lanes>
inline Fraction<Vector<T, Lanes>> sigmoid_fraction(Vector<T, Lanes> x) {
    using V = Vector<T, Lanes>;
    const V floor = broadcast<V>(ExpConstants<T>::underflow);
    V negative = -magnitude<T, Lanes>(x);
    const auto vanishes = negative < floor;
    negative = vanishes ? floor : negative;
    const SplitExp<V> split = split_exp<T, Lanes>(negative);
    V e = fma(split.scale, split.expm1, split.scale);
    e = vanishes ? V{} : e;
    const V one = broadcast<V>(T(1));
    return {x < V{} ? e : one, one + e};
}

template <class T, int Lanes>
inline Vector<T, Lanes> sigmoid(Vector<T, Lanes> x) {
    const Fraction<Vector<T, Lanes>> value = sigmoid_fraction<T, Lanes>(x);
    return value.over / value.under;
}

/// expm1(x) for x up to 0, x above; NaN for NaN.
template <class T, int Lanes>
inline Vector<T, Lanes> elu(Vector<T, Lanes> x) {
    using V = Vector<T, Lanes>;
    const V saturated = broadcast<V>(T(-44));  // expm1(-44) rounds to -1 in float and in double
    V negative = x < V{} ? x : V{};
    negative = negative < saturated ? saturated : negative;
    const SplitExp<V> split = split_exp<T, Lanes>(negative);
    return x < V{} ? fma(split.scale, split.expm1, split.scale - broadcast<V>(T(1))) : x;
}

/// tanh(x) = -t / (2 + t) with t = expm1(-2 |x|), and the sign of x; never past 1 in magnitude; NaN for NaN. The
/// denominator is 1 to 2.
template <class T, int Lanes>
inline Fraction<Vector<T, Lanes>> tanh_fraction(Vector<T, Lanes> x) {
    using V = Vector<T, Lanes>;
    using I = Vector<typename ExpConstants<T>::Bits, Lanes>;
    const V saturated = broadcast<V>(T(-44));  // tanh(22) rounds to 1 in float and in double
    V twice = broadcast<V>(T(-2)) * magnitude<T, Lanes>(x);
    twice = twice < saturated ? saturated : twice;
    const SplitExp<V> split = split_exp<T, Lanes>(twice);
    const V t = fma(split.scale, split.expm1, split.scale - broadcast<V>(T(1)));
    const I sign = bit_cast<I>(broadcast<V>(T(-0.0)));
    return {bit_cast<V>((bit_cast<I>(t) & ~sign) | (bit_cast<I>(x) & sign)), broadcast<V>(T(2)) + t};
}

template <class T, int Lanes>
inline Vector<T, Lanes> tanh(Vector<T, Lanes> x) {
    const Fraction<Vector<T, Lanes>> value = tanh_fraction<T, Lanes>(x);
    return value.over / value.under;
}

}  // namespace CELLSTEP_ISA
}  // namespace core
}  // namespace cellstep
