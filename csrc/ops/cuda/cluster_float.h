/// What the kernels share whose sums are float and whose weights lie over several blocks, the parts of exchange.h:
/// how a product is laid over parts, warps, registers and shared memory, and the product of a step.
///
/// Four sums of every row are a "quad": forward the gates of a unit, over the H columns of h; backward the gradients of
/// four units, over the gate sums as column 4 unit + gate, 4 H of them. 2 to 32 lanes of a warp own a quad, each with
/// its share of the columns (HeldWeights), and a part owns neighbouring quads, whole warps of them, so that the values
/// that a warp finds for the next step lie side by side. Values lie as [panel][column][row], a panel being 1, 2 or 4
/// rows; the panels of a tile of rows go through the same weights one after another. What is done with the sums of one
/// unit and one row is an "item", and a warp has no more items than lanes.
#pragma once

#include <type_traits>

#include "columns.h"
#include "exchange.h"

namespace cellstep {
namespace cuda {

/// What is to be spread over parts.
struct Product {
    int quads;
    int units;      ///< of a quad: 1 or 4
    int columns;    ///< a multiple of 4 values of `quads`, where zeros may follow the ones that exist
    int values;     ///< columns that a unit finds for the next step
    int own;        ///< bytes of a quad that the kernel keeps in shared memory for itself, a multiple of 16
    int own_rows;   ///< the same for each row
    int apart = 0;  ///< the same for a part, and for each row what each part tells the others beside its values
    int told = 0;
    bool few_forms = false;  ///< with_held_and_rows<true>: 16 or 48 columns in registers, panels of 1 or 4 rows
};

constexpr int most_rows = 16;  ///< of a tile

struct FloatSpread : Sharing {
    int quads;         ///< of a part
    int lane_bits;     ///< 1 << lane_bits lanes own a quad
    int held;          ///< columns of a lane in registers
    int share;         ///< columns of a lane
    int rows;          ///< of a panel
    int panels;        ///< of a tile
    int tiles;         ///< of all rows; a group of parts is direction * tiles + tile
    int threads;       ///< of a part
    int items;         ///< of a warp
    int piece;         ///< values that a warp sends at once: 4, or 1 or 2 where it has no more in a panel
    int pieces;        ///< of a warp
    int piece_bits;    ///< for a power of two that is no less
    int panel_values;  ///< from one panel's values to those of the next
    int sums_at;       ///< places in shared memory, in bytes: of each warp [panel][quad][row] its sums
    int own_at;
    int own_rows_at;
    int apart_at;         ///< behind it what is told
    int rest_at;          ///< weights that are not in registers
    int shared;           ///< bytes
    std::int64_t cycles;  ///< of a step of all rows, roughly
};

/// What all threads of a part know, in shared memory, as registers are for weights.
struct FloatCourse {
    int bound;  ///< as of Sweep, like the next two
    int first_row;
    bool falling;
    int direction;
    int first_quad;  ///< of the part
};

/// In shared memory come first the lengths of a tile's rows, then the arrivals, then this.
constexpr int float_course_at = most_rows * 4 + 16;
constexpr int float_header_bytes = float_course_at + 32;
static_assert(sizeof(FloatCourse) <= 32, "the header has room");

/// The most threads of a block whose lanes hold so many columns: they have as many registers as that leaves.
__host__ __device__ constexpr int threads_that_hold(int held) { return held > 28 ? 256 : held > 16 ? 384 : 512; }

/// Calls with the numbers of a spread that a kernel must know when it is compiled, as std::integral_constant.
template <bool Few = false, class Function>
auto with_held_and_rows(const FloatSpread& spread, const Function& function) {
    const auto with_rows = [&](auto held) {
        if (spread.rows == 1) return function(held, std::integral_constant<int, 1>());
        if constexpr (!Few)
            if (spread.rows == 2) return function(held, std::integral_constant<int, 2>());
        return function(held, std::integral_constant<int, 4>());
    };
    if (spread.held == 16) return with_rows(std::integral_constant<int, 16>());
    if constexpr (!Few)
        if (spread.held == 28) return with_rows(std::integral_constant<int, 28>());
    return with_rows(std::integral_constant<int, 48>());
}

/// Where a thread stands in its part.
struct Seat {
    int lane;
    int warp;
    int quad;    ///< of the part
    int column;  ///< which lane of its quad it is

