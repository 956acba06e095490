#include "core/pack.h"

namespace cellstep {
namespace core {

template <class T>
void pack_layer(const LayerParameters<T>& layer, T* packed) {
    const std::size_t inputs = layer.input_size;
    const std::size_t units = layer.hidden_size;
    std::size_t width = 0;
    for (std::size_t unit = 0; unit < units; unit += width) {
        width = panel_width(units - unit);
        const std::size_t columns = gate_count * width;
        for (std::size_t gate = 0; gate < gate_count; ++gate) {
            for (std::size_t lane = 0; lane < width; ++lane) {
                T* column = packed + gate * width + lane;
                const bool real = unit + lane < units;
                const std::size_t row = gate * units + unit + lane;
                T bias = T(0);
                if (real && layer.bias_ih) bias += layer.bias_ih[row];
                if (real && layer.bias_hh) bias += layer.bias_hh[row];
                *column = bias;
                for (std::size_t k = 0; k < inputs; ++k) *(column += columns) = real ? layer.weight_ih(row, k) : T(0);
                for (std::size_t k = 0; k < units; ++k) *(column += columns) = real ? layer.weight_hh(row, k) : T(0);
            }
        }
        packed += columns * (1 + inputs + units);
    }
}

template void pack_layer<float>(const LayerParameters<float>&, float*);
template void pack_layer<double>(const LayerParameters<double>&, double*);

}  // namespace core
}  // namespace cellstep
