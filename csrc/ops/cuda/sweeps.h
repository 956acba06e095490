/// What the sweeps on tensor cores share beside their products: what a block knows of its way through the steps, and
/// what a lane does for the units and rows that it has, forward one unit, backward two that are 8 apart, of two rows.
#pragma once

#include "fragments.h"

namespace cellstep {
namespace cuda {

/// What all threads of a block know of their way, kept in shared memory, as registers are for weights.
struct Course {
    int steps;       // the longest row's
    int stage;       // whose part of each array is the sweep's
    int first_unit;  // of the block
    bool falling;    // from the last step to the first
    int tokens[8];   // of each step's row 0, looked up by one thread, which may be a step ahead of other warps

    static constexpr int ahead = 4;  // steps of which the tokens are known

    __device__ int time_of(int step) const { return falling ? steps - 1 - step : step; }
    __device__ int token(int step) const { return tokens[step & 7]; }
    __device__ void look_up(const Tile& tile, int step) {
        tokens[step & 7] = step < steps ? tile.token(time_of(step)) : 0;
    }
    /// By all threads, with the lengths of the tile's rows; the block meets, and again before any of it is read.
    __device__ void begin(const Tile& tile, int of_stage, int unit, bool from_last) {
        const int most = tile.longest();
        if (threadIdx.x != 0) return;
        steps = most;
        stage = of_stage;
        first_unit = unit;
        falling = from_last;
        for (int step = 0; step < ahead; ++step) look_up(tile, step);
    }
};

/// Whether zeros are written past a row's length.
__device__ inline bool zeros_past(const Steps& steps) { return steps.lengths && !steps.offsets; }

/// Whether what a call gives runs from the last step to the first; of two directions the second does.
template <class Call>
__device__ inline bool runs_backwards(const Call& call, int direction) {
    return call.directions == 2 ? direction == 1 : call.reverse;
}

/// -----------------------------------------------------------------------------------------------------------------
/// Forward.

/// Where the arrays of a stage begin, kept in shared memory.
template <class T>
struct ForwardArrays {
    const T* sums;  // null
    T* y;
    T* gates;  // null, as cells
    T* cells;
    T* h_n;
    T* c_n;

    __device__ void begin(const Forward& call, int stage) {
        const int layer = stage / call.directions, direction = stage % call.directions, H = call.hidden_size;
        const std::int64_t past = stage * call.steps.tokens * H,
                           state = static_cast<std::int64_t>(stage) * call.steps.batch * H;
        const std::int64_t between = layer * call.steps.tokens * call.directions * H;
        sums = call.sums ? static_cast<const T*>(call.sums) + 4 * past : nullptr;
        y = (layer == call.layers - 1 ? static_cast<T*>(call.y) : static_cast<T*>(call.outputs) + between) +
            direction * H;
        gates = call.gates ? static_cast<T*>(call.gates) + 4 * past : nullptr;
        cells = call.cells ? static_cast<T*>(call.cells) + past : nullptr;
        h_n = static_cast<T*>(call.h_n) + state;
        c_n = static_cast<T*>(call.c_n) + state;
    }
};

/// Both biases of `count` units from `first_unit` on, zeros past the last unit.
template <class T>
__device__ inline void add_biases(float4* biases, const StageWeights& weights, int first_unit, int count, int units) {
    for (int at = static_cast<int>(threadIdx.x); at < count; at += static_cast<int>(blockDim.x)) {
        const int unit = first_unit + at;
        float bias[4] = {};
        for (int gate = 0; gate < 4 && unit < units; ++gate)
            for (const WeightView* view : {&weights.bias_ih, &weights.bias_hh})
                if (view->data)
                    bias[gate] += to_float(static_cast<const T*>(
                        view->data)[gate * view->gate + unit / 16 * view->panel + unit % 16 * view->unit]);
        biases[at] = make_float4(bias[0], bias[1], bias[2], bias[3]);
    }
}

/// Whether a row is put to the initial state before its first step.
__device__ inline bool begins_reset(const Tile& tile, const Course& course, int row) {
    return !course.falling && tile.steps.reset && tile.lengths[row] > 0 && tile.reset(0, row);
}

/// Where h and c of a unit and a row lie in the arrays of a call.
template <class Call>
__device__ inline std::int64_t state_place(const Call& call, const Tile& tile, const Course& course, int row,
                                           int unit) {
    return (static_cast<std::int64_t>(course.stage) * call.steps.batch + tile.first + row) * call.hidden_size + unit;
}

template <class T>
__device__ inline T first_h(const Forward& call, const Tile& tile, const Course& course, int row, int unit) {
    if (begins_reset(tile, course, row)) return at_or_zero<T>(call.initial_h, course.stage * call.hidden_size + unit);
    return from_float<T>(carried_or<T>(call.from.h, call.h, state_place(call, tile, course, row, unit)));
}

/// The cell that a unit begins with. A row without a step ends where it began.
template <class T>
__device__ inline float first_cell(const Forward& call, const ForwardArrays<T>& arrays, const Tile& tile,
                                   const Course& course, int row, int unit) {
    const int H = call.hidden_size, n = tile.first + row;
    if (unit >= H || n >= call.steps.batch) return 0.0f;
    if (begins_reset(tile, course, row)) return to_float(at_or_zero<T>(call.initial_c, course.stage * H + unit));
    const float c = carried_or<T>(call.from.c, call.c, state_place(call, tile, course, row, unit));
    if (tile.lengths[row] == 0) {
        const std::int64_t place = static_cast<std::int64_t>(n) * H + unit;
        arrays.h_n[place] = first_h<T>(call, tile, course, row, unit);
        arrays.c_n[place] = from_float<T>(c);
    }
    return c;
}

/// The gate sums that were given of a unit and two rows, zeros where there are none: [row][gate].
template <class T>
__device__ inline void load_sums(std::uint32_t (&coming)[8], const ForwardArrays<T>& arrays, const Tile& tile,
                                 const Course& course, int step, int first_row, int unit, int units) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int row = first_row + e;
        const bool there =
            row < tile.rows && step < course.steps && unit < units && course.time_of(step) < tile.lengths[row];
        const T* const from = in_global(arrays.sums) +
                              static_cast<std::int64_t>(course.token(step) + tile.first + row) * 4 * units + unit;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate)
            coming[e * 4 + gate] = there ? read<std::uint16_t>(from + gate * units) : 0;
    }
}

