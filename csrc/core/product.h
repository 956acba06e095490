/// The matrix product of kernels.h for the instruction set that a file is compiled for.
#pragma once

#include "core/kernels.h"
#include "core/simd.h"

namespace cellstep {
namespace core {
namespace CELLSTEP_ISA {

/// Loads and stores of a vector whose last lanes may lie past the end of the row; lanes past it are zero. Without masks
/// a part is cut into halves, each either whole or empty or cut again.
template <class V, class T>
CELLSTEP_INLINE V load_part(const T* source, std::size_t count) {
    constexpr std::size_t lanes = sizeof(V) / sizeof(T);
    if (lanes == 1 || count >= lanes) return load<V>(source);
#if defined(__AVX512VL__)
    const auto mask = static_cast<std::uint16_t>((1u << count) - 1);
    if constexpr (sizeof(T) == 4 && lanes == 16) return bit_cast<V>(_mm512_maskz_loadu_ps(mask, source));
    if constexpr (sizeof(T) == 4 && lanes == 8) return bit_cast<V>(_mm256_maskz_loadu_ps(mask & 255, source));
    if constexpr (sizeof(T) == 4 && lanes == 4) return bit_cast<V>(_mm_maskz_loadu_ps(mask & 255, source));
    if constexpr (sizeof(T) == 8 && lanes == 8) return bit_cast<V>(_mm512_maskz_loadu_pd(mask & 255, source));
#endif
    if constexpr (lanes == 2) {
        V value{};
        if (count) value[0] = source[0];
        return value;
    } else if constexpr (lanes > 2) {
        using Half = Vector<T, static_cast<int>(lanes / 2)>;
        constexpr std::size_t half = lanes / 2;
        const Half high = count > half ? load_part<Half>(source + half, count - half) : Half{};
        return Halves<T, static_cast<int>(lanes)>::join(load_part<Half>(source, count), high);
    }
}

template <class V, class T>
CELLSTEP_INLINE void store_part(T* target, V value, std::size_t count) {
    constexpr std::size_t lanes = sizeof(V) / sizeof(T);
    if (lanes == 1 || count >= lanes) return store(target, value);
#if defined(__AVX512VL__)
    const auto mask = static_cast<std::uint16_t>((1u << count) - 1);
    if constexpr (sizeof(T) == 4 && lanes == 16) return _mm512_mask_storeu_ps(target, mask, bit_cast<__m512>(value));
    if constexpr (sizeof(T) == 4 && lanes == 8)
        return _mm256_mask_storeu_ps(target, mask & 255, bit_cast<__m256>(value));
    if constexpr (sizeof(T) == 4 && lanes == 4) return _mm_mask_storeu_ps(target, mask & 255, bit_cast<__m128>(value));
    if constexpr (sizeof(T) == 8 && lanes == 8)
        return _mm512_mask_storeu_pd(target, mask & 255, bit_cast<__m512d>(value));
#endif
    if constexpr (lanes > 1) {
        constexpr std::size_t half = lanes / 2;
        using Both = Halves<T, static_cast<int>(lanes)>;
        store_part(target, Both::low(value), count);
        if (count > half) store_part(target + half, Both::high(value), count - half);
    }
}

/// A block of Rows by Vectors registers of C stays in registers over the whole depth.
template <class T, int Rows, int Vectors>
inline void product_tile(const Product<T>& p, std::size_t row, std::size_t column) {
    constexpr int lanes = native_lanes<T>;
    using V = Vector<T, lanes>;
    T* c[Rows];
    V sum[Rows][Vectors];
    for (int r = 0; r < Rows; ++r) {
        c[r] = p.c + static_cast<std::ptrdiff_t>(row + r) * p.c_stride + column;
        const T* from = p.start ? p.start + column : c[r];
        for (int v = 0; v < Vectors; ++v) sum[r][v] = load<V>(from + v * lanes);
    }
    const T* b = p.b + column;
    const auto add = [&](const T* values, std::ptrdiff_t row_stride, std::ptrdiff_t depth_stride, std::size_t depth) {
        const T* a[Rows];
        for (int r = 0; r < Rows; ++r) a[r] = values + static_cast<std::ptrdiff_t>(row + r) * row_stride;
        for (std::size_t k = 0; k < depth; ++k, b += p.b_stride) {
            V weight[Vectors];
            for (int v = 0; v < Vectors; ++v) weight[v] = load<V>(b + v * lanes);
            const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(k) * depth_stride;
            for (int r = 0; r < Rows; ++r) {
                const V value = broadcast<V>(a[r][at]);
                for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(value, weight[v], sum[r][v]);
            }
        }
    };
    if (p.first_depth) add(p.first, p.first_stride, 1, p.first_depth);
    add(p.a, p.a_row_stride, p.a_depth_stride, p.depth);
    for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < Vectors; ++v) store(c[r] + v * lanes, sum[r][v]);
}

/// Rows of a tile: with one vector to a row it takes eight of them to hide the latency of the multiply-adds behind.
template <int Vectors>
constexpr int most_rows = Vectors == 1 ? 8 : 6;

template <class T, int Rows, int Vectors>
inline void product_rows(const Product<T>& p, std::size_t rows, std::size_t row, std::size_t column) {
    if (rows == static_cast<std::size_t>(Rows)) return product_tile<T, Rows, Vectors>(p, row, column);
    if constexpr (Rows > 1) product_rows<T, Rows - 1, Vectors>(p, rows, row, column);
}

/// Tiles of even height, as the latency of a low one is hidden behind too few sums.
template <class T, int Vectors>
inline void product_columns(const Product<T>& p, std::size_t column) {
    constexpr std::size_t most = static_cast<std::size_t>(most_rows<Vectors>);
    for (std::size_t row = 0, tiles = (p.rows + most - 1) / most; tiles > 0; --tiles) {
        const std::size_t rows = (p.rows - row + tiles - 1) / tiles;
        product_rows<T, most_rows<Vectors>, Vectors>(p, rows, row, column);
        row += rows;
    }
}

/// The last columns, fewer than a vector: a chunk of B at a time is copied to whole, zero-padded vectors, so that they
/// take the same tile. C is stored between chunks, which changes no bit of the sums.
template <class T>
inline void product_tail(const Product<T>& p, std::size_t column) {
    constexpr std::size_t lanes = static_cast<std::size_t>(native_lanes<T>);
    constexpr std::size_t chunk = 64;
    constexpr std::size_t most = static_cast<std::size_t>(most_rows<1>);
    using V = Vector<T, native_lanes<T>>;
    const std::size_t count = p.columns - column;
    T b[chunk * lanes];
    T c[most * lanes];
    for (std::size_t k = 0; k < p.depth; k += chunk) {
        const std::size_t depth = p.depth - k < chunk ? p.depth - k : chunk;
        for (std::size_t at = 0; at < depth; ++at)
            store(b + at * lanes, load_part<V>(p.b + static_cast<std::ptrdiff_t>(k + at) * p.b_stride + column, count));
        for (std::size_t row = 0; row < p.rows; row += most) {
            const std::size_t rows = p.rows - row < most ? p.rows - row : most;
            T* target = p.c + static_cast<std::ptrdiff_t>(row) * p.c_stride + column;
            for (std::size_t r = 0; r < rows; ++r)
                store(c + r * lanes, load_part<V>(target + static_cast<std::ptrdiff_t>(r) * p.c_stride, count));
            const T* a = p.a + static_cast<std::ptrdiff_t>(row) * p.a_row_stride +
                         static_cast<std::ptrdiff_t>(k) * p.a_depth_stride;
            product_columns<T, 1>({rows, lanes, depth, a, p.a_row_stride, p.a_depth_stride, b, lanes, c, lanes}, 0);
            for (std::size_t r = 0; r < rows; ++r)
                store_part(target + static_cast<std::ptrdiff_t>(r) * p.c_stride, load<V>(c + r * lanes), count);
        }
    }
}

template <class T>
inline void product(const Product<T>& p) CELLSTEP_NONBLOCKING {
    constexpr std::size_t lanes = static_cast<std::size_t>(native_lanes<T>);
    // As many accumulators as the register file holds beside a row of B: 32 registers with AVX-512, else 16.
    constexpr int block = native_bytes == 64 ? 4 : 2;
    std::size_t column = 0;
    if (p.rows == 1) {
        // One row has only its columns to hide the latency of the multiply-adds behind.
        for (; column + 8 * lanes <= p.columns; column += 8 * lanes) product_tile<T, 1, 8>(p, 0, column);
    }
    for (; column + block * lanes <= p.columns; column += block * lanes) product_columns<T, block>(p, column);
    if constexpr (block > 2)
        for (; column + 2 * lanes <= p.columns; column += 2 * lanes) product_columns<T, 2>(p, column);
    for (; column + lanes <= p.columns; column += lanes) product_columns<T, 1>(p, column);
    if (column < p.columns) product_tail(p, column);
}

}  // namespace CELLSTEP_ISA
}  // namespace core
}  // namespace cellstep
