#include "core/engine.h"

#include <cstring>

#include "core/denormals.h"
#include "core/model.h"

namespace cellstep {
namespace core {

namespace {

template <class T>
void copy_rows(std::size_t rows, std::size_t width, const T* from, std::size_t from_stride, T* to,
               std::size_t to_stride) {
    for (std::size_t row = 0; row < rows; ++row)
        std::memcpy(to + row * to_stride, from + row * from_stride, width * sizeof(T));
}

/// Rows (steps times batch) of a chunk where the batch alone is too small for the matrix product.
constexpr std::size_t chunk_rows = 64;
/// Values that a layer may give in a chunk and still find in cache when the next one reads them.
constexpr std::size_t chunk_values = 1u << 16;
/// Steps from which on a longer chunk saves nothing.
constexpr std::size_t longest_chunk = 64;

/// Steps of a chunk where each layer's weights push those of the others out of the cache: the next layer's come back
/// but once in so many steps.
constexpr std::size_t chunk_of_large_layers = 16;
/// Multiply-adds that are worth waking another thread for, some 20 us of work.
constexpr std::size_t worth_a_thread = 1u << 20;
/// Multiply-adds that take as long as what a step of a layer does beside them.
constexpr std::size_t beside_a_step = 2000;
/// Weights of a layer that every thread can keep in a cache of its own.
constexpr std::size_t cached_weights = 1u << 18;

/// Values in a cache line, to which memory is rounded up.
template <class T>
constexpr std::uint64_t whole_lines(std::uint64_t values) {
    constexpr std::uint64_t line = 64 / sizeof(T);
    return (values + line - 1) / line * line;
}

/// How calls are cut up, and the memory that they want: the rows of the batch in shares, or the layers as a wavefront,
/// or neither, in which case a layer may share its steps and the directions run side by side.
template <class T>
struct Layout {
    std::size_t layers = 0;
    bool bidirectional = false;
    std::size_t row_shares = 1;
    std::size_t rows;      ///< of a share
    std::size_t chunk;     ///< steps that pass through all layers before the next ones begin
    std::size_t wave = 0;  ///< least steps that a chunk must have in a wavefront, in which a layer works on a chunk
                           ///< while the one behind it works on the chunk before; 0: there is none

    std::size_t between;    ///< values of one buffer for the rows between records
    std::size_t state;      ///< of h and c of a layer and direction
    std::size_t direction;  ///< of all that a direction wants
    std::size_t cells;      ///< of c of every step of a layer and direction that gives it
    std::size_t workspace;  ///< of what a layer wants while it runs
    std::size_t share;      ///< of what a share of the rows wants
    std::uint64_t scratch;  ///< of all shares, also where size_t cannot hold it

