/// What the kernels on tensor cores share: float16 and bfloat16, sums in float32.
///
/// Products are mma.m16n8k16: the weights are the (16, 16) operand, 8 rows of the batch the (16, 8) one, so that a step
/// of 8 rows costs what one row would. Which weight stands for which k of the product is free as long as both operands
/// agree, and is chosen so that a lane's part of 32 consecutive values (a "k-block", two products) is 16 consecutive
/// bytes: value 8 q + j of a block, q the lane's number modulo 4.
#pragma once

#include "carried.h"

namespace cellstep {
namespace cuda {

constexpr int most_passes = 4;  // of 8 rows each
constexpr int arrays_at = 128;  // in shared memory, behind the lengths of the rows
constexpr int header_bytes = 256;
constexpr int block_bytes = 64;   // of a k-block in a row of values
constexpr int slot_bytes = 2048;  // of the weights of a k-block for 32 rows of the product: 4 fragments

template <class Word>
__device__ inline Word read(const void* from) {
    Word word;
    memcpy(&word, __builtin_assume_aligned(from, sizeof(Word)), sizeof(Word));
    return word;
}

template <class Word>
__device__ inline void write(void* to, const Word& word) {
    memcpy(__builtin_assume_aligned(to, sizeof(Word)), &word, sizeof(Word));
}

template <class T>
__device__ inline std::uint32_t pair_of(T low, T high) {
    std::uint16_t bits[2];
    memcpy(&bits[0], &low, 2);
    memcpy(&bits[1], &high, 2);
    return bits[0] | static_cast<std::uint32_t>(bits[1]) << 16;
}

template <class T>
__device__ inline T from_bits(std::uint32_t bits) {
    const auto low = static_cast<std::uint16_t>(bits);
    T value;
    memcpy(&value, &low, 2);
    return value;
}

template <class T>
__device__ inline T at_or_zero(const void* data, std::int64_t place) {
    return data ? static_cast<const T*>(data)[place] : from_float<T>(0.0f);
}

/// Rows of values in shared memory are an odd number of k-blocks apart, and chunks of 16 bytes change places by row:
/// then the 8 lanes of two rows that read together, and the 4 rows of one chunk that are written together, meet
/// different banks.
constexpr int row_bytes(int blocks) { return (blocks | 1) * block_bytes; }
__device__ inline int chunk_of(int chunk, int row) { return chunk ^ (row >> 1 & 3); }

/// A lane's part of block `block` for the rows of one pass, behind `values_place`.
__device__ inline int values_place(int lane, int stride) {
    return lane / 4 * stride + chunk_of(lane % 4, lane / 4) * 16;
}

template <int N>
struct Number {
    static constexpr int value = N;
};

/// Calls with Number<0>() to Number<Count - 1>().
template <int Count, class Function>
__device__ inline void each(const Function& function) {
    if constexpr (Count > 0) {
        each<Count - 1>(function);
        function(Number<Count - 1>());
    }
}

/// The fragments of two products of 16 for two tiles of 16 rows: [tile][product][word].
using Fragments = std::uint32_t[2][2][4];

/// Two products of 16 for each tile; the two have sums of their own, which shortens the chain.
template <class T>
__device__ inline void multiply_block(float (&sums)[2][2][4], const Fragments& weights, const uint4& values) {
    const std::uint32_t first[2] = {values.x, values.y}, second[2] = {values.z, values.w};
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) multiply_add(sums[0][tile], weights[tile][0], first, T());
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) multiply_add(sums[1][tile], weights[tile][1], second, T());
}

__device__ inline void read_fragments(Fragments& weights, const unsigned char* slot, int lane) {
#pragma unroll
    for (int at = 0; at < 4; ++at) {
        const uint4 word = read<uint4>(slot + at * 512 + lane * 16);
        weights[at / 2][at % 2][0] = word.x;
        weights[at / 2][at % 2][1] = word.y;
        weights[at / 2][at % 2][2] = word.z;
        weights[at / 2][at % 2][3] = word.w;
    }
}

