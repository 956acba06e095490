/// The step of a layer with int8 weights, for the instruction set that a file is compiled for.
///
/// A row of values v, which are the inputs times their factors or the hidden values, becomes
///   q = round(v * (127 / m)), ties to even, with m = max |v|, so that a quiet step is rounded as finely as a loud one;
/// products of q with the weights are summed in int32 without overflow to acc, and a gate sum is
///   bias + scale_x * (acc_x * (m_x / 127)) + scale_h * (acc_h * (m_h / 127))
/// in multiply-adds of this order. The integers are exact, so that neither their order nor the instructions that form
/// them are seen in the bits. What follows is step.h's: activations, and a state in float32, whose c has no bound.
#pragma once

#include "core/rounding.h"
#include "core/step.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace cellstep {
namespace core {
namespace CELLSTEP_ISA {

/// Products of four values with the four weights of each column. `offset`: values are stored plus 128, as the
/// instruction takes them unsigned. `sets`: sums of a column that a single row keeps going, to hide latency.
#if defined(__AVX512VNNI__)
struct Int8Dot {
    using Sums = Vector<std::int32_t, 16>;
    using Values = __m512i;
    static constexpr bool offset = true;
    static constexpr int sets = 3;
    static Values values(std::int32_t four) { return _mm512_set1_epi32(four); }
    static Sums add(Sums sums, Values values, const unsigned char* weights) {
        return bit_cast<Sums>(_mm512_dpbusd_epi32(bit_cast<__m512i>(sums), values, load<__m512i>(weights)));
    }
};
#elif defined(__AVXVNNI__)
struct Int8Dot {
    using Sums = Vector<std::int32_t, 8>;
    using Values = __m256i;
    static constexpr bool offset = true;
    static constexpr int sets = 1;
    static Values values(std::int32_t four) { return _mm256_set1_epi32(four); }
    static Sums add(Sums sums, Values values, const unsigned char* weights) {
        return bit_cast<Sums>(_mm256_dpbusd_avx_epi32(bit_cast<__m256i>(sums), values, load<__m256i>(weights)));
    }
};
#elif defined(__AVX2__)
struct Int8Dot {
    using Sums = Vector<std::int32_t, 8>;
    struct Values {
        __m256i sign;
        __m256i magnitude;
    };
    static constexpr bool offset = false;
    static constexpr int sets = 1;
    static Values values(std::int32_t four) {
        const __m256i all = _mm256_set1_epi32(four);
        return {all, _mm256_abs_epi8(all)};
    }
    static Sums add(Sums sums, Values values, const unsigned char* weights) {
        // Neither operand is past 127 in magnitude, so no pair is past 32258, and the 16 bits do not saturate.
        const __m256i signed_weights = _mm256_sign_epi8(load<__m256i>(weights), values.sign);
        const __m256i pairs = _mm256_maddubs_epi16(values.magnitude, signed_weights);
        return sums + bit_cast<Sums>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
};
#elif defined(__SSE2__)
struct Int8Dot {
    using Sums = Vector<std::int32_t, 4>;
    struct Values {
        __m128i even;
        __m128i odd;
    };
    static constexpr bool offset = false;
    static constexpr int sets = 1;
    /// The bytes at even and at odd places, widened to 16 bits where they lie.
    static Values values(__m128i bytes) {
        return {_mm_srai_epi16(_mm_slli_epi16(bytes, 8), 8), _mm_srai_epi16(bytes, 8)};
    }
    static Values values(std::int32_t four) { return values(_mm_set1_epi32(four)); }
    static Sums add(Sums sums, Values values_, const unsigned char* weights) {
        const Values w = values(load<__m128i>(weights));
        return sums + (bit_cast<Sums>(_mm_madd_epi16(w.even, values_.even)) +
                       bit_cast<Sums>(_mm_madd_epi16(w.odd, values_.odd)));
    }
};
#elif defined(__ARM_FEATURE_DOTPROD)
struct Int8Dot {
    using Sums = Vector<std::int32_t, 4>;
    using Values = int8x16_t;
    static constexpr bool offset = false;
    static constexpr int sets = 1;
    static Values values(std::int32_t four) { return vreinterpretq_s8_s32(vdupq_n_s32(four)); }
    static Sums add(Sums sums, Values values, const unsigned char* weights) {
        return bit_cast<Sums>(vdotq_s32(bit_cast<int32x4_t>(sums), values, load<int8x16_t>(weights)));
    }
};
#else
struct Int8Dot {
    using Sums = Vector<std::int32_t, 4>;
    using Values = Vector<signed char, 4>;
    static constexpr bool offset = false;
    static constexpr int sets = 1;
    static Values values(std::int32_t four) { return bit_cast<Values>(four); }
    static Sums add(Sums sums, Values values, const unsigned char* weights) {
        for (int column = 0; column < 4; ++column)
            for (int k = 0; k < 4; ++k) sums[column] += values[k] * static_cast<signed char>(weights[4 * column + k]);
        return sums;
    }
};
#endif

/// Some rows of values as int8, each padded to whole vectors, and m / 127 of each row, NaN if one of its values is.
struct Int8Rows {
    unsigned char* values = nullptr;
    std::size_t stride = 0;
    float* scales = nullptr;
};

/// The integer sums of some rows for some vectors of columns. `begin` holds those of values plus 128.
template <int Rows, int Vectors>
inline void int8_sums(const Int8Rows& rows, std::size_t row, std::size_t groups, const unsigned char* weights,
                      std::size_t weight_stride, const std::int32_t* begin, std::int32_t* sums,
                      std::size_t sums_stride) {
    using Sums = Int8Dot::Sums;
    constexpr int lanes = static_cast<int>(sizeof(Sums) / sizeof(std::int32_t));
    constexpr int sets = Rows == 1 ? Int8Dot::sets : 1;
    Sums sum[sets][Rows][Vectors];
    for (int set = 0; set < sets; ++set)
        for (int r = 0; r < Rows; ++r)
            for (int v = 0; v < Vectors; ++v)
                sum[set][r][v] = Int8Dot::offset && set == 0 ? load<Sums>(begin + v * lanes) : Sums{};
    const unsigned char* values = rows.values + row * rows.stride;
    const auto add = [&](std::size_t group, int set) {
        for (int r = 0; r < Rows; ++r) {
            const auto four =
                Int8Dot::values(load<std::int32_t>(values + static_cast<std::size_t>(r) * rows.stride + 4 * group));
            for (int v = 0; v < Vectors; ++v)
                sum[set][r][v] = Int8Dot::add(sum[set][r][v], four, weights + group * weight_stride + 4 * lanes * v);
        }
    };
    std::size_t group = 0;
    for (; group + sets <= groups; group += sets)
        for (int set = 0; set < sets; ++set) add(group + static_cast<std::size_t>(set), set);
    for (; group < groups; ++group) add(group, 0);
    for (int r = 0; r < Rows; ++r) {
        for (int v = 0; v < Vectors; ++v) {
            Sums total = sum[0][r][v];
            for (int set = 1; set < sets; ++set) total += sum[set][r][v];
            store(sums + static_cast<std::size_t>(r) * sums_stride + v * lanes, total);
        }
    }
}

/// Adds the scaled integer sums to the gate sums of some rows.
template <int Width, int Rows>
inline void int8_part(const Int8Rows& rows, std::size_t row, std::size_t values, const unsigned char* weights,
                      const float* scale, const std::int32_t* begin, float (&sums)[Rows][gate_count * Width]) {
    constexpr std::size_t columns = gate_count * Width;
    constexpr int lanes = static_cast<int>(sizeof(Int8Dot::Sums) / sizeof(std::int32_t));
    constexpr int vectors = static_cast<int>(columns) / lanes;
    constexpr int most = lanes == 16 ? 4 : Rows == 1 ? 8 : 4;
    constexpr int block = vectors < most ? vectors : most;
    using V = Vector<float, native_lanes<float>>;
    using I = Vector<std::int32_t, native_lanes<float>>;
    const std::size_t groups = static_cast<std::size_t>(int8_groups(values));
    std::int32_t integers[Rows][columns];
    for (int v = 0; v < vectors; v += block)
        int8_sums<Rows, block>(rows, row, groups, weights + 4 * lanes * v, 4 * columns, begin + v * lanes,
                               integers[0] + v * lanes, columns);
    for (int r = 0; r < Rows; ++r) {
        const V row_scale = broadcast<V>(rows.scales[row + static_cast<std::size_t>(r)]);
        for (std::size_t at = 0; at < columns; at += static_cast<std::size_t>(native_lanes<float>)) {
            const V part = convert<V>(load<I>(integers[r] + at)) * row_scale;
            store(sums[r] + at, fma(load<V>(scale + at), part, load<V>(sums[r] + at)));
        }
    }
}

/// Some rows of one panel: `first` is the row of the step that the rounded ones begin with.
template <int Width, int Rows>
inline void int8_rows(const Int8Step<float>& call, std::size_t first, std::size_t row, std::size_t unit,
                      const unsigned char* panel, const Int8Rows& x, const Int8Rows& h) {
    constexpr std::size_t columns = gate_count * Width;
    constexpr int lanes = native_lanes<float>;
    constexpr int vectors = static_cast<int>(columns) / lanes;
    using V = Vector<float, lanes>;
    const Step<float>& s = call.step;
    const float* bias = reinterpret_cast<const float*>(panel);
    const auto* begin = reinterpret_cast<const std::int32_t*>(panel + 12 * columns);
    const unsigned char* weights = panel + 20 * columns;
    const auto kept = [&](std::size_t r) {
        return s.sums + gate_count * unit * s.sums_rows + (s.sums_row + first + row + r) * columns;
    };
    const bool from_sums = call.part == Int8Part::recurrent || (call.part == Int8Part::whole && s.sums);
    float sums[Rows][columns];
    for (std::size_t r = 0; r < Rows; ++r) {
        if (call.part == Int8Part::inputs)
            for (std::size_t at = 0; at < columns; ++at) sums[r][at] = 0.0f;
        else
            __builtin_memcpy(sums[r], from_sums ? kept(r) : bias, sizeof(sums[r]));
    }
    if (x.values) int8_part<Width, Rows>(x, row, s.input_size, weights, bias + columns, begin, sums);
    if (h.values)
        int8_part<Width, Rows>(h, row, s.recurrent_size,
                               weights + 4 * columns * static_cast<std::size_t>(int8_groups(s.input_size)),
                               bias + 2 * columns, begin + columns, sums);
    for (std::size_t r = 0; r < Rows; ++r) {
        if (call.part == Int8Part::whole) {
            V sum[vectors];
            for (int v = 0; v < vectors; ++v) sum[v] = load<V>(sums[r] + v * lanes);
            move_panel<float, Width, vectors>(row_state(s, first + row + r), unit, sum);
        } else {
            __builtin_memcpy(kept(r), sums[r], sizeof(sums[r]));
        }
    }
}

template <int Width>
inline void int8_panel(const Int8Step<float>& call, std::size_t first, std::size_t count, std::size_t unit,
                       const unsigned char* panel, const Int8Rows& x, const Int8Rows& h) {
    constexpr int at_once = native_registers == 32 ? 4 : 2;
    std::size_t row = 0;
    for (; row + at_once <= count; row += at_once) int8_rows<Width, at_once>(call, first, row, unit, panel, x, h);
    for (; row < count; ++row) int8_rows<Width, 1>(call, first, row, unit, panel, x, h);
}

inline void int8_step(const Int8Step<float>& call) CELLSTEP_NONBLOCKING {
    const Step<float>& s = call.step;
    const auto* factors = static_cast<const float*>(s.packed);
    const unsigned char* packed = first_panel(WeightType::int8, s.packed, s.input_size);
    const std::size_t full_bytes = panel_stride<float>(WeightType::int8, 16, s.input_size, s.recurrent_size);
    const bool inputs = call.part != Int8Part::recurrent && !(call.part == Int8Part::whole && s.sums);
    const bool recurrent = call.part == Int8Part::whole || call.part == Int8Part::recurrent;
    // So many rows that 64 (rows + input_size + recurrent_size) floats hold their int8 values.
    constexpr std::size_t most_rows = 64;
    for (std::size_t first = 0; first < s.rows; first += most_rows) {
        const std::size_t count = s.rows - first < most_rows ? s.rows - first : most_rows;
        float* memory = s.scratch;
        const auto round = [&](bool wanted, const float* from, std::ptrdiff_t stride, std::size_t values,
                               const float* row_factors) {
            Int8Rows rows;
            if (!wanted) return rows;
            rows.scales = memory;
            rows.values = reinterpret_cast<unsigned char*>(memory + count);
            rows.stride = (values + 15) / 16 * 16;
            memory += count + count * rows.stride / sizeof(float);
            for (std::size_t row = 0; row < count; ++row)
                rows.scales[row] = round_row<Int8Dot::offset>(from + static_cast<std::ptrdiff_t>(first + row) * stride,
                                                              values, row_factors, rows.values + row * rows.stride);
            return rows;
        };
        const Int8Rows x = round(inputs, s.x, s.x_stride, s.input_size, factors);
        const Int8Rows h = round(recurrent, s.h, s.h_stride, s.recurrent_size, nullptr);
        const std::size_t panels = full_panels(s.last_unit - s.first_unit);
        const auto tail = [&] {
            std::size_t unit = s.first_unit + 16 * panels;
            const unsigned char* panel = packed + unit / 16 * full_bytes;
            while (unit < s.last_unit) {
                const std::size_t width = panel_width(s.last_unit - unit);
                if (width == 8)
                    int8_panel<8>(call, first, count, unit, panel, x, h);
                else
                    int8_panel<4>(call, first, count, unit, panel, x, h);
                unit += width;
                panel += panel_stride<float>(WeightType::int8, width, s.input_size, s.recurrent_size);
            }
        };
        if (s.backwards) tail();
        for (std::size_t at = 0; at < panels; ++at) {
            const std::size_t unit = s.first_unit + 16 * (s.backwards ? panels - 1 - at : at);
            int8_panel<16>(call, first, count, unit, packed + unit / 16 * full_bytes, x, h);
        }
        if (!s.backwards) tail();
    }
}

}  // namespace CELLSTEP_ISA
}  // namespace core
}  // namespace cellstep
