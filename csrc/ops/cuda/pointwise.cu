#include "pointwise.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "device.h"

namespace cellstep {
namespace cuda {

namespace {

constexpr int threads = 256;

/// Values that one load takes: the 16 bytes of it, or one.
template <class T, int values>
struct alignas(values * sizeof(T) >= 16 ? 16 : alignof(T)) Pack {
    T at[values];
};

template <class T, int values>
__device__ inline Pack<T, values> read(const void* data, std::int64_t at) {
    return *reinterpret_cast<const Pack<T, values>*>(static_cast<const T*>(data) + at);
}

template <class T, int values>
__device__ inline void write(void* data, std::int64_t at, const Pack<T, values>& pack) {
    *reinterpret_cast<Pack<T, values>*>(static_cast<T*>(data) + at) = pack;
}

/// A value in the type of sums; zero where there is no memory.
template <class T>
__device__ inline typename Wide<T>::type wide(const void* data, std::int64_t at) {
    return data ? to_float(static_cast<const T*>(data)[at]) : typename Wide<T>::type(0);
}

template <class T>
__device__ inline typename Wide<T>::type bias_of(const WeightView& bias, int gate, int unit) {
    return wide<T>(bias.data, gate * bias.gate + unit / 16 * bias.panel + unit % 16 * bias.unit);
}

__device__ inline std::int64_t thread_number() {
    return std::int64_t(blockIdx.x) * threads + static_cast<int>(threadIdx.x);
}

__device__ inline bool has_step(const Steps& steps, int step, int row) {
    return !steps.lengths || step < steps.lengths[row];
}

/// Whether the state is put to the initial one between a step that the row has and the one before it, or before its
/// first. Going backwards the flag of the step before parts the two, and none stands before the first.
__device__ inline bool parted(const Steps& steps, bool reverse, int step, int row, bool first) {
    if (!steps.reset || (reverse && first)) return false;
    return steps.reset[std::int64_t(step + reverse) * steps.batch + row] != 0;
}

/// Of a row that has the step: whether it has none before, or behind.
__device__ inline bool is_first(const Step& at, int row) {
    return at.before < 0 || row >= at.before_rows ||
           (at.steps.lengths && at.reverse && at.step + 1 == at.steps.lengths[row]);
}
__device__ inline bool is_last(const Step& at, int row) {
    return at.behind < 0 || row >= at.behind_rows ||
           (at.steps.lengths && !at.reverse && at.step + 1 == at.steps.lengths[row]);
}

bool aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }

/// Starts as many threads as there are items, if any.
template <class Argument>
const char* start(void (*kernel)(Argument), std::int64_t items, void* stream, const Argument& argument) {
    if (items == 0) return nullptr;
    return launch(kernel, dim3(static_cast<unsigned>((items + threads - 1) / threads)), dim3(threads), 0, stream,
                  argument);
}

/// Answers what `run` does with a value of the type.
template <class Run>
const char* with_type(DataType type, const Run& run) {
    switch (type) {
        case DataType::float64:
            return run(double());
        case DataType::float16:
            return run(__half());
        case DataType::bfloat16:
            return run(__nv_bfloat16());
        default:
            return run(float());
    }
}

struct Ints {
    int* target;
    int count;
    int values[960];
};

__global__ void put_ints_kernel(Ints ints) {
    for (int at = static_cast<int>(threadIdx.x); at < ints.count; at += threads) ints.target[at] = ints.values[at];
}

struct Lengths {
    const std::int64_t* lengths;
    int batch;
    int steps;
    int* target;
};

__global__ void cut_lengths_kernel(Lengths call) {
    const std::int64_t row = thread_number();
    if (row >= call.batch) return;
    const std::int64_t length = call.lengths[row];
    call.target[row] = static_cast<int>(length < 0 ? 0 : length > call.steps ? call.steps : length);
}

struct PieceLengths {
    const int* lengths;
    int batch;
    int steps;
    int pieces;
    int* target;
};

__global__ void lengths_in_pieces_kernel(PieceLengths call) {
    const std::int64_t at = thread_number();
    if (at >= static_cast<std::int64_t>(call.pieces) * call.batch) return;
    const int left = call.lengths[at % call.batch] - static_cast<int>(at / call.batch) * call.steps;
    call.target[at] = max(0, min(left, call.steps));
}

struct PackedLengths {
    Steps steps;
    int* target;
};

__global__ void packed_lengths_kernel(PackedLengths call) {
    const std::int64_t row = thread_number();
    if (row >= call.steps.batch) return;
    int low = 0, high = call.steps.steps;  // the steps before low have the row, those from high on do not
    while (low < high) {
        const int middle = (low + high) / 2;
        const std::int64_t end = middle + 1 < call.steps.steps ? call.steps.offsets[middle + 1] : call.steps.tokens;
        if (end - call.steps.offsets[middle] > row)
            low = middle + 1;
        else
            high = middle;
    }
    call.target[row] = low;
}

template <class T>
__global__ void begin_kernel(CellBegin call) {
    const int width = call.recurrent_size + call.hidden_size;
    const std::int64_t item = thread_number();
    if (item >= std::int64_t(call.steps.batch) * width) return;
    const int row = static_cast<int>(item / width), column = static_cast<int>(item % width);
    const int unit = column - call.recurrent_size;
    const bool cleared =
        call.steps.steps > 0 && has_step(call.steps, 0, row) && parted(call.steps, call.reverse, 0, row, true);
    if (unit < 0) {
        const std::int64_t at = std::int64_t(row) * call.recurrent_size + column;
        static_cast<T*>(call.h_state)[at] =
            from_float<T>(cleared ? wide<T>(call.initial_h, column) : wide<T>(call.h, at));
        return;
    }
    const std::int64_t at = std::int64_t(row) * call.hidden_size + unit;
    const auto c = cleared ? wide<T>(call.initial_c, unit) : wide<T>(call.c, at);
    static_cast<typename Wide<T>::type*>(call.c_state)[at] = c;
    if (call.c_n) static_cast<T*>(call.c_n)[at] = from_float<T>(c);
}

/// What a thread computes of a step: `values` units of a row. There may be threads for rows past the last.
template <int values>
struct Share {
    int units, row, unit;

