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
    Product product{
        H, 1, (H + 3) / 4 * 4, 1, (sizeof(UnitWeights<float>) + 15) / 16 * 16, (sizeof(Item) + 15) / 16 * 16};
    if (s.norm_hh) {
        product.apart = sizeof(Normals);
        product.told = told_bytes;
    }
    return product;
}

/// What a thread's item is.
struct Work {
    int lane;
    int warp;
    int quad;   ///< of the part
    int row;    ///< of the tile
    int index;  ///< of the part's items

    __device__ Work(const FloatSpread& spread, int thread)
        : lane(thread % 32),
          warp(thread / 32),
          quad((warp << (5 - spread.lane_bits)) + lane / spread.rows % (32 >> spread.lane_bits)),
          row((lane / spread.rows >> (5 - spread.lane_bits)) * spread.rows + lane % spread.rows),
          index(warp * spread.items + lane) {}
};

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
    const auto value_at = [&](int quad, int row, int which) {
        return sums[item_at(spread, quad, row) * 4 + (each == 3 && which == 2 ? 3 : which)];
    };
    // Sums lie as i, g, f, o.
    const int units = units_of(exchange.part());
    block_sync();
    for (int row = warp; row < rows && units > 0; row += warps) {
        float sum = 0.0f, squares = 0.0f;
        for (int quad = lane; quad < units; quad += 32)
            for (int which = 0; which < each; ++which) sum += value_at(quad, row, which);
        const float mean = over_lanes(sum) / static_cast<float>(units * each);
        for (int quad = lane; quad < units; quad += 32)
            for (int which = 0; which < each; ++which) {
                const float apart = value_at(quad, row, which) - mean;
                squares += apart * apart;
            }
        squares = over_lanes(squares);
        uint2 told;
        memcpy(&told.x, &mean, 4);
        memcpy(&told.y, &squares, 4);
        exchange.send(meeting, (exchange.part() * rows + row) * told_bytes, told, lane, 32);
    }
    exchange.meet(meeting);
    for (int row = warp; row < rows; row += warps) {
        const auto told = [&](int part) {
            return reinterpret_cast<const float2*>(exchange.values(meeting))[part * rows + row];
        };
        float sum = 0.0f, squares = 0.0f;
        for (int part = lane; part < spread.busy; part += 32)
            sum += static_cast<float>(units_of(part) * each) * told(part).x;
        const float count = static_cast<float>(H * each), mean = over_lanes(sum) / count;
        for (int part = lane; part < spread.busy; part += 32) {
            const float apart = told(part).x - mean;
            squares += told(part).y + static_cast<float>(units_of(part) * each) * apart * apart;
        }
        squares = over_lanes(squares);
        if (lane == 0) normals[row] = normal_of(mean, squares, count);
    }
    block_sync();
}

/// The columns of a unit's gates i, g, f, o; of a coupled layer f has none.
struct VariantColumns {
    const float* first;  ///< null past the last unit
    std::int64_t gate;
    std::int64_t column;
    int columns;
    bool coupled;

    __device__ VariantColumns(const WeightView& view, int unit, int hidden_size, bool is_coupled)
        : first(unit < hidden_size
                    ? static_cast<const float*>(view.data) + unit / 16 * view.panel + unit % 16 * view.unit
                    : nullptr),
          gate(view.gate),
          column(view.column),
          columns(first ? hidden_size : 0),
          coupled(is_coupled) {}

    __device__ float4 operator()(int k) const {
        if (k >= columns) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const float* const at = first + k * column;
        return coupled ? make_float4(at[0], at[gate], 0.0f, at[2 * gate])
                       : make_float4(at[0], at[2 * gate], at[gate], at[3 * gate]);
    }
};

