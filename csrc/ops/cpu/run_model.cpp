#include "core/engine.h"

#include <cstring>

#include "ops/operators.h"
#include "ops/threads.h"

namespace cellstep {
namespace ops {

namespace {

/// Rows of a batch, all with the same number of steps.
struct Rows {
    std::int64_t first;
    std::int64_t count;
    std::int64_t steps;
};

template <class T>
void run(const core::Image& image, const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& y,
         core::Answers answers, const std::optional<Tensor>& lengths, const std::optional<Tensor>& reset) {
    const std::int64_t batch = x.size(0);
    const std::int64_t steps = x.size(1);
    const Threads threads;
    const auto call = [&](const Rows& rows, T* state_h, T* state_c) {
        const std::size_t count = static_cast<std::size_t>(rows.count);
        const std::size_t length = static_cast<std::size_t>(rows.steps);
        const auto memory = scratch<T>(core::model_scratch<T>(image, length, count, threads.get()));
        core::run_model<T>(
            image,
            {length,
             count,
             {data<T>(x) + rows.first * x.stride(0), x.stride(1), x.stride(0), x.stride(2)},
             count,
             state_h,
             state_c,
             {mutable_data<T>(y) + rows.first * y.stride(0), y.dim() == 3 ? y.stride(1) : 0, y.stride(0)},
             answers,
             reset ? data<unsigned char>(*reset) + rows.first * reset->stride(0) : nullptr,
             reset ? reset->stride(1) : 0,
             reset ? reset->stride(0) : 0,
             threads.get()},
            memory.get());
    };
    T* all_h = mutable_data<T>(h);
    T* all_c = mutable_data<T>(c);
    if (!lengths) return call({0, batch, steps}, all_h, all_c);

    // Row by row: no bit of a row hangs on the others. A row without a step is answered with zeros, as padding is.
    const core::ImageHeader& header = image.header();
    const std::size_t layers = header.state_layers;
    const auto row_h = scratch<T>(layers * header.h_size);
    const auto row_c = scratch<T>(layers * header.c_size);
    const auto copy = [&](T* row, T* all, std::int64_t place, std::size_t size, bool back) {
        for (std::size_t layer = 0; layer < layers; ++layer, row += size) {
            T* in_batch = all + (layer * static_cast<std::size_t>(batch) + static_cast<std::size_t>(place)) * size;
            std::memcpy(back ? in_batch : row, back ? row : in_batch, size * sizeof(T));
        }
    };
    for (std::int64_t row = 0; row < batch; ++row) {
        const std::int64_t length = data<std::int64_t>(*lengths)[row];
        if (length == 0) continue;
        copy(row_h.get(), all_h, row, header.h_size, false);
        copy(row_c.get(), all_c, row, header.c_size, false);
        call({row, 1, length}, row_h.get(), row_c.get());
        copy(row_h.get(), all_h, row, header.h_size, true);
        copy(row_c.get(), all_c, row, header.c_size, true);
    }
}

}  // namespace

namespace {

/// The image in a tensor, checked against the dtype of x.
core::Image opened(const char* op, const Tensor& image, const Tensor& x) {
    if (!image.is_cpu() || image.scalar_type() != ScalarType::Byte || image.dim() != 1 || !image.is_contiguous())
        fail(op, ": expected image as the uint8 bytes of a deploy file on the CPU, got ", dtype_text(image),
             " of shape ", shape_text(image));
    core::Image model;
    // The checksum was checked when the image was made; here only that no access leaves the tensor.
    const core::ImageStatus status = core::open_image(image.const_data_ptr(), size(image, 0), &model);
    if (status != core::ImageStatus::ok) fail(op, ": ", core::image_status_text(status));
    if ((model.header().dtype == 0) != is_float(x))
        fail(op, ": expected x of ", model.header().dtype == 0 ? "float32" : "float64", " like the model, got ",
             dtype_text(x), ": convert it");
    return model;
}

/// A copy of the state that a call begins from, or the model's own.
std::pair<Tensor, Tensor> begin_state(const char* op, const core::Image& model, const Tensor& x, std::int64_t batch,
                                      const std::optional<Tensor>& h, const std::optional<Tensor>& c) {
    const core::ImageHeader& header = model.header();
    if (h.has_value() != c.has_value()) fail(op, ": expected h and c, or neither");
    if (h) {
        check_argument(op, "h", *h, x, {header.state_layers, batch, header.h_size});
        check_argument(op, "c", *c, x, {header.state_layers, batch, header.c_size});
        return {copy_of(*h), copy_of(*c)};
    }
    const Tensor h_0 = empty(x, {header.state_layers, batch, header.h_size});
    const Tensor c_0 = empty(x, {header.state_layers, batch, header.c_size});
    const std::size_t rows = static_cast<std::size_t>(batch);
    if (is_float(x))
        core::initial_state<float>(model, rows, mutable_data<float>(h_0), mutable_data<float>(c_0));
    else
        core::initial_state<double>(model, rows, mutable_data<double>(h_0), mutable_data<double>(c_0));
    return {h_0, c_0};
}

/// (N, T, K) for a (T, N, K), or back, in the same memory.
Tensor swapped(const Tensor& tensor) { return torch::stable::transpose(tensor, 0, 1); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lstm_stack(Tensor image, Tensor x, std::optional<Tensor> h, std::optional<Tensor> c,
                                              bool batch_first) {
    const char* op = "lstm_stack";
    check_input(op, "x", x, 3);
    const core::Image model = opened(op, image, x);
    const std::int64_t inputs = model.header().input_size;
    const std::int64_t batch = x.size(batch_first ? 0 : 1);
    const std::int64_t steps = x.size(batch_first ? 1 : 0);
    if (steps == 0) fail(op, ": expected at least one step, got x of shape ", shape_text(x), ": leave out empty calls");
    check_argument(op, "x", x, x, {x.size(0), x.size(1), inputs});
    const auto [h_n, c_n] = begin_state(op, model, x, batch, h, c);
    const Tensor y = empty(x, {x.size(0), x.size(1), model.header().output_size});
    const auto kernel = is_float(x) ? run<float> : run<double>;
    kernel(model, batch_first ? x : swapped(x), h_n, c_n, batch_first ? y : swapped(y), core::Answers::every,
           std::nullopt, std::nullopt);
    return {y, h_n, c_n};
}

std::tuple<Tensor, Tensor, Tensor> run_model(Tensor image, Tensor x, std::optional<Tensor> h, std::optional<Tensor> c,
                                             std::int64_t output_size, std::int64_t answers,
                                             std::optional<Tensor> lengths, std::optional<Tensor> reset) {
    const char* op = "run_model";
    check_input(op, "x", x, 3);
    const core::Image model = opened(op, image, x);
    const core::ImageHeader& header = model.header();
    if (output_size != static_cast<std::int64_t>(header.output_size))
        fail(op, ": expected output_size ", header.output_size, " as the model has, got ", output_size);
    if (answers < 0 || answers > static_cast<std::int64_t>(core::Answers::hidden))
        fail(op, ": expected answers 0 (every), 1 (last) or 2 (hidden), got ", answers);
    const std::int64_t batch = x.size(0);
    const std::int64_t steps = x.size(1);
    const std::int64_t inputs = header.input_size;
    if (steps == 0) fail(op, ": expected at least one step, got x of shape ", shape_text(x), ": leave out empty calls");
    check_argument(op, "x", x, x, {batch, steps, inputs});
    if (reset) check_mask(op, "reset", *reset, {batch, steps});
    if (lengths) {
        if (!lengths->is_cpu() || lengths->scalar_type() != ScalarType::Long || lengths->dim() != 1 ||
            lengths->size(0) != batch)
            fail(op, ": expected lengths of ", batch, " int64 values on the CPU, got shape ", shape_text(*lengths),
                 ": give one a row");
        lengths = as_contiguous(*lengths);
        for (std::int64_t row = 0; row < batch; ++row) {
            const std::int64_t length = data<std::int64_t>(*lengths)[row];
            if (length < 0 || length > steps)
                fail(op, ": expected lengths from 0 to the ", steps, " steps of x, got ", length);
        }
    }
    const auto [h_n, c_n] = begin_state(op, model, x, batch, h, c);
    const bool every = answers == 0;
    Tensor y = every ? empty(x, {batch, steps, output_size}) : empty(x, {batch, output_size});
    if (lengths) torch::stable::zero_(y);
    const auto kernel = is_float(x) ? run<float> : run<double>;
    kernel(model, x, h_n, c_n, y, static_cast<core::Answers>(answers), lengths, reset);
    return {y, h_n, c_n};
}

}  // namespace ops
}  // namespace cellstep
