/// Whole sequences on tensor cores, float16 and bfloat16: a block keeps the recurrent weights of one stage (and those
/// of its input, if they are part of the launch) in registers and shared memory and takes 8, 16, 24 or 32 rows through
/// all steps, with one block barrier a step.
#include <algorithm>

#include "sweeps.h"

namespace cellstep {
namespace cuda {
namespace {

constexpr int ahead_words = 8;  // of input that a thread holds while they come
constexpr int most_units = 4;   // of work of a warp

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

    /// Where the slots of each unit of work begin, from `at` on, for `count` of them over `warps` warps with `blocks`
    /// k-blocks each; the end of all.
    static int lay(int (&slots_at)[most_units], int at, int count, int warps, int blocks) {
        for (int unit = 0; unit < units; ++unit) {
            slots_at[unit] = at;
            at += std::max(std::min(count - unit * warps, warps), 0) * std::max(blocks - kept_of(unit), 0) * slot_bytes;
        }
        return at;
    }
    template <class Plan>
    static __device__ unsigned char* slot(const Plan& plan, unsigned char* memory, int unit, int warp, int block) {
        return memory + plan.slots_at[unit] +
               (warp * (plan.blocks - kept_of(unit)) + block - kept_of(unit)) * slot_bytes;
    }
};

/// -----------------------------------------------------------------------------------------------------------------
/// Forward. A unit of work is a group of 8 hidden units and two tiles of the product: rows i and f of the 8, and rows g
/// and o. A lane then holds all four gates of one unit for two rows of the batch, and updates their cells by itself.
/// k-blocks: those of h, then those of the input.

/// What all threads of a block know of its stage.
template <class T>
struct Stage : ForwardArrays<T> {
    const T* x;
    Course course;
    int role, layer, columns, blocks;
    int seen[2];  // how far the layer before was, at the last look
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
    int slots_at[most_units];
    int blocks;  // most of a stage
    int shared;
};

template <class L>
__global__ void __launch_bounds__(L::threads, 1) forward_kernel(const __grid_constant__ ForwardPlan plan) {
    using T = typename L::Type;
    const Forward& call = plan.call;
    unsigned char* const memory = shared_memory();
    auto& stage = *reinterpret_cast<Stage<T>*>(memory + arrays_at);
    static_assert(arrays_at + sizeof(stage) <= header_bytes, "the header has room");
    auto& course = stage.course;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int H = call.hidden_size, h_blocks = (H + 31) / 32;
    const bool fused = L::units <= 2 && call.sums == nullptr;

    // Blocks that others wait for have begun before them, whatever order the device starts blocks in.
    if (thread == 0) stage.role = call.layers > 1 ? fetch_add(call.progress, 1) : static_cast<int>(blockIdx.x);
    block_sync();
    const int rows = plan.passes * 8;
    const Tile tile = {call.steps, stage.role % plan.tiles * rows, rows, reinterpret_cast<int*>(memory)};
    {
        const int number = stage.role / plan.tiles, layer = number / call.directions;
        const bool backwards = runs_backwards(call, number % call.directions);
        course.begin(tile, number, 0, backwards);
        if (thread == 0) {
            stage.begin(call, number);
            stage.layer = layer;
            stage.x = static_cast<const T*>(layer == 0 ? call.x : call.outputs) +
                      (layer > 1 ? (layer - 1) * call.steps.tokens * call.directions * H : 0);
            stage.columns = !fused ? 0 : layer == 0 ? call.input_size : call.directions * H;
            stage.blocks = h_blocks + (stage.columns + 31) / 32;
            stage.paired = stage.columns % 2 == 0 && reinterpret_cast<std::uintptr_t>(stage.x) % 4 == 0;
            stage.seen[0] = stage.seen[1] = 0;
        }
    }

    float4* const biases = reinterpret_cast<float4*>(memory + plan.bias_at);
    const auto h_place = [&](int step, int row, int unit) {
        return reinterpret_cast<T*>(memory + plan.h_at + ((step & 1) * rows + row) * plan.h_stride +
                                    chunk_of(unit / 8, row) * 16) +
               unit % 8;
    };
    clear(memory + plan.h_at, plan.slots_at[0] - plan.h_at);
    block_sync();

    const StageWeights& weights = call.stages[course.stage];
    add_biases<T>(biases, weights, 0, plan.groups * 8, H);
    Fragments kept[L::kept > 0 ? L::kept : 1];
#pragma unroll
    for (int j = 0; j < L::units; ++j) {
        const int group = warp + j * plan.warps, blocks = group < plan.groups ? stage.blocks : 0;
        const auto load = [&](Fragments& to, int block) {
            const bool of_h = block < h_blocks;
            load_fragments<T>(to, of_h ? weights.weight_hh : weights.weight_ih, group, H,
                              of_h ? block : block - h_blocks, of_h ? H : stage.columns, lane);
        };
#pragma unroll
        for (int block = 0; block < L::kept_of(j); ++block)
            if (block < blocks) load(kept[L::first_of(j) + block], block);
        for (int block = L::kept_of(j); block < blocks; ++block) {
            Fragments found;
            load(found, block);
            write_fragments(found, L::slot(plan, memory, j, warp, block), lane);
        }
    }

    const auto cells_of = [&](int pass, int group, int lane) {
        return reinterpret_cast<float*>(memory + plan.cells_at) + ((pass * plan.groups + group) * 32 + lane) * 2;
    };
    for (int pass = 0; pass < tile.passes(); ++pass)
        for (int group = warp; group < plan.groups; group += plan.warps)
            for (int e = 0; e < 2; ++e) {
                const int unit = group * 8 + lane / 4, row = pass * 8 + lane % 4 * 2 + e;
                if (unit < H && row < tile.existing())
                    *h_place(0, row, unit) = first_h<T>(call, tile, course, row, unit);
                cells_of(pass, group, lane)[e] = first_cell(call, stage, tile, course, row, unit);
            }

    // Input steps: of step s in buffer s % 3, as the step before reads its first part ahead of the barrier. 16 lanes
    // take every 16th pair of values of a row, 2 rows a warp.
    const auto x_values = [&](int step) { return memory + plan.x_at + step % 3 * rows * plan.x_stride; };
    const auto x_from = [&](int row, int step) {
        return in_global(stage.x) + static_cast<std::int64_t>(course.token(step) + tile.first + row) * stage.columns;
    };
    const auto x_to = [&](int row, int x_entry, int step) {
        return x_values(step) + row * plan.x_stride + chunk_of(x_entry / 4, row) * 16 + x_entry % 4 * 4;
    };
    const auto there = [&](int row, int step) { return row < rows && course.time_of(step) < tile.lengths[row]; };
    /// From the `skip`-th pair of the first row of a thread on.
    const auto copy_x = [&](int step, int skip) {
        const int again = this_thread(), x_entry = again % 16;
        for (int row = again / 16; row < rows; row += 2 * plan.warps, skip = 0) {
            const T* const from = x_from(row, step);
            for (int at = skip; x_entry + 16 * at < (stage.columns + 1) / 2; ++at) {
                const int k = 2 * (x_entry + 16 * at);
                std::uint32_t word = 0;
                if (there(row, step))
                    word = read<std::uint16_t>(from + k) |
                           static_cast<std::uint32_t>(k + 1 < stage.columns ? read<std::uint16_t>(from + k + 1) : 0)
                               << 16;
                write(x_to(row, x_entry, step) + block_bytes * at, word);
            }
        }
    };
    std::uint32_t coming[ahead_words];  // of x, words or single values; or gate sums of two rows
    const auto load_x = [&](int step) {
        const int again = this_thread(), x_row = again / 16, x_entry = again % 16;
        const T* const from = x_from(x_row, step) + 2 * x_entry;
        const int left = there(x_row, step) ? stage.columns - 2 * x_entry : 0;
        if (stage.paired) {
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
        const int again = this_thread(), x_row = again / 16, x_entry = again % 16;
        if (x_row >= rows) return;
        unsigned char* const to = x_to(x_row, x_entry, step);
        if (stage.paired) {
#pragma unroll
            for (int at = 0; at < ahead_words; ++at)
                if (x_entry + 16 * at < (stage.columns + 1) / 2) write(to + block_bytes * at, coming[at]);
        } else {
#pragma unroll
            for (int at = 0; at < ahead_words / 2; ++at)
                if (x_entry + 16 * at < (stage.columns + 1) / 2)
                    write(to + block_bytes * at, coming[2 * at] | coming[2 * at + 1] << 16);
        }
    };

    // One thread waits until the layer before has done what input step `step` reads; a block barrier comes before it
    // is read.
    const auto wait = [&](int step) {
        if (this_thread() != 0 || stage.layer == 0 || step >= course.steps) return;
        for (int side = 0; side < call.directions; ++side) {
            const int t = course.time_of(step), need = runs_backwards(call, side) ? course.steps - t : t + 1;
            const int flag = ((stage.layer - 1) * call.directions + side) * plan.tiles + stage.role % plan.tiles;
            if (stage.seen[side] < need) stage.seen[side] = wait_until(call.progress + 1 + flag, need);
        }
    };
    const auto tell = [&](int done) {
        if (this_thread() == 0 && stage.layer + 1 < call.layers) store_release(call.progress + 1 + stage.role, done);
    };

    if (fused) {
        for (int step = 0; step < 4; ++step) wait(step);
        block_sync();
        for (int step = 0; step < 2 && step < course.steps; ++step) copy_x(step, 0);
        if (course.steps > 2) load_x(2);
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
            const int again = this_thread();
            read_fragments(found, L::slot(plan, memory, j, again / 32, block), again % 32);
            multiply_block<T>(sums, found, read<uint4>(values + (block - first) * block_bytes));
        }
    };
    const auto clear_second = [&] {
#pragma unroll
        for (int at = 0; at < 8; ++at) sums[1][at / 4][at % 4] = 0.0f;
    };
    const auto group_of = [&](int j) { return this_thread() / 32 + j * plan.warps; };
    const auto load = [&](int step, int pass, int j) {
        const int again = this_thread() % 32;
        load_sums(coming, stage, tile, course, step, pass * 8 + again % 4 * 2, group_of(j) * 8 + again / 4, H);
    };
    // What of a group's sums does not hang on the step before.
    const auto prepare = [&](auto unit, int step, int pass) {
        constexpr int j = decltype(unit)::value;
        if (group_of(j) >= plan.groups) return;
        const int again = this_thread() % 32;
        const float4 bias = biases[group_of(j) * 8 + again / 4];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            sums[0][0][e] = bias.x;
            sums[0][0][2 + e] = bias.y;
            sums[0][1][e] = bias.z;
            sums[0][1][2 + e] = bias.w;
        }
        if (fused) {
            clear_second();
            if (stage.blocks > h_blocks)
                multiply(unit, h_blocks, stage.blocks,
                         x_values(step) + pass * 8 * plan.x_stride + values_place(again, plan.x_stride));
            return;
        }
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int gate = 0; gate < 4; ++gate)
                sums[0][gate / 2][gate % 2 * 2 + e] += to_float(from_bits<T>(coming[e * 4 + gate]));
        // Those of what comes behind are on their way meanwhile.
        const bool more = j + 1 < L::units && group_of(j + 1) < plan.groups, same = more || pass + 1 < tile.passes();
        load(same ? step : step + 1, more ? pass : same ? pass + 1 : 0, more ? j + 1 : 0);
    };
    const auto finish = [&](auto unit, int step, int pass) {
        constexpr int j = decltype(unit)::value;
        const int resets = resets_behind(tile, course, step, pass * 8 + this_thread() % 4 * 2);
        if (!fused) clear_second();
        multiply(unit, 0, h_blocks,
                 memory + plan.h_at + ((step & 1) * rows + pass * 8) * plan.h_stride +
                     values_place(this_thread() % 32, plan.h_stride));
        // Late in a step, when what the step before wrote has long arrived: the release waits for it.
        if (j == 0 && pass == 0 && step % 2 == 1) tell(step);
        const int again = this_thread() % 32, row = pass * 8 + again % 4 * 2, u = group_of(j) * 8 + again / 4;
        float* const cells = cells_of(pass, group_of(j), again);
        const float2 c_before = read<float2>(cells);
        float a[2][4], c_of[2] = {c_before.x, c_before.y};
        T h_of[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int gate = 0; gate < 4; ++gate)
                a[e][gate] = sums[0][gate / 2][gate % 2 * 2 + e] + sums[1][gate / 2][gate % 2 * 2 + e];
            const bool past = course.time_of(step) >= tile.lengths[row + e];
            float h;
            update(a[e], c_of[e], h, T());
            h_of[e] = from_float<T>(h);
            if (u < H) *h_place(step + 1, row + e, u) = past ? *h_place(step, row + e, u) : h_of[e];
            if (!past) cells[e] = c_of[e];
        }
        put_to_initial<T>(resets, call, course, u, cells, [&](int e) { return h_place(step + 1, row + e, u); });
        store_rows(call, stage, tile, course, step, row, u, a, c_of, h_of);
    };

    if (course.steps > 0) {
        if (!fused) load(0, 0, 0);
        prepare(Number<0>(), 0, 0);
    }
    for (int step = 0; step < course.steps; ++step) {
        block_sync();
        if (this_thread() == 0) course.look_up(tile, step + Course::ahead);
        if (fused) {
            if (step + 2 < course.steps) {
                store_x(step + 2);
                copy_x(step + 2, stage.paired ? ahead_words : ahead_words / 2);
            }
            if (step + 3 < course.steps) load_x(step + 3);
        }
        for (int pass = 0; pass < tile.passes(); ++pass) {
            each<L::units>([&](auto unit) {
                constexpr int j = decltype(unit)::value;
                if (group_of(j) < plan.groups) finish(unit, step, pass);
                if (j + 1 < L::units) prepare(Number<(j + 1) % L::units>(), step, pass);
            });
            const bool same = pass + 1 < tile.passes();
            if (same || step + 1 < course.steps) prepare(Number<0>(), same ? step : step + 1, same ? pass + 1 : 0);
        }
        wait(step + 4);
    }
    block_sync();
    tell(course.steps);

    // The cells and h are where the last step left them.
    if (call.to.h) {
        const int again = this_thread() % 32;
        for (int pass = 0; pass < tile.passes(); ++pass)
            for (int group = group_of(0); group < plan.groups; group += plan.warps)
                for (int e = 0; e < 2; ++e) {
                    const int unit = group * 8 + again / 4, row = pass * 8 + again % 4 * 2 + e;
                    if (unit >= H || row >= tile.existing()) continue;
                    carry(call.to, state_place(call, tile, course, row, unit),
                          to_float(*h_place(course.steps, row, unit)), cells_of(pass, group, again)[e]);
                }
    }
    if (zeros_past(call.steps)) {
        clear_past(stage.y, tile, course.steps, H, call.directions * H);
        clear_past(stage.gates, tile, course.steps, 4 * H, 4 * H);
        clear_past(stage.cells, tile, course.steps, H, H);
    }
}

