/// How the values of a layer with int8 weights are rounded: q = round(v * (127 / m)), ties to even, with m = max |v|.
#pragma once

#include "core/activations.h"
#include "core/product.h"
#include "core/simd.h"

namespace cellstep {
namespace core {
namespace CELLSTEP_ISA {

/// Rounds a row, whose values are multiplied by `factors` first unless that is null, to `rounded`, as many as fill
/// whole vectors, each plus 128 where Offset says so. Returns m / 127, NaN if one of the values is.
template <bool Offset>
inline float round_row(const float* row, std::size_t count, const float* factors, unsigned char* rounded) {
    constexpr int lanes = native_lanes<float>;
    using V = Vector<float, lanes>;
    using I = Vector<std::int32_t, lanes>;
    using Bytes = Vector<unsigned char, lanes>;
    const auto value = [&](std::size_t at) {
        const V x = load_part<V>(row + at, count - at);
        return factors ? x * load_part<V>(factors + at, count - at) : x;
    };
    V most{};
    V strange{};
    for (std::size_t at = 0; at < count; at += static_cast<std::size_t>(lanes)) {
        const V v = value(at);
        const V size = -minus_magnitude<float, lanes>(v);
        most = size > most ? size : most;
        strange += v == v ? V{} : v;
    }
    float largest = 0.0f;
    float nan = 0.0f;
    for (int lane = 0; lane < lanes; ++lane) {
        const float size = lane_of<float>(most, lane);
        largest = size > largest ? size : largest;
        nan += lane_of<float>(strange, lane);
    }
    // Past these bounds a quotient would not be a number: all of a row may be taken for zero, and infinity be cut.
    constexpr float least = 1e-30f;
    constexpr float greatest = 3e38f;
    largest = largest < least ? 0.0f : largest > greatest ? greatest : largest;
    const V fine = broadcast<V>(largest > 0.0f ? 127.0f / largest : 0.0f);
    const V limit = broadcast<V>(127.0f);
    const V shift = broadcast<V>(ExpConstants<float>::round_to_int);
    for (std::size_t at = 0; at < count; at += static_cast<std::size_t>(lanes)) {
        V v = value(at) * fine;
        v = v > limit ? limit : v;
        v = v < -limit ? -limit : v;
        const I whole = bit_cast<I>(v + shift) - bit_cast<I>(shift) + (Offset ? 128 : 0);
        store(rounded + at, convert<Bytes>(whole));
    }
    return largest / 127.0f + nan;
}

}  // namespace CELLSTEP_ISA
}  // namespace core
}  // namespace cellstep