/// Which of two rows are put to the initial state behind this step, a bit each.
__device__ inline int resets_behind(const Tile& tile, const Course& course, int step, int first_row) {
    const int t = course.time_of(step), flagged = course.falling ? t : t + 1;
    int found = 0;
    if (tile.steps.reset && flagged > 0)
#pragma unroll
        for (int e = 0; e < 2; ++e)
            if (flagged < tile.lengths[first_row + e] && tile.reset(flagged, first_row + e)) found |= 1 << e;
    return found;
}

/// Puts them there: h_place(e) and cells[e], shared, which hold what the step found.
template <class T, class Place>
__device__ inline void put_to_initial(int resets, const Forward& call, const Course& course, int unit, float* cells,
                                      const Place& h_place) {
    if (unit >= call.hidden_size) return;
#pragma unroll 1
    for (int e = 0; resets >> e != 0; ++e) {
        if ((resets >> e & 1) == 0) continue;
        *h_place(e) = at_or_zero<T>(call.initial_h, course.stage * call.hidden_size + unit);
        cells[e] = to_float(at_or_zero<T>(call.initial_c, course.stage * call.hidden_size + unit));
    }
}

/// What nobody waits for, of two rows.
template <class T>
__device__ inline void store_rows(const Forward& call, const ForwardArrays<T>& arrays, const Tile& tile,
                                  const Course& course, int step, int first_row, int unit, const float (&gates)[2][4],
                                  const float (&c)[2], const T (&h)[2]) {
    const int H = call.hidden_size, t = course.time_of(step);
    if (unit >= H) return;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int n = tile.first + first_row + e, length = tile.lengths[first_row + e];
        const bool past = t >= length;
        if (past && (!zeros_past(call.steps) || n >= call.steps.batch)) continue;
        const std::int64_t token = course.token(step) + n;
        const T zero = from_float<T>(0.0f);
        in_global(arrays.y)[token * call.directions * H + unit] = past ? zero : h[e];
        if (arrays.gates) {
            T* const to = in_global(arrays.gates) + token * 4 * H + unit;
#pragma unroll
            for (int gate = 0; gate < 4; ++gate) to[gate * H] = past ? zero : from_float<T>(gates[e][gate]);
            in_global(arrays.cells)[token * H + unit] = past ? zero : from_float<T>(c[e]);
        }
        if (!past && t == (course.falling ? 0 : length - 1)) {
            const std::int64_t place = static_cast<std::int64_t>(n) * H + unit;
            in_global(arrays.h_n)[place] = h[e];
            in_global(arrays.c_n)[place] = from_float<T>(c[e]);
        }
    }
}

