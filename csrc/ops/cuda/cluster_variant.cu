/// Layers with options (peephole, layer normalisation, coupled gates, clip, zoneout, masks, any activations), all steps
/// in one launch, in float: the weights lie over the parts as cluster_float.h lays them, and an item, one unit of one
/// row, does with its sums what a single step does (variant_unit.h).
///
/// Without normalisation the parts meet once a step, for h. Layer normalisation of a row's hidden sums, and again of
/// its c', needs something of all parts: each finds the mean of its own values and the sum of their squared differences
/// from it, two passes in float, and these two numbers of every row are sent to all parts, each of which puts them
/// together in one order. So a normalised layer meets three times a step.
#include "cluster_float.h"
#include "variant_unit.h"

namespace cellstep {
namespace cuda {
namespace {

struct VariantPlan {
    VariantCall call;
    FloatSpread spread;
    Sharing statistics;  ///< [part][row] mean and squares; of step s the meetings 2 s + 1 and 2 s + 2
};

/// What a row of a unit keeps in shared memory; an odd number of words, so that neighbours lie in different banks.
struct Item {
    float input[4];  ///< of the step to come, as the next three: sums over the inputs, of i, f, g, o
    float keep_h;
    float keep_c;
    int resets;  ///< behind the step
    float h;
    float c;
    float mask_h;
    float mask_g;
};

/// Behind them, what the parts tell one another of rows.
struct Normals {
    Normal<float> of_hidden[most_rows];
    Normal<float> of_c[most_rows];
    Arrivals arrivals[2];
};
static_assert(sizeof(Normals) % 16 == 0, "values behind it are aligned");

constexpr int told_bytes = 8;  // of a row, by each part

Product product_of(const VariantStep<float>& s) {
    const int H = static_cast<int>(s.hidden_size);
    Product product{H, 1, H, 1, (sizeof(UnitWeights<float>) + 15) / 16 * 16, (sizeof(Item) + 15) / 16 * 16};
    product.few_forms = true;  // each is much code
    if (s.norm_hh) {
        product.apart = sizeof(Normals);
        product.told = told_bytes;
    }
    return product;
}

/// Where the item of a unit and a row is among those of the part.
__device__ inline int item_at(const FloatSpread& spread, int quad, int row) {
    const int bits = 5 - spread.lane_bits, in_warp = quad & ((1 << bits) - 1);
    return (quad >> bits) * spread.items + ((row / spread.rows << bits) + in_warp) * spread.rows + row % spread.rows;
}

__device__ inline float over_lanes(float value) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

/// Normalises the rows of a tile over all parts, from the first `each` of the four sums that an item has, of three
/// those of i, g and o. The shares of parts are put together as Chan, Golub and LeVeque (1979) do it, by lanes in one
/// order. Behind it all threads may read `normals`.
template <bool Clusters>
__device__ inline void normalise(const VariantPlan& plan, unsigned char* memory, int meeting, int each,
                                 Normal<float>* normals) {
    const FloatSpread& spread = plan.spread;
    const Exchange<Clusters> exchange = {plan.statistics, memory};
    const float* const sums = reinterpret_cast<const float*>(memory + spread.sums_at);
    const int H = static_cast<int>(plan.call.step.hidden_size), rows = spread.rows * spread.panels;
    const int thread = this_thread(), lane = thread % 32, warp = thread / 32;
    const int warps = static_cast<int>(blockDim.x) / 32;
    const auto units_of = [&](int part) { return min(spread.quads, H - part * spread.quads); };
    const auto value_at = [&](int at, int row) {
        const int quad = at / each, which = at - quad * each;
        return sums[item_at(spread, quad, row) * 4 + (each == 3 && which == 2 ? 3 : which)];
    };
    const int units = units_of(exchange.part());
    block_sync();
#pragma unroll 1
    for (int row = warp; row < rows && units > 0; row += warps) {
        float sum = 0.0f, squares = 0.0f;
#pragma unroll 1
        for (int at = lane; at < units * each; at += 32) sum += value_at(at, row);
        const float mean = over_lanes(sum) / static_cast<float>(units * each);
#pragma unroll 1
        for (int at = lane; at < units * each; at += 32) {
            const float apart = value_at(at, row) - mean;
            squares += apart * apart;
        }
        squares = over_lanes(squares);
        uint2 told;
        memcpy(&told.x, &mean, 4);
        memcpy(&told.y, &squares, 4);
        exchange.send(meeting, (exchange.part() * rows + row) * told_bytes, told, lane, 32);
    }
    exchange.meet(meeting);
#pragma unroll 1
    for (int row = warp; row < rows; row += warps) {
        const auto told = [&](int part) {
            return reinterpret_cast<const float2*>(exchange.values(meeting))[part * rows + row];
        };
        float sum = 0.0f, squares = 0.0f;
#pragma unroll 1
        for (int part = lane; part < spread.busy; part += 32)
            sum += static_cast<float>(units_of(part) * each) * told(part).x;
        const float count = static_cast<float>(H * each), mean = over_lanes(sum) / count;
#pragma unroll 1
        for (int part = lane; part < spread.busy; part += 32) {
            const float apart = told(part).x - mean;
            squares += told(part).y + static_cast<float>(units_of(part) * each) * apart * apart;
        }
        squares = over_lanes(squares);
        if (lane == 0) normals[row] = normal_of(mean, squares, count);
    }
    block_sync();
}

/// As AnyGateColumns, in float32; a coupled layer has no f.
struct VariantColumns {
    const unsigned char* data;
    std::uint32_t first, gates[4], column;  ///< bytes
    int columns;                            ///< 0 past the last unit
    bool coupled;