    __device__ Seat(const FloatSpread& spread, int thread)
        : lane(thread % 32),
          warp(thread / 32),
          quad((warp << (5 - spread.lane_bits)) + (lane & ((32 >> spread.lane_bits) - 1))),
          column(lane >> (5 - spread.lane_bits)) {}
};

/// The sums of this thread's warp, [panel][quad][row] of four.
__device__ inline float* sums_of(const FloatSpread& spread, unsigned char* memory, int warp) {
    return reinterpret_cast<float*>(memory + spread.sums_at) +
           (warp << (5 - spread.lane_bits)) * (spread.rows * spread.panels * 4);
}

/// Finds them from the values of a step. Behind a warp_sync all lanes may read them.
template <int Held, int Rows>
__device__ inline void find_sums(const HeldWeights<0, Held, Rows>& weights, const FloatSpread& spread,
                                 const unsigned char* values, unsigned char* memory) {
    constexpr int count = 4 * Rows;
    for (int panel = 0; panel < spread.panels; ++panel) {
        float sums[count];
        const Seat seat(spread, this_thread());
        weights.multiply(sums, reinterpret_cast<const float*>(values) + panel * spread.panel_values, seat.column);
        const int quads = 32 >> spread.lane_bits;
        deal<count>(sums, quads, seat.lane);
        const Seat again(spread, this_thread());
        float* const to = sums_of(spread, memory, again.warp) + (panel * quads + again.quad % quads) * count;
        // A lane has count / lanes of them, or of lanes that have the same one the first writes it.
        const int dealt = count >> spread.lane_bits, twins = (1 << spread.lane_bits) / count;
        if (dealt > 0) {
#pragma unroll
            for (int at = 0; at < count / 2; ++at)
                if (at < dealt) to[again.column * dealt + at] = sums[at];
        } else if (again.column % twins == 0) {
            to[again.column / twins] = sums[0];
        }
    }
}

/// An item of a product with one unit a quad: those of a warp lie as its sums do.
template <int Rows>
struct UnitItem {
    bool exists;
    int quad;   ///< of all
    int row;    ///< of the tile
    int value;  ///< which of the values of a step it has

