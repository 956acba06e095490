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
#include <algorithm>

#include "exchange.h"
#include "sweeps.h"

namespace cellstep {
namespace cuda {
namespace {

constexpr int most_warps = 8;

/// How the weights and the work lie over blocks, warps and shared memory.
struct Spread : Sharing {
    int pieces;  // of a part
    int slices;  // a power of two
    int slice_bits;
    int blocks;    // of k (backward: pairs of them)
    int share;     // of a slice
    int passes;    // of 8 rows
    int tiles;     // of rows; group: direction * tiles + tile
    int stride;    // bytes of a row
    int row_sent;  // bytes of a row that each part is sent in a step
    int bias_at;   // places in shared memory, in bytes
    int state_at;
    int stage_at;
    int partial_at;
    int fragments_at;
    int shared;
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

template <class Call>
__device__ inline Tile tile_of(const Call& call, const Spread& spread, int group, unsigned char* memory) {
    const int rows = spread.passes * 8;
    return {call.steps, group % spread.tiles * rows, rows, reinterpret_cast<int*>(memory)};
}

/// Where the weights of a warp lie that are not in registers: the units of k behind its kept ones.
template <int Kept>
__device__ inline unsigned char* slot_of(const Spread& spread, unsigned char* memory, int thread, int block) {
    return memory + spread.fragments_at + (thread / 32 * (spread.share - Kept) + block - Kept) * slot_bytes;
}

/// Sets out for what a warp finishes behind this pass of this step.
template <class Load>
__device__ inline void load_next(const Spread& spread, const Tile& tile, int step, int pass, const Load& load) {
    const bool same = pass + spread.slices < tile.passes();
    load(same ? step : step + 1, same ? pass + spread.slices : Work(spread, this_thread()).slice);
}

/// Sends the rows of a pass, `Chunks` chunks of 16 bytes each, of which the first is number `first` of all; a power of
/// two of them. place(row of the pass, chunk): where one lies. Rows that do not exist are not sent: all lanes share
/// what there is, chunks and parts.
template <int Chunks, bool Clusters, class Place>
__device__ inline void send_rows(const Exchange<Clusters>& exchange, const Spread& spread, const Tile& tile, int step,
                                 int pass, int first, const Place& place) {
    const int count = min(tile.existing() - pass * 8, 8), bits = count > 4 ? 3 : count > 2 ? 2 : count > 1 ? 1 : 0;
    const int lane = this_thread() % 32, chunk = lane % Chunks, at = lane / Chunks;
    constexpr int lanes = 32 / Chunks;  // of a chunk
    const int apart = max(lanes >> bits, 1);
#pragma unroll 1
    for (int row = at & ((1 << bits) - 1); row < count; row += lanes)
        exchange.send(step, (pass * 8 + row) * spread.stride + chunk_of(first + chunk, row) * 16,
                      read<uint4>(place(row, chunk)), at >> bits, apart);
}

/// -----------------------------------------------------------------------------------------------------------------
/// Forward. A piece is a group of 8 hidden units, for which a lane has all four gates of one unit for two rows.

constexpr int forward_kept = 12;  // k-blocks of a warp in registers

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
    auto& course = *reinterpret_cast<Course*>(memory + course_at);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int H = call.hidden_size;
    const Tile tile = tile_of(call, spread, exchange.group(), memory);
    {
        const int direction = exchange.group() / spread.tiles;
        course.begin(tile, direction, exchange.part() * spread.pieces * 8, runs_backwards(call, direction));
        if (thread == 0) arrays.begin(call, direction);
    }
    clear(exchange.values(0), spread.bytes);
    if (Clusters) clear(exchange.values(1), spread.bytes);
    block_sync();

    float4* const biases = reinterpret_cast<float4*>(memory + spread.bias_at);
    const StageWeights& weights = call.stages[course.stage];
    add_biases<T>(biases, weights, course.first_unit, spread.pieces * 8, H);
    const Work all_along(spread, thread);
    const auto exists = [&](const Work& work) { return course.first_unit + work.piece * 8 < H; };
    const auto blocks_of = [&](const Work& work) {
        return exists(work) ? min(spread.share, spread.blocks - work.slice * spread.share) : 0;
    };
    Fragments kept[forward_kept];
    {
        const int group = course.first_unit / 8 + all_along.piece, first_block = all_along.slice * spread.share;
        const int blocks = blocks_of(all_along);
#pragma unroll
        for (int block = 0; block < forward_kept; ++block)
            if (block < blocks)
                load_fragments<T>(kept[block], weights.weight_hh, group, H, first_block + block, H, lane);
        for (int block = forward_kept; block < blocks; ++block) {
            Fragments found;
            load_fragments<T>(found, weights.weight_hh, group, H, first_block + block, H, lane);
            write_fragments(found, slot_of<forward_kept>(spread, memory, thread, block), lane);
        }
    }

