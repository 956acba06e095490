#include "choose.h"
#include "operators.h"
#include "variant.h"

namespace cellstep {
namespace cuda {

using namespace ops;

namespace {

/// The transpose of a matrix with any strides, without a copy.
Tensor turned(const Tensor& tensor) { return torch::stable::transpose(tensor, 0, 1); }

/// The arguments that have one shape each and may be missing.
struct Extras {
    Maybe bias_ih, bias_hh, weight_hr, weight_peephole, norm_ih, norm_hh, norm_c, norm_c_bias;
    Maybe reset, initial_h, initial_c, mask_h, mask_g, keep_h, keep_c;
};

template <class T>
const T* values(const Maybe& tensor) {
    return tensor ? data<T>(*tensor) : nullptr;
}

template <class T>
void forward(const char* op, const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& weight_ih,
             const Tensor& weight_hh, const Extras& extras, VariantStep<T> step, const Tensor& y, const Maybe& cells,
             const Device& device) {
    const std::int64_t steps = x.size(0), batch = x.size(1), units = c.size(1), recurrent = h.size(1);
    const Tensor sums = empty(x, {steps * batch, weight_ih.size(0)});
    multiply(as_rows(x), turned(weight_ih), sums);
    const Tensor h_in = empty(x, {batch, recurrent});
    const Tensor m = empty(x, {batch, units});
    step.batch = batch;
    step.hidden_size = units;
    step.recurrent_size = recurrent;
    step.bias_ih = values<T>(extras.bias_ih);
    step.bias_hh = values<T>(extras.bias_hh);
    step.peephole = values<T>(extras.weight_peephole);
    step.norm_hh = values<T>(extras.norm_hh);
    step.norm_c = values<T>(extras.norm_c);
    step.norm_c_bias = values<T>(extras.norm_c_bias);
    step.initial_h = values<T>(extras.initial_h);
    step.initial_c = values<T>(extras.initial_c);
    step.mask_h = values<T>(extras.mask_h);
    step.mask_g = values<T>(extras.mask_g);
    step.keep_h = values<T>(extras.keep_h);
    step.keep_c = values<T>(extras.keep_c);
    step.h = mutable_data<T>(h);
    step.c = mutable_data<T>(c);
    step.y = {mutable_data<T>(y), batch * recurrent, recurrent};
    if (cells) step.cells = {mutable_data<T>(*cells), batch * units, units};
    const unsigned char* reset = nullptr;
    std::int64_t reset_step = 0;
    if (extras.reset) {
        reset = data<unsigned char>(*extras.reset);
        reset_step = extras.reset->stride(0);
        step.reset_row = extras.reset->stride(1);
    }
    run_variant<T>(op,
                   {step, steps, false, sums, values<T>(extras.norm_ih), weight_hh, extras.weight_hr, h_in, m, reset,
                    reset_step, device.multiprocessors()},
                   device.stream());
}

/// All steps in one launch behind variant_begin, if that is the choice.
bool runs_whole(const char* op, const VariantRun<float>& run, void* stream) {
    if (run.weight_hr) return false;
    VariantCall call{};
    call.step = run.step;
    call.step.input_sums = data<float>(run.input_sums);
    call.step.reset = run.reset;
    call.steps = run.steps;
    call.reverse = run.reverse;
    call.reset_distance = run.reset_step;
    call.weight_hh = weight_view_of(run.weight_hh, run.step.hidden_size);
    call.multiprocessors = run.multiprocessors;
    call.stream = stream;
    if (!choose(op, call)) return false;
    const auto words = static_cast<std::int64_t>(cluster_variant_progress_words(call));
    Tensor progress = empty_of(ScalarType::Int, run.h_in, {words});
    if (words > 0) torch::stable::zero_(progress);
    call.progress = mutable_data<int>(progress);
    check_launch(op, cluster_variant_forward(call));
    return true;
}

bool runs_whole(const char*, const VariantRun<double>&, void*) { return false; }

}  // namespace

template <class T>
void run_variant(const char* op, VariantRun<T> run, void* stream) {
    VariantStep<T>& step = run.step;
    if (step.batch == 0) return;
    const std::int64_t columns = run.weight_hh.size(0);
    if (run.norm_ih)
        check_launch(op, variant_inputs<T>({run.steps * step.batch, step.hidden_size, step.coupled, step.expanded,
                                            run.norm_ih, mutable_data<T>(run.input_sums)},
                                           stream));
    step.h_in = mutable_data<T>(run.h_in);
    // Going backwards a flag parts its step from the one before, so there it counts for that one.
    const auto flags = [&](std::int64_t at) {
        return run.reset && at >= 0 && at < run.steps ? run.reset + at * run.reset_step : nullptr;
    };
    const std::int64_t begin = run.reverse ? run.steps - 1 : 0;
    const std::int64_t ahead = run.reverse ? -1 : 1, behind = run.reverse ? 1 : 0;
    step.next_reset_step = begin + behind;
    step.next_reset = flags(step.next_reset_step);
    check_launch(op, variant_begin<T>(step, stream));
    if (runs_whole(op, run, stream)) return;

    const Tensor hidden_sums = empty(run.h_in, {step.batch, columns});
    const Tensor turned_hh = turned(run.weight_hh);
    const bool projects = run.weight_hr.has_value();
    const Tensor turned_hr = projects ? turned(*run.weight_hr) : run.m;
    const Tensor projected = projects ? empty(run.h_in, {step.batch, step.recurrent_size}) : run.m;
    step.hidden_sums = data<T>(hidden_sums);
    step.projected = data<T>(projected);
    step.m = mutable_data<T>(run.m);
    const VariantStep<T> first = step;
    for (std::int64_t count = 0, at = begin; count < run.steps; ++count, at += ahead) {
        step.step = at;
        step.input_sums = data<T>(run.input_sums) + at * step.batch * columns;
        if (first.keep_h) step.keep_h = first.keep_h + at * step.batch * step.recurrent_size;
        if (first.keep_c) step.keep_c = first.keep_c + at * step.batch * step.hidden_size;
        step.reset = step.next_reset;
        step.reset_step = step.next_reset_step;
        step.next_reset_step += ahead;
        step.next_reset = flags(step.next_reset_step);
        step.y.data = first.y.data + at * step.y.step;
        if (first.cells.data) step.cells.data = first.cells.data + at * step.cells.step;
        multiply(run.h_in, turned_hh, hidden_sums);
        check_launch(op, variant_step<T>(step, projects, stream));
        if (!projects) continue;
        multiply(run.m, turned_hr, projected);
        check_launch(op, variant_project<T>(step, stream));
    }
}

template void run_variant<float>(const char*, VariantRun<float>, void*);
template void run_variant<double>(const char*, VariantRun<double>, void*);

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
        if (code < 0 || code >= static_cast<std::int64_t>(Activation::softmax))
            fail(op, ": expected activations below ", static_cast<int>(Activation::softmax), ", got ", code);
    if (reset) check_mask(op, "reset", *reset, {steps, batch});
    if (norm_ih.has_value() != norm_hh.has_value() || norm_ih.has_value() != norm_c.has_value() ||
        norm_ih.has_value() != norm_c_bias.has_value())
        fail(op, ": expected norm_ih, norm_hh, norm_c and norm_c_bias together, or none of them");