    __device__ VariantColumns(const VariantCall& call, int unit)
        : data(static_cast<const unsigned char*>(call.weight_hh.data)),
          column(static_cast<std::uint32_t>(call.weight_hh.column * 4)),
          columns(unit < call.step.hidden_size ? static_cast<int>(call.step.hidden_size) : 0),
          coupled(call.step.coupled) {
        const WeightView& view = call.weight_hh;
        first = static_cast<std::uint32_t>((unit / 16 * view.panel + unit % 16 * view.unit) * 4);
#pragma unroll
        for (int sum = 0; sum < 4; ++sum)
            gates[sum] = static_cast<std::uint32_t>(gate_place(call.step, gate_of(sum)) * view.gate * 4);
    }

    __device__ float4 operator()(int k) const {
        const std::uint32_t at = first + static_cast<std::uint32_t>(k) * column;
        const auto weight = [&](int sum) {
            const bool exists = k < columns && !(coupled && gate_of(sum) == 1);
            return exists ? *reinterpret_cast<const float*>(in_global(data) + (at + gates[sum])) : 0.0f;
        };
        return make_float4(weight(0), weight(1), weight(2), weight(3));
    }
};

/// What the lane of a warp has: a unit of a row.
template <int Rows>
struct Work : UnitItem<Rows> {
    int index;  ///< of the part's items

