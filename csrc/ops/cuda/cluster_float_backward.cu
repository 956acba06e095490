/// The sweep back through one layer for recurrences too large for one block, sums in float: float32, float16, bfloat16.
/// The weights of a direction lie over the registers and shared memory of several blocks ("parts", exchange.h), each of
/// which finds the gradients of h of its own units from the gate-sum gradients of all, in float whatever the call's
/// type.
///
/// A step's values lie in every part as panels of up to four rows, each [4 unit + gate][row]: then a unit's gradients
/// for the rows of a panel are `rows` chunks of 16 bytes, and each thread sends one. Half a warp of a part has a group
/// of four units over one slice of the columns; by way of shared memory its sums come to one thread for each unit and
/// row, which adds up the slices in their order and goes the rest of the step alone.
#include "columns.h"
#include "exchange.h"

namespace cellstep {
namespace cuda {
namespace {

/// Of a group. Two that stand in one warp mostly have the same slice and read its values together, without which shared
/// memory would take as long as the products.
constexpr int lanes = 16;
constexpr int tokens_at = 16;  // in shared memory, behind the arrivals: of 8 steps the token of row 0 of the batch
constexpr int header_bytes = 48;

/// Columns of a lane in registers, and the most warps of a block that leave as many registers.
struct Choice {
    int held;
    int warps;
};
constexpr Choice choices[] = {{16, 12}, {28, 12}, {48, 8}};
constexpr int most_warps = 12;
constexpr int most_panels = 8;

constexpr int most_threads(int held) {
    for (const Choice& choice : choices)
        if (choice.held == held) return choice.warps * 32;
    return 0;
}

/// How the weights and the work lie over blocks, warps and shared memory.
struct Spread : Sharing {
    int units;    // of a part, a multiple of 4
    int slices;   // of the columns
    int columns;  // of a lane
    int held;     // of them in registers
    int rows;     // of a panel
    int panels;
    int tiles;  // of rows; group: direction * tiles + tile
    int threads;
    int items_at;  // places in shared memory, in bytes
    int partial_at;
    int weights_at;
    int shared;
};

struct BackwardPlan {
    Backward call;
    Spread spread;
};

/// What a thread does of a step behind the product: one unit of one row.
struct alignas(16) Item {
    int unit;
    int n;       // row of the batch
    int length;  // of the row
    int place;   // of the 16 bytes that it sends; below 0: none
};

/// Column k of the transposed weight_hh, that of unit k / 4 and gate k % 4, for four units; of any type, as a kernel
/// that has many forms is less code so.
struct SentColumns {
    const WeightView& view;
    DataType type;
    int first_unit, hidden_size, first_column;