    const Device device(x);
    // Sums and state are kept in float32, so 16-bit layers are widened and what they give is rounded once.
    const bool narrow = value_bytes(data_type(x)) == 2;
    const auto widened = [&](const Tensor& tensor) {
        return narrow ? torch::stable::to(tensor, ScalarType::Float) : tensor;
    };
    const auto rounded = [&](const Tensor& tensor) {
        return narrow ? torch::stable::to(tensor, x.scalar_type()) : tensor;
    };
    const auto check = [&](const char* name, Maybe& tensor, std::initializer_list<std::int64_t> sizes) {
        if (!tensor) return;
        check_argument(op, name, *tensor, x, sizes);
        tensor = as_contiguous(widened(*tensor));
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

    const Tensor h_n = narrow ? widened(as_contiguous(h)) : copy_of(h);
    const Tensor c_n = narrow ? widened(as_contiguous(c)) : copy_of(c);
    const Tensor y = empty(h_n, {steps, batch, recurrent});
    const Tensor cells = save_cells ? empty(h_n, {steps, batch, units}) : empty(h_n, {0});
    const Maybe saved = save_cells ? Maybe(cells) : std::nullopt;
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        VariantStep<T> step{};
        step.coupled = coupled;
        step.gate = static_cast<Activation>(gate_activation);
        step.candidate = static_cast<Activation>(activation);
        step.output = static_cast<Activation>(output_activation);
        step.cell_clip = static_cast<T>(cell_clip);
        step.zoneout_h = static_cast<T>(zoneout_h);
        step.zoneout_c = static_cast<T>(zoneout_c);
        forward<T>(op, widened(x), h_n, c_n, widened(weight_ih), widened(weight_hh), extras, step, y, saved, device);
    };
    if (x.scalar_type() == ScalarType::Double)
        run(double{});
    else
        run(float{});
    return {rounded(y), rounded(h_n), rounded(c_n), rounded(cells)};
}

}  // namespace cuda
}  // namespace cellstep
