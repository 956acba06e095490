/// Whole sequences on tensor cores, float16 and bfloat16: a block keeps the recurrent weights of one stage (and those
/// of its input, if they are part of the launch) in registers and shared memory and takes 8, 16, 24 or 32 rows through
/// all steps, with one block barrier a step.
#include <algorithm>

#include "fragments.h"

namespace cellstep {
namespace cuda {
namespace {

constexpr int ahead_words = 8;  // of input that a thread holds while they come

/// Which k-blocks of a warp's weights stay in registers: of its first Units - 1 units of work the first Full, of the
/// last one the first Last; the others lie in shared memory, slots of one unit of work of all warps side by side.
template <class T, int Units_, int Full, int Last, int Warps>
struct Layout {
    using Type = T;
    static constexpr int units = Units_;
    static constexpr int threads = 32 * Warps;
    static constexpr int unrolled = Units_ > 1 ? 1 : 2;  // turns of a loop over slots, of 16 registers each
    static constexpr int kept = (Units_ - 1) * Full + Last;
    static constexpr __host__ __device__ int kept_of(int unit) { return unit < Units_ - 1 ? Full : Last; }
    static constexpr __host__ __device__ int first_of(int unit) { return unit * Full; }

    /// Slots before those of unit of work `unit`, of `count` over `warps` warps, with `blocks` k-blocks each.
    static __host__ __device__ int slots_before(int unit, int count, int warps, int blocks) {
        int slots = 0;
        for (int at = 0; at < unit; ++at) {
            const int here = count - at * warps < warps ? count - at * warps : warps;
            const int rest = blocks - kept_of(at);
            if (here > 0 && rest > 0) slots += here * rest;
        }
        return slots;
    }
};

/// -----------------------------------------------------------------------------------------------------------------
/// Forward. A unit of work is a group of 8 hidden units and two tiles of the product: rows i and f of the 8, and rows g
/// and o. A lane then holds all four gates of one unit for two rows of the batch, and updates their cells by itself.
/// k-blocks: those of h, then those of the input.

/// Where a stage's arrays begin, kept in shared memory: registers are for weights.
template <class T>
struct ForwardArrays {
    const T* x;
    const T* sums;
    T* y;
    T* gates;  // null, as cells
    T* cells;
    T* h_n;
    T* c_n;
    int seen[2];  // how far the layer before was, at the last look
    int role, stage, layer, direction, columns, blocks;
    bool paired;
};

struct ForwardPlan {
    Forward call;
    int groups;
    int warps;
    int passes;
    int tiles;
    int h_stride;  // bytes of a row
    int x_stride;
    int bias_at;  // places in shared memory, in bytes
    int cells_at;
    int h_at;
    int x_at;
    int fragments_at;
    int shared;
};

template <class L>
__global__ void __launch_bounds__(L::threads, 1) forward_kernel(const __grid_constant__ ForwardPlan plan) {
    using T = typename L::Type;
    const Forward& call = plan.call;
    unsigned char* const memory = shared_memory();
    auto& arrays = *reinterpret_cast<ForwardArrays<T>*>(memory + arrays_at);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int q = lane % 4, H = call.hidden_size;
    const bool waits = call.layers > 1;

    // Blocks that others wait for have begun before them, whatever order the device starts blocks in.
    if (waits) {
        if (thread == 0) arrays.role = fetch_add(call.progress, 1);
        block_sync();
    }
    const int role = waits ? arrays.role : static_cast<int>(blockIdx.x);
    const int stage = role / plan.tiles, tile_number = role % plan.tiles;
    const int layer = stage / call.directions, direction = stage % call.directions;
    const bool backwards = call.directions == 2 ? direction == 1 : call.reverse;
    const StageWeights& weights = call.stages[stage];
    const int rows = plan.passes * 8;
    const Tile tile = {call.steps, tile_number * rows, rows, reinterpret_cast<int*>(memory)};
    const int steps = tile.longest();
    const auto time_of = [&](int step) { return backwards ? steps - 1 - step : step; };

    const bool fused = L::units <= 2 && call.sums == nullptr;
    const int columns = fused ? (layer == 0 ? call.input_size : call.directions * H) : 0;
    const int h_blocks = (H + 31) / 32, blocks = h_blocks + (columns + 31) / 32;
    const int width = call.directions * H;
    const std::int64_t state = static_cast<std::int64_t>(stage) * call.steps.batch * H;
    const bool zeros_past = call.steps.lengths && !call.steps.offsets;
    if (thread == 0) {
        const std::int64_t P = call.steps.tokens, between = P * width;
        arrays.x = static_cast<const T*>(layer == 0 ? call.x : call.outputs) + (layer > 1 ? (layer - 1) * between : 0);
        arrays.sums = fused ? nullptr : static_cast<const T*>(call.sums) + stage * P * 4 * H;
        arrays.y = static_cast<T*>(layer == call.layers - 1 ? call.y : call.outputs) +
                   (layer == call.layers - 1 ? 0 : layer * between) + direction * H;
        arrays.gates = call.gates ? static_cast<T*>(call.gates) + stage * P * 4 * H : nullptr;
        arrays.cells = call.cells ? static_cast<T*>(call.cells) + stage * P * H : nullptr;
        arrays.h_n = static_cast<T*>(call.h_n) + state;
        arrays.c_n = static_cast<T*>(call.c_n) + state;
        arrays.seen[0] = arrays.seen[1] = 0;
        arrays.stage = stage;
        arrays.layer = layer;
        arrays.direction = direction;
        arrays.columns = columns;
        arrays.blocks = blocks;
        arrays.paired = columns % 2 == 0 && reinterpret_cast<std::uintptr_t>(arrays.x) % 4 == 0;
    }

    float4* const biases = reinterpret_cast<float4*>(memory + plan.bias_at);
    float* const cells = reinterpret_cast<float*>(memory + plan.cells_at);
    unsigned char* const h_buffers = memory + plan.h_at;
    unsigned char* const x_buffers = memory + plan.x_at;
    const int h_bytes = rows * plan.h_stride, x_bytes = rows * plan.x_stride;
    const auto h_place = [&](int buffer, int row, int unit) {
        return reinterpret_cast<T*>(h_buffers + buffer * h_bytes + row * plan.h_stride + chunk_of(unit / 8, row) * 16) +
               unit % 8;
    };

    clear(h_buffers, plan.fragments_at - plan.h_at);
    for (int unit = thread; unit < plan.groups * 8; unit += static_cast<int>(blockDim.x)) {
        float bias[4] = {};
        for (int gate = 0; gate < 4 && unit < H; ++gate)
            for (const WeightView* view : {&weights.bias_ih, &weights.bias_hh})
                if (view->data)
                    bias[gate] += to_float(static_cast<const T*>(
                        view->data)[gate * view->gate + unit / 16 * view->panel + unit % 16 * view->unit]);
        biases[unit] = make_float4(bias[0], bias[1], bias[2], bias[3]);
    }

    Fragments kept[L::kept > 0 ? L::kept : 1];
    unsigned char* slots[L::units];
    int mine = 0;  // groups of this warp
#pragma unroll
    for (int j = 0; j < L::units; ++j) {
        const int group = warp + j * plan.warps;
        if (group < plan.groups) mine = j + 1;
        const int rest = max(blocks - L::kept_of(j), 0);
        slots[j] = memory + plan.fragments_at +
                   (L::slots_before(j, plan.groups, plan.warps, blocks) + warp * rest - L::kept_of(j)) * slot_bytes;
        const auto load = [&](Fragments& to, int block) {
            const bool of_h = block < h_blocks;
            load_fragments<T>(to, of_h ? weights.weight_hh : weights.weight_ih, group, H,
                              of_h ? block : block - h_blocks, of_h ? H : columns, lane);
        };
#pragma unroll
        for (int block = 0; block < L::kept_of(j); ++block)
            if (block < blocks && group < plan.groups) load(kept[L::first_of(j) + block], block);
        for (int block = L::kept_of(j); block < blocks && group < plan.groups; ++block) {
            Fragments found;
            load(found, block);
            write_fragments(found, slots[j] + block * slot_bytes, lane);
        }
    }
    block_sync();  // the values of h are clear

    const auto cell_place = [&](int pass, int group, int lane) {
        return cells + ((pass * plan.groups + group) * 32 + lane) * 2;
    };
    for (int pass = 0; pass < plan.passes; ++pass)
        for (int group = warp; group < plan.groups; group += plan.warps)
            for (int e = 0; e < 2; ++e) {
                const int unit = group * 8 + lane / 4, row = pass * 8 + 2 * q + e, n = tile.first + row;
                float c = 0.0f;
                if (unit < H && n < call.steps.batch) {
                    const std::int64_t place = state + static_cast<std::int64_t>(n) * H + unit;
                    const int length = tile.lengths[row];
                    T h_first = from_float<T>(carried_or<T>(call.from.h, call.h, place));
                    c = carried_or<T>(call.from.c, call.c, place);
                    if (length == 0) {
                        in_global(arrays.h_n)[place - state] = h_first;
                        in_global(arrays.c_n)[place - state] = from_float<T>(c);
                    } else if (!backwards && call.steps.reset && tile.reset(0, row)) {
                        h_first = at_or_zero<T>(call.initial_h, stage * H + unit);
                        c = to_float(at_or_zero<T>(call.initial_c, stage * H + unit));
                    }
                    *h_place(0, row, unit) = h_first;
                }
                cell_place(pass, group, lane)[e] = c;
            }

    // Input steps: of step s in buffer s % 3, as the step before reads its first part ahead of the barrier. 16 lanes
    // take every 16th pair of values of a row, 2 rows a warp.
    const auto x_from = [&](int row, int token) {
        return in_global(arrays.x) + static_cast<std::int64_t>(token + tile.first + row) * arrays.columns;
    };
    const auto x_to = [&](int row, int x_entry, int step) {
        return x_buffers + step % 3 * x_bytes + row * plan.x_stride + chunk_of(x_entry / 4, row) * 16 + x_entry % 4 * 4;
    };
    const auto there = [&](int row, int step) { return row < rows && time_of(step) < tile.lengths[row]; };
    /// From the `skip`-th pair of the first row of a thread on.
    const auto copy_x = [&](int step, int skip) {
        const int token = tile.token(time_of(step)), again = found_anew(thread), x_entry = again % 16;
        for (int row = again / 16; row < rows; row += 2 * plan.warps, skip = 0) {
            const T* const from = x_from(row, token);
            for (int at = skip; x_entry + 16 * at < (arrays.columns + 1) / 2; ++at) {
                const int k = 2 * (x_entry + 16 * at);
                std::uint32_t word = 0;
                if (there(row, step))
                    word = read<std::uint16_t>(from + k) |
                           static_cast<std::uint32_t>(k + 1 < arrays.columns ? read<std::uint16_t>(from + k + 1) : 0)
                               << 16;
                write(x_to(row, x_entry, step) + block_bytes * at, word);
            }
        }
    };
    std::uint32_t coming[ahead_words];  // of x, words or single values; or gate sums of two rows
    const auto load_x = [&](int step, int token) {
        const int again = found_anew(thread), x_row = again / 16, x_entry = again % 16;
        const T* const from = x_from(x_row, token) + 2 * x_entry;
        const int left = there(x_row, step) ? arrays.columns - 2 * x_entry : 0;
        if (arrays.paired) {
#pragma unroll
            for (int at = 0; at < ahead_words; ++at)
                coming[at] = 32 * at < left ? read<std::uint32_t>(from + 32 * at) : 0;
        } else {
#pragma unroll
            for (int at = 0; at < ahead_words; ++at)
                coming[at] = at / 2 * 32 + at % 2 < left ? read<std::uint16_t>(from + at / 2 * 32 + at % 2) : 0;
        }
    };
    const auto store_x = [&](int step) {
        const int again = found_anew(thread), x_row = again / 16, x_entry = again % 16;
        if (x_row >= rows) return;
        unsigned char* const to = x_to(x_row, x_entry, step);
        if (arrays.paired) {
#pragma unroll
            for (int at = 0; at < ahead_words; ++at)
                if (x_entry + 16 * at < (arrays.columns + 1) / 2) write(to + block_bytes * at, coming[at]);
        } else {
#pragma unroll
            for (int at = 0; at < ahead_words / 2; ++at)
                if (x_entry + 16 * at < (arrays.columns + 1) / 2)
                    write(to + block_bytes * at, coming[2 * at] | coming[2 * at + 1] << 16);
        }
    };

    // One thread waits until the layer before has done what input step `step` reads; a block barrier comes before it
    // is read.
    const auto flag_of = [&](int of_layer, int side) {
        return call.progress + 1 + (of_layer * call.directions + side) * plan.tiles + tile_number;
    };
    const auto wait = [&](int step) {
        if (arrays.layer == 0 || thread != 0 || step >= steps) return;
        for (int side = 0; side < call.directions; ++side) {
            const bool side_backwards = call.directions == 2 ? side == 1 : call.reverse;
            const int need = side_backwards ? steps - time_of(step) : time_of(step) + 1;
            int value = arrays.seen[side];
            while (value < need) {
                value = load_acquire(flag_of(arrays.layer - 1, side));
                if (value < need) pause();
            }
            arrays.seen[side] = value;
        }
    };
    const bool tells = arrays.layer + 1 < call.layers;

    int token_now = 0, token_next = 0, token_x = 0;
    if (steps > 0) token_now = tile.token(time_of(0));
    if (steps > 1) token_next = tile.token(time_of(1));
    if (fused) {
        for (int step = 0; step < 4; ++step) wait(step);
        block_sync();
        for (int step = 0; step < 2 && step < steps; ++step) copy_x(step, 0);
        if (steps > 2) load_x(2, tile.token(time_of(2)));
        if (steps > 3) token_x = tile.token(time_of(3));
    }
    block_sync();

    float sums[2][2][4];
    const auto multiply = [&](auto unit, int first, int last, const unsigned char* values) {
        constexpr int j = decltype(unit)::value;
        constexpr int here = L::kept_of(j);
#pragma unroll
        for (int block = 0; block < here; ++block)
            if (block >= first && block < last)
                multiply_block<T>(sums, kept[L::first_of(j) + block],
                                  read<uint4>(values + (block - first) * block_bytes));
#pragma unroll(L::unrolled)
        for (int block = max(here, first); block < last; ++block) {
            Fragments found;
            read_fragments(found, slots[j] + block * slot_bytes, found_anew(thread) % 32);
            multiply_block<T>(sums, found, read<uint4>(values + (block - first) * block_bytes));
        }
    };
    const auto load_sums = [&](int step, int token, int pass, int group) {
        const int lane = found_anew(thread) % 32, q = lane % 4;
        const int unit = group * 8 + lane / 4;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = pass * 8 + 2 * q + e;
            const bool there = step < steps && unit < H && time_of(step) < tile.lengths[row];
            const T* from = in_global(arrays.sums) + static_cast<std::int64_t>(token + tile.first + row) * 4 * H + unit;
#pragma unroll
            for (int gate = 0; gate < 4; ++gate)
                coming[e * 4 + gate] = there ? read<std::uint16_t>(from + gate * H) : 0;
        }
    };
    // What of a group's sums does not hang on the step before.
    const auto prepare = [&](auto unit, int step, int pass) {
        constexpr int j = decltype(unit)::value;
        if (j >= mine) return;
        const int again = found_anew(thread), lane = again % 32, warp = again / 32;
        const float4 bias = biases[(warp + j * plan.warps) * 8 + lane / 4];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            sums[0][0][e] = bias.x;
            sums[0][0][2 + e] = bias.y;
            sums[0][1][e] = bias.z;
            sums[0][1][2 + e] = bias.w;
#pragma unroll
            for (int tile_at = 0; tile_at < 2; ++tile_at) sums[1][tile_at][e] = sums[1][tile_at][2 + e] = 0.0f;
        }
        if (fused) {
            if (arrays.blocks > h_blocks)
                multiply(unit, h_blocks, arrays.blocks,
                         x_buffers + step % 3 * x_bytes + pass * 8 * plan.x_stride + values_place(lane, plan.x_stride));
            return;
        }
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int gate = 0; gate < 4; ++gate)
                sums[0][gate / 2][gate % 2 * 2 + e] += to_float(from_bits<T>(coming[e * 4 + gate]));
        // Those of what comes behind are on their way meanwhile.
        const int after = j + 1 < mine ? pass : pass + 1;
        const bool same = after < plan.passes;
        load_sums(same ? step : step + 1, same ? token_now : token_next, same ? after : 0,
                  warp + (j + 1 < mine ? (j + 1) * plan.warps : 0));
    };
    const auto finish = [&](auto unit, int step, int pass) {
        constexpr int j = decltype(unit)::value;
        const int again = found_anew(thread), lane = again % 32, q = lane % 4;
        const int group = again / 32 + j * plan.warps, u = group * 8 + lane / 4, t = time_of(step);
        bool fresh[2] = {false, false};  // put to the initial state before the next step
        if (call.steps.reset) {
            const int flagged = backwards ? t : t + 1;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int row = pass * 8 + 2 * q + e;
                if (flagged > 0 && flagged < tile.lengths[row]) fresh[e] = tile.reset(flagged, row);
            }
        }
        multiply(unit, 0, h_blocks,
                 h_buffers + (step & 1) * h_bytes + pass * 8 * plan.h_stride + values_place(lane, plan.h_stride));
        // Late in a step, when what the step before wrote has long arrived: the release waits for it.
        if (j == 0 && tells && thread == 0 && pass == 0 && step % 2 == 1)
            store_release(flag_of(arrays.layer, arrays.direction), step);
        const float2 c_pair = read<float2>(cell_place(pass, group, lane));
        float c_of[2] = {c_pair.x, c_pair.y};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = pass * 8 + 2 * q + e, n = tile.first + row, length = tile.lengths[row];
            float a[4], h;
#pragma unroll
            for (int gate = 0; gate < 4; ++gate)
                a[gate] = sums[0][gate / 2][gate % 2 * 2 + e] + sums[1][gate / 2][gate % 2 * 2 + e];
            float c = c_of[e];
            update(a, c, h, T());
            if (u >= H) continue;
            T h_next = from_float<T>(h);
            const std::int64_t token = token_now + n;
            if (t < length) {
                in_global(arrays.y)[token * width + u] = h_next;
                if (T* const gates = arrays.gates) {
                    T* const cells_out = in_global(arrays.cells);
#pragma unroll
                    for (int gate = 0; gate < 4; ++gate)
                        in_global(gates)[(token * 4 + gate) * H + u] = from_float<T>(a[gate]);
                    cells_out[token * H + u] = from_float<T>(c);
                }
                if (t == (backwards ? 0 : length - 1)) {
                    const std::int64_t place = static_cast<std::int64_t>(n) * H + u;
                    in_global(arrays.h_n)[place] = h_next;
                    in_global(arrays.c_n)[place] = from_float<T>(c);
                }
                if (fresh[e]) {
                    h_next = at_or_zero<T>(call.initial_h, arrays.stage * H + u);
                    c = to_float(at_or_zero<T>(call.initial_c, arrays.stage * H + u));
                }
                c_of[e] = c;
            } else {
                h_next = *h_place(step & 1, row, u);
                if (zeros_past && n < call.steps.batch) {
                    const T zero = from_float<T>(0.0f);
                    in_global(arrays.y)[token * width + u] = zero;
                    if (T* const gates = arrays.gates) {
                        T* const cells_out = in_global(arrays.cells);
                        for (int gate = 0; gate < 4; ++gate) in_global(gates)[(token * 4 + gate) * H + u] = zero;
                        cells_out[token * H + u] = zero;
                    }
                }
            }
            *h_place((step + 1) & 1, row, u) = h_next;
        }
        write(cell_place(pass, group, lane), make_float2(c_of[0], c_of[1]));
    };

    if (steps > 0) {
        if (!fused) load_sums(0, token_now, 0, warp);
        prepare(Number<0>(), 0, 0);
    }
    for (int step = 0; step < steps; ++step) {
        block_sync();
        const int token_later = step + 2 < steps ? tile.token(time_of(step + 2)) : 0;
        if (fused) {
            if (step + 2 < steps) {
                store_x(step + 2);
                copy_x(step + 2, arrays.paired ? ahead_words : ahead_words / 2);
            }
            if (step + 3 < steps) load_x(step + 3, token_x);
            if (step + 4 < steps) token_x = tile.token(time_of(step + 4));
        }
        for (int pass = 0; pass < plan.passes; ++pass) {
            each<L::units>([&](auto unit) {
                constexpr int j = decltype(unit)::value;
                if (j < mine) finish(unit, step, pass);
                if (j + 1 < mine) prepare(Number<(j + 1) % L::units>(), step, pass);
            });
            if (pass + 1 == plan.passes) {
                token_now = token_next;
                token_next = token_later;
            }
            if (pass + 1 < plan.passes || step + 1 < steps)
                prepare(Number<0>(), pass + 1 < plan.passes ? step : step + 1, pass + 1 < plan.passes ? pass + 1 : 0);
        }
        wait(step + 4);
    }
    block_sync();
    if (tells && thread == 0) store_release(flag_of(arrays.layer, arrays.direction), steps);

    // The cells and h are where the last step left them.
    if (call.to.h) {
        const int again = found_anew(thread), lane = again % 32, q = lane % 4;
        for (int pass = 0; pass < plan.passes; ++pass)
            for (int group = again / 32; group < plan.groups; group += plan.warps)
                for (int e = 0; e < 2; ++e) {
                    const int unit = group * 8 + lane / 4, row = pass * 8 + 2 * q + e, n = tile.first + row;
                    if (unit >= H || n >= call.steps.batch) continue;
                    carry(call.to, (static_cast<std::int64_t>(arrays.stage) * call.steps.batch + n) * H + unit,
                          to_float(*h_place(steps & 1, row, unit)), cell_place(pass, group, lane)[e]);
                }
    }
    if (zeros_past) {
        clear_past(arrays.y, tile, steps, H, width);
        clear_past(arrays.gates, tile, steps, 4 * H, 4 * H);
        clear_past(arrays.cells, tile, steps, H, H);
    }
}