/// Calls with the layout for so many groups.
template <class T, class Function>
auto with_forward(int groups, const Function& function) {
    return groups <= 12   ? function(Layout<T, 1, 0, 4, 12>())
           : groups <= 16 ? function(Layout<T, 1, 0, 3, 16>())
           : groups <= 24 ? function(Layout<T, 2, 3, 2, 12>())
                          : function(Layout<T, 4, 4, 0, 8>());
}

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
    if (plan->groups > 24 && !call.sums) return false;  // the layout has no sums that outlive a barrier
    plan->warps = plan->groups <= 16 ? plan->groups : plan->groups <= 24 ? (plan->groups + 1) / 2 : 8;
    const int h_blocks = (H + 31) / 32;
    int x_blocks = call.sums ? 0 : (call.input_size + 31) / 32;
    if (call.layers > 1 && (call.directions * H + 31) / 32 > x_blocks) x_blocks = (call.directions * H + 31) / 32;
    plan->blocks = h_blocks + x_blocks;
    const auto more = [&](int passes) {  // warps that bring input alone, 2 rows each
        return call.sums || plan->groups > 12 ? plan->warps : std::max(plan->warps, std::min(4 * passes, 12));
    };
    plan->h_stride = row_bytes(h_blocks);
    plan->x_stride = x_blocks ? row_bytes(x_blocks) : 0;
    plan->bias_at = header_bytes;
    plan->cells_at = plan->bias_at + plan->groups * 8 * 16;
    for (plan->passes = passes_for(call.steps.batch, stages, call.multiprocessors); plan->passes > 0; --plan->passes) {
        const int rows = plan->passes * 8;
        plan->warps = more(plan->passes);
        plan->h_at = plan->cells_at + rows * plan->groups * 8 * 4;
        plan->x_at = plan->h_at + 2 * rows * plan->h_stride;
        plan->shared = with_forward<__half>(plan->groups, [&](auto layout) {
            return decltype(layout)::lay(plan->slots_at, plan->x_at + 3 * rows * plan->x_stride, plan->groups,
                                         plan->warps, plan->blocks);
        });
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
    int blocks;  // tiles of 16 units, and as many pairs of k-blocks of each
    int warps;
    int passes;
    int tiles;  // of rows
    int stride;
    int carried_at;
    int values_at;
    int slots_at[most_units];
    int shared;
};

