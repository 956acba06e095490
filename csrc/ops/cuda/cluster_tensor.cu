/// Recurrences too large for one block, on tensor cores, float16 and bfloat16. The weights of a direction lie over
/// several blocks ("parts"), and a tile of rows goes through all steps with every part: each finds what its own units
/// add and sends it to the others, whose shared memory holds the whole tile. Parts are the blocks of a cluster, which
/// write to one another's shared memory and count the bytes that they are sent, or any blocks of a grid that runs at
/// once: they send through the cache that all share, and wait for one flag a part. Tiles know nothing of one another.
///
/// In a part a warp has one piece of the product (8 units forward, 16 backward) and one slice of k. Slices of a piece
/// are added in their order, each pass of 8 rows by another of the piece's warps.
///
/// Backward, the parts send dgates (16 bits, 4 H a row) and each finds dh of its own units from all of them. The other
/// way, partial sums of dh in float32 from each part's own dgates, would move half the bytes through a cluster and as
/// many through the cache, but the owner would add as many terms as there are parts once the last has come, where
/// nothing hides it, and its products would be of a few units of k each, which leaves the sums of a warp no room beside
/// its weights.
#include <atomic>

#include "exchange.h"
#include "fragments.h"

namespace cellstep {
namespace cuda {
namespace {

constexpr int most_warps = 8;

/// How the weights and the work lie over blocks, warps and shared memory.
struct Spread : Sharing {
    int pieces;  // of a part
    int slices;  // a power of two
    int slice_bits;
    int blocks;   // of k (backward: pairs of them)
    int share;    // of a slice
    int passes;   // of 8 rows
    int tiles;    // of rows; group: direction * tiles + tile
    int stride;   // bytes of a row
    int bias_at;  // places in shared memory, in bytes
    int state_at;
    int stage_at;
    int partial_at;
    int fragments_at;
    int shared;
};

/// What all threads of a part know, in shared memory as well: of a step the token of its row 0, three steps ahead.
struct Course {
    int steps;
    int first_unit;
    int direction;
    int tokens[8];  // thread 0 may be a step ahead of other warps

    __device__ int token(int step) const { return tokens[step & 7]; }
};
constexpr int arrivals_begin = 176;
constexpr int course_at = 192;
static_assert(course_at + sizeof(Course) <= header_bytes, "the header has room");

/// What a thread does in its part.
struct Work {
    int lane;
    int q;
    int piece;
    int slice;