template <class L>
const char* start_forward(const ForwardPlan& plan) {
    const dim3 grid(static_cast<unsigned>(plan.tiles * plan.call.layers * plan.call.directions));
    return launch(forward_kernel<L>, grid, dim3(static_cast<unsigned>(plan.warps * 32)),
                  static_cast<std::size_t>(plan.shared), plan.call.stream, plan);
}

template <class T>
using SmallForward = Layout<T, 1, 0, 4, 12>;
template <class T>
using SquareForward = Layout<T, 1, 0, 3, 16>;
template <class T>
using MiddleForward = Layout<T, 2, 3, 2, 12>;
template <class T>
using LargeForward = Layout<T, 4, 4, 0, 8>;

/// Passes of 8 rows a block: as few as let all blocks be on the chip at once.
int passes_for(int batch, int stages, int multiprocessors) {
    int passes = 1;
    while (passes < most_passes && (batch + 8 * passes - 1) / (8 * passes) * stages > multiprocessors) ++passes;
    return passes;
}

bool make_plan(const Forward& call, ForwardPlan* plan) {
    const int H = call.hidden_size, stages = call.layers * call.directions;
    if (!is_half(call.type) || H < 1 || H > 256 || stages < 1 || stages > max_stages ||
        call.steps.tokens > 0x7fffffff || (call.sums && call.layers != 1))
        return false;
    plan->call = call;
    plan->groups = (H + 7) / 8;
    if (plan->groups > 24 && !call.sums) return false;  // LargeForward has no sums that outlive a barrier
    plan->warps = plan->groups <= 16 ? plan->groups : plan->groups <= 24 ? (plan->groups + 1) / 2 : 8;
    const int h_blocks = (H + 31) / 32;
    int x_blocks = call.sums ? 0 : (call.input_size + 31) / 32;
    if (call.layers > 1 && (call.directions * H + 31) / 32 > x_blocks) x_blocks = (call.directions * H + 31) / 32;
    const auto slots = [&](auto layout) {
        return decltype(layout)::slots_before(decltype(layout)::units, plan->groups, plan->warps, h_blocks + x_blocks);
    };
    const auto more = [&](int passes) {  // warps that bring input alone, 2 rows each
        return call.sums || plan->groups > 12 ? plan->warps : std::max(plan->warps, std::min(4 * passes, 12));
    };
    const int kept_apart = plan->groups <= 12   ? slots(SmallForward<__half>())
                           : plan->groups <= 16 ? slots(SquareForward<__half>())
                           : plan->groups <= 24 ? slots(MiddleForward<__half>())
                                                : slots(LargeForward<__half>());
    plan->h_stride = row_bytes(h_blocks);
    plan->x_stride = x_blocks ? row_bytes(x_blocks) : 0;
    plan->bias_at = header_bytes;
    plan->cells_at = plan->bias_at + plan->groups * 8 * 16;
    for (plan->passes = passes_for(call.steps.batch, stages, call.multiprocessors); plan->passes > 0; --plan->passes) {
        const int rows = plan->passes * 8;
        plan->warps = more(plan->passes);
        plan->h_at = plan->cells_at + rows * plan->groups * 8 * 4;
        plan->x_at = plan->h_at + 2 * rows * plan->h_stride;
        plan->fragments_at = plan->x_at + 3 * rows * plan->x_stride;
        plan->shared = plan->fragments_at + kept_apart * slot_bytes;
        plan->tiles = (call.steps.batch + rows - 1) / rows;
        if (static_cast<std::size_t>(plan->shared) <= shared_limit()) return true;
    }
    return false;
}

