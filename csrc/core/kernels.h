/// The loops that depend on the instruction set, behind a table of function pointers.
#pragma once

#include <cstddef>

namespace cellstep {
namespace core {

/// C[m, n] += A[m, k] B[k, n], each element one chain of multiply-adds in order of k.
/// A is read through its strides; the rows of B and C are contiguous.
template <class T>
struct Product {
    std::size_t rows;     ///< m
    std::size_t columns;  ///< n
    std::size_t depth;    ///< k
    const T* a;
    std::ptrdiff_t a_row_stride;
    std::ptrdiff_t a_depth_stride;
    const T* b;
    std::ptrdiff_t b_stride;
    T* c;
    std::ptrdiff_t c_stride;
};

/// The recurrence of one layer over `steps` steps, once the input projection lies in `sums`.
template <class T>
struct Sweep {
    std::size_t steps;
    std::size_t batch;
    std::size_t input_size;
    std::size_t hidden_size;
    const T* packed;  ///< the layer in the layout of pack.h
    T* sums;          ///< for each panel (steps * batch, 4 width): bias and input part; overwritten
    const T* h;       ///< state before the first step, row stride h_stride
    std::ptrdiff_t h_stride;
    T* c;  ///< (batch, hidden_size), updated in place
    T* y;  ///< (steps, batch, hidden_size), the h of every step
    std::ptrdiff_t y_step_stride;
    std::ptrdiff_t y_row_stride;
    T* gates;  ///< null, or (steps, batch, 4 hidden_size): activated i, f, g, o
    T* cells;  ///< null, or (steps, batch, hidden_size): the c of every step
};

/// One step back through gates and state, element by element.
template <class T>
struct StepBackward {
    std::size_t batch;
    std::size_t hidden_size;
    const T* gates;      ///< (batch, 4 hidden_size), as saved
    const T* cell;       ///< (batch, hidden_size), c after the step
    const T* cell_prev;  ///< (batch, hidden_size), c before the step
    const T* grad_h;     ///< (batch, hidden_size)
    T* grad_c;           ///< (batch, hidden_size): in for c after the step, out for c before it
    T* grad_gates;       ///< (batch, 4 hidden_size): out, for the sums before the activations
};

template <class T>
struct Kernels {
    void (*product)(const Product<T>&);
    void (*sweep)(const Sweep<T>&);
    void (*step_backward)(const StepBackward<T>&);
};

/// The kernels of the best instruction set that this machine has, chosen at the first call. The environment
/// variable CELLSTEP_CPU (baseline, avx2 or avx512) lowers the choice; what the machine lacks is never chosen.
template <class T>
const Kernels<T>& kernels();

/// Name of the instruction set in use: "baseline", "avx2" or "avx512" on x86-64, else "native".
const char* instruction_set();

}  // namespace core
}  // namespace cellstep