    __device__ Work(const Spread& spread, int thread)
        : lane(thread % 32),
          q(thread % 4),
          piece(thread / 32 >> spread.slice_bits),
          slice(thread / 32 & (spread.slices - 1)) {}
};

/// Whether a warp, with a piece of the product or without, leaves behind the first meeting.
template <bool Clusters>
__device__ inline bool is_idle(const Spread& spread, int part, bool with_piece) {
    return Clusters && !with_piece && (spread.slices == 1 || part >= spread.busy);
}

/// -----------------------------------------------------------------------------------------------------------------
/// Forward. A piece is a group of 8 hidden units, for which a lane has all four gates of one unit for two rows.

constexpr int forward_kept = 12;  // k-blocks of a warp in registers

template <class T>
struct ForwardArrays {
    const T* sums;
    T* y;
    T* gates;  // null, as cells
    T* cells;
    T* h_n;
    T* c_n;
};

struct ForwardPlan {
    Forward call;
    Spread spread;
};

template <class T, bool Clusters>
__device__ inline void sweep(const ForwardPlan& plan) {
    const Forward& call = plan.call;
    const Spread& spread = plan.spread;
    unsigned char* const memory = shared_memory();
    const Exchange<Clusters> exchange = {spread, memory};
    auto& arrays = *reinterpret_cast<ForwardArrays<T>*>(memory + arrays_at);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int threads = static_cast<int>(blockDim.x);
    const int H = call.hidden_size, batch = call.steps.batch;
    const int direction = exchange.group() / spread.tiles;
    const bool backwards = call.directions == 2 ? direction == 1 : call.reverse;
    const int rows = spread.passes * 8;
    const Tile tile = {call.steps, exchange.group() % spread.tiles * rows, rows, reinterpret_cast<int*>(memory)};
    auto& course = *reinterpret_cast<Course*>(memory + course_at);
    if (thread == 0) {
        course.direction = direction;
        course.first_unit = exchange.part() * spread.pieces * 8;
    }
    {
        const int steps = tile.longest();
        if (thread == 0) course.steps = steps;
    }
    const auto time_of = [&](int step) { return backwards ? course.steps - 1 - step : step; };
    const auto token_of = [&](int step) { return step < course.steps ? tile.token(time_of(step)) : 0; };
    const int width = call.directions * H;
    const std::int64_t state = static_cast<std::int64_t>(direction) * batch * H;
    const bool zeros_past = call.steps.lengths && !call.steps.offsets;
    if (thread == 0) {
        const std::int64_t past = direction * call.steps.tokens * H;
        arrays.sums = static_cast<const T*>(call.sums) + 4 * past;
        arrays.y = static_cast<T*>(call.y) + direction * H;
        arrays.gates = call.gates ? static_cast<T*>(call.gates) + 4 * past : nullptr;
        arrays.cells = call.cells ? static_cast<T*>(call.cells) + past : nullptr;
        arrays.h_n = static_cast<T*>(call.h_n) + state;
        arrays.c_n = static_cast<T*>(call.c_n) + state;
    }

    const Work all_along(spread, thread);
    block_sync();
    const int group = exchange.part() * spread.pieces + all_along.piece;
    const auto exists = [&](const Work& work) { return course.first_unit + work.piece * 8 < H; };
    const auto blocks_of = [&](const Work& work) {
        return exists(work) ? min(spread.share, spread.blocks - work.slice * spread.share) : 0;
    };
    const int first_block = all_along.slice * spread.share, blocks = blocks_of(all_along);

    if (thread == 0)
        for (int step = 0; step < 3; ++step) course.tokens[step] = token_of(step);
    clear(exchange.values(0), spread.bytes);
    if (Clusters) clear(exchange.values(1), spread.bytes);
    const StageWeights& weights = call.stages[direction];
    float4* const biases = reinterpret_cast<float4*>(memory + spread.bias_at);
    for (int at = thread; at < spread.pieces * 8; at += threads) {
        const int unit = course.first_unit + at;
        float bias[4] = {};
        for (int gate = 0; gate < 4 && unit < H; ++gate)
            for (const WeightView* view : {&weights.bias_ih, &weights.bias_hh})
                if (view->data)
                    bias[gate] += to_float(static_cast<const T*>(
                        view->data)[gate * view->gate + unit / 16 * view->panel + unit % 16 * view->unit]);
        biases[at] = make_float4(bias[0], bias[1], bias[2], bias[3]);
    }

    Fragments kept[forward_kept];
    // Slots of a warp are those of the k-blocks behind its kept ones.
    const auto slot_of = [&](int of_thread, int block) {
        return memory + spread.fragments_at +
               (of_thread / 32 * (spread.share - forward_kept) + block - forward_kept) * slot_bytes;
    };
#pragma unroll
    for (int block = 0; block < forward_kept; ++block)
        if (block < blocks) load_fragments<T>(kept[block], weights.weight_hh, group, H, first_block + block, H, lane);
    for (int block = forward_kept; block < blocks; ++block) {
        Fragments found;
        load_fragments<T>(found, weights.weight_hh, group, H, first_block + block, H, lane);
        write_fragments(found, slot_of(thread, block), lane);
    }
    block_sync();  // the values are clear

    const auto starts_reset = [&](int row) {
        return !backwards && call.steps.reset && tile.lengths[row] > 0 && tile.reset(0, row);
    };
    for (int row = warp; row < rows && tile.first + row < batch; row += threads / 32) {
        const bool reset = starts_reset(row);
        const std::int64_t from = state + static_cast<std::int64_t>(tile.first + row) * H;
        unsigned char* const to = exchange.values(0) + row * spread.stride;
        for (int unit = lane; unit < H; unit += 32)
            write(to + chunk_of(unit / 8, row) * 16 + unit % 8 * 2,
                  reset ? at_or_zero<T>(call.initial_h, course.direction * H + unit)
                        : from_float<T>(carried_or<T>(call.from.h, call.h, from + unit)));
    }
    const auto cell_place = [&](const Work& work, int pass) {
        return memory + spread.state_at + ((pass * spread.pieces + work.piece) * 32 + work.lane) * 8;
    };
    for (int pass = all_along.slice; pass < spread.passes; pass += spread.slices) {
        float c[2] = {0.0f, 0.0f};
        for (int e = 0; e < 2; ++e) {
            const int row = pass * 8 + 2 * all_along.q + e, n = tile.first + row, u = group * 8 + lane / 4;
            if (u >= H || n >= batch) continue;
            const std::int64_t place = static_cast<std::int64_t>(n) * H + u;
            c[e] = carried_or<T>(call.from.c, call.c, state + place);
            if (tile.lengths[row] == 0) {
                arrays.h_n[place] = from_float<T>(carried_or<T>(call.from.h, call.h, state + place));
                arrays.c_n[place] = from_float<T>(c[e]);
            } else if (starts_reset(row)) {
                c[e] = to_float(at_or_zero<T>(call.initial_c, course.direction * H + u));
            }
        }
        write(cell_place(all_along, pass), make_float2(c[0], c[1]));
    }

    T coming[2][4];  // gate sums that were given
    const auto load_sums = [&](int step, int pass) {
        const Work work(spread, this_thread());
        const int u = course.first_unit + work.piece * 8 + work.lane / 4;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = pass * 8 + 2 * work.q + e;
            const bool there =
                pass < spread.passes && step < course.steps && u < H && time_of(step) < tile.lengths[row];
            const T* from =
                in_global(arrays.sums) + static_cast<std::int64_t>(course.token(step) + tile.first + row) * 4 * H + u;
#pragma unroll
            for (int gate = 0; gate < 4; ++gate) coming[e][gate] = there ? from[gate * H] : from_float<T>(0.0f);
        }
    };
    const auto multiply = [&](float (&all)[2][4], int step, int pass) {
        float sums[2][2][4] = {};
        const Work work(spread, this_thread());
        const unsigned char* const values = exchange.values(step) + pass * 8 * spread.stride +
                                            values_place(work.lane, spread.stride) +
                                            work.slice * spread.share * block_bytes;
        const int blocks = blocks_of(work);
#pragma unroll
        for (int block = 0; block < forward_kept; ++block)
            if (block < blocks) multiply_block<T>(sums, kept[block], read<uint4>(values + block * block_bytes));
#pragma unroll 1
        for (int block = forward_kept; block < blocks; ++block) {
            Fragments found;
            const int again = this_thread();
            read_fragments(found, slot_of(again, block), again % 32);
            multiply_block<T>(sums, found, read<uint4>(values + block * block_bytes));
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int at = 0; at < 4; ++at) all[half][at] = sums[0][half][at] + sums[1][half][at];
    };
    const auto finish = [&](const float (&all)[2][4], int step, int pass) {
        const Work work(spread, this_thread());
        const int t = time_of(step), q = work.q, at = work.piece * 8 + work.lane / 4, u = course.first_unit + at;
        const float2 c_pair = read<float2>(cell_place(work, pass));
        float c_of[2] = {c_pair.x, c_pair.y};
        const float4 bias = biases[at];
        float a[2][4];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            a[e][0] = all[0][e] + bias.x + to_float(coming[e][0]);
            a[e][1] = all[0][2 + e] + bias.y + to_float(coming[e][1]);
            a[e][2] = all[1][e] + bias.z + to_float(coming[e][2]);
            a[e][3] = all[1][2 + e] + bias.w + to_float(coming[e][3]);
        }
        // Those of what comes behind are on their way meanwhile.
        const bool same = pass + spread.slices < spread.passes;
        load_sums(same ? step : step + 1, same ? pass + spread.slices : work.slice);
        unsigned char* const stage = memory + spread.stage_at + (pass * spread.pieces + work.piece) * 128;

