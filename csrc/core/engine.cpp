#include "core/engine.h"

#include <cstring>

#include "core/denormals.h"

namespace cellstep {
namespace core {

namespace {

RecordKind kind_of(const ImageRecord& record) { return static_cast<RecordKind>(record.kind); }

Activation activation_at(const ImageRecord& record, int place) {
    return static_cast<Activation>(record.activations >> (8 * place) & 255);
}

/// One direction of an LSTM record.
template <class T>
struct Direction {
    const void* packed;
    LayerOptions<T> options;
    const T* initial_h;  ///< null: zero
    const T* initial_c;
    bool plain;  ///< nothing that layer_forward does not know
};

template <class T>
struct LstmLayer {
    std::size_t input_size;
    std::size_t hidden_size;
    std::size_t recurrent_size;
    std::size_t direction_count;
    bool residual;
    bool cells;  ///< gives c behind h
    WeightType weights;
    Direction<T> directions[2];

    std::size_t h_columns() const { return direction_count * recurrent_size; }
    std::size_t output_size() const { return h_columns() + (cells ? direction_count * hidden_size : 0); }
};

template <class T>
LstmLayer<T> lstm_layer(const Image& image, const ImageRecord& record) {
    LstmLayer<T> layer{};
    layer.input_size = record.sizes[0];
    layer.hidden_size = record.sizes[1];
    layer.recurrent_size = record.sizes[2] ? record.sizes[2] : record.sizes[1];
    layer.direction_count = record.flags & LayerFlags::bidirectional ? 2 : 1;
    layer.residual = record.flags & LayerFlags::residual;
    layer.cells = record.flags & LayerFlags::cells;
    const std::size_t units = layer.hidden_size;
    layer.weights = weight_type(record);
    const std::size_t packed =
        static_cast<std::size_t>(packed_bytes<T>(layer.weights, layer.input_size, units, layer.recurrent_size));
    const T* data = image.data<T>(record);
    const auto take = [&data](bool there, std::size_t count) {
        const T* begin = data;
        if (there) data += count;
        return there ? begin : nullptr;
    };
    for (std::size_t place = 0; place < layer.direction_count; ++place) {
        Direction<T>& direction = layer.directions[place];
        LayerOptions<T>& options = direction.options;
        const bool norm = record.flags & LayerFlags::layer_norm;
        const bool initial = record.flags & LayerFlags::initial;
        direction.packed = take(true, packed / sizeof(T));
        options.projection = take(record.sizes[2] != 0, units * layer.recurrent_size);
        options.peephole = take(record.flags & LayerFlags::peephole, 3 * units);
        options.norm_ih = take(norm, 4 * units);
        options.norm_hh = take(norm, 4 * units);
        options.norm_c = take(norm, units);
        options.norm_c_bias = take(norm, units);
        direction.initial_h = take(initial, layer.recurrent_size);
        direction.initial_c = take(initial, units);
        options.coupled = record.flags & LayerFlags::coupled;
        options.gate = activation_at(record, 0);
        options.candidate = activation_at(record, 1);
        options.output = activation_at(record, 2);
    }
    for (std::size_t place = 0; place < layer.direction_count; ++place) {
        Direction<T>& direction = layer.directions[place];
        LayerOptions<T>& options = direction.options;
        options.cell_clip = data[0];
        options.zoneout_h = data[1];
        options.zoneout_c = data[2];
        direction.plain = !options.coupled && !options.projection && !options.peephole && !options.norm_ih &&
                          options.gate == Activation::sigmoid && options.candidate == Activation::tanh &&
                          options.output == Activation::tanh && !(options.cell_clip > T(0)) &&
                          options.zoneout_h == T(0) && options.zoneout_c == T(0);
    }
    return layer;
}

/// Where the state of one layer and direction lies: `batch` rows, `stride` values from one to the next.
template <class T>
struct StateRows {
    T* data;
    std::size_t stride;
};

/// Walks through the states of all layers and directions in order.
class StatePlaces {
public:
    StatePlaces(const Image& image, std::size_t batch) : header_(image.header()), batch_(batch) {}

