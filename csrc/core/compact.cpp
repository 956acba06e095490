/// The engine for small targets, with the interface of engine.h: straight loops, one row of the batch after the other,
/// one step after the other through all records. No threads, no choice of an instruction set, no tiles. Each gate sum
/// is the same chain as there, and the functions of step.h and variant_sweep.h make the same of it, so the bits are
/// equal.
#include <cstring>

#include "core/denormals.h"
#include "core/engine.h"
#include "core/model.h"
#include "core/rounding.h"
#include "core/step.h"
#include "core/variant_sweep.h"

namespace cellstep {
namespace core {

const char* instruction_set() { return "compact"; }

template <class T>
struct Plan {
    Image image;
    const ImageRecord* last;  ///< of the LSTM layers
    std::size_t chunk;        ///< steps that pass through a record before the next one does: all if it is bidirectional
    std::size_t widest;       ///< values of a step, wherever it is widest
    std::size_t workspace;    ///< values that a layer wants while it runs
};

namespace {

using namespace CELLSTEP_ISA;

/// Whether a layer that computes in T may have narrow weights.
#if defined(CELLSTEP_FLOAT32_ONLY)
template <class T>
constexpr bool can_be_narrow = false;
#else
template <class T>
constexpr bool can_be_narrow = sizeof(T) == sizeof(float);
#endif

/// Units whose gate sums are formed at once; the width of every panel is a multiple of it.
constexpr std::size_t block = 4;

template <class T>
using Native = Vector<T, native_lanes<T>>;

/// Vectors that hold the sums of a block: gates i, f, g, o one after the other.
template <class T>
constexpr int block_vectors = static_cast<int>(gate_count * block) / native_lanes<T>;

/// Vectors of a gate in a block.
template <class T>
constexpr int gate_vectors = static_cast<int>(block) / native_lanes<T>;

/// Values of a panel from its row's begin to vector `v` of the block that begins there.
template <class T>
constexpr std::size_t vector_place(int v, std::size_t width) {
    return static_cast<std::size_t>(v / gate_vectors<T>) * width +
           static_cast<std::size_t>(v % gate_vectors<T> * native_lanes<T>);
}

/// visit(0), visit(1), ... in full also where the compiler is told to keep code small, so that sums stay in registers.
template <int Count, class Visit>
inline __attribute__((always_inline)) void unrolled(const Visit& visit) {
    if constexpr (Count > 0) {
        unrolled<Count - 1>(visit);
        visit(Count - 1);
    }
}

/// What gate sums are formed of.
template <class T>
struct GateInputs {
    bool bias;
    const T* x;  ///< (input_size), or null: left out
    const T* h;  ///< (recurrent_size), or null
};

/// Gate sums of the block that begins `at` units behind the begin of a panel. A function of its own, so that nothing
/// else takes registers from its loop.
template <class T, class W>
__attribute__((noinline)) void block_sums(const LstmLayer<T>& layer, const GateInputs<T>& in,
                                          const unsigned char* panel, std::size_t width, std::size_t at,
                                          Native<T>* sums) {
    const std::size_t columns = gate_count * width;
    const T* bias = reinterpret_cast<const T*>(panel) + at;
    // A pointer for each gate, as the processors that this is for add no offset but a constant one.
    const auto* i = reinterpret_cast<const typename W::Stored*>(panel + columns * sizeof(T)) + at;
    const auto* f = i + width;
    const auto* g = f + width;
    const auto* o = g + width;
    const auto skip = [&](std::size_t values) __attribute__((always_inline)) {
        i += values;
        f += values;
        g += values;
        o += values;
    };
    Native<T> sum[block_vectors<T>];
    unrolled<block_vectors<T>>([&](int v) __attribute__((always_inline)) {
        sum[v] = in.bias ? load<Native<T>>(bias + vector_place<T>(v, width)) : Native<T>{};
    });
    const T* values = in.x;
    std::size_t count = layer.input_size;
    for (int part = 0; part < 2; ++part) {
        if (!values) {
            skip(count * columns);
            count = 0;
        }
        for (; count > 0; --count) {
            const Native<T> value = broadcast<Native<T>>(*values++);
            unrolled<block_vectors<T>>([&](int v) __attribute__((always_inline)) {
                const int gate = v / gate_vectors<T>;
                const auto* weights = (gate == 0   ? i
                                       : gate == 1 ? f
                                       : gate == 2 ? g
                                                   : o) +
                                      v % gate_vectors<T> * native_lanes<T>;
                sum[v] = fma(value, W::template widen<Native<T>>(weights), sum[v]);
            });
            skip(columns);
        }
        values = in.h;
        count = layer.recurrent_size;
    }
    unrolled<block_vectors<T>>([&](int v) __attribute__((always_inline)) { sums[v] = sum[v]; });
}

/// The same for the type of the weights, unless that is int8.
template <class T>
void any_block_sums(const LstmLayer<T>& layer, const GateInputs<T>& in, const unsigned char* panel, std::size_t width,
                    std::size_t at, Native<T>* sums) {
    if constexpr (can_be_narrow<T>) {
        if (layer.weights == WeightType::bfloat16)
            return block_sums<T, Bfloat16Weights>(layer, in, panel, width, at, sums);
        if (layer.weights == WeightType::float16)
            return block_sums<T, Float16Weights>(layer, in, panel, width, at, sums);
    }
    block_sums<T, FullWeights<T>>(layer, in, panel, width, at, sums);
}

/// The integer sum of a column with int8 weights.
template <class T>
T int8_column(const signed char* values, std::size_t groups, const signed char* weights, std::size_t columns) {
    std::int32_t sum = 0;
    for (; groups > 0; --groups, values += 4, weights += 4 * columns)
        for (int k = 0; k < 4; ++k) sum += values[k] * weights[k];
    return static_cast<T>(sum);
}

/// A row as int8, with m / 127 of it.
template <class T>
struct Rounded {
    const signed char* values;
    std::size_t groups;
    T scale;
};

template <class T>
Rounded<T> rounded(const T* row, std::size_t count, const T* factors, unsigned char* memory) {
    const std::size_t groups = static_cast<std::size_t>(int8_groups(count));
    if (!row) return {nullptr, groups, T(0)};
    std::memset(memory, 0, 4 * groups);
    const T scale = round_row<false>(row, count, factors, memory);
    return {reinterpret_cast<const signed char*>(memory), groups, scale};
}

/// Gate sums of a layer with int8 weights, panel by panel. `memory`: for the rounded rows.
template <class T>
void int8_sums(const LstmLayer<T>& layer, const void* packed, const GateInputs<T>& in, T* sums, unsigned char* memory) {
    const Rounded<T> x = rounded<T>(in.x, layer.input_size, static_cast<const T*>(packed), memory);
    const Rounded<T> h = rounded<T>(in.h, layer.recurrent_size, nullptr, memory + 4 * x.groups);
    const unsigned char* panel = first_panel(WeightType::int8, packed, layer.input_size);
    for_each_panel(layer.hidden_size, [&](std::size_t, std::size_t width, std::size_t) {
        const std::size_t columns = gate_count * width;
        const T* row = reinterpret_cast<const T*>(panel);
        const auto* weights = reinterpret_cast<const signed char*>(panel + 20 * columns);
        for (std::size_t column = 0; column < columns; ++column, ++row, weights += 4) {
            T sum = in.bias ? *row : T(0);
            if (in.x) sum = fma(row[columns], int8_column<T>(x.values, x.groups, weights, columns) * x.scale, sum);
            if (in.h)
                sum = fma(row[2 * columns],
                          int8_column<T>(h.values, h.groups, weights + 4 * columns * x.groups, columns) * h.scale, sum);
            *sums++ = sum;
        }
        panel += panel_stride<T>(WeightType::int8, width, layer.input_size, layer.recurrent_size);
    });
}

/// Forms the gate sums of a layer and keeps them in `sums`, panel by panel, or moves the units of `row` with them if
/// that is not null.
template <class T>
void form_sums(const LstmLayer<T>& layer, const void* packed, const GateInputs<T>& in, const RowState<T>* row,
               T* sums) {
    const unsigned char* panel = static_cast<const unsigned char*>(packed);
    const bool int8 = can_be_narrow<T> && layer.weights == WeightType::int8;
    if constexpr (can_be_narrow<T>)
        if (int8)
            int8_sums(layer, packed, in, sums,
                      reinterpret_cast<unsigned char*>(sums + gate_count * padded_size(layer.hidden_size)));
    if (int8 && !row) return;
    for_each_panel(layer.hidden_size, [&](std::size_t unit, std::size_t width, std::size_t padded) {
        T* const kept = sums + gate_count * padded;
        for (std::size_t at = 0; at < width; at += block) {
            Native<T> sum[block_vectors<T>];
            if (int8)
                for (int v = 0; v < block_vectors<T>; ++v)
                    sum[v] = load<Native<T>>(kept + at + vector_place<T>(v, width));
            else
                any_block_sums<T>(layer, in, panel, width, at, sum);
            if (row && plain_only)
                move_panel_as<T, static_cast<int>(block), block_vectors<T>, false>(*row, unit + at, sum);
            else if (row)
                move_panel<T, static_cast<int>(block), block_vectors<T>>(*row, unit + at, sum);
            else
                for (int v = 0; v < block_vectors<T>; ++v) store(kept + at + vector_place<T>(v, width), sum[v]);
        }
        panel += panel_stride<T>(layer.weights, width, layer.input_size, layer.recurrent_size);
    });
}

/// y = x W + b, each value one chain in order of the inputs, begun with zero if there is no bias.
template <class T>
void dense_row(std::size_t inputs, std::size_t outputs, const T* bias, const T* weights, const T* x, T* y) {
    for (std::size_t output = 0; output < outputs; ++output) {
        T sum = bias ? bias[output] : T(0);
        const T* weight = weights + output;
        for (std::size_t k = 0; k < inputs; ++k, weight += outputs) sum = fma(x[k], *weight, sum);
        y[output] = sum;
    }
}

/// Values that a step of a layer wants.
template <class T>
std::size_t layer_workspace(const LstmLayer<T>& layer) {
    const std::size_t sums = gate_count * padded_size(layer.hidden_size);
    std::size_t values = 0;
    if (layer.weights == WeightType::int8)
        values += sums + int8_groups(layer.input_size) + int8_groups(layer.recurrent_size);
    else if (!layer.directions[0].plain)
        values += sums;
    if (!layer.directions[0].plain) values += sums + 4 * layer.hidden_size + layer.recurrent_size;
    return values;
}

/// A step of a layer with options: x in, h and c in place.
template <class T>
void option_step(const LstmLayer<T>& layer, const Direction<T>& direction, const T* x, T* h, T* c, T* workspace) {
    const LayerOptions<T>& options = direction.options;
    const std::size_t units = layer.hidden_size;
    T* const recurrent = workspace;
    T* const new_c = recurrent + gate_count * padded_size(units);
    T* const over = new_c + units;
    T* const under = over + units;
    T* const m = under + units;
    T* const projected = m + units;
    VariantSweep<T> s{};
    s.steps = 1;
    s.batch = 1;
    s.input_size = layer.input_size;
    s.hidden_size = units;
    s.recurrent_size = layer.recurrent_size;
    s.weights = layer.weights;
    s.packed = direction.packed;
    s.sums = projected + layer.recurrent_size;
    s.c = c;
    s.options = options;
    if (options.norm_ih) {
        form_sums<T>(layer, direction.packed, {false, nullptr, h}, nullptr, s.sums);
        std::memcpy(recurrent, s.sums, gate_count * padded_size(units) * sizeof(T));
        form_sums<T>(layer, direction.packed, {false, x, nullptr}, nullptr, s.sums);
        normalise_gates<T>(s, 0, recurrent);
    } else {
        form_sums<T>(layer, direction.packed, {true, x, h}, nullptr, s.sums);
    }
    for_each_panel(units, [&](std::size_t unit, std::size_t width, std::size_t padded) {
        gate_panel<T, native_lanes<T>>(s, 0, unit, width, s.sums + gate_count * padded, new_c, over, under);
    });
    hidden_row<T>(options, units, new_c, over, under, m);
    if (options.projection) dense_row<T>(units, layer.recurrent_size, nullptr, options.projection, m, projected);
    zone_out<T>(units, options.zoneout_c, nullptr, new_c, c);
    zone_out<T>(layer.recurrent_size, options.zoneout_h, nullptr, options.projection ? projected : m, h);
}

/// A step of a layer: x in, h and c in place, and h to y as well.
template <class T>
void layer_step(const LstmLayer<T>& layer, const Direction<T>& direction, const T* x, T* h, T* c, T* y, T* workspace) {
    const std::size_t bytes = layer.recurrent_size * sizeof(T);
    if (!plain_only && !direction.plain) {
        option_step<T>(layer, direction, x, h, c, workspace);
        std::memcpy(y, h, bytes);
        return;
    }
    const RowState<T> row{layer.hidden_size, c, c, y, nullptr, direction.options.fast};
    form_sums<T>(layer, direction.packed, {true, x, h}, &row, workspace);
    std::memcpy(h, y, bytes);
}

/// Steps of one row on their way from record to record: they lie in `now`, `width` values each.
template <class T>
struct Rows {
    std::size_t steps;
    std::size_t width;
    T* now;
    T* other;

