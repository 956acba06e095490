#include "model.h"
#include "operators.h"

namespace cellstep {
namespace cuda {

using namespace ops;

Tensor activate(Tensor x, std::int64_t activation) {
    const char* op = "activate";
    const std::int64_t dims = x.dim();
    if (dims == 0) fail(op, ": expected x with at least one dimension, got a scalar");
    check_input(op, "x", x, dims);
    constexpr std::int64_t count = static_cast<std::int64_t>(Activation::softmax) + 1;
    if (activation < 0 || activation >= count) fail(op, ": expected an activation below ", count, ", got ", activation);
    const Device device(x);
    const Tensor source = as_contiguous(x);
    const Tensor y = torch::stable::empty_like(source);
    const std::int64_t width = x.size(dims - 1);
    check_launch(op, activate_values({data_type(x), static_cast<Activation>(activation), width ? x.numel() / width : 0,
                                      width, source.const_data_ptr(), y.mutable_data_ptr(), device.stream()}));
    return y;
}

}  // namespace cuda
}  // namespace cellstep
