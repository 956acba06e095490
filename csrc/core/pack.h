/// The packed layout of one LSTM layer, the one that inference reads.
///
/// The hidden units are cut into panels of 16, with a tail of 8 or 4 so that 50 units cost 52 and not 64. A panel
/// of width w is a row-major matrix of 1 + input_size + recurrent_size rows and 4 w columns, where recurrent_size is
/// hidden_size, or less behind a projection. Its first row is the bias, then comes a row for each input, then one for
/// each hidden value that comes back; the columns are w units of gate i, then of f, g and o; f is zero in a layer that
/// couples it to i. A panel is read front to back once a step, and every column is one sum in one order: bias,
/// inputs, hidden values. The layout is the same for every instruction set, so it can be stored in a file; lanes
/// past hidden_size hold zeros.
///
/// With narrow weights the bias row is still float32 and the other rows hold bfloat16 or float16. With int8 weights the
/// layer begins with a float32 factor for each input, padded to a multiple of 64 bytes, by which the inputs are
/// multiplied first; a panel then has rows of 4 w columns of
///   the bias and the scales of the input and of the hidden part, float32;
///   what the sums of the input and of the hidden part begin with where values are stored plus 128: minus 128 times the
///   sum of the column's weights, int32;
///   four weights in a row for each four inputs, then for each four hidden values, zeros behind the last.
/// No weight is past 127 in magnitude. How a step uses them is in int8_step.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cellstep {
namespace core {

constexpr std::size_t gate_count = 4;

/// Width of the panel that begins with `remaining` units still to place.
constexpr std::size_t panel_width(std::size_t remaining) { return remaining > 12 ? 16 : remaining > 4 ? 8 : 4; }

/// Units of all panels together: hidden_size rounded up to a multiple of 4.
constexpr std::size_t padded_size(std::size_t hidden_size) { return (hidden_size + 3) / 4 * 4; }

/// Number of values in a packed layer.
constexpr std::size_t packed_size(std::size_t input_size, std::size_t hidden_size, std::size_t recurrent_size) {
    return gate_count * padded_size(hidden_size) * (1 + input_size + recurrent_size);
}

/// Full panels of 16 among the panels of so many units.
constexpr std::size_t full_panels(std::size_t units) { return (units + 3) / 16; }

/// How the weights of a packed layer are stored. Biases always have the type that is computed in.
enum class WeightType : unsigned char { full, bfloat16, float16, int8 };

/// Bytes of a panel with `depth` inputs and hidden values: its biases, then a row of weights for each of them. Not for
/// int8, whose panels have a layout of their own.
template <class T>
constexpr std::size_t panel_bytes(WeightType type, std::size_t width, std::size_t depth) {
    return gate_count * width * (sizeof(T) + depth * (type == WeightType::full ? sizeof(T) : 2));
}

/// Most inputs or hidden values of a layer with int8 weights: a sum of so many products fits 32 bits.
constexpr std::size_t int8_most_values = 1u << 17;

/// Bytes of the factors that an int8 layer begins with.
constexpr std::uint64_t int8_factor_bytes(std::uint64_t input_size) { return (input_size + 15) / 16 * 64; }

/// Rows of four values each.
constexpr std::uint64_t int8_groups(std::uint64_t values) { return (values + 3) / 4; }

/// Bytes of a column of an int8 panel: bias, two scales and two beginnings, then the weights.
constexpr std::uint64_t int8_column_bytes(std::uint64_t input_size, std::uint64_t recurrent_size) {
    return 4 * (5 + int8_groups(input_size) + int8_groups(recurrent_size));
}

/// Bytes of a packed layer, in 64 bits also where size_t has 32.
template <class T>
constexpr std::uint64_t packed_bytes(WeightType type, std::uint64_t input_size, std::uint64_t hidden_size,
                                     std::uint64_t recurrent_size) {
    const std::uint64_t columns = gate_count * ((hidden_size + 3) / 4 * 4);
    if (type == WeightType::int8)
        return int8_factor_bytes(input_size) + columns * int8_column_bytes(input_size, recurrent_size);
    return columns * (sizeof(T) + (input_size + recurrent_size) * (type == WeightType::full ? sizeof(T) : 2));
}

/// The first panel of a packed layer.
inline const unsigned char* first_panel(WeightType type, const void* packed, std::size_t input_size) {
    return static_cast<const unsigned char*>(packed) + (type == WeightType::int8 ? int8_factor_bytes(input_size) : 0);
}

/// Bytes from a panel to the next one.
template <class T>
constexpr std::size_t panel_stride(WeightType type, std::size_t width, std::size_t input_size,
                                   std::size_t recurrent_size) {
    return type == WeightType::int8
               ? gate_count * width * static_cast<std::size_t>(int8_column_bytes(input_size, recurrent_size))
               : panel_bytes<T>(type, width, input_size + recurrent_size);
}

/// A matrix that is read through its strides, counted in values.
template <class T>
struct MatrixView {
    const T* data;
    std::ptrdiff_t row_stride;
    std::ptrdiff_t column_stride;

    T operator()(std::size_t row, std::size_t column) const {
        return data[static_cast<std::ptrdiff_t>(row) * row_stride +
                    static_cast<std::ptrdiff_t>(column) * column_stride];
    }
};

/// The parameters of one layer as torch.nn.LSTM keeps them: rows are gates i, f, g, o of hidden_size each, or i, g, o
/// if coupled.
template <class T>
struct LayerParameters {
    std::size_t input_size;
    std::size_t hidden_size;
    std::size_t recurrent_size;
    bool coupled;
    MatrixView<T> weight_ih;  ///< (4 hidden_size, input_size)
    MatrixView<T> weight_hh;  ///< (4 hidden_size, recurrent_size)
    const T* bias_ih;         ///< 4 hidden_size values, or null
    const T* bias_hh;         ///< 4 hidden_size values, or null; the two are added once, here
};

/// Writes packed_size values to `packed`.
template <class T>
void pack_layer(const LayerParameters<T>& layer, T* packed);

/// Row of weights that holds a gate's first unit; false for the gate that a coupled layer has no weights for.
constexpr bool gate_row(std::size_t gate, std::size_t hidden_size, bool coupled, std::size_t* row) {
    *row = (coupled && gate > 1 ? gate - 1 : gate) * hidden_size;
    return !(coupled && gate == 1);
}

/// Values of `blocks` gates side by side, i, f, (g,) o, as the options of a layer want them: coupled ones get a zero f.
template <class T>
void expand_gates(const T* values, std::size_t blocks, std::size_t hidden_size, bool coupled, T* expanded);

}  // namespace core
}  // namespace cellstep