        float c_next[2];
        T h_of[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = pass * 8 + 2 * q + e, length = tile.lengths[row];
            const float c_before = c_of[e];
            float h;
            update(a[e], c_of[e], h, T());
            h_of[e] = from_float<T>(h);
            T h_next = h_of[e];
            c_next[e] = c_of[e];
            if (u >= H) {
                h_next = from_float<T>(0.0f);
            } else if (t >= length) {
                h_next = read<T>(exchange.values(step) + row * spread.stride + chunk_of(u / 8, row) * 16 + u % 8 * 2);
                c_next[e] = c_before;
            } else if (call.steps.reset) {
                const int flagged = backwards ? t : t + 1;  // put to the initial state before the next step
                if (flagged > 0 && flagged < length && tile.reset(flagged, row)) {
                    h_next = at_or_zero<T>(call.initial_h, course.direction * H + u);
                    c_next[e] = to_float(at_or_zero<T>(call.initial_c, course.direction * H + u));
                }
            }
            write(stage + (2 * q + e) * 16 + work.lane / 4 * 2, h_next);
        }
        write(cell_place(work, pass), make_float2(c_next[0], c_next[1]));
        if (step + 1 < course.steps) {
            warp_sync();
            const int row = work.lane % 8;
            exchange.send(step + 1,
                          (pass * 8 + row) * spread.stride + chunk_of(course.first_unit / 8 + work.piece, row) * 16,
                          read<uint4>(stage + row * 16), work.lane / 8, 4);
        }
        // What nobody waits for.
        if (u >= H) return;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = pass * 8 + 2 * q + e, n = tile.first + row, length = tile.lengths[row];
            const std::int64_t token = course.token(step) + n;
            const bool past = t >= length;
            if (past && (!zeros_past || n >= batch)) continue;
            const T zero = from_float<T>(0.0f);
            in_global(arrays.y)[token * width + u] = past ? zero : h_of[e];
            if (arrays.gates) {
                T* const gates = in_global(arrays.gates);
                T* const cells_out = in_global(arrays.cells);
#pragma unroll
                for (int gate = 0; gate < 4; ++gate)
                    gates[(token * 4 + gate) * H + u] = past ? zero : from_float<T>(a[e][gate]);
                cells_out[token * H + u] = past ? zero : from_float<T>(c_of[e]);
            }
            if (!past && t == (backwards ? 0 : length - 1)) {
                const std::int64_t place = static_cast<std::int64_t>(n) * H + u;
                in_global(arrays.h_n)[place] = h_of[e];
                in_global(arrays.c_n)[place] = from_float<T>(c_of[e]);
            }
        }
    };
    const auto partial = [&](const Work& work, int pass, int of_slice) {
        return memory + spread.partial_at + ((pass * spread.slices + of_slice) * spread.pieces + work.piece) * 1024 +
               work.lane * 16;
    };

    load_sums(0, all_along.slice);

