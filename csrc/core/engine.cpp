#include "core/engine.h"

#include <cstring>

namespace cellstep {
namespace core {

namespace {

/// Rows (steps times batch) of one chunk: enough to use the matrix product, few enough to stay in cache.
constexpr std::size_t chunk_rows = 64;

RecordKind kind_of(const ImageRecord& record) { return static_cast<RecordKind>(record.kind); }

std::size_t chunk_steps(const Image& image, std::size_t steps, std::size_t batch) {
    if (is_bidirectional(image)) return steps;
    const std::size_t chunk = batch < chunk_rows ? chunk_rows / batch : 1;
    return steps < chunk ? steps : chunk;
}

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

/// The buffers of a call, two for rows between records.
template <class T>
struct Buffers {
    T* rows[2];
    T* state;  ///< h and c of one layer and direction
    T* cells;  ///< c of every step of one layer and direction that gives it
    T* layer;  ///< what layer_forward and variant_forward want
    int held;  ///< the buffer of rows that `current` lies in
    const T* current;

    T* other() { return rows[1 - held]; }
    void turn() {
        current = other();
        held = 1 - held;
    }
};

/// One direction over one chunk: x (steps, batch, input_size) contiguous -> its columns of y (steps, batch, outputs).
template <class T>
void run_direction(const LstmLayer<T>& layer, std::size_t place, const ModelRun<T>& run, std::size_t begin,
                   std::size_t steps, const T* x, StateRows<T> h_rows, StateRows<T> c_rows, T* y, Buffers<T>& buffers) {
    const Direction<T>& direction = layer.directions[place];
    const std::ptrdiff_t x_row = static_cast<std::ptrdiff_t>(layer.input_size);
    const std::ptrdiff_t y_row = static_cast<std::ptrdiff_t>(layer.output_size());
    const std::ptrdiff_t batch = static_cast<std::ptrdiff_t>(run.batch);
    std::ptrdiff_t x_step = x_row * batch;
    std::ptrdiff_t y_step = y_row * batch;
    std::ptrdiff_t reset_step = run.reset_step_stride;
    const unsigned char* reset = run.reset ? run.reset + static_cast<std::ptrdiff_t>(begin) * reset_step : nullptr;
    y += place * layer.recurrent_size;
    if (place == 1) {
        const std::ptrdiff_t last = static_cast<std::ptrdiff_t>(steps) - 1;
        x += last * x_step;
        y += last * y_step;
        // A flag parts its step from the one before, so on the way back it counts for that one.
        if (reset) reset += (last + 1) * reset_step;
        x_step = -x_step;
        y_step = -y_step;
        reset_step = -reset_step;
    }
    T* h = buffers.state;
    T* c = h + run.batch * layer.recurrent_size;
    copy_rows<T>(run.batch, layer.recurrent_size, h_rows.data, h_rows.stride, h, layer.recurrent_size);
    copy_rows<T>(run.batch, layer.hidden_size, c_rows.data, c_rows.stride, c, layer.hidden_size);
    if (direction.plain && !reset && !layer.cells) {
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
                          nullptr},
                         buffers.layer);
        copy_rows<T>(run.batch, layer.hidden_size, y + static_cast<std::ptrdiff_t>(steps - 1) * y_step,
                     static_cast<std::size_t>(y_row), h, layer.hidden_size);
    } else {
        LayerMasks<T> masks;
        masks.reset = reset;
        masks.reset_step_stride = reset_step;
        masks.reset_row_stride = run.reset_row_stride;
        masks.reset_first = place;
        masks.initial_h = direction.initial_h;
        masks.initial_c = direction.initial_c;
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
                            layer.cells ? buffers.cells : nullptr,
                            direction.options,
                            masks},
                           buffers.layer);
    }
    if (layer.cells) {
        T* to = y - place * layer.recurrent_size + layer.h_columns() + place * layer.hidden_size;
        for (std::size_t step = 0; step < steps; ++step, to += y_step)
            copy_rows<T>(run.batch, layer.hidden_size, buffers.cells + step * run.batch * layer.hidden_size,
                         layer.hidden_size, to, layer.output_size());
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
            for (std::size_t k = 0; k < inputs; ++k, source += run.x.feature_stride)
                *rows++ = offset ? (*source - offset[k]) * offset[inputs + k] : *source;
        }
    }
}

template <class T>
void run_dense(const Image& image, const ImageRecord& record, std::size_t rows, Buffers<T>& buffers) {
    const std::size_t inputs = record.sizes[0];
    const std::size_t outputs = record.sizes[1];
    T* target = buffers.other();
    dense_forward<T>(rows, inputs, outputs, image.data<T>(record), buffers.current, static_cast<std::ptrdiff_t>(inputs),
                     target, static_cast<std::ptrdiff_t>(outputs));
    apply_activation<T>(activation_at(record, 0), rows, outputs, target);
    buffers.turn();
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

}  // namespace