    __device__ Share(const Step& at, int hidden_size) : units(hidden_size), row(at.rows), unit(0) {
        const int groups = units / values;
        const std::int64_t item = thread_number();
        if (item >= std::int64_t(at.rows) * groups) return;
        row = static_cast<int>(item / groups);
        unit = static_cast<int>(item % groups) * values;
    }

    /// Place in an array (rows or tokens, H), and in one of gates (rows or tokens, 4 H).
    __device__ std::int64_t cell(std::int64_t of) const { return of * units + unit; }
    __device__ std::int64_t gate(std::int64_t of, int gate) const { return (of * 4 + gate) * units + unit; }
};

template <class T, int values>
__global__ void forward_kernel(CellForward call) {
    using W = typename Wide<T>::type;
    const Step& at = call.at;
    const Share<values> share(at, call.hidden_size);
    if (share.row >= at.rows) return;
    const int row = share.row, unit = share.unit;
    const std::int64_t token = at.first + row, state = share.cell(row);
    Pack<T, values> gates[4], y = {}, cells = {};
    const bool active = has_step(at.steps, at.step, row);
    if (active) {
        W sums[4][values];
        for (int gate = 0; gate < 4; ++gate) {
            const auto sum = read<T, values>(call.sums, share.gate(token - call.sums_first, gate));
            const auto product = read<T, values>(call.products, share.gate(row, gate));
            for (int k = 0; k < values; ++k)
                sums[gate][k] = (bias_of<T>(call.bias_ih, gate, unit + k) + bias_of<T>(call.bias_hh, gate, unit + k)) +
                                (to_float(sum.at[k]) + to_float(product.at[k]));
        }
        auto c = read<W, values>(call.c_state, state);
        Pack<T, values> c_n, h;
        const bool last = is_last(at, row);
        const bool cleared = !last && parted(at.steps, at.reverse, at.behind, row, false);
        for (int k = 0; k < values; ++k) {
            const W i = sigmoid_of(sums[0][k]), f = sigmoid_of(sums[1][k]), g = tanh_of(sums[2][k]),
                    o = sigmoid_of(sums[3][k]);
            const W next = f * c.at[k] + i * g;
            y.at[k] = from_float<T>(o * tanh_of(next));
            gates[0].at[k] = from_float<T>(i);
            gates[1].at[k] = from_float<T>(f);
            gates[2].at[k] = from_float<T>(g);
            gates[3].at[k] = from_float<T>(o);
            c_n.at[k] = cells.at[k] = from_float<T>(next);
            c.at[k] = cleared ? wide<T>(call.initial_c, unit + k) : next;
            h.at[k] = cleared ? from_float<T>(wide<T>(call.initial_h, unit + k)) : y.at[k];
        }
        write(call.c_state, state, c);
        if (call.c_n) write(call.c_n, state, c_n);
        if (call.h_state) write(call.h_state, state, h);
    } else {
        for (auto& gate : gates) gate = {};
    }
    write(call.y, (token - call.y_first) * call.y_row + unit, y);
    if (call.cells) write(call.cells, share.cell(token), cells);
    if (call.gates)
        for (int gate = 0; gate < 4; ++gate) write(call.gates, share.gate(token, gate), gates[gate]);
}

template <class T, int values>
__global__ void backward_kernel(CellBackward call) {
    using W = typename Wide<T>::type;
    const Step& at = call.at;
    const Share<values> share(at, call.hidden_size);
    if (share.row >= at.rows) return;
    const int row = share.row, unit = share.unit;
    const std::int64_t token = at.first + row, state = share.cell(row);
    const Pack<T, values> nothing = {};
    Pack<T, values> grads[4] = {};
    if (has_step(at.steps, at.step, row)) {
        const bool first = is_first(at, row), last = is_last(at, row);
        const bool cleared_before = parted(at.steps, at.reverse, at.step, row, first);
        const bool cleared_behind = !last && parted(at.steps, at.reverse, at.behind, row, false);
        const auto pack = [&](const void* data, std::int64_t place) {
            return data ? read<T, values>(data, place) : nothing;
        };
        const auto grad_y = pack(call.whole ? nullptr : call.grad_y, token * call.grad_y_row + unit);
        const auto grad_cells = pack(call.grad_cells, share.cell(token));
        const auto sent = call.whole       ? pack(call.products, state)
                          : last           ? pack(call.grad_h_n, state)
                          : cleared_behind ? nothing
                                           : pack(call.products, state);
        const auto grad_c_n = pack(last ? call.grad_c_n : nullptr, state);
        auto c_state = read<W, values>(call.c_state, state);
        const auto c = read<T, values>(call.cells, share.cell(token));
        const auto before = cleared_before ? pack(call.initial_c, unit)
                            : first        ? pack(call.c, state)
                                           : pack(call.cells, share.cell(at.before_first + row));
        Pack<T, values> gates[4];
        for (int gate = 0; gate < 4; ++gate) gates[gate] = read<T, values>(call.gates, share.gate(token, gate));
        for (int k = 0; k < values; ++k) {
            const W i = to_float(gates[0].at[k]), f = to_float(gates[1].at[k]), g = to_float(gates[2].at[k]),
                    o = to_float(gates[3].at[k]);
            const W bent = tanh_of(to_float(c.at[k]));
            const W to_h = to_float(grad_y.at[k]) + to_float(sent.at[k]);
            const W from_behind = last ? W(to_float(grad_c_n.at[k])) : cleared_behind ? W(0) : c_state.at[k];
            const W to_c = to_float(grad_cells.at[k]) + from_behind + to_h * o * (1 - bent * bent);
            grads[0].at[k] = from_float<T>(to_c * g * i * (1 - i));
            grads[1].at[k] = from_float<T>(to_c * to_float(before.at[k]) * f * (1 - f));
            grads[2].at[k] = from_float<T>(to_c * i * (1 - g * g));
            grads[3].at[k] = from_float<T>(to_h * bent * o * (1 - o));
            c_state.at[k] = to_c * f;
        }
        write(call.c_state, state, c_state);
    } else if (at.reverse && at.step > 0 && at.step == at.steps.lengths[row]) {
        write(call.grad_h, state, read<T, values>(call.products, state));
    }
    for (int gate = 0; gate < 4; ++gate) write(call.grad_sums, share.gate(token, gate), grads[gate]);
}

template <class T>
__global__ void project_kernel(ProjectBackward call) {
    const int width = call.recurrent_size;
    const std::int64_t item = thread_number();
    if (item >= std::int64_t(call.at.rows) * width) return;
    const int row = static_cast<int>(item / width);
    const auto sent = wide<T>(is_last(call.at, row) ? call.grad_h_n : call.products, item);
    const std::int64_t at = call.at.first * width + item;
    static_cast<T*>(call.grad_outputs)[at] = from_float<T>(wide<T>(call.grad_y, at) + sent);
}

template <class T>
__global__ void finish_kernel(CellFinish call) {
    const int width = call.recurrent_size + call.hidden_size;
    const std::int64_t item = thread_number();
    if (item >= std::int64_t(call.steps.batch) * width) return;
    const int row = static_cast<int>(item / width), column = static_cast<int>(item % width);
    const int length = call.steps.lengths ? call.steps.lengths[row] : row < call.begun ? call.steps.steps : 0;
    const bool cleared = length > 0 && parted(call.steps, call.reverse, 0, row, true);
    const int unit = column - call.recurrent_size;
    if (unit < 0) {
        const std::int64_t at = std::int64_t(row) * call.recurrent_size + column;
        // Those of rows that went backwards from within the batch are there already.
        if (length > 0 && length < call.steps.steps && call.reverse && call.steps.lengths) return;
        static_cast<T*>(call.grad_h)[at] = from_float<T>(
            cleared ? typename Wide<T>::type(0) : wide<T>(length > 0 ? call.products : call.grad_h_n, at));
        return;
    }
    const std::int64_t at = std::int64_t(row) * call.hidden_size + unit;
    const auto c =
        length > 0 ? static_cast<const typename Wide<T>::type*>(call.c_state)[at] : wide<T>(call.grad_c_n, at);
    static_cast<T*>(call.grad_c)[at] = from_float<T>(cleared ? typename Wide<T>::type(0) : c);
}

/// Step and row of a token, and the token of a row's step before it.
struct Place {
    int step;
    int row;
    bool first;
    std::int64_t before;
};

__device__ inline Place place_of(const Steps& steps, bool reverse, std::int64_t token) {
    if (!steps.offsets) {
        const int step = static_cast<int>(token / steps.batch), row = static_cast<int>(token % steps.batch);
        const int length = steps.lengths ? steps.lengths[row] : steps.steps;
        return {step, row, reverse ? step + 1 >= length : step == 0, token + (reverse ? steps.batch : -steps.batch)};
    }
    int low = 0, high = steps.steps;  // the last step that begins with or before the token
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (steps.offsets[middle] <= token ? low : high) = middle;
    }
    const int row = static_cast<int>(token - steps.offsets[low]);
    if (!reverse) return {low, row, low == 0, low == 0 ? 0 : steps.offsets[low - 1] + row};
    const std::int64_t begin = low + 1 < steps.steps ? steps.offsets[low + 1] : steps.tokens;
    const std::int64_t end = low + 2 < steps.steps ? steps.offsets[low + 2] : steps.tokens;
    return {low, row, row >= end - begin, begin + row};
}

template <class T>
__global__ void hidden_before_kernel(HiddenBefore call) {
    const int width = call.recurrent_size;
    const std::int64_t item = thread_number();
    if (item >= call.steps.tokens * width) return;
    const std::int64_t token = item / width;
    const int unit = static_cast<int>(item % width);
    const Place place = place_of(call.steps, call.reverse, token);
    T value = T{};
    if (has_step(call.steps, place.step, place.row)) {
        if (parted(call.steps, call.reverse, place.step, place.row, place.first))
            value = call.initial_h ? static_cast<const T*>(call.initial_h)[unit] : value;
        else
            value = place.first ? static_cast<const T*>(call.h)[std::int64_t(place.row) * width + unit]
                                : static_cast<const T*>(call.y)[place.before * call.y_row + unit];
    }
    static_cast<T*>(call.target)[item] = value;
}

struct HiddenAgain {
    std::int64_t tokens;
    int units;
    const void* gates;
    const void* cells;
    void* target;
};

template <class T>
__global__ void hidden_again_kernel(HiddenAgain call) {
    const std::int64_t item = thread_number();
    if (item >= call.tokens * call.units) return;
    const std::int64_t token = item / call.units;
    const auto o = wide<T>(call.gates, (token * 4 + 3) * call.units + item % call.units);
    static_cast<T*>(call.target)[item] = from_float<T>(o * tanh_of(wide<T>(call.cells, item)));
}

struct KeepLengths {
    Steps steps;
    int width;
    const void* values;
    void* target;
};

template <class T>
__global__ void keep_lengths_kernel(KeepLengths call) {
    const std::int64_t item = thread_number();
    if (item >= call.steps.tokens * call.width) return;
    const std::int64_t token = item / call.width;
    const bool kept =
        has_step(call.steps, static_cast<int>(token / call.steps.batch), static_cast<int>(token % call.steps.batch));
    static_cast<T*>(call.target)[item] = kept ? static_cast<const T*>(call.values)[item] : T{};
}

struct Columns {
    std::int64_t rows;
    int columns;
    int pieces;
    const void* values;
    void* scratch;
    void* target;
};

/// A piece of the rows, for 32 columns: eight warps take every eighth row, and the first adds them up.
template <class T>
__global__ void piece_kernel(Columns call) {
    using W = typename Wide<T>::type;
    W* sums = reinterpret_cast<W*>(shared_memory());
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int column = static_cast<int>(blockIdx.x) * 32 + lane, piece = static_cast<int>(blockIdx.y);
    const std::int64_t begin = call.rows * piece / call.pieces, end = call.rows * (piece + 1) / call.pieces;
    W sum = 0;
    if (column < call.columns)
        for (std::int64_t row = begin + warp; row < end; row += 8)
            sum += wide<T>(call.values, row * call.columns + column);
    sums[threadIdx.x] = sum;
    block_sync();
    if (warp > 0 || column >= call.columns) return;
    for (int other = 1; other < 8; ++other) sum += sums[other * 32 + lane];
    static_cast<W*>(call.scratch)[std::int64_t(piece) * call.columns + column] = sum;
}

template <class T>
__global__ void join_kernel(Columns call) {
    using W = typename Wide<T>::type;
    const std::int64_t column = thread_number();
    if (column >= call.columns) return;
    W sum = 0;
    for (int piece = 0; piece < call.pieces; ++piece)
        sum += static_cast<const W*>(call.scratch)[std::int64_t(piece) * call.columns + column];
    static_cast<T*>(call.target)[column] = from_float<T>(sum);
}

}  // namespace