template <int Held, int Rows, bool Clusters>
__device__ inline void sweep(const VariantPlan& plan) {
    const VariantCall& call = plan.call;
    const VariantStep<float>& s = call.step;
    const FloatSpread& spread = plan.spread;
    unsigned char* const memory = shared_memory();
    int* const lengths = reinterpret_cast<int*>(memory);
    float* const sums = reinterpret_cast<float*>(memory + spread.sums_at);
    UnitWeights<float>* const units = reinterpret_cast<UnitWeights<float>*>(memory + spread.own_at);
    Item* const items = reinterpret_cast<Item*>(memory + spread.own_rows_at);
    Normals& normals = *reinterpret_cast<Normals*>(memory + spread.apart_at);
    const Exchange<Clusters> exchange = {spread, memory};
    const int H = static_cast<int>(s.hidden_size), batch = static_cast<int>(s.batch);
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int rows = Rows * spread.panels, first_row = exchange.group() * rows;
    const int first_unit = exchange.part() * spread.quads;
    const std::int64_t gate_row = (s.coupled ? 3 : 4) * s.hidden_size;

    if (thread < rows) {
        const int row = first_row + thread;
        const std::int64_t length = row >= batch ? 0 : s.lengths ? s.lengths[row] : call.steps;
        lengths[thread] = static_cast<int>(length < 0 ? 0 : length > call.steps ? call.steps : length);
    }
    for (int at = thread; at < spread.bytes / 4 * (Clusters ? 2 : 1); at += threads)
        reinterpret_cast<float*>(memory + spread.values_at)[at] = 0.0f;
    for (int quad = thread; quad < spread.quads && first_unit + quad < H; quad += threads)
        units[quad] = unit_weights(s, first_unit + quad);
    HeldWeights<0, Held, Rows> weights;
    weights.lanes = 1 << spread.lane_bits;
    {
        const Seat seat(spread, thread);
        const VariantColumns columns(call.weight_hh, first_unit + seat.quad, H, s.coupled);
        weights.fill(reinterpret_cast<float4*>(memory + spread.rest_at), spread.share, seat.column, columns, columns);
    }
    block_sync();
    int steps = 0;
    for (int row = 0; row < rows; ++row) steps = max(steps, lengths[row]);
    const auto time_of = [&](int step) { return call.reverse ? steps - 1 - step : step; };
    for (int at = thread; at < rows * H; at += threads) {
        const int row = at / H, unit = at % H;
        if (first_row + row < batch)
            reinterpret_cast<float*>(exchange.values(0))[row / Rows * spread.panel_values + unit * Rows + row % Rows] =
                s.h_in[static_cast<std::int64_t>(first_row + row) * H + unit];
    }

    const auto exists = [&](const Work& work) {
        return work.lane < spread.items && first_unit + work.quad < H && first_row + work.row < batch;
    };
    // The row's flag of time t puts it to its initial state, as it would run with it.
    const auto flag = [&](const Work& work, int t) {
        return s.reset && t < lengths[work.row] &&
               s.reset[t * call.reset_distance + (first_row + work.row) * s.reset_row] != 0;
    };
    // On its way while the parts meet.
    const auto load = [&](int step) {
        const Work work(spread, this_thread());
        if (step >= steps || !exists(work) || time_of(step) >= lengths[work.row]) return;
        Item& item = items[work.index];
        const int t = time_of(step), unit = first_unit + work.quad;
        const std::int64_t token = static_cast<std::int64_t>(t) * batch + first_row + work.row;
        const float* const from = s.input_sums + token * gate_row + unit;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate)
            if (has_gate(s, gate)) item.input[gate] = from[gate_place(s, gate) * H];
        if (s.keep_h) item.keep_h = s.keep_h[token * H + unit];
        if (s.keep_c) item.keep_c = s.keep_c[token * H + unit];
        item.resets = step + 1 < steps && flag(work, call.reverse ? t : t + 1);
    };
    const auto place_of = [&](const Work& work) {
        return static_cast<std::int64_t>(first_row + work.row) * H + first_unit + work.quad;
    };
    const auto initial = [](const float* values, int unit) { return values ? values[unit] : 0.0f; };
    {
        const Work work(spread, thread);
        if (exists(work)) {
            Item& item = items[work.index];
            const std::int64_t place = place_of(work);
            const bool resets = !call.reverse && flag(work, 0);
            item.h = resets ? initial(s.initial_h, first_unit + work.quad) : s.h[place];
            item.c = resets ? initial(s.initial_c, first_unit + work.quad) : s.c[place];
            item.mask_h = s.mask_h ? s.mask_h[place] : 1.0f;
            item.mask_g = s.mask_g ? s.mask_g[place] : 1.0f;
        }
    }
    load(0);

    // c' of the lane's item, from the sums over h and over the inputs.
    const auto raw_c = [&](const Work& work) {
        const Item& item = items[work.index];
        const UnitWeights<float>& w = units[work.quad];
        const float4 hidden = reinterpret_cast<const float4*>(sums)[work.index];
        const Normal<float> normal = s.norm_hh ? normals.of_hidden[work.row] : Normal<float>{};
        const float of_gates[3] = {gate_sum(s, w, 0, item.input[0], hidden.x, normal),
                                   s.coupled ? 0.0f : gate_sum(s, w, 1, item.input[1], hidden.z, normal),
                                   gate_sum(s, w, 2, item.input[2], hidden.y, normal)};
        return new_c(s, w, of_gates, item.c, item.mask_g);
    };

    if (s.norm_hh) Exchange<Clusters>{plan.statistics, memory}.meet(0);
    for (int step = 0; step < steps; ++step) {
        exchange.meet(step);
        if (step == 0 && Clusters && exchange.part() >= spread.busy) break;
        find_sums<Held, Rows>(weights, spread, exchange.values(step), memory);
        if (s.norm_hh)
            normalise<Clusters>(plan, memory, 2 * step + 1, s.coupled ? 3 : 4, normals.of_hidden);
        else
            warp_sync();
        const Work work(spread, this_thread());
        const bool there = exists(work);
        float c = there ? raw_c(work) : 0.0f;
        if (s.norm_hh) {
            if (work.lane < spread.items) sums[work.index * 4] = c;  // in place of i, which nobody needs any more
            normalise<Clusters>(plan, memory, 2 * step + 2, 1, normals.of_c);
        }
        float next = 0.0f, h = 0.0f;
        const int t = time_of(step);
        const bool runs = there && t < lengths[work.row];
        if (there) {
            Item& item = items[work.index];
            const UnitWeights<float>& w = units[work.quad];
            if (runs) {
                const Normal<float> of_hidden = s.norm_hh ? normals.of_hidden[work.row] : Normal<float>{};
                const Normal<float> of_c = s.norm_hh ? normals.of_c[work.row] : Normal<float>{};
                const float sum = gate_sum(s, w, 3, item.input[3], sums[work.index * 4 + 3], of_hidden);
                h = kept(item.h, new_h(s, w, sum, c, of_c), s.keep_h != nullptr, item.keep_h, s.zoneout_h);
                c = kept(item.c, c, s.keep_c != nullptr, item.keep_c, s.zoneout_c);
                item.h = item.resets ? initial(s.initial_h, first_unit + work.quad) : h;
                item.c = item.resets ? initial(s.initial_c, first_unit + work.quad) : c;
            }
            next = s.mask_h ? item.h * item.mask_h : item.h;
        }
        if (step + 1 < steps) {
            // A warp's values lie in its lanes as they will lie in the next step's.
            const int piece = work.lane & ((1 << spread.piece_bits) - 1), first_item = piece * spread.piece;
            float values[4];
#pragma unroll
            for (int at = 0; at < 4; ++at) values[at] = shuffle(next, (first_item + at) & 31);
            const int in_panel = Rows << (5 - spread.lane_bits), first_quad = work.warp << (5 - spread.lane_bits);
            const int quad = first_quad + first_item % in_panel / Rows;
            if (piece < spread.pieces && first_unit + quad < H) {
                const int place = (first_item / in_panel * spread.panel_values + (first_unit + first_quad) * Rows +
                                   first_item % in_panel) *
                                  4;
                const auto send = [&](auto word) {
                    memcpy(&word, values, sizeof(word));
                    exchange.send(step + 1, place, word, work.lane >> spread.piece_bits, 32 >> spread.piece_bits);
                };
                if (spread.piece == 4)
                    send(uint4());
                else if (spread.piece == 2)
                    send(uint2());
                else
                    send(0u);
            }
        }
        // What nobody waits for.
        if (runs) {
            const int unit = first_unit + work.quad;
            const std::int64_t row = first_row + work.row;
            s.y.data[t * s.y.step + row * s.y.row + unit] = h;
            if (s.cells.data) s.cells.data[t * s.cells.step + row * s.cells.row + unit] = c;
        }
        load(step + 1);
    }

    // Nothing is sent behind the last meeting: no part writes to one that may have ended.
    const Work work(spread, this_thread());
    if (!exists(work)) return;
    const int unit = first_unit + work.quad;
    const std::int64_t row = first_row + work.row;
    s.h[place_of(work)] = items[work.index].h;
    s.c[place_of(work)] = items[work.index].c;
    for (std::int64_t t = lengths[work.row]; t < call.steps; ++t) {
        s.y.data[t * s.y.step + row * s.y.row + unit] = 0.0f;
        if (s.cells.data) s.cells.data[t * s.cells.step + row * s.cells.row + unit] = 0.0f;
    }
}

