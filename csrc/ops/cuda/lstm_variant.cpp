#include "choose.h"
#include "operators.h"
#include "variant.h"

namespace cellstep {
namespace cuda {

using namespace ops;

namespace {

/// The transpose of a matrix with any strides, without a copy.
Tensor turned(const Tensor& tensor) { return torch::stable::transpose(tensor, 0, 1); }

template <class T>
void forward(const Variant& call, const Tensor& h, const Tensor& c, const Tensor& y, const Tensor& cells,
             const Device& device) {
    const std::int64_t steps = y.size(0), batch = y.size(1), units = c.size(1), recurrent = h.size(1);
    const Tensor sums = empty(call.x, {steps * batch, call.weight_ih.size(0)});
    multiply(as_rows(call.x), turned(call.weight_ih), sums);
    const Tensor h_in = empty(call.x, {batch, recurrent});
    const Tensor m = empty(call.x, {batch, units});
    VariantStep<T> step{};
    step.coupled = call.coupled;
    step.gate = static_cast<Activation>(call.gate);
    step.candidate = static_cast<Activation>(call.candidate);
    step.output = static_cast<Activation>(call.output);
    step.cell_clip = static_cast<T>(call.cell_clip);
    step.zoneout_h = static_cast<T>(call.zoneout_h);
    step.zoneout_c = static_cast<T>(call.zoneout_c);
    step.batch = batch;
    step.hidden_size = units;
    step.recurrent_size = recurrent;
    step.bias_ih = data_or_null<T>(call.bias_ih);
    step.bias_hh = data_or_null<T>(call.bias_hh);
    step.peephole = data_or_null<T>(call.weight_peephole);
    step.norm_hh = data_or_null<T>(call.norm_hh);
    step.norm_c = data_or_null<T>(call.norm_c);
    step.norm_c_bias = data_or_null<T>(call.norm_c_bias);
    step.initial_h = data_or_null<T>(call.initial_h);
    step.initial_c = data_or_null<T>(call.initial_c);
    step.mask_h = data_or_null<T>(call.mask_h);
    step.mask_g = data_or_null<T>(call.mask_g);
    step.keep_h = data_or_null<T>(call.keep_h);
    step.keep_c = data_or_null<T>(call.keep_c);
    step.h = mutable_data<T>(h);
    step.c = mutable_data<T>(c);
    step.y = {mutable_data<T>(y), batch * recurrent, recurrent};
    if (call.save_cells) step.cells = {mutable_data<T>(cells), batch * units, units};
    const unsigned char* reset = nullptr;
    std::int64_t reset_step = 0;
    if (call.reset) {
        reset = data<unsigned char>(*call.reset);
        reset_step = call.reset->stride(0);
        step.reset_row = call.reset->stride(1);
    }
    run_variant<T>(call.op,
                   {step, steps, false, sums, data_or_null<T>(call.norm_ih), call.weight_hh, call.weight_hr, h_in, m,
                    reset, reset_step, device.multiprocessors()},
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

std::tuple<Tensor, Tensor, Tensor, Tensor> variant_layer(Variant call) {
    const Device device(call.x);
    // Sums and state are kept in float32, so 16-bit layers are widened and what they give is rounded once.
    const ScalarType type = call.x.scalar_type();
    const bool narrow = value_bytes(data_type(call.x)) == 2;
    const auto widened = [&](const Tensor& tensor) {
        return narrow ? torch::stable::to(tensor, ScalarType::Float) : tensor;
    };
    const auto rounded = [&](const Tensor& tensor) { return narrow ? torch::stable::to(tensor, type) : tensor; };
    for (Tensor* tensor : {&call.x, &call.weight_ih, &call.weight_hh}) *tensor = widened(*tensor);
    for (Maybe* option : call.options())
        if (*option) *option = widened(**option);
    const Tensor h_n = narrow ? widened(as_contiguous(call.h)) : copy_of(call.h);
    const Tensor c_n = narrow ? widened(as_contiguous(call.c)) : copy_of(call.c);
    const std::int64_t steps = call.x.size(0), batch = call.x.size(1);
    const Tensor y = empty(h_n, {steps, batch, h_n.size(1)});
    const Tensor cells = call.save_cells ? empty(h_n, {steps, batch, c_n.size(1)}) : empty(h_n, {0});
    const auto kernels = type == ScalarType::Double ? forward<double> : forward<float>;
    kernels(call, h_n, c_n, y, cells, device);
    return {rounded(y), rounded(h_n), rounded(c_n), rounded(cells)};
}

}  // namespace cuda
}  // namespace cellstep
