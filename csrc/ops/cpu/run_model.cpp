#include "core/engine.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "ops/operators.h"
#include "ops/threads.h"

namespace cellstep {
namespace ops {

namespace {

/// Of x (N, T, I), or (N, I) for one step, of h and c, updated in place, and of y (N, T, O) or (N, O): from row `first`
/// and step `begin` on.
struct Window {
    std::size_t first;
    std::size_t rows;
    std::size_t begin;
    std::size_t steps;
};

template <class T>
void run_window(const core::Image& image, const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& y,
                core::Answers answers, const std::optional<Tensor>& reset, const Window& window,
                const core::Parallel* parallel) {
    const core::ImageHeader& header = image.header();
    const auto first = static_cast<std::ptrdiff_t>(window.first);
    const auto begin = static_cast<std::ptrdiff_t>(window.begin);
    const bool every = y.dim() == 3;
    const std::int64_t step_stride = x.dim() == 3 ? x.stride(1) : 0;
    const auto memory = scratch<T>(core::model_scratch<T>(image, window.steps, window.rows, parallel));
    core::run_model<T>(
        image,
        {window.steps,
         window.rows,
         {data<T>(x) + first * x.stride(0) + begin * step_stride, step_stride, x.stride(0), x.stride(x.dim() - 1)},
         size(x, 0),
         mutable_data<T>(h) + window.first * header.h_size,
         mutable_data<T>(c) + window.first * header.c_size,
         {mutable_data<T>(y) + first * y.stride(0) + (every ? begin * y.stride(1) : 0), every ? y.stride(1) : 0,
          y.stride(0)},
         answers,
         reset ? data<unsigned char>(*reset) + first * reset->stride(0) + begin * reset->stride(1) : nullptr,
         reset ? reset->stride(1) : 0,
         reset ? reset->stride(0) : 0,
         parallel},
        memory.get());
}

/// Rows of any lengths, of which the longest come first. A stretch of steps takes the rows that are still running, so
/// that nothing is spent on padding; each row's answer is that of its last stretch. A bidirectional model needs the
/// whole of a row at once.
template <class T>
void run_ragged(const core::Image& image, const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& y,
                core::Answers answers, const std::vector<std::int64_t>& lengths, const std::optional<Tensor>& reset,
                const core::Parallel* parallel) {
    if (core::is_bidirectional(image)) {
        for (std::size_t row = 0; row < lengths.size() && lengths[row] > 0; ++row)
            run_window<T>(image, x, h, c, y, answers, reset, {row, 1, 0, static_cast<std::size_t>(lengths[row])},
                          parallel);
        return;
    }
    std::int64_t begin = 0;
    for (std::size_t rows = lengths.size(); rows > 0;) {
        const std::int64_t end = lengths[rows - 1];
        if (end > begin)
            run_window<T>(image, x, h, c, y, answers, reset,
                          {0, rows, static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin)}, parallel);
        begin = end;
        while (rows > 0 && lengths[rows - 1] == end) --rows;
    }
}

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

/// Rows by falling length.
std::vector<std::int64_t> longest_first(const Tensor& lengths) {
    std::vector<std::int64_t> order(size(lengths, 0));
    std::iota(order.begin(), order.end(), std::int64_t{0});
    const std::int64_t* length = data<std::int64_t>(lengths);
    std::stable_sort(order.begin(), order.end(),
                     [length](std::int64_t a, std::int64_t b) { return length[a] > length[b]; });
    return order;
}

std::vector<std::int64_t> inverse(const std::vector<std::int64_t>& order) {
    std::vector<std::int64_t> back(order.size());
    for (std::size_t at = 0; at < order.size(); ++at)
        back[static_cast<std::size_t>(order[at])] = static_cast<std::int64_t>(at);
    return back;
}

/// A contiguous copy with the slices along `dim` in another order.
Tensor in_order(const Tensor& tensor, std::int64_t dim, const std::vector<std::int64_t>& order) {
    const Tensor source = as_contiguous(tensor);
    const Tensor target = torch::stable::empty_like(source);
    const std::size_t count = order.size();
    const std::size_t outer = dim == 0 ? 1 : size(source, 0);
    const std::size_t bytes = count == 0 ? 0
                                         : static_cast<std::size_t>(source.numel()) / (outer * count) *
                                               static_cast<std::size_t>(source.element_size());
    const auto* from = static_cast<const unsigned char*>(source.const_data_ptr());
    auto* to = static_cast<unsigned char*>(target.mutable_data_ptr());
    for (std::size_t block = 0; block < outer; ++block)
        for (std::size_t at = 0; at < count; ++at)
            std::memcpy(to + (block * count + at) * bytes,
                        from + (block * count + static_cast<std::size_t>(order[at])) * bytes, bytes);
    return target;
}

void check_output_size(const char* op, const core::Image& model, std::int64_t output_size) {
    if (output_size != static_cast<std::int64_t>(model.header().output_size))
        fail(op, ": expected output_size ", model.header().output_size, " as the model has, got ", output_size);
}

/// One step of streams, x (N, I) -> y (N, O): a stream of batch 1 would feel the views that make a sequence of it.
std::tuple<Tensor, Tensor, Tensor> run_step(const char* op, const Tensor& image, const Tensor& x,
                                            const std::optional<Tensor>& h, const std::optional<Tensor>& c,
                                            std::int64_t output_size, std::int64_t answers, bool more) {
    check_input(op, "x", x, 2);
    const core::Image model = opened(op, image, x);
    check_output_size(op, model, output_size);
    if (answers != 0 || more) fail(op, ": expected answers 0, no lengths and no reset with x of one step");
    const std::int64_t batch = x.size(0);
    check_argument(op, "x", x, x, {batch, model.header().input_size});
    const auto [h_n, c_n] = begin_state(op, model, x, batch, h, c);
    const Tensor y = empty(x, {batch, output_size});
    const Threads threads;
    const auto kernel = is_float(x) ? run_window<float> : run_window<double>;
    kernel(model, x, h_n, c_n, y, core::Answers::every, std::nullopt, {0, static_cast<std::size_t>(batch), 0, 1},
           threads.get());
    return {y, h_n, c_n};
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
    const Threads threads;
    const auto kernel = is_float(x) ? run_window<float> : run_window<double>;
    kernel(model, batch_first ? x : swapped(x), h_n, c_n, batch_first ? y : swapped(y), core::Answers::every,
           std::nullopt, {0, static_cast<std::size_t>(batch), 0, static_cast<std::size_t>(steps)}, threads.get());
    return {y, h_n, c_n};
}

std::tuple<Tensor, Tensor, Tensor> run_model(Tensor image, Tensor x, std::optional<Tensor> h, std::optional<Tensor> c,
                                             std::int64_t output_size, std::int64_t answers,
                                             std::optional<Tensor> lengths, std::optional<Tensor> reset) {
    const char* op = "run_model";
    if (x.dim() == 2) return run_step(op, image, x, h, c, output_size, answers, lengths || reset);
    check_input(op, "x", x, 3);
    const core::Image model = opened(op, image, x);
    const core::ImageHeader& header = model.header();
    check_output_size(op, model, output_size);
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
    const Threads threads;
    const auto kind = static_cast<core::Answers>(answers);
    if (!lengths) {
        const auto kernel = is_float(x) ? run_window<float> : run_window<double>;
        kernel(model, x, h_n, c_n, y, kind, reset,
               {0, static_cast<std::size_t>(batch), 0, static_cast<std::size_t>(steps)}, threads.get());
        return {y, h_n, c_n};
    }
    // A row without a step is answered with zeros, as padding is.
    torch::stable::zero_(y);
    const std::vector<std::int64_t> order = longest_first(*lengths);
    std::vector<std::int64_t> sorted;
    for (const std::int64_t row : order) sorted.push_back(data<std::int64_t>(*lengths)[row]);
    const Tensor x_sorted = in_order(x, 0, order);
    const Tensor h_sorted = in_order(h_n, 1, order);
    const Tensor c_sorted = in_order(c_n, 1, order);
    const std::optional<Tensor> reset_sorted = reset ? std::optional(in_order(*reset, 0, order)) : std::nullopt;
    const auto kernel = is_float(x) ? run_ragged<float> : run_ragged<double>;
    kernel(model, x_sorted, h_sorted, c_sorted, y, kind, sorted, reset_sorted, threads.get());
    const std::vector<std::int64_t> back = inverse(order);
    return {in_order(y, 0, back), in_order(h_sorted, 1, back), in_order(c_sorted, 1, back)};
}

}  // namespace ops
}  // namespace cellstep
