#include "core/layer.h"
#include "ops/operators.h"

namespace cellstep {
namespace ops {

namespace {

using Maybe = std::optional<Tensor>;

/// The arguments that have one shape each and may be missing.
struct Extras {
    Maybe bias_ih, bias_hh, weight_hr, weight_peephole, norm_ih, norm_hh, norm_c, norm_c_bias;
    Maybe reset, initial_h, initial_c, mask_h, mask_g, keep_h, keep_c;
};

template <class T>
void forward(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& weight_ih, const Tensor& weight_hh,
             const Extras& extras, core::LayerOptions<double> given, const Tensor& y, const Maybe& cells) {
    const std::size_t steps = size(x, 0);
    const std::size_t batch = size(x, 1);
    const std::size_t inputs = size(x, 2);
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
    core::pack_layer<T>({inputs, units, recurrent, given.coupled, matrix<T>(weight_ih), matrix<T>(weight_hh),
                         data_or_null<T>(extras.bias_ih), data_or_null<T>(extras.bias_hh)},
                        weights);

    core::LayerOptions<T> options;
    options.coupled = given.coupled;
    options.gate = given.gate;
    options.candidate = given.candidate;
    options.output = given.output;
    options.cell_clip = static_cast<T>(given.cell_clip);
    options.zoneout_h = static_cast<T>(given.zoneout_h);
    options.zoneout_c = static_cast<T>(given.zoneout_c);
    if (extras.weight_hr) {
        T* projection = take(units * recurrent);
        const auto weight = matrix<T>(*extras.weight_hr);
        for (std::size_t unit = 0; unit < units; ++unit)
            for (std::size_t out = 0; out < recurrent; ++out) projection[unit * recurrent + out] = weight(out, unit);
        options.projection = projection;
    }
    const auto expanded = [&](const Maybe& values, std::size_t gates) -> const T* {
        if (!values) return nullptr;
        T* target = take(gates * units);
        core::expand_gates<T>(data<T>(*values), gates, units, given.coupled, target);
        return target;
    };
    options.norm_ih = expanded(extras.norm_ih, 4);
    options.norm_hh = expanded(extras.norm_hh, 4);
    options.peephole = expanded(extras.weight_peephole, 3);
    options.norm_c = data_or_null<T>(extras.norm_c);
    options.norm_c_bias = data_or_null<T>(extras.norm_c_bias);

    core::LayerMasks<T> masks;
    if (extras.reset) {
        masks.reset = data<unsigned char>(*extras.reset);
        masks.reset_step_stride = extras.reset->stride(0);
        masks.reset_row_stride = extras.reset->stride(1);
    }
    masks.initial_h = data_or_null<T>(extras.initial_h);
    masks.initial_c = data_or_null<T>(extras.initial_c);
    masks.mask_h = data_or_null<T>(extras.mask_h);
    masks.mask_g = data_or_null<T>(extras.mask_g);
    masks.keep_h = data_or_null<T>(extras.keep_h);
    masks.keep_c = data_or_null<T>(extras.keep_c);
    core::variant_forward<T>(
        {steps,
         batch,
         inputs,
         units,
         recurrent,
         core::WeightType::full,
         weights,
         {data<T>(x), x.stride(0), x.stride(1), x.stride(2)},
         mutable_data<T>(h),
         mutable_data<T>(c),
         {mutable_data<T>(y), static_cast<std::ptrdiff_t>(batch * recurrent), static_cast<std::ptrdiff_t>(recurrent)},
         cells ? mutable_data<T>(*cells) : nullptr,
         options,
         masks},
        free);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_variant(
    Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Maybe bias_ih, Maybe bias_hh, Maybe weight_hr,
    Maybe weight_peephole, Maybe norm_ih, Maybe norm_hh, Maybe norm_c, Maybe norm_c_bias, Maybe reset, Maybe initial_h,
    Maybe initial_c, Maybe mask_h, Maybe mask_g, Maybe keep_h, Maybe keep_c, bool coupled, double cell_clip,
    double zoneout_h, double zoneout_c, std::int64_t gate_activation, std::int64_t activation,
    std::int64_t output_activation, bool save_cells) {
    const char* op = "lstm_variant";
    check_input(op, "x", x, 3);
    check_input(op, "h", h, 2);
    check_input(op, "c", c, 2);
    const std::int64_t steps = x.size(0);
    const std::int64_t batch = x.size(1);
    const std::int64_t units = c.size(1);
    const std::int64_t recurrent = h.size(1);
    const std::int64_t rows = (coupled ? 3 : 4) * units;
    if (steps == 0) fail(op, ": expected at least one step, got x of shape ", shape_text(x), ": leave out empty calls");
    if (recurrent > units || (recurrent < units && !weight_hr))
        fail(op, ": expected h of ", units, " values, or fewer and weight_hr, got ", shape_text(h));
    check_argument(op, "h", h, x, {batch, recurrent});
    check_argument(op, "c", c, x, {batch, units});
    check_argument(op, "weight_ih", weight_ih, x, {rows, x.size(2)});
    check_argument(op, "weight_hh", weight_hh, x, {rows, recurrent});
    for (const std::int64_t code : {gate_activation, activation, output_activation})
        if (code < 0 || code >= static_cast<std::int64_t>(core::Activation::softmax))
            fail(op, ": expected activations below ", static_cast<int>(core::Activation::softmax), ", got ", code);
    if (reset) check_mask(op, "reset", *reset, {steps, batch});
    if (norm_ih.has_value() != norm_hh.has_value() || norm_ih.has_value() != norm_c.has_value() ||
        norm_ih.has_value() != norm_c_bias.has_value())
        fail(op, ": expected norm_ih, norm_hh, norm_c and norm_c_bias together, or none of them");

    const auto check = [&](const char* name, Maybe& tensor, std::initializer_list<std::int64_t> sizes) {
        if (!tensor) return;
        check_argument(op, name, *tensor, x, sizes);
        tensor = as_contiguous(*tensor);
    };
    Extras extras{bias_ih, bias_hh,   weight_hr, weight_peephole, norm_ih, norm_hh, norm_c, norm_c_bias,
                  reset,   initial_h, initial_c, mask_h,          mask_g,  keep_h,  keep_c};
    check("bias_ih", extras.bias_ih, {rows});
    check("bias_hh", extras.bias_hh, {rows});
    check("weight_hr", extras.weight_hr, {recurrent, units});
    check("weight_peephole", extras.weight_peephole, {rows - units});
    check("norm_ih", extras.norm_ih, {rows});
    check("norm_hh", extras.norm_hh, {rows});
    check("norm_c", extras.norm_c, {units});
    check("norm_c_bias", extras.norm_c_bias, {units});
    check("initial_h", extras.initial_h, {recurrent});
    check("initial_c", extras.initial_c, {units});
    check("mask_h", extras.mask_h, {batch, recurrent});
    check("mask_g", extras.mask_g, {batch, units});
    check("keep_h", extras.keep_h, {steps, batch, recurrent});
    check("keep_c", extras.keep_c, {steps, batch, units});

    core::LayerOptions<double> options;
    options.coupled = coupled;
    options.gate = static_cast<core::Activation>(gate_activation);
    options.candidate = static_cast<core::Activation>(activation);
    options.output = static_cast<core::Activation>(output_activation);
    options.cell_clip = cell_clip;
    options.zoneout_h = zoneout_h;
    options.zoneout_c = zoneout_c;
    const Tensor h_n = copy_of(h);
    const Tensor c_n = copy_of(c);
    const Tensor y = empty(x, {steps, batch, recurrent});
    const Tensor cells = save_cells ? empty(x, {steps, batch, units}) : empty(x, {0});
    const auto kernel = is_float(x) ? forward<float> : forward<double>;
    kernel(x, h_n, c_n, weight_ih, weight_hh, extras, options, y, save_cells ? Maybe(cells) : std::nullopt);
    return {y, h_n, c_n, cells};
}

}  // namespace ops
}  // namespace cellstep