int multiprocessors(int device) {
#if defined(CELLSTEP_EMULATED)
    static_cast<void>(device);
    const char* const count = std::getenv("CELLSTEP_SIMT_MULTIPROCESSORS");
    return count ? std::atoi(count) : 8;
#else
    static std::atomic<int> counts[64];
    std::atomic<int>& count = counts[device & 63];
    if (count == 0) {
        int found = 0;
        cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device);
        count = found;
    }
    return count;
#endif
}

const char* put_ints(const int* values, std::int64_t count, int* target, void* stream) {
    Ints ints;
    for (std::int64_t done = 0; done < count; done += ints.count) {
        ints.target = target + done;
        ints.count = static_cast<int>(std::min<std::int64_t>(count - done, sizeof(ints.values) / sizeof(int)));
        std::copy(values + done, values + done + ints.count, ints.values);
        if (const char* error = launch(put_ints_kernel, dim3(1), dim3(threads), 0, stream, ints)) return error;
    }
    return nullptr;
}

const char* cut_lengths(const std::int64_t* lengths, int batch, int steps, int* target, void* stream) {
    return start(cut_lengths_kernel, batch, stream, Lengths{lengths, batch, steps, target});
}

const char* packed_lengths(const Steps& steps, int* target, void* stream) {
    return start(packed_lengths_kernel, steps.batch, stream, PackedLengths{steps, target});
}

