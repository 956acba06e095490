// One block runs one stage over a tile of one, two or four rows, from the first step to the last, with one barrier a
// step. The stage's weights stay on the multiprocessor: in registers as far as those go, the rest in shared memory.
//
// A step's vector (columns.h) is double: one is read while the next is written.

#include <cmath>

#include "columns.h"

namespace cellstep {
namespace cuda {
namespace {

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
    const int layer = only_given ? 0 : stage / call.directions;
    const int direction = only_given ? stage : stage % call.directions;
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

    HeldWeights<Lanes, Held, Rows> weights;
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
    float bias[own_gates], c[own_rows];
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
        c[at] = exists(at) ? state_or(call.from.c, call.c, type, state_at(at)) : 0.0f;
    }
    // A row's h is kept in the vector alone: a register for it would be one too many.
    const auto h_in = [&](float* vector, int at) -> float& { return vector[unit * Rows + own_row + at]; };
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
            if (seen[before] < needed)
                seen[before] = wait_until(flags + (layer - 1) * call.directions + before, needed);
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
    int base = sweep.base(0), next_base = sweep.base(1);
    if (given_sums) {
        load_sums(0, base);
    } else {
        load_inputs(0, base);
        store_inputs(vectors);
        load_inputs(1, next_base);
    }
#pragma unroll
    for (int at = 0; at < own_rows; ++at) {
        float h = exists(at) ? state_or(call.from.h, call.h, type, state_at(at)) : 0.0f;
        if (reset_before(0, at)) {
            h = initial(call.initial_h);
            c[at] = initial(call.initial_c);
        }
        if (keeps_state) h_in(vectors, at) = h;
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
        const int third_base = sweep.base(step + 2);
        unsigned char reset[own_rows];
#pragma unroll
        for (int at = 0; at < own_rows; ++at) reset[at] = reset_before(step + 1, at);

        float sums[HeldWeights<Lanes, Held, Rows>::sum_count];
        weights.multiply(sums, vector, part);
        if constexpr (fifth) {
            float own[4 * Rows] = {};
            exchange<Lanes, Held, Rows, 4>(sums, exchanged, place, own);
#pragma unroll
            for (int at = 0; at < 4 * Rows; ++at) sums[at] = own[at];
        } else {
            deal<4 * Rows>(sums, Place<Lanes>::groups, place.lane);
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
                if (active) c[at] = f * c[at] + product;
                const float last = active ? o * tanh_of(c[at]) : h_in(vector, at), last_cell = c[at];
                h_in(next, at) = reset[at] ? initial(call.initial_h) : last;
                if (reset[at]) c[at] = initial(call.initial_c);
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
        store(call.h_n, type, state_at(at), h_in(vector, at));
        store(call.c_n, type, state_at(at), c[at]);
        carry(call.to, state_at(at), h_in(vector, at), c[at]);
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

    HeldWeights<Lanes, Held, Rows> weights;
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
        grad_h[at] = exists(at) ? state_or(call.from.h, call.grad_h_n, type, state_at(at)) : 0.0f;
        grad_c[at] = exists(at) ? state_or(call.from.c, call.grad_c_n, type, state_at(at)) : 0.0f;
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
    int base = sweep.base(0), next_base = sweep.base(1);
    fetch(0, base, next_base);
    bool goes_on[own_rows] = {};  ///< the step has come out of the one that the sums are of
    float *vector = vectors, *next = vectors + vector_size;
    for (int step = 0;; ++step) {
        block_sync();
        const int third_base = sweep.base(step + 2);
        float sums[HeldWeights<Lanes, Held, Rows>::sum_count];
        weights.multiply(sums, vector, part);
        if constexpr (fifth) {
            float own[Rows] = {};
            exchange<Lanes, Held, Rows, 1>(sums, exchanged, place, own);
#pragma unroll
            for (int at = 0; at < Rows; ++at) sums[at] = own[at];
        } else {
            deal<4 * Rows>(sums, Place<Lanes>::groups, place.lane);
        }
#pragma unroll
        for (int at = 0; at < own_rows; ++at)
            if (goes_on[at]) grad_h[at] = sums[at];
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
                if (from.reset) grad_h[at] = 0.0f;
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
            goes_on[at] = active && !from.reset;
        }
        fetch(step + 1, next_base, third_base);
        base = next_base;
        next_base = third_base;
        float* const last_vector = vector;
        vector = next;
        next = last_vector;
    }
#pragma unroll
    for (int at = 0; at < own_rows; ++at) {
        if (!exists(at) || twin != 0) continue;
        store(call.grad_h, type, state_at(at), grad_h[at]);
        store(call.grad_c, type, state_at(at), grad_c[at]);
        carry(call.to, state_at(at), grad_h[at], grad_c[at]);
    }
    clear_past_lengths(behind(call.grad_sums, type, std::int64_t(stage_tokens) * 4 * hidden), type, sweep, Rows,
                       4 * hidden, 4 * hidden);
}

/// Columns in registers, of the ones that a group of many lanes asks for: forward the state of more rows needs a part
/// of what one row leaves.
constexpr int wide_held(int lanes, int asked, int rows) {
    if (lanes == 4 && asked == 48) return rows == 1 ? 48 : rows == 2 ? 46 : 44;
    return lanes == 4 && asked == 24 && rows == 4 ? 22 : asked;
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
        const auto hold_wide = [&](int asked) { return hold(wide_held(lanes, asked, rows)); };
        if (!(more && hold_wide(needed <= 32 ? 32 : 48)) && !hold_wide(needed <= 8 ? 8 : needed <= 16 ? 16 : 24))
            return found;
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
    if (how.rows == 1) return start<Lanes, wide_held(Lanes, Held, 1), 1>(how, task);
    return how.rows == 2 ? start<Lanes, wide_held(Lanes, Held, 2), 2>(how, task)
                         : start<Lanes, wide_held(Lanes, Held, 4), 4>(how, task);
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
    if (how.held == wide_held(Wide, 24, how.rows)) return start_rows<Wide, 24>(how, task);
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
