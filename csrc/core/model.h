/// What the records of an image say of its LSTM layers, as an engine wants it: pointers into the data, and the places
/// of the state.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/engine.h"
#include "core/image.h"
#include "core/kernels.h"

namespace cellstep {
namespace core {

inline RecordKind kind_of(const ImageRecord& record) { return static_cast<RecordKind>(record.kind); }

inline Activation activation_at(const ImageRecord& record, int place) {
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
    Direction<T> directions[plain_only ? 1 : 2];

    std::size_t h_columns() const { return direction_count * recurrent_size; }
    std::size_t output_size() const { return h_columns() + (cells ? direction_count * hidden_size : 0); }
};

template <class T>
LstmLayer<T> lstm_layer(const Image& image, const ImageRecord& record) {
    LstmLayer<T> layer{};
    layer.input_size = record.sizes[0];
    layer.hidden_size = record.sizes[1];
    const std::uint32_t flags = layer_flags(record);
    layer.recurrent_size = recurrent_size(record);
    layer.direction_count = direction_count(record);
    layer.residual = flags & LayerFlags::residual;
    layer.cells = flags & LayerFlags::cells;
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
        const bool norm = flags & LayerFlags::layer_norm;
        const bool initial = flags & LayerFlags::initial;
        direction.packed = take(true, packed / sizeof(T));
        options.projection = take(layer.recurrent_size != units, units * layer.recurrent_size);
        options.peephole = take(flags & LayerFlags::peephole, 3 * units);
        options.norm_ih = take(norm, 4 * units);
        options.norm_hh = take(norm, 4 * units);
        options.norm_c = take(norm, units);
        options.norm_c_bias = take(norm, units);
        direction.initial_h = take(initial, layer.recurrent_size);
        direction.initial_c = take(initial, units);
        options.coupled = flags & LayerFlags::coupled;
        direction.plain = true;
        if (plain_only) continue;
        options.gate = activation_at(record, 0);
        options.candidate = activation_at(record, 1);
        options.output = activation_at(record, 2);
        options.fast = flags & LayerFlags::fast;
    }
    for (std::size_t place = 0; place < layer.direction_count && !plain_only; ++place) {
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

/// Place of a layer and direction among all states: its number, and the values of those before it.
struct StatePlace {
    std::size_t row = 0;
    std::size_t h_at = 0;
    std::size_t c_at = 0;

    template <class T>
    StateRows<T> h(const ImageHeader& header, T* state, std::size_t batch) const {
        return {header.state_layers > 1 ? state + row * batch * header.h_size : state + h_at, header.h_size};
    }
    template <class T>
    StateRows<T> c(const ImageHeader& header, T* state, std::size_t batch) const {
        return {header.state_layers > 1 ? state + row * batch * header.c_size : state + c_at, header.c_size};
    }
    void next(std::size_t h_size, std::size_t c_size) {
        ++row;
        h_at += h_size;
        c_at += c_size;
    }
};

/// A state's values, or zeros where there are none.
template <class T>
void fill(const T* values, std::size_t count, T* target) {
    for (std::size_t at = 0; at < count; ++at) target[at] = values ? values[at] : T(0);
}

template <class T>
void initial_state(const Image& image, std::size_t batch, T* h, T* c) CELLSTEP_NONBLOCKING {
    StatePlace place;
    for (const ImageRecord& record : image) {
        if (kind_of(record) != RecordKind::lstm) continue;
        const LstmLayer<T> layer = lstm_layer<T>(image, record);
        for (std::size_t at = 0; at < layer.direction_count; ++at) {
            const StateRows<T> h_rows = place.h(image.header(), h, batch);
            const StateRows<T> c_rows = place.c(image.header(), c, batch);
            for (std::size_t row = 0; row < batch; ++row) {
                fill<T>(layer.directions[at].initial_h, layer.recurrent_size, h_rows.data + row * h_rows.stride);
                fill<T>(layer.directions[at].initial_c, layer.hidden_size, c_rows.data + row * c_rows.stride);
            }
            place.next(layer.recurrent_size, layer.hidden_size);
        }
    }
}

}  // namespace core
}  // namespace cellstep