const char* lengths_in_pieces(const int* lengths, int batch, int steps, int pieces, int* target, void* stream) {
    return start(lengths_in_pieces_kernel, std::int64_t(pieces) * batch, stream,
                 PieceLengths{lengths, batch, steps, pieces, target});
}

const char* cell_begin(const CellBegin& call) {
    const std::int64_t items = std::int64_t(call.steps.batch) * (call.recurrent_size + call.hidden_size);
    return with_type(call.type,
                     [&](auto value) { return start(begin_kernel<decltype(value)>, items, call.stream, call); });
}

const char* cell_forward(const CellForward& call) {
    return with_type(call.type, [&](auto value) {
        using T = decltype(value);
        constexpr int values = 16 / sizeof(T);
        bool whole = call.hidden_size % values == 0 && call.y_row % values == 0;
        for (const void* data :
             {call.sums, call.products, static_cast<const void*>(call.h_state), static_cast<const void*>(call.c_state),
              static_cast<const void*>(call.c_n), static_cast<const void*>(call.y),
              static_cast<const void*>(call.gates), static_cast<const void*>(call.cells)})
            whole = whole && aligned(data);
        const std::int64_t items = std::int64_t(call.at.rows) * call.hidden_size;
        return whole ? start(forward_kernel<T, values>, items / values, call.stream, call)
                     : start(forward_kernel<T, 1>, items, call.stream, call);
    });
}

