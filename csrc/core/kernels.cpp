// Compiled once for each instruction set, with CELLSTEP_ISA naming it.
#include "core/kernels.h"

#include "core/activations.h"
#include "core/dense.h"
#include "core/digest.h"
#include "core/pack.h"
#include "core/product.h"
#include "core/step.h"
#include "core/variant_sweep.h"

namespace cellstep {
namespace core {
namespace CELLSTEP_ISA {

/// With s the sum before the activation and the derivatives of sigmoid and tanh in terms of their values:
///   grad_o = grad_h tanh(c) o (1 - o),   grad_c += grad_h o (1 - tanh(c)^2),
///   grad_i = grad_c g i (1 - i),  grad_f = grad_c c_prev f (1 - f),  grad_g = grad_c i (1 - g^2),
/// and grad_c f goes on to the step before (Hochreiter and Schmidhuber 1997; Gers et al. 2000 for f).
template <class T>
inline void step_backward(const StepBackward<T>& s) {
    constexpr int lanes = native_lanes<T>;
    using V = Vector<T, lanes>;
    const std::size_t units = s.hidden_size;
    const V one = broadcast<V>(T(1));
    for (std::size_t row = 0; row < s.batch; ++row) {
        const T* gates = s.gates + row * gate_count * units;
        T* grad_gates = s.grad_gates + row * gate_count * units;
        for (std::size_t unit = 0; unit < units; unit += static_cast<std::size_t>(lanes)) {
            const std::size_t count = units - unit;
            const std::size_t at = row * units + unit;
            const V i = load_part<V>(gates + unit, count);
            const V f = load_part<V>(gates + units + unit, count);
            const V g = load_part<V>(gates + 2 * units + unit, count);
            const V o = load_part<V>(gates + 3 * units + unit, count);
            const V tanh_c = tanh<T, lanes>(load_part<V>(s.cell + at, count));
            const V c_prev = load_part<V>(s.cell_prev + at, count);
            const V grad_h = load_part<V>(s.grad_h + at, count);
            const V grad_c = load_part<V>(s.grad_c + at, count) + grad_h * o * (one - tanh_c * tanh_c);
            store_part(grad_gates + unit, grad_c * g * i * (one - i), count);
            store_part(grad_gates + units + unit, grad_c * c_prev * f * (one - f), count);
            store_part(grad_gates + 2 * units + unit, grad_c * i * (one - g * g), count);
            store_part(grad_gates + 3 * units + unit, grad_h * tanh_c * o * (one - o), count);
            store_part(s.grad_c + at, grad_c * f, count);
        }
    }
}

extern const Kernels<float> kernels_float = {
    product<float>, widen_weights<float>,    step<float>, step_backward<float>, variant_sweep<float>,
    dense<float>,   apply_activation<float>, digest};
extern const Kernels<double> kernels_double = {
    product<double>, widen_weights<double>,    step<double>, step_backward<double>, variant_sweep<double>,
    dense<double>,   apply_activation<double>, digest};

}  // namespace CELLSTEP_ISA
}  // namespace core
}  // namespace cellstep