    __device__ Work(const FloatSpread& spread, int part, int thread)
        : UnitItem<Rows>(spread, part, thread % 32, thread), index(thread / 32 * spread.items + thread % 32) {}
};

template <int Held, int Rows, bool Clusters>
__device__ inline void sweep(const VariantPlan& plan) {
    const VariantCall& call = plan.call;
    const VariantStep<float>& s = call.step;
    const FloatSpread& spread = plan.spread;
    unsigned char* const memory = shared_memory();
    int* const lengths = reinterpret_cast<int*>(memory);
    auto& course = *reinterpret_cast<FloatCourse*>(memory + float_course_at);
    float* const sums = reinterpret_cast<float*>(memory + spread.sums_at);
    UnitWeights<float>* const units = reinterpret_cast<UnitWeights<float>*>(memory + spread.own_at);
    Item* const items = reinterpret_cast<Item*>(memory + spread.own_rows_at);
    Normals& normals = *reinterpret_cast<Normals*>(memory + spread.apart_at);
    const Exchange<Clusters> exchange = {spread, memory};
    const int H = static_cast<int>(s.hidden_size), batch = static_cast<int>(s.batch), rows = Rows * spread.panels;
    const int threads = static_cast<int>(blockDim.x);
    if (threadIdx.x == 0) {
        course = {0, exchange.group() * rows, call.reverse, 0, exchange.part() * spread.quads};
        for (int at = 0; at < rows; ++at) {
            const int row = course.first_row + at;
            const std::int64_t length = row >= batch ? 0 : s.lengths ? s.lengths[row] : call.steps;
            lengths[at] = static_cast<int>(length < 0 ? 0 : length > call.steps ? call.steps : length);
            course.bound = max(course.bound, lengths[at]);
        }
    }
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x); at < spread.bytes / 4 * (Clusters ? 2 : 1); at += threads)
        reinterpret_cast<float*>(memory + spread.values_at)[at] = 0.0f;
    block_sync();
#pragma unroll 1
    for (int quad = static_cast<int>(threadIdx.x); quad < min(spread.quads, H - course.first_quad); quad += threads)
        units[quad] = unit_weights(s, course.first_quad + quad);
    HeldWeights<0, Held, Rows> weights;
    weights.lanes = 1 << spread.lane_bits;
    {
        const Seat seat(spread, static_cast<int>(threadIdx.x));
        weights.fill(reinterpret_cast<float4*>(memory + spread.rest_at), spread.share, seat.column,
                     VariantColumns{call, course.first_quad + seat.quad}, [](int) { return 0.0f; });
    }
    for (int row = 0; row < rows && course.first_row + row < batch; ++row) {
        float* const to = reinterpret_cast<float*>(exchange.values(0)) + row / Rows * spread.panel_values + row % Rows;
#pragma unroll 1
        for (int unit = static_cast<int>(threadIdx.x); unit < H; unit += threads)
            to[unit * Rows] = s.h_in[std::int64_t(course.first_row + row) * H + unit];
    }

    // Found again where it is needed: registers are for weights.
    const auto my_item = [&] { return Work<Rows>(spread, exchange.part(), this_thread()); };
    const auto is_there = [&](const Work<Rows>& item) {
        return item.exists && item.quad < H && course.first_row + item.row < batch;
    };
    const auto time_of = [&](int step) { return course.falling ? course.bound - 1 - step : step; };
    const auto state_place = [&](const Work<Rows>& item) {
        return std::int64_t(course.first_row + item.row) * H + item.quad;
    };
    const auto initial = [](const float* values, int unit) { return values ? values[unit] : 0.0f; };
    const auto flag = [&](const Work<Rows>& item, int t) {
        return s.reset && t < lengths[item.row] &&
               s.reset[t * call.reset_distance + (course.first_row + item.row) * s.reset_row] != 0;
    };
    // What an item reads of a step, on its way while the parts meet.
    const auto fetch = [&](int step) {
        const auto item = my_item();
        if (step >= course.bound || !is_there(item) || time_of(step) >= lengths[item.row]) return;
        const int t = time_of(step);
        const std::int64_t token = std::int64_t(t) * batch + course.first_row + item.row;
        const float* const from = s.input_sums + token * (s.coupled ? 3 : 4) * H + item.quad;
        Item& to = items[item.index];
#pragma unroll
        for (int gate = 0; gate < 4; ++gate)
            if (has_gate(s, gate)) to.input[gate] = from[gate_place(s, gate) * H];
        if (s.keep_h) to.keep_h = s.keep_h[token * H + item.quad];
        if (s.keep_c) to.keep_c = s.keep_c[token * H + item.quad];
        // Going backwards it comes from step t to t - 1, and the flag of t parts them.
        to.resets = step + 1 < course.bound && flag(item, course.falling ? t : t + 1);
    };
    if (const auto item = my_item(); is_there(item)) {
        Item& to = items[item.index];
        const bool resets = !course.falling && flag(item, 0);
        to.h = resets ? initial(s.initial_h, item.quad) : s.h[state_place(item)];
        to.c = resets ? initial(s.initial_c, item.quad) : s.c[state_place(item)];
        to.mask_h = s.mask_h ? s.mask_h[state_place(item)] : 1.0f;
        to.mask_g = s.mask_g ? s.mask_g[state_place(item)] : 1.0f;
    }
    fetch(0);

