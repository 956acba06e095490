// One block runs one stage over a tile of one, two or four rows, from the first step to the last, with one barrier a
// step. The stage's weights stay on the multiprocessor: in registers as far as those go, the rest in shared memory.
//
// Both ways come down to one product a step: a group of lanes owns four sums of every row, and each of its lanes a
// share of the columns. Forward the four sums are a unit's gates, and the vector they multiply is h and x one behind
// the other; backward they are the gradients of four units, and the vector is that of the gate sums. The vector lies in
// shared memory as [column][row], so that one read of 16 bytes serves 4 / rows columns of all rows; a chunk of columns
// goes to each lane of a group in turn. The lanes that read the same chunk stand side by side in the warp, which lets
// the hardware serve them together. A step's vector is double: one is read while the next is written.
//
// Above 128 units a group owns a fifth sum: forward a gate of a unit that four groups share, backward one more unit. A
// warp then has 20 units, and its sums go by way of shared memory to the first 20 of its lanes.

#include <cmath>
#include <cstring>

#include "device.h"
#include "kernels.h"

namespace cellstep {
namespace cuda {
namespace {

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
__host__ __device__ constexpr bool has_fifth(int held) { return held == 38 || held == 40; }

/// Columns in registers where a group has few lanes: as many as the sums of so many rows leave registers for.
constexpr int narrow_held(int rows, bool fifth) {
    if (fifth) return rows == 1 ? 40 : 38;
    return rows == 1 ? 48 : rows == 2 ? 44 : 36;
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

/// A lane's share of the weights: four for each of its columns, or five.
template <int Lanes, int Held, int Rows>
struct Weights {
    static constexpr int chunk = 4 / Rows;
    static constexpr bool fifth = has_fifth(Held);
    static_assert(Held % chunk == 0, "whole chunks in registers");
    float4 held[Held];
    float held_fifth[fifth ? Held : 1];
    const float4* rest;
    const float* rest_fifth;
    int rest_chunks;

    /// `column(k)`: the four weights of column k; `fifth_column(k)`: the fifth.
    template <class Column, class FifthColumn>
    __device__ void fill(float4* shared, int slots, int part, const Column& column, const FifthColumn& fifth_column) {
        const auto place = [&](int slot) { return (slot / chunk * Lanes + part) * chunk + slot % chunk; };
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
            add(sums, weights, weights_fifth, chunks[at * Lanes]);
        }
        chunks += Held / chunk * Lanes;
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
            chunks += Lanes;
        }
    }
};

/// Adds up the sums of a group's lanes and deals them out: with fewer lanes than sums, a lane's are the ones from
/// part * Sums / Lanes on; with more, Lanes / Sums lanes side by side have the same one.
template <int Lanes, int Sums, int Bit = Lanes / 2>
__device__ inline void deal(float* sums, int part) {
    constexpr int left = Sums > 1 ? Sums / 2 : 1;
    constexpr int mask = Bit * (32 / Lanes);
    if constexpr (Sums > 1) {
        const bool upper = (part & Bit) != 0;
#pragma unroll
        for (int at = 0; at < left; ++at) {
            const float keep = upper ? sums[at + left] : sums[at];
            const float give = upper ? sums[at] : sums[at + left];
            sums[at] = keep + shuffle_xor(give, mask);
        }
    } else {
        sums[0] += shuffle_xor(sums[0], mask);
    }
    if constexpr (Bit > 1) deal<Lanes, left, Bit / 2>(sums, part);
}

/// As deal(), where groups own five sums: by way of shared memory a lane gets those from lane * Own on, of each row.
/// The fifth sums of the warp's groups come behind the others.
template <int Lanes, int Held, int Rows, int Own>
__device__ inline void exchange(float (&sums)[5 * Rows], float* shared, const Place<Lanes>& place,
                                float (&own)[Own * Rows]) {
    constexpr int in_warp = warp_sums(Lanes, Held), groups = Place<Lanes>::groups;
    constexpr int dealt = 4 * Rows > Lanes ? 4 * Rows / Lanes : 1, dealt_fifth = Rows > Lanes ? Rows / Lanes : 1;
    float* const mine = shared + place.warp * (Rows * in_warp);
    deal<Lanes, 4 * Rows>(sums, place.part);
    deal<Lanes, Rows>(sums + 4 * Rows, place.part);
#pragma unroll
    for (int k = 0; k < dealt; ++k) {
        const int at = place.part * 4 * Rows / Lanes + k;
        mine[at / 4 * in_warp + place.group * 4 + at % 4] = sums[k];
    }
#pragma unroll
    for (int k = 0; k < dealt_fifth; ++k)
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

/// Inputs of a step that a thread loads at most.
constexpr int inputs_ahead = 2;

struct ForwardTask {
    Forward call;
    int publish_every;  ///< steps after which the next layer's block is told
};

/// The most threads a block of a configuration has: they get as many registers as that leaves.
__host__ __device__ constexpr int most_threads(int held) { return held > 24 ? 256 : 384; }

template <int Lanes, int Held, int Rows>
__global__ void __launch_bounds__(most_threads(Held)) forward(const __grid_constant__ ForwardTask task) {
    constexpr bool fifth = has_fifth(Held);
    constexpr int own_rows = fifth ? Rows : Rows >= Lanes ? Rows / Lanes : 1;
    constexpr int own_gates = fifth || Rows >= Lanes ? 4 : 4 * Rows / Lanes;
    constexpr int warp_units = warp_sums(Lanes, Held) / 4;
    constexpr bool only_given = fifth;  // inputs find no room: the code for them, and its registers, can go

    const Forward& call = task.call;
    const DataType type = call.type;
    const int layers = only_given ? 1 : call.layers;
    const int hidden = call.hidden_size, stages = layers * call.directions;
    const int thread = threadIdx.x;
    float* const vectors = reinterpret_cast<float*>(shared_memory());

    // Blocks take their part in the order in which they start, so that one only ever waits for ones that run.
    int ticket = blockIdx.x;
    if (layers > 1) {
        int* const word = reinterpret_cast<int*>(vectors);
        if (thread == 0) *word = fetch_add(call.progress, 1);
        block_sync();
        ticket = *word;
        block_sync();
    }
    const int tile = ticket / stages, stage = ticket % stages;
    const int layer = stage / call.directions, direction = stage % call.directions;
    int* const flags = layers > 1 ? call.progress + 1 + tile * stages : nullptr;
    const bool publishes = layer + 1 < layers;

    Sweep sweep{call.steps, tile * Rows, call.directions == 2 ? direction == 1 : call.reverse, 0};
#pragma unroll
    for (int row = 0; row < Rows; ++row) sweep.bound = max(sweep.bound, sweep.length(row));
    const int bound = sweep.bound;

    const int features = call.directions * hidden;
    const bool given_sums = only_given || call.sums;
    const int inputs = given_sums ? 0 : layer == 0 ? call.input_size : features;
    const int slots = slots_of(hidden + inputs, Lanes, Rows, Held);
    const int vector_size = slots * Lanes * Rows;
    const Place<Lanes> place;
    const int part = place.part;
    const int group_unit = place.warp * warp_units + place.group;
    const int unit = fifth ? place.warp * warp_units + place.lane : group_unit;
    const bool real = unit < hidden && (!fifth || place.lane < warp_units);
    const void* const x = layer == 0 ? call.x : behind(call.outputs, type, (layer - 1) * call.steps.tokens * features);
    void* const y =
        behind(layer + 1 == layers ? call.y : behind(call.outputs, type, layer * call.steps.tokens * features), type,
               direction * hidden);
    // Tokens of the stages before, in arrays that have them all.
    const int stage_tokens = stage * static_cast<int>(call.steps.tokens);

    Weights<Lanes, Held, Rows> weights;
    float4* const rest = reinterpret_cast<float4*>(vectors + 2 * vector_size);
    float* const exchanged = reinterpret_cast<float*>(rest) + (slots - Held) * static_cast<int>(blockDim.x) * 5;
    const StageWeights& source = call.stages[stage];
    const auto fill = [&](auto zero) {
        using T = decltype(zero);
        // A fifth sum is a gate of a unit that four groups share.
        const GateColumns<T> shared_unit(source, place.warp * warp_units + Place<Lanes>::groups + place.group / 4,
                                         hidden, inputs);
        weights.fill(rest, slots, part, GateColumns<T>(source, group_unit, hidden, inputs),
                     [&](int k) { return shared_unit.sum(k, place.group % 4); });
    };
    if (type == DataType::float32)
        fill(float());
    else if (type == DataType::float16)
        fill(__half());
    else
        fill(__nv_bfloat16());

    // What this lane has behind deal(): own_rows rows with all their gates, or some gates of one row.
    const int share = own_gates == 4 ? 0 : part % (Lanes / Rows);
    const int own_row = fifth ? 0 : Rows >= Lanes ? part * own_rows : part / (Lanes / Rows);
    const bool keeps_state = real && (own_gates == 4 || share == (own_gates == 2 ? 1 : 2));
    float bias[own_gates], h[own_rows], c[own_rows];
    int lengths[own_rows];
#pragma unroll
    for (int at = 0; at < own_gates; ++at) {
        const int gate = gate_of(share * own_gates + at);
        bias[at] = real ? bias_of(source.bias_ih, type, gate, unit) + bias_of(source.bias_hh, type, gate, unit) : 0.0f;
    }
    const auto state_at = [&](int at) {
        return (static_cast<std::int64_t>(stage) * call.steps.batch + sweep.first_row + own_row + at) * hidden + unit;
    };
    const auto exists = [&](int at) { return real && sweep.first_row + own_row + at < call.steps.batch; };
#pragma unroll
    for (int at = 0; at < own_rows; ++at) {
        lengths[at] = real ? sweep.length(own_row + at) : 0;
        h[at] = exists(at) ? decode(load(call.h, type, state_at(at)), type) : 0.0f;
        c[at] = exists(at) ? decode(load(call.c, type, state_at(at)), type) : 0.0f;
    }
    const auto initial = [&](const void* data) {
        return data ? decode(load(data, type, static_cast<std::int64_t>(stage) * hidden + unit), type) : 0.0f;
    };
    /// Not 0: the state is put to the initial one before that step.
    const auto reset_before = [&](int step, int at) -> unsigned char {
        if (!call.steps.reset || step >= bound) return 0;
        const int t = sweep.time(step) + (sweep.falling ? 1 : 0);
        if (sweep.time(step) >= lengths[at] || t >= lengths[at]) return 0;
        return call.steps.reset[static_cast<std::int64_t>(t) * call.steps.batch + sweep.first_row + own_row + at];
    };

    // Thread 0 sees to it that the layer before has done what a step reads.
    int seen[2] = {0, 0};
    const auto wait_for = [&](int step) {
        if (layer == 0 || thread != 0 || bound == 0) return;
        const int t = sweep.time(min(step, bound - 1));
#pragma unroll
        for (int before = 0; before < 2; ++before) {
            if (before >= call.directions) break;
            const bool falls = call.directions == 2 ? before == 1 : call.reverse;
            const int needed = falls ? bound - t : t + 1;
            while (seen[before] < needed) {
                seen[before] = load_acquire(flags + (layer - 1) * call.directions + before);
                if (seen[before] < needed) pause();
            }
        }
    };

    // Inputs of a step come by way of registers, loaded a step before they are stored.
    int input_place[inputs_ahead], input_offset[inputs_ahead], input_length[inputs_ahead];
    std::uint32_t ahead[inputs_ahead];
#pragma unroll
    for (int at = 0; at < inputs_ahead; ++at) {
        const int index = thread + at * static_cast<int>(blockDim.x);
        const int row = inputs > 0 ? index / inputs : 0, k = inputs > 0 ? index % inputs : 0;
        const bool used = index < Rows * inputs;
        input_place[at] = used ? (hidden + k) * Rows + row : -1;
        input_length[at] = used ? sweep.length(row) : 0;
        input_offset[at] = (sweep.first_row + row) * inputs + k;
        ahead[at] = 0;
    }
    const auto load_inputs = [&](int step, int base) {
        const int t = step < bound ? sweep.time(step) : call.steps.steps;
#pragma unroll
        for (int at = 0; at < inputs_ahead; ++at)
            ahead[at] =
                t < input_length[at] ? load(x, type, static_cast<std::int64_t>(base) * inputs + input_offset[at]) : 0u;
    };
    const auto store_inputs = [&](float* vector) {
#pragma unroll
        for (int at = 0; at < inputs_ahead; ++at)
            if (input_place[at] >= 0) vector[input_place[at]] = decode(ahead[at], type);
    };
    std::uint32_t given[own_rows * own_gates] = {};
    const auto load_sums = [&](int step, int base) {
        const int t = step < bound ? sweep.time(step) : call.steps.steps;
#pragma unroll
        for (int at = 0; at < own_rows * own_gates; ++at) {
            const int row = at / own_gates, gate = gate_of(share * own_gates + at % own_gates);
            given[at] = t < lengths[row]
                            ? load(call.sums, type,
                                   std::int64_t(stage_tokens + base + sweep.first_row + own_row + row) * (4 * hidden) +
                                       (gate * hidden + unit))
                            : 0u;
        }
    };

    for (int at = thread; at < 2 * vector_size; at += blockDim.x) vectors[at] = 0.0f;
    for (int step = 0; step < 3; ++step) wait_for(step);
    block_sync();
    int base = sweep.base(0), next_base = sweep.base(1), third_base = sweep.base(2);
    if (given_sums) {
        load_sums(0, base);
    } else {
        load_inputs(0, base);
        store_inputs(vectors);
        load_inputs(1, next_base);
    }
#pragma unroll
    for (int at = 0; at < own_rows; ++at) {
        if (reset_before(0, at)) {
            h[at] = initial(call.initial_h);
            c[at] = initial(call.initial_c);
        }
        if (keeps_state) vectors[unit * Rows + own_row + at] = h[at];
    }

    float *vector = vectors, *next = vectors + vector_size;
    int to_publish = task.publish_every;
    for (int step = 0; step < bound; ++step) {
        const int t = sweep.time(step);
        block_sync();
        // All of the block has written what came before the barrier; a release behind it covers that.
        if (publishes && thread == 0 && step == to_publish) {
            store_release(flags + stage, step);
            to_publish += task.publish_every;
        }
        const int fourth_base = sweep.base(step + 3);
        unsigned char reset[own_rows];
#pragma unroll
        for (int at = 0; at < own_rows; ++at) reset[at] = reset_before(step + 1, at);

        float sums[Weights<Lanes, Held, Rows>::sum_count];
        weights.multiply(sums, vector, part);
        if constexpr (fifth) {
            float own[4 * Rows] = {};
            exchange<Lanes, Held, Rows, 4>(sums, exchanged, place, own);
#pragma unroll
            for (int at = 0; at < 4 * Rows; ++at) sums[at] = own[at];
        } else {
            deal<Lanes, 4 * Rows>(sums, part);
        }

#pragma unroll
        for (int at = 0; at < own_rows; ++at) {
            const bool active = t < lengths[at];
            const int token = base + sweep.first_row + own_row + at;
            float gate[own_gates];
#pragma unroll
            for (int index = 0; index < own_gates; ++index) {
                const int sum = share * own_gates + index;
                float value = sums[at * own_gates + index] + bias[index];
                if (given_sums) value += decode(given[at * own_gates + index], type);
                gate[index] = gate_activation(value, sum == 1);
            }
            float product, f, o;
            if constexpr (own_gates == 4) {
                product = gate[0] * gate[1];
                f = gate[2];
                o = gate[3];
            } else if constexpr (own_gates == 2) {
                product = shuffle_xor(gate[0] * gate[1], 32 / Lanes);
                f = gate[0];
                o = gate[1];
            } else {
                f = gate[0];
                o = shuffle_xor(gate[0], 8);
                product = shuffle_xor(f * o, 16);
            }
            if (keeps_state) {
                if (active) {
                    c[at] = f * c[at] + product;
                    h[at] = o * tanh_of(c[at]);
                }
                const float last = h[at], last_cell = c[at];
                if (reset[at]) {
                    h[at] = initial(call.initial_h);
                    c[at] = initial(call.initial_c);
                }
                next[unit * Rows + own_row + at] = h[at];
                if (active) {
                    store(y, type, std::int64_t(token) * features + unit, last);
                    if (call.cells)
                        store(call.cells, type, std::int64_t(stage_tokens + token) * hidden + unit, last_cell);
                }
            }
            if (call.gates && active) {
#pragma unroll
                for (int index = 0; index < own_gates; ++index)
                    store(call.gates, type,
                          std::int64_t(stage_tokens + token) * (4 * hidden) +
                              (gate_of(share * own_gates + index) * hidden + unit),
                          gate[index]);
            }
        }
        if (given_sums) {
            load_sums(step + 1, next_base);
        } else {
            store_inputs(next);
            load_inputs(step + 2, third_base);
        }
        base = next_base;
        next_base = third_base;
        third_base = fourth_base;
        float* const last_vector = vector;
        vector = next;
        next = last_vector;
        wait_for(step + 3);
    }
    block_sync();
    if (publishes && thread == 0) store_release(flags + stage, bound);

#pragma unroll
    for (int at = 0; at < own_rows; ++at) {
        if (!keeps_state || !exists(at)) continue;
        store(call.h_n, type, state_at(at), h[at]);
        store(call.c_n, type, state_at(at), c[at]);
    }
    clear_past_lengths(y, type, sweep, Rows, features, hidden);
    clear_past_lengths(behind(call.gates, type, std::int64_t(stage_tokens) * 4 * hidden), type, sweep, Rows, 4 * hidden,
                       4 * hidden);
    clear_past_lengths(behind(call.cells, type, std::int64_t(stage_tokens) * hidden), type, sweep, Rows, hidden,
                       hidden);
}

template <int Lanes, int Held, int Rows>
__global__ void __launch_bounds__(most_threads(Held)) backward(const __grid_constant__ Backward call) {
    static_assert(Lanes >= 4 * Rows, "a lane has one unit of one row, or with a fifth sum of all rows");
    constexpr bool fifth = has_fifth(Held);
    constexpr int own_rows = fifth ? Rows : 1;
    constexpr int twins = fifth ? 1 : Lanes / (4 * Rows);  // lanes with the same unit and row, which part the gates
    constexpr int warp_units = warp_sums(Lanes, Held);

    const DataType type = call.type;
    const int hidden = call.hidden_size, features = call.directions * hidden;
    const int direction = blockIdx.x % call.directions;
    Sweep sweep{call.steps, static_cast<int>(blockIdx.x / call.directions) * Rows,
                !(call.directions == 2 ? direction == 1 : call.reverse), 0};
#pragma unroll
    for (int row = 0; row < Rows; ++row) sweep.bound = max(sweep.bound, sweep.length(row));
    const int bound = sweep.bound;

    const int slots = slots_of(4 * hidden, Lanes, Rows, Held);
    const int vector_size = slots * Lanes * Rows;
    float* const vectors = reinterpret_cast<float*>(shared_memory());
    const Place<Lanes> place;
    const int part = place.part, twin = part % twins;
    const int row = fifth ? 0 : part / twins / 4;
    const int unit = place.warp * warp_units + (fifth ? place.lane : place.group * 4 + part / twins % 4);
    const bool has_unit = unit < hidden && (!fifth || place.lane < warp_units);
    const auto exists = [&](int at) { return has_unit && sweep.first_row + row + at < call.steps.batch; };

    Weights<Lanes, Held, Rows> weights;
    float4* const rest = reinterpret_cast<float4*>(vectors + 2 * vector_size);
    float* const exchanged = reinterpret_cast<float*>(rest) + (slots - Held) * static_cast<int>(blockDim.x) * 5;
    const WeightView& source = call.weight_hh[direction];
    const auto fill = [&](auto zero) {
        using T = decltype(zero);
        const UnitColumns<T> columns{source, place.warp * warp_units + place.group * 4, hidden};
        const int fifth_unit = place.warp * warp_units + 4 * Place<Lanes>::groups + place.group;
        weights.fill(rest, slots, part, columns, [&](int k) { return columns.weight(k, fifth_unit); });
    };
    if (type == DataType::float32)
        fill(float());
    else if (type == DataType::float16)
        fill(__half());
    else
        fill(__nv_bfloat16());

    // Tokens of the other direction, in arrays that have both apart.
    const int stage_tokens = direction * static_cast<int>(call.steps.tokens);
    const auto state_at = [&](int at) {
        return (static_cast<std::int64_t>(direction) * call.steps.batch + sweep.first_row + row + at) * hidden + unit;
    };
    int lengths[own_rows];
    float grad_h[own_rows], grad_c[own_rows];
#pragma unroll
    for (int at = 0; at < own_rows; ++at) {
        lengths[at] = exists(at) ? sweep.length(row + at) : 0;
        grad_h[at] = exists(at) && call.grad_h_n ? decode(load(call.grad_h_n, type, state_at(at)), type) : 0.0f;
        grad_c[at] = exists(at) && call.grad_c_n ? decode(load(call.grad_c_n, type, state_at(at)), type) : 0.0f;
    }

    // Of the step to come; `before` is the cell the step began with, unless it was reset.
    struct Saved {
        std::uint32_t gate[4] = {0, 0, 0, 0}, cell = 0, before = 0, to_output = 0, to_cell = 0;
        unsigned char reset = 0;
    };
    Saved saved[own_rows];
    const auto fetch = [&](int step, int base, int base_before) {
        const int t = step < bound ? sweep.time(step) : call.steps.steps;
#pragma unroll
        for (int at = 0; at < own_rows; ++at) {
            if (t >= lengths[at]) continue;
            Saved& to = saved[at];
            const int token = base + sweep.first_row + row + at, of_stage = stage_tokens + token;
#pragma unroll
            for (int gate = 0; gate < 4; ++gate)
                to.gate[gate] = load(call.gates, type, std::int64_t(of_stage) * (4 * hidden) + (gate * hidden + unit));
            to.cell = load(call.cells, type, std::int64_t(of_stage) * hidden + unit);
            if (call.grad_outputs)
                to.to_output =
                    load(call.grad_outputs, type, std::int64_t(token) * features + (direction * hidden + unit));
            if (call.grad_cells) to.to_cell = load(call.grad_cells, type, std::int64_t(of_stage) * hidden + unit);
            const bool first = sweep.falling ? t == 0 : t + 1 == lengths[at];
            to.before =
                first ? load(call.c, type, state_at(at))
                      : load(call.cells, type,
                             std::int64_t(stage_tokens + base_before + sweep.first_row + row + at) * hidden + unit);
            // A stage that goes backwards comes to step t from t + 1, and the flag of that one parts them.
            const int flag = sweep.falling ? t : t + 1;
            to.reset =
                call.steps.reset && flag < lengths[at]
                    ? call.steps.reset[static_cast<std::int64_t>(flag) * call.steps.batch + sweep.first_row + row + at]
                    : 0;
        }
    };

    for (int at = threadIdx.x; at < 2 * vector_size; at += blockDim.x) vectors[at] = 0.0f;
    int next_base = sweep.base(1), third_base = sweep.base(2), base = sweep.base(0);
    fetch(0, base, next_base);
    bool was_active[own_rows] = {}, was_reset[own_rows] = {};
    float *vector = vectors, *next = vectors + vector_size;
    for (int step = 0;; ++step) {
        block_sync();
        const int fourth_base = sweep.base(step + 3);
        float sums[Weights<Lanes, Held, Rows>::sum_count];
        weights.multiply(sums, vector, part);
        if constexpr (fifth) {
            float own[Rows] = {};
            exchange<Lanes, Held, Rows, 1>(sums, exchanged, place, own);
#pragma unroll
            for (int at = 0; at < Rows; ++at) sums[at] = own[at];
        } else {
            deal<Lanes, 4 * Rows>(sums, part);
        }
#pragma unroll
        for (int at = 0; at < own_rows; ++at)
            if (was_active[at]) grad_h[at] = was_reset[at] ? 0.0f : sums[at];
        if (step == bound) break;

#pragma unroll
        for (int at = 0; at < own_rows; ++at) {
            const bool active = sweep.time(step) < lengths[at];
            const Saved& from = saved[at];
            float to_sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (active) {
                const float i = decode(from.gate[0], type), f = decode(from.gate[1], type),
                            g = decode(from.gate[2], type), o = decode(from.gate[3], type);
                float c_before = decode(from.before, type);
                if (from.reset)
                    c_before =
                        call.initial_c
                            ? decode(load(call.initial_c, type, static_cast<std::int64_t>(direction) * hidden + unit),
                                     type)
                            : 0.0f;
                const float squashed = tanh_of(decode(from.cell, type));
                const float to_h = grad_h[at] + decode(from.to_output, type);
                grad_c[at] += to_h * o * (1.0f - squashed * squashed) + decode(from.to_cell, type);
                to_sums[0] = grad_c[at] * g * i * (1.0f - i);
                to_sums[1] = grad_c[at] * c_before * f * (1.0f - f);
                to_sums[2] = grad_c[at] * i * (1.0f - g * g);
                to_sums[3] = to_h * squashed * o * (1.0f - o);
                grad_c[at] = from.reset ? 0.0f : grad_c[at] * f;
            }
            if (exists(at)) {
#pragma unroll
                for (int gate = 0; gate < 4; ++gate) {
                    if (gate % twins != twin) continue;
                    next[(gate * hidden + unit) * Rows + row + at] = to_sums[gate];
                    if (active)
                        store(call.grad_sums, type,
                              std::int64_t(stage_tokens + base + sweep.first_row + row + at) * (4 * hidden) +
                                  (gate * hidden + unit),
                              to_sums[gate]);
                }
            }
            was_active[at] = active;
            was_reset[at] = from.reset != 0;
        }
        fetch(step + 1, next_base, third_base);
        base = next_base;
        next_base = third_base;
        third_base = fourth_base;
        float* const last_vector = vector;
        vector = next;
        next = last_vector;
    }
#pragma unroll
    for (int at = 0; at < own_rows; ++at) {
        if (!exists(at) || twin != 0) continue;
        store(call.grad_h, type, state_at(at), grad_h[at]);
        store(call.grad_c, type, state_at(at), grad_c[at]);
    }
    clear_past_lengths(behind(call.grad_sums, type, std::int64_t(stage_tokens) * 4 * hidden), type, sweep, Rows,
                       4 * hidden, 4 * hidden);
}

/// How a call is run: rows is 0 where it cannot be.
struct Plan {
    int lanes, held, rows, threads;
    std::size_t shared;
};

/// `lanes` in a group, for so many sums of a row and a vector of `columns`.
Plan plan(int sums, int lanes, int columns, int rows) {
    Plan found{lanes, 0, 0, 0, 0};
    const auto hold = [&](int held) {
        const int in_warp = warp_sums(lanes, held);
        found.held = held;
        found.threads = (sums + in_warp - 1) / in_warp * 32;
        return found.threads <= most_threads(held);
    };
    if (lanes == 4 || lanes == 16) {
        const int needed = slots_of(columns, lanes, rows, 0);
        const bool more = lanes == 4 && needed > 24;
        if (!(more && hold(needed <= 32 ? 32 : 48)) && !hold(needed <= 8 ? 8 : needed <= 16 ? 16 : 24)) return found;
    } else if (!hold(narrow_held(rows, false)) && !(rows <= 2 && hold(narrow_held(rows, true)))) {
        return found;
    }
    const int slots = slots_of(columns, lanes, rows, found.held);
    found.shared = shared_bytes(slots, lanes, rows, found.held, found.threads);
    if (found.shared <= shared_limit()) found.rows = rows;
    return found;
}

/// The fewest rows a block with which all blocks run at once, or the most.
template <class At>
Plan choose(int most_rows, int stages, int batch, int multiprocessors, const At& at) {
    Plan found{};
    for (int rows = 1; rows <= most_rows; rows *= 2) {
        const Plan next = at(rows);
        if (next.rows == 0) continue;
        found = next;
        if (static_cast<std::int64_t>(stages) * ((batch + rows - 1) / rows) <= multiprocessors) break;
    }
    return found;
}

/// Tokens of all stages are counted in an int.
bool sound(DataType type, const Steps& steps, int stages) {
    return type != DataType::float64 && steps.tokens * stages < (std::int64_t(1) << 31);
}

Plan plan_of(const Forward& call) {
    const int hidden = call.hidden_size, stages = call.layers * call.directions;
    if (!sound(call.type, call.steps, stages) || stages > max_stages || hidden > 160 || (call.sums && call.layers > 1))
        return {};
    int inputs = call.sums ? 0 : call.input_size;
    if (call.layers > 1 && call.directions * hidden > inputs) inputs = call.directions * hidden;
    if (std::int64_t(call.steps.batch + 4) * inputs >= std::int64_t(1) << 31) return {};
    return choose(4, stages, call.steps.batch, call.multiprocessors, [&](int rows) {
        const Plan how = plan(4 * hidden, hidden <= 96 ? 4 : 2, hidden + inputs, rows);
        if (has_fifth(how.held) && !call.sums) return Plan{};
        return std::int64_t(rows) * inputs <= inputs_ahead * how.threads ? how : Plan{};
    });
}

Plan plan_of(const Backward& call) {
    const int hidden = call.hidden_size;
    if (!sound(call.type, call.steps, call.directions) || hidden > 160) return {};
    return choose(hidden <= 96 ? 4 : 2, call.directions, call.steps.batch, call.multiprocessors,
                  [&](int rows) { return plan(hidden, hidden <= 96 ? 16 : 8, 4 * hidden, rows); });
}

unsigned tiles(const Steps& steps, int rows) { return static_cast<unsigned>((steps.batch + rows - 1) / rows); }

template <int Lanes, int Held, int Rows>
const char* start(const Plan& how, const ForwardTask& task) {
    const unsigned stages = static_cast<unsigned>(task.call.layers * task.call.directions);
    return launch(forward<Lanes, Held, Rows>, dim3(tiles(task.call.steps, Rows) * stages),
                  dim3(static_cast<unsigned>(how.threads)), how.shared, task.call.stream, task);
}

template <int Lanes, int Held, int Rows>
const char* start(const Plan& how, const Backward& call) {
    return launch(backward<Lanes, Held, Rows>, dim3(tiles(call.steps, Rows) * static_cast<unsigned>(call.directions)),
                  dim3(static_cast<unsigned>(how.threads)), how.shared, call.stream, call);
}

template <int Lanes, int Held, class Task>
const char* start_rows(const Plan& how, const Task& task) {
    if (how.rows == 1) return start<Lanes, Held, 1>(how, task);
    return how.rows == 2 ? start<Lanes, Held, 2>(how, task) : start<Lanes, Held, 4>(how, task);
}

template <int Lanes, class Task>
const char* start_narrow(const Plan& how, const Task& task) {
    if (has_fifth(how.held))
        return how.rows == 1 ? start<Lanes, narrow_held(1, true), 1>(how, task)
                             : start<Lanes, narrow_held(2, true), 2>(how, task);
    if (how.rows == 1) return start<Lanes, narrow_held(1, false), 1>(how, task);
    if (how.rows == 2) return start<Lanes, narrow_held(2, false), 2>(how, task);
    if constexpr (Lanes == 2)
        return start<Lanes, narrow_held(4, false), 4>(how, task);
    else
        return nullptr;  // not planned
}

template <int Wide, int Narrow, class Task>
const char* start_any(const Plan& how, const Task& task) {
    if (how.lanes == Narrow) return start_narrow<Narrow>(how, task);
    if (how.held == 8) return start_rows<Wide, 8>(how, task);
    if (how.held == 16) return start_rows<Wide, 16>(how, task);
    if (how.held == 24) return start_rows<Wide, 24>(how, task);
    if constexpr (Wide == 4) {
        if (how.held == 32) return start_rows<Wide, 32>(how, task);
        return start_rows<Wide, 48>(how, task);
    }
    return nullptr;
}

constexpr const char* unfit = "block: expected a call that block_fits; choose another kernel";

}  // namespace

bool block_fits(const Forward& call) { return plan_of(call).rows > 0; }

std::size_t block_progress_words(const Forward& call) {
    const Plan how = plan_of(call);
    if (call.layers < 2 || how.rows == 0) return 0;
    return 1 + std::size_t(tiles(call.steps, how.rows)) * call.layers * call.directions;
}

const char* block_forward(const Forward& call) {
    const Plan how = plan_of(call);
    if (how.rows == 0) return unfit;
    if (call.steps.batch == 0) return nullptr;
    // To tell the next layer costs about a step, and each step that it is told later delays that layer by one: the sum
    // of both is least about here.
    const double every = call.layers > 1 ? std::sqrt(double(call.steps.steps) / (call.layers - 1)) : 1.0;
    const ForwardTask task{call, every < 1.0 ? 1 : every > 32.0 ? 32 : static_cast<int>(every)};
    return start_any<4, 2>(how, task);
}

bool block_fits(const Backward& call) { return plan_of(call).rows > 0; }

const char* block_backward(const Backward& call) {
    const Plan how = plan_of(call);
    if (how.rows == 0) return unfit;
    if (call.steps.batch == 0) return nullptr;
    return start_any<16, 8>(how, call);
}

}  // namespace cuda
}  // namespace cellstep