    /// For calls of `batch` rows and at most `steps` steps.
    Layout(const Image& image, std::size_t steps, std::size_t batch, const Parallel* parallel) {
        // In 64 bits, in which no product of sizes that a file may name overflows.
        using Count = std::uint64_t;
        Count widest = image.header().input_size;
        Count units = 0;             // of the largest layer
        Count units_with_cells = 0;  // of the largest that gives its c
        Count most = 0;              // multiply-adds of the largest layer in one step of one row
        Count least = 0;             // and of the smallest
        const auto larger = [](Count a, Count b) { return a > b ? a : b; };
        for (const ImageRecord& record : image) {
            const Count size = record.sizes[1];
            if (kind_of(record) == RecordKind::dense) widest = larger(widest, size);
            if (kind_of(record) != RecordKind::lstm) continue;
            const bool gives_cells = record.flags & LayerFlags::cells;
            const Count directions = record.flags & LayerFlags::bidirectional ? 2 : 1;
            widest = larger(widest, (gives_cells ? 2 : 1) * directions * size);
            units = larger(units, size);
            if (gives_cells) units_with_cells = larger(units_with_cells, size);
            const Count count = gate_count * size * (record.sizes[0] + (record.sizes[2] ? record.sizes[2] : size));
            most = larger(most, count);
            least = layers == 0 || count < least ? count : least;
            bidirectional = bidirectional || (record.flags & LayerFlags::bidirectional);
            ++layers;
        }
        const std::size_t kept = static_cast<std::size_t>(chunk_values / (batch * widest));
        chunk = batch < chunk_rows ? chunk_rows / batch : 1;
        if (chunk < kept) chunk = kept < longest_chunk ? kept : longest_chunk;
        if (most > cached_weights && chunk < chunk_of_large_layers) chunk = chunk_of_large_layers;
        if (bidirectional || steps < chunk) chunk = steps;
        Count longest = chunk;
        if (parallel && parallel->threads > 1) {
            const bool cached = most <= cached_weights;
            if (batch / 2 >= parallel->threads && cached && most * batch * steps >= 2 * worth_a_thread) {
                row_shares = parallel->threads;
            } else if (!bidirectional && layers > 1 && cached) {
                wave = static_cast<std::size_t>(worth_a_thread / ((least + beside_a_step) * batch) + 1);
                longest = larger(chunk, wave);
            }
        }
        const Parallel* of_layers = row_shares > 1 ? nullptr : parallel;
        rows = (batch + row_shares - 1) / row_shares;
        const Count between_values = whole_lines<T>(longest * rows * widest);
        const Count state_values = whole_lines<T>(2 * rows * units);
        const Count cell_values = whole_lines<T>(longest * rows * units_with_cells);
        Count layer_values = 0;
        for (const ImageRecord& record : image) {
            if (kind_of(record) != RecordKind::lstm) continue;
            layer_values =
                larger(layer_values, layer_scratch(longest, rows, record.sizes[0], record.sizes[1], of_layers));
            layer_values = larger(layer_values, variant_scratch(longest, rows, record.sizes[0], record.sizes[1]));
        }
        const Count direction_values = state_values + cell_values + whole_lines<T>(layer_values);
        const Count workspace_values = 2 * between_values + (bidirectional ? 2 : 1) * direction_values;
        const Count share_values = (wave ? layers : 1) * (workspace_values + 2 * between_values);
        between = static_cast<std::size_t>(between_values);
        state = static_cast<std::size_t>(state_values);
        cells = static_cast<std::size_t>(cell_values);
        direction = static_cast<std::size_t>(direction_values);
        workspace = static_cast<std::size_t>(workspace_values);
        share = static_cast<std::size_t>(share_values);
        scratch = row_shares * share_values;
    }

    /// Whether a call runs as a wavefront: it has at least four chunks, each worth a thread. With fewer the layers
    /// would mostly wait for each other.
    bool is_wave(std::size_t steps) const { return wave && steps / 4 >= wave; }
    std::size_t chunk_of(std::size_t steps) const {
        if (!is_wave(steps)) return chunk;
        const std::size_t long_enough = chunk < wave ? wave : chunk;
        return long_enough < steps / 4 ? long_enough : steps / 4;
    }
};

/// An LSTM layer, the places of its state, and whether it is the first or the last.
template <class T>
struct Stage {
    LstmLayer<T> layer;
    StatePlace places[2];
    Step<T> step;  ///< of one row, but for what each call brings, if the layer is plain and has one direction
    bool first;
    bool last;
};

/// Memory of one stage while it runs.
template <class T>
struct Workspace {
    T* rows[2];  ///< for rows before the first and behind the last LSTM layer
    T* state;    ///< h and c of a layer and direction
    T* cells;    ///< c of every step of a layer and direction that gives it
    T* layer;    ///< what layer_forward and variant_forward want

