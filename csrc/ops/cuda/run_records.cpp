#include <cstring>
#include <vector>

#include "core/image.h"
#include "layers.h"
#include "operators.h"
#include "variant.h"

namespace cellstep {
namespace cuda {

using namespace ops;

namespace {

using core::ImageRecord;
using core::RecordKind;

constexpr std::int64_t word_bytes = 8;
constexpr std::int64_t words_of_a_record = sizeof(ImageRecord) / word_bytes;
constexpr std::int64_t constants = 3;  // of an LSTM: cell_clip, zoneout of h and of c

/// Packed weights begin at whole lines of so many values, as torch's own memory does.
constexpr std::int64_t line = 64;

/// One direction of an LSTM record: bytes of the image on the device, and what is unpacked of them.
struct Direction {
    const unsigned char* packed = nullptr;
    const unsigned char* projection = nullptr;  // null: none, like the rest
    const unsigned char* peephole = nullptr;
    const unsigned char* norm_ih = nullptr;
    const unsigned char* norm_hh = nullptr;
    const unsigned char* norm_c = nullptr;
    const unsigned char* norm_c_bias = nullptr;
    const unsigned char* initial_h = nullptr;
    const unsigned char* initial_c = nullptr;
    Maybe weight_ih, weight_hh, bias, weight_hr;
    std::int64_t state = 0;  // its number among all
    std::int64_t h_at = 0;   // values of h and c of those before it
    std::int64_t c_at = 0;
};

/// An LSTM record.
struct Layer {
    const ImageRecord* record;
    std::int64_t input_size;
    std::int64_t hidden_size;
    std::int64_t recurrent_size;
    std::uint32_t flags;
    double cell_clip;
    double zoneout_h;
    double zoneout_c;
    bool plain;  // what lstm_layers runs
    std::vector<Direction> directions;

    bool has(std::uint32_t flag) const { return flags & flag; }
    std::int64_t direction_count() const { return static_cast<std::int64_t>(directions.size()); }
    std::int64_t h_columns() const { return direction_count() * recurrent_size; }
    std::int64_t output_size() const {
        return h_columns() + (has(core::LayerFlags::cells) ? direction_count() * hidden_size : 0);
    }
    Activation activation(int place) const { return static_cast<Activation>(record->activations >> (8 * place) & 255); }
};

/// A model as its records tell it.
struct Model {
    core::Image records;
    const unsigned char* image;  // on the device
    std::vector<Layer> layers;
    std::vector<const ImageRecord*> encoder;
    std::vector<const ImageRecord*> heads;

