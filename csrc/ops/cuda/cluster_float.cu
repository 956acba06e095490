/// Recurrences too large for one block with sums in float: float32, and float16 and bfloat16 where rows are few. A quad
/// of cluster_float.h is the four gates of a hidden unit, and an item its h of one row, which a lane finishes and sends
/// to all parts before it writes what nobody waits for.
#include "cluster_float.h"

namespace cellstep {
namespace cuda {
namespace {

struct ForwardPlan {
    Forward call;
    FloatSpread spread;
};

/// What a lane loads a step before its item needs it.
struct Coming {
    std::uint32_t sums[4];  // i, g, f, o
    bool reset;             // behind the step
};

/// All of a part but its weights. What a method needs it finds again: registers are for weights.
template <int Rows, bool Clusters>
struct Part {
    const Forward& call;
    const FloatSpread& spread;
    unsigned char* memory;
    Exchange<Clusters> exchange;
    FloatCourse& course;
    int* lengths;  ///< shared, of the tile's rows

    __device__ explicit Part(const ForwardPlan& plan)
        : call(plan.call),
          spread(plan.spread),
          memory(shared_memory()),
          exchange{spread, memory},
          course(*reinterpret_cast<FloatCourse*>(memory + float_course_at)),
          lengths(reinterpret_cast<int*>(memory)) {}

    __device__ int rows() const { return Rows * spread.panels; }
    __device__ Sweep tile() const { return {call.steps, course.first_row, course.falling, course.bound}; }
    __device__ float4* biases() const { return reinterpret_cast<float4*>(memory + spread.own_at); }
    __device__ float* values(int step) const { return reinterpret_cast<float*>(exchange.values(step)); }
    /// Places in arrays (D, N, H) and tokens in arrays (D, P, ...).
    __device__ std::int64_t state_place(int row, int unit) const {
        return (std::int64_t(course.direction) * call.steps.batch + course.first_row + row) * call.hidden_size + unit;
    }
    __device__ std::int64_t stage_token(int base, int row) const {
        return std::int64_t(course.direction) * call.steps.tokens + base + course.first_row + row;
    }
    __device__ float read(const void* data, std::int64_t place) const {
        return decode(load(data, call.type, place), call.type);
    }
    __device__ float initial(const void* data, int unit) const {
        return data ? read(data, std::int64_t(course.direction) * call.hidden_size + unit) : 0.0f;
    }
    __device__ bool flag(int t, int row) const {
        return call.steps.reset[std::int64_t(t) * call.steps.batch + course.first_row + row] != 0;
    }
    __device__ bool starts_reset(int row) const {
        return call.steps.reset && !course.falling && lengths[row] > 0 && flag(0, row);
    }
    __device__ UnitItem<Rows> item() const {
        const int thread = this_thread();
        return {spread, exchange.part(), thread % 32, thread};
    }
    __device__ int length_of(const UnitItem<Rows>& item) const {
        return item.exists && item.quad < call.hidden_size ? lengths[item.row] : 0;
    }
    /// Whether this thread's warp has units.
    __device__ bool is_busy() const {
        return course.first_quad + (this_thread() / 32 << (5 - spread.lane_bits)) < call.hidden_size;
    }

    /// Everything is there but the values of step 0. The block meets.
    __device__ void begin() const {
        const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
        if (thread == 0) {
            const int direction = exchange.group() / spread.tiles;
            Sweep found = {call.steps, exchange.group() % spread.tiles * rows(),
                           call.directions == 2 ? direction == 1 : call.reverse, 0};
            for (int row = 0; row < rows(); ++row) {
                lengths[row] = found.length(row);
                found.bound = max(found.bound, lengths[row]);
            }
            course = {found.bound, found.first_row, found.falling, direction, exchange.part() * spread.quads};
        }
        for (int step = 0; step < (Clusters ? 2 : 1); ++step)
            for (int at = thread; at < spread.bytes / 4; at += threads) values(step)[at] = 0.0f;
        block_sync();
        const StageWeights& stage = call.stages[course.direction];
        for (int at = thread; at < spread.quads; at += threads) {
            float bias[4] = {};
            for (int sum = 0; sum < 4 && course.first_quad + at < call.hidden_size; ++sum)
                for (const WeightView* view : {&stage.bias_ih, &stage.bias_hh})
                    bias[sum] += bias_of(*view, call.type, gate_of(sum), course.first_quad + at);
            biases()[at] = make_float4(bias[0], bias[1], bias[2], bias[3]);
        }
        for (int row = 0; row < rows() && course.first_row + row < call.steps.batch; ++row) {
            const bool reset = starts_reset(row);
            float* const to = values(0) + row / Rows * spread.panel_values + row % Rows;
            for (int unit = thread; unit < call.hidden_size; unit += threads)
                to[unit * Rows] = reset ? initial(call.initial_h, unit)
                                        : state_or(call.from.h, call.h, call.type, state_place(row, unit));
        }
    }

