#include "core/engine.h"

#include "ops/operators.h"

namespace cellstep {
namespace ops {

namespace {

template <class T>
void run(const core::Image& image, const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& y, bool last_only) {
    const std::size_t batch = size(x, 0);
    const std::size_t steps = size(x, 1);
    const auto memory = scratch<T>(core::model_scratch<T>(image, steps, batch));
    core::run_model<T>(image,
                       {steps,
                        batch,
                        {data<T>(x), x.stride(1), x.stride(0), x.stride(2)},
                        mutable_data<T>(h),
                        mutable_data<T>(c),
                        {mutable_data<T>(y), y.stride(1), y.stride(0)},
                        last_only},
                       memory.get());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> run_model(Tensor image, Tensor x, Tensor h, Tensor c, std::int64_t output_size,
                                             bool last_only) {
    const char* op = "run_model";
    check_input(op, "x", x, 3);
    if (!image.is_cpu() || image.scalar_type() != ScalarType::Byte || image.dim() != 1 || !image.is_contiguous())
        fail(op, ": expected image as the uint8 bytes of a deploy file on the CPU, got ", dtype_text(image),
             " of shape ", shape_text(image));
    core::Image model;
    // The checksum was checked when the image was made; here only that no access leaves the tensor.
    const core::ImageStatus status = core::open_image(image.const_data_ptr(), size(image, 0), &model);
    if (status != core::ImageStatus::ok) fail(op, ": ", core::image_status_text(status));
    const core::ImageHeader& header = model.header();
    if ((header.dtype == 0) != is_float(x))
        fail(op, ": expected x of ", header.dtype == 0 ? "float32" : "float64", " like the model, got ", dtype_text(x),
             ": convert it");
    if (output_size != static_cast<std::int64_t>(header.output_size))
        fail(op, ": expected output_size ", header.output_size, " as the model has, got ", output_size);
    const std::int64_t batch = x.size(0);
    const std::int64_t steps = x.size(1);
    const std::int64_t inputs = header.input_size;
    if (steps == 0) fail(op, ": expected at least one step, got x of shape ", shape_text(x), ": leave out empty calls");
    check_argument(op, "x", x, x, {batch, steps, inputs});
    check_argument(op, "h", h, x, {header.num_layers, batch, header.hidden_size});
    check_argument(op, "c", c, x, {header.num_layers, batch, header.hidden_size});
    const Tensor h_n = copy_of(h);
    const Tensor c_n = copy_of(c);
    const Tensor y = empty(x, {batch, last_only ? 1 : steps, output_size});
    const auto kernel = is_float(x) ? run<float> : run<double>;
    kernel(model, x, h_n, c_n, y, last_only);
    return {y, h_n, c_n};
}

}  // namespace ops
}  // namespace cellstep