template <class L>
__global__ void __launch_bounds__(L::threads, 1) backward_kernel(const __grid_constant__ BackwardPlan plan) {
    using T = typename L::Type;
    const Backward& call = plan.call;
    unsigned char* const memory = shared_memory();
    auto& arrays = *reinterpret_cast<BackwardArrays<T>*>(memory + arrays_at);
    auto& course = *reinterpret_cast<Course*>(memory + arrays_at + sizeof(arrays));
    static_assert(arrays_at + sizeof(arrays) + sizeof(course) <= header_bytes, "the header has room");
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int H = call.hidden_size, rows = plan.passes * 8;
    const Tile tile = {call.steps, static_cast<int>(blockIdx.x) % plan.tiles * rows, rows,
                       reinterpret_cast<int*>(memory)};
    {
        const int direction = static_cast<int>(blockIdx.x) / plan.tiles;
        course.begin(tile, direction, 0, !runs_backwards(call, direction));
        if (thread == 0) arrays.begin(call, direction);
    }
    clear(memory + plan.values_at, plan.slots_at[0] - plan.values_at);
    block_sync();

    Fragments kept[L::kept];
#pragma unroll
    for (int j = 0; j < L::units; ++j) {
        const int at = warp + j * plan.warps, pairs = at < plan.blocks ? plan.blocks : 0;
        const WeightView& weights = call.weight_hh[course.stage];
#pragma unroll
        for (int pair = 0; pair < L::kept_of(j); ++pair)
            if (pair < pairs) load_transposed<T>(kept[L::first_of(j) + pair], weights, at, pair, H, lane);
        for (int pair = L::kept_of(j); pair < pairs; ++pair) {
            Fragments found;
            load_transposed<T>(found, weights, at, pair, H, lane);
            write_fragments(found, L::slot(plan, memory, j, warp, pair), lane);
        }
    }

    const auto tile_at = [&](int j) { return this_thread() / 32 + j * plan.warps; };
    const auto row_of = [](int pass) { return pass * 8 + this_thread() % 4 * 2; };
    const auto unit_of = [&](int at) { return at * 16 + this_thread() % 32 / 4; };
    // The gradient of the cells on its way from step to step: [half of the tile][row].
    const auto carried = [&](int pass, int at) {
        return memory + plan.carried_at + ((pass * plan.blocks + at) * 32 + this_thread() % 32) * 16;
    };
    for (int pass = 0; pass < tile.passes(); ++pass)
        for (int at = warp; at < plan.blocks; at += plan.warps) {
            write(carried(pass, at), make_float4(0.0f, 0.0f, 0.0f, 0.0f));
            pass_through<T>(call, tile, course, row_of(pass), unit_of(at));
        }

    Left<T> left;
    const auto load = [&](int step, int pass, int j) {
        left.load(call, arrays, tile, course, step, row_of(pass), unit_of(tile_at(j)));
    };
    const auto values_of = [&](int step, int row) {
        return memory + plan.values_at + ((step & 1) * rows + row) * plan.stride;
    };
    const auto result_place = [&](int step, int pass, int at, int place) {
        const int row = row_of(pass) + place % 2, unit = unit_of(at) + place / 2 * 8;
        return values_of(step, row) + chunk_of(unit / 2, row) * 16 + unit % 2 * 8;
    };
    const auto work = [&](auto number, int step, int pass) {
        constexpr int j = decltype(number)::value;
        constexpr int here = L::kept_of(j);
        float sums[2][2][4] = {};
        if (step > 0) {
            const auto values = [&](int pair) {
                return values_of(step - 1, pass * 8) + values_place(this_thread() % 32, plan.stride) +
                       pair * 2 * block_bytes;
            };
            const unsigned char* const of_kept = values(0);
#pragma unroll
            for (int pair = 0; pair < here; ++pair)
                if (pair < plan.blocks)
                    multiply_pair<T>(sums, kept[L::first_of(j) + pair], read<uint4>(of_kept + pair * 2 * block_bytes),
                                     read<uint4>(of_kept + pair * 2 * block_bytes + block_bytes));
#pragma unroll(L::unrolled)
            for (int pair = here; pair < plan.blocks; ++pair) {
                Fragments found;
                const int again = this_thread();
                const unsigned char* const of_pair = values(pair);
                read_fragments(found, L::slot(plan, memory, j, again / 32, pair), again % 32);
                multiply_pair<T>(sums, found, read<uint4>(of_pair), read<uint4>(of_pair + block_bytes));
            }
        }
        const float4 dc_quad = read<float4>(carried(pass, tile_at(j)));
        float dh_of[4], dc_of[4] = {dc_quad.x, dc_quad.y, dc_quad.z, dc_quad.w};
#pragma unroll
        for (int place = 0; place < 4; ++place)
            dh_of[place] = (sums[0][0][place] + sums[0][1][place]) + (sums[1][0][place] + sums[1][1][place]);
        step_back(dh_of, dc_of, left, call, arrays, tile, course, step, row_of(pass), unit_of(tile_at(j)),
                  [&](int place, const uint2& bits) {
                      write(result_place(step, pass, tile_at(j), place), bits);
                      if (step < course.steps)
                          store_sums(call, arrays, tile, course, step, row_of(pass) + place % 2,
                                     unit_of(tile_at(j)) + place / 2 * 8, bits);
                  });
        write(carried(pass, tile_at(j)), make_float4(dc_of[0], dc_of[1], dc_of[2], dc_of[3]));
    };

    load(0, 0, 0);
    for (int step = 0; step <= course.steps; ++step) {
        block_sync();
        if (this_thread() == 0) course.look_up(tile, step + Course::ahead);
        for (int pass = 0; pass < tile.passes(); ++pass)
            each<L::units>([&](auto number) {
                constexpr int j = decltype(number)::value;
                if (tile_at(j) >= plan.blocks) return;
                work(number, step, pass);
                const bool more = j + 1 < L::units && tile_at(j + 1) < plan.blocks;
                const bool same = more || pass + 1 < tile.passes();
                load(same ? step : step + 1, more ? pass : same ? pass + 1 : 0, more ? j + 1 : 0);
            });
    }
    // Beside the values of the last step, which other warps may read still.
    if (call.to.h)
        for (int pass = 0; pass < tile.passes(); ++pass)
            for (int at = tile_at(0); at < plan.blocks; at += plan.warps)
                carry_back(call, tile, course, row_of(pass), unit_of(at),
                           [&](int place) { return result_place(course.steps, pass, at, place); });
    if (zeros_past(call.steps)) clear_past(arrays.grad_sums, tile, course.steps, 4 * H, 4 * H);
}