template <int Held, int Rows, bool Clusters>
__global__ void __launch_bounds__(threads_that_hold(Held)) kernel(const __grid_constant__ VariantPlan plan) {
    sweep<Held, Rows, Clusters>(plan);
}

bool plan_of(const VariantCall& call, const ClusterForm& form, VariantPlan* plan) {
    const VariantStep<float>& s = call.step;
    if (s.hidden_size < 1 || s.hidden_size > 4096 || s.recurrent_size != s.hidden_size || s.batch > 0x7fffffff ||
        call.steps > 0x7fffffff)
        return false;
    plan->call = call;
    const int batch = static_cast<int>(s.batch);
    const auto at_once = [&](int parts) {
        return float_clusters_at_once(kernel<16, 4, true>, threads_that_hold(16), parts, call.multiprocessors);
    };
    FloatSpread& spread = plan->spread;
    if (!choose_spread(product_of(s), 1, batch, call.multiprocessors, form, at_once, &spread)) return false;
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
    return with_held_and_rows(plan.spread, [&](auto held, auto rows) {
        return start_groups(kernel<held, rows, true>, kernel<held, rows, false>, plan, plan.spread.tiles,
                            plan.spread.threads, plan.spread.shared, call.step.norm_hh ? &plan.statistics : nullptr);
    });
}

}  // namespace cuda
}  // namespace cellstep
