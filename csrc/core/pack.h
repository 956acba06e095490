/// The packed layout of one LSTM layer, the one that inference reads.
///
/// The hidden units are cut into panels of 16, with a tail of 8 or 4 so that 50 units cost 52 and not 64. A panel
/// of width w is a row-major matrix of 1 + input_size + recurrent_size rows and 4 w columns, where recurrent_size is
/// hidden_size, or less behind a projection. Its first row is the bias, then comes a row for each input, then one for
/// each hidden value that comes back; the columns are w units of gate i, then of f, g and o; f is zero in a layer that
/// couples it to i. A panel is read front to back once a step, and every column is one sum in one order: bias,
/// inputs, hidden values. The layout is the same for every instruction set, so it can be stored in a file; lanes
/// past hidden_size hold zeros.
#pragma once

#include <cstddef>

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
