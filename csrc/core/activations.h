/// Logistic sigmoid and hyperbolic tangent on vectors, without libm, so that they are the same bits everywhere.
///
/// Both rest on exp, its argument split as x = n ln 2 + r with |r| <= ln(2)/2 (Cody and Waite,
/// Software Manual for the Elementary Functions, 1980), and a polynomial for expm1(r): in float the one of least
/// relative error in exp(r) for its degree, 4e-9, in double the Taylor series.
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
    // ln 2 in two parts. A fused multiply-add rounds n * ln2_high once, together with the subtraction; without one the
    // product must be exact, so that the low bits of ln2_high are zero.
    static constexpr float ln2_high = has_fma ? 0x1.62e43p-1f : 0x1.62e4p-1f;
    static constexpr float ln2_low = has_fma ? -0x1.05c61p-29f : 0x1.7f7d1cp-20f;
    static constexpr float round_to_int = 0x1.8p+23f;  // adding it leaves round(x) in the low bits
    static constexpr int mantissa_bits = 23;
    static constexpr float vanishes = -88.0f;  // n is -127 there, which makes 2^n zero, and exp of less is denormal
    static constexpr float overflows = 89.0f;  // n is 128 there, which makes 2^n infinite, and r is positive
    static constexpr int terms = 5;            // of (expm1(r) - r) / r^2, the highest power first
    static constexpr float series[terms] = {0x1.6a2434p-10f, 0x1.1239e2p-7f, 0x1.5558f2p-5f, 0x1.555492p-3f,
                                            0x1.fffffcp-2f};
};