    __device__ float4 operator()(int slot_column) const {
        const int k = first_column + slot_column, unit = k / 4;
        const std::int64_t from =
            k % 4 * view.gate + unit / 16 * view.panel + unit % 16 * view.unit + first_unit * view.column;
        const auto weight = [&](int at) {
            return unit < hidden_size && first_unit + at < hidden_size
                       ? decode(load(view.data, type, from + at * view.column), type)
                       : 0.0f;
        };
        return make_float4(weight(0), weight(1), weight(2), weight(3));
    }
};

/// Of a unit's four gradients that a thread has for one row, and those of the panel's other rows that its neighbours
/// have: chunk `row` of the unit.
template <int Rows>
__device__ inline float4 chunk_of(const float (&own)[4], int row) {
    if constexpr (Rows == 1) {
        return make_float4(own[0], own[1], own[2], own[3]);
    } else if constexpr (Rows == 2) {
        const bool upper = row == 1;
        const float first = shuffle_xor(upper ? own[0] : own[2], 1), second = shuffle_xor(upper ? own[1] : own[3], 1);
        return upper ? make_float4(first, own[2], second, own[3]) : make_float4(own[0], first, own[1], second);
    } else {
        // Halves change places, then halves of halves.
        const bool odd = row % 2 == 1, upper = row >= 2;
        const float first = shuffle_xor(odd ? own[0] : own[1], 1), second = shuffle_xor(odd ? own[2] : own[3], 1);
        const float2 low = odd ? make_float2(first, own[1]) : make_float2(own[0], first);
        const float2 high = odd ? make_float2(second, own[3]) : make_float2(own[2], second);
        const float2 keep = upper ? high : low, give = upper ? low : high;
        const float2 got = make_float2(shuffle_xor(give.x, 2), shuffle_xor(give.y, 2));
        return upper ? make_float4(got.x, got.y, keep.x, keep.y) : make_float4(keep.x, keep.y, got.x, got.y);
    }
}

template <int Held, int Rows, bool Clusters>
__device__ inline void sweep_back(const BackwardPlan& plan) {
    constexpr int sums_of_group = 4 * Rows;
    const Backward& call = plan.call;
    const Spread& spread = plan.spread;
    unsigned char* const memory = shared_memory();
    const Exchange<Clusters> exchange = {spread, memory};
    const DataType type = call.type;
    const int thread = static_cast<int>(threadIdx.x);
    const int hidden = call.hidden_size, features = call.directions * hidden;
    const int direction = exchange.group() / spread.tiles, first_unit = exchange.part() * spread.units;
    const int tile_rows = spread.panels * Rows;
    Sweep sweep{call.steps, exchange.group() % spread.tiles * tile_rows,
                !(call.directions == 2 ? direction == 1 : call.reverse), 0};
    for (int row = 0; row < tile_rows; ++row) sweep.bound = max(sweep.bound, sweep.length(row));
    const int bound = sweep.bound;

    const Place<lanes> place;
    const int groups = spread.units / 4, half = place.warp * 2 + place.group;
    const int group = half % groups, slice = min(half / groups, spread.slices - 1);
    const bool has_group = half < groups * spread.slices;  // else it does what another does
    const int slice_columns = spread.columns * lanes, panel_size = spread.slices * slice_columns * Rows;
    float* const partial = reinterpret_cast<float*>(memory + spread.partial_at);
    HeldWeights<lanes, Held, Rows> weights;
    weights.fill(reinterpret_cast<float4*>(memory + spread.weights_at), spread.columns, place.part,
                 SentColumns{call.weight_hh[direction], type, first_unit + group * 4, hidden, slice * slice_columns},
                 [](int) { return 0.0f; });

    // A thread goes the steps of one unit and row. What it knows of them is read where it is needed: registers are for
    // weights.
    Item* const items = reinterpret_cast<Item*>(memory + spread.items_at);
    int* const tokens = reinterpret_cast<int*>(memory + tokens_at);
    {
        const int row = thread % Rows, panel = thread / Rows / spread.units;
        const int unit = first_unit + thread / Rows % spread.units, n = sweep.first_row + panel * Rows + row;
        const bool sends = panel < spread.panels && unit < hidden;
        items[thread] = {unit, n, sends ? sweep.length(panel * Rows + row) : 0,
                         sends ? (panel * panel_size + (unit * Rows + row) * 4) * 4 : -1};
    }
    const auto item = [&]() -> const Item& { return items[this_thread()]; };
    const auto exists = [&] { return item().place >= 0 && item().n < call.steps.batch; };
    const auto state = [&] {
        return (static_cast<std::int64_t>(direction) * call.steps.batch + item().n) * hidden + item().unit;
    };
    float grad_h = exists() ? state_or(call.from.h, call.grad_h_n, type, state()) : 0.0f;
    // Of the cell, behind the items.
    const auto grad_c = [&]() -> float& {
        return reinterpret_cast<float*>(items + static_cast<int>(blockDim.x))[this_thread()];
    };
    grad_c() = exists() ? state_or(call.from.c, call.grad_c_n, type, state()) : 0.0f;

    // Of the step to come; `before` is the cell the step began with, unless it was reset.
    struct Saved {
        std::uint32_t gate[4] = {0, 0, 0, 0}, cell = 0, before = 0, to_output = 0, to_cell = 0;
        bool reset = false;
    };
    Saved saved;
    // Tokens of the other direction, in arrays that have both apart.
    const std::int64_t stage_tokens = direction * call.steps.tokens;
    const auto fetch = [&](int step) {
        const Item mine = item();
        const int t = step < bound ? sweep.time(step) : call.steps.steps;
        if (t >= mine.length) return;
        const std::int64_t token = tokens[step & 7] + mine.n, of_stage = stage_tokens + token;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate)
            saved.gate[gate] = load(call.gates, type, (of_stage * 4 + gate) * hidden + mine.unit);
        saved.cell = load(call.cells, type, of_stage * hidden + mine.unit);
        if (call.grad_outputs)
            saved.to_output = load(call.grad_outputs, type, token * features + direction * hidden + mine.unit);
        if (call.grad_cells) saved.to_cell = load(call.grad_cells, type, of_stage * hidden + mine.unit);
        const bool first = sweep.falling ? t == 0 : t + 1 == mine.length;
        saved.before =
            first ? load(call.c, type, state())
                  : load(call.cells, type, (stage_tokens + tokens[(step + 1) & 7] + mine.n) * hidden + mine.unit);
        // A stage that goes backwards comes to step t from t + 1, and the flag of that one parts them.
        const int flag = sweep.falling ? t : t + 1;
        saved.reset = call.steps.reset && flag < mine.length &&
                      call.steps.reset[static_cast<std::int64_t>(flag) * call.steps.batch + mine.n] != 0;
    };