    if (s.norm_hh) Exchange<Clusters>{plan.statistics, memory}.meet(0);
    const auto warp_has_units = [&] { return course.first_quad + (this_thread() / 32 << (5 - spread.lane_bits)) < H; };
    for (int step = 0; step < course.bound; ++step) {
        exchange.meet(step);
        // Who sends nothing must leave, or it may fall two meetings behind, unless the part's other warps wait for it:
        // where they normalise they do.
        if (Clusters && step == 0 && (s.norm_hh ? exchange.part() >= spread.busy : !warp_has_units())) break;
        find_sums(weights, spread, exchange.values(step), memory);
        if (s.norm_hh)
            normalise<Clusters>(plan, memory, 2 * step + 1, s.coupled ? 3 : 4, normals.of_hidden);
        else
            warp_sync();
        const auto item = my_item();
        const bool there = is_there(item);
        const int unit = item.quad - course.first_quad;
        const auto sum_of = [&](int gate) {
            const Normal<float> normal = s.norm_hh ? normals.of_hidden[item.row] : Normal<float>{};
            return gate_sum(s, units[unit], gate, items[item.index].input[gate], sums[item.index * 4 + gate_of(gate)],
                            normal);
        };
        float c = 0.0f, h = 0.0f, next = 0.0f;
        if (there)
            c = new_c(s, units[unit], sum_of(0), s.coupled ? 0.0f : sum_of(1), sum_of(2), items[item.index].c,
                      items[item.index].mask_g);
        if (s.norm_hh) {
            if (item.exists) sums[item.index * 4] = c;  // in place of i, which nobody needs any more
            normalise<Clusters>(plan, memory, 2 * step + 2, 1, normals.of_c);
        }
        const int t = time_of(step);
        const bool runs = there && t < lengths[item.row];
        if (there) {
            Item& state = items[item.index];
            if (runs) {
                const Normal<float> of_c = s.norm_hh ? normals.of_c[item.row] : Normal<float>{};
                h = kept(state.h, new_h(s, units[unit], sum_of(3), c, of_c), s.keep_h != nullptr, state.keep_h,
                         s.zoneout_h);
                c = kept(state.c, c, s.keep_c != nullptr, state.keep_c, s.zoneout_c);
                state.h = state.resets ? initial(s.initial_h, item.quad) : h;
                state.c = state.resets ? initial(s.initial_c, item.quad) : c;
            }
            next = state.h * state.mask_h;
        }
        if (step + 1 < course.bound) send_values<Rows>(exchange, spread, step + 1, H, next);

        // What nobody waits for.
        if (runs) {
            const std::int64_t row = course.first_row + item.row;
            s.y.data[t * s.y.step + row * s.y.row + item.quad] = h;
            if (s.cells.data) s.cells.data[t * s.cells.step + row * s.cells.row + item.quad] = c;
        }
        fetch(step + 1);
    }

