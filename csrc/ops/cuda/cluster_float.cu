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

template <int Held, int Rows, bool Clusters>
__device__ inline void sweep(const ForwardPlan& plan) {
    const Forward& call = plan.call;
    const FloatSpread& spread = plan.spread;
    unsigned char* const memory = shared_memory();
    const Exchange<Clusters> exchange = {spread, memory};
    const DataType type = call.type;
    const int H = call.hidden_size, batch = call.steps.batch, rows = Rows * spread.panels;
    int* const lengths = reinterpret_cast<int*>(memory);
    auto& course = *reinterpret_cast<FloatCourse*>(memory + float_course_at);
    {
        const int direction = exchange.group() / spread.tiles;
        Sweep found = {call.steps, exchange.group() % spread.tiles * rows,
                       call.directions == 2 ? direction == 1 : call.reverse, 0};
        for (int row = 0; row < rows && threadIdx.x == 0; ++row) {
            lengths[row] = found.length(row);
            found.bound = max(found.bound, lengths[row]);
        }
        if (threadIdx.x == 0)
            course = {found.bound, found.first_row, found.falling, direction, exchange.part() * spread.quads};
    }
    for (int step = 0; step < (Clusters ? 2 : 1); ++step)
        for (int at = static_cast<int>(threadIdx.x); at < spread.bytes / 4; at += static_cast<int>(blockDim.x))
            reinterpret_cast<float*>(exchange.values(step))[at] = 0.0f;
    block_sync();
    const auto tile = [&] { return Sweep{call.steps, course.first_row, course.falling, course.bound}; };

    const StageWeights& stage = call.stages[course.direction];
    float4* const biases = reinterpret_cast<float4*>(memory + spread.own_at);
    HeldWeights<0, Held, Rows> weights;
    weights.lanes = 1 << spread.lane_bits;
    {
        const Seat seat(spread, static_cast<int>(threadIdx.x));
        const int unit = course.first_quad + seat.quad;
        weights.fill(reinterpret_cast<float4*>(memory + spread.rest_at), spread.share, seat.column,
                     AnyGateColumns(stage.weight_hh, type, unit, H), [](int) { return 0.0f; });
        float bias[4] = {};
        for (int sum = 0; sum < 4 && unit < H && seat.column == 0; ++sum)
            for (const WeightView* view : {&stage.bias_ih, &stage.bias_hh})
                bias[sum] += bias_of(*view, type, gate_of(sum), unit);
        if (seat.column == 0) biases[seat.quad] = make_float4(bias[0], bias[1], bias[2], bias[3]);
    }

    const auto state_place = [&](int row, int unit) {
        return (std::int64_t(course.direction) * batch + course.first_row + row) * H + unit;
    };
    const auto initial = [&](const void* data, int unit) {
        return data ? decode(load(data, type, std::int64_t(course.direction) * H + unit), type) : 0.0f;
    };
    const auto flag = [&](int t, int row) {
        return call.steps.reset[std::int64_t(t) * batch + course.first_row + row] != 0;
    };
    const auto starts_reset = [&](int row) {
        return call.steps.reset && !course.falling && lengths[row] > 0 && flag(0, row);
    };
    for (int row = 0; row < rows && course.first_row + row < batch; ++row) {
        const bool reset = starts_reset(row);
        float* const to = reinterpret_cast<float*>(exchange.values(0)) + row / Rows * spread.panel_values + row % Rows;
        for (int unit = static_cast<int>(threadIdx.x); unit < H; unit += static_cast<int>(blockDim.x))
            to[unit * Rows] =
                reset ? initial(call.initial_h, unit) : decode(load(call.h, type, state_place(row, unit)), type);
    }

    // Found again where it is needed: registers are for weights.
    const auto my_item = [&] {
        const int thread = this_thread();
        return UnitItem<Rows>(spread, exchange.part(), thread % 32, thread);
    };
    const auto length_of = [&](const UnitItem<Rows>& item) {
        return item.exists && item.quad < H ? lengths[item.row] : 0;
    };
    float c = 0.0f;
    if (const auto item = my_item(); item.exists && item.quad < H && course.first_row + item.row < batch) {
        const std::int64_t place = state_place(item.row, item.quad);
        c = decode(load(call.c, type, place), type);
        if (lengths[item.row] == 0) {
            store(call.h_n, type, place, decode(load(call.h, type, place), type));
            store(call.c_n, type, place, c);
        } else if (starts_reset(item.row)) {
            c = initial(call.initial_c, item.quad);
        }
    }

    /// Of a direction's arrays that have both apart.
    const auto stage_token = [&](int base, int row) {
        return std::int64_t(course.direction) * call.steps.tokens + base + course.first_row + row;
    };
    Coming coming;
    const auto fetch = [&](int step, int base) {
        const auto item = my_item();
        const int t = step < course.bound ? tile().time(step) : call.steps.steps, length = length_of(item);
        const std::int64_t from = stage_token(base, item.row) * 4 * H + item.quad;
#pragma unroll
        for (int sum = 0; sum < 4; ++sum)
            coming.sums[sum] = t < length ? load(call.sums, type, from + gate_of(sum) * H) : 0u;
        // A stage that goes backwards comes from step t to t - 1, and the flag of t parts them.
        const int flagged = course.falling ? t : t + 1;
        coming.reset = call.steps.reset && flagged > 0 && flagged < length && flag(flagged, item.row);
    };

    int base = tile().base(0), next_base = tile().base(1);
    fetch(0, base);
    for (int step = 0; step < course.bound; ++step) {
        exchange.meet(step);
        // Who meets nobody later and sends nothing may leave.
        if (Clusters && step == 0 && course.first_quad + (this_thread() / 32 << (5 - spread.lane_bits)) >= H) break;
        const int third_base = tile().base(step + 2);
        find_sums(weights, spread, exchange.values(step), memory);
        warp_sync();

        const auto item = my_item();
        const int t = tile().time(step), length = length_of(item);
        const bool active = t < length;
        float gates[4] = {}, h = 0.0f, c_behind = c, h_next = 0.0f;
        if (item.exists) {
            const int thread = this_thread();
            const float4 sum = reinterpret_cast<const float4*>(sums_of(spread, memory, thread / 32))[thread % 32];
            const float4 bias = biases[item.quad - course.first_quad];
            gates[0] = sigmoid_of(sum.x + bias.x + decode(coming.sums[0], type));
            gates[1] = tanh_of(sum.y + bias.y + decode(coming.sums[1], type));
            gates[2] = sigmoid_of(sum.z + bias.z + decode(coming.sums[2], type));
            gates[3] = sigmoid_of(sum.w + bias.w + decode(coming.sums[3], type));
            if (active) {
                c_behind = gates[2] * c + gates[0] * gates[1];
                h_next = h = gates[3] * tanh_of(c_behind);
            } else if (item.quad < H) {
                h_next = reinterpret_cast<const float*>(exchange.values(step))[item.value];
            }
        }
        c = c_behind;
        if (coming.reset) {
            h_next = initial(call.initial_h, item.quad);
            c = initial(call.initial_c, item.quad);
        }
        if (step + 1 < course.bound) send_values<Rows>(exchange, spread, step + 1, H, h_next);
        fetch(step + 1, next_base);

        // What nobody waits for.
        if (active) {
            const std::int64_t token = base + course.first_row + item.row, of_stage = stage_token(base, item.row);
            store(call.y, type, (token * call.directions + course.direction) * H + item.quad, h);
            if (call.gates) {
#pragma unroll
                for (int sum = 0; sum < 4; ++sum)
                    store(call.gates, type, (of_stage * 4 + gate_of(sum)) * H + item.quad, gates[sum]);
            }
            if (call.cells) store(call.cells, type, of_stage * H + item.quad, c_behind);
            if (t == (course.falling ? 0 : length - 1)) {
                store(call.h_n, type, state_place(item.row, item.quad), h);
                store(call.c_n, type, state_place(item.row, item.quad), c_behind);
            }
        }
        base = next_base;
        next_base = third_base;
    }

    const int units = min(spread.quads, H - course.first_quad);
    if (units <= 0) return;
    const auto clear = [&](void* data, std::int64_t first, int stride) {
        clear_past_lengths(behind(data, type, first + course.first_quad), type, tile(), rows, stride, units);
    };
    const std::int64_t past = std::int64_t(course.direction) * call.steps.tokens * H;
    clear(call.y, course.direction * H, call.directions * H);
    for (int gate = 0; gate < 4; ++gate) clear(call.gates, past * 4 + gate * H, 4 * H);
    clear(call.cells, past, H);
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
    const Product product = {H, 1, H, 1, 16, 0};
    const auto at_once = [&](int parts) {
        return float_clusters_at_once(kernel<48, 1, true>, threads_that_hold(48), parts, call.multiprocessors);
    };
    return choose_spread(product, D, call.steps.batch, call.multiprocessors, form, at_once, &plan->spread);
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
