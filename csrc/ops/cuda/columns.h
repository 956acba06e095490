/// What the kernels with sums in float share: a stage's weights in registers and shared memory, a group of lanes for
/// four sums of every row, each of its lanes a share of the columns.
///
/// Forward the four sums are a unit's gates, and the vector they multiply is h and x one behind the other; backward
/// they are the gradients of four units, and the vector is that of the gate sums. The vector lies in shared memory as
/// [column][row], so that one read of 16 bytes serves 4 / rows columns of all rows; a chunk of columns goes to each
/// lane of a group in turn. The lanes that read the same chunk stand side by side in the warp, which lets the hardware
/// serve them together.
///
/// Above 128 units in one block a group owns a fifth sum: forward a gate of a unit that four groups share, backward one
/// more unit. A warp then has 20 units, and its sums go by way of shared memory to the first 20 of its lanes.
#pragma once

#include <cstring>

#include "carried.h"

namespace cellstep {
namespace cuda {

/// Sums of a group come as i, g, f, o, so that halves are what c = f c + i g brings together.
__device__ inline int gate_of(int sum) { return sum == 1 ? 2 : sum == 2 ? 1 : sum; }

/// A value as it lies in memory: to decode it only where it is used lets the load take its time.
__device__ inline std::uint32_t load(const void* data, DataType type, std::int64_t at) {
    return type == DataType::float32 ? static_cast<const std::uint32_t*>(data)[at]
                                     : static_cast<const std::uint16_t*>(data)[at];
}

__device__ inline float decode(std::uint32_t bits, DataType type) {
    if (type == DataType::float16) {
        const std::uint16_t low = static_cast<std::uint16_t>(bits);
        __half half;
        std::memcpy(&half, &low, sizeof(half));
        return to_float(half);
    }
    if (type == DataType::bfloat16) bits <<= 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

__device__ inline void store(void* data, DataType type, std::int64_t at, float value) {
    if (type == DataType::float32)
        static_cast<float*>(data)[at] = value;
    else if (type == DataType::float16)
        static_cast<__half*>(data)[at] = from_float<__half>(value);
    else
        static_cast<__nv_bfloat16*>(data)[at] = from_float<__nv_bfloat16>(value);
}

/// As carried_or().
__device__ inline float state_or(const float* carried, const void* data, DataType type, std::int64_t at) {
    return carried ? carried[at] : data ? decode(load(data, type, at), type) : 0.0f;
}

/// sigmoid_of or tanh_of by a flag that differs over the lanes, without parting them.
__device__ inline float gate_activation(float x, bool is_tanh) {
    const float y = reciprocal_approx(1.0f + exp2_approx((is_tanh ? 2.88539008f : -1.44269504f) * x));
    return is_tanh ? 1.0f - 2.0f * y : y;
}

/// Columns a lane has of `columns`, in whole chunks; at least the `held` ones that registers are there for.
__host__ __device__ constexpr int slots_of(int columns, int lanes, int rows, int held) {
    const int chunk = 4 / rows, slots = ((columns + lanes - 1) / lanes + chunk - 1) / chunk * chunk;
    return slots > held ? slots : held;
}

/// With this many columns in registers a group owns a fifth sum of every row: 160 units are then 8 warps' work, and no
/// more than 8 warps can have 255 registers each.
__host__ __device__ constexpr bool has_fifth(int held) { return held == 36 || held == 40; }

/// Columns in registers where a group has few lanes: as many as the sums of so many rows leave registers for.
constexpr int narrow_held(int rows, bool fifth) {
    if (fifth) return rows == 1 ? 40 : 36;
    return rows == 1 ? 48 : rows == 2 ? 44 : 35;
}

/// Sums of a warp of groups, for a row.
__host__ __device__ constexpr int warp_sums(int lanes, int held) { return 32 / lanes * (has_fifth(held) ? 5 : 4); }

constexpr std::size_t shared_bytes(int slots, int lanes, int rows, int held, int threads) {
    const int exchanged = has_fifth(held) ? threads / 32 * rows * warp_sums(lanes, held) : 0;
    return sizeof(float) * (std::size_t(2) * slots * lanes * rows + exchanged +
                            std::size_t(slots - held) * threads * (has_fifth(held) ? 5 : 4));
}

/// Where a thread stands: `lanes` of a warp make a group, its parts as far from each other as can be.
template <int Lanes>
struct Place {
    static constexpr int groups = 32 / Lanes;
    int warp = static_cast<int>(threadIdx.x) / 32;
    int lane = static_cast<int>(threadIdx.x) % 32;
    int group = lane % groups;  ///< in the warp
    int part = lane / groups;
};

/// A lane's share of the weights: four for each of its columns, or five. Where Lanes is 0, `lanes` is set first.
template <int Lanes, int Held, int Rows>
struct HeldWeights {
    static constexpr int chunk = 4 / Rows;
    static constexpr bool fifth = has_fifth(Held);
    static_assert(Held % chunk == 0, "whole chunks in registers");
    int lanes = Lanes;  ///< of a group
    float4 held[Held];
    float held_fifth[fifth ? Held : 1];
    const float4* rest;
    const float* rest_fifth;
    int rest_chunks;

    /// `column(k)`: the four weights of column k; `fifth_column(k)`: the fifth.
    template <class Column, class FifthColumn>
    __device__ void fill(float4* shared, int slots, int part, const Column& column, const FifthColumn& fifth_column) {
        const auto place = [&](int slot) { return (slot / chunk * lanes + part) * chunk + slot % chunk; };
        float* const shared_fifth = reinterpret_cast<float*>(shared + (slots - Held) * blockDim.x);
#pragma unroll
        for (int slot = 0; slot < Held; ++slot) {
            held[slot] = column(place(slot));
            if constexpr (fifth) held_fifth[slot] = fifth_column(place(slot));
        }
        for (int slot = Held; slot < slots; ++slot) {
            const int at = (slot - Held) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
            shared[at] = column(place(slot));
            if constexpr (fifth) shared_fifth[at] = fifth_column(place(slot));
        }
        rest = shared + threadIdx.x;
        rest_fifth = shared_fifth + threadIdx.x;
        rest_chunks = (slots - Held) / chunk;
    }

    /// The sums of one row behind one another, and behind those of all rows the fifth ones.
    static constexpr int sum_count = (fifth ? 5 : 4) * Rows;

    __device__ static void add(float (&sums)[sum_count], const float4 (&weights)[chunk],
                               const float (&weights_fifth)[chunk], const float4& vector) {
        const float values[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
        for (int at = 0; at < 4; ++at) {
            const float4& weight = weights[at / Rows];
            const int row = at % Rows * 4;
            sums[row] += weight.x * values[at];
            sums[row + 1] += weight.y * values[at];
            sums[row + 2] += weight.z * values[at];
            sums[row + 3] += weight.w * values[at];
            if constexpr (fifth) sums[4 * Rows + at % Rows] += weights_fifth[at / Rows] * values[at];
        }
    }

    /// The sums of this lane's columns.
    __device__ void multiply(float (&sums)[sum_count], const float* vector, int part) const {
        const float4* chunks = reinterpret_cast<const float4*>(vector) + part;
        const float4* more = rest;
        const float* more_fifth = rest_fifth;
#pragma unroll
        for (int at = 0; at < sum_count; ++at) sums[at] = 0.0f;
#pragma unroll
        for (int at = 0; at < Held / chunk; ++at) {
            float4 weights[chunk];
            float weights_fifth[chunk];
#pragma unroll
            for (int k = 0; k < chunk; ++k) {
                weights[k] = held[at * chunk + k];
                weights_fifth[k] = fifth ? held_fifth[at * chunk + k] : 0.0f;
            }
            add(sums, weights, weights_fifth, chunks[at * lanes]);
        }
        chunks += Held / chunk * lanes;
#pragma unroll(fifth ? 1 : 2)
        for (int at = 0; at < rest_chunks; ++at) {
            float4 weights[chunk];
            float weights_fifth[chunk];
#pragma unroll
            for (int k = 0; k < chunk; ++k) {
                weights[k] = more[k * blockDim.x];
                weights_fifth[k] = fifth ? more_fifth[k * blockDim.x] : 0.0f;
            }
            add(sums, weights, weights_fifth, *chunks);
            more += chunk * blockDim.x;
            more_fifth += chunk * blockDim.x;
            chunks += lanes;
        }
    }
};

/// Adds up the sums of a group's lanes, which stand `groups` apart in the warp, and deals them out: with fewer lanes
/// than sums, a lane's are the ones from part * Sums / lanes on; with more, lanes / Sums of them side by side have the
/// same one.
template <int Sums, int Mask = 16>
__device__ inline void deal(float* sums, int groups, int lane) {
    if constexpr (Mask > 0) {
        if (Mask < groups) return;
        constexpr int left = Sums > 1 ? Sums / 2 : 1;
        if constexpr (Sums > 1) {
            const bool upper = (lane & Mask) != 0;
#pragma unroll
            for (int at = 0; at < left; ++at) {
                const float keep = upper ? sums[at + left] : sums[at];
                const float give = upper ? sums[at] : sums[at + left];
                sums[at] = keep + shuffle_xor(give, Mask);
            }
        } else {
            sums[0] += shuffle_xor(sums[0], Mask);
        }
        deal<left, Mask / 2>(sums, groups, lane);
    }
}

/// As deal(), where groups own five sums: by way of shared memory a lane gets those from lane * Own on, of each row.
/// The fifth sums of the warp's groups come behind the others.
template <int Lanes, int Held, int Rows, int Own>
__device__ inline void exchange(float (&sums)[5 * Rows], float* shared, const Place<Lanes>& place,
                                float (&own)[Own * Rows]) {
    constexpr int in_warp = warp_sums(Lanes, Held), groups = Place<Lanes>::groups;
    constexpr int dealt = 4 * Rows > Lanes ? 4 * Rows / Lanes : 1, dealt_fifth = Rows > Lanes ? Rows / Lanes : 1;
    // Of the lanes that have the same sum one writes it.
    constexpr int twins = Lanes > 4 * Rows ? Lanes / (4 * Rows) : 1, twins_fifth = Lanes > Rows ? Lanes / Rows : 1;
    float* const mine = shared + place.warp * (Rows * in_warp);
    deal<4 * Rows>(sums, groups, place.lane);
    deal<Rows>(sums + 4 * Rows, groups, place.lane);
#pragma unroll
    for (int k = 0; k < dealt; ++k) {
        const int at = place.part * 4 * Rows / Lanes + k;
        if (place.part % twins == 0) mine[at / 4 * in_warp + place.group * 4 + at % 4] = sums[k];
    }
#pragma unroll
    for (int k = 0; k < dealt_fifth; ++k)
        if (place.part % twins_fifth == 0)
            mine[(place.part * Rows / Lanes + k) * in_warp + 4 * groups + place.group] = sums[4 * Rows + k];
    warp_sync();
    if (place.lane < in_warp / Own) {
#pragma unroll
        for (int k = 0; k < Own * Rows; ++k) own[k] = mine[k / Own * in_warp + place.lane * Own + k % Own];
    }
}

/// A stage's steps for the rows of one tile.
struct Sweep {
    const Steps& steps;
    int first_row;
    bool falling;  ///< from the last step to the first
    int bound;     ///< steps of the longest row

    __device__ int length(int row) const {
        const int at = first_row + row;
        if (at >= steps.batch) return 0;
        return steps.lengths ? max(0, min(steps.lengths[at], steps.steps)) : steps.steps;
    }
    __device__ int time(int step) const { return falling ? bound - 1 - step : step; }
    /// Token of the batch's first row in that step.
    __device__ int base(int step) const {
        if (step < 0 || step >= bound) return 0;
        const int t = time(step);
        return steps.offsets ? steps.offsets[t] : t * steps.batch;
    }
};

/// `value_count` zeros for every step past a row's length.
__device__ inline void clear_past_lengths(void* data, DataType type, const Sweep& sweep, int rows,
                                          std::int64_t token_stride, int value_count) {
    if (!data || sweep.steps.offsets || !sweep.steps.lengths) return;
    for (int row = 0; row < rows && sweep.first_row + row < sweep.steps.batch; ++row) {
        const std::int64_t begin = sweep.length(row), count = (sweep.steps.steps - begin) * value_count;
        for (std::int64_t at = threadIdx.x; at < count; at += blockDim.x) {
            const std::int64_t token = (begin + at / value_count) * sweep.steps.batch + sweep.first_row + row;
            store(data, type, token * token_stride + at % value_count, 0.0f);
        }
    }
}

__device__ inline void* behind(void* data, DataType type, std::int64_t values) {
    return data ? static_cast<unsigned char*>(data) + values * (type == DataType::float32 ? 4 : 2) : nullptr;
}

template <class T>
struct GateColumns {
    const T* hh;  ///< column 0 of the unit's gate i, or null past the last unit
    const T* ih;
    std::int64_t hh_gate, hh_column, ih_gate, ih_column;
    int hidden_size, columns;

    __device__ GateColumns(const StageWeights& stage, int unit, int hidden, int inputs)
        : hh(nullptr),
          ih(nullptr),
          hh_gate(stage.weight_hh.gate),
          hh_column(stage.weight_hh.column),
          ih_gate(stage.weight_ih.gate),
          ih_column(stage.weight_ih.column),
          hidden_size(hidden),
          columns(unit < hidden ? hidden + inputs : 0) {
        hh = static_cast<const T*>(stage.weight_hh.data) + unit / 16 * stage.weight_hh.panel +
             unit % 16 * stage.weight_hh.unit;
        if (inputs > 0)
            ih = static_cast<const T*>(stage.weight_ih.data) + unit / 16 * stage.weight_ih.panel +
                 unit % 16 * stage.weight_ih.unit;
    }

    __device__ float4 operator()(int k) const {
        if (k >= columns) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const bool recurrent = k < hidden_size;
        const T* at = recurrent ? hh + k * hh_column : ih + (k - hidden_size) * ih_column;
        const std::int64_t gate = recurrent ? hh_gate : ih_gate;
        return make_float4(to_float(at[0]), to_float(at[2 * gate]), to_float(at[gate]), to_float(at[3 * gate]));
    }

    /// The weight of one of the four sums.
    __device__ float sum(int k, int which) const {
        if (k >= columns) return 0.0f;
        const int gate = gate_of(which);
        return k < hidden_size ? to_float(hh[gate * hh_gate + k * hh_column])
                               : to_float(ih[gate * ih_gate + (k - hidden_size) * ih_column]);
    }
};

/// decode() without branches.
struct Decoder {
    bool is_half;
    int shift;

    __device__ explicit Decoder(DataType type)
        : is_half(type == DataType::float16), shift(type == DataType::bfloat16 ? 16 : 0) {}
    __device__ float operator()(std::uint32_t bits) const {
        const float half = decode(bits, DataType::float16);
        return is_half ? half : decode(bits << shift, DataType::float32);
    }
};

/// Column k of weight_hh, of less than 2^32 bytes, for the four gates of a unit, of any type. A kernel that has many
/// forms has this for each column that a lane holds, so that it is to be few instructions.
struct AnyGateColumns {
    const unsigned char* data;
    std::uint32_t first, gate, column;  ///< bytes
    int columns;                        ///< 0 past the last unit
    bool is_wide;
    Decoder decoder;

    __device__ AnyGateColumns(const WeightView& view, DataType type, int unit, int hidden_size)
        : data(static_cast<const unsigned char*>(view.data)),
          columns(unit < hidden_size ? hidden_size : 0),
          is_wide(type == DataType::float32),
          decoder(type) {
        const int size = is_wide ? 4 : 2;
        first = static_cast<std::uint32_t>((unit / 16 * view.panel + unit % 16 * view.unit) * size);
        gate = static_cast<std::uint32_t>(view.gate * size);
        column = static_cast<std::uint32_t>(view.column * size);
    }

    __device__ float weight(std::uint32_t at, bool exists) const {
        std::uint32_t bits = 0;
        if (exists && is_wide) bits = *reinterpret_cast<const std::uint32_t*>(in_global(data) + at);
        if (exists && !is_wide) bits = *reinterpret_cast<const std::uint16_t*>(in_global(data) + at);
        return decoder(bits);
    }

    __device__ float4 operator()(int k) const {
        const std::uint32_t at = first + static_cast<std::uint32_t>(k) * column;
        const bool exists = k < columns;
        return make_float4(weight(at, exists), weight(at + 2 * gate, exists), weight(at + gate, exists),
                           weight(at + 3 * gate, exists));
    }
};

/// Column k of the transposed weight_hh: gate sum k's weights for four units.
template <class T>
struct UnitColumns {
    const WeightView& view;
    int first_unit, hidden_size;

    __device__ float4 operator()(int k) const {
        return make_float4(weight(k, first_unit), weight(k, first_unit + 1), weight(k, first_unit + 2),
                           weight(k, first_unit + 3));
    }

    __device__ float weight(int k, int of_unit) const {
        if (k >= 4 * hidden_size || of_unit >= hidden_size) return 0.0f;
        const int gate = k / hidden_size, unit = k - gate * hidden_size;
        return to_float(static_cast<const T*>(
            view.data)[gate * view.gate + unit / 16 * view.panel + unit % 16 * view.unit + of_unit * view.column]);
    }
};

__device__ inline float bias_of(const WeightView& view, DataType type, int gate, int unit) {
    if (!view.data) return 0.0f;
    return decode(load(view.data, type, gate * view.gate + unit / 16 * view.panel + unit % 16 * view.unit), type);
}

}  // namespace cuda
}  // namespace cellstep