/// -----------------------------------------------------------------------------------------------------------------
/// Backward. dh (units, rows) = weight_hh^T dgates: a unit of work is a tile of 16 units of which a lane has two, for
/// two rows of the batch. k is 4 u + gate, so that the lane which finds the four gradients of a unit writes 8 bytes.
/// Fragments here are of one tile and 64 values of k: [k-block][product][word].

struct BackwardPlan {
    Backward call;
    int unit_tiles;  // of 16; as many pairs of k-blocks
    int warps;
    int passes;
    int tiles;  // of rows
    int stride;
    int carried_at;
    int values_at;
    int fragments_at;
    int shared;
};

template <class L>
__global__ void __launch_bounds__(L::threads, 1) backward_kernel(const __grid_constant__ BackwardPlan plan) {
    using T = typename L::Type;
    const Backward& call = plan.call;
    unsigned char* const memory = shared_memory();
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int q = lane % 4, H = call.hidden_size;
    const int direction = static_cast<int>(blockIdx.x) / plan.tiles;
    const bool backwards = call.directions == 2 ? direction == 1 : call.reverse;
    const int rows = plan.passes * 8;
    const Tile tile = {call.steps, static_cast<int>(blockIdx.x) % plan.tiles * rows, rows,
                       reinterpret_cast<int*>(memory)};
    const int steps = tile.longest();
    const auto time_of = [&](int step) { return backwards ? step : steps - 1 - step; };
    const auto token_of = [&](int step) { return step < steps ? tile.token(time_of(step)) : 0; };
    const std::int64_t state = static_cast<std::int64_t>(direction) * call.steps.batch * H;
    const std::int64_t part = direction * call.steps.tokens * H;
    auto& arrays = *reinterpret_cast<BackwardArrays<T>*>(memory + arrays_at);
    if (thread == 0) {
        arrays.gates = static_cast<const T*>(call.gates) + 4 * part;
        arrays.cells = static_cast<const T*>(call.cells) + part;
        arrays.c = static_cast<const T*>(call.c) + state;
        arrays.grad_outputs = call.grad_outputs ? static_cast<const T*>(call.grad_outputs) + direction * H : nullptr;
        arrays.grad_cells = call.grad_cells ? static_cast<const T*>(call.grad_cells) + part : nullptr;
        arrays.grad_sums = static_cast<T*>(call.grad_sums) + 4 * part;
    }
    const int width = call.directions * H;
    const bool zeros_past = call.steps.lengths && !call.steps.offsets;

    unsigned char* const buffers = memory + plan.values_at;
    const int buffer_bytes = rows * plan.stride;
    clear(buffers, 2 * buffer_bytes);

    const int pairs = plan.unit_tiles;
    Fragments kept[L::kept];
    unsigned char* slots[L::units];
    int mine = 0;  // tiles of this warp
#pragma unroll
    for (int j = 0; j < L::units; ++j) {
        const int at = warp + j * plan.warps;
        if (at < plan.unit_tiles) mine = j + 1;
        const int rest = max(pairs - L::kept_of(j), 0);
        slots[j] = memory + plan.fragments_at +
                   (L::slots_before(j, plan.unit_tiles, plan.warps, pairs) + warp * rest - L::kept_of(j)) * slot_bytes;
#pragma unroll
        for (int pair = 0; pair < L::kept_of(j); ++pair)
            if (pair < pairs && at < plan.unit_tiles)
                load_transposed<T>(kept[L::first_of(j) + pair], call.weight_hh[direction], at, pair, H, lane);
        for (int pair = L::kept_of(j); pair < pairs && at < plan.unit_tiles; ++pair) {
            Fragments found;
            load_transposed<T>(found, call.weight_hh[direction], at, pair, H, lane);
            write_fragments(found, slots[j] + pair * slot_bytes, lane);
        }
    }

    // The gradient of the cells on its way from step to step: [half of the tile][row].
    const auto carried = [&](int pass, int at, int lane) {
        return memory + plan.carried_at + ((pass * plan.unit_tiles + at) * 32 + lane) * 16;
    };
    for (int pass = 0; pass < plan.passes; ++pass)
        for (int at = warp; at < plan.unit_tiles; at += plan.warps) {
            write(carried(pass, at, lane), make_float4(0.0f, 0.0f, 0.0f, 0.0f));
            for (int place = 0; place < 4; ++place) {
                const int unit = at * 16 + lane / 4 + place / 2 * 8, row = pass * 8 + 2 * q + place % 2;
                const int n = tile.first + row;
                if (unit >= H || n >= call.steps.batch || tile.lengths[row] > 0) continue;
                const std::int64_t where = state + static_cast<std::int64_t>(n) * H + unit;
                const float dh = carried_or<T>(call.from.h, call.grad_h_n, where);
                const float dc = carried_or<T>(call.from.c, call.grad_c_n, where);
                static_cast<T*>(call.grad_h)[where] = from_float<T>(dh);
                static_cast<T*>(call.grad_c)[where] = from_float<T>(dc);
                carry(call.to, where, dh, dc);
            }
        }

    // What a tile reads of a step, on its way while the products before it run.
    T gate_of[4][4], cell[4], cell_before[4], grad_y[4];
    const auto load = [&](int step, int token, int token_next, int pass, int at) {
        const int t = time_of(step), lane = found_anew(thread) % 32, q = lane % 4;
#pragma unroll
        for (int place = 0; place < 4; ++place) {
            const int unit = at * 16 + lane / 4 + place / 2 * 8, row = pass * 8 + 2 * q + place % 2;
            const int n = tile.first + row, length = tile.lengths[row];
            const T zero = from_float<T>(0.0f);
            const bool there = step < steps && unit < H && t < length;
            const std::int64_t place_now = static_cast<std::int64_t>(token + n) * H + unit;
#pragma unroll
            for (int gate = 0; gate < 4; ++gate)
                gate_of[place][gate] = there ? in_global(arrays.gates)[place_now * 4 - 3 * unit + gate * H] : zero;
            cell[place] = there ? in_global(arrays.cells)[place_now] : zero;
            const bool first = backwards ? t + 1 == length : t == 0;  // of the forward pass
            const T* before = first ? in_global(arrays.c) + static_cast<std::int64_t>(n) * H + unit
                                    : in_global(arrays.cells) + static_cast<std::int64_t>(token_next + n) * H + unit;
            cell_before[place] = there ? *before : zero;
            grad_y[place] = there && call.grad_outputs
                                ? in_global(arrays.grad_outputs)[static_cast<std::int64_t>(token + n) * width + unit]
                                : zero;
        }
    };

    const auto result_place = [&](int step, int row, int unit) {
        return buffers + (step & 1) * buffer_bytes + row * plan.stride + chunk_of(unit / 2, row) * 16 + unit % 2 * 8;
    };
    const auto work = [&](auto number, int step, int token, int pass) {
        constexpr int j = decltype(number)::value;
        constexpr int here = L::kept_of(j);
        const int again = found_anew(thread), lane = again % 32, q = lane % 4;
        const int at = again / 32 + j * plan.warps, t = time_of(step);
        bool cut[2] = {false, false};    // from the step that the sweep has just left
        bool fresh[2] = {false, false};  // the step began from the initial state
        int length[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = pass * 8 + 2 * q + e;
            length[e] = tile.lengths[row];
            if (!call.steps.reset) continue;
            const int behind = backwards ? t : t + 1, before = backwards ? t + 1 : t;
            if (behind < length[e] && (!backwards || behind > 0)) cut[e] = tile.reset(behind, row);
            if (before >= 0 && before < length[e]) fresh[e] = tile.reset(before, row);
        }
        float sums[2][2][4] = {};
        if (step > 0) {
            const unsigned char* const values =
                buffers + ((step - 1) & 1) * buffer_bytes + pass * 8 * plan.stride + values_place(lane, plan.stride);
#pragma unroll
            for (int pair = 0; pair < here; ++pair)
                if (pair < pairs)
                    multiply_pair<T>(sums, kept[L::first_of(j) + pair], read<uint4>(values + pair * 2 * block_bytes),
                                     read<uint4>(values + pair * 2 * block_bytes + block_bytes));
#pragma unroll(L::unrolled)
            for (int pair = here; pair < pairs; ++pair) {
                Fragments found;
                read_fragments(found, slots[j] + pair * slot_bytes, lane);
                multiply_pair<T>(sums, found, read<uint4>(values + pair * 2 * block_bytes),
                                 read<uint4>(values + pair * 2 * block_bytes + block_bytes));
            }
        }
        const float4 dc_quad = read<float4>(carried(pass, at, lane));
        float dc_of[4] = {dc_quad.x, dc_quad.y, dc_quad.z, dc_quad.w};
#pragma unroll
        for (int place = 0; place < 4; ++place) {
            const int e = place % 2, unit = at * 16 + lane / 4 + place / 2 * 8, row = pass * 8 + 2 * q + e;
            const int n = tile.first + row;
            if (unit >= H || n >= call.steps.batch) continue;
            const std::int64_t where = state + static_cast<std::int64_t>(n) * H + unit;
            float dh = (sums[0][0][place] + sums[0][1][place]) + (sums[1][0][place] + sums[1][1][place]);
            float dc = dc_of[place];
            if (cut[e]) dh = dc = 0.0f;
            if (length[e] > 0 && (backwards ? t == length[e] : step == steps)) {
                static_cast<T*>(call.grad_h)[where] = from_float<T>(dh);
                static_cast<T*>(call.grad_c)[where] = from_float<T>(dc);
            }
            if (step == steps) {
                // The values of the step before are read still; those of this one are nobody's.
                write(result_place(step, row, unit), make_float2(dh, dc));
                continue;
            }
            T results[4];
            if (t < length[e]) {
                if (backwards ? t == 0 : t == length[e] - 1) {
                    dh = carried_or<T>(call.from.h, call.grad_h_n, where);
                    dc = carried_or<T>(call.from.c, call.grad_c_n, where);
                }
                const float i = to_float(gate_of[place][0]), f = to_float(gate_of[place][1]);
                const float g = to_float(gate_of[place][2]), o = to_float(gate_of[place][3]);
                const float before = fresh[e] ? to_float(at_or_zero<T>(call.initial_c, direction * H + unit))
                                              : to_float(cell_before[place]);
                const float tanh_c = tanh_for(to_float(cell[place]), T());
                dh += to_float(grad_y[place]);
                dc += dh * o * (1.0f - tanh_c * tanh_c) +
                      (call.grad_cells
                           ? to_float(in_global(arrays.grad_cells)[static_cast<std::int64_t>(token + n) * H + unit])
                           : 0.0f);
                results[0] = from_float<T>(dc * g * i * (1.0f - i));
                results[1] = from_float<T>(dc * before * f * (1.0f - f));
                results[2] = from_float<T>(dc * i * (1.0f - g * g));
                results[3] = from_float<T>(dh * tanh_c * o * (1.0f - o));
                dc_of[place] = dc * f;
            } else {
#pragma unroll
                for (int gate = 0; gate < 4; ++gate) results[gate] = from_float<T>(0.0f);
            }
            if (t < length[e] || zeros_past) {
                T* const to = in_global(arrays.grad_sums) + static_cast<std::int64_t>(token + n) * 4 * H + unit;
#pragma unroll
                for (int gate = 0; gate < 4; ++gate) to[gate * H] = results[gate];
            }
            write(result_place(step, row, unit),
                  make_uint2(pair_of(results[0], results[1]), pair_of(results[2], results[3])));
        }
        write(carried(pass, at, lane), make_float4(dc_of[0], dc_of[1], dc_of[2], dc_of[3]));
    };

    int token_now = token_of(0), token_next = token_of(1), token_later = token_of(2);
    block_sync();
    load(0, token_now, token_next, 0, warp);
    for (int step = 0; step <= steps; ++step) {
        block_sync();
        const int token_last = token_of(step + 3);
        for (int pass = 0; pass < plan.passes; ++pass)
            each<L::units>([&](auto number) {
                constexpr int j = decltype(number)::value;
                if (j >= mine) return;
                work(number, step, token_now, pass);
                const bool more = j + 1 < mine, same = more || pass + 1 < plan.passes;
                load(same ? step : step + 1, same ? token_now : token_next, same ? token_next : token_later,
                     more   ? pass
                     : same ? pass + 1
                            : 0,
                     warp + (more ? (j + 1) * plan.warps : 0));
            });
        token_now = token_next;
        token_next = token_later;
        token_later = token_last;
    }
    if (call.to.h) {
        const int again = found_anew(thread), lane = again % 32, q = lane % 4;
        for (int pass = 0; pass < plan.passes; ++pass)
            for (int at = again / 32; at < plan.unit_tiles; at += plan.warps)
                for (int place = 0; place < 4; ++place) {
                    const int unit = at * 16 + lane / 4 + place / 2 * 8, row = pass * 8 + 2 * q + place % 2;
                    const int n = tile.first + row;
                    if (unit >= H || n >= call.steps.batch || tile.lengths[row] == 0) continue;
                    const float2 found = read<float2>(result_place(steps, row, unit));
                    carry(call.to, state + static_cast<std::int64_t>(n) * H + unit, found.x, found.y);
                }
    }
    if (zeros_past) clear_past(arrays.grad_sums, tile, steps, 4 * H, 4 * H);
}

