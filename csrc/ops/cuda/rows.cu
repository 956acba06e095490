/// The plain stack for many rows of few hidden units. A block holds the weights of all layers in shared memory and
/// takes one tile of rows after another through all layers and steps; nothing waits for another block.
///
/// A warp has `units` hidden units and 32 or 64 rows, a lane one or two rows: a weight is one address for the whole
/// warp, and four gates of it are one load of 16 bytes. What lanes read of x and h lies in shared memory by column,
/// [column][row], and goes from and to global memory, where rows lie one behind the other, in vectors of 16 bytes.
#include <algorithm>
#include <cstring>

#include "device.h"
#include "kernels.h"

namespace cellstep {
namespace cuda {
namespace {

constexpr int units = 4;
constexpr int gates = 4;
constexpr int max_hidden = 64;
constexpr int max_threads = 512;
constexpr int states_ahead = 4;   ///< vectors of h and c that a thread has under way at once
constexpr int weights_ahead = 3;  ///< of weights
constexpr int inputs_ahead = 1;   ///< and of the next step's x

struct Tiles {
    int groups;  ///< of units, of a warp each
    int slabs;   ///< of 32 or 64 rows, of `groups` warps each
    int rows;    ///< of a tile
    int count;
    std::size_t shared;
};

struct Argument {
    Forward call;
    Tiles tiles;
    std::uint32_t by_input, by_hidden;
};

/// Columns of a layer's products: inputs, hidden values, the bias.
__host__ __device__ inline int input_columns(const Forward& call, int layer) {
    return layer > 0 ? call.hidden_size : call.sums ? 0 : call.input_size;
}

__host__ __device__ inline int layer_columns(const Forward& call, int layer) {
    return input_columns(call, layer) + call.hidden_size + 1;
}

/// Odd, so that neighbours in a row fall into different banks as neighbours in a column do.
__host__ __device__ inline int column_stride(int rows) { return rows + 1; }

/// at / n from reciprocal(n), exact for n and at below 2^15, more than a tile has values.
__device__ inline int quotient(int at, std::uint32_t reciprocal) {
    return static_cast<int>(static_cast<std::uint64_t>(at) * reciprocal >> 31);
}

std::uint32_t reciprocal(int n) {
    return n > 0 ? ((std::uint32_t{1} << 31) + static_cast<std::uint32_t>(n) - 1) / static_cast<std::uint32_t>(n) : 0;
}

__device__ inline bool aligned(const void* data, std::size_t bytes) {
    return reinterpret_cast<std::uintptr_t>(data) % bytes == 0;
}

template <class T>
constexpr int vector_size = 16 / static_cast<int>(sizeof(T));

/// Whether the next `count` values begin with a vector that one instruction loads.
template <class T>
__device__ inline bool whole_vector(const T* from, int count) {
    return count >= vector_size<T> && aligned(from, 16);
}

/// The first half of a copy: what can be under way while something else is done.
template <class T>
__device__ inline void start_vector(uint4& bits, const T* from, int count) {
    if (whole_vector(from, count)) bits = *reinterpret_cast<const uint4*>(from);
}

/// The second half, and all of it where the first one could not be.
template <class T>
__device__ inline void finish_vector(T (&values)[vector_size<T>], const uint4& bits, const T* from, int count) {
    if (whole_vector(from, count)) {
        memcpy(values, &bits, 16);
        return;
    }
#pragma unroll
    for (int i = 0; i < vector_size<T>; ++i) values[i] = i < count ? from[i] : from_float<T>(typename Wide<T>::type(0));
}

template <class T>
__device__ inline void store_vector(T* to, const T (&values)[vector_size<T>], int count) {
    if (whole_vector(to, count)) {
        uint4 bits;
        memcpy(&bits, values, 16);
        *reinterpret_cast<uint4*>(to) = bits;
        return;
    }
#pragma unroll
    for (int i = 0; i < vector_size<T>; ++i)
        if (i < count) to[i] = values[i];
}

/// The values of four units next to one another, as gates and cells are saved; `whole`: all four are there, aligned.
template <class T, class W>
__device__ inline void store_units(T* to, const W (&values)[units], int count, bool whole) {
    T narrow[units];
#pragma unroll
    for (int u = 0; u < units; ++u) narrow[u] = from_float<T>(values[u]);
    if (whole && sizeof(T) == 2) {
        uint2 bits;
        memcpy(&bits, narrow, 8);
        *reinterpret_cast<uint2*>(to) = bits;
    } else if (whole) {
#pragma unroll
        for (int part = 0; part < units / vector_size<T>; ++part) {
            uint4 bits;
            memcpy(&bits, narrow + part * vector_size<T>, 16);
            reinterpret_cast<uint4*>(to)[part] = bits;
        }
    } else {
#pragma unroll
        for (int u = 0; u < units; ++u)
            if (u < count) to[u] = narrow[u];
    }
}

/// Vector number `vector` of `count` values in rows of `columns` to its columns in shared memory.
template <class T, class W>
__device__ inline void scatter(W* to, const T (&values)[vector_size<T>], int vector, int count, int columns,
                               std::uint32_t by_columns, int stride) {
    const int first = vector * vector_size<T>;
    int row = quotient(first, by_columns);
    int column = first - row * columns;
#pragma unroll
    for (int i = 0; i < vector_size<T>; ++i) {
        if (first + i < count) to[column * stride + row] = to_float(values[i]);
        if (++column == columns) {
            column = 0;
            ++row;
        }
    }
}

/// The other way. Rows whose length is not beyond `t` give zeros; `lengths` may be null.
template <class T, class W>
__device__ inline void gather(T* to, const W* from, int vector, int count, int columns, std::uint32_t by_columns,
                              int stride, const int* lengths, int t) {
    const int first = vector * vector_size<T>;
    int row = quotient(first, by_columns);
    int column = first - row * columns;
    T values[vector_size<T>];
#pragma unroll
    for (int i = 0; i < vector_size<T>; ++i) {
        const bool there = first + i < count && (!lengths || t < lengths[row]);
        values[i] = from_float<T>(there ? from[column * stride + row] : W(0));
        if (++column == columns) {
            column = 0;
            ++row;
        }
    }
    store_vector(to + first, values, count - first);
}

template <class T>
__device__ inline typename Wide<T>::type weight(const WeightView& view, int gate, int unit, int column) {
    if (!view.data) return 0;
    const int at = gate * static_cast<int>(view.gate) + unit / 16 * static_cast<int>(view.panel) +
                   unit % 16 * static_cast<int>(view.unit) + column * static_cast<int>(view.column);
    return to_float(static_cast<const T*>(view.data)[at]);
}

/// All layers' weights to [layer][group of units][column][unit][gate]. A warp takes eight columns of four gates: whole
/// sectors of 32 bytes in torch's layout.
template <class T, class W>
__device__ inline void load_weights(W* to, const Forward& call, int groups) {
    const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
    const int gate = static_cast<int>(threadIdx.x) % 32 / 8, lane_column = static_cast<int>(threadIdx.x) % 8;
#pragma unroll 1
    for (int layer = 0; layer < call.layers; ++layer) {
        const StageWeights& stage = call.stages[layer];
        const int inputs = input_columns(call, layer), columns = layer_columns(call, layer);
        const int eights = (columns + 7) / 8;
#pragma unroll 1
        for (int from = warp; from < call.hidden_size * eights; from += weights_ahead * warps) {
            W values[weights_ahead];
            int places[weights_ahead];
#pragma unroll
            for (int i = 0; i < weights_ahead; ++i) {
                const int at = from + i * warps, unit = at / eights;
                const int column = (at - unit * eights) * 8 + lane_column;
                places[i] = -1;
                if (unit >= call.hidden_size || column >= columns) continue;
                places[i] = ((unit / units * columns + column) * units + unit % units) * gates + gate;
                if (column < inputs)
                    values[i] = weight<T>(stage.weight_ih, gate, unit, column);
                else if (column + 1 < columns)
                    values[i] = weight<T>(stage.weight_hh, gate, unit, column - inputs);
                else
                    values[i] = weight<T>(stage.bias_ih, gate, unit, 0) + weight<T>(stage.bias_hh, gate, unit, 0);
            }
#pragma unroll
            for (int i = 0; i < weights_ahead; ++i)
                if (places[i] >= 0) to[places[i]] = values[i];
        }
        to += groups * columns * units * gates;
    }
}

template <class W>
struct alignas(16) Gates {
    W of[gates];
};

/// sums += the columns of `from` times their weights.
template <int Rows, class W>
__device__ inline void accumulate(W (&sums)[Rows][units][gates], const W* from, int stride, const Gates<W>* weights,
                                  int columns) {
#pragma unroll(sizeof(W) == 8 || Rows == 1 ? 1 : 2)
    for (int k = 0; k < columns; ++k) {
        W value[Rows];
#pragma unroll
        for (int j = 0; j < Rows; ++j) value[j] = from[k * stride + j * 32];
#pragma unroll
        for (int u = 0; u < units; ++u) {
            const Gates<W> column = weights[k * units + u];
#pragma unroll
            for (int j = 0; j < Rows; ++j)
#pragma unroll
                for (int g = 0; g < gates; ++g) sums[j][u][g] += column.of[g] * value[j];
        }
    }
}

/// The tokens of a tile in one step.
struct Span {
    int token;
    int rows;
};

__device__ inline Span span_of(const Steps& steps, int t, int first, int count) {
    if (!steps.offsets) return {t * steps.batch + first, count};
    const int token = steps.offsets[t];
    const int end = t + 1 < steps.steps ? steps.offsets[t + 1] : static_cast<int>(steps.tokens);
    return {token + first, max(0, min(count, end - token - first))};
}

/// How many steps of packed rows reach row `first`: they come by falling length.
__device__ inline int steps_of(const Steps& steps, int first) {
    int low = 0, high = steps.steps;
    while (low < high) {
        const int middle = low + (high - low) / 2;
        if (span_of(steps, middle, first, 1).rows > 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/// Zeros where padding follows the longest row of a tile.
template <class T>
__device__ inline void clear(T* to, int count) {
    T zeros[vector_size<T>];
#pragma unroll
    for (int i = 0; i < vector_size<T>; ++i) zeros[i] = from_float<T>(typename Wide<T>::type(0));
    const int threads = static_cast<int>(blockDim.x);
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x) * vector_size<T>; at < count; at += threads * vector_size<T>)
        store_vector(to + at, zeros, count - at);
}

template <class T, int Rows>
__global__ void __launch_bounds__(max_threads) rows_kernel(const __grid_constant__ Argument argument) {
    using W = typename Wide<T>::type;
    constexpr int size = vector_size<T>;
    const Forward& call = argument.call;
    const Tiles& tiles = argument.tiles;
    const Steps& steps = call.steps;
    const int hidden = call.hidden_size, layers = call.layers, batch = steps.batch;
    const int inputs = input_columns(call, 0);
    const int stride = column_stride(tiles.rows);
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int lane = thread % 32, group = thread / 32 % tiles.groups;
    const int row0 = thread / 32 / tiles.groups * 32 * Rows + lane;
    const int unit0 = group * units, unit_count = min(units, hidden - unit0);

    // h, c and again h are arrays of `layers` times `hidden` columns: h of a step is made from h of the other array.
    int weight_columns = 0;
    for (int layer = 0; layer < layers; ++layer) weight_columns += layer_columns(call, layer);
    W* const weights = reinterpret_cast<W*>(shared_memory());
    W* const state = weights + tiles.groups * weight_columns * units * gates;
    const int layer_size = hidden * stride, array_size = layers * layer_size;
    W* const cells = state + array_size;
    W* const input = state + 3 * array_size;
    int* const lengths = reinterpret_cast<int*>(input + 2 * inputs * stride);
    const auto hidden_at = [&](int step) { return state + step % 2 * 2 * array_size; };

    const bool packed = steps.offsets != nullptr;
    const bool whole_units = hidden % units == 0;
    const bool whole_gates = whole_units && aligned(call.gates, 16),
               whole_cells = whole_units && aligned(call.cells, 16);
    bool weights_here = false;

    for (int tile = static_cast<int>(blockIdx.x); tile < tiles.count; tile += static_cast<int>(gridDim.x)) {
        const int first = tile * tiles.rows, count = min(tiles.rows, batch - first);
        if (weights_here) block_sync();

        int bound = packed ? steps_of(steps, first) : steps.steps;
        if (steps.lengths) {
#pragma unroll 1
            for (int row = thread; row < tiles.rows; row += threads)
                lengths[row] = row < count ? steps.lengths[first + row] : 0;
            block_sync();
            bound = 0;
#pragma unroll 1
            for (int row = lane; row < tiles.rows; row += 32) bound = max(bound, lengths[row]);
#pragma unroll 1
            for (int mask = 16; mask > 0; mask /= 2) bound = max(bound, shuffle_xor(bound, mask));
        }
        int length[Rows];
#pragma unroll
        for (int j = 0; j < Rows; ++j) {
            const int row = row0 + j * 32;
            length[j] = row >= count ? 0 : steps.lengths ? lengths[row] : bound;
        }
        const auto time = [&](int step) { return call.reverse ? bound - 1 - step : step; };
        const auto span_at = [&](int step) {
            return step < bound ? span_of(steps, time(step), first, count) : Span{0, 0};
        };
        /// Bit j: row j of the thread is put to the initial state before the step.
        const auto resets_before = [&](int step) {
            int found = 0;
            const int t = time(step) + (call.reverse ? 1 : 0);
#pragma unroll
            for (int j = 0; j < Rows; ++j)
                if (t < length[j] && steps.reset[static_cast<std::int64_t>(t) * batch + first + row0 + j * 32])
                    found |= 1 << j;
            return found;
        };
        const auto input_of = [&](const Span& span, int vector) {
            return static_cast<const T*>(call.x) + static_cast<std::int64_t>(span.token) * inputs + vector * size;
        };
        uint4 input_ahead[inputs_ahead] = {};
        const auto start_input = [&](const Span& span) {
#pragma unroll
            for (int i = 0; i < inputs_ahead; ++i) {
                const int vector = thread + i * threads;
                start_vector(input_ahead[i], input_of(span, vector), span.rows * inputs - vector * size);
            }
        };
        const auto place_input = [&](const uint4& bits, const Span& span, int vector, int step) {
            const int all = span.rows * inputs;
            if (vector * size >= all) return;
            T values[size];
            finish_vector(values, bits, input_of(span, vector), all - vector * size);
            scatter(input + step % 2 * inputs * stride, values, vector, all, inputs, argument.by_input, stride);
        };
        const auto finish_input = [&](const Span& span, int step) {
#pragma unroll
            for (int i = 0; i < inputs_ahead; ++i) place_input(input_ahead[i], span, thread + i * threads, step);
#pragma unroll 1
            for (int vector = thread + inputs_ahead * threads; vector * size < span.rows * inputs; vector += threads) {
                uint4 bits{};
                start_vector(bits, input_of(span, vector), span.rows * inputs - vector * size);
                place_input(bits, span, vector, step);
            }
        };

        // h and c of all layers are 2 L arrays, of which a thread has the same vectors.
        const int state_values = count * hidden;
        const auto state_place = [&](int array) {
            return (static_cast<std::int64_t>(array < layers ? array : array - layers) * batch + first) * hidden;
        };
        const auto state_of = [&](int array, int vector) {
            return static_cast<const T*>(array < layers ? call.h : call.c) + state_place(array) + vector * size;
        };
        uint4 state_ahead[states_ahead] = {};
        const auto start_state = [&](int vector, int array) {
            const int left = state_values - vector * size;
#pragma unroll
            for (int i = 0; i < states_ahead; ++i)
                if (array + i < 2 * layers) start_vector(state_ahead[i], state_of(array + i, vector), left);
        };
        const auto finish_state = [&](int vector, int array) {
            if (vector * size >= state_values) return;
#pragma unroll
            for (int i = 0; i < states_ahead; ++i) {
                if (array + i >= 2 * layers) return;
                T values[size];
                finish_vector(values, state_ahead[i], state_of(array + i, vector), state_values - vector * size);
                scatter(state + (array + i) * layer_size, values, vector, state_values, hidden, argument.by_hidden,
                        stride);
            }
        };
        Span span = span_at(0), next_span = span_at(1);
        start_state(thread, 0);
        start_input(span);
        if (!weights_here) load_weights<T>(weights, call, tiles.groups);
        weights_here = true;
        finish_state(thread, 0);
#pragma unroll 1
        for (int vector = thread; vector * size < state_values; vector += threads) {
#pragma unroll 1
            for (int array = vector == thread ? states_ahead : 0; array < 2 * layers; array += states_ahead) {
                start_state(vector, array);
                finish_state(vector, array);
            }
        }
        finish_input(span, 0);
        int resets = steps.reset && bound > 0 ? resets_before(0) : 0;
        block_sync();

#pragma unroll 1
        for (int step = 0; step < bound; ++step) {
            const int t = time(step);
            W* const before = hidden_at(step);
            W* const after = hidden_at(step + 1);
            const Span later_span = span_at(step + 2);
            int next_resets = 0;
            start_input(next_span);
            if (steps.reset) {
                if (step + 1 < bound) next_resets = resets_before(step + 1);
                if (step > 0) block_sync();  // outputs may still be copied from what is reset
#pragma unroll
                for (int j = 0; j < Rows; ++j) {
                    if (!(resets >> j & 1)) continue;
#pragma unroll 1
                    for (int layer = 0; layer < layers; ++layer) {
#pragma unroll 1
                        for (int u = 0; u < unit_count; ++u) {
                            const int from = layer * hidden + unit0 + u, at = from * stride + row0 + j * 32;
                            before[at] = call.initial_h ? to_float(static_cast<const T*>(call.initial_h)[from]) : W(0);
                            cells[at] = call.initial_c ? to_float(static_cast<const T*>(call.initial_c)[from]) : W(0);
                        }
                    }
                }
                block_sync();
            }

            const Gates<W>* layer_weights = reinterpret_cast<const Gates<W>*>(weights);
#pragma unroll 1
            for (int layer = 0; layer < layers; ++layer) {
                const int from_below = input_columns(call, layer), columns = from_below + hidden + 1;
                const W* const below =
                    layer > 0 ? after + (layer - 1) * layer_size : input + step % 2 * inputs * stride;
                const W* const own = before + layer * layer_size;
                if (row0 - lane < span.rows) {
                    const Gates<W>* const mine = layer_weights + group * columns * units;
                    W sums[Rows][units][gates];
#pragma unroll
                    for (int j = 0; j < Rows; ++j) {
                        const int row = row0 + j * 32;
                        const bool given = call.sums && row < span.rows && t < length[j];
                        const T* const from = static_cast<const T*>(call.sums) +
                                              static_cast<std::int64_t>(span.token + row) * gates * hidden + unit0;
#pragma unroll
                        for (int g = 0; g < gates; ++g)
#pragma unroll
                            for (int u = 0; u < units; ++u)
                                sums[j][u][g] = given && u < unit_count ? to_float(from[g * hidden + u]) : W(0);
                    }
#pragma unroll
                    for (int u = 0; u < units; ++u) {
                        const Gates<W> bias = mine[(columns - 1) * units + u];
#pragma unroll
                        for (int j = 0; j < Rows; ++j)
#pragma unroll
                            for (int g = 0; g < gates; ++g) sums[j][u][g] += bias.of[g];
                    }
                    accumulate<Rows>(sums, below + row0, stride, mine, from_below);
                    accumulate<Rows>(sums, own + row0, stride, mine + from_below * units, hidden);
#pragma unroll
                    for (int j = 0; j < Rows; ++j) {
                        const int row = row0 + j * 32;
                        const bool active = row < span.rows && t < length[j];
                        W kept[gates][units], cell[units];
#pragma unroll
                        for (int u = 0; u < units; ++u) {
                            const W i = sigmoid_of(sums[j][u][0]), f = sigmoid_of(sums[j][u][1]);
                            const W g = tanh_of(sums[j][u][2]), o = sigmoid_of(sums[j][u][3]);
                            kept[0][u] = active ? i : W(0);
                            kept[1][u] = active ? f : W(0);
                            kept[2][u] = active ? g : W(0);
                            kept[3][u] = active ? o : W(0);
                            cell[u] = 0;
                            if (u >= unit_count) continue;
                            const int at = layer * layer_size + (unit0 + u) * stride + row;
                            W h = before[at];
                            if (active) {
                                cell[u] = f * cells[at] + i * g;
                                cells[at] = cell[u];
                                h = o * tanh_of(cell[u]);
                            }
                            after[at] = h;
                        }
                        if (row >= span.rows) continue;
                        const std::int64_t token = layer * steps.tokens + span.token + row;
                        if (call.gates) {
                            T* const to = static_cast<T*>(call.gates) + token * gates * hidden + unit0;
#pragma unroll
                            for (int g = 0; g < gates; ++g)
                                store_units(to + g * hidden, kept[g], unit_count, whole_gates);
                        }
                        if (call.cells)
                            store_units(static_cast<T*>(call.cells) + token * hidden + unit0, cell, unit_count,
                                        whole_cells);
                    }
                } else {
#pragma unroll
                    for (int j = 0; j < Rows; ++j)
                        for (int u = 0; u < unit_count; ++u) {
                            const int at = layer * layer_size + (unit0 + u) * stride + row0 + j * 32;
                            after[at] = before[at];
                        }
                }
                if (layer + 1 == layers) finish_input(next_span, step + 1);
                block_sync();
                T* to = static_cast<T*>(call.y) + static_cast<std::int64_t>(span.token) * hidden;
                if (layer + 1 < layers)
                    to = static_cast<T*>(call.outputs) + (layer * steps.tokens + span.token) * hidden;
                if (layer + 1 == layers || call.outputs)
#pragma unroll 1
                    for (int vector = thread; vector * size < span.rows * hidden; vector += threads)
                        gather(to, after + layer * layer_size, vector, span.rows * hidden, hidden, argument.by_hidden,
                               stride, steps.lengths ? lengths : nullptr, t);
                layer_weights += tiles.groups * columns * units;
            }
            span = next_span;
            next_span = later_span;
            resets = next_resets;
        }

#pragma unroll 1
        for (int array = 0; array < 2 * layers; ++array) {
            const bool is_h = array < layers;
            const W* const from = is_h ? hidden_at(bound) + array * layer_size : cells + (array - layers) * layer_size;
#pragma unroll 1
            for (int vector = thread; vector * size < state_values; vector += threads)
                gather(static_cast<T*>(is_h ? call.h_n : call.c_n) + state_place(array), from, vector, state_values,
                       hidden, argument.by_hidden, stride, nullptr, 0);
        }
        if (packed) continue;
        for (int t = bound; t < steps.steps; ++t) {
#pragma unroll 1
            for (int layer = 0; layer < layers; ++layer) {
                const std::int64_t step_token = static_cast<std::int64_t>(t) * batch + first;
                const std::int64_t token = layer * steps.tokens + step_token;
                if (layer + 1 == layers)
                    clear(static_cast<T*>(call.y) + step_token * hidden, state_values);
                else if (call.outputs)
                    clear(static_cast<T*>(call.outputs) + token * hidden, state_values);
                if (call.gates) clear(static_cast<T*>(call.gates) + token * gates * hidden, gates * state_values);
                if (call.cells) clear(static_cast<T*>(call.cells) + token * hidden, state_values);
            }
        }
    }
}

std::size_t wide_bytes(DataType type) { return type == DataType::float64 ? 8 : 4; }

std::size_t weight_bytes(const Forward& call, int groups) {
    std::size_t columns = 0;
    for (int layer = 0; layer < call.layers; ++layer) columns += static_cast<std::size_t>(layer_columns(call, layer));
    return static_cast<std::size_t>(groups) * columns * units * gates * wide_bytes(call.type);
}

struct Plan {
    Tiles tiles;
    int rows_a_lane;
    int threads;
};

Plan plan_of(const Forward& call, int rows_a_lane, int slabs) {
    Plan plan{};
    plan.rows_a_lane = rows_a_lane;
    Tiles& tiles = plan.tiles;
    tiles.groups = (call.hidden_size + units - 1) / units;
    tiles.slabs = slabs;
    tiles.rows = 32 * rows_a_lane * slabs;
    tiles.count = (call.steps.batch + tiles.rows - 1) / tiles.rows;
    const std::size_t columns = static_cast<std::size_t>(3 * call.layers) * static_cast<std::size_t>(call.hidden_size) +
                                2 * static_cast<std::size_t>(input_columns(call, 0));
    tiles.shared = weight_bytes(call, tiles.groups) +
                   columns * static_cast<std::size_t>(column_stride(tiles.rows)) * wide_bytes(call.type) +
                   static_cast<std::size_t>(tiles.rows) * sizeof(int);
    plan.threads = 32 * tiles.groups * slabs;
    return plan;
}

/// The largest tiles of which every multiprocessor has two, else the smallest.
Plan choose_plan(const Forward& call, std::size_t limit) {
    const int groups = (call.hidden_size + units - 1) / units;
    // Weights that leave room for few blocks are to serve many warps.
    const int warps = weight_bytes(call, groups) > limit / 4 ? 16 : 8;
    Plan chosen = plan_of(call, 1, 1);
    bool found = false;
    const auto offer = [&](int rows_a_lane, int slabs) {
        const Plan plan = plan_of(call, rows_a_lane, slabs);
        if (found || plan.tiles.shared > limit) return;
        chosen = plan;
        found = plan.tiles.count >= 2 * call.multiprocessors;
    };
    const int most = std::max(1, warps / groups);
    if (call.type != DataType::float64) offer(2, most);
    for (int slabs = most; slabs > 0; slabs /= 2) offer(1, slabs);
    return chosen;
}

}  // namespace

bool rows_fits(const Forward& call) {
    if (call.directions != 1 || call.hidden_size < 1 || call.hidden_size > max_hidden) return false;
    if (call.layers < 1 || call.layers > max_stages || (call.sums && call.layers != 1)) return false;
    // Tokens are counted in int; inputs beyond 2^15 would not fit and are no divisor for quotient().
    if (call.steps.tokens > INT32_MAX || input_columns(call, 0) > 32 * 1024) return false;
    return plan_of(call, 1, 1).tiles.shared <= shared_limit();
}

const char* rows_forward(const Forward& call) {
    if (call.steps.batch == 0) return nullptr;
    const std::size_t limit = shared_limit();
    const Plan plan = choose_plan(call, limit);
    const Tiles& tiles = plan.tiles;
    const Argument argument{call, tiles, reciprocal(input_columns(call, 0)), reciprocal(call.hidden_size)};
    // As many blocks as run at once, each with as many tiles as the others; 1 KB a block is the system's.
    const auto resident = static_cast<int>(
        std::min<std::size_t>((limit + 1024) / (tiles.shared + 1024), 2048u / static_cast<unsigned>(plan.threads)));
    const int at_once = std::max(1, call.multiprocessors * resident);
    const int each = (tiles.count + at_once - 1) / at_once;
    const dim3 grid(static_cast<unsigned>((tiles.count + each - 1) / each));
    const dim3 block(static_cast<unsigned>(plan.threads));
    const auto start = [&](void (*kernel)(Argument)) {
        return launch(kernel, grid, block, tiles.shared, call.stream, argument);
    };
    const bool two = plan.rows_a_lane == 2;
    switch (call.type) {
        case DataType::float32:
            return start(two ? rows_kernel<float, 2> : rows_kernel<float, 1>);
        case DataType::float16:
            return start(two ? rows_kernel<__half, 2> : rows_kernel<__half, 1>);
        case DataType::bfloat16:
            return start(two ? rows_kernel<__nv_bfloat16, 2> : rows_kernel<__nv_bfloat16, 1>);
        case DataType::float64:
            return start(rows_kernel<double, 1>);
    }
    return "rows_forward: an unknown type";
}

}  // namespace cuda
}  // namespace cellstep
