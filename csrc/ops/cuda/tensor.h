/// What the operators of this directory need of torch beside csrc/ops/tensor.h: the device, its stream, and one line
/// for what the driver says.
#pragma once

#include <optional>

#include "kernels.h"
#include "ops/tensor.h"
#include "pointwise.h"
#include "streams.h"
#if defined(CELLSTEP_CUDA)
#include <torch/csrc/stable/accelerator.h>
#endif

namespace cellstep {
namespace cuda {

using ops::Tensor;
using Maybe = std::optional<Tensor>;

/// While it lives, the device of a tensor is the current one.
class Device {
public:
#if defined(CELLSTEP_CUDA)
    explicit Device(const Tensor& x) : index_(x.get_device_index()), guard_(index_) {
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
    }
#else
    explicit Device(const Tensor&) {}
#endif

    void* stream() const { return stream_; }

    /// As stream_beside(), of this stream.
    const char* beside(int number, void** found) const { return stream_beside(index_, stream_, number, found); }

    /// Counted once a device.
    int multiprocessors() const { return cuda::multiprocessors(index_); }

private:
    std::int32_t index_ = 0;
    void* stream_ = nullptr;
#if defined(CELLSTEP_CUDA)
    torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline DataType data_type(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ops::ScalarType::Double:
            return DataType::float64;
        case ops::ScalarType::Half:
            return DataType::float16;
        case ops::ScalarType::BFloat16:
            return DataType::bfloat16;
        default:
            return DataType::float32;
    }
}

/// An uninitialised contiguous tensor of another type, on x's device.
inline Tensor empty_of(ops::ScalarType type, const Tensor& x, std::initializer_list<std::int64_t> sizes) {
    return torch::stable::new_empty(x, sizes, type);
}

/// Answers what a launch says.
inline void check_launch(const char* op, const char* error) {
    if (error) ops::fail(op, ": expected the launch of a kernel to succeed, got: ", error, ": see the driver's log");
}

/// A tensor's memory, or null where there is none.
inline const void* data_of(const Maybe& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
inline void* memory_of(const Maybe& tensor) { return tensor ? tensor->mutable_data_ptr() : nullptr; }

/// A weight (4 H, K) with any strides, or a bias (4 H).
inline WeightView weight_view_of(const Tensor& weight, std::int64_t hidden_size) {
    const std::int64_t unit = weight.stride(0);
    return {weight.const_data_ptr(), hidden_size * unit, 16 * unit, unit, weight.dim() == 2 ? weight.stride(1) : 1};
}

inline WeightView weight_view_of(const Maybe& weight, std::int64_t hidden_size) {
    return weight ? weight_view_of(*weight, hidden_size) : WeightView{};
}

}  // namespace cuda
}  // namespace cellstep