    for (int step = 0; step < course.steps; ++step) {
        exchange.meet(step);
        if (step == 0 && is_idle<Clusters>(spread, exchange.part(), exists(Work(spread, this_thread())))) break;
        if (this_thread() == 0) course.tokens[(step + 3) & 7] = token_of(step + 3);
        for (int pass = 0; pass < spread.passes; ++pass) {
            float all[2][4];
            multiply(all, step, pass);
            const Work work(spread, this_thread());
            if (spread.slices > 1) {
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    write(partial(work, pass, work.slice) + half * 512,
                          make_float4(all[half][0], all[half][1], all[half][2], all[half][3]));
            } else if (exists(work)) {
                finish(all, step, pass);
            }
        }
        if (spread.slices > 1) {
            block_sync();
            const Work work(spread, this_thread());
            for (int pass = work.slice; exists(work) && pass < spread.passes; pass += spread.slices) {
                float all[2][4] = {};
                for (int of_slice = 0; of_slice < spread.slices; ++of_slice)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float4 found = read<float4>(partial(work, pass, of_slice) + half * 512);
                        all[half][0] += found.x;
                        all[half][1] += found.y;
                        all[half][2] += found.z;
                        all[half][3] += found.w;
                    }
                finish(all, step, pass);
            }
        }
    }

    // A thread has the cells that it updated, and has written the h beside them.
    if (call.to.h) {
        const Work work(spread, this_thread());
        const int u = course.first_unit + work.piece * 8 + work.lane / 4;
        for (int pass = work.slice; u < H && pass < spread.passes; pass += spread.slices) {
            const float2 c = read<float2>(cell_place(work, pass));
            for (int e = 0; e < 2; ++e) {
                const int n = tile.first + pass * 8 + 2 * work.q + e;
                if (n >= batch) continue;
                const std::int64_t place = static_cast<std::int64_t>(n) * H + u;
                carry(call.to, static_cast<std::int64_t>(course.direction) * batch * H + place,
                      to_float(arrays.h_n[place]), e == 0 ? c.x : c.y);
            }
        }
    }

    // Nothing is sent behind the last meeting: no part writes to one that may have ended.
    if (zeros_past && course.first_unit < H) {
        const int units = min(spread.pieces * 8, H - course.first_unit);
        clear_past(arrays.y + course.first_unit, tile, course.steps, units, width);
        for (int gate = 0; gate < 4 && arrays.gates; ++gate)
            clear_past(arrays.gates + gate * H + course.first_unit, tile, course.steps, units, 4 * H);
        if (arrays.cells) clear_past(arrays.cells + course.first_unit, tile, course.steps, units, H);
    }
}

/// -----------------------------------------------------------------------------------------------------------------
/// Backward. A piece is a tile of 16 units, of which a lane has two for two rows; k is 4 u + gate.

constexpr int backward_kept = 11;  // pairs of k-blocks of a warp in registers

struct BackwardPlan {
    Backward call;
    Spread spread;
};