    const core::ImageHeader& header() const { return records.header(); }
    const unsigned char* data(RecordKind kind) const {
        const ImageRecord* record = records.find(kind);
        return record ? image + record->offset : nullptr;
    }
};

template <class T>
const T* values(const unsigned char* bytes) {
    return reinterpret_cast<const T*>(bytes);
}

double number(std::int64_t word) {
    double value = 0;
    std::memcpy(&value, &word, sizeof(value));
    return value;
}

template <class T>
std::vector<Direction> directions_of(const ImageRecord& record, const unsigned char* bytes, Direction* next) {
    const std::int64_t units = record.sizes[1], recurrent = core::recurrent_size(record);
    const std::uint32_t flags = core::layer_flags(record);
    const unsigned char* at = bytes + record.offset;
    const auto take = [&at](bool there, std::uint64_t count) -> const unsigned char* {
        const unsigned char* begin = at;
        if (!there) return nullptr;
        at += count;
        return begin;
    };
    constexpr std::int64_t size = sizeof(T);
    std::vector<Direction> directions;
    for (std::uint32_t place = 0; place < core::direction_count(record); ++place) {
        Direction d = *next;
        const bool norm = flags & core::LayerFlags::layer_norm, initial = flags & core::LayerFlags::initial;
        const auto value_count = [&](std::int64_t count) { return static_cast<std::uint64_t>(count * size); };
        d.packed = take(true, core::packed_bytes<T>(core::weight_type(record), record.sizes[0], record.sizes[1],
                                                    static_cast<std::uint64_t>(recurrent)));
        d.projection = take(recurrent != units, value_count(units * recurrent));
        d.peephole = take(flags & core::LayerFlags::peephole, value_count(3 * units));
        d.norm_ih = take(norm, value_count(4 * units));
        d.norm_hh = take(norm, value_count(4 * units));
        d.norm_c = take(norm, value_count(units));
        d.norm_c_bias = take(norm, value_count(units));
        d.initial_h = take(initial, value_count(recurrent));
        d.initial_c = take(initial, value_count(units));
        directions.push_back(d);
        ++next->state;
        next->h_at += recurrent;
        next->c_at += units;
    }
    return directions;
}

/// What the words say of the image, checked.
Model read_model(const char* op, const std::vector<std::int64_t>& words, const Tensor& image, const Tensor& x) {
    if (!is_together(image, x) || image.scalar_type() != ScalarType::Byte || image.dim() != 1 || !image.is_contiguous())
        fail(op, ": expected image as the uint8 bytes of a deploy file on x's device, got ", dtype_text(image),
             " of shape ", shape_text(image), ": move it there as it is");
    const auto* bytes = static_cast<const unsigned char*>(image.const_data_ptr());
    if (reinterpret_cast<std::uintptr_t>(bytes) % word_bytes)
        fail(op, ": expected image aligned to 8 bytes, got a view that is not: copy it with .clone()");
    Model model;
    core::ImageStatus status = core::ImageStatus::length;
    if (!words.empty())
        status = core::open_records(words.data(), words.size() * word_bytes, static_cast<std::uint64_t>(image.numel()),
                                    &model.records);
    if (status != core::ImageStatus::ok) fail(op, ": ", core::image_status_text(status));
    if ((model.header().dtype == 0) != is_float(x))
        fail(op, ": expected x of ", model.header().dtype == 0 ? "float32" : "float64", " like the model, got ",
             dtype_text(x), ": convert it");
    model.image = bytes;
    std::size_t lstms = 0;
    for (const ImageRecord& record : model.records)
        lstms += record.kind == static_cast<std::uint32_t>(RecordKind::lstm);
    const std::size_t first = static_cast<std::size_t>(words_of_a_record) * (1 + model.header().record_count);
    if (words.size() != first + constants * lstms)
        fail(op, ": expected records of ", first + constants * lstms, " words, the header, ",
             model.header().record_count, " records and three constants of each LSTM, got ", words.size(),
             ": make them of the same file");
    const std::int64_t* constant = words.data() + first;
    Direction next;
    for (const ImageRecord& record : model.records) {
        const auto kind = static_cast<RecordKind>(record.kind);
        if (kind == RecordKind::dense) (model.layers.empty() ? model.encoder : model.heads).push_back(&record);
        if (kind != RecordKind::lstm) continue;
        Layer layer{&record,
                    record.sizes[0],
                    record.sizes[1],
                    core::recurrent_size(record),
                    core::layer_flags(record),
                    number(constant[0]),
                    number(constant[1]),
                    number(constant[2]),
                    false,
                    {}};
        constant += constants;
        layer.directions =
            is_float(x) ? directions_of<float>(record, bytes, &next) : directions_of<double>(record, bytes, &next);
        constexpr std::uint32_t options = core::LayerFlags::peephole | core::LayerFlags::layer_norm |
                                          core::LayerFlags::coupled | core::LayerFlags::cells;
        layer.plain = !layer.has(options) && layer.recurrent_size == layer.hidden_size &&
                      layer.activation(0) == Activation::sigmoid && layer.activation(1) == Activation::tanh &&
                      layer.activation(2) == Activation::tanh && !(layer.cell_clip > 0) && layer.zoneout_h == 0 &&
                      layer.zoneout_c == 0;
        model.layers.push_back(std::move(layer));
    }
    return model;
}

/// Layers that lstm_layers runs in one call.
struct Group {
    std::size_t begin;
    std::size_t end;
};

Group group_from(const Model& model, std::size_t begin) {
    const Layer& first = model.layers[begin];
    std::size_t end = begin + 1;
    const auto joins = [&](const Layer& layer) {
        return layer.plain && !layer.has(core::LayerFlags::residual) && layer.hidden_size == first.hidden_size &&
               layer.directions.size() == first.directions.size();
    };
    if (joins(first))
        while (end < model.layers.size() && joins(model.layers[end])) ++end;
    return {begin, end};
}

/// One call: what was given, and what a part of it left for the next.
template <class T>
struct Run {
    const char* op;
    const Model& model;
    Tensor x;  // (N, T, I)
    std::int64_t batch;
    std::int64_t steps;
    Maybe lengths;
    Maybe reset;  // (N, T)
    Tensor h;     // (S, N, h_size), what the call begins with
    Tensor c;
    Tensor h_n;
    Tensor c_n;
    const Device& device;
    void* stream = device.stream();
    CopyStates<T> results{batch, 0, {}};  // states that are still to be copied to h_n and c_n
    std::vector<Tensor> kept{};           // memory that the launches to come read