const char* cell_backward(const CellBackward& call) {
    return with_type(call.type, [&](auto value) {
        using T = decltype(value);
        constexpr int values = 16 / sizeof(T);
        bool whole = call.hidden_size % values == 0 && call.grad_y_row % values == 0;
        for (const void* data : {call.c, call.initial_c, call.gates, call.cells, call.grad_y, call.grad_cells,
                                 call.grad_h_n, call.grad_c_n, call.products, static_cast<const void*>(call.c_state),
                                 static_cast<const void*>(call.grad_sums), static_cast<const void*>(call.grad_h)})
            whole = whole && aligned(data);
        const std::int64_t items = std::int64_t(call.at.rows) * call.hidden_size;
        return whole ? start(backward_kernel<T, values>, items / values, call.stream, call)
                     : start(backward_kernel<T, 1>, items, call.stream, call);
    });
}

const char* project_backward(const ProjectBackward& call) {
    const std::int64_t items = std::int64_t(call.at.rows) * call.recurrent_size;
    return with_type(call.type,
                     [&](auto value) { return start(project_kernel<decltype(value)>, items, call.stream, call); });
}

const char* cell_finish(const CellFinish& call) {
    const std::int64_t items = std::int64_t(call.steps.batch) * (call.recurrent_size + call.hidden_size);
    return with_type(call.type,
                     [&](auto value) { return start(finish_kernel<decltype(value)>, items, call.stream, call); });
}