    const auto h_place = [&](int step, int row, int unit) {
        return reinterpret_cast<T*>(exchange.values(step) + row * spread.stride + chunk_of(unit / 8, row) * 16) +
               unit % 8;
    };
    for (int row = warp; row < tile.existing(); row += static_cast<int>(blockDim.x) / 32)
        for (int unit = lane; unit < H; unit += 32) *h_place(0, row, unit) = first_h<T>(call, tile, course, row, unit);
    const auto cells_of = [&](const Work& work, int pass) {
        return reinterpret_cast<float*>(memory + spread.state_at) +
               ((pass * spread.pieces + work.piece) * 32 + work.lane) * 2;
    };
    for (int pass = all_along.slice; pass < tile.passes(); pass += spread.slices)
        for (int e = 0; e < 2; ++e)
            cells_of(all_along, pass)[e] = first_cell(call, arrays, tile, course, pass * 8 + 2 * all_along.q + e,
                                                      course.first_unit + all_along.piece * 8 + lane / 4);

    std::uint32_t coming[8];  // gate sums that were given
    const auto load = [&](int step, int pass) {
        const Work work(spread, this_thread());
        load_sums(coming, arrays, tile, course, step, pass * 8 + 2 * work.q,
                  course.first_unit + work.piece * 8 + work.lane / 4, H);
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
            read_fragments(found, slot_of<forward_kept>(spread, memory, again, block), again % 32);
            multiply_block<T>(sums, found, read<uint4>(values + block * block_bytes));
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int at = 0; at < 4; ++at) all[half][at] = sums[0][half][at] + sums[1][half][at];
    };
    const auto finish = [&](const float (&all)[2][4], int step, int pass) {
        const Work work(spread, this_thread());
        const int at = work.piece * 8 + work.lane / 4, u = course.first_unit + at, row = pass * 8 + 2 * work.q;
        const int resets = resets_behind(tile, course, step, row);
        float* const cells = cells_of(work, pass);
        const float4 bias = biases[at];
        float a[2][4];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            a[e][0] = all[0][e] + bias.x + to_float(from_bits<T>(coming[e * 4]));
            a[e][1] = all[0][2 + e] + bias.y + to_float(from_bits<T>(coming[e * 4 + 1]));
            a[e][2] = all[1][e] + bias.z + to_float(from_bits<T>(coming[e * 4 + 2]));
            a[e][3] = all[1][2 + e] + bias.w + to_float(from_bits<T>(coming[e * 4 + 3]));
        }
        load_next(spread, tile, step, pass, load);
        unsigned char* const stage = memory + spread.stage_at + (pass * spread.pieces + work.piece) * 128;

        const auto stage_place = [&](int e) {
            return reinterpret_cast<T*>(stage + (2 * work.q + e) * 16) + work.lane / 4;
        };
        const float2 c_before = read<float2>(cells);
        float c_of[2] = {c_before.x, c_before.y};
        T h_of[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const bool past = course.time_of(step) >= tile.lengths[row + e];
            float h;
            update(a[e], c_of[e], h, T());
            h_of[e] = from_float<T>(h);
            *stage_place(e) = u >= H ? from_float<T>(0.0f) : past ? *h_place(step, row + e, u) : h_of[e];
            if (!past) cells[e] = c_of[e];
        }
        put_to_initial<T>(resets, call, course, u, cells, stage_place);
        if (step + 1 < course.steps) {
            warp_sync();
            send_rows<1>(exchange, spread, tile, step + 1, pass, course.first_unit / 8 + work.piece,
                         [&](int of_row, int) { return stage + of_row * 16; });
        }
        store_rows(call, arrays, tile, course, step, row, u, a, c_of, h_of);
    };
    const auto partial = [&](const Work& work, int pass, int of_slice) {
        return memory + spread.partial_at + ((pass * spread.slices + of_slice) * spread.pieces + work.piece) * 1024 +
               work.lane * 16;
    };