template <class L>
const char* start_backward(const BackwardPlan& plan) {
    return launch(backward_kernel<L>, dim3(static_cast<unsigned>(plan.tiles * plan.call.directions)),
                  dim3(static_cast<unsigned>(plan.warps * 32)), static_cast<std::size_t>(plan.shared), plan.call.stream,
                  plan);
}

template <class T>
using SmallBackward = Layout<T, 1, 0, 8, 8>;
template <class T>
using MiddleBackward = Layout<T, 1, 0, 4, 12>;
template <class T>
using LargeBackward = Layout<T, 2, 11, 0, 7>;

bool make_plan(const Backward& call, BackwardPlan* plan) {
    const int H = call.hidden_size;
    if (!is_half(call.type) || H < 1 || H > 224 || call.directions < 1 || call.directions > 2 ||
        call.steps.tokens > 0x7fffffff)
        return false;
    plan->call = call;
    plan->unit_tiles = (H + 15) / 16;
    plan->warps = plan->unit_tiles <= 11 ? plan->unit_tiles : 7;
    const auto slots = [&](auto layout) {
        return decltype(layout)::slots_before(decltype(layout)::units, plan->unit_tiles, plan->warps, plan->unit_tiles);
    };
    const int kept_apart = plan->unit_tiles <= 8    ? slots(SmallBackward<__half>())
                           : plan->unit_tiles <= 11 ? slots(MiddleBackward<__half>())
                                                    : slots(LargeBackward<__half>());
    plan->stride = row_bytes(2 * plan->unit_tiles);
    plan->carried_at = header_bytes;
    for (plan->passes = passes_for(call.steps.batch, call.directions, call.multiprocessors); plan->passes > 0;
         --plan->passes) {
        const int rows = plan->passes * 8;
        plan->values_at = plan->carried_at + rows * plan->unit_tiles * 16 * 4;
        plan->fragments_at = plan->values_at + 2 * rows * plan->stride;
        plan->shared = plan->fragments_at + kept_apart * slot_bytes;
        plan->tiles = (call.steps.batch + rows - 1) / rows;
        if (static_cast<std::size_t>(plan->shared) <= shared_limit()) return true;
    }
    return false;
}