bool is_bidirectional(const Image& image) {
    for (const ImageRecord& record : image)
        if (kind_of(record) == RecordKind::lstm && (record.flags & LayerFlags::bidirectional)) return true;
    return false;
}

template <class T>
std::size_t model_scratch(const Image& image, std::size_t steps, std::size_t batch) {
    if (steps == 0 || batch == 0) return 0;
    const std::size_t chunk = chunk_steps(image, steps, batch);
    std::size_t layer = 0;
    for (const ImageRecord& record : image) {
        if (kind_of(record) != RecordKind::lstm) continue;
        const std::size_t needed = variant_scratch(chunk, batch, record.sizes[0], record.sizes[1]) +
                                   layer_scratch(chunk, batch, record.sizes[0], record.sizes[1]);
        layer = needed > layer ? needed : layer;
    }
    const UnitCounts units = largest_layers(image);
    return layer + chunk * batch * units.with_cells + 2 * batch * units.all + 2 * chunk * batch * widest_row(image);
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
    const std::size_t chunk = chunk_steps(image, run.steps, run.batch);
    const std::size_t widest = widest_row(image);
    Buffers<T> buffers{};
    buffers.rows[0] = scratch;
    buffers.rows[1] = scratch + chunk * run.batch * widest;
    buffers.state = scratch + 2 * chunk * run.batch * widest;
    const UnitCounts units = largest_layers(image);
    buffers.cells = buffers.state + 2 * run.batch * units.all;
    buffers.layer = buffers.cells + chunk * run.batch * units.with_cells;

    for (std::size_t begin = 0; begin < run.steps; begin += chunk) {
        const std::size_t steps = run.steps - begin < chunk ? run.steps - begin : chunk;
        const bool ends = begin + steps == run.steps;
        const bool answers = run.answers == Answers::every || ends;
        const std::size_t answered = run.answers == Answers::every ? steps : 1;
        buffers.held = 1;
        scale_input<T>(image, run, begin, steps, buffers.other());
        buffers.turn();

        StatePlaces places(image, run.batch);
        StateRows<T> last_h[2] = {};
        StateRows<T> last_c[2] = {};
        LstmLayer<T> layer{};    // the last one so far
        bool recurring = false;  // past the first LSTM layer
        bool picked = false;     // past the last one: buffers.current holds the answered rows alone
        const auto pick = [&] {
            if (picked) return;
            picked = true;
            const std::size_t width = layer.output_size();
            if (run.answers == Answers::last) buffers.current += (steps - 1) * run.batch * width;
            if (run.answers != Answers::hidden) return;
            for (std::size_t place = 0; place < layer.direction_count; ++place) {
                T* to = buffers.other();
                copy_rows<T>(run.batch, layer.recurrent_size, last_h[place].data, last_h[place].stride,
                             to + place * layer.recurrent_size, width);
                if (layer.cells)
                    copy_rows<T>(run.batch, layer.hidden_size, last_c[place].data, last_c[place].stride,
                                 to + layer.h_columns() + place * layer.hidden_size, width);
            }
            buffers.turn();
        };
        for (const ImageRecord& record : image) {
            if (kind_of(record) == RecordKind::dense) {
                if (recurring && !answers) break;
                if (recurring) pick();
                run_dense<T>(image, record, recurring ? answered * run.batch : steps * run.batch, buffers);
            } else if (kind_of(record) == RecordKind::lstm) {
                recurring = true;
                layer = lstm_layer<T>(image, record);
                T* y = buffers.other();
                for (std::size_t place = 0; place < layer.direction_count; ++place) {
                    last_h[place] = places.h(run.h);
                    last_c[place] = places.c(run.c);
                    run_direction<T>(layer, place, run, begin, steps, buffers.current, last_h[place], last_c[place], y,
                                     buffers);
                    places.next(layer.recurrent_size, layer.hidden_size);
                }
                if (layer.residual) add_rows<T>(steps * run.batch, layer, buffers.current, y);
                buffers.turn();
            }
        }
        if (!answers) continue;
        pick();
        const bool every = run.answers == Answers::every;
        write_answers<T>(image, run, every ? begin : run.steps - 1, answered, buffers.current,
                         run.y.data + (every ? static_cast<std::ptrdiff_t>(begin) * run.y.step_stride : 0));
    }
}

template std::size_t model_scratch<float>(const Image&, std::size_t, std::size_t);
template std::size_t model_scratch<double>(const Image&, std::size_t, std::size_t);
template void initial_state<float>(const Image&, std::size_t, float*, float*);
template void initial_state<double>(const Image&, std::size_t, double*, double*);
template void run_model<float>(const Image&, const ModelRun<float>&, float*);
template void run_model<double>(const Image&, const ModelRun<double>&, double*);

}  // namespace core
}  // namespace cellstep