    Workspace(const Layout<T>& layout, T* memory, std::size_t place)
        : rows{memory, memory + layout.between},
          state(memory + 2 * layout.between + place * layout.direction),
          cells(state + layout.state),
          layer(cells + layout.cells) {}
};

/// Whether rows of `width` values lie one behind the other, step by step.
bool is_contiguous(std::ptrdiff_t step_stride, std::ptrdiff_t row_stride, std::size_t batch, std::size_t width) {
    const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(width);
    return step_stride == row * static_cast<std::ptrdiff_t>(batch) && (batch == 1 || row_stride == row);
}

/// Where the kernels may work on the rows of a state themselves.
template <class T>
bool in_place(const StateRows<T>& rows, std::size_t batch, std::size_t width) {
    return batch == 1 || rows.stride == width;
}

}  // namespace

/// Aligned as the stages are, which lie behind it, also where pointers take four bytes.
template <class T>
struct alignas(8) Plan {
    Image image;
    Layout<T> layout;
    const ImageRecord* encoder;  ///< the dense layers before the first LSTM layer, and the end of them
    const ImageRecord* encoder_end;
    const ImageRecord* head;  ///< the dense layers behind the last one
    const ImageRecord* head_end;
    const T* input_scaling;  ///< offsets, then scales, or null
    const T* output_scaling;
    const std::uint32_t* skip;  ///< columns of x, or null
    Stage<T>* stages;
    bool single_steps;             ///< whether run_single_step knows all of its layers
    std::size_t prepared_sums[2];  ///< where the sums of a direction begin in what prepare_step gives
    std::size_t prepared_size;
};

namespace {

/// Input of a layer in one chunk: rows of x, and what prepare_step made of them, or null.
template <class T>
struct LayerInput {
    SequenceView<T> x;
    const T* prepared;
};

/// One direction over one chunk: x (steps, batch, input_size) -> its columns of y (steps, batch, outputs).
template <class T>
void run_direction(const Plan<T>& plan, const Stage<T>& stage, std::size_t place, const ModelRun<T>& run,
                   const Parallel* parallel, std::size_t begin, std::size_t steps, const LayerInput<T>& input, T* y,
                   const Workspace<T>& workspace) {
    const LstmLayer<T>& layer = stage.layer;
    const Direction<T>& direction = layer.directions[place];
    const ImageHeader& header = plan.image.header();
    const StateRows<T> h_rows = stage.places[place].h(header, run.h, run.state_batch);
    const StateRows<T> c_rows = stage.places[place].c(header, run.c, run.state_batch);
    const std::ptrdiff_t y_row = static_cast<std::ptrdiff_t>(layer.output_size());
    std::ptrdiff_t y_step = y_row * static_cast<std::ptrdiff_t>(run.batch);
    SequenceView<T> x = input.x;
    LayerMasks<T> masks;
    masks.reset = run.reset ? run.reset + static_cast<std::ptrdiff_t>(begin) * run.reset_step_stride : nullptr;
    masks.reset_step_stride = run.reset_step_stride;
    masks.reset_row_stride = run.reset_row_stride;
    masks.reset_first = place;
    masks.initial_h = direction.initial_h;
    masks.initial_c = direction.initial_c;
    InputSums<T> sums;
    if (input.prepared) {
        sums.data = input.prepared + plan.prepared_sums[place];
        sums.step_stride = static_cast<std::ptrdiff_t>(plan.prepared_size);
    }
    y += place * layer.recurrent_size;
    if (place == 1) {
        const std::ptrdiff_t last = static_cast<std::ptrdiff_t>(steps) - 1;
        x.data += last * x.step_stride;
        y += last * y_step;
        if (sums.data) sums.data += last * sums.step_stride;
        // A flag parts its step from the one before, so on the way back it counts for that one.
        if (masks.reset) masks.reset += (last + 1) * masks.reset_step_stride;
        x.step_stride = -x.step_stride;
        y_step = -y_step;
        sums.step_stride = -sums.step_stride;
        masks.reset_step_stride = -masks.reset_step_stride;
    }
    const bool own_h = !in_place(h_rows, run.batch, layer.recurrent_size);
    const bool own_c = !in_place(c_rows, run.batch, layer.hidden_size);
    T* h = own_h ? workspace.state : h_rows.data;
    T* c = own_c ? workspace.state + run.batch * layer.recurrent_size : c_rows.data;
    T* cells = layer.cells ? workspace.cells : nullptr;
    if (own_h) copy_rows<T>(run.batch, layer.recurrent_size, h_rows.data, h_rows.stride, h, layer.recurrent_size);
    if (own_c) copy_rows<T>(run.batch, layer.hidden_size, c_rows.data, c_rows.stride, c, layer.hidden_size);
    if (direction.plain) {
        layer_forward<T>({steps,
                          run.batch,
                          layer.input_size,
                          layer.hidden_size,
                          layer.weights,
                          direction.packed,
                          x,
                          h,
                          c,
                          {y, y_step, y_row},
                          nullptr,
                          cells,
                          masks,
                          parallel,
                          sums,
                          direction.options.fast},
                         workspace.layer);
        copy_rows<T>(run.batch, layer.hidden_size, y + static_cast<std::ptrdiff_t>(steps - 1) * y_step,
                     static_cast<std::size_t>(y_row), h_rows.data, h_rows.stride);
    } else {
        variant_forward<T>({steps,
                            run.batch,
                            layer.input_size,
                            layer.hidden_size,
                            layer.recurrent_size,
                            layer.weights,
                            direction.packed,
                            x,
                            h,
                            c,
                            {y, y_step, y_row},
                            cells,
                            direction.options,
                            masks,
                            sums},
                           workspace.layer);
        if (own_h) copy_rows<T>(run.batch, layer.recurrent_size, h, layer.recurrent_size, h_rows.data, h_rows.stride);
    }
    if (cells) {
        T* to = y - place * layer.recurrent_size + layer.h_columns() + place * layer.hidden_size;
        for (std::size_t step = 0; step < steps; ++step, to += y_step)
            copy_rows<T>(run.batch, layer.hidden_size, cells + step * run.batch * layer.hidden_size, layer.hidden_size,
                         to, layer.output_size());
    }
    if (own_c) copy_rows<T>(run.batch, layer.hidden_size, c, layer.hidden_size, c_rows.data, c_rows.stride);
}

/// Adds the input of a residual layer to the h that it gave.
template <class T>
void add_rows(std::size_t steps, std::size_t batch, const LstmLayer<T>& layer, const SequenceView<T>& x, T* y) {
    for (std::size_t step = 0; step < steps; ++step) {
        for (std::size_t row = 0; row < batch; ++row, y += layer.output_size()) {
            const T* source = x.data + static_cast<std::ptrdiff_t>(step) * x.step_stride +
                              static_cast<std::ptrdiff_t>(row) * x.row_stride;
            for (std::size_t at = 0; at < layer.input_size; ++at) y[at] += source[at];
        }
    }
}

/// x less the offsets, times the scales that lie behind them.
template <class T>
void scale_row(std::size_t count, const T* __restrict x, const T* __restrict offset, T* __restrict scaled) {
    const T* __restrict scale = offset + count;
    for (std::size_t k = 0; k < count; ++k) scaled[k] = (x[k] - offset[k]) * scale[k];
}

/// x as contiguous, scaled rows.
template <class T>
void scale_input(const Plan<T>& plan, const SequenceView<T>& x, std::size_t steps, std::size_t batch, T* rows) {
    const std::size_t inputs = plan.image.header().input_size;
    const T* offset = plan.input_scaling;
    for (std::size_t step = 0; step < steps; ++step) {
        for (std::size_t row = 0; row < batch; ++row) {
            const T* source = x.data + static_cast<std::ptrdiff_t>(step) * x.step_stride +
                              static_cast<std::ptrdiff_t>(row) * x.row_stride;
            if (x.feature_stride == 1) {
                if (offset)
                    scale_row<T>(inputs, source, offset, rows);
                else
                    std::memcpy(rows, source, inputs * sizeof(T));
                rows += inputs;
                continue;
            }
            for (std::size_t k = 0; k < inputs; ++k, source += x.feature_stride)
                *rows++ = offset ? (*source - offset[k]) * offset[inputs + k] : *source;
        }
    }
}

/// Dense layers: rows in, rows out, which lie in the first or the second of `buffers`; x may lie in the first.
template <class T>
const T* run_dense(const Image& image, const ImageRecord* begin, const ImageRecord* end, std::size_t rows, const T* x,
                   T* const (&buffers)[2]) {
    int held = x == buffers[0] ? 0 : 1;
    for (const ImageRecord* record = begin; record != end; ++record) {
        const std::size_t inputs = record->sizes[0];
        const std::size_t outputs = record->sizes[1];
        T* target = buffers[1 - held];
        dense_forward<T>(rows, inputs, outputs, image.data<T>(*record), x, static_cast<std::ptrdiff_t>(inputs), target,
                         static_cast<std::ptrdiff_t>(outputs));
        apply_activation<T>(activation_at(*record, 0), rows, outputs, target);
        x = target;
        held = 1 - held;
    }
    return x;
}

/// What the first LSTM layer sees of x: as contiguous rows, if anything happens to it before or it does not lie so.
template <class T>
SequenceView<T> encoded(const Plan<T>& plan, const SequenceView<T>& x, std::size_t steps, std::size_t batch,
                        T* const (&buffers)[2]) {
    const std::size_t inputs = plan.image.header().input_size;
    const bool encodes = plan.encoder != plan.encoder_end;
    if (!plan.input_scaling && !encodes && x.feature_stride == 1 &&
        is_contiguous(x.step_stride, x.row_stride, batch, inputs))
        return x;
    scale_input<T>(plan, x, steps, batch, buffers[0]);
    const T* rows = run_dense<T>(plan.image, plan.encoder, plan.encoder_end, steps * batch, buffers[0], buffers);
    const std::ptrdiff_t width = static_cast<std::ptrdiff_t>(plan.stages[0].layer.input_size);
    return {rows, width * static_cast<std::ptrdiff_t>(batch), width, 1};
}

/// Writes the rows that the heads gave to y: scaled back, and with the skipped columns of x.
template <class T>
void write_answers(const Plan<T>& plan, const ModelRun<T>& run, std::size_t first, std::size_t steps, const T* rows,
                   T* y) {
    const std::size_t outputs = plan.image.header().output_size;
    const T* offset = plan.output_scaling;
    const std::uint32_t* columns = plan.skip;
    if (!offset && !columns && (is_contiguous(run.y.step_stride, run.y.row_stride, run.batch, outputs)))
        return void(std::memcpy(y, rows, steps * run.batch * outputs * sizeof(T)));
    for (std::size_t step = 0; step < steps; ++step) {
        for (std::size_t row = 0; row < run.batch; ++row, rows += outputs) {
            T* target = y + static_cast<std::ptrdiff_t>(step) * run.y.step_stride +
                        static_cast<std::ptrdiff_t>(row) * run.y.row_stride;
            if (!offset && !columns) {
                std::memcpy(target, rows, outputs * sizeof(T));
                continue;
            }
            const T* x = run.x.data + static_cast<std::ptrdiff_t>(first + step) * run.x.step_stride +
                         static_cast<std::ptrdiff_t>(row) * run.x.row_stride;
            for (std::size_t k = 0; k < outputs; ++k) {
                T value = offset ? rows[k] * offset[outputs + k] + offset[k] : rows[k];
                if (columns) value += x[static_cast<std::ptrdiff_t>(columns[k]) * run.x.feature_stride];
                target[k] = value;
            }
        }
    }
}

/// What the heads see of one chunk: the rows that are answered, from y or from the last state.
template <class T>
const T* answered_rows(const Plan<T>& plan, const Stage<T>& stage, const ModelRun<T>& run, std::size_t steps,
                       const T* y, T* rows) {
    const LstmLayer<T>& layer = stage.layer;
    const std::size_t width = layer.output_size();
    if (run.answers == Answers::every) return y;
    if (run.answers == Answers::last) return y + (steps - 1) * run.batch * width;
    for (std::size_t place = 0; place < layer.direction_count; ++place) {
        const StateRows<T> h = stage.places[place].h(plan.image.header(), run.h, run.state_batch);
        const StateRows<T> c = stage.places[place].c(plan.image.header(), run.c, run.state_batch);
        copy_rows<T>(run.batch, layer.recurrent_size, h.data, h.stride, rows + place * layer.recurrent_size, width);
        if (layer.cells)
            copy_rows<T>(run.batch, layer.hidden_size, c.data, c.stride,
                         rows + layer.h_columns() + place * layer.hidden_size, width);
    }
    return rows;
}

/// One stage over the steps from `begin` on: x, what the stage before it gave, to y.
template <class T>
void run_stage(const Plan<T>& plan, const Stage<T>& stage, const ModelRun<T>& run, const Parallel* parallel,
               std::size_t begin, std::size_t steps, const T* x, T* y, T* work) {
    const LstmLayer<T>& layer = stage.layer;
    const Workspace<T> workspace(plan.layout, work, 0);
    const std::ptrdiff_t width = static_cast<std::ptrdiff_t>(layer.input_size);
    LayerInput<T> input{{x, width * static_cast<std::ptrdiff_t>(run.batch), width, 1}, nullptr};
    if (stage.first && run.prepared) {
        const std::ptrdiff_t prepared = static_cast<std::ptrdiff_t>(plan.prepared_size);
        input.prepared = run.prepared + begin * plan.prepared_size;
        input.x = {input.prepared, prepared, prepared, 1};
    } else if (stage.first) {
        SequenceView<T> view = run.x;
        view.data += static_cast<std::ptrdiff_t>(begin) * view.step_stride;
        input.x = encoded<T>(plan, view, steps, run.batch, workspace.rows);
    }
    // Each direction on a thread of its own shares no step of it.
    const bool side_by_side =
        layer.direction_count == 2 && parallel &&
        gate_count * layer.hidden_size * (layer.input_size + layer.recurrent_size) * steps * run.batch >=
            worth_a_thread;
    for_each(side_by_side ? parallel : nullptr, layer.direction_count, [&](std::size_t place) {
        const FlushDenormals flush;
        run_direction<T>(plan, stage, place, run, side_by_side ? nullptr : parallel, begin, steps, input, y,
                         Workspace<T>(plan.layout, work, place));
    });
    if (layer.residual) add_rows<T>(steps, run.batch, layer, input.x, y);
    const bool every = run.answers == Answers::every;
    if (!stage.last || (!every && begin + steps < run.steps)) return;
    const std::size_t answered = every ? steps : 1;
    const T* rows = answered_rows<T>(plan, stage, run, steps, y, workspace.rows[0]);
    rows = run_dense<T>(plan.image, plan.head, plan.head_end, answered * run.batch, rows, workspace.rows);
    write_answers<T>(plan, run, every ? begin : run.steps - 1, answered, rows,
                     run.y.data + (every ? static_cast<std::ptrdiff_t>(begin) * run.y.step_stride : 0));
}

/// One step of one row through plain layers of one direction: what run_rows would do, without the ways of a sequence.
template <class T>
void run_single_step(const Plan<T>& plan, const ModelRun<T>& run, T* scratch) {
    const FlushDenormals flush;
    const Layout<T>& layout = plan.layout;
    const ImageHeader& header = plan.image.header();
    const Workspace<T> workspace(layout, scratch, 0);
    T* const between = scratch + layout.workspace;
    const T* x = encoded<T>(plan, run.x, 1, 1, workspace.rows).data;
    const Stage<T>* const last = plan.stages + layout.layers - 1;
    for (const Stage<T>* stage = plan.stages;; ++stage) {
        Step<T> step = stage->step;
        T* const h = stage->places[0].h(header, run.h, run.state_batch).data;
        T* const c = stage->places[0].c(header, run.c, run.state_batch).data;
        T* const y = between + (stage - plan.stages) % 2 * static_cast<std::ptrdiff_t>(layout.between);
        step.x = x;
        step.h = h;
        step.h_next = y;
        step.c = c;
        step.c_next = c;
        step.scratch = workspace.layer;
        layer_step<T>(step, run.parallel);
        std::memcpy(h, y, step.hidden_size * sizeof(T));
        if (stage->layer.residual)
            for (std::size_t at = 0; at < step.hidden_size; ++at) y[at] += x[at];
        x = y;
        if (stage == last) break;
    }
    const T* rows = answered_rows<T>(plan, *last, run, 1, x, workspace.rows[0]);
    rows = run_dense<T>(plan.image, plan.head, plan.head_end, 1, rows, workspace.rows);
    write_answers<T>(plan, run, 0, 1, rows, run.y.data);
}

/// One share of the rows, chunk by chunk.
template <class T>
void run_rows(const Plan<T>& plan, const ModelRun<T>& run, const Parallel* parallel, T* scratch) {
    const FlushDenormals flush;
    const Layout<T>& layout = plan.layout;
    const std::size_t layers = layout.layers;
    const std::size_t chunk_steps = layout.chunk_of(run.steps);
    const auto visit = [&](std::size_t layer, std::size_t begin, const T* x, T* y, T* work, const Parallel* threads) {
        const std::size_t left = run.steps - begin;
        run_stage<T>(plan, plan.stages[layer], run, threads, begin, left < chunk_steps ? left : chunk_steps, x, y,
                     work);
    };
    if (!layout.is_wave(run.steps)) {
        T* const between = scratch + layout.workspace;
        for (std::size_t begin = 0; begin < run.steps; begin += chunk_steps)
            for (std::size_t layer = 0; layer < layers; ++layer)
                visit(layer, begin, between + (layer + 1) % 2 * layout.between, between + layer % 2 * layout.between,
                      scratch, parallel);
        return;
    }
    // At each turn layer l works on the chunk that layer l - 1 worked on at the turn before; each has two buffers for
    // what it gives, one of which the layer behind it is reading.
    const std::size_t chunks = (run.steps + chunk_steps - 1) / chunk_steps;
    T* const between = scratch + layers * layout.workspace;
    const auto buffer = [&](std::size_t layer, std::size_t chunk) {
        return between + (2 * layer + chunk % 2) * layout.between;
    };
    for (std::size_t turn = 0; turn < chunks + layers - 1; ++turn) {
        const std::size_t first = turn < chunks ? 0 : turn - chunks + 1;
        const std::size_t last = turn < layers ? turn : layers - 1;
        for_each(parallel, last - first + 1, [&](std::size_t at) {
            const FlushDenormals flush_here;
            const std::size_t layer = first + at;
            const std::size_t chunk = turn - layer;
            visit(layer, chunk * chunk_steps, layer > 0 ? buffer(layer - 1, chunk) : nullptr, buffer(layer, chunk),
                  scratch + layer * layout.workspace, nullptr);
        });
    }
}

template <class T>
std::size_t bytes_of_plan(std::size_t layers) {
    return sizeof(Plan<T>) + layers * sizeof(Stage<T>);
}

/// Values that a plan takes at the begin of scratch memory of unknown alignment.
template <class T>
std::size_t plan_values(std::size_t layers) {
    return static_cast<std::size_t>(whole_lines<T>(bytes_of_plan<T>(layers) / sizeof(T) + 1)) + 64 / sizeof(T);
}

}  // namespace

template <class T>
std::size_t plan_bytes(const Image& image) {
    std::size_t layers = 0;
    for (const ImageRecord& record : image) layers += kind_of(record) == RecordKind::lstm;
    return bytes_of_plan<T>(layers);
}

template <class T>
const Plan<T>* make_plan(const Image& image, std::size_t steps, std::size_t batch, const Parallel* parallel,
                         void* memory) CELLSTEP_NONBLOCKING {
    static_assert(sizeof(Plan<T>) % alignof(Stage<T>) == 0, "the stages lie behind the plan");
    Plan<T>* plan = static_cast<Plan<T>*>(memory);
    Stage<T>* stages = reinterpret_cast<Stage<T>*>(plan + 1);
    const auto scaling = [&image](RecordKind kind) {
        const ImageRecord* record = image.find(kind);
        return record ? image.data<T>(*record) : nullptr;
    };
    const ImageRecord* skip = image.find(RecordKind::skip);
    *plan = {image,
             Layout<T>(image, steps, batch, parallel),
             nullptr,
             nullptr,
             nullptr,
             nullptr,
             scaling(RecordKind::input_scaling),
             scaling(RecordKind::output_scaling),
             skip ? image.data<std::uint32_t>(*skip) : nullptr,
             stages,
             true,
             {0, 0},
             0};
    StatePlace place;
    std::size_t index = 0;
    for (const ImageRecord* record = image.begin(); record != image.end(); ++record) {
        if (kind_of(*record) == RecordKind::dense) {
            const ImageRecord*& begin = index ? plan->head : plan->encoder;
            (index ? plan->head_end : plan->encoder_end) = record + 1;
            if (!begin) begin = record;
        }
        if (kind_of(*record) != RecordKind::lstm) continue;
        Stage<T>& stage = stages[index];
        stage = {lstm_layer<T>(image, *record), {}, {}, index == 0, index + 1 == plan->layout.layers};
        const LstmLayer<T>& layer = stage.layer;
        plan->single_steps =
            plan->single_steps && layer.direction_count == 1 && layer.directions[0].plain && !layer.cells;
        stage.step.rows = 1;
        stage.step.input_size = layer.input_size;
        stage.step.hidden_size = layer.hidden_size;
        stage.step.recurrent_size = layer.hidden_size;
        stage.step.last_unit = layer.hidden_size;
        stage.step.weights = layer.weights;
        stage.step.fast = layer.directions[0].options.fast;
        stage.step.packed = layer.directions[0].packed;
        ++index;
        for (std::size_t at = 0; at < layer.direction_count; ++at) {
            stage.places[at] = place;
            place.next(layer.recurrent_size, layer.hidden_size);
        }
    }
    const LstmLayer<T>& layer = stages[0].layer;
    plan->prepared_size = static_cast<std::size_t>(prepared_size<T>(image));
    plan->prepared_sums[0] = static_cast<std::size_t>(whole_lines<T>(layer.input_size));
    plan->prepared_sums[1] = (plan->prepared_sums[0] + plan->prepared_size) / 2;  // the second of two alike
    return plan;
}

template <class T>
std::uint64_t plan_scratch(const Image& image, std::size_t steps, std::size_t batch, const Parallel* parallel) {
    return Layout<T>(image, steps, batch, parallel).scratch;
}

template <class T>
std::uint64_t prepared_size(const Image& image) CELLSTEP_NONBLOCKING {
    const ImageRecord& record = *image.find(RecordKind::lstm);
    const std::uint64_t sums = whole_lines<T>(gate_count * padded_size(record.sizes[1]));
    return whole_lines<T>(record.sizes[0]) + (record.flags & LayerFlags::bidirectional ? 2 : 1) * sums;
}

template <class T>
void prepare_step(const Plan<T>& plan, const T* x, T* prepared, T* scratch) CELLSTEP_NONBLOCKING {
    const FlushDenormals flush;
    const LstmLayer<T>& layer = plan.stages[0].layer;
    const Workspace<T> workspace(plan.layout, scratch, 0);
    const std::ptrdiff_t inputs = static_cast<std::ptrdiff_t>(plan.image.header().input_size);
    const SequenceView<T> seen = encoded<T>(plan, {x, inputs, inputs, 1}, 1, 1, workspace.rows);
    std::memcpy(prepared, seen.data, layer.input_size * sizeof(T));
    for (std::size_t place = 0; place < layer.direction_count; ++place) {
        const Direction<T>& direction = layer.directions[place];
        project_row<T>(layer.weights, direction.packed, layer.input_size, layer.hidden_size, layer.recurrent_size,
                       !direction.options.norm_ih, prepared, prepared + plan.prepared_sums[place], workspace.layer);
    }
}

template <class T>
void run_model(const Plan<T>& plan, const ModelRun<T>& run, T* scratch) CELLSTEP_NONBLOCKING {
    if (run.steps == 0 || run.batch == 0) return;
    const Layout<T>& layout = plan.layout;
    if (plan.single_steps && run.steps == 1 && run.batch == 1 && !run.reset && !run.prepared)
        return run_single_step<T>(plan, run, scratch);
    if (layout.row_shares == 1) return run_rows<T>(plan, run, run.parallel, scratch);
    for_each(run.parallel, layout.row_shares, [&](std::size_t share) {
        const std::size_t first = share * layout.rows;
        if (first >= run.batch) return;
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(first);
        ModelRun<T> part = run;
        part.batch = run.batch - first < layout.rows ? run.batch - first : layout.rows;
        part.x.data += at * run.x.row_stride;
        part.y.data += at * run.y.row_stride;
        part.h += first * plan.image.header().h_size;
        part.c += first * plan.image.header().c_size;
        if (part.reset) part.reset += at * run.reset_row_stride;
        run_rows<T>(plan, part, nullptr, scratch + share * layout.share);
    });
}

template <class T>
std::size_t model_scratch(const Image& image, std::size_t steps, std::size_t batch, const Parallel* parallel) {
    if (steps == 0 || batch == 0) return 0;
    const Layout<T> layout(image, steps, batch, parallel);
    return plan_values<T>(layout.layers) + static_cast<std::size_t>(layout.scratch);
}

template <class T>
void run_model(const Image& image, const ModelRun<T>& run, T* scratch) CELLSTEP_NONBLOCKING {
    if (run.steps == 0 || run.batch == 0) return;
    T* memory = scratch;
    while (reinterpret_cast<std::uintptr_t>(memory) % 64) ++memory;
    const Plan<T>* plan = make_plan<T>(image, run.steps, run.batch, run.parallel, memory);
    run_model<T>(*plan, run, memory + plan_values<T>(plan->layout.layers) - 64 / sizeof(T));
}

#define CELLSTEP_INSTANTIATE(T)                                                                          \
    template std::size_t plan_bytes<T>(const Image&);                                                    \
    template const Plan<T>* make_plan<T>(const Image&, std::size_t, std::size_t, const Parallel*, void*) \
        CELLSTEP_NONBLOCKING;                                                                            \
    template std::uint64_t plan_scratch<T>(const Image&, std::size_t, std::size_t, const Parallel*);     \
    template std::uint64_t prepared_size<T>(const Image&) CELLSTEP_NONBLOCKING;                          \
    template void prepare_step<T>(const Plan<T>&, const T*, T*, T*) CELLSTEP_NONBLOCKING;                \
    template void run_model<T>(const Plan<T>&, const ModelRun<T>&, T*) CELLSTEP_NONBLOCKING;             \
    template std::size_t model_scratch<T>(const Image&, std::size_t, std::size_t, const Parallel*);      \
    template void initial_state<T>(const Image&, std::size_t, T*, T*) CELLSTEP_NONBLOCKING;              \
    template void run_model<T>(const Image&, const ModelRun<T>&, T*) CELLSTEP_NONBLOCKING;
CELLSTEP_INSTANTIATE(float)
CELLSTEP_INSTANTIATE(double)
#undef CELLSTEP_INSTANTIATE

}  // namespace core
}  // namespace cellstep
