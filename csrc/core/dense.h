/// A dense layer for the instruction set that a file is compiled for.
#pragma once

#include <cstring>

#include "core/kernels.h"
#include "core/product.h"
#include "core/simd.h"

namespace cellstep {
namespace core {
namespace CELLSTEP_ISA {

/// One output of Rows rows from `row` on: a row is one chain, so that several rows hide its latency.
template <class T, int Rows>
inline void dense_output(const Dense<T>& d, std::size_t row, std::size_t output) {
    const T* x[Rows];
    T sum[Rows];
    for (int r = 0; r < Rows; ++r) {
        x[r] = d.x + static_cast<std::ptrdiff_t>(row + static_cast<std::size_t>(r)) * d.x_stride;
        sum[r] = d.packed[output];
    }
    const T* weight = d.packed + d.outputs + output;
    for (std::size_t k = 0; k < d.inputs; ++k, weight += d.outputs)
        for (int r = 0; r < Rows; ++r) sum[r] = fma(x[r][k], *weight, sum[r]);
    for (int r = 0; r < Rows; ++r)
        d.y[static_cast<std::ptrdiff_t>(row + static_cast<std::size_t>(r)) * d.y_stride +
            static_cast<std::ptrdiff_t>(output)] = sum[r];
}

/// With a few outputs, as most heads have, a vector of them would be mostly padding.
template <class T>
inline void dense(const Dense<T>& d) CELLSTEP_NONBLOCKING {
    constexpr std::size_t few = 4;
    if (d.outputs > few) {
        for (std::size_t row = 0; row < d.rows; ++row)
            std::memcpy(d.y + static_cast<std::ptrdiff_t>(row) * d.y_stride, d.packed, d.outputs * sizeof(T));
        return product<T>({d.rows, d.outputs, d.inputs, d.x, d.x_stride, 1, d.packed + d.outputs,
                           static_cast<std::ptrdiff_t>(d.outputs), d.y, d.y_stride});
    }
    for (std::size_t output = 0; output < d.outputs; ++output) {
        std::size_t row = 0;
        for (; row + 8 <= d.rows; row += 8) dense_output<T, 8>(d, row, output);
        for (; row < d.rows; ++row) dense_output<T, 1>(d, row, output);
    }
}

}  // namespace CELLSTEP_ISA
}  // namespace core
}  // namespace cellstep