template <class T, class Function>
auto with_backward(int tiles, const Function& function) {
    return tiles <= 8    ? function(Layout<T, 1, 0, 8, 8>())
           : tiles <= 11 ? function(Layout<T, 1, 0, 4, 12>())
                         : function(Layout<T, 2, 11, 0, 7>());
}

bool make_plan(const Backward& call, BackwardPlan* plan) {
    const int H = call.hidden_size;
    if (!is_half(call.type) || H < 1 || H > 224 || call.directions < 1 || call.directions > 2 ||
        call.steps.tokens > 0x7fffffff)
        return false;
    plan->call = call;
    plan->blocks = (H + 15) / 16;
    plan->warps = plan->blocks <= 11 ? plan->blocks : 7;
    plan->stride = row_bytes(2 * plan->blocks);
    plan->carried_at = header_bytes;
    for (plan->passes = passes_for(call.steps.batch, call.directions, call.multiprocessors); plan->passes > 0;
         --plan->passes) {
        const int rows = plan->passes * 8;
        plan->values_at = plan->carried_at + rows * plan->blocks * 16 * 4;
        plan->shared = with_backward<__half>(plan->blocks, [&](auto layout) {
            return decltype(layout)::lay(plan->slots_at, plan->values_at + 2 * rows * plan->stride, plan->blocks,
                                         plan->warps, plan->blocks);
        });
        plan->tiles = (call.steps.batch + rows - 1) / rows;
        if (static_cast<std::size_t>(plan->shared) <= shared_limit()) return true;
    }
    return false;
}

template <class Plan>
const char* launch_plan(void (*kernel)(Plan), const Plan& plan, int blocks) {
    return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(plan.warps * 32)),
                  static_cast<std::size_t>(plan.shared), plan.call.stream, plan);
}

template <class T>
const char* start(const ForwardPlan& plan) {
    return with_forward<T>(plan.groups, [&](auto layout) {
        return launch_plan(forward_kernel<decltype(layout)>, plan,
                           plan.tiles * plan.call.layers * plan.call.directions);
    });
}

template <class T>
const char* start(const BackwardPlan& plan) {
    return with_backward<T>(plan.blocks, [&](auto layout) {
        return launch_plan(backward_kernel<decltype(layout)>, plan, plan.tiles * plan.call.directions);
    });
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
