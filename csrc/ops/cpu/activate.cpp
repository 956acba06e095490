#include "ops/operators.h"

namespace cellstep {
namespace ops {

Tensor activate(Tensor x, std::int64_t activation) {
    const char* op = "activate";
    const std::int64_t dims = x.dim();
    if (dims == 0) fail(op, ": expected x with at least one dimension, got a scalar");
    check_input(op, "x", x, dims);
    if (activation < 0 || activation >= static_cast<std::int64_t>(core::activation_count))
        fail(op, ": expected an activation below ", core::activation_count, ", got ", activation);
    const Tensor y = copy_of(x);
    const std::size_t width = size(y, dims - 1);
    const std::size_t rows = width ? static_cast<std::size_t>(y.numel()) / width : 0;
    const auto kind = static_cast<core::Activation>(activation);
    if (is_float(y))
        core::apply_activation<float>(kind, rows, width, mutable_data<float>(y));
    else
        core::apply_activation<double>(kind, rows, width, mutable_data<double>(y));
    return y;
}

}  // namespace ops
}  // namespace cellstep
