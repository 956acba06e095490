#include "activations.h"

namespace cellstep {
namespace cuda {

namespace {

constexpr int threads = 128;
constexpr int rows_of_thread = 4;
constexpr int most_groups = 32;  // of threads that share rows
constexpr int chunk = 32;        // inputs that lie in shared memory at once

/// How a block of dense rows is shared: `width` threads for as many outputs, `groups` of them, each with rows of its
/// own, so that a layer of a few outputs keeps the threads busy.
struct Tile {
    int width;
    int groups;
    __host__ __device__ int rows() const { return groups * rows_of_thread; }
};

__host__ __device__ Tile tile_of(std::int64_t outputs) {
    int width = 1;
    while (width < outputs && width < threads) width *= 2;
    const int groups = threads / width;
    return {width, groups < most_groups ? groups : most_groups};
}

/// The step and the row of the batch of row `at`, and the step of x that it answers; -1: none, the answer is zero.
struct Place {
    std::int64_t step;
    std::int64_t row;
    std::int64_t source;
};

template <class T>
__device__ Place place_of(const DenseRows<T>& d, std::int64_t at) {
    Place place{at / d.batch, at % d.batch, 0};
    place.source = d.steps > 1 ? place.step : d.last_step;
    if (!d.lengths) return place;
    const std::int64_t length = d.lengths[place.row];
    if (d.steps == 1 && length <= d.last_step)
        place.source = length - 1;
    else if (d.steps > 1 && place.step >= length)
        place.source = -1;
    return place;
}

template <class T>
__device__ T input_of(const DenseRows<T>& d, const Place& place, std::int64_t k) {
    if (place.source < 0) return T(0);
    const T x =
        d.x.data[place.source * d.x.step + place.row * d.x.row + k / d.part * d.part_stride + k % d.part * d.feature];
    return d.scaling ? (x - d.scaling[k]) * d.scaling[d.inputs + k] : x;
}

template <class T>
__device__ void write_output(const DenseRows<T>& d, const Place& place, std::int64_t k, T value) {
    if (d.output_scaling) value = value * d.output_scaling[d.outputs + k] + d.output_scaling[k];
    if (d.columns) {
        // The columns are the image's own words, which nobody on the host has seen.
        const std::int64_t column = d.columns[k];
        value +=
            column < d.skipped_columns && place.source >= 0
                ? d.skipped.data[place.source * d.skipped.step + place.row * d.skipped.row + column * d.skipped_feature]
                : static_cast<T>(NAN);
    }
    d.y.data[place.step * d.y.step + place.row * d.y.row + k] = place.source < 0 ? T(0) : value;
}

/// The rows of one block; `memory` as dense_bytes counts it.
template <class T>
__device__ void dense_block(const DenseRows<T>& d, std::int64_t block, std::int64_t column, std::int64_t columns,
                            T* memory) {
    const Tile tile = tile_of(d.outputs);
    const std::int64_t first = block * tile.rows(), count = d.batch * d.steps;
    const int thread = static_cast<int>(threadIdx.x);
    if (!d.weights) {
        for (std::int64_t at = thread; at < tile.rows() * d.outputs; at += threads) {
            const std::int64_t row = first + at / d.outputs, k = at % d.outputs;
            if (row >= count) break;
            const Place place = place_of(d, row);
            write_output(d, place, k, input_of(d, place, k));
        }
        return;
    }
    const bool softmax = d.activation == Activation::softmax;
    const int group = thread / tile.width;
    for (std::int64_t begin = column * tile.width; begin < d.outputs; begin += columns * tile.width) {
        const std::int64_t output = begin + thread % tile.width;
        const bool mine = group < tile.groups && output < d.outputs;
        T sums[rows_of_thread];
        for (int r = 0; r < rows_of_thread; ++r) sums[r] = mine ? d.weights[output] : T(0);
        for (std::int64_t from = 0; from < d.inputs; from += chunk) {
            const int depth = static_cast<int>(d.inputs - from < chunk ? d.inputs - from : chunk);
            block_sync();
            for (int at = thread; at < tile.rows() * depth; at += threads) {
                const std::int64_t row = first + at / depth;
                memory[at / depth * (chunk + 1) + at % depth] =
                    row < count ? input_of(d, place_of(d, row), from + at % depth) : T(0);
            }
            block_sync();
            if (!mine) continue;
            const T* x = memory + group * rows_of_thread * (chunk + 1);
            for (int k = 0; k < depth; ++k) {
                const T weight = d.weights[(1 + from + k) * d.outputs + output];
                for (int r = 0; r < rows_of_thread; ++r) sums[r] += x[r * (chunk + 1) + k] * weight;
            }
        }
        for (int r = 0; r < rows_of_thread && mine; ++r) {
            const std::int64_t row = first + group * rows_of_thread + r;
            if (row >= count) break;
            const Place place = place_of(d, row);
            if (softmax)
                d.y.data[place.step * d.y.step + place.row * d.y.row + output] = sums[r];
            else
                write_output(d, place, output, activated(d.activation, sums[r]));
        }
    }
    if (!softmax) return;
    block_sync();
    for (std::int64_t row = first; row < first + tile.rows() && row < count; ++row) {
        const Place place = place_of(d, row);
        const T* y = d.y.data + place.step * d.y.step + place.row * d.y.row;
        T largest = y[0];
        for (std::int64_t k = thread; k < d.outputs; k += threads) largest = Larger{}(largest, y[k]);
        largest = block_combine(largest, memory, Larger{});
        T sum = 0;
        for (std::int64_t k = thread; k < d.outputs; k += threads) sum += exp_of(y[k] - largest);
        sum = block_combine(sum, memory, Add{});
        for (std::int64_t k = thread; k < d.outputs; k += threads)
            write_output(d, place, k, exp_of(y[k] - largest) / sum);
    }
}

/// Blocks of dense rows, and how many share the outputs of the same rows.
struct Blocks {
    std::int64_t rows;
    std::int64_t columns;
};

template <class T>
Blocks dense_blocks(const DenseRows<T>& d) {
    const Tile tile = tile_of(d.outputs);
    const std::int64_t count = d.batch * d.steps;
    const bool whole = !d.weights || d.activation == Activation::softmax;
    const std::int64_t columns = whole ? 1 : (d.outputs + tile.width - 1) / tile.width;
    return {(count + tile.rows() - 1) / tile.rows(), columns < 1024 ? columns : 1024};
}

/// A 16-bit or full weight as T.
template <class T>
__device__ T stored_weight(Stored stored, const unsigned char* weights, std::int64_t at) {
    if (stored == Stored::full) return reinterpret_cast<const T*>(weights)[at];
    if (stored == Stored::bfloat16) return to_float(reinterpret_cast<const __nv_bfloat16*>(weights)[at]);
    return to_float(reinterpret_cast<const __half*>(weights)[at]);
}

/// Value of input k of a unit's gate, k = -1 for the bias; those of hidden values lie behind the I inputs.
template <class T>
__device__ T packed_value(const Unpack<T>& u, int gate, std::int64_t unit, std::int64_t k) {
    // Panels of 16 units, then where need be one of 8 and one of 4.
    const std::int64_t full = (u.hidden_size + 3) / 16 * 16;
    const std::int64_t middle = u.hidden_size - full > 4 ? 8 : 0;
    const std::int64_t first = unit < full ? unit / 16 * 16 : unit < full + middle ? full : full + middle;
    const std::int64_t width = unit < full ? 16 : unit < full + middle ? 8 : 4;
    const std::int64_t column = gate * width + (unit - first);
    const std::int64_t depth = u.input_size + u.recurrent_size;
    if (u.stored != Stored::int8) {
        const std::int64_t value = u.stored == Stored::full ? sizeof(T) : 2;
        const unsigned char* panel = u.packed + 4 * first * (static_cast<std::int64_t>(sizeof(T)) + depth * value);
        if (k < 0) return reinterpret_cast<const T*>(panel)[column];
        return stored_weight<T>(u.stored, panel + 4 * width * static_cast<std::int64_t>(sizeof(T)),
                                k * 4 * width + column);
    }
    const std::int64_t groups = (u.input_size + 3) / 4, hidden_groups = (u.recurrent_size + 3) / 4;
    const unsigned char* panel =
        u.packed + (u.input_size + 15) / 16 * 64 + 4 * first * 4 * (5 + groups + hidden_groups);
    const float* head = reinterpret_cast<const float*>(panel);
    if (k < 0) return head[column];
    const bool hidden = k >= u.input_size;
    const std::int64_t at = hidden ? k - u.input_size : k;
    const signed char* weights = reinterpret_cast<const signed char*>(panel) +
                                 4 * 4 * width * (5 + (hidden ? groups : 0) + at / 4) + 4 * column + at % 4;
    const float scale = head[(hidden ? 2 : 1) * 4 * width + column];
    const float factor = hidden ? 1.0f : reinterpret_cast<const float*>(u.packed)[at];
    return static_cast<float>(*weights) * scale * factor;
}

template <class T>
__device__ void unpack_values(const Unpack<T>& u, std::int64_t first, std::int64_t step) {
    const std::int64_t depth = 1 + u.input_size + u.recurrent_size;
    const std::int64_t weights = (u.coupled ? 3 : 4) * u.hidden_size * depth;
    const std::int64_t projection = u.projection ? u.hidden_size * u.recurrent_size : 0;
    for (std::int64_t at = first; at < weights + projection; at += step) {
        const std::int64_t rest = at - weights;
        if (rest < 0) {
            const std::int64_t row = at / depth, k = at % depth - 1;
            const int place = static_cast<int>(row / u.hidden_size);
            const T value = packed_value(u, u.coupled && place > 0 ? place + 1 : place, row % u.hidden_size, k);
            if (k < 0) {
                u.bias[row] = value;
            } else if (k < u.input_size) {
                u.weight_ih[row * u.input_size + k] = value;
            } else {
                u.weight_hh[row * u.recurrent_size + k - u.input_size] = value;
            }
        } else {
            u.weight_hr[rest] = u.projection[rest % u.hidden_size * u.recurrent_size + rest / u.hidden_size];
        }
    }
}

constexpr std::int64_t unpack_blocks = 64;  // of each direction

template <class T>
struct PrepareArgument {
    Prepare<T> call;
    Blocks dense;
};

/// The blocks of the dense rows come first, then some for each direction that is unpacked.
template <class T>
__global__ void prepare_kernel(const PrepareArgument<T> argument) {
    const std::int64_t dense = argument.dense.rows * argument.dense.columns;
    const std::int64_t block = blockIdx.x;
    if (block < dense) {
        dense_block(argument.call.rows, block / argument.dense.columns, block % argument.dense.columns,
                    argument.dense.columns, reinterpret_cast<T*>(shared_memory()));
        return;
    }
    const std::int64_t share = (block - dense) % unpack_blocks;
    unpack_values(argument.call.unpack[(block - dense) / unpack_blocks], share * threads + threadIdx.x,
                  unpack_blocks * threads);
}

template <class T>
__global__ void copy_kernel(const CopyStates<T> call) {
    const StateRows<T>& s = call.states[blockIdx.y];
    for (std::int64_t at = std::int64_t{blockIdx.x} * threads + threadIdx.x; at < call.batch * s.width;
         at += std::int64_t{gridDim.x} * threads) {
        const std::int64_t row = at / s.width, k = at % s.width;
        s.to[row * s.to_row + k] = s.from ? s.from[row * s.from_row + k] : T(0);
    }
}

template <class T>
__global__ void add_kernel(const AddRows<T> call) {
    const std::int64_t count = call.steps * call.batch * call.width;
    for (std::int64_t at = std::int64_t{blockIdx.x} * threads + threadIdx.x; at < count;
         at += std::int64_t{gridDim.x} * threads) {
        const std::int64_t row = at / call.width;
        call.y.data[row / call.batch * call.y.step + row % call.batch * call.y.row + at % call.width] += call.x[at];
    }
}

unsigned blocks_of(std::int64_t count) {
    const std::int64_t wanted = (count + threads - 1) / threads;
    return static_cast<unsigned>(wanted < 1 ? 1 : wanted < 65535 ? wanted : 65535);
}

}  // namespace

template <class T>
const char* prepare(const Prepare<T>& call, void* stream) {
    PrepareArgument<T> argument{call, {0, 1}};
    if (call.rows.batch > 0) argument.dense = dense_blocks(call.rows);
    const std::int64_t blocks = argument.dense.rows * argument.dense.columns + call.unpacks * unpack_blocks;
    if (blocks == 0) return nullptr;
    if (blocks > 0x7fffffff) return "more rows than one launch takes: run them in parts";
    const std::size_t tile = static_cast<std::size_t>(most_groups * rows_of_thread * (chunk + 1));
    const bool dense = call.rows.batch > 0 && call.rows.weights;
    return launch(prepare_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(threads), dense ? tile * sizeof(T) : 0,
                  stream, argument);
}

template <class T>
const char* copy_states(const CopyStates<T>& call, void* stream) {
    if (call.batch == 0 || call.count == 0) return nullptr;
    std::int64_t widest = 0;
    for (int at = 0; at < call.count; ++at) widest = call.states[at].width > widest ? call.states[at].width : widest;
    return launch(copy_kernel<T>, dim3(blocks_of(call.batch * widest), static_cast<unsigned>(call.count)),
                  dim3(threads), 0, stream, call);
}

template <class T>
const char* add_rows(const AddRows<T>& call, void* stream) {
    if (call.batch == 0 || call.steps == 0) return nullptr;
    return launch(add_kernel<T>, dim3(blocks_of(call.steps * call.batch * call.width)), dim3(threads), 0, stream, call);
}

#define CELLSTEP_INSTANTIATE(T)                                       \
    template const char* prepare<T>(const Prepare<T>&, void*);        \
    template const char* copy_states<T>(const CopyStates<T>&, void*); \
    template const char* add_rows<T>(const AddRows<T>&, void*);
CELLSTEP_INSTANTIATE(float)
CELLSTEP_INSTANTIATE(double)
#undef CELLSTEP_INSTANTIATE

}  // namespace cuda
}  // namespace cellstep
