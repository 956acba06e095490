#include "core/pack.h"

namespace cellstep {
namespace core {

template <class T>
void pack_layer(const LayerParameters<T>& layer, T* packed) {
    const std::size_t inputs = layer.input_size;
    const std::size_t units = layer.hidden_size;
    const std::size_t recurrent = layer.recurrent_size;
    std::size_t width = 0;
    for (std::size_t unit = 0; unit < units; unit += width) {
        width = panel_width(units - unit);
        const std::size_t columns = gate_count * width;
        for (std::size_t gate = 0; gate < gate_count; ++gate) {
            for (std::size_t lane = 0; lane < width; ++lane) {
                T* column = packed + gate * width + lane;
                std::size_t row = 0;
                const bool real = gate_row(gate, units, layer.coupled, &row) && unit + lane < units;
                row += unit + lane;
                T bias = T(0);
                if (real && layer.bias_ih) bias += layer.bias_ih[row];
                if (real && layer.bias_hh) bias += layer.bias_hh[row];
                *column = bias;
                for (std::size_t k = 0; k < inputs; ++k) *(column += columns) = real ? layer.weight_ih(row, k) : T(0);
                for (std::size_t k = 0; k < recurrent; ++k)
                    *(column += columns) = real ? layer.weight_hh(row, k) : T(0);
            }
        }
        packed += columns * (1 + inputs + recurrent);
    }
}

template <class T>
void expand_gates(const T* values, std::size_t blocks, std::size_t hidden_size, bool coupled, T* expanded) {
    for (std::size_t gate = 0; gate < blocks; ++gate) {
        std::size_t row = 0;
        const bool real = gate_row(gate, hidden_size, coupled, &row);
        for (std::size_t unit = 0; unit < hidden_size; ++unit) *expanded++ = real ? values[row + unit] : T(0);
    }
}

template void expand_gates<float>(const float*, std::size_t, std::size_t, bool, float*);
template void expand_gates<double>(const double*, std::size_t, std::size_t, bool, double*);
template void pack_layer<float>(const LayerParameters<float>&, float*);
template void pack_layer<double>(const LayerParameters<double>&, double*);

}  // namespace core
}  // namespace cellstep