    __device__ UnitItem(const FloatSpread& spread, int part, int item, int thread) {
        constexpr int row_bits = Rows / 2;
        const int bits = 5 - spread.lane_bits, panel = item >> (bits + row_bits);
        const int inside = item & ((Rows << bits) - 1);  // of the warp's values in the panel
        const int first = part * spread.quads + (thread / 32 << bits);
        exists = item < spread.items;
        quad = first + (inside >> row_bits);
        row = panel * Rows + inside % Rows;
        value = panel * spread.panel_values + first * Rows + inside;
    }
};

/// Sends the value that each item of a warp, one a lane, has found for step `step`; all lanes take part. `quads`: of
/// the product.
template <int Rows, bool Clusters>
__device__ inline void send_values(const Exchange<Clusters>& exchange, const FloatSpread& spread, int step, int quads,
                                   float value) {
    const int thread = this_thread(), lane = thread % 32, bits = spread.piece_bits;
    const int first = (lane & ((1 << bits) - 1)) * spread.piece;  // item of this lane's piece
    std::uint32_t mine, words[4];
    memcpy(&mine, &value, 4);
#pragma unroll
    for (int at = 0; at < 4; ++at) words[at] = shuffle(mine, (first + at) % 32);
    const UnitItem<Rows> item(spread, exchange.part(), first, thread);
    if (!item.exists || item.quad >= quads) return;
    const int place = item.value * 4, rank = lane >> bits, apart = 32 >> bits;
    if (spread.piece == 4)
        exchange.send(step, place, make_uint4(words[0], words[1], words[2], words[3]), rank, apart);
    else if (spread.piece == 2)
        exchange.send(step, place, make_uint2(words[0], words[1]), rank, apart);
    else
        exchange.send(step, place, words[0], rank, apart);
}

/// Lays the product over parts: grid, parts, lane_bits, held, rows and panels are set. False if it does not fit.
inline bool lay(const Product& product, std::size_t limit, FloatSpread* spread) {
    const auto up = [](int a, int b) { return (a + b - 1) / b; };
    const int lanes = 1 << spread->lane_bits, in_warp = 32 / lanes, rows = spread->rows * spread->panels;
    spread->quads = up(up(product.quads, spread->parts), in_warp) * in_warp;
    spread->threads = spread->quads * lanes;
    spread->items = in_warp * product.units * rows;
    if (spread->threads > threads_that_hold(spread->held) || spread->items > 32 || rows > most_rows) return false;
    spread->busy = up(product.quads, spread->quads);
    spread->share = slots_of(product.columns, lanes, spread->rows, spread->held);
    spread->panel_values = spread->share * lanes * spread->rows;
    spread->bytes = spread->panels * spread->panel_values * 4;

    const int of_quad = product.units * product.values * spread->rows;  // values, in a panel
    spread->piece = of_quad * in_warp < 4 ? of_quad * in_warp : 4;
    spread->pieces = spread->panels * of_quad * in_warp / spread->piece;
    spread->piece_bits = 0;
    while (1 << spread->piece_bits < spread->pieces) ++spread->piece_bits;
    const int quads_of_piece = up(spread->piece, of_quad);
    spread->sent = up(product.quads, quads_of_piece) * quads_of_piece * of_quad * spread->panels * 4;

    spread->arrivals_at = most_rows * 4;
    spread->own_at = float_header_bytes;
    spread->own_rows_at = spread->own_at + spread->quads * product.own;
    spread->sums_at = spread->own_rows_at + spread->quads * rows * product.own_rows;
    spread->values_at = spread->sums_at + spread->quads * rows * 16;
    spread->apart_at = spread->values_at + (spread->grid ? 1 : 2) * spread->bytes;
    spread->rest_at = spread->apart_at + product.apart +
                      (spread->grid ? 1 : 2) * ((spread->busy * rows * product.told + 15) / 16 * 16);
    const std::int64_t shared = spread->rest_at + std::int64_t(spread->share - spread->held) * spread->threads * 16;
    spread->shared = static_cast<int>(shared);
    return shared <= static_cast<std::int64_t>(limit);
}

/// Cycles of a step, roughly: what decides between spreads that fit. Products, 128 a cycle, run beside what shared
/// memory moves, 128 bytes a cycle; the rest follows one behind the other.
inline std::int64_t cycles_of(const FloatSpread& spread) {
    const std::int64_t warps = spread.threads / 32, lanes = 1 << spread.lane_bits;
    const std::int64_t products = (warps + 3) / 4 * spread.share * 4 * spread.rows;
    const std::int64_t reads = warps * spread.share * spread.rows / 4 * (lanes > 8 ? lanes / 8 : 1),
                       weights = warps * (spread.share - spread.held) * 4;
    const std::int64_t moved = reads + weights;
    return spread.panels * ((products > moved ? products : moved) + 60) + spread.bytes / (spread.grid ? 48 : 32) +
           (spread.grid ? 2000 : 500) + 250;
}

/// The spread that likely takes the fewest cycles; `at_once(parts)`: clusters that find room. False if none fits.
template <class AtOnce>
bool choose_spread(const Product& product, int directions, int batch, int multiprocessors, const ClusterForm& form,
                   const AtOnce& at_once, FloatSpread* best) {
    const std::size_t limit = shared_limit();
    std::int64_t least = -1;
    const auto consider_rows = [&](FloatSpread& spread, int room) {
        for (int rows = 1; rows <= most_rows; rows += rows < 4 ? 1 : rows < 8 ? 2 : 4) {
            if (rows > 1 && rows / 2 >= batch) return;
            spread.rows = rows % 4 == 0 ? 4 : rows % 2 == 0 && !product.few_forms ? 2 : 1;
            spread.panels = rows / spread.rows;
            // Parts without quads: fewer parts do the same.
            if (!lay(product, limit, &spread) || (form.parts == 0 && spread.busy < spread.parts)) continue;
            spread.tiles = (batch + rows - 1) / rows;
            spread.slots = directions * spread.tiles;
            // A cluster that has ended makes room for the next; all blocks of a grid must run at once.
            const int turns = (spread.slots + room - 1) / room;
            if (spread.grid && spread.slots > room) spread.slots = room;
            const std::int64_t cycles = cycles_of(spread) * turns;
            if (least >= 0 && cycles >= least) continue;
            least = spread.cycles = cycles;
            *best = spread;
        }
    };
    const auto consider = [&](bool grid, int parts) {
        const int room = grid ? multiprocessors / parts : at_once(parts);
        if (room < 1) return;
        const int quads = (product.quads + parts - 1) / parts;
        for (int lane_bits = 1; lane_bits <= 5; ++lane_bits) {
            const int in_warp = 32 >> lane_bits, threads = (quads + in_warp - 1) / in_warp * 32;
            const int share = (product.columns + (1 << lane_bits) - 1) >> lane_bits;
            // The fewest columns in registers that are all of them, or the most that go.
            FloatSpread spread = {};
            for (const int held : {16, 28, 48})
                if (threads <= threads_that_hold(held) && (spread.held == 0 || spread.held < share) &&
                    !(product.few_forms && held == 28))
                    spread.held = held;
            if (spread.held == 0) continue;
            spread.grid = grid;
            spread.parts = parts;
            spread.lane_bits = lane_bits;
            consider_rows(spread, room);
        }
    };
    const bool with_clusters = form.exchange != ClusterForm::grid, with_grid = form.exchange != ClusterForm::cluster;
    if (form.parts > 0) {
        if (with_clusters && form.parts >= least_cluster && form.parts <= most_cluster) consider(false, form.parts);
        if (with_grid) consider(true, form.parts);
        return least >= 0;
    }
    for (int parts = least_cluster; with_clusters && parts <= most_cluster; ++parts) consider(false, parts);
    for (int quads = 1; with_grid && quads <= 64; ++quads) consider(true, (product.quads + quads - 1) / quads);
    return least >= 0;
}

}  // namespace cuda
}  // namespace cellstep