    for (int at = thread; at < spread.bytes / 4 * (Clusters ? 2 : 1); at += static_cast<int>(blockDim.x))
        reinterpret_cast<float*>(memory + spread.values_at)[at] = 0.0f;
    if (thread == 0)
        for (int step = 0; step < 3; ++step) tokens[step] = sweep.base(step);
    block_sync();
    fetch(0);
    bool takes_product = false;  // its gradient of h comes from the step before
    // Step 0 reads no values: the first meeting is that all parts have begun.
    for (int step = 0;; ++step) {
        exchange.meet(step);
        if (Clusters && first_unit >= hidden) return;
        if (step > 0) {
            if (this_thread() == 0) tokens[(step + 2) & 7] = sweep.base(step + 2);
#pragma unroll 1
            for (int panel = 0; panel < spread.panels; ++panel) {
                float sums[sums_of_group];
                const Place<lanes> here{this_thread() / 32, this_thread() % 32};
                weights.multiply(sums,
                                 reinterpret_cast<const float*>(exchange.values(step)) + panel * panel_size +
                                     slice * slice_columns * Rows,
                                 here.part);
                deal<sums_of_group>(sums, here.groups, here.lane);
                constexpr int twins = lanes / sums_of_group;  // lanes with the same sum
                const int sum = here.part / twins;
                const int to = (panel * spread.units + group * 4 + sum % 4) * Rows + sum / 4;
                if (has_group && here.part % twins == 0) partial[slice * spread.units * tile_rows + to] = sums[0];
            }
            block_sync();
            if (takes_product) {
                grad_h = 0.0f;
                for (int of_slice = 0; of_slice < spread.slices; ++of_slice)
                    grad_h += partial[of_slice * spread.units * tile_rows + this_thread()];
            }
        }
        if (step == bound) break;
        if (this_thread() / 32 * 32 >= spread.units * tile_rows) continue;

        const bool active = sweep.time(step) < item().length;
        float to_sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (active) {
            const float i = decode(saved.gate[0], type), f = decode(saved.gate[1], type),
                        g = decode(saved.gate[2], type), o = decode(saved.gate[3], type);
            float c_before = decode(saved.before, type);
            if (saved.reset)
                c_before =
                    call.initial_c ? decode(load(call.initial_c, type, direction * hidden + item().unit), type) : 0.0f;
            const float squashed = tanh_of(decode(saved.cell, type));
            const float to_h = grad_h + decode(saved.to_output, type);
            const float to_c = grad_c() + to_h * o * (1.0f - squashed * squashed) + decode(saved.to_cell, type);
            to_sums[0] = to_c * g * i * (1.0f - i);
            to_sums[1] = to_c * c_before * f * (1.0f - f);
            to_sums[2] = to_c * i * (1.0f - g * g);
            to_sums[3] = to_h * squashed * o * (1.0f - o);
            grad_c() = saved.reset ? 0.0f : to_c * f;
            grad_h = 0.0f;
        }
        takes_product = active && !saved.reset;
        const float4 chunk = chunk_of<Rows>(to_sums, this_thread() % Rows);
        if (const int place = item().place; place >= 0) {
            uint4 bits;
            std::memcpy(&bits, &chunk, sizeof(bits));
            exchange.send(step + 1, place, bits, 0, 1);
        }
        if (active) {
            const std::int64_t to = (stage_tokens + tokens[step & 7] + item().n) * 4 * hidden + item().unit;
#pragma unroll
            for (int gate = 0; gate < 4; ++gate) store(call.grad_sums, type, to + gate * hidden, to_sums[gate]);
        }
        fetch(step + 1);
    }
    if (exists()) {
        store(call.grad_h, type, state(), grad_h);
        store(call.grad_c, type, state(), grad_c());
        carry(call.to, state(), grad_h, grad_c());
    }
    for (int gate = 0; gate < 4 && first_unit < hidden; ++gate)
        clear_past_lengths(behind(call.grad_sums, type, (stage_tokens * 4 + gate) * hidden + first_unit), type, sweep,
                           tile_rows, 4 * hidden, min(spread.units, hidden - first_unit));
}

template <int Held, int Rows, bool Clusters>
__global__ void __launch_bounds__(most_threads(Held), 1) kernel(const __grid_constant__ BackwardPlan plan) {
#if !defined(CELLSTEP_EMULATED) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    if constexpr (!Clusters) sweep_back<Held, Rows, false>(plan);
#else
    sweep_back<Held, Rows, Clusters>(plan);
#endif
}

constexpr int up(int a, int b) { return (a + b - 1) / b; }

/// Lays a sweep over warps and shared memory; parts, units, rows, panels, slices and held are set. False if it does not
/// fit.
bool lay(int hidden, std::size_t limit, Spread* spread) {
    const int groups = spread->units / 4, rows = spread->rows * spread->panels, chunk = 4 / spread->rows;
    spread->columns = up(up(4 * hidden, spread->slices * lanes), chunk) * chunk;
    if (spread->columns < spread->held) spread->columns = spread->held;
    spread->threads = up(groups * spread->slices * lanes, 32) * 32;
    if (spread->threads > most_threads(spread->held) || spread->units * rows > spread->threads) return false;
    spread->busy = up(hidden, spread->units);
    spread->sent = hidden * rows * 16;
    spread->arrivals_at = 0;
    const std::int64_t bytes = std::int64_t(rows) * spread->slices * spread->columns * lanes * 4;
    spread->items_at = header_bytes;
    spread->partial_at = spread->items_at + spread->threads * static_cast<int>(sizeof(Item) + sizeof(float));
    const std::int64_t values_at = spread->partial_at + rows * spread->slices * spread->units * 4;
    const std::int64_t weights_at = values_at + (spread->grid ? 1 : 2) * bytes;
    const std::int64_t shared = weights_at + std::int64_t(spread->columns - spread->held) * spread->threads * 16;
    if (shared > static_cast<std::int64_t>(limit)) return false;
    spread->bytes = static_cast<int>(bytes);
    spread->values_at = static_cast<int>(values_at);
    spread->weights_at = static_cast<int>(weights_at);
    spread->shared = static_cast<int>(shared);
    return true;
}

/// Cycles of a step, roughly: what decides between spreads that fit. Products of a warp scheduler, which two warps keep
/// busy, run beside what shared memory moves, 128 bytes a cycle, though not without standing in its way; the rest
/// follows one behind the other.
std::int64_t cycles_of(const Spread& spread) {
    const int warps = spread.threads / 32;
    const int products = (warps > 4 ? up(warps, 4) : 2) * spread.columns * 4 * spread.rows;
    const int moved = warps * (spread.columns * spread.rows * lanes / 32 + (spread.columns - spread.held) * 4);
    const int product = products > moved ? products + moved / 8 : moved + products / 8;
    return spread.panels * product + spread.sent / (spread.grid ? 48 : 32) + (spread.grid ? 2000 : 500) + 300;
}

/// The spread that likely takes the fewest cycles. False if none fits.
bool find_spread(const Backward& call, const ClusterForm& form, Spread* best) {
    const int hidden = call.hidden_size, D = call.directions, batch = call.steps.batch;
    const std::size_t limit = shared_limit();
    std::int64_t least = -1;
    const auto consider = [&](bool grid, int parts, int units) {
        const int room = grid ? call.multiprocessors / parts
                              : clusters_at_once(kernel<48, 1, true>, most_threads(48), parts, call.multiprocessors);
        if (room < 1) return;
        for (int quarter = 0; quarter < most_panels + 2; ++quarter) {
            Spread spread = {};
            spread.grid = grid;
            spread.parts = parts;
            spread.units = units;
            spread.rows = quarter < 2 ? 1 << quarter : 4;
            spread.panels = quarter < 2 ? 1 : quarter - 1;
            const int rows = spread.rows * spread.panels;
            spread.tiles = up(batch, rows);
            // A cluster that has ended makes room for the next; all blocks of a grid must run at once.
            const int groups = D * spread.tiles, turns = up(groups, room);
            for (spread.slices = 1; spread.slices * units / 4 * lanes <= 32 * most_warps; ++spread.slices)
                for (const Choice& choice : choices) {
                    spread.held = choice.held;
                    if (!lay(hidden, limit, &spread)) continue;
                    const std::int64_t cycles = cycles_of(spread) * turns;
                    if (least >= 0 && cycles >= least) continue;
                    least = cycles;
                    *best = spread;
                    best->slots = grid && groups > room ? room : groups;
                }
            if (rows >= batch) break;
        }
    };
    const bool with_clusters = form.exchange != ClusterForm::grid, with_grid = form.exchange != ClusterForm::cluster;
    for (int units = 4; units <= 4 * most_warps * 32 / lanes; units += 4) {
        const int parts = form.parts > 0 ? form.parts : up(hidden, units);
        if (form.parts > 0 && units != up(up(hidden, parts), 4) * 4) continue;
        if (with_clusters && parts >= least_cluster && parts <= most_cluster) consider(false, parts, units);
        if (with_grid) consider(true, parts, units);
    }
    return least >= 0;
}

bool plan_of(const Backward& call, const ClusterForm& form, BackwardPlan* plan) {
    const int hidden = call.hidden_size, D = call.directions, batch = call.steps.batch;
    if (call.type == DataType::float64 || hidden < 1 || D < 1 || D > 2 ||
        call.steps.tokens * D >= std::int64_t(1) << 31)
        return false;
    plan->call = call;
    const std::array<int, 7> key = {hidden, D, batch, call.multiprocessors, form.exchange, form.parts};
    return remembered(key, &plan->spread, [&](Spread* spread) { return find_spread(call, form, spread); });
}

template <int Held, int Rows>
const char* start(BackwardPlan& plan) {
    return start_groups(kernel<Held, Rows, true>, kernel<Held, Rows, false>, plan,
                        plan.call.directions * plan.spread.tiles, plan.spread.threads, plan.spread.shared);
}

template <int Held>
const char* start_rows(BackwardPlan& plan) {
    if (plan.spread.rows == 1) return start<Held, 1>(plan);
    return plan.spread.rows == 2 ? start<Held, 2>(plan) : start<Held, 4>(plan);
}

}  // namespace

bool cluster_float_fits(const Backward& call, ClusterForm form) {
    BackwardPlan plan;
    return plan_of(call, form, &plan);
}

std::size_t cluster_float_progress_words(const Backward& call, ClusterForm form) {
    BackwardPlan plan;
    return plan_of(call, form, &plan) ? words_of(plan.spread, call.directions * plan.spread.tiles) : 0;
}

const char* cluster_float_backward(const Backward& call, ClusterForm form) {
    BackwardPlan plan;
    if (!plan_of(call, form, &plan))
        return "cluster_float: expected a call that cluster_float_fits; choose another kernel";
    if (call.steps.batch == 0) return nullptr;
    if (plan.spread.held == 16) return start_rows<16>(plan);
    return plan.spread.held == 28 ? start_rows<28>(plan) : start_rows<48>(plan);
}

}  // namespace cuda
}  // namespace cellstep