    // Nothing is sent behind the last meeting: no part writes to one that may have ended.
    const auto item = my_item();
    if (!is_there(item)) return;
    s.h[state_place(item)] = items[item.index].h;
    s.c[state_place(item)] = items[item.index].c;
    const std::int64_t row = course.first_row + item.row;
#pragma unroll 1
    for (std::int64_t t = lengths[item.row]; t < call.steps; ++t) {
        s.y.data[t * s.y.step + row * s.y.row + item.quad] = 0.0f;
        if (s.cells.data) s.cells.data[t * s.cells.step + row * s.cells.row + item.quad] = 0.0f;
    }
}

template <int Held, int Rows, bool Clusters>
__global__ void __launch_bounds__(threads_that_hold(Held), 1) kernel(const __grid_constant__ VariantPlan plan) {
#if !defined(CELLSTEP_EMULATED) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    if constexpr (!Clusters) sweep<Held, Rows, false>(plan);
#else
    sweep<Held, Rows, Clusters>(plan);
#endif
}

bool plan_of(const VariantCall& call, const ClusterForm& form, VariantPlan* plan) {
    const VariantStep<float>& s = call.step;
    const WeightView& view = call.weight_hh;
    if (s.hidden_size < 1 || s.hidden_size > 4096 || s.recurrent_size != s.hidden_size || s.batch > 0x7fffffff ||
        call.steps > 0x7fffffff ||
        3 * view.gate + s.hidden_size * (view.unit + view.column) >= std::int64_t(1) << 30)  // bytes count to 2^32
        return false;
    plan->call = call;
    const int batch = static_cast<int>(s.batch);
    FloatSpread& spread = plan->spread;
    const Product product = product_of(s);
    const std::array<int, 7> key = {product.quads,        product.apart, batch,
                                    call.multiprocessors, form.exchange, form.parts};
    const bool fits = remembered(key, &spread, [&](FloatSpread* found) {
        const auto at_once = [&](int parts) {
            return clusters_at_once(kernel<48, 1, true>, threads_that_hold(48), parts, call.multiprocessors);
        };
        return choose_spread(product, 1, batch, call.multiprocessors, form, at_once, found);
    });
    if (!fits) return false;
    Sharing& told = plan->statistics = spread;
    told.bytes = (spread.busy * spread.rows * spread.panels * told_bytes + 15) / 16 * 16;
    told.sent = spread.busy * spread.rows * spread.panels * told_bytes;
    told.arrivals_at = spread.apart_at + static_cast<int>(offsetof(Normals, arrivals));
    told.values_at = spread.apart_at + static_cast<int>(sizeof(Normals));
    return true;
}

}  // namespace

bool cluster_variant_fits(const VariantCall& call, ClusterForm form) {
    VariantPlan plan;
    return plan_of(call, form, &plan);
}

bool cluster_variant_pays(const VariantCall& call) {
    VariantPlan plan;
    if (!plan_of(call, {}, &plan)) return false;
    // Derived, not measured: step by step a product and one or two launches take some 8 us, and from there on a
    // multiprocessor does 256 operations of the product a cycle.
    const std::int64_t H = call.step.hidden_size, multiprocessors = call.multiprocessors;
    return plan.spread.cycles <=
           14000 + 8 * call.step.batch * H * H / (256 * (multiprocessors > 0 ? multiprocessors : 1));
}

std::size_t cluster_variant_progress_words(const VariantCall& call, ClusterForm form) {
    VariantPlan plan;
    if (!plan_of(call, form, &plan)) return 0;
    return words_of(plan.spread, plan.spread.tiles) +
           (call.step.norm_hh ? words_of(plan.statistics, plan.spread.tiles) : 0);
}

const char* cluster_variant_forward(const VariantCall& call, ClusterForm form) {
    VariantPlan plan;
    if (!plan_of(call, form, &plan)) return "cluster_variant: expected a call that it fits; take the steps one by one";
    if (call.step.batch == 0) return nullptr;
    return with_held_and_rows<true>(plan.spread, [&](auto held, auto rows) {
        return start_groups(kernel<held(), rows(), true>, kernel<held(), rows(), false>, plan, plan.spread.tiles,
                            plan.spread.threads, plan.spread.shared, call.step.norm_hh ? &plan.statistics : nullptr);
    });
}

}  // namespace cuda
}  // namespace cellstep