template <>
struct ExpConstants<double> {
    using Bits = std::int64_t;
    static constexpr double log2_e = 0x1.71547652b82fep+0;
    static constexpr double ln2_high = has_fma ? 0x1.62e42fefa39efp-1 : 0x1.62e42fefa0000p-1;
    static constexpr double ln2_low = has_fma ? 0x1.abc9e3b39803fp-56 : 0x1.cf79abc9e3b3ap-40;
    static constexpr double round_to_int = 0x1.8p+52;
    static constexpr int mantissa_bits = 52;
    static constexpr double vanishes = -709.0;
    static constexpr double overflows = 710.0;
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

/// Far: whether every digit counts far from zero, as it does not in 1 + exp(x) for negative x.
template <class T, int Lanes, bool Far>
CELLSTEP_INLINE SplitExp<Vector<T, Lanes>> split_exp(Vector<T, Lanes> x) {
    using C = ExpConstants<T>;
    using V = Vector<T, Lanes>;
    using I = Vector<typename C::Bits, Lanes>;
    const V shift = broadcast<V>(C::round_to_int);
    const V shifted = fma(x, broadcast<V>(C::log2_e), shift);
    const V n = shifted - shift;
    const V rough = fma(n, broadcast<V>(-C::ln2_high), x);
    const V r = fma(n, broadcast<V>(-C::ln2_low), rough);
    // With a fused multiply-add `rough` is r but for n ln2_low, which the square does not feel until n is large.
    const V z = has_fma && !Far ? rough : r;
    // Terms in pairs, then by powers of r^2: half the latency of Horner's scheme for as many operations.
    const V square = z * z;
    constexpr bool odd = C::terms % 2;
    V q = broadcast<V>(C::series[0]);
    if (!odd) q = fma(q, z, broadcast<V>(C::series[1]));
    for (int term = odd ? 1 : 2; term < C::terms; term += 2)
        q = fma(q, square, fma(broadcast<V>(C::series[term]), z, broadcast<V>(C::series[term + 1])));
    const I one = bit_cast<I>(broadcast<V>(T(1)));
    return {bit_cast<V>((bit_cast<I>(shifted) << C::mantissa_bits) + one), fma(square, q, r)};
}

/// A value as a quotient, so that the product of two values takes one division.
template <class V>
struct Fraction {
    V over;
    V under;
};

/// -|x|.
template <class T, int Lanes>
CELLSTEP_INLINE Vector<T, Lanes> minus_magnitude(Vector<T, Lanes> x) {
    using I = Vector<typename ExpConstants<T>::Bits, Lanes>;
    return bit_cast<Vector<T, Lanes>>(bit_cast<I>(x) | bit_cast<I>(broadcast<Vector<T, Lanes>>(T(-0.0))));
}

/// 1 / (1 + exp(-x)); NaN for NaN; zero, with an infinite denominator, where exp(x) is below the normal numbers. Where
/// it is not, the denominator may be doubled without overflow.
template <class T, int Lanes>
CELLSTEP_INLINE Fraction<Vector<T, Lanes>> sigmoid_fraction(Vector<T, Lanes> x) {
    using V = Vector<T, Lanes>;
    const V vanishes = broadcast<V>(ExpConstants<T>::vanishes);
    const V exponent = x < vanishes ? broadcast<V>(ExpConstants<T>::overflows) : maximum(vanishes, -x);
    const SplitExp<V> split = split_exp<T, Lanes, true>(exponent);
    const V one = broadcast<V>(T(1));
    return {one, fma(split.scale, split.expm1, one) + split.scale};
}

template <class T, int Lanes>
CELLSTEP_INLINE Vector<T, Lanes> sigmoid(Vector<T, Lanes> x) {
    const Fraction<Vector<T, Lanes>> value = sigmoid_fraction<T, Lanes>(x);
    return value.over / value.under;
}

/// The fast variant of tanh: x P(x^2) / Q(x^2) up to a point where it comes as near to 1 as it gets, and constant
/// beyond. Of least maximum error over all x among fits that stay under 1 by more than the roundings: 1.6e-5.
struct FastTanh {
    static constexpr float most = 0x1.99999ap+2f;
    static constexpr float over[] = {0x1.7ae56ep-10f, 0x1.d1887ep-4f, 0x1.fffa56p-1f};  // highest power first
    static constexpr float under[] = {0x1.b4f328p-15f, 0x1.198eaap-6f, 0x1.c994d6p-2f, 1.0f};
};

/// tanh(x / 2^Halvings) / 2^Halvings with an error of 1.6e-5 at most, never past 1 in magnitude; NaN for NaN.
template <class T, int Lanes, int Halvings = 0>
CELLSTEP_INLINE Fraction<Vector<T, Lanes>> fast_tanh_fraction(Vector<T, Lanes> x) {
    using V = Vector<T, Lanes>;
    using C = FastTanh;
    constexpr T doubled = T(1 << Halvings);
    constexpr T step = T(1) / (doubled * doubled);  // from one power of x^2 to the next
    x = maximum(broadcast<V>(-C::most * doubled), minimum(broadcast<V>(C::most * doubled), x));
    const V square = x * x;
    const V over =
        fma(fma(broadcast<V>(C::over[0] * step * step * step), square, broadcast<V>(C::over[1] * step * step)), square,
            broadcast<V>(C::over[2] * step));
    const V high = fma(broadcast<V>(C::under[0] * step * step * step), square, broadcast<V>(C::under[1] * step * step));
    const V low = fma(broadcast<V>(C::under[2] * step), square, broadcast<V>(T(C::under[3])));
    return {over * x, fma(high, square * square, low)};
}

/// The fast variant of the sigmoid, 1/2 + tanh(x / 2) / 2, with an error of 8e-6 at most, between 0 and 1.
template <class T, int Lanes>
CELLSTEP_INLINE Fraction<Vector<T, Lanes>> fast_sigmoid_fraction(Vector<T, Lanes> x) {
    using V = Vector<T, Lanes>;
    const Fraction<V> half = fast_tanh_fraction<T, Lanes, 1>(x);
    return {fma(half.under, broadcast<V>(T(0.5)), half.over), half.under};
}

/// expm1(x) for x up to 0, x above; NaN for NaN.
template <class T, int Lanes>
CELLSTEP_INLINE Vector<T, Lanes> elu(Vector<T, Lanes> x) {
    using V = Vector<T, Lanes>;
    const V saturated = broadcast<V>(T(-44));  // expm1(-44) rounds to -1 in float and in double
    V negative = x < V{} ? x : V{};
    negative = negative < saturated ? saturated : negative;
    const SplitExp<V> split = split_exp<T, Lanes, false>(negative);
    return x < V{} ? fma(split.scale, split.expm1, split.scale - broadcast<V>(T(1))) : x;
}

/// tanh(x) = -t / (2 + t) with t = expm1(-2 |x|), and the sign of x; never past 1 in magnitude; NaN for NaN. The
/// denominator is 1 to 2.
template <class T, int Lanes>
CELLSTEP_INLINE Fraction<Vector<T, Lanes>> tanh_fraction(Vector<T, Lanes> x) {
    using V = Vector<T, Lanes>;
    using I = Vector<typename ExpConstants<T>::Bits, Lanes>;
    const V saturated = broadcast<V>(T(-44));  // tanh(22) rounds to 1 in float and in double
    const V negative = minus_magnitude<T, Lanes>(x);
    const SplitExp<V> split = split_exp<T, Lanes, false>(maximum(saturated, negative + negative));
    const V one = broadcast<V>(T(1));
    const V t = fma(split.scale, split.expm1, split.scale - one);
    const I sign = bit_cast<I>(broadcast<V>(T(-0.0)));
    return {bit_cast<V>((bit_cast<I>(t) & ~sign) | (bit_cast<I>(x) & sign)),
            fma(split.scale, split.expm1, split.scale + one)};
}

template <class T, int Lanes>
CELLSTEP_INLINE Vector<T, Lanes> tanh(Vector<T, Lanes> x) {
    const Fraction<Vector<T, Lanes>> value = tanh_fraction<T, Lanes>(x);
    return value.over / value.under;
}

/// Either variant, as a layer wants them.
template <class T, int Lanes, bool Fast>
CELLSTEP_INLINE Fraction<Vector<T, Lanes>> gate_fraction(Vector<T, Lanes> x) {
    if constexpr (Fast)
        return fast_sigmoid_fraction<T, Lanes>(x);
    else
        return sigmoid_fraction<T, Lanes>(x);
}

template <class T, int Lanes, bool Fast>
CELLSTEP_INLINE Fraction<Vector<T, Lanes>> cell_fraction(Vector<T, Lanes> x) {
    if constexpr (Fast)
        return fast_tanh_fraction<T, Lanes>(x);
    else
        return tanh_fraction<T, Lanes>(x);
}

}  // namespace CELLSTEP_ISA
}  // namespace core
}  // namespace cellstep
