#include "core/layer.h"

#include <cstring>

#include "core/denormals.h"
#include "core/kernels.h"

namespace cellstep {
namespace core {

namespace {

template <class T>
void zero(T* values, std::size_t count) {
    for (std::size_t at = 0; at < count; ++at) values[at] = T(0);
}

/// The rows of x one after the other: x itself if they lie so, else a copy in `rows`.
template <class T>
const T* gather(const SequenceView<T>& x, std::size_t steps, std::size_t batch, std::size_t features, T* rows) {
    const std::ptrdiff_t row_size = static_cast<std::ptrdiff_t>(features);
    if (x.feature_stride == 1 && (batch == 1 || x.row_stride == row_size) &&
        (steps == 1 || x.step_stride == row_size * static_cast<std::ptrdiff_t>(batch)))
        return x.data;
    T* target = rows;
    for (std::size_t step = 0; step < steps; ++step) {
        for (std::size_t row = 0; row < batch; ++row) {
            const T* source = x.data + static_cast<std::ptrdiff_t>(step) * x.step_stride +
                              static_cast<std::ptrdiff_t>(row) * x.row_stride;
            for (std::size_t k = 0; k < features; ++k, source += x.feature_stride) *target++ = *source;
        }
    }
    return rows;
}

/// The input part of all gate sums, panel by panel, begun with the bias or with zero.
template <class T>
void project(WeightType weights, const void* packed, std::size_t rows, std::size_t input_size, std::size_t hidden_size,
             std::size_t recurrent_size, bool bias, const T* x, std::ptrdiff_t x_stride, T* sums, T* scratch) {
    if (weights == WeightType::int8) {
        Step<T> step{};
        step.rows = rows;
        step.input_size = input_size;
        step.hidden_size = hidden_size;
        step.recurrent_size = recurrent_size;
        step.last_unit = hidden_size;
        step.packed = packed;
        step.x = x;
        step.x_stride = x_stride;
        step.sums = sums;
        step.sums_rows = rows;
        step.scratch = scratch;
        return kernels<T>().int8_step({step, bias ? Int8Part::biased_inputs : Int8Part::inputs});
    }
    const unsigned char* panel = static_cast<const unsigned char*>(packed);
    std::size_t width = 0;
    for (std::size_t unit = 0; unit < hidden_size; unit += width) {
        width = panel_width(hidden_size - unit);
        const std::size_t columns = gate_count * width;
        const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(columns);
        if (!bias) zero(sums, rows * columns);
        const T* start = bias ? reinterpret_cast<const T*>(panel) : nullptr;
        const T* full = reinterpret_cast<const T*>(panel + columns * sizeof(T));
        if (weights != WeightType::full) {
            kernels<T>().widen(weights, full, columns * input_size, scratch);
            full = scratch;
        }
        kernels<T>().product({rows, columns, input_size, x, x_stride, 1, full, stride, sums, stride, start});
        panel += panel_bytes<T>(weights, width, input_size + recurrent_size);
        sums += columns * rows;
    }
}

/// Saved sums of some steps, panel by panel as `project` gives them for all steps at once. A copy, as a step may
/// overwrite its sums.
template <class T>
void gather_sums(const InputSums<T>& saved, std::size_t steps, std::size_t hidden_size, T* sums) {
    std::size_t width = 0;
    std::size_t at = 0;
    for (std::size_t unit = 0; unit < hidden_size; unit += width) {
        width = panel_width(hidden_size - unit);
        const std::size_t columns = gate_count * width;
        for (std::size_t step = 0; step < steps; ++step, sums += columns)
            std::memcpy(sums, saved.data + static_cast<std::ptrdiff_t>(step) * saved.step_stride + at,
                        columns * sizeof(T));
        at += columns;
    }
}

/// Rows of one chunk of steps: enough for the matrix product, few enough to stay in cache.
constexpr std::size_t chunk_rows = 64;
/// With fewer rows than this in a batch the input projection of a chunk is one product.
constexpr std::size_t rows_without_chunks = 6;

template <class Count>
Count chunk_steps(Count steps, Count batch) {
    if (batch >= rows_without_chunks || batch == 0) return 1;
    const Count chunk = chunk_rows / batch;
    return steps < chunk ? steps : chunk;
}

/// Values that one step of some rows wants: the sums of a panel, and its weights where they are widened.
template <class Count>
Count step_scratch(Count rows, Count depth) {
    return 64 * (rows + depth);
}

/// Threads that a step is shared between, by units: its work must be worth waking them for.
std::size_t step_shares(const Parallel* parallel, std::size_t rows, std::size_t hidden_size, std::size_t depth) {
    if (!parallel) return 1;
    const std::size_t panels = full_panels(hidden_size);
    const std::size_t threads = parallel->threads < panels ? parallel->threads : panels;
    const std::size_t multiply_adds = 4 * hidden_size * depth * (rows < 2 ? 2 : rows);
    constexpr std::size_t worth_sharing = 1u << 20;
    return multiply_adds < worth_sharing || threads < 2 ? 1 : threads;
}

/// Whether a row begins anew before the step.
template <class T>
bool is_reset(const LayerMasks<T>& masks, std::size_t step, std::size_t batch) {
    if (!masks.reset || step < masks.reset_first) return false;
    const unsigned char* flags = masks.reset + static_cast<std::ptrdiff_t>(step) * masks.reset_step_stride;
    for (std::size_t row = 0; row < batch; ++row)
        if (flags[static_cast<std::ptrdiff_t>(row) * masks.reset_row_stride]) return true;
    return false;
}

/// Lets a step begin from a copy of its state in which the flagged rows are initial; `memory`: twice the state.
template <class T>
void clear(const LayerMasks<T>& masks, std::size_t step, std::size_t batch, T* memory, Step<T>* s) {
    const unsigned char* flags = masks.reset + static_cast<std::ptrdiff_t>(step) * masks.reset_step_stride;
    const std::size_t units = s->hidden_size;
    T* const h = memory;
    T* const c = memory + batch * units;
    for (std::size_t row = 0; row < batch; ++row) {
        const bool reset = flags[static_cast<std::ptrdiff_t>(row) * masks.reset_row_stride];
        const T* old_h = reset ? masks.initial_h : s->h + static_cast<std::ptrdiff_t>(row) * s->h_stride;
        const T* old_c = reset ? masks.initial_c : s->c + row * units;
        for (std::size_t at = 0; at < units; ++at) {
            h[row * units + at] = old_h ? old_h[at] : T(0);
            c[row * units + at] = old_c ? old_c[at] : T(0);
        }
    }
    s->h = h;
    s->h_stride = static_cast<std::ptrdiff_t>(units);
    s->c = c;
}

template <class T>
void step_units(const Step<T>& step) {
    if (step.weights == WeightType::int8) return kernels<T>().int8_step({step, Int8Part::whole});
    kernels<T>().step(step);
}

/// `step` is ready for all units; shared ones get memory of their own.
template <class T>
void run_step(const Step<T>& step, std::size_t shares, const Parallel* parallel) {
    if (shares == 1) return step_units(step);
    const std::size_t memory = step_scratch(step.rows, step.input_size + step.recurrent_size);
    for_each(parallel, shares, [&](std::size_t share) {
        const FlushDenormals flush;
        Step<T> part = step;
        part.first_unit = share_begin(step.hidden_size, shares, share, 16);
        part.last_unit = share_begin(step.hidden_size, shares, share + 1, 16);
        part.scratch += share * memory;
        step_units(part);
    });
}

}  // namespace

std::uint64_t layer_scratch(std::uint64_t steps, std::uint64_t batch, std::uint64_t input_size,
                            std::uint64_t hidden_size, const Parallel* parallel) {
    const std::uint64_t rows = chunk_steps(steps, batch) * batch;
    const std::size_t units = static_cast<std::size_t>(hidden_size);
    const std::uint64_t shares =
        step_shares(parallel, static_cast<std::size_t>(batch), units, static_cast<std::size_t>(input_size) + units);
    return rows * (gate_count * padded_size(units) + input_size) + 2 * batch * hidden_size +
           shares * step_scratch(rows, input_size + hidden_size);
}

std::uint64_t variant_scratch(std::uint64_t steps, std::uint64_t batch, std::uint64_t input_size,
                              std::uint64_t hidden_size) {
    // Gate sums of a step, c, both parts of o and h before the projection, twice h behind it, which is no larger, and
    // the weights of a panel where they are widened.
    const std::uint64_t sums = gate_count * padded_size(static_cast<std::size_t>(hidden_size));
    return steps * batch * (sums + input_size) + batch * (sums + 6 * hidden_size) + 64 * (input_size + hidden_size);
}

template <class T>
void layer_step(const Step<T>& step, const Parallel* parallel) CELLSTEP_NONBLOCKING {
    run_step(step, step_shares(parallel, step.rows, step.hidden_size, step.input_size + step.recurrent_size), parallel);
}

template <class T>
void layer_forward(const LayerForward<T>& layer, T* scratch) CELLSTEP_NONBLOCKING {
    const FlushDenormals flush;
    const std::size_t units = layer.hidden_size;
    const std::size_t depth = layer.input_size + units;
    const std::size_t chunk = chunk_steps(layer.steps, layer.batch);
    T* const sums = scratch;
    T* const x_rows = sums + chunk * layer.batch * gate_count * padded_size(units);
    T* const cleared = x_rows + chunk * layer.batch * layer.input_size;
    T* const step_memory = cleared + 2 * layer.batch * units;
    const std::size_t state = layer.batch * units;
    const std::size_t shares = step_shares(layer.parallel, layer.batch, units, depth);
    Step<T> s{};
    s.rows = layer.batch;
    s.input_size = layer.input_size;
    s.hidden_size = units;
    s.recurrent_size = units;
    s.weights = layer.weights;
    s.packed = layer.packed;
    s.last_unit = units;
    s.scratch = step_memory;
    s.h = layer.h;
    s.h_stride = static_cast<std::ptrdiff_t>(units);
    s.h_next_stride = layer.y.row_stride;
    s.c = layer.c;
    s.fast = layer.fast;
    for (std::size_t begin = 0; begin < layer.steps; begin += chunk) {
        const std::size_t steps = layer.steps - begin < chunk ? layer.steps - begin : chunk;
        SequenceView<T> view = layer.x;
        view.data += static_cast<std::ptrdiff_t>(begin) * view.step_stride;
        const T* x = view.data;
        std::ptrdiff_t x_stride = layer.batch == 1 ? view.step_stride : view.row_stride;
        const bool rows_follow = steps == 1 || layer.batch == 1 ||
                                 view.step_stride == static_cast<std::ptrdiff_t>(layer.batch) * view.row_stride;
        if (view.feature_stride != 1 || !rows_follow) {
            x = gather(view, steps, layer.batch, layer.input_size, x_rows);
            x_stride = static_cast<std::ptrdiff_t>(layer.input_size);
        }
        const bool projected = chunk > 1 || layer.sums.data;
        if (layer.sums.data) {
            const std::ptrdiff_t stride = layer.sums.step_stride;
            gather_sums<T>({layer.sums.data + static_cast<std::ptrdiff_t>(begin) * stride, stride}, steps, units, sums);
        } else if (projected) {
            project<T>(layer.weights, layer.packed, steps * layer.batch, layer.input_size, units, units, true, x,
                       x_stride, sums, step_memory);
        }
        for (std::size_t step = 0; step < steps; ++step) {
            const std::size_t at = begin + step;
            s.x = x;
            s.x_stride = x_stride;
            s.sums = projected ? sums : nullptr;
            s.sums_rows = steps * layer.batch;
            s.sums_row = step * layer.batch;
            s.c_next = layer.cells ? layer.cells + at * state : layer.c;
            s.h_next = layer.y.data + static_cast<std::ptrdiff_t>(at) * layer.y.step_stride;
            s.gates = layer.gates ? layer.gates + at * gate_count * state : nullptr;
            if (is_reset(layer.masks, at, layer.batch)) clear(layer.masks, at, layer.batch, cleared, &s);
            run_step(s, shares, layer.parallel);
            // The next step begins where this one ended, with the weights that a cache too small for all still holds.
            s.backwards = !s.backwards;
            s.h = s.h_next;
            s.h_stride = s.h_next_stride;
            s.c = s.c_next;
        }
    }
    if (layer.cells && layer.steps > 0) std::memcpy(layer.c, s.c, state * sizeof(T));
}

template <class T>
void project_row(WeightType weights, const void* packed, std::size_t input_size, std::size_t hidden_size,
                 std::size_t recurrent_size, bool bias, const T* x, T* sums, T* scratch) CELLSTEP_NONBLOCKING {
    project<T>(weights, packed, 1, input_size, hidden_size, recurrent_size, bias, x,
               static_cast<std::ptrdiff_t>(input_size), sums, scratch);
}

template <class T>
void variant_forward(const VariantForward<T>& layer, T* scratch) CELLSTEP_NONBLOCKING {
    const FlushDenormals flush;
    const std::size_t rows = layer.steps * layer.batch;
    T* sums = scratch;
    T* x_rows = scratch + rows * gate_count * padded_size(layer.hidden_size);
    T* memory = x_rows + rows * layer.input_size;
    if (layer.sums.data) {
        gather_sums<T>(layer.sums, layer.steps, layer.hidden_size, sums);
    } else {
        const T* x = gather(layer.x, layer.steps, layer.batch, layer.input_size, x_rows);
        project<T>(layer.weights, layer.packed, rows, layer.input_size, layer.hidden_size, layer.recurrent_size,
                   !layer.options.norm_ih, x, static_cast<std::ptrdiff_t>(layer.input_size), sums, memory);
    }
    kernels<T>().variant_sweep({layer.steps, layer.batch, layer.input_size, layer.hidden_size, layer.recurrent_size,
                                layer.weights, layer.packed, sums, layer.h, layer.c, layer.y.data, layer.y.step_stride,
                                layer.y.row_stride, layer.cells, memory, layer.options, layer.masks});
}

template <class T>
void dense_forward(std::size_t rows, std::size_t in_size, std::size_t out_size, const T* packed, const T* x,
                   std::ptrdiff_t x_stride, T* y, std::ptrdiff_t y_stride) CELLSTEP_NONBLOCKING {
    kernels<T>().dense({rows, in_size, out_size, packed, x, x_stride, y, y_stride});
}

template <class T>
void pack_dense(std::size_t in_size, std::size_t out_size, MatrixView<T> weight, const T* bias, T* packed) {
    for (std::size_t out = 0; out < out_size; ++out) {
        packed[out] = bias ? bias[out] : T(0);
        for (std::size_t in = 0; in < in_size; ++in) packed[(1 + in) * out_size + out] = weight(out, in);
    }
}

template <class T>
void apply_activation(Activation activation, std::size_t rows, std::size_t width, T* values) CELLSTEP_NONBLOCKING {
    kernels<T>().activate(activation, rows, width, values);
}

template void apply_activation<float>(Activation, std::size_t, std::size_t, float*) CELLSTEP_NONBLOCKING;
template void apply_activation<double>(Activation, std::size_t, std::size_t, double*) CELLSTEP_NONBLOCKING;
template void project_row<float>(WeightType, const void*, std::size_t, std::size_t, std::size_t, bool, const float*,
                                 float*, float*) CELLSTEP_NONBLOCKING;
template void project_row<double>(WeightType, const void*, std::size_t, std::size_t, std::size_t, bool, const double*,
                                  double*, double*) CELLSTEP_NONBLOCKING;
template void layer_step<float>(const Step<float>&, const Parallel*) CELLSTEP_NONBLOCKING;
template void layer_step<double>(const Step<double>&, const Parallel*) CELLSTEP_NONBLOCKING;
template void variant_forward<float>(const VariantForward<float>&, float*) CELLSTEP_NONBLOCKING;
template void variant_forward<double>(const VariantForward<double>&, double*) CELLSTEP_NONBLOCKING;
template void layer_forward<float>(const LayerForward<float>&, float*) CELLSTEP_NONBLOCKING;
template void layer_forward<double>(const LayerForward<double>&, double*) CELLSTEP_NONBLOCKING;
template void dense_forward<float>(std::size_t, std::size_t, std::size_t, const float*, const float*, std::ptrdiff_t,
                                   float*, std::ptrdiff_t) CELLSTEP_NONBLOCKING;
template void dense_forward<double>(std::size_t, std::size_t, std::size_t, const double*, const double*, std::ptrdiff_t,
                                    double*, std::ptrdiff_t) CELLSTEP_NONBLOCKING;
template void pack_dense<float>(std::size_t, std::size_t, MatrixView<float>, const float*, float*);
template void pack_dense<double>(std::size_t, std::size_t, MatrixView<double>, const double*, double*);

}  // namespace core
}  // namespace cellstep