__device__ inline void write_fragments(const Fragments& weights, unsigned char* slot, int lane) {
#pragma unroll
    for (int at = 0; at < 4; ++at) {
        const auto& word = weights[at / 2][at % 2];
        write(slot + at * 512 + lane * 16, make_uint4(word[0], word[1], word[2], word[3]));
    }
}

/// What both sweeps know of a tile of rows.
struct Tile {
    const Steps& steps;
    int first;     // row
    int rows;      // with those that do not exist, of length 0
    int* lengths;  // shared, (rows)

    __device__ int token(int step) const { return steps.offsets ? steps.offsets[step] : step * steps.batch; }
    __device__ bool reset(int step, int row) const {
        return steps.reset[static_cast<std::int64_t>(step) * steps.batch + first + row] != 0;
    }
    __device__ int length_of(int row) const {
        const int n = first + row;
        if (n >= steps.batch) return 0;
        if (!steps.offsets) return steps.lengths ? steps.lengths[n] : steps.steps;
        int low = 0, high = steps.steps;  // the first step with n rows or fewer
        while (low < high) {
            const int middle = (low + high) / 2;
            const std::int64_t end = middle + 1 < steps.steps ? steps.offsets[middle + 1] : steps.tokens;
            if (end - steps.offsets[middle] > n)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }
    /// Writes the lengths; the longest. The block meets.
    __device__ int longest() const {
        for (int row = static_cast<int>(threadIdx.x); row < rows; row += static_cast<int>(blockDim.x))
            lengths[row] = length_of(row);
        block_sync();
        int most = 0;
        for (int row = 0; row < rows; ++row) most = max(most, lengths[row]);
        return most;
    }
};

__device__ inline void clear(unsigned char* from, int bytes) {
    for (int at = static_cast<int>(threadIdx.x) * 16; at < bytes; at += static_cast<int>(blockDim.x) * 16)
        write(from + at, make_uint4(0, 0, 0, 0));
}

/// `width` values for each of `directions` parts of `array` (parts, P, width) or, side by side, of (P, parts * width).
template <class T>
__device__ inline void clear_past(T* array, const Tile& tile, int longest, int width, std::int64_t stride) {
    if (!array) return;
    for (int step = longest; step < tile.steps.steps; ++step)
        for (int row = 0; row < tile.rows && tile.first + row < tile.steps.batch; ++row)
            for (int at = static_cast<int>(threadIdx.x); at < width; at += static_cast<int>(blockDim.x))
                array[(static_cast<std::int64_t>(step) * tile.steps.batch + tile.first + row) * stride + at] =
                    from_float<T>(0.0f);
}

/// Limits an exponent to where products of three such powers stay finite; NaN passes.
__device__ inline float power_of(float x) { return exp2_approx(x > 40.0f ? 40.0f : x); }

/// Gate sums a become gates, c and h the new state. float16: gates and tanh to about 1e-7; the gates share one
/// reciprocal, as the special function unit is what a step waits for.
__device__ inline void update(float (&a)[4], float& c, float& h, __half) {
    constexpr float log2_e = 1.44269504f;
    const float i = 1.0f + power_of(-log2_e * a[0]);
    const float f = 1.0f + power_of(-log2_e * a[1]);
    const float power = power_of(2.0f * log2_e * a[2]);
    const float g = power + 1.0f;
    const float r = reciprocal_approx(i * f * g);
    a[0] = f * g * r;
    a[1] = i * g * r;
    a[2] = (power - 1.0f) * (i * f * r);
    c = a[1] * c + a[0] * a[2];
    const float o = 1.0f + power_of(-log2_e * a[3]);
    const float cell_power = power_of(2.0f * log2_e * c);
    const float s = reciprocal_approx(o * (cell_power + 1.0f));
    a[3] = (cell_power + 1.0f) * s;
    h = (cell_power - 1.0f) * s;
}

/// bfloat16: by tanh.approx, whose 2^-11 is below the rounding of the type.
__device__ inline float sigmoid_by_tanh(float x) { return 0.5f + 0.5f * tanh_approx(0.5f * x); }
__device__ inline void update(float (&a)[4], float& c, float& h, __nv_bfloat16) {
    a[0] = sigmoid_by_tanh(a[0]);
    a[1] = sigmoid_by_tanh(a[1]);
    a[2] = tanh_approx(a[2]);
    a[3] = sigmoid_by_tanh(a[3]);
    c = a[1] * c + a[0] * a[2];
    h = a[3] * tanh_approx(c);
}

/// Eight weights from column `k` of one row, zeros outside.
template <class T>
__device__ inline void eight_weights(std::uint32_t (&words)[4], const WeightView& view, int gate, int unit, int units,
                                     int k, int columns) {
#pragma unroll
    for (int at = 0; at < 4; ++at) words[at] = 0;
    if (unit >= units || k >= columns) return;
    const T* row = static_cast<const T*>(view.data) + gate * view.gate + unit / 16 * view.panel +
                   unit % 16 * view.unit + k * view.column;
    if (view.column == 1 && k + 8 <= columns && reinterpret_cast<std::uintptr_t>(row) % 16 == 0) {
        const uint4 word = read<uint4>(row);
        words[0] = word.x;
        words[1] = word.y;
        words[2] = word.z;
        words[3] = word.w;
        return;
    }
    const T zero = from_float<T>(0.0f);
#pragma unroll
    for (int at = 0; at < 4; ++at)
        words[at] = pair_of(k + 2 * at < columns ? row[2 * at * view.column] : zero,
                            k + 2 * at + 1 < columns ? row[(2 * at + 1) * view.column] : zero);
}

/// The weights of a group for one k-block.
template <class T>
__device__ inline void load_fragments(Fragments& weights, const WeightView& view, int group, int units, int block,
                                      int columns, int lane) {
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
        std::uint32_t words[4];
        eight_weights<T>(words, view, gate, group * 8 + lane / 4, units, block * 32 + lane % 4 * 8, columns);
#pragma unroll
        for (int at = 0; at < 4; ++at) weights[gate / 2][at / 2][gate % 2 + at % 2 * 2] = words[at];
    }
}

