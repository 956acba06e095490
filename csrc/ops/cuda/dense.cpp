#include "operators.h"

namespace cellstep {
namespace cuda {

using namespace ops;

Tensor dense(Tensor x, Tensor weight, Maybe bias) {
    const char* op = "dense";
    const std::int64_t dims = x.dim();
    if (dims == 0) fail(op, ": expected x with at least one dimension, got a scalar");
    check_input(op, "x", x, dims);
    check_input(op, "weight", weight, 2);
    const std::int64_t inputs = x.size(dims - 1);
    const std::int64_t outputs = weight.size(0);
    check_argument(op, "weight", weight, x, {outputs, inputs});
    if (bias) check_argument(op, "bias", *bias, x, {outputs});
    std::int64_t rows = 1;
    std::vector<std::int64_t> shape;
    for (std::int64_t dim = 0; dim + 1 < dims; ++dim) {
        rows *= x.size(dim);
        shape.push_back(x.size(dim));
    }
    shape.push_back(outputs);
    const Device device(x);
    const Tensor y = empty(x, {rows, outputs});
    const Tensor x_rows = rows_of(as_contiguous(x), 0, rows, inputs);
    const Tensor turned = torch::stable::transpose(weight, 0, 1);
    if (bias)
        multiply_onto(as_contiguous(*bias), x_rows, turned, y);
    else
        multiply(x_rows, turned, y);
    return dims == 2 ? y : torch::stable::view(y, shape);
}

}  // namespace cuda
}  // namespace cellstep
