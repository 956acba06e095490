/// The bridge from stable tensors to the core's pointers: checks, allocation, views. Every use of torch's stable ABI
/// outside the registration goes through this header; with CELLSTEP_CUDA it is the bridge to CUDA's tensors, and
/// cuda/tensor.h has what there is to a device beside memory.
#pragma once

#if defined(CELLSTEP_CUDA)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

// The name before torch 2.13.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/layer.h"

namespace cellstep {
namespace ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw std::runtime_error(text.str());
}

inline std::string shape_text(const Tensor& tensor) {
    std::ostringstream text;
    text << "(";
    for (std::int64_t dim = 0; dim < tensor.dim(); ++dim) text << (dim ? ", " : "") << tensor.size(dim);
    text << ")";
    return text.str();
}

#if defined(CELLSTEP_CUDA)
constexpr const char* where = "the CUDA device";
constexpr const char* remedy = ".cuda()";
inline bool is_here(const Tensor& tensor) { return tensor.is_cuda(); }
inline bool is_together(const Tensor& tensor, const Tensor& x) {
    return tensor.is_cuda() && tensor.get_device_index() == x.get_device_index();
}
#else
constexpr const char* where = "the CPU";
constexpr const char* remedy = ".cpu()";
inline bool is_here(const Tensor& tensor) { return tensor.is_cpu(); }
inline bool is_together(const Tensor& tensor, const Tensor&) { return tensor.is_cpu(); }
#endif

inline bool is_float(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Float; }

inline const char* dtype_text(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return "float32";
        case ScalarType::Double:
            return "float64";
        case ScalarType::Half:
            return "float16";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Bool:
            return "bool";
        default:
            return "another type";
    }
}

/// The types that the operators of this library take.
#if defined(CELLSTEP_CUDA) || defined(CELLSTEP_EMULATED)
constexpr const char* types_text = "float32, float64, float16 or bfloat16";
inline bool has_kernels_of(ScalarType type) {
    return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
           type == ScalarType::BFloat16;
}
#else
constexpr const char* types_text = "float32 or float64";
inline bool has_kernels_of(ScalarType type) { return type == ScalarType::Float || type == ScalarType::Double; }
#endif

/// The input that decides dtype and device; `op` names the operator in every error.
inline void check_input(const char* op, const char* name, const Tensor& x, std::int64_t dim) {
    if (!is_here(x)) fail(op, ": expected ", name, " on ", where, ", got another device: move it with ", remedy);
    if (!has_kernels_of(x.scalar_type()))
        fail(op, ": expected ", name, " of ", types_text, ", got ", dtype_text(x), ": convert it with .float()");
    if (x.dim() != dim) fail(op, ": expected ", name, " with ", dim, " dimensions, got shape ", shape_text(x));
}

/// An argument that must match the input's dtype and device and have the sizes that the other arguments imply.
inline void check_argument(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                           std::initializer_list<std::int64_t> sizes) {
    if (!is_together(tensor, x))
        fail(op, ": expected ", name, " on ", where, " like the input, got another device: move it");
    if (tensor.scalar_type() != x.scalar_type())
        fail(op, ": expected ", name, " of ", dtype_text(x), " like the input, got ", dtype_text(tensor),
             ": convert one of them");
    bool fits = tensor.dim() == static_cast<std::int64_t>(sizes.size());
    std::int64_t dim = 0;
    for (const std::int64_t size : sizes) fits = fits && tensor.size(dim++) == size;
    if (fits) return;
    std::ostringstream expected;
    const char* separator = "(";
    for (const std::int64_t size : sizes) {
        expected << separator << size;
        separator = ", ";
    }
    fail(op, ": expected ", name, " of shape ", expected.str(), "), got ", shape_text(tensor),
         ": check the sizes of input, state and weights");
}

/// A tensor of flags where the operator runs, with these sizes, any strides.
inline void check_mask(const char* op, const char* name, const Tensor& mask,
                       std::initializer_list<std::int64_t> sizes) {
    if (!is_here(mask) || mask.scalar_type() != ScalarType::Bool)
        fail(op, ": expected ", name, " as bool on ", where, ", got another type or device: convert it with .bool()");
    check_argument(op, name, mask, mask, sizes);
}

/// Dimensions of a tensor that is allocated here.
constexpr std::size_t max_dims = 8;

/// An uninitialised contiguous tensor of x's dtype, straight from the allocator and past the dispatcher.
inline Tensor empty(const Tensor& x, std::size_t dims, const std::int64_t* sizes) {
    std::int64_t strides[max_dims];
    std::int64_t stride = 1;
    for (std::size_t dim = dims; dim-- > 0;) {
        strides[dim] = stride;
        stride *= sizes[dim] > 0 ? sizes[dim] : 1;
    }
    std::int32_t dtype = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
#if defined(CELLSTEP_CUDA)
    const std::int32_t device = aoti_torch_device_type_cuda(), index = x.get_device_index();
#else
    const std::int32_t device = aoti_torch_device_type_cpu(), index = 0;
#endif
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(static_cast<std::int64_t>(dims), sizes, strides, dtype, device, index, &handle));
    return Tensor(handle);
}