/// dgates x weights: fragments of one tile of 16 columns and 64 values of k, which is 4 unit + gate:
/// [k-block][product][word].
template <class T>
__device__ inline void multiply_pair(float (&sums)[2][2][4], const Fragments& weights, const uint4& low,
                                     const uint4& high) {
    const std::uint32_t values[2][2][2] = {{{low.x, low.y}, {low.z, low.w}}, {{high.x, high.y}, {high.z, high.w}}};
#pragma unroll
    for (int product = 0; product < 2; ++product)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            multiply_add(sums[product][half], weights[half][product], values[half][product], T());
}

template <class T>
__device__ inline void load_transposed(Fragments& weights, const WeightView& view, int tile, int pair, int units,
                                       int lane) {
    const T* const data = static_cast<const T*>(view.data);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int product = 0; product < 2; ++product)
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                const int column = tile * 16 + lane / 4 + word % 2 * 8;
                const int unit = pair * 16 + half * 8 + lane % 4 * 2 + product, gate = word / 2 * 2;
                std::uint32_t found = 0;
                if (column < units && unit < units) {
                    const T* from =
                        data + gate * view.gate + unit / 16 * view.panel + unit % 16 * view.unit + column * view.column;
                    found = pair_of(from[0], from[view.gate]);
                }
                weights[half][product][word] = found;
            }
}

__device__ inline float tanh_for(float x, __half) { return tanh_of(x); }
__device__ inline float tanh_for(float x, __nv_bfloat16) { return tanh_approx(x); }

/// Where the arrays of a sweep back begin, kept in shared memory: registers are for weights.
template <class T>
struct BackwardArrays {
    const T* gates;
    const T* cells;
    const T* c;
    const T* grad_outputs;  // null, as grad_cells
    const T* grad_cells;
    T* grad_sums;
};

inline bool is_half(DataType type) { return type == DataType::float16 || type == DataType::bfloat16; }

}  // namespace cuda
}  // namespace cellstep