    template <class T>
    StateRows<T> h(T* state) const {
        return rows(state, header_.h_size, h_at_);
    }
    template <class T>
    StateRows<T> c(T* state) const {
        return rows(state, header_.c_size, c_at_);
    }
    void next(std::size_t h_size, std::size_t c_size) {
        ++row_;
        h_at_ += h_size;
        c_at_ += c_size;
    }

private:
    template <class T>
    StateRows<T> rows(T* state, std::size_t size, std::size_t at) const {
        return {header_.state_layers > 1 ? state + row_ * batch_ * size : state + at, size};
    }

    const ImageHeader& header_;
    std::size_t batch_;
    std::size_t row_ = 0;
    std::size_t h_at_ = 0;
    std::size_t c_at_ = 0;
};

template <class T>
void copy_rows(std::size_t rows, std::size_t width, const T* from, std::size_t from_stride, T* to,
               std::size_t to_stride) {
    for (std::size_t row = 0; row < rows; ++row)
        std::memcpy(to + row * to_stride, from + row * from_stride, width * sizeof(T));
}

template <class T>
void fill(const T* values, std::size_t count, T* target) {
    for (std::size_t at = 0; at < count; ++at) target[at] = values ? values[at] : T(0);
}

/// Widest row between two records.
std::size_t widest_row(const Image& image) {
    std::size_t widest = image.header().input_size;
    for (const ImageRecord& record : image) {
        const bool lstm = kind_of(record) == RecordKind::lstm;
        if (!lstm && kind_of(record) != RecordKind::dense) continue;
        const std::size_t parts = record.flags & LayerFlags::cells ? 4 : 2;
        const std::size_t size = lstm ? parts * record.sizes[1] : record.sizes[1];
        widest = size > widest ? size : widest;
    }
    return widest;
}

/// hidden_size of the largest layer, and of the largest that gives its c.
struct UnitCounts {
    std::size_t all;
    std::size_t with_cells;
};

UnitCounts largest_layers(const Image& image) {
    UnitCounts counts{0, 0};
    for (const ImageRecord& record : image) {
        if (kind_of(record) != RecordKind::lstm) continue;
        const std::size_t units = record.sizes[1];
        if (units > counts.all) counts.all = units;
        if ((record.flags & LayerFlags::cells) && units > counts.with_cells) counts.with_cells = units;
    }
    return counts;
}

/// Memory of one stage while it runs.
template <class T>
struct Workspace {
    T* rows[2];  ///< for rows before the first and behind the last LSTM layer
    T* state;    ///< h and c of a layer and direction
    T* cells;    ///< c of every step of a layer and direction that gives it
    T* layer;    ///< what layer_forward and variant_forward want
};

/// One direction over one chunk: x (steps, batch, input_size) contiguous -> its columns of y (steps, batch, outputs).
template <class T>
void run_direction(const LstmLayer<T>& layer, std::size_t place, const ModelRun<T>& run, std::size_t begin,
                   std::size_t steps, const T* x, StateRows<T> h_rows, StateRows<T> c_rows, T* y,
                   const Workspace<T>& workspace) {
    const Direction<T>& direction = layer.directions[place];
    const std::ptrdiff_t x_row = static_cast<std::ptrdiff_t>(layer.input_size);
    const std::ptrdiff_t y_row = static_cast<std::ptrdiff_t>(layer.output_size());
    const std::ptrdiff_t batch = static_cast<std::ptrdiff_t>(run.batch);
    std::ptrdiff_t x_step = x_row * batch;
    std::ptrdiff_t y_step = y_row * batch;
    LayerMasks<T> masks;
    masks.reset = run.reset ? run.reset + static_cast<std::ptrdiff_t>(begin) * run.reset_step_stride : nullptr;
    masks.reset_step_stride = run.reset_step_stride;
    masks.reset_row_stride = run.reset_row_stride;
    masks.reset_first = place;
    masks.initial_h = direction.initial_h;
    masks.initial_c = direction.initial_c;
    y += place * layer.recurrent_size;
    if (place == 1) {
        const std::ptrdiff_t last = static_cast<std::ptrdiff_t>(steps) - 1;
        x += last * x_step;
        y += last * y_step;
        // A flag parts its step from the one before, so on the way back it counts for that one.
        if (masks.reset) masks.reset += (last + 1) * masks.reset_step_stride;
        x_step = -x_step;
        y_step = -y_step;
        masks.reset_step_stride = -masks.reset_step_stride;
    }
    T* h = workspace.state;
    T* c = h + run.batch * layer.recurrent_size;
    T* cells = layer.cells ? workspace.cells : nullptr;
    copy_rows<T>(run.batch, layer.recurrent_size, h_rows.data, h_rows.stride, h, layer.recurrent_size);
    copy_rows<T>(run.batch, layer.hidden_size, c_rows.data, c_rows.stride, c, layer.hidden_size);
    if (direction.plain) {
        layer_forward<T>({steps,
                          run.batch,
                          layer.input_size,
                          layer.hidden_size,
                          layer.weights,
                          direction.packed,
                          {x, x_step, x_row, 1},
                          h,
                          c,
                          {y, y_step, y_row},
                          nullptr,
                          cells,
                          masks,
                          run.parallel},
                         workspace.layer);
        copy_rows<T>(run.batch, layer.hidden_size, y + static_cast<std::ptrdiff_t>(steps - 1) * y_step,
                     static_cast<std::size_t>(y_row), h, layer.hidden_size);
    } else {
        variant_forward<T>({steps,
                            run.batch,
                            layer.input_size,
                            layer.hidden_size,
                            layer.recurrent_size,
                            layer.weights,
                            direction.packed,
                            {x, x_step, x_row, 1},
                            h,
                            c,
                            {y, y_step, y_row},
                            cells,
                            direction.options,
                            masks},
                           workspace.layer);
    }
    if (cells) {
        T* to = y - place * layer.recurrent_size + layer.h_columns() + place * layer.hidden_size;
        for (std::size_t step = 0; step < steps; ++step, to += y_step)
            copy_rows<T>(run.batch, layer.hidden_size, cells + step * run.batch * layer.hidden_size, layer.hidden_size,
                         to, layer.output_size());
    }
    copy_rows<T>(run.batch, layer.recurrent_size, h, layer.recurrent_size, h_rows.data, h_rows.stride);
    copy_rows<T>(run.batch, layer.hidden_size, c, layer.hidden_size, c_rows.data, c_rows.stride);
}

/// Adds the input of a residual layer to the h that it gave.
template <class T>
void add_rows(std::size_t rows, const LstmLayer<T>& layer, const T* x, T* y) {
    for (std::size_t row = 0; row < rows; ++row, x += layer.input_size, y += layer.output_size())
        for (std::size_t at = 0; at < layer.input_size; ++at) y[at] += x[at];
}

/// x of one chunk as contiguous, scaled rows.
template <class T>
void scale_input(const Image& image, const ModelRun<T>& run, std::size_t begin, std::size_t steps, T* rows) {
    const std::size_t inputs = image.header().input_size;
    const ImageRecord* scaling = image.find(RecordKind::input_scaling);
    const T* offset = scaling ? image.data<T>(*scaling) : nullptr;
    for (std::size_t step = 0; step < steps; ++step) {
        for (std::size_t row = 0; row < run.batch; ++row) {
            const T* source = run.x.data + static_cast<std::ptrdiff_t>(begin + step) * run.x.step_stride +
                              static_cast<std::ptrdiff_t>(row) * run.x.row_stride;
            if (!offset && run.x.feature_stride == 1) {
                std::memcpy(rows, source, inputs * sizeof(T));
                rows += inputs;
                continue;
            }
            for (std::size_t k = 0; k < inputs; ++k, source += run.x.feature_stride)
                *rows++ = offset ? (*source - offset[k]) * offset[inputs + k] : *source;
        }
    }
}

/// The dense layers from `record` on, up to the first record of another kind: rows in, rows out.
template <class T>
const T* run_dense(const Image& image, const ImageRecord* record, std::size_t rows, const T* x,
                   const Workspace<T>& workspace) {
    int held = x == workspace.rows[0] ? 0 : 1;
    for (; record != image.end() && kind_of(*record) == RecordKind::dense; ++record) {
        const std::size_t inputs = record->sizes[0];
        const std::size_t outputs = record->sizes[1];
        T* target = workspace.rows[1 - held];
        dense_forward<T>(rows, inputs, outputs, image.data<T>(*record), x, static_cast<std::ptrdiff_t>(inputs), target,
                         static_cast<std::ptrdiff_t>(outputs));
        apply_activation<T>(activation_at(*record, 0), rows, outputs, target);
        x = target;
        held = 1 - held;
    }
    return x;
}

/// Writes the rows that the heads gave to y: scaled back, and with the skipped columns of x.
template <class T>
void write_answers(const Image& image, const ModelRun<T>& run, std::size_t first, std::size_t steps, const T* rows,
                   T* y) {
    const std::size_t outputs = image.header().output_size;
    const ImageRecord* scaling = image.find(RecordKind::output_scaling);
    const T* offset = scaling ? image.data<T>(*scaling) : nullptr;
    const ImageRecord* skip = image.find(RecordKind::skip);
    const std::uint32_t* columns = skip ? image.data<std::uint32_t>(*skip) : nullptr;
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

/// An LSTM layer with what lies before the first one and behind the last.
template <class T>
struct Stage {
    const ImageRecord* record;
    LstmLayer<T> layer;
    StateRows<T> h[2];
    StateRows<T> c[2];
    bool first;
    bool last;
};

/// How a call is cut up: the rows of the batch into shares, or the layers into a wavefront, or neither, in which case
/// a layer may share its steps and the directions run side by side.
struct Schedule {
    std::size_t row_shares;
    std::size_t chunk;  ///< steps that pass through all layers before the next ones begin
    bool wavefront;     ///< a layer works on a chunk while the one behind it works on the chunk before

    /// Whether each layer runs on one thread.
    bool alone() const { return row_shares > 1 || wavefront; }
};

/// Rows (steps times batch) of a chunk where the batch alone is too small for the matrix product.
constexpr std::size_t chunk_rows = 64;
/// Values that a layer may give in a chunk and still find in cache when the next one reads them.
constexpr std::size_t chunk_values = 1u << 16;
/// Steps from which on a longer chunk saves nothing.
constexpr std::size_t longest_chunk = 64;

/// Multiply-adds that are worth waking another thread for, some 20 us of work.
constexpr std::size_t worth_a_thread = 1u << 20;
/// Weights of a layer that every thread can keep in a cache of its own.
constexpr std::size_t cached_weights = 1u << 18;

Schedule make_schedule(const Image& image, std::size_t steps, std::size_t batch, const Parallel* parallel) {
    const std::size_t kept = chunk_values / (batch * widest_row(image));
    std::size_t chunk = batch < chunk_rows ? chunk_rows / batch : 1;
    if (chunk < kept) chunk = kept < longest_chunk ? kept : longest_chunk;
    Schedule schedule{1, is_bidirectional(image) || steps < chunk ? steps : chunk, false};
    if (!parallel || parallel->threads < 2) return schedule;
    std::size_t layers = 0;
    std::size_t most = 0;   // multiply-adds of the largest layer in one step of one row
    std::size_t least = 0;  // and of the smallest
    for (const ImageRecord& record : image) {
        if (kind_of(record) != RecordKind::lstm) continue;
        const std::size_t inner = record.sizes[2] ? record.sizes[2] : record.sizes[1];
        const std::size_t count = gate_count * record.sizes[1] * (record.sizes[0] + inner);
        most = count > most ? count : most;
        least = layers == 0 || count < least ? count : least;
        ++layers;
    }
    if (batch >= 2 * parallel->threads && most <= cached_weights && most * batch * steps >= 2 * worth_a_thread) {
        schedule.row_shares = parallel->threads;
        return schedule;
    }
    if (is_bidirectional(image) || layers < 2 || most > cached_weights) return schedule;
    // At least four chunks, each worth a thread: with fewer the layers would mostly wait for each other.
    const std::size_t enough = worth_a_thread / (least * batch) + 1;
    if (steps / 4 < enough) return schedule;
    schedule.wavefront = true;
    if (schedule.chunk < enough) schedule.chunk = enough;
    if (schedule.chunk > steps / 4) schedule.chunk = steps / 4;
    return schedule;
}

std::size_t lstm_count(const Image& image) {
    std::size_t count = 0;
    for (const ImageRecord& record : image) count += kind_of(record) == RecordKind::lstm;
    return count;
}

/// Values of memory of one workspace, of the two for the directions of a layer, and of one buffer between layers.
template <class T>
struct Memory {
    std::size_t rows;
    std::size_t direction_state;
    std::size_t direction_cells;
    std::size_t direction_layer;

    Memory(const Image& image, std::size_t chunk, std::size_t batch, const Parallel* parallel) {
        const UnitCounts units = largest_layers(image);
        rows = chunk * batch * widest_row(image);
        direction_state = 2 * batch * units.all;
        direction_cells = chunk * batch * units.with_cells;
        direction_layer = 0;
        for (const ImageRecord& record : image) {
            if (kind_of(record) != RecordKind::lstm) continue;
            const std::size_t plain = layer_scratch(chunk, batch, record.sizes[0], record.sizes[1], parallel);
            const std::size_t options = variant_scratch(chunk, batch, record.sizes[0], record.sizes[1]);
            const std::size_t needed = plain > options ? plain : options;
            direction_layer = needed > direction_layer ? needed : direction_layer;
        }
    }
    std::size_t direction() const { return direction_state + direction_cells + direction_layer; }
    std::size_t workspace(bool bidirectional) const { return 2 * rows + (bidirectional ? 2 : 1) * direction(); }
    Workspace<T> place(T* memory, std::size_t of_direction) const {
        T* own = memory + 2 * rows + of_direction * direction();
        return {{memory, memory + rows}, own, own + direction_state, own + direction_state + direction_cells};
    }
};

template <class T>
Stage<T> make_stage(const Image& image, const ModelRun<T>& run, std::size_t index) {
    StatePlaces places(image, run.state_batch);
    Stage<T> stage{};
    for (const ImageRecord& record : image) {
        if (kind_of(record) != RecordKind::lstm) continue;
        stage.record = &record;
        stage.layer = lstm_layer<T>(image, record);
        for (std::size_t place = 0; place < stage.layer.direction_count; ++place) {
            stage.h[place] = places.h(run.h);
            stage.c[place] = places.c(run.c);
            places.next(stage.layer.recurrent_size, stage.layer.hidden_size);
        }
        if (index-- == 0) break;
    }
    const ImageRecord* next = stage.record + 1;
    stage.last = next == image.end() || kind_of(*next) != RecordKind::lstm;
    stage.first = stage.record == image.begin() || kind_of(stage.record[-1]) != RecordKind::lstm;
    return stage;
}

/// What the heads see of one chunk: the rows that are answered, from y or from the last state.
template <class T>
const T* answered_rows(const Stage<T>& stage, const ModelRun<T>& run, std::size_t steps, const T* y, T* rows) {
    const LstmLayer<T>& layer = stage.layer;
    const std::size_t width = layer.output_size();
    if (run.answers == Answers::every) return y;
    if (run.answers == Answers::last) return y + (steps - 1) * run.batch * width;
    for (std::size_t place = 0; place < layer.direction_count; ++place) {
        copy_rows<T>(run.batch, layer.recurrent_size, stage.h[place].data, stage.h[place].stride,
                     rows + place * layer.recurrent_size, width);
        if (layer.cells)
            copy_rows<T>(run.batch, layer.hidden_size, stage.c[place].data, stage.c[place].stride,
                         rows + layer.h_columns() + place * layer.hidden_size, width);
    }
    return rows;
}

/// One stage over the steps from `begin` on: x, what the stage before it gave, to y.
template <class T>
void run_stage(const Image& image, const ModelRun<T>& run, const Stage<T>& stage, std::size_t begin, std::size_t steps,
               const T* x, T* y, const Memory<T>& memory, T* work) {
    const LstmLayer<T>& layer = stage.layer;
    const Workspace<T> workspace = memory.place(work, 0);
    if (stage.first) {
        scale_input<T>(image, run, begin, steps, workspace.rows[0]);
        const ImageRecord* encoder = stage.record;
        while (encoder != image.begin() && kind_of(encoder[-1]) == RecordKind::dense) --encoder;
        x = run_dense<T>(image, encoder, steps * run.batch, workspace.rows[0], workspace);
    }
    // Each direction on a thread of its own shares no step of it.
    ModelRun<T> alone = run;
    const bool side_by_side =
        layer.direction_count == 2 && run.parallel &&
        gate_count * layer.hidden_size * (layer.input_size + layer.recurrent_size) * steps * run.batch >=
            worth_a_thread;
    if (side_by_side) alone.parallel = nullptr;
    for_each(side_by_side ? run.parallel : nullptr, layer.direction_count, [&](std::size_t place) {
        const FlushDenormals flush;
        run_direction<T>(layer, place, alone, begin, steps, x, stage.h[place], stage.c[place], y,
                         memory.place(work, place));
    });
    if (layer.residual) add_rows<T>(steps * run.batch, layer, x, y);
    const bool every = run.answers == Answers::every;
    if (!stage.last || (!every && begin + steps < run.steps)) return;
    const std::size_t answered = every ? steps : 1;
    const T* rows = answered_rows<T>(stage, run, steps, y, workspace.rows[0]);
    rows = run_dense<T>(image, stage.record + 1, answered * run.batch, rows, workspace);
    write_answers<T>(image, run, every ? begin : run.steps - 1, answered, rows,
                     run.y.data + (every ? static_cast<std::ptrdiff_t>(begin) * run.y.step_stride : 0));
}

/// One share of the rows, chunk by chunk.
template <class T>
void run_rows(const Image& image, const ModelRun<T>& run, const Schedule& schedule, T* scratch) {
    const FlushDenormals flush;
    const std::size_t layers = lstm_count(image);
    const Memory<T> memory(image, schedule.chunk, run.batch, schedule.alone() ? nullptr : run.parallel);
    const std::size_t work = memory.workspace(is_bidirectional(image));
    const std::size_t chunks = (run.steps + schedule.chunk - 1) / schedule.chunk;
    const auto visit = [&](std::size_t layer, std::size_t chunk, const T* x, T* y, T* space, const ModelRun<T>& as) {
        const std::size_t begin = chunk * schedule.chunk;
        const std::size_t left = run.steps - begin;
        run_stage<T>(image, as, make_stage<T>(image, as, layer), begin, left < schedule.chunk ? left : schedule.chunk,
                     x, y, memory, space);
    };
    if (!schedule.wavefront) {
        T* const between = scratch + work;
        for (std::size_t chunk = 0; chunk < chunks; ++chunk)
            for (std::size_t layer = 0; layer < layers; ++layer)
                visit(layer, chunk, between + (layer + 1) % 2 * memory.rows, between + layer % 2 * memory.rows, scratch,
                      run);
        return;
    }
    // At each turn layer l works on the chunk that layer l - 1 worked on at the turn before; each has two buffers for
    // what it gives, one of which the layer behind it is reading.
    ModelRun<T> alone = run;
    alone.parallel = nullptr;
    T* const between = scratch + layers * work;
    const auto buffer = [&](std::size_t layer, std::size_t chunk) {
        return between + (2 * layer + chunk % 2) * memory.rows;
    };
    for (std::size_t turn = 0; turn < chunks + layers - 1; ++turn) {
        const std::size_t first = turn < chunks ? 0 : turn - chunks + 1;
        const std::size_t last = turn < layers ? turn : layers - 1;
        for_each(run.parallel, last - first + 1, [&](std::size_t at) {
            const FlushDenormals flush_here;
            const std::size_t layer = first + at;
            const std::size_t chunk = turn - layer;
            visit(layer, chunk, layer > 0 ? buffer(layer - 1, chunk) : nullptr, buffer(layer, chunk),
                  scratch + layer * work, alone);
        });
    }
}

/// Values of scratch memory of one share of the rows.
template <class T>
std::size_t rows_scratch(const Image& image, const Schedule& schedule, std::size_t batch, const Parallel* parallel) {
    const Memory<T> memory(image, schedule.chunk, batch, schedule.alone() ? nullptr : parallel);
    const std::size_t layers = schedule.wavefront ? lstm_count(image) : 1;
    return layers * (memory.workspace(is_bidirectional(image)) + 2 * memory.rows);
}

std::size_t rows_of_share(std::size_t batch, std::size_t shares) { return (batch + shares - 1) / shares; }

}  // namespace

bool is_bidirectional(const Image& image) {
    for (const ImageRecord& record : image)
        if (kind_of(record) == RecordKind::lstm && (record.flags & LayerFlags::bidirectional)) return true;
    return false;
}

template <class T>
std::size_t model_scratch(const Image& image, std::size_t steps, std::size_t batch, const Parallel* parallel) {
    if (steps == 0 || batch == 0) return 0;
    const Schedule schedule = make_schedule(image, steps, batch, parallel);
    return schedule.row_shares * rows_scratch<T>(image, schedule, rows_of_share(batch, schedule.row_shares), parallel);
}

template <class T>
void initial_state(const Image& image, std::size_t batch, T* h, T* c) {
    StatePlaces places(image, batch);
    for (const ImageRecord& record : image) {
        if (kind_of(record) != RecordKind::lstm) continue;
        const LstmLayer<T> layer = lstm_layer<T>(image, record);
        for (std::size_t place = 0; place < layer.direction_count; ++place) {
            const StateRows<T> h_rows = places.h(h);
            const StateRows<T> c_rows = places.c(c);
            for (std::size_t row = 0; row < batch; ++row) {
                fill<T>(layer.directions[place].initial_h, layer.recurrent_size, h_rows.data + row * h_rows.stride);
                fill<T>(layer.directions[place].initial_c, layer.hidden_size, c_rows.data + row * c_rows.stride);
            }
            places.next(layer.recurrent_size, layer.hidden_size);
        }
    }
}

template <class T>
void run_model(const Image& image, const ModelRun<T>& run, T* scratch) {
    if (run.steps == 0 || run.batch == 0) return;
    const Schedule schedule = make_schedule(image, run.steps, run.batch, run.parallel);
    if (schedule.row_shares == 1) return run_rows<T>(image, run, schedule, scratch);
    const std::size_t rows = rows_of_share(run.batch, schedule.row_shares);
    const std::size_t memory = rows_scratch<T>(image, schedule, rows, run.parallel);
    for_each(run.parallel, schedule.row_shares, [&](std::size_t share) {
        const std::size_t first = share * rows;
        if (first >= run.batch) return;
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(first);
        ModelRun<T> part = run;
        part.batch = run.batch - first < rows ? run.batch - first : rows;
        part.x.data += at * run.x.row_stride;
        part.y.data += at * run.y.row_stride;
        part.h += first * image.header().h_size;
        part.c += first * image.header().c_size;
        if (part.reset) part.reset += at * run.reset_row_stride;
        part.parallel = nullptr;
        run_rows<T>(image, part, schedule, scratch + share * memory);
    });
}

template std::size_t model_scratch<float>(const Image&, std::size_t, std::size_t, const Parallel*);
template std::size_t model_scratch<double>(const Image&, std::size_t, std::size_t, const Parallel*);
template void initial_state<float>(const Image&, std::size_t, float*, float*);
template void initial_state<double>(const Image&, std::size_t, double*, double*);
template void run_model<float>(const Image&, const ModelRun<float>&, float*);
template void run_model<double>(const Image&, const ModelRun<double>&, double*);

}  // namespace core
}  // namespace cellstep
