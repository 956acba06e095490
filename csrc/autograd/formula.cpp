#include "formula.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <vector>

namespace cellstep {
namespace autograd {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

Tensor activate(const Tensor& x, std::int64_t activation) {
    switch (activation) {
        case 1:
            return at::relu(x);
        case 2:
            return at::sigmoid(x);
        case 3:
            return at::tanh(x);
        case 4:
            return at::clamp(0.2 * x + 0.5, 0, 1);
        case 5:
            return at::clamp(x + 3, 0, 6) / 6;
        case 6:
            return at::elu(x);
        case 7:
            return at::softmax(x, -1);
        default:
            return x;
    }
}

/// Derivative of an elementwise activation in terms of its value.
Tensor slope(const Tensor& y, std::int64_t activation) {
    switch (activation) {
        case 1:
            return (y > 0).to(y.scalar_type());
        case 2:
            return y * at::rsub(y, 1);
        case 3:
            return at::rsub(y * y, 1);
        case 4:
            return 0.2 * ((y > 0) & (y < 1)).to(y.scalar_type());
        case 5:
            return ((y > 0) & (y < 1)).to(y.scalar_type()) / 6;
        case 6:
            return at::where(y > 0, at::ones_like(y), y + 1);
        default:
            return at::ones_like(y);
    }
}

Tensor normalised(const Tensor& x, const Tensor& gain, const Tensor& shift) {
    if (gain.defined()) return at::layer_norm(x, {x.size(-1)}, gain, shift, 1e-5);
    return shift.defined() ? x + shift : x;
}

/// Zoneout: the share of the old value that stays is a mask in training and its probability for inference.
Tensor zoned(const Tensor& before, const Tensor& after, const Tensor& keep, std::int64_t step, double share) {
    if (keep.defined()) return keep[step] * before + at::rsub(keep[step], 1) * after;
    return share > 0 ? share * before + (1 - share) * after : after;
}

}  // namespace

LayerResults lstm_steps(const LayerTensors& tensors, const LayerOptions& options) {
    const auto& [x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_peephole, norm_ih, norm_hh,
                 norm_c, norm_c_bias, reset, initial_h, initial_c, mask_h, mask_g, keep_h, keep_c] = tensors;
    const std::int64_t units = c_0.size(1);
    const std::int64_t gate = options.gate_activation;
    // Rows i, f, o, or coupled i, o.
    const variable_list peepholes = weight_peephole.defined() ? weight_peephole.split(units) : variable_list();
    // Not sliced step by step, whose gradients would each be as large as the whole.
    const variable_list projected = normalised(at::linear(x, weight_ih), norm_ih, bias_ih).unbind();
    Tensor h = h_0, c = c_0;
    variable_list outputs, cells;
    for (std::int64_t step = 0; step < x.size(0); ++step) {
        if (reset.defined()) {
            const Tensor cleared = reset[step].unsqueeze(1);
            h = at::where(cleared, initial_h.defined() ? initial_h : at::zeros_like(h), h);
            c = at::where(cleared, initial_c.defined() ? initial_c : at::zeros_like(c), c);
        }
        const Tensor h_in = mask_h.defined() ? h * mask_h : h;
        const Tensor sums = projected[step] + normalised(at::linear(h_in, weight_hh), norm_hh, bias_hh);
        // Rows i, f, g, o, or coupled i, g, o.
        const variable_list parts = sums.split(units, 1);
        Tensor at_i = parts.front(), at_f = parts[1], at_o = parts.back();
        if (!peepholes.empty()) {
            at_i = at_i + peepholes.front() * c;
            at_f = at_f + peepholes[1] * c;  // not read when coupled
        }
        const Tensor i = activate(at_i, gate);
        const Tensor f = options.coupled ? at::rsub(i, 1) : activate(at_f, gate);
        Tensor g = activate(parts[parts.size() - 2], options.activation);
        if (mask_g.defined()) g = g * mask_g;
        Tensor new_c = f * c + i * g;
        if (options.cell_clip > 0) new_c = at::clamp(new_c, -options.cell_clip, options.cell_clip);
        if (!peepholes.empty()) at_o = at_o + peepholes.back() * new_c;
        Tensor new_h =
            activate(at_o, gate) * activate(normalised(new_c, norm_c, norm_c_bias), options.output_activation);
        if (weight_hr.defined()) new_h = at::linear(new_h, weight_hr);
        c = zoned(c, new_c, keep_c, step, options.zoneout_c);
        h = zoned(h, new_h, keep_h, step, options.zoneout_h);
        outputs.push_back(h);
        cells.push_back(c);
    }
    return {at::stack(outputs), h, c, at::stack(cells)};
}

LayerTensors lstm_steps_gradients(const LayerTensors& tensors, const LayerOptions& options, const LayerResults& grads) {
    const bool create_graph = at::GradMode::is_enabled();
    const at::AutoGradMode differentiable(true);
    // Aliases, so that the gradient stops at the layer's inputs and does not run on through their own history.
    LayerTensors aliases, found;
    std::vector<std::size_t> places;
    variable_list wanted;
    for (std::size_t place = 0; place < layer_tensor_count; ++place) {
        if (!tensors[place].defined()) continue;
        aliases[place] = tensors[place].view_as(tensors[place]);
        if (!aliases[place].requires_grad()) continue;
        places.push_back(place);
        wanted.push_back(aliases[place]);
    }
    const LayerResults results = lstm_steps(aliases, options);
    variable_list outputs, given;
    for (std::size_t result = 0; result < results.size(); ++result) {
        if (!grads[result].defined() || !results[result].requires_grad()) continue;
        outputs.push_back(results[result]);
        given.push_back(grads[result]);
    }
    if (outputs.empty()) return found;
    const variable_list gradients = torch::autograd::grad(outputs, wanted, given, std::nullopt, create_graph, true);
    for (std::size_t k = 0; k < places.size(); ++k) found[places[k]] = gradients[k];
    return found;
}

Tensor activate_backward(const Tensor& grad, const Tensor& y, std::int64_t activation) {
    if (activation == 7) return y * (grad - (grad * y).sum(-1, /*keepdim=*/true));
    return grad * slope(y, activation);
}

}  // namespace autograd
}  // namespace cellstep