    void swap(std::size_t new_width) {
        T* const before = now;
        now = other;
        other = before;
        width = new_width;
    }
};

/// One row of the batch.
template <class T>
struct RowRun {
    const Plan<T>& plan;
    const ModelRun<T>& run;
    std::size_t row;
    T* workspace;
};

/// The steps of a chunk, the first of which is `begin`, through one direction of a layer, to the rows in `y`.
template <class T>
void run_direction(const RowRun<T>& of, const LstmLayer<T>& layer, std::size_t place, T* h, T* c, std::size_t begin,
                   const Rows<T>& rows, T* y) {
    const Direction<T>& direction = layer.directions[place];
    const std::size_t width = layer.output_size();
    for (std::size_t done = 0; done < rows.steps; ++done) {
        const std::size_t step = place ? rows.steps - 1 - done : done;
        // A flag parts its step from the one before, so on the way back it counts for that one.
        const bool reset = of.run.reset && (place == 0 || done > 0) &&
                           of.run.reset[static_cast<std::ptrdiff_t>(begin + step + place) * of.run.reset_step_stride +
                                        static_cast<std::ptrdiff_t>(of.row) * of.run.reset_row_stride];
        if (reset) {
            fill<T>(direction.initial_h, layer.recurrent_size, h);
            fill<T>(direction.initial_c, layer.hidden_size, c);
        }
        T* const target = y + step * width;
        layer_step<T>(layer, direction, rows.now + step * rows.width, h, c, target + place * layer.recurrent_size,
                      of.workspace);
        if (layer.cells)
            std::memcpy(target + layer.h_columns() + place * layer.hidden_size, c, layer.hidden_size * sizeof(T));
    }
}

/// The same through a whole layer. `place` is that of its state, and afterwards that of the next one's. With `hidden`
/// the first row becomes the state behind the last step.
template <class T>
void run_layer(const RowRun<T>& of, const ImageRecord& record, std::size_t begin, bool hidden, StatePlace* place,
               Rows<T>* rows) {
    const ImageHeader& header = of.plan.image.header();
    const LstmLayer<T> layer = lstm_layer<T>(of.plan.image, record);
    const std::size_t width = layer.output_size();
    T* const y = rows->other;
    T* h[2];
    T* c[2];
    for (std::size_t at = 0; at < layer.direction_count; ++at) {
        const StateRows<T> h_rows = place->h(header, of.run.h, of.run.state_batch);
        const StateRows<T> c_rows = place->c(header, of.run.c, of.run.state_batch);
        h[at] = h_rows.data + of.row * h_rows.stride;
        c[at] = c_rows.data + of.row * c_rows.stride;
        run_direction<T>(of, layer, at, h[at], c[at], begin, *rows, y);
        place->next(layer.recurrent_size, layer.hidden_size);
    }
    if (layer.residual)
        for (std::size_t step = 0; step < rows->steps; ++step)
            for (std::size_t k = 0; k < rows->width; ++k) y[step * width + k] += rows->now[step * rows->width + k];
    for (std::size_t at = 0; at < layer.direction_count && hidden; ++at) {
        std::memcpy(y + at * layer.recurrent_size, h[at], layer.recurrent_size * sizeof(T));
        if (layer.cells)
            std::memcpy(y + layer.h_columns() + at * layer.hidden_size, c[at], layer.hidden_size * sizeof(T));
    }
    rows->swap(width);
}

/// What a record other than that of an LSTM layer makes of the rows.
template <class T>
void run_record(const Image& image, const ImageRecord& record, Rows<T>* rows) {
    const T* data = image.data<T>(record);
    const std::size_t count = record.sizes[0];
    T* value = rows->now;
    switch (kind_of(record)) {
        case RecordKind::input_scaling:
            for (std::size_t step = 0; step < rows->steps; ++step)
                for (std::size_t k = 0; k < count; ++k, ++value) *value = (*value - data[k]) * data[count + k];
            break;
        case RecordKind::output_scaling:
            for (std::size_t step = 0; step < rows->steps; ++step)
                for (std::size_t k = 0; k < count; ++k, ++value) *value = *value * data[count + k] + data[k];
            break;
        case RecordKind::dense: {
            const std::size_t outputs = record.sizes[1];
            for (std::size_t step = 0; step < rows->steps; ++step)
                dense_row<T>(count, outputs, data, data + outputs, rows->now + step * count,
                             rows->other + step * outputs);
            rows->swap(outputs);
            CELLSTEP_ISA::apply_activation<T>(activation_at(record, 0), rows->steps, outputs, rows->now);
            break;
        }
        default:
            break;
    }
}

/// Writes what the records gave for the steps from `first` on to y, with the skipped columns of x.
template <class T>
void write_answers(const RowRun<T>& of, std::size_t first, const Rows<T>& rows, T* y) {
    const ModelRun<T>& run = of.run;
    const ImageRecord* skip = of.plan.image.find(RecordKind::skip);
    const std::uint32_t* columns = skip ? of.plan.image.template data<std::uint32_t>(*skip) : nullptr;
    for (std::size_t step = 0; step < rows.steps; ++step, y += run.y.step_stride) {
        const T* x = run.x.data + static_cast<std::ptrdiff_t>(first + step) * run.x.step_stride +
                     static_cast<std::ptrdiff_t>(of.row) * run.x.row_stride;
        for (std::size_t k = 0; k < rows.width; ++k) {
            T value = rows.now[step * rows.width + k];
            if (columns) value += x[static_cast<std::ptrdiff_t>(columns[k]) * run.x.feature_stride];
            y[k] = value;
        }
    }
}

/// Copies steps of x, one behind the other.
template <class T>
void gather(const SequenceView<T>& x, std::size_t row, std::size_t begin, const Rows<T>& rows) {
    T* target = rows.now;
    for (std::size_t step = 0; step < rows.steps; ++step) {
        const T* source = x.data + static_cast<std::ptrdiff_t>(begin + step) * x.step_stride +
                          static_cast<std::ptrdiff_t>(row) * x.row_stride;
        for (std::size_t k = 0; k < rows.width; ++k, source += x.feature_stride) *target++ = *source;
    }
}

/// The steps of a chunk, the first of which is `begin`, through all records. `buffers`: two for rows.
template <class T>
void run_chunk(const RowRun<T>& of, std::size_t begin, std::size_t steps, T* buffers) {
    const Plan<T>& plan = of.plan;
    const ModelRun<T>& run = of.run;
    const bool every = run.answers == Answers::every;
    const bool at_end = begin + steps == run.steps;
    std::size_t first = begin;
    Rows<T> rows{steps, plan.image.header().input_size, buffers, buffers + plan.chunk * plan.widest};
    const ImageRecord* record = plan.image.begin();
    if (run.prepared) {
        while (kind_of(*record) != RecordKind::lstm) ++record;
        rows.width = record->sizes[0];
        std::memcpy(rows.now, run.prepared + begin * rows.width, steps * rows.width * sizeof(T));
    } else {
        gather<T>(run.x, of.row, begin, rows);
    }
    StatePlace place;
    for (; record != plan.image.end(); ++record) {
        if (kind_of(*record) != RecordKind::lstm) {
            run_record<T>(plan.image, *record, &rows);
            continue;
        }
        const bool hidden = run.answers == Answers::hidden && at_end && record == plan.last;
        run_layer<T>(of, *record, begin, hidden, &place, &rows);
        if (every || record != plan.last) continue;
        if (!at_end) return;
        if (!hidden) rows.now += (steps - 1) * rows.width;
        rows.steps = 1;
        first = run.steps - 1;
    }
    write_answers<T>(of, first, rows,
                     run.y.data + (every ? static_cast<std::ptrdiff_t>(begin) * run.y.step_stride : 0) +
                         static_cast<std::ptrdiff_t>(of.row) * run.y.row_stride);
}

}  // namespace

template <class T>
std::size_t plan_bytes(const Image&) {
    return sizeof(Plan<T>);
}

template <class T>
const Plan<T>* make_plan(const Image& image, std::size_t steps, std::size_t, const Parallel*, void* memory) {
    Plan<T>* plan = static_cast<Plan<T>*>(memory);
    *plan = {image, nullptr, is_bidirectional(image) ? steps : 1, image.header().input_size, 0};
    const auto at_least = [](std::size_t* value, std::size_t other) { *value = *value < other ? other : *value; };
    for (const ImageRecord& record : image) {
        if (kind_of(record) == RecordKind::dense) at_least(&plan->widest, record.sizes[1]);
        if (kind_of(record) != RecordKind::lstm) continue;
        const LstmLayer<T> layer = lstm_layer<T>(image, record);
        at_least(&plan->widest, layer.output_size());
        at_least(&plan->workspace, layer_workspace<T>(layer));
        plan->last = &record;
    }
    return plan;
}

template <class T>
std::uint64_t plan_scratch(const Image& image, std::size_t steps, std::size_t batch, const Parallel* parallel) {
    Plan<T> plan;
    make_plan<T>(image, steps, batch, parallel, &plan);
    return 2 * std::uint64_t{plan.chunk} * plan.widest + plan.workspace;
}

template <class T>
void run_model(const Plan<T>& plan, const ModelRun<T>& run, T* scratch) CELLSTEP_NONBLOCKING {
    const FlushDenormals flush;
    for (std::size_t row = 0; row < run.batch; ++row) {
        const RowRun<T> of{plan, run, row, scratch + 2 * plan.chunk * plan.widest};
        for (std::size_t begin = 0; begin < run.steps; begin += plan.chunk) {
            const std::size_t left = run.steps - begin;
            run_chunk<T>(of, begin, left < plan.chunk ? left : plan.chunk, scratch);
        }
    }
}

template <class T>
std::uint64_t prepared_size(const Image& image) {
    return image.find(RecordKind::lstm)->sizes[0];
}

template <class T>
void prepare_step(const Plan<T>& plan, const T* x, T* prepared, T* scratch) CELLSTEP_NONBLOCKING {
    const FlushDenormals flush;
    Rows<T> rows{1, plan.image.header().input_size, scratch, scratch + plan.widest};
    gather<T>({x, 0, 0, 1}, 0, 0, rows);
    for (const ImageRecord* record = plan.image.begin(); kind_of(*record) != RecordKind::lstm; ++record)
        run_record<T>(plan.image, *record, &rows);
    std::memcpy(prepared, rows.now, rows.width * sizeof(T));
}

template <class T>
std::size_t model_scratch(const Image& image, std::size_t steps, std::size_t batch, const Parallel* parallel) {
    return static_cast<std::size_t>(plan_scratch<T>(image, steps, batch, parallel));
}

template <class T>
void run_model(const Image& image, const ModelRun<T>& run, T* scratch) {
    Plan<T> plan;
    run_model<T>(*make_plan<T>(image, run.steps, run.batch, run.parallel, &plan), run, scratch);
}

// The runtime takes no float64.
template std::size_t plan_bytes<float>(const Image&);
template const Plan<float>* make_plan<float>(const Image&, std::size_t, std::size_t, const Parallel*, void*);
template std::uint64_t plan_scratch<float>(const Image&, std::size_t, std::size_t, const Parallel*);
template std::uint64_t prepared_size<float>(const Image&);
template void prepare_step<float>(const Plan<float>&, const float*, float*, float*) CELLSTEP_NONBLOCKING;
template void run_model<float>(const Plan<float>&, const ModelRun<float>&, float*) CELLSTEP_NONBLOCKING;
template std::size_t model_scratch<float>(const Image&, std::size_t, std::size_t, const Parallel*);
template void initial_state<float>(const Image&, std::size_t, float*, float*) CELLSTEP_NONBLOCKING;
template void run_model<float>(const Image&, const ModelRun<float>&, float*);

}  // namespace core
}  // namespace cellstep
