#include "ops/operators.h"

namespace cellstep {
namespace ops {

namespace {

template <class T>
void forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& y) {
    const std::size_t inputs = size(weight, 1);
    const std::size_t outputs = size(weight, 0);
    const auto packed = scratch<T>((1 + inputs) * outputs);
    core::pack_dense<T>(inputs, outputs, matrix<T>(weight), bias ? data<T>(*bias) : nullptr, packed.get());
    core::dense_forward<T>(size(x, 0), inputs, outputs, packed.get(), data<T>(x), static_cast<std::ptrdiff_t>(inputs),
                           mutable_data<T>(y), static_cast<std::ptrdiff_t>(outputs));
}

}  // namespace

Tensor dense(Tensor x, Tensor weight, std::optional<Tensor> bias) {
    const char* op = "dense";
    const std::int64_t dims = x.dim();
    if (dims == 0) fail(op, ": expected x with at least one dimension, got a scalar");
    check_input(op, "x", x, dims);
    check_input(op, "weight", weight, 2);
    const std::int64_t inputs = x.size(dims - 1);
    const std::int64_t outputs = weight.size(0);
    check_argument(op, "weight", weight, x, {outputs, inputs});
    if (bias) {
        check_argument(op, "bias", *bias, x, {outputs});
        bias = as_contiguous(*bias);
    }
    std::int64_t rows = 1;
    std::vector<std::int64_t> shape;
    for (std::int64_t dim = 0; dim + 1 < dims; ++dim) {
        rows *= x.size(dim);
        shape.push_back(x.size(dim));
    }
    shape.push_back(outputs);
    const Tensor y = empty(x, {rows, outputs});
    const auto kernel = is_float(x) ? forward<float> : forward<double>;
    kernel(torch::stable::view(as_contiguous(x), {rows, inputs}), weight, bias, y);
    return dims == 2 ? y : torch::stable::view(y, shape);
}

}  // namespace ops
}  // namespace cellstep