/// -----------------------------------------------------------------------------------------------------------------
/// Backward. A lane's places: unit + place / 2 * 8, row + place % 2.

__device__ inline float tanh_for(float x, __half) { return tanh_of(x); }
__device__ inline float tanh_for(float x, __nv_bfloat16) { return tanh_approx(x); }

/// Where the arrays of a sweep back begin, kept in shared memory.
template <class T>
struct BackwardArrays {
    const T* gates;
    const T* cells;
    const T* c;
    const T* grad_outputs;  // null, as grad_cells
    const T* grad_cells;
    T* grad_sums;

    __device__ void begin(const Backward& call, int direction) {
        const int H = call.hidden_size;
        const std::int64_t past = direction * call.steps.tokens * H;
        gates = static_cast<const T*>(call.gates) + 4 * past;
        cells = static_cast<const T*>(call.cells) + past;
        c = static_cast<const T*>(call.c) + static_cast<std::int64_t>(direction) * call.steps.batch * H;
        grad_outputs = call.grad_outputs ? static_cast<const T*>(call.grad_outputs) + direction * H : nullptr;
        grad_cells = call.grad_cells ? static_cast<const T*>(call.grad_cells) + past : nullptr;
        grad_sums = static_cast<T*>(call.grad_sums) + 4 * past;
    }
};

/// Gradients of the state of a row without a step.
template <class T>
__device__ inline void pass_through(const Backward& call, const Tile& tile, const Course& course, int first_row,
                                    int first_unit) {
    for (int place = 0; place < 4; ++place) {
        const int unit = first_unit + place / 2 * 8, row = first_row + place % 2, n = tile.first + row;
        if (unit >= call.hidden_size || n >= call.steps.batch || tile.lengths[row] > 0) continue;
        const std::int64_t where = state_place(call, tile, course, row, unit);
        const float dh = carried_or<T>(call.from.h, call.grad_h_n, where);
        const float dc = carried_or<T>(call.from.c, call.grad_c_n, where);
        static_cast<T*>(call.grad_h)[where] = from_float<T>(dh);
        static_cast<T*>(call.grad_c)[where] = from_float<T>(dc);
        carry(call.to, where, dh, dc);
    }
}

/// What the forward pass left of a step, on its way while the products before it run.
template <class T>
struct Left {
    T gates[4][4], cell[4], cell_before[4], grad_y[4];  // [place]

    __device__ void load(const Backward& call, const BackwardArrays<T>& arrays, const Tile& tile, const Course& course,
                         int step, int first_row, int first_unit) {
        const int H = call.hidden_size, t = course.time_of(step);
        const int token = course.token(step), token_next = course.token(step + 1);
#pragma unroll
        for (int place = 0; place < 4; ++place) {
            const int unit = first_unit + place / 2 * 8, row = first_row + place % 2, n = tile.first + row;
            const int length = row < tile.rows ? tile.lengths[row] : 0;
            const bool there = step < course.steps && unit < H && t < length;
            const T zero = from_float<T>(0.0f);
            const std::int64_t here = static_cast<std::int64_t>(token + n) * H + unit;
#pragma unroll
            for (int gate = 0; gate < 4; ++gate)
                gates[place][gate] = there ? in_global(arrays.gates)[here * 4 - 3 * unit + gate * H] : zero;
            cell[place] = there ? in_global(arrays.cells)[here] : zero;
            const bool first = course.falling ? t == 0 : t + 1 == length;  // of the forward pass
            const T* const before =
                first ? in_global(arrays.c) + static_cast<std::int64_t>(n) * H + unit
                      : in_global(arrays.cells) + static_cast<std::int64_t>(token_next + n) * H + unit;
            cell_before[place] = there ? *in_global(before) : zero;
            grad_y[place] =
                there && call.grad_outputs
                    ? in_global(arrays.grad_outputs)[static_cast<std::int64_t>(token + n) * call.directions * H + unit]
                    : zero;
        }
    }
};