    load(0, all_along.slice);
    for (int step = 0; step < course.steps; ++step) {
        exchange.meet(step, tile.existing() * spread.row_sent, tile.existing() * spread.stride);
        if (step == 0 && is_idle<Clusters>(spread, exchange.part(), exists(Work(spread, this_thread())))) break;
        if (this_thread() == 0) course.look_up(tile, step + Course::ahead);
        for (int pass = 0; pass < tile.passes(); ++pass) {
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
            for (int pass = work.slice; exists(work) && pass < tile.passes(); pass += spread.slices) {
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
        for (int pass = work.slice; exists(work) && pass < tile.passes(); pass += spread.slices)
            for (int e = 0; e < 2; ++e) {
                const int row = pass * 8 + 2 * work.q + e, u = course.first_unit + work.piece * 8 + work.lane / 4;
                if (u >= H || row >= tile.existing()) continue;
                carry(call.to, state_place(call, tile, course, row, u),
                      to_float(arrays.h_n[static_cast<std::int64_t>(tile.first + row) * H + u]),
                      cells_of(work, pass)[e]);
            }
    }

    // Nothing is sent behind the last meeting: no part writes to one that may have ended.
    if (zeros_past(call.steps) && course.first_unit < H) {
        const int units = min(spread.pieces * 8, H - course.first_unit);
        clear_past(arrays.y + course.first_unit, tile, course.steps, units, call.directions * H);
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
    auto& course = *reinterpret_cast<Course*>(memory + course_at);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const int H = call.hidden_size;
    const Tile tile = tile_of(call, spread, exchange.group(), memory);
    {
        const int direction = exchange.group() / spread.tiles;
        course.begin(tile, direction, exchange.part() * spread.pieces * 16, !runs_backwards(call, direction));
        if (thread == 0) arrays.begin(call, direction);
    }
    clear(exchange.values(0), spread.bytes);
    if (Clusters) clear(exchange.values(1), spread.bytes);
    block_sync();

    const Work all_along(spread, thread);
    const auto exists = [&](const Work& work) { return course.first_unit + work.piece * 16 < H; };
    const auto pairs_of = [&](const Work& work) {
        return exists(work) ? min(spread.share, spread.blocks - work.slice * spread.share) : 0;
    };
    Fragments kept[backward_kept];
    {
        const WeightView& weights = call.weight_hh[course.stage];
        const int at = course.first_unit / 16 + all_along.piece, first_pair = all_along.slice * spread.share;
        const int pairs = pairs_of(all_along);
#pragma unroll
        for (int pair = 0; pair < backward_kept; ++pair)
            if (pair < pairs) load_transposed<T>(kept[pair], weights, at, first_pair + pair, H, lane);
        for (int pair = backward_kept; pair < pairs; ++pair) {
            Fragments found;
            load_transposed<T>(found, weights, at, first_pair + pair, H, lane);
            write_fragments(found, slot_of<backward_kept>(spread, memory, thread, pair), lane);
        }
    }

    // The gradient of the cells on its way from step to step: [half of the tile][row].
    const auto carried = [&](const Work& work, int pass) {
        return memory + spread.state_at + ((pass * spread.pieces + work.piece) * 32 + work.lane) * 16;
    };
    const auto row_of = [](const Work& work, int pass) { return pass * 8 + 2 * work.q; };
    const auto unit_of = [&](const Work& work) { return course.first_unit + work.piece * 16 + work.lane / 4; };
    for (int pass = all_along.slice; pass < tile.passes(); pass += spread.slices) {
        write(carried(all_along, pass), make_float4(0.0f, 0.0f, 0.0f, 0.0f));
        pass_through<T>(call, tile, course, row_of(all_along, pass), unit_of(all_along));
    }

    Left<T> left;
    const auto load = [&](int step, int pass) {
        const Work work(spread, this_thread());
        left.load(call, arrays, tile, course, step, row_of(work, pass), unit_of(work));
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
                read_fragments(found, slot_of<backward_kept>(spread, memory, again, pair), again % 32);
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
        const float4 dc_quad = read<float4>(carried(work, pass));
        float dc_of[4] = {dc_quad.x, dc_quad.y, dc_quad.z, dc_quad.w};
        step_back(dh_of, dc_of, left, call, arrays, tile, course, step, row_of(work, pass), unit_of(work),
                  [&](int place, const uint2& bits) { write(result_place(work, pass, place), bits); });
        if (step == course.steps) return;
        write(carried(work, pass), make_float4(dc_of[0], dc_of[1], dc_of[2], dc_of[3]));
        warp_sync();
        send_rows<8>(exchange, spread, tile, step + 1, pass, (course.first_unit / 16 + work.piece) * 8,
                     [&](int row, int chunk) { return stage_place(work, pass, row, chunk); });
// What nobody waits for.
#pragma unroll 1
        for (int place = 0; place < 4; ++place)
            store_sums(call, arrays, tile, course, step, row_of(work, pass) + place % 2, unit_of(work) + place / 2 * 8,
                       read<uint2>(result_place(work, pass, place)));
    };
    const auto partial = [&](const Work& work, int pass, int of_slice) {
        return memory + spread.partial_at + ((pass * spread.slices + of_slice) * spread.pieces + work.piece) * 512 +
               work.lane * 16;
    };

    load(0, all_along.slice);
    // Step 0 reads no values: the first meeting is that all parts have begun.
    for (int step = 0; step <= course.steps; ++step) {
        exchange.meet(step, tile.existing() * spread.row_sent, tile.existing() * spread.stride);
        if (step == 0 && is_idle<Clusters>(spread, exchange.part(), exists(Work(spread, this_thread())))) break;
        if (this_thread() == 0) course.look_up(tile, step + Course::ahead);
        const auto finish_and_load = [&](const float (&dh_of)[4], int pass) {
            finish(dh_of, step, pass);
            load_next(spread, tile, step, pass, load);
        };
        for (int pass = 0; pass < tile.passes(); ++pass) {
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
            for (int pass = again().slice; exists(again()) && pass < tile.passes(); pass += spread.slices) {
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
        for (int pass = work.slice; exists(work) && pass < tile.passes(); pass += spread.slices)
            carry_back(call, tile, course, row_of(work, pass), unit_of(work),
                       [&](int place) { return result_place(work, pass, place); });
    }
    if (zeros_past(call.steps) && course.first_unit < H)
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

constexpr int up(int a, int b) { return (a + b - 1) / b; }

/// Lays a sweep over `parts` blocks. False if it does not fit.
bool lay(const Sizes& sizes, std::size_t limit, Spread* spread) {
    spread->pieces = up(sizes.pieces, spread->parts);
    if (spread->pieces > most_warps) return false;
    spread->busy = up(sizes.pieces, spread->pieces);
    spread->row_sent = sizes.pieces * sizes.stage / 8;
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
std::int64_t cycles_of(const Sizes& sizes, const Spread& spread, int batch) {
    const int warps = spread.pieces * spread.slices, apart = spread.share > sizes.kept ? spread.share - sizes.kept : 0;
    const int products = up(warps, 4) * spread.share * 4 * 8, moved = warps * (spread.share * 4 + apart * 16);
    const std::int64_t values = static_cast<std::int64_t>(std::min(spread.passes * 8, batch)) * sizes.stride;
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
                grid ? call.multiprocessors / parts
                     : clusters_at_once(kernel<Plan, T, true>, 32 * most_warps, parts, call.multiprocessors);
            if (room < 1) return;
            // A cluster that has ended makes room for the next; all blocks of a grid must run at once.
            const int turns = up(spread.slots, room);
            if (grid && spread.slots > room) spread.slots = room;
            const std::int64_t cycles = cycles_of(sizes, spread, batch) * turns;
            if (least >= 0 && cycles >= least) continue;
            least = cycles;
            plan->spread = spread;
        }
    };
    for (const bool grid : {false, true}) {
        if (form.exchange == (grid ? ClusterForm::cluster : ClusterForm::grid)) continue;
        // Of as many pieces a part, the fewest parts.
        for (int pieces = 1; pieces <= most_warps; ++pieces) {
            const int parts = form.parts > 0 ? form.parts : std::max(up(sizes.pieces, pieces), grid ? 1 : 2);
            if (grid || (parts >= 2 && parts <= most_cluster)) consider(grid, parts);
            if (form.parts > 0) break;
        }
    }
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