    void check(const char* error) const { check_launch(op, error); }

    Tensor rows(std::int64_t count, std::int64_t width) {
        kept.push_back(empty(x, {count, width}));
        return kept.back();
    }

    /// Where a direction's h or c lies in a state, and from row to row of it.
    Rows<T> h_rows(const Tensor& state, const Direction& d) const {
        const std::int64_t size = model.header().h_size;
        return {mutable_data<T>(state) + (model.header().state_layers > 1 ? d.state * batch * size : d.h_at), 0, size};
    }
    Rows<T> c_rows(const Tensor& state, const Direction& d) const {
        const std::int64_t size = model.header().c_size;
        return {mutable_data<T>(state) + (model.header().state_layers > 1 ? d.state * batch * size : d.c_at), 0, size};
    }

    void add(CopyStates<T>& copies, const StateRows<T>& state) {
        copies.states[copies.count++] = state;
        if (copies.count == states_at_once) flush(copies);
    }
    void flush(CopyStates<T>& copies) {
        check(copy_states<T>(copies, stream));
        copies.count = 0;
    }

    void begin_state(bool given);
    Tensor prepare_all();
    Tensor run_group(const Group& group, const Tensor& seen, Maybe& last_h);
    Tensor run_options(const Layer& layer, const Tensor& seen, bool last, Maybe& last_h);
    void answer(const Tensor& seen, const Maybe& last_h, core::Answers answers, const Tensor& y);
};

/// The model's own state where none was given.
template <class T>
void Run<T>::begin_state(bool given) {
    if (given) return;
    CopyStates<T> copies{batch, 0, {}};
    for (const Layer& layer : model.layers) {
        for (const Direction& d : layer.directions) {
            const Rows<T> to_h = h_rows(h, d), to_c = c_rows(c, d);
            add(copies, {values<T>(d.initial_h), 0, to_h.data, to_h.row, layer.recurrent_size});
            add(copies, {values<T>(d.initial_c), 0, to_c.data, to_c.row, layer.hidden_size});
        }
    }
    flush(copies);
}

/// Dense rows with nothing before or behind them.
template <class T>
DenseRows<T> dense_rows(std::int64_t batch, std::int64_t steps, std::int64_t inputs, const Rows<const T>& x) {
    DenseRows<T> rows{};
    rows.batch = batch;
    rows.steps = steps;
    rows.inputs = rows.outputs = rows.part = inputs;
    rows.x = x;
    rows.feature = 1;
    return rows;
}

template <class T>
void set_layer(DenseRows<T>& rows, const Model& model, const ImageRecord& record) {
    rows.outputs = record.sizes[1];
    rows.weights = values<T>(model.image + record.offset);
    rows.activation = static_cast<Activation>(record.activations & 255);
}

/// Unpacks all weights, and runs what stands before the LSTM layers, the first of it in the same launch. -> what the
/// first layer sees, (T, N, I).
template <class T>
Tensor Run<T>::prepare_all() {
    const auto lined = [](std::int64_t count) { return (count + line - 1) / line * line; };
    std::int64_t total = 0;
    for (const Layer& layer : model.layers) {
        const std::int64_t rows = (layer.has(core::LayerFlags::coupled) ? 3 : 4) * layer.hidden_size;
        total += layer.direction_count() * (lined(rows * layer.input_size) + lined(rows * layer.recurrent_size) +
                                            2 * lined(rows) + lined(layer.hidden_size * layer.recurrent_size));
    }
    const Tensor memory = empty(x, {total});
    kept.push_back(memory);
    std::int64_t used = 0;
    const auto matrix_of = [&](std::int64_t count, std::int64_t columns) {
        const Tensor view = ops::view_of(memory, {count, columns}, {columns, 1}, used);
        used += lined(count * columns);
        return view;
    };
    const auto vector_of = [&](std::int64_t count) {
        const Tensor view = ops::view_of(memory, {count}, {1}, used);
        used += lined(count);
        return view;
    };

    Prepare<T> call{};
    const unsigned char* scaling = model.data(RecordKind::input_scaling);
    const std::int64_t inputs = model.header().input_size;
    Tensor seen = torch::stable::transpose(x, 0, 1);
    Rows<const T> at{data<T>(x), x.stride(1), x.stride(0)};
    const auto target = [&](DenseRows<T>& rows) {
        seen = empty(x, {steps, batch, rows.outputs});
        kept.push_back(seen);
        rows.y = {mutable_data<T>(seen), batch * rows.outputs, rows.outputs};
        at = {data<T>(seen), batch * rows.outputs, rows.outputs};
    };
    std::size_t done = 0;  // layers of the encoder
    if (scaling || !model.encoder.empty()) {
        call.rows = dense_rows<T>(batch, steps, inputs, at);
        call.rows.feature = x.stride(2);
        call.rows.scaling = values<T>(scaling);
        if (!model.encoder.empty()) set_layer(call.rows, model, *model.encoder[done++]);
        target(call.rows);
    }
    const auto start = [&] {
        check(prepare<T>(call, stream));
        call.unpacks = 0;
        call.rows = {};
    };
    for (const Layer& constant : model.layers) {
        Layer& layer = const_cast<Layer&>(constant);
        const bool coupled = layer.has(core::LayerFlags::coupled);
        const std::int64_t rows = (coupled ? 3 : 4) * layer.hidden_size;
        for (Direction& d : layer.directions) {
            d.weight_ih = matrix_of(rows, layer.input_size);
            d.weight_hh = matrix_of(rows, layer.recurrent_size);
            d.bias = vector_of(rows);
            if (d.projection) d.weight_hr = matrix_of(layer.recurrent_size, layer.hidden_size);
            Unpack<T>& unpack = call.unpack[call.unpacks++];
            unpack = {};
            unpack.packed = d.packed;
            unpack.stored = static_cast<Stored>(core::weight_type(*layer.record));
            unpack.coupled = coupled;
            unpack.input_size = layer.input_size;
            unpack.hidden_size = layer.hidden_size;
            unpack.recurrent_size = layer.recurrent_size;
            unpack.weight_ih = mutable_data<T>(*d.weight_ih);
            unpack.weight_hh = mutable_data<T>(*d.weight_hh);
            unpack.bias = mutable_data<T>(*d.bias);
            unpack.projection = values<T>(d.projection);
            unpack.weight_hr = d.weight_hr ? mutable_data<T>(*d.weight_hr) : nullptr;
            if (call.unpacks == unpacks_at_once) start();
        }
    }
    if (call.unpacks > 0 || call.rows.batch > 0) start();
    for (; done < model.encoder.size(); ++done) {
        call.rows = dense_rows<T>(batch, steps, model.encoder[done]->sizes[0], at);
        set_layer(call.rows, model, *model.encoder[done]);
        target(call.rows);
        start();
    }
    return seen;
}

/// Plain layers; last_h is what the heads see of the last one's state, (L D, N, H).
template <class T>
Tensor Run<T>::run_group(const Group& group, const Tensor& seen, Maybe& last_h) {
    const Layer& first = model.layers[group.begin];
    const std::int64_t units = first.hidden_size, directions = first.direction_count();
    const std::int64_t count = directions * static_cast<std::int64_t>(group.end - group.begin);
    const std::int64_t begin = first.directions[0].state;
    const bool uniform = model.header().state_layers > 1 || model.header().h_size == units;
    const bool whole = uniform && count == static_cast<std::int64_t>(model.header().state_layers);
    std::vector<Weights> weights;
    bool initial = false;
    for (std::size_t at = group.begin; at < group.end; ++at) {
        initial = initial || model.layers[at].has(core::LayerFlags::initial);
        for (const Direction& d : model.layers[at].directions)
            weights.push_back({*d.weight_ih, *d.weight_hh, d.bias, std::nullopt});
    }
    Tensor h_0 = h, c_0 = c;
    Maybe initial_h, initial_c;
    CopyStates<T> copies{batch, 0, {}};
    const auto each = [&](const auto& visit) {
        std::int64_t stage = 0;
        for (std::size_t at = group.begin; at < group.end; ++at)
            for (const Direction& d : model.layers[at].directions) visit(d, stage++);
    };
    if (uniform && !whole) {
        h_0 = ops::view_of(h, {count, batch, units}, {batch * units, units, 1}, begin * batch * units);
        c_0 = ops::view_of(c, {count, batch, units}, {batch * units, units, 1}, begin * batch * units);
    } else if (!uniform) {
        h_0 = empty(x, {count, batch, units});
        c_0 = empty(x, {count, batch, units});
        each([&](const Direction& d, std::int64_t stage) {
            const Rows<T> from_h = h_rows(h, d), from_c = c_rows(c, d);
            const std::int64_t at = stage * batch * units;
            add(copies, {from_h.data, from_h.row, mutable_data<T>(h_0) + at, units, units});
            add(copies, {from_c.data, from_c.row, mutable_data<T>(c_0) + at, units, units});
        });
        flush(copies);
    }
    if (reset && initial) {
        initial_h = empty(x, {count, units});
        initial_c = empty(x, {count, units});
        CopyStates<T> rows{1, 0, {}};  // one row, whatever the batch
        each([&](const Direction& d, std::int64_t stage) {
            add(rows, {values<T>(d.initial_h), 0, mutable_data<T>(*initial_h) + stage * units, 0, units});
            add(rows, {values<T>(d.initial_c), 0, mutable_data<T>(*initial_c) + stage * units, 0, units});
        });
        flush(rows);
    }
    const Maybe flags = reset ? Maybe(torch::stable::transpose(*reset, 0, 1)) : std::nullopt;
    const Stack stack{padded(op, device, steps, batch, lengths, flags),
                      static_cast<int>(group.end - group.begin),
                      static_cast<int>(directions),
                      false,
                      std::move(weights),
                      std::nullopt,
                      as_rows(seen),
                      h_0,
                      c_0,
                      initial_h,
                      initial_c};
    const auto [y, h_end, c_end, outputs, gates, cells] = forward(op, device, stack, false, false);
    kept.insert(kept.end(), {y, h_end, c_end});
    if (whole) {
        h_n = h_end;
        c_n = c_end;
    } else {
        each([&](const Direction& d, std::int64_t stage) {
            const Rows<T> to_h = h_rows(h_n, d), to_c = c_rows(c_n, d);
            const std::int64_t at = stage * batch * units;
            add(results, {data<T>(h_end) + at, units, to_h.data, to_h.row, units});
            add(results, {data<T>(c_end) + at, units, to_c.data, to_c.row, units});
        });
    }
    last_h = ops::view_of(h_end, {directions, batch, units}, {batch * units, units, 1},
                          (count - directions) * batch * units);
    const std::int64_t width = directions * units;
    if (first.has(core::LayerFlags::residual)) {
        const Tensor source = as_contiguous(seen);
        kept.push_back(source);
        check(add_rows<T>({batch, steps, width, data<T>(source), {mutable_data<T>(y), batch * width, width}}, stream));
    }
    return ops::view_of(y, {steps, batch, width}, {batch * width, width, 1});
}

/// A layer with options; last_h is what the heads see of its state, (1, N, output_size), if it is the last.
template <class T>
Tensor Run<T>::run_options(const Layer& layer, const Tensor& seen, bool last, Maybe& last_h) {
    const std::int64_t width = layer.output_size(), units = layer.hidden_size, recurrent = layer.recurrent_size;
    const Tensor y = empty(x, {steps, batch, width});
    const Tensor source = as_contiguous(seen);
    kept.insert(kept.end(), {y, source});
    const Tensor inputs = ops::view_of(source, {steps * batch, layer.input_size}, {layer.input_size, 1});
    CopyStates<T> copies{batch, 0, {}};
    std::vector<Tensor> h_now, c_now;
    for (const Direction& d : layer.directions) {
        const Rows<T> from_h = h_rows(h, d), from_c = c_rows(c, d);
        h_now.push_back(rows(batch, recurrent));
        c_now.push_back(rows(batch, units));
        add(copies, {from_h.data, from_h.row, mutable_data<T>(h_now.back()), recurrent, recurrent});
        add(copies, {from_c.data, from_c.row, mutable_data<T>(c_now.back()), units, units});
    }
    flush(copies);
    if (last) last_h = rows(batch, width);
    for (std::size_t place = 0; place < layer.directions.size(); ++place) {
        const Direction& d = layer.directions[place];
        const std::int64_t index = static_cast<std::int64_t>(place);
        VariantStep<T> step{};
        step.batch = batch;
        step.hidden_size = units;
        step.recurrent_size = recurrent;
        step.coupled = layer.has(core::LayerFlags::coupled);
        step.gate = layer.activation(0);
        step.candidate = layer.activation(1);
        step.output = layer.activation(2);
        step.cell_clip = static_cast<T>(layer.cell_clip);
        step.zoneout_h = static_cast<T>(layer.zoneout_h);
        step.zoneout_c = static_cast<T>(layer.zoneout_c);
        step.bias_ih = data<T>(*d.bias);
        step.peephole = values<T>(d.peephole);
        step.norm_hh = values<T>(d.norm_hh);
        step.norm_c = values<T>(d.norm_c);
        step.norm_c_bias = values<T>(d.norm_c_bias);
        step.expanded = true;
        step.initial_h = values<T>(d.initial_h);
        step.initial_c = values<T>(d.initial_c);
        step.lengths = lengths ? data<std::int64_t>(*lengths) : nullptr;
        step.reset_row = reset ? reset->stride(0) : 0;
        step.h = mutable_data<T>(h_now[place]);
        step.c = mutable_data<T>(c_now[place]);
        step.y = {mutable_data<T>(y) + index * recurrent, batch * width, width};
        if (layer.has(core::LayerFlags::cells))
            step.cells = {mutable_data<T>(y) + layer.h_columns() + index * units, batch * width, width};
        const Tensor sums = rows(steps * batch, d.weight_ih->size(0));
        multiply(inputs, torch::stable::transpose(*d.weight_ih, 0, 1), sums);
        run_variant<T>(op,
                       {step, steps, place == 1, sums, values<T>(d.norm_ih), *d.weight_hh, d.weight_hr,
                        rows(batch, recurrent), rows(batch, units), reset ? data<unsigned char>(*reset) : nullptr,
                        reset ? reset->stride(1) : 0, device.multiprocessors()},
                       stream);
        const Rows<T> to_h = h_rows(h_n, d), to_c = c_rows(c_n, d);
        add(results, {step.h, recurrent, to_h.data, to_h.row, recurrent});
        add(results, {step.c, units, to_c.data, to_c.row, units});
        if (!last) continue;
        T* to = mutable_data<T>(*last_h);
        add(results, {step.h, recurrent, to + index * recurrent, width, recurrent});
        if (layer.has(core::LayerFlags::cells))
            add(results, {step.c, units, to + layer.h_columns() + index * units, width, units});
    }
    if (layer.has(core::LayerFlags::residual))
        check(add_rows<T>(
            {batch, steps, layer.h_columns(), data<T>(source), {mutable_data<T>(y), batch * width, width}}, stream));
    return y;
}

/// Heads, output scaling and skip: from the outputs of the last layer, or from its state.
template <class T>
void Run<T>::answer(const Tensor& seen, const Maybe& last_h, core::Answers answers, const Tensor& y) {
    const Layer& layer = model.layers.back();
    const bool every = answers == core::Answers::every;
    const std::int64_t width = layer.output_size(), answered = every ? steps : 1;
    const std::int64_t outputs = model.header().output_size;
    DenseRows<T> call = dense_rows<T>(batch, answered, width, {data<T>(seen), batch * width, width});
    if (answers == core::Answers::hidden) {
        const std::int64_t piece = last_h->size(last_h->dim() - 1);
        call.x = {data<T>(*last_h), 0, piece};
        call.part = piece;
        call.part_stride = batch * piece;
    }
    for (std::size_t at = 0;; ++at) {
        if (at < model.heads.size()) set_layer(call, model, *model.heads[at]);
        call.lengths = lengths ? data<std::int64_t>(*lengths) : nullptr;
        call.last_step = steps - 1;
        const bool last = at + 1 >= model.heads.size();
        if (last) {
            call.output_scaling = values<T>(model.data(RecordKind::output_scaling));
            call.columns = values<std::uint32_t>(model.data(RecordKind::skip));
            call.skipped = {data<T>(x), x.stride(1), x.stride(0)};
            call.skipped_feature = x.stride(2);
            call.skipped_columns = model.header().input_size;
            call.y = {mutable_data<T>(y), outputs, answered * outputs};
        } else {
            const Tensor between = rows(answered * batch, call.outputs);
            call.y = {mutable_data<T>(between), batch * call.outputs, call.outputs};
        }
        Prepare<T> argument{};
        argument.rows = call;
        check(prepare<T>(argument, stream));
        if (last) return;
        call =
            dense_rows<T>(batch, answered, call.outputs, {call.y.data, every ? batch * call.outputs : 0, call.outputs});
    }
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> run(const char* op, const Model& model, const Tensor& x, const Maybe& h,
                                       const Maybe& c, core::Answers answers, const Maybe& lengths, const Maybe& reset,
                                       const Device& device) {
    const core::ImageHeader& header = model.header();
    const std::int64_t batch = x.size(0), steps = x.size(1), states = header.state_layers;
    const auto state = [&](std::int64_t size) { return empty(x, {states, batch, size}); };
    const std::int64_t outputs = header.output_size;
    const bool every = answers == core::Answers::every;
    Run<T> run{op,
               model,
               x,
               batch,
               steps,
               lengths,
               reset,
               h ? as_contiguous(*h) : state(header.h_size),
               c ? as_contiguous(*c) : state(header.c_size),
               state(header.h_size),
               state(header.c_size),
               device};
    Tensor y = every ? empty(x, {batch, steps, outputs}) : empty(x, {batch, outputs});
    if (batch == 0) return {y, run.h_n, run.c_n};
    run.begin_state(h.has_value());
    Tensor seen = run.prepare_all();
    Maybe last_h;
    for (std::size_t at = 0; at < model.layers.size();) {
        const Layer& layer = model.layers[at];
        const Group group = layer.plain ? group_from(model, at) : Group{at, at + 1};
        seen = layer.plain ? run.run_group(group, seen, last_h)
                           : run.run_options(layer, seen, group.end == model.layers.size(), last_h);
        at = group.end;
    }
    run.flush(run.results);
    run.answer(seen, last_h, answers, y);
    return {y, run.h_n, run.c_n};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> run_records(std::vector<std::int64_t> records, Tensor image, Tensor x, Maybe h,
                                               Maybe c, std::int64_t output_size, std::int64_t answers, Maybe lengths,
                                               Maybe reset) {
    const char* op = "run_records";
    const bool single = x.dim() == 2;
    check_input(op, "x", x, single ? 2 : 3);
    const Model model = read_model(op, records, image, x);
    const core::ImageHeader& header = model.header();
    if (output_size != static_cast<std::int64_t>(header.output_size))
        fail(op, ": expected output_size ", header.output_size, " as the model has, got ", output_size);
    if (single && (answers != 0 || lengths || reset))
        fail(op, ": expected answers 0, no lengths and no reset with x of one step");
    if (answers < 0 || answers > static_cast<std::int64_t>(core::Answers::hidden))
        fail(op, ": expected answers 0 (every), 1 (last) or 2 (hidden), got ", answers);
    const std::int64_t batch = x.size(0), steps = single ? 1 : x.size(1), inputs = header.input_size;
    if (steps == 0) fail(op, ": expected at least one step, got x of shape ", shape_text(x), ": leave out empty calls");
    if (single)
        check_argument(op, "x", x, x, {batch, inputs});
    else
        check_argument(op, "x", x, x, {batch, steps, inputs});
    if (reset) {
        check_mask(op, "reset", *reset, {batch, steps});
        if (!is_together(*reset, x)) fail(op, ": expected reset on x's device, got another: move it");
    }
    if (lengths) {
        if (!is_together(*lengths, x) || lengths->scalar_type() != ScalarType::Long || lengths->dim() != 1 ||
            lengths->size(0) != batch)
            fail(op, ": expected lengths of ", batch, " int64 values on x's device, got shape ", shape_text(*lengths),
                 ": give one a row");
        lengths = as_contiguous(*lengths);
    }
    if (h.has_value() != c.has_value()) fail(op, ": expected h and c, or neither");
    if (h) {
        check_argument(op, "h", *h, x, {header.state_layers, batch, header.h_size});
        check_argument(op, "c", *c, x, {header.state_layers, batch, header.c_size});
    }
    const Device device(x);
    const Tensor whole = single ? ops::view_of(x, {batch, 1, inputs}, {x.stride(0), x.stride(0), x.stride(1)}) : x;
    const auto kernel = is_float(x) ? run<float> : run<double>;
    auto [y, h_n, c_n] = kernel(op, model, whole, h, c, static_cast<core::Answers>(answers), lengths, reset, device);
    if (single) y = ops::view_of(y, {batch, output_size}, {output_size, 1});
    return {y, h_n, c_n};
}

}  // namespace cuda
}  // namespace cellstep