template <class T, bool Clusters>
__device__ inline void sweep(const BackwardPlan& plan) {
    const Backward& call = plan.call;
    const Spread& spread = plan.spread;
    unsigned char* const memory = shared_memory();
    const Exchange<Clusters> exchange = {spread, memory};
    auto& arrays = *reinterpret_cast<BackwardArrays<T>*>(memory + arrays_at);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const int H = call.hidden_size, batch = call.steps.batch;
    const int direction = exchange.group() / spread.tiles;
    const bool backwards = call.directions == 2 ? direction == 1 : call.reverse;
    const int rows = spread.passes * 8;
    const Tile tile = {call.steps, exchange.group() % spread.tiles * rows, rows, reinterpret_cast<int*>(memory)};
    auto& course = *reinterpret_cast<Course*>(memory + course_at);
    if (thread == 0) {
        course.direction = direction;
        course.first_unit = exchange.part() * spread.pieces * 16;
    }
    {
        const int steps = tile.longest();
        if (thread == 0) course.steps = steps;
    }
    const auto time_of = [&](int step) { return backwards ? step : course.steps - 1 - step; };
    const auto token_of = [&](int step) { return step < course.steps ? tile.token(time_of(step)) : 0; };
    const std::int64_t state = static_cast<std::int64_t>(direction) * batch * H;
    if (thread == 0) {
        const std::int64_t past = direction * call.steps.tokens * H;
        arrays.gates = static_cast<const T*>(call.gates) + 4 * past;
        arrays.cells = static_cast<const T*>(call.cells) + past;
        arrays.c = static_cast<const T*>(call.c) + state;
        arrays.grad_outputs = call.grad_outputs ? static_cast<const T*>(call.grad_outputs) + direction * H : nullptr;
        arrays.grad_cells = call.grad_cells ? static_cast<const T*>(call.grad_cells) + past : nullptr;
        arrays.grad_sums = static_cast<T*>(call.grad_sums) + 4 * past;
    }
    const int width = call.directions * H;
    const bool zeros_past = call.steps.lengths && !call.steps.offsets;

    const Work all_along(spread, thread);
    block_sync();
    const int at = exchange.part() * spread.pieces + all_along.piece;
    const auto exists = [&](const Work& work) { return course.first_unit + work.piece * 16 < H; };
    const auto pairs_of = [&](const Work& work) {
        return exists(work) ? min(spread.share, spread.blocks - work.slice * spread.share) : 0;
    };
    const int first_pair = all_along.slice * spread.share, pairs = pairs_of(all_along);

    if (thread == 0)
        for (int step = 0; step < 3; ++step) course.tokens[step] = token_of(step);
    block_sync();

    Fragments kept[backward_kept];
    // Slots of a warp are those of the pairs behind its kept ones.
    const auto slot_of = [&](int of_thread, int pair) {
        return memory + spread.fragments_at +
               (of_thread / 32 * (spread.share - backward_kept) + pair - backward_kept) * slot_bytes;
    };
#pragma unroll
    for (int pair = 0; pair < backward_kept; ++pair)
        if (pair < pairs) load_transposed<T>(kept[pair], call.weight_hh[direction], at, first_pair + pair, H, lane);
    for (int pair = backward_kept; pair < pairs; ++pair) {
        Fragments found;
        load_transposed<T>(found, call.weight_hh[direction], at, first_pair + pair, H, lane);
        write_fragments(found, slot_of(thread, pair), lane);
    }

    // The gradient of the cells on its way from step to step: [half of the tile][row].
    const auto carried = [&](const Work& work, int pass) {
        return memory + spread.state_at + ((pass * spread.pieces + work.piece) * 32 + work.lane) * 16;
    };
    for (int pass = all_along.slice; pass < spread.passes; pass += spread.slices) {
        write(carried(all_along, pass), make_float4(0.0f, 0.0f, 0.0f, 0.0f));
        for (int place = 0; place < 4; ++place) {
            const int unit = at * 16 + lane / 4 + place / 2 * 8, row = pass * 8 + 2 * all_along.q + place % 2;
            const int n = tile.first + row;
            if (unit >= H || n >= batch || tile.lengths[row] > 0) continue;
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
    const auto load = [&](int step, int pass) {
        const int token = course.token(step), token_next = course.token(step + 1);
        const Work work(spread, this_thread());
        const int t = time_of(step), first_of_lane = course.first_unit + work.piece * 16 + work.lane / 4;
#pragma unroll
        for (int place = 0; place < 4; ++place) {
            const int unit = first_of_lane + place / 2 * 8, row = pass * 8 + 2 * work.q + place % 2;
            const int n = tile.first + row, length = pass < spread.passes ? tile.lengths[row] : 0;
            const T zero = from_float<T>(0.0f);
            const bool there = step < course.steps && unit < H && t < length;
            const std::int64_t place_now = static_cast<std::int64_t>(token + n) * H + unit;
#pragma unroll
            for (int gate = 0; gate < 4; ++gate)
                gate_of[place][gate] = there ? in_global(arrays.gates)[place_now * 4 - 3 * unit + gate * H] : zero;
            cell[place] = there ? in_global(arrays.cells)[place_now] : zero;
            const bool first = backwards ? t + 1 == length : t == 0;  // of the forward pass
            const T* before = first ? in_global(arrays.c) + static_cast<std::int64_t>(n) * H + unit
                                    : in_global(arrays.cells) + static_cast<std::int64_t>(token_next + n) * H + unit;
            cell_before[place] = there ? *in_global(before) : zero;
            grad_y[place] = there && call.grad_outputs
                                ? in_global(arrays.grad_outputs)[static_cast<std::int64_t>(token + n) * width + unit]
                                : zero;
        }
    };

    const auto multiply = [&](float (&dh_of)[4], int step, int pass) {
        float sums[2][2][4] = {};
        if (step > 0) {
            const auto again_values = [&](int of_thread) {
                const Work work(spread, of_thread);
                return exchange.values(step) + pass * 8 * spread.stride + values_place(work.lane, spread.stride) +
                       work.slice * spread.share * 2 * block_bytes;
            };
            const Work work(spread, this_thread());
            const unsigned char* const values = again_values(this_thread());
            const int pairs = pairs_of(work);
#pragma unroll
            for (int pair = 0; pair < backward_kept; ++pair)
                if (pair < pairs)
                    multiply_pair<T>(sums, kept[pair], read<uint4>(values + pair * 2 * block_bytes),
                                     read<uint4>(values + pair * 2 * block_bytes + block_bytes));
#pragma unroll 1
            for (int pair = backward_kept; pair < pairs; ++pair) {
                Fragments found;
                const int again = this_thread();
                const unsigned char* const here = again_values(again) + pair * 2 * block_bytes;
                read_fragments(found, slot_of(again, pair), again % 32);
                multiply_pair<T>(sums, found, read<uint4>(here), read<uint4>(here + block_bytes));
            }
        }
#pragma unroll
        for (int place = 0; place < 4; ++place)
            dh_of[place] = (sums[0][0][place] + sums[0][1][place]) + (sums[1][0][place] + sums[1][1][place]);
    };
    // Chunks of a row change places, so that lanes of four rows meet different banks.
    const auto stage_place = [&](const Work& work, int pass, int row, int chunk) {
        return memory + spread.stage_at + (pass * spread.pieces + work.piece) * 1024 + row * 128 +
               (chunk ^ (row & 6)) * 16;
    };
    const auto result_place = [&](const Work& work, int pass, int place) {
        return stage_place(work, pass, 2 * work.q + place % 2, work.lane / 8 + place / 2 * 4) + work.lane / 4 % 2 * 8;
    };
    const auto finish = [&](const float (&dh_of)[4], int step, int pass) {
        const Work work(spread, this_thread());
        const int token = course.token(step);
        const int t = time_of(step), q = work.q, first_of_lane = course.first_unit + work.piece * 16 + work.lane / 4;
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
        const float4 dc_quad = read<float4>(carried(work, pass));
        float dc_of[4] = {dc_quad.x, dc_quad.y, dc_quad.z, dc_quad.w};
#pragma unroll
        for (int place = 0; place < 4; ++place) {
            const int e = place % 2, unit = first_of_lane + place / 2 * 8, row = pass * 8 + 2 * q + e;
            const int n = tile.first + row;
            const bool there = unit < H && n < batch;
            const std::int64_t where = (static_cast<std::int64_t>(course.direction) * batch + n) * H + unit;
            float dh = cut[e] ? 0.0f : dh_of[place], dc = cut[e] ? 0.0f : dc_of[place];
            if (there && length[e] > 0 && (backwards ? t == length[e] : step == course.steps)) {
                static_cast<T*>(call.grad_h)[where] = from_float<T>(dh);
                static_cast<T*>(call.grad_c)[where] = from_float<T>(dc);
            }
            if (step == course.steps) {
                write(result_place(work, pass, place), make_float2(dh, dc));
                continue;
            }
            T results[4];
            if (there && t < length[e]) {
                if (backwards ? t == 0 : t == length[e] - 1) {
                    dh = carried_or<T>(call.from.h, call.grad_h_n, where);
                    dc = carried_or<T>(call.from.c, call.grad_c_n, where);
                }
                const float i = to_float(gate_of[place][0]), f = to_float(gate_of[place][1]);
                const float g = to_float(gate_of[place][2]), o = to_float(gate_of[place][3]);
                const float before = fresh[e] ? to_float(at_or_zero<T>(call.initial_c, course.direction * H + unit))
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
            write(result_place(work, pass, place),
                  make_uint2(pair_of(results[0], results[1]), pair_of(results[2], results[3])));
        }
        if (step == course.steps) return;
        write(carried(work, pass), make_float4(dc_of[0], dc_of[1], dc_of[2], dc_of[3]));
        warp_sync();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = work.lane / 8 + half * 4, chunk = work.lane % 8;
            const int of_all = (course.first_unit / 16 + work.piece) * 8 + chunk;
            exchange.send(step + 1, (pass * 8 + row) * spread.stride + chunk_of(of_all, row) * 16,
                          read<uint4>(stage_place(work, pass, row, chunk)), 0, 1);
        }
// What nobody waits for.
#pragma unroll 1
        for (int place = 0; place < 4; ++place) {
            const int e = place % 2, unit = first_of_lane + place / 2 * 8, n = tile.first + pass * 8 + 2 * q + e;
            if (unit >= H || n >= batch || (t >= tile.lengths[pass * 8 + 2 * q + e] && !zeros_past)) continue;
            const uint2 results = read<uint2>(result_place(work, pass, place));
            T* const to =
                in_global(arrays.grad_sums) + static_cast<std::int64_t>(course.token(step) + n) * 4 * H + unit;
            to[0] = from_bits<T>(results.x);
            to[H] = from_bits<T>(results.x >> 16);
            to[2 * H] = from_bits<T>(results.y);
            to[3 * H] = from_bits<T>(results.y >> 16);
        }
    };
    const auto partial = [&](const Work& work, int pass, int of_slice) {
        return memory + spread.partial_at + ((pass * spread.slices + of_slice) * spread.pieces + work.piece) * 512 +
               work.lane * 16;
    };

    load(0, all_along.slice);
    // Step 0 reads no values: the first meeting is that all parts have begun.
    for (int step = 0; step <= course.steps; ++step) {
        exchange.meet(step);
        if (step == 0 && is_idle<Clusters>(spread, exchange.part(), exists(Work(spread, this_thread())))) break;
        if (this_thread() == 0) course.tokens[(step + 3) & 7] = token_of(step + 3);
        const auto finish_and_load = [&](const float (&dh_of)[4], int pass) {
            finish(dh_of, step, pass);
            const bool same = pass + spread.slices < spread.passes;
            load(same ? step : step + 1, same ? pass + spread.slices : Work(spread, this_thread()).slice);
        };
        for (int pass = 0; pass < spread.passes; ++pass) {
            float dh_of[4];
            multiply(dh_of, step, pass);
            const Work work(spread, this_thread());
            if (spread.slices > 1)
                write(partial(work, pass, work.slice), make_float4(dh_of[0], dh_of[1], dh_of[2], dh_of[3]));
            else if (exists(work))
                finish_and_load(dh_of, pass);
        }
        if (spread.slices > 1) {
            block_sync();
            const auto again = [&] { return Work(spread, this_thread()); };
            for (int pass = again().slice; exists(again()) && pass < spread.passes; pass += spread.slices) {
                const Work work = again();
                float dh_of[4] = {};
                for (int of_slice = 0; of_slice < spread.slices; ++of_slice) {
                    const float4 found = read<float4>(partial(work, pass, of_slice));
                    dh_of[0] += found.x;
                    dh_of[1] += found.y;
                    dh_of[2] += found.z;
                    dh_of[3] += found.w;
                }
                finish_and_load(dh_of, pass);
            }
        }
    }
    if (call.to.h) {
        const Work work(spread, this_thread());
        for (int pass = work.slice; pass < spread.passes; pass += spread.slices)
            for (int place = 0; place < 4; ++place) {
                const int unit = course.first_unit + work.piece * 16 + work.lane / 4 + place / 2 * 8;
                const int row = pass * 8 + 2 * work.q + place % 2, n = tile.first + row;
                if (unit >= H || n >= batch || tile.lengths[row] == 0) continue;
                const float2 found = read<float2>(result_place(work, pass, place));
                carry(call.to, (static_cast<std::int64_t>(course.direction) * batch + n) * H + unit, found.x, found.y);
            }
    }
    if (zeros_past && course.first_unit < H)
        for (int gate = 0; gate < 4; ++gate)
            clear_past(arrays.grad_sums + gate * H + course.first_unit, tile, course.steps,
                       min(spread.pieces * 16, H - course.first_unit), 4 * H);
}

/// -----------------------------------------------------------------------------------------------------------------
/// Starting them.

template <class Plan, class T, bool Clusters>
__global__ void __launch_bounds__(32 * most_warps, 1) kernel(const __grid_constant__ Plan plan) {
#if !defined(CELLSTEP_EMULATED) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    if constexpr (!Clusters) sweep<T, false>(plan);
#else
    sweep<T, Clusters>(plan);
#endif
}

/// What a plan needs to know of a sweep, in bytes if nothing else is said.
struct Sizes {
    int pieces;  // of the whole product
    int blocks;  // units of k of a piece that have 32 rows of product, 2,048 bytes of weights and four products
    int kept;    // of these in a warp's registers
    int stride;  // of a row of values
    int bias;    // of a piece
    int state;   // of a piece and pass, as the following
    int stage;
    int partial;  // for each slice
};

Sizes sizes_of(const Forward& call) {
    const int H = call.hidden_size, blocks = (H + 31) / 32;
    return {(H + 7) / 8, blocks, forward_kept, row_bytes(blocks), 128, 256, 128, 1024};
}

Sizes sizes_of(const Backward& call) {
    const int tiles = (call.hidden_size + 15) / 16;
    return {tiles, tiles, backward_kept, row_bytes(2 * tiles), 0, 512, 1024, 512};
}

/// Clusters that are on the chip at once; asked once for each size and kind of device, as asking takes microseconds.
template <class Plan, class T>
int clusters_at_once(int parts, int multiprocessors) {
    static std::atomic<int> known[most_cluster + 1];  // multiprocessors and the answer
    int found = known[parts].load(std::memory_order_relaxed);
    if (found >> 10 != multiprocessors) {
        found = multiprocessors << 10 | most_clusters(kernel<Plan, T, true>, static_cast<unsigned>(parts),
                                                      dim3(32 * most_warps), shared_limit());
        known[parts].store(found, std::memory_order_relaxed);
    }
    return found & 1023;
}

constexpr int up(int a, int b) { return (a + b - 1) / b; }

/// Lays a sweep over `parts` blocks. False if it does not fit.
bool lay(const Sizes& sizes, std::size_t limit, Spread* spread) {
    spread->pieces = up(sizes.pieces, spread->parts);
    if (spread->pieces > most_warps) return false;
    spread->busy = up(sizes.pieces, spread->pieces);
    spread->sent = sizes.pieces * spread->passes * sizes.stage;
    spread->bytes = spread->passes * 8 * sizes.stride;
    spread->arrivals_at = arrivals_begin;
    spread->slices = 1;
    spread->slice_bits = 0;
    while (2 * spread->slices * spread->pieces <= most_warps && spread->slices < sizes.blocks) {
        spread->slices *= 2;
        ++spread->slice_bits;
    }
    spread->blocks = sizes.blocks;
    spread->share = up(sizes.blocks, spread->slices);
    spread->stride = sizes.stride;
    const int warps = spread->pieces * spread->slices, each_pass = spread->pieces * spread->passes;
    spread->bias_at = header_bytes;
    spread->state_at = spread->bias_at + spread->pieces * sizes.bias;
    spread->stage_at = spread->state_at + each_pass * sizes.state;
    spread->partial_at = spread->stage_at + each_pass * sizes.stage;
    spread->values_at = spread->partial_at + (spread->slices > 1 ? each_pass * spread->slices * sizes.partial : 0);
    spread->fragments_at = spread->values_at + (spread->grid ? 1 : 2) * spread->bytes;
    const int apart = spread->share > sizes.kept ? spread->share - sizes.kept : 0;
    const std::int64_t shared = spread->fragments_at + static_cast<std::int64_t>(warps) * apart * slot_bytes;
    spread->shared = static_cast<int>(shared);
    return shared <= static_cast<std::int64_t>(limit);
}

/// Cycles of a step, roughly: what decides between spreads that fit. Products of a warp scheduler, 8 cycles each, run
/// beside what shared memory moves, 128 bytes a cycle; the rest follows one behind the other.
std::int64_t cycles_of(const Sizes& sizes, const Spread& spread) {
    const int warps = spread.pieces * spread.slices, apart = spread.share > sizes.kept ? spread.share - sizes.kept : 0;
    const int products = up(warps, 4) * spread.share * 4 * 8, moved = warps * (spread.share * 4 + apart * 16);
    const std::int64_t values = static_cast<std::int64_t>(spread.passes) * 8 * sizes.stride;
    const int meeting = spread.grid ? 2000 : 500;
    return spread.passes * (products > moved ? products : moved) + values / (spread.grid ? 48 : 32) + meeting +
           up(spread.passes, spread.slices) * 250 + (spread.slices > 1 ? 100 : 0);
}

bool within(const Forward& call) { return call.layers == 1 && call.sums; }
bool within(const Backward&) { return true; }

template <class Plan, class T, class Call>
bool make_plan(const Call& call, const ClusterForm& form, Plan* plan) {
    const int H = call.hidden_size, D = call.directions, batch = call.steps.batch;
    if (!is_half(call.type) || H < 1 || H > 2048 || D < 1 || D > 2 || call.steps.tokens > 0x7fffffff || !within(call))
        return false;
    plan->call = call;
    const Sizes sizes = sizes_of(call);
    const std::size_t limit = shared_limit();
    std::int64_t least = -1;
    const auto consider = [&](bool grid, int parts) {
        for (int passes = 1; passes <= most_passes && (passes == 1 || passes <= up(batch, 8)); ++passes) {
            Spread spread = {};
            spread.grid = grid;
            spread.parts = parts;
            spread.passes = passes;
            spread.tiles = up(batch, 8 * passes);
            spread.slots = D * spread.tiles;
            if (!lay(sizes, limit, &spread)) return;
            const int room =
                grid ? call.multiprocessors / parts : clusters_at_once<Plan, T>(parts, call.multiprocessors);
            if (room < 1) return;
            // A cluster that has ended makes room for the next; all blocks of a grid must run at once.
            const int turns = up(spread.slots, room);
            if (grid && spread.slots > room) spread.slots = room;
            const std::int64_t cycles = cycles_of(sizes, spread) * turns;
            if (least >= 0 && cycles >= least) continue;
            least = cycles;
            plan->spread = spread;
        }
    };
    const bool with_clusters = form.exchange != ClusterForm::grid, with_grid = form.exchange != ClusterForm::cluster;
    for (int parts = 2; parts <= most_cluster && with_clusters; parts *= 2)
        if (form.parts == 0 || form.parts == parts) consider(false, parts);
    if (with_grid && form.parts > 0) consider(true, form.parts);
    for (int pieces = 1; pieces <= most_warps && with_grid && form.parts == 0; ++pieces)
        consider(true, up(sizes.pieces, pieces));
    return least >= 0;
}

template <class T, class Plan>
const char* start(Plan& plan) {
    return start_groups(kernel<Plan, T, true>, kernel<Plan, T, false>, plan, plan.call.directions * plan.spread.tiles,
                        32 * plan.spread.pieces * plan.spread.slices, plan.spread.shared);
}

template <class Plan, class Call>
bool plan_of(const Call& call, const ClusterForm& form, Plan* plan) {
    return call.type == DataType::float16 ? make_plan<Plan, __half>(call, form, plan)
                                          : make_plan<Plan, __nv_bfloat16>(call, form, plan);
}

template <class Plan, class Call>
const char* plan_and_start(const Call& call, const ClusterForm& form) {
    Plan plan;
    if (!plan_of(call, form, &plan)) return "this kernel cannot do the call";
    if (call.steps.batch == 0) return nullptr;
    return call.type == DataType::float16 ? start<__half>(plan) : start<__nv_bfloat16>(plan);
}

template <class Plan, class Call>
std::size_t words(const Call& call, const ClusterForm& form) {
    Plan plan;
    return plan_of(call, form, &plan) ? words_of(plan.spread, call.directions * plan.spread.tiles) : 0;
}

}  // namespace

bool cluster_tensor_fits(const Forward& call, ClusterForm form) {
    ForwardPlan plan;
    return plan_of(call, form, &plan);
}

std::size_t cluster_tensor_progress_words(const Forward& call, ClusterForm form) {
    return words<ForwardPlan>(call, form);
}

const char* cluster_tensor_forward(const Forward& call, ClusterForm form) {
    return plan_and_start<ForwardPlan>(call, form);
}

bool cluster_tensor_fits(const Backward& call, ClusterForm form) {
    BackwardPlan plan;
    return plan_of(call, form, &plan);
}

std::size_t cluster_tensor_progress_words(const Backward& call, ClusterForm form) {
    return words<BackwardPlan>(call, form);
}

const char* cluster_tensor_backward(const Backward& call, ClusterForm form) {
    return plan_and_start<BackwardPlan>(call, form);
}

}  // namespace cuda
}  // namespace cellstep