template <class T>
const char* start(const ForwardPlan& plan) {
    return plan.groups <= 12   ? start_forward<SmallForward<T>>(plan)
           : plan.groups <= 16 ? start_forward<SquareForward<T>>(plan)
           : plan.groups <= 24 ? start_forward<MiddleForward<T>>(plan)
                               : start_forward<LargeForward<T>>(plan);
}

template <class T>
const char* start(const BackwardPlan& plan) {
    return plan.unit_tiles <= 8    ? start_backward<SmallBackward<T>>(plan)
           : plan.unit_tiles <= 11 ? start_backward<MiddleBackward<T>>(plan)
                                   : start_backward<LargeBackward<T>>(plan);
}

template <class Plan, class Call>
const char* plan_and_start(const Call& call) {
    Plan plan;
    if (!make_plan(call, &plan)) return "this kernel cannot do the call";
    if (call.steps.batch == 0) return nullptr;
    return call.type == DataType::float16 ? start<__half>(plan) : start<__nv_bfloat16>(plan);
}

}  // namespace

bool tensor_fits(const Forward& call) {
    ForwardPlan plan;
    return make_plan(call, &plan);
}

std::size_t tensor_progress_words(const Forward& call) {
    ForwardPlan plan;
    if (call.layers == 1 || !make_plan(call, &plan)) return 0;
    return 1 + static_cast<std::size_t>(plan.tiles) * static_cast<std::size_t>(call.layers * call.directions);
}

const char* tensor_forward(const Forward& call) { return plan_and_start<ForwardPlan>(call); }

bool tensor_fits(const Backward& call) {
    BackwardPlan plan;
    return make_plan(call, &plan);
}

const char* tensor_backward(const Backward& call) { return plan_and_start<BackwardPlan>(call); }

}  // namespace cuda
}  // namespace cellstep
