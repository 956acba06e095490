#include "core/layer.h"
#include "ops/operators.h"

namespace cellstep {
namespace ops {

namespace {

template <class T>
void forward(const Variant& call, const Tensor& h, const Tensor& c, const Tensor& y, const Tensor& cells) {
    const std::size_t steps = size(call.x, 0);
    const std::size_t batch = size(call.x, 1);
    const std::size_t inputs = size(call.x, 2);
    const std::size_t units = size(c, 1);
    const std::size_t recurrent = size(h, 1);
    const std::size_t packed = core::packed_size(inputs, units, recurrent);
    const auto memory =
        scratch<T>(packed + 11 * units + units * recurrent + core::variant_scratch(steps, batch, inputs, units));
    T* free = memory.get();
    const auto take = [&free](std::size_t count) {
        T* begin = free;
        free += count;
        return begin;
    };
    T* weights = take(packed);
    core::pack_layer<T>({inputs, units, recurrent, call.coupled, matrix<T>(call.weight_ih), matrix<T>(call.weight_hh),
                         data_or_null<T>(call.bias_ih), data_or_null<T>(call.bias_hh)},
                        weights);

    core::LayerOptions<T> options;
    options.coupled = call.coupled;
    options.gate = call.gate;
    options.candidate = call.candidate;
    options.output = call.output;
    options.cell_clip = static_cast<T>(call.cell_clip);
    options.zoneout_h = static_cast<T>(call.zoneout_h);
    options.zoneout_c = static_cast<T>(call.zoneout_c);
    if (call.weight_hr) {
        T* projection = take(units * recurrent);
        const auto weight = matrix<T>(*call.weight_hr);
        for (std::size_t unit = 0; unit < units; ++unit)
            for (std::size_t out = 0; out < recurrent; ++out) projection[unit * recurrent + out] = weight(out, unit);
        options.projection = projection;
    }
    const auto expanded = [&](const std::optional<Tensor>& values, std::size_t gates) -> const T* {
        if (!values) return nullptr;
        T* target = take(gates * units);
        core::expand_gates<T>(data<T>(*values), gates, units, call.coupled, target);
        return target;
    };
    options.norm_ih = expanded(call.norm_ih, 4);
    options.norm_hh = expanded(call.norm_hh, 4);
    options.peephole = expanded(call.weight_peephole, 3);
    options.norm_c = data_or_null<T>(call.norm_c);
    options.norm_c_bias = data_or_null<T>(call.norm_c_bias);

    core::LayerMasks<T> masks;
    if (call.reset) {
        masks.reset = data<unsigned char>(*call.reset);
        masks.reset_step_stride = call.reset->stride(0);
        masks.reset_row_stride = call.reset->stride(1);
    }
    masks.initial_h = data_or_null<T>(call.initial_h);
    masks.initial_c = data_or_null<T>(call.initial_c);
    masks.mask_h = data_or_null<T>(call.mask_h);
    masks.mask_g = data_or_null<T>(call.mask_g);
    masks.keep_h = data_or_null<T>(call.keep_h);
    masks.keep_c = data_or_null<T>(call.keep_c);
    core::variant_forward<T>(
        {steps,
         batch,
         inputs,
         units,
         recurrent,
         core::WeightType::full,
         weights,
         {data<T>(call.x), call.x.stride(0), call.x.stride(1), call.x.stride(2)},
         mutable_data<T>(h),
         mutable_data<T>(c),
         {mutable_data<T>(y), static_cast<std::ptrdiff_t>(batch * recurrent), static_cast<std::ptrdiff_t>(recurrent)},
         call.save_cells ? mutable_data<T>(cells) : nullptr,
         options,
         masks},
        free);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> variant_layer(Variant call) {
    const Tensor h_n = copy_of(call.h);
    const Tensor c_n = copy_of(call.c);
    const Tensor y = empty(call.x, {call.x.size(0), call.x.size(1), call.h.size(1)});
    const Tensor cells =
        call.save_cells ? empty(call.x, {call.x.size(0), call.x.size(1), call.c.size(1)}) : empty(call.x, {0});
    const auto kernel = is_float(call.x) ? forward<float> : forward<double>;
    kernel(call, h_n, c_n, y, cells);
    return {y, h_n, c_n, cells};
}

}  // namespace ops
}  // namespace cellstep