    /// What the item begins with; a row without steps is done.
    __device__ float first_cell() const {
        const UnitItem<Rows> mine = item();
        if (!mine.exists || mine.quad >= call.hidden_size || course.first_row + mine.row >= call.steps.batch)
            return 0.0f;
        const std::int64_t place = state_place(mine.row, mine.quad);
        const float c = state_or(call.from.c, call.c, call.type, place);
        if (lengths[mine.row] == 0) {
            const float h = state_or(call.from.h, call.h, call.type, place);
            store(call.h_n, call.type, place, h);
            store(call.c_n, call.type, place, c);
            carry(call.to, place, h, c);
        }
        return starts_reset(mine.row) ? initial(call.initial_c, mine.quad) : c;
    }

    __device__ Coming fetch(int step, int base) const {
        const UnitItem<Rows> mine = item();
        const int t = step < course.bound ? tile().time(step) : call.steps.steps, length = length_of(mine);
        const std::int64_t from = stage_token(base, mine.row) * 4 * call.hidden_size + mine.quad;
        Coming coming;
#pragma unroll
        for (int sum = 0; sum < 4; ++sum)
            coming.sums[sum] = t < length ? load(call.sums, call.type, from + gate_of(sum) * call.hidden_size) : 0u;
        // A stage that goes backwards comes from step t to t - 1, and the flag of t parts them.
        const int flagged = course.falling ? t : t + 1;
        coming.reset = call.steps.reset && flagged > 0 && flagged < length && flag(flagged, mine.row);
        return coming;
    }

    /// The item's step behind its sums: c, and what `coming` is to be for the next step.
    __device__ void finish(int step, int base, int next_base, float& c, Coming& coming) const {
        const int H = call.hidden_size, lane = this_thread() % 32;
        const UnitItem<Rows> mine = item();
        const Decoder decoder(call.type);
        // Lanes without an item find something too, which parts no lanes and is nobody's.
        const bool is_real = mine.exists && mine.quad < H;
        const float4 sum =
            reinterpret_cast<const float4*>(sums_of(spread, memory, this_thread() / 32))[min(lane, spread.items - 1)];
        const float4 bias = biases()[mine.quad - course.first_quad];
        const float before = values(step)[is_real ? mine.value : 0];
        const int t = tile().time(step), length = is_real ? lengths[mine.row] : 0;
        const bool active = t < length;
        const float gates[4] = {sigmoid_of(sum.x + (bias.x + decoder(coming.sums[0]))),
                                tanh_of(sum.y + (bias.y + decoder(coming.sums[1]))),
                                sigmoid_of(sum.z + (bias.z + decoder(coming.sums[2]))),
                                sigmoid_of(sum.w + (bias.w + decoder(coming.sums[3])))};
        const float c_behind = gates[2] * c + gates[0] * gates[1], h = gates[3] * tanh_of(c_behind);
        float h_next = active ? h : is_real ? before : 0.0f;
        c = active ? c_behind : c;
        if (coming.reset) {
            h_next = initial(call.initial_h, mine.quad);
            c = initial(call.initial_c, mine.quad);
        }
        if (step + 1 < course.bound) send_values<Rows>(exchange, spread, step + 1, H, h_next);
        coming = fetch(step + 1, next_base);

        // What nobody waits for.
        if (!active) return;
        const DataType type = call.type;
        const std::int64_t token = base + course.first_row + mine.row, of_stage = stage_token(base, mine.row);
        store(call.y, type, (token * call.directions + course.direction) * H + mine.quad, h);
        if (call.gates) {
#pragma unroll
            for (int sum_at = 0; sum_at < 4; ++sum_at)
                store(call.gates, type, (of_stage * 4 + gate_of(sum_at)) * H + mine.quad, gates[sum_at]);
        }
        if (call.cells) store(call.cells, type, of_stage * H + mine.quad, c_behind);
        if (t == (course.falling ? 0 : length - 1)) {
            const std::int64_t place = state_place(mine.row, mine.quad);
            store(call.h_n, type, place, h);
            store(call.c_n, type, place, c_behind);
            carry(call.to, place, h, c_behind);
        }
    }