/// dh and dc behind a step become dc before it; `put(place, bits)` gets the gradients of the four gate sums, zeros
/// where there are none. At the step past the last what a row began with gets its gradients, and put those two in
/// float.
template <class T, class Put>
__device__ inline void step_back(const float (&dh_of)[4], float (&dc_of)[4], const Left<T>& left, const Backward& call,
                                 const BackwardArrays<T>& arrays, const Tile& tile, const Course& course, int step,
                                 int first_row, int first_unit, const Put& put) {
    const int H = call.hidden_size, batch = call.steps.batch, t = course.time_of(step);
    bool cut[2] = {false, false};    // from the step that the sweep has just left
    bool fresh[2] = {false, false};  // the step began from the initial state
    int length[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int row = first_row + e;
        length[e] = tile.lengths[row];
        if (!call.steps.reset) continue;
        const int behind = course.falling ? t + 1 : t, before = course.falling ? t : t + 1;
        if (behind < length[e] && (course.falling || behind > 0)) cut[e] = tile.reset(behind, row);
        if (before >= 0 && before < length[e]) fresh[e] = tile.reset(before, row);
    }
#pragma unroll
    for (int place = 0; place < 4; ++place) {
        const int e = place % 2, unit = first_unit + place / 2 * 8, n = tile.first + first_row + e;
        const bool there = unit < H && n < batch;
        const std::int64_t where = state_place(call, tile, course, first_row + e, unit);
        float dh = cut[e] ? 0.0f : dh_of[place], dc = cut[e] ? 0.0f : dc_of[place];
        if (there && length[e] > 0 && (course.falling ? step == course.steps : t == length[e])) {
            static_cast<T*>(call.grad_h)[where] = from_float<T>(dh);
            static_cast<T*>(call.grad_c)[where] = from_float<T>(dc);
        }
        if (step == course.steps) {
            uint2 bits;
            memcpy(&bits.x, &dh, 4);
            memcpy(&bits.y, &dc, 4);
            put(place, bits);
            continue;
        }
        T results[4];
        if (there && t < length[e]) {
            if (t == (course.falling ? length[e] - 1 : 0)) {
                dh = carried_or<T>(call.from.h, call.grad_h_n, where);
                dc = carried_or<T>(call.from.c, call.grad_c_n, where);
            }
            const float i = to_float(left.gates[place][0]), f = to_float(left.gates[place][1]);
            const float g = to_float(left.gates[place][2]), o = to_float(left.gates[place][3]);
            const float before = fresh[e] ? to_float(at_or_zero<T>(call.initial_c, course.stage * H + unit))
                                          : to_float(left.cell_before[place]);
            const float tanh_c = tanh_for(to_float(left.cell[place]), T());
            dh += to_float(left.grad_y[place]);
            dc += dh * o * (1.0f - tanh_c * tanh_c) +
                  (call.grad_cells
                       ? to_float(
                             in_global(arrays.grad_cells)[static_cast<std::int64_t>(course.token(step) + n) * H + unit])
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
        put(place, make_uint2(pair_of(results[0], results[1]), pair_of(results[2], results[3])));
    }
}

/// The gradients of the gate sums of a unit and a row, where there are any.
template <class T>
__device__ inline void store_sums(const Backward& call, const BackwardArrays<T>& arrays, const Tile& tile,
                                  const Course& course, int step, int row, int unit, const uint2& bits) {
    const int H = call.hidden_size, n = tile.first + row;
    if (unit >= H || n >= call.steps.batch) return;
    if (course.time_of(step) >= tile.lengths[row] && !zeros_past(call.steps)) return;
    T* const to = in_global(arrays.grad_sums) + static_cast<std::int64_t>(course.token(step) + n) * 4 * H + unit;
    to[0] = from_bits<T>(bits.x);
    to[H] = from_bits<T>(bits.x >> 16);
    to[2 * H] = from_bits<T>(bits.y);
    to[3 * H] = from_bits<T>(bits.y >> 16);
}

/// What step_back put at the step past the last goes on to the piece before.
template <class Place>
__device__ inline void carry_back(const Backward& call, const Tile& tile, const Course& course, int first_row,
                                  int first_unit, const Place& result_place) {
    for (int place = 0; place < 4; ++place) {
        const int unit = first_unit + place / 2 * 8, row = first_row + place % 2;
        if (unit >= call.hidden_size || tile.first + row >= call.steps.batch || tile.lengths[row] == 0) continue;
        const float2 found = read<float2>(result_place(place));
        carry(call.to, state_place(call, tile, course, row, unit), found.x, found.y);
    }
}

}  // namespace cuda
}  // namespace cellstep