const char* hidden_before(const HiddenBefore& call) {
    return with_type(call.type, [&](auto value) {
        return start(hidden_before_kernel<decltype(value)>, call.steps.tokens * call.recurrent_size, call.stream, call);
    });
}

const char* hidden_again(DataType type, std::int64_t tokens, int hidden_size, const void* gates, const void* cells,
                         void* target, void* stream) {
    return with_type(type, [&](auto value) {
        return start(hidden_again_kernel<decltype(value)>, tokens * hidden_size, stream,
                     HiddenAgain{tokens, hidden_size, gates, cells, target});
    });
}

const char* keep_lengths(DataType type, const Steps& steps, int width, const void* values, void* target, void* stream) {
    return with_type(type, [&](auto value) {
        return start(keep_lengths_kernel<decltype(value)>, steps.tokens * width, stream,
                     KeepLengths{steps, width, values, target});
    });
}

int column_pieces(std::int64_t rows) {
    return static_cast<int>(std::min<std::int64_t>(64, std::max<std::int64_t>(1, rows / 64)));
}

const char* column_sums(DataType type, std::int64_t rows, int columns, const void* values, void* scratch, void* target,
                        void* stream) {
    if (columns == 0) return nullptr;
    const Columns call{rows, columns, column_pieces(rows), values, scratch, target};
    return with_type(type, [&](auto value) {
        using T = decltype(value);
        const dim3 grid(static_cast<unsigned>((columns + 31) / 32), static_cast<unsigned>(call.pieces));
        const char* error =
            launch(piece_kernel<T>, grid, dim3(threads), threads * sizeof(typename Wide<T>::type), stream, call);
        return error ? error : start(join_kernel<T>, columns, stream, call);
    });
}

}  // namespace cuda
}  // namespace cellstep