    /// Zeros past lengths.
    __device__ void end() const {
        const int H = call.hidden_size, units = min(spread.quads, H - course.first_quad);
        if (units <= 0) return;
        const auto clear = [&](void* data, std::int64_t first, int stride) {
            clear_past_lengths(behind(data, call.type, first + course.first_quad), call.type, tile(), rows(), stride,
                               units);
        };
        const std::int64_t past = std::int64_t(course.direction) * call.steps.tokens * H;
        clear(call.y, course.direction * H, call.directions * H);
        for (int gate = 0; gate < 4; ++gate) clear(call.gates, past * 4 + gate * H, 4 * H);
        clear(call.cells, past, H);
    }
};

template <int Held, int Rows, bool Clusters>
__device__ inline void sweep(const ForwardPlan& plan) {
    const FloatSpread& spread = plan.spread;
    const Part<Rows, Clusters> part(plan);
    part.begin();
    HeldWeights<0, Held, Rows> weights;
    weights.lanes = 1 << spread.lane_bits;
    const Seat seat(spread, static_cast<int>(threadIdx.x));
    weights.fill(reinterpret_cast<float4*>(part.memory + spread.rest_at), spread.share, seat.column,
                 AnyGateColumns(plan.call.stages[part.course.direction].weight_hh, plan.call.type,
                                part.course.first_quad + seat.quad, plan.call.hidden_size),
                 [](int) { return 0.0f; });
    float c = part.first_cell();
    int base = part.tile().base(0), next_base = part.tile().base(1);
    Coming coming = part.fetch(0, base);
    for (int step = 0; step < part.course.bound; ++step) {
        part.exchange.meet(step);
        // Who meets nobody later and sends nothing may leave.
        if (Clusters && step == 0 && !part.is_busy()) break;
        const int third_base = part.tile().base(step + 2);
        find_sums(weights, spread, part.exchange.values(step), part.memory);
        warp_sync();
        part.finish(step, base, next_base, c, coming);
        base = next_base;
        next_base = third_base;
    }
    part.end();
}

template <int Held, int Rows, bool Clusters>
__global__ void __launch_bounds__(threads_that_hold(Held), 1) kernel(const __grid_constant__ ForwardPlan plan) {
#if !defined(CELLSTEP_EMULATED) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    if constexpr (!Clusters) sweep<Held, Rows, false>(plan);
#else
    sweep<Held, Rows, Clusters>(plan);
#endif
}

bool make_plan(const Forward& call, const ClusterForm& form, ForwardPlan* plan) {
    const int H = call.hidden_size, D = call.directions;
    if (call.type == DataType::float64 || H < 1 || H > 2048 || D < 1 || D > 2 || call.layers != 1 || !call.sums ||
        call.steps.tokens > 0x7fffffff)
        return false;
    plan->call = call;
    const std::array<int, 7> key = {H, D, call.steps.batch, call.multiprocessors, form.exchange, form.parts};
    return remembered(key, &plan->spread, [&](FloatSpread* spread) {
        const Product product = {H, 1, H, 1, 16, 0};
        const auto at_once = [&](int parts) {
            return clusters_at_once(kernel<48, 1, true>, threads_that_hold(48), parts, call.multiprocessors);
        };
        return choose_spread(product, D, call.steps.batch, call.multiprocessors, form, at_once, spread);
    });
}

}  // namespace

bool cluster_float_fits(const Forward& call, ClusterForm form) {
    ForwardPlan plan;
    return make_plan(call, form, &plan);
}

std::size_t cluster_float_progress_words(const Forward& call, ClusterForm form) {
    ForwardPlan plan;
    return make_plan(call, form, &plan) ? words_of(plan.spread, call.directions * plan.spread.tiles) : 0;
}

const char* cluster_float_forward(const Forward& call, ClusterForm form) {
    ForwardPlan plan;
    if (!make_plan(call, form, &plan)) return "cluster_float: expected a call that cluster_float_fits";
    if (call.steps.batch == 0) return nullptr;
    return with_held_and_rows(plan.spread, [&](auto held, auto rows) {
        return start_groups(kernel<held(), rows(), true>, kernel<held(), rows(), false>, plan,
                            call.directions * plan.spread.tiles, plan.spread.threads, plan.spread.shared);
    });
}

}  // namespace cuda
}  // namespace cellstep