inline Tensor empty(const Tensor& x, std::initializer_list<std::int64_t> sizes) {
    return empty(x, sizes.size(), sizes.begin());
}

inline Tensor zeros(const Tensor& x, std::initializer_list<std::int64_t> sizes) {
#if defined(CELLSTEP_CUDA)
    Tensor tensor = empty(x, sizes);
    torch::stable::zero_(tensor);
#else
    const Tensor tensor = empty(x, sizes);
    std::memset(tensor.mutable_data_ptr(), 0, static_cast<std::size_t>(tensor.numel()) * tensor.element_size());
#endif
    return tensor;
}

/// The tensor itself, or a contiguous copy.
inline Tensor as_contiguous(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

/// A contiguous copy, also of a tensor that is contiguous already.
inline Tensor copy_of(const Tensor& tensor) {
#if defined(CELLSTEP_CUDA)
    return torch::stable::clone(as_contiguous(tensor));
#else
    const std::size_t dims = static_cast<std::size_t>(tensor.dim());
    if (!tensor.is_contiguous() || dims > max_dims) return torch::stable::clone(as_contiguous(tensor));
    std::int64_t sizes[max_dims];
    for (std::size_t dim = 0; dim < dims; ++dim) sizes[dim] = tensor.size(static_cast<std::int64_t>(dim));
    const Tensor copy = empty(tensor, dims, sizes);
    const std::size_t bytes =
        static_cast<std::size_t>(tensor.numel()) * static_cast<std::size_t>(tensor.element_size());
    if (bytes > 0) std::memcpy(copy.mutable_data_ptr(), tensor.const_data_ptr(), bytes);
    return copy;
#endif
}

template <class T>
const T* data(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
core::MatrixView<T> matrix(const Tensor& tensor) {
    return {data<T>(tensor), static_cast<std::ptrdiff_t>(tensor.stride(0)),
            static_cast<std::ptrdiff_t>(tensor.stride(1))};
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
    return tensor ? data<T>(*tensor) : nullptr;
}

/// A view of a tensor's memory, from `offset` values behind its own first on.
inline Tensor view_of(const Tensor& tensor, std::initializer_list<std::int64_t> sizes,
                      std::initializer_list<std::int64_t> strides, std::int64_t offset = 0) {
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<std::int64_t>(sizes.size()),
                                                                 sizes.begin(), strides.begin(), offset, &handle));
    return Tensor(handle);
}

/// A contiguous tensor's values from row `first` on as (rows, columns), without a copy.
inline Tensor rows_of(const Tensor& tensor, std::int64_t first, std::int64_t rows, std::int64_t columns) {
    return view_of(tensor, {rows, columns}, {columns, 1}, first * columns);
}

/// (T, N, K) as (T N, K), copied only where it is not contiguous.
inline Tensor as_rows(const Tensor& tensor) {
    return rows_of(as_contiguous(tensor), 0, tensor.size(0) * tensor.size(1), tensor.size(2));
}

/// The transpose of a contiguous matrix, without a copy.
inline Tensor transposed(const Tensor& tensor) {
    return view_of(tensor, {tensor.size(1), tensor.size(0)}, {1, tensor.size(1)});
}

/// target = start + a b on torch's matrix product; start is as large as target, or a row that is added to each.
inline void multiply_onto(const Tensor& start, const Tensor& a, const Tensor& b, const Tensor& target) {
#if defined(CELLSTEP_CUDA)
    constexpr auto sum = aoti_torch_cuda_addmm_out;
#else
    constexpr auto sum = aoti_torch_cpu_addmm_out;
#endif
    STABLE_TORCH_ERROR_CODE_CHECK(sum(target.get(), start.get(), a.get(), b.get(), 1.0, 1.0));
}

/// target = a b; target += a b if `add`.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& target, bool add = false) {
#if defined(CELLSTEP_CUDA)
    constexpr auto product = aoti_torch_cuda_mm_out;
#else
    constexpr auto product = aoti_torch_cpu_mm_out;
#endif
    if (add) return multiply_onto(target, a, b, target);
    STABLE_TORCH_ERROR_CODE_CHECK(product(target.get(), a.get(), b.get()));
}

inline std::size_t size(const Tensor& tensor, std::int64_t dim) { return static_cast<std::size_t>(tensor.size(dim)); }

struct FreeAligned {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

/// Scratch memory of a call, uninitialised, at a cache line's begin: vectors that lie across two lines take twice as
/// long.
template <class T>
std::unique_ptr<T[], FreeAligned> scratch(std::size_t count) {
    return std::unique_ptr<T[], FreeAligned>(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))));
}

}  // namespace ops
}  // namespace cellstep
