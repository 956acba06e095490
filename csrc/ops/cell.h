/// A cell step is a layer of one step: it takes the layer's kernels, so that it gives the same bits.
#pragma once

#include <optional>
#include <tuple>

#include "ops/tensor.h"

namespace cellstep {
namespace ops {

/// (N, K) as (1, N, K), or back.
inline Tensor as_step(const Tensor& tensor) { return torch::stable::unsqueeze(tensor, 0); }
inline Tensor as_cell(const Tensor& tensor) { return torch::stable::squeeze(tensor, 0); }

/// x (N, I), h and c (N, H) -> h (N, H), c (N, H), gates (N, 4 H), or an empty tensor unless `save`. `layer`: a
/// library's lstm_layer.
template <auto layer>
std::tuple<Tensor, Tensor, Tensor> lstm_cell(Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh,
                                             std::optional<Tensor> bias_ih, std::optional<Tensor> bias_hh, bool save) {
    check_input("lstm_cell", "x", x, 2);
    const auto [y, h_n, c_n, gates, cells] = layer(as_step(x), h, c, weight_ih, weight_hh, bias_ih, bias_hh, save);
    return {h_n, c_n, save ? as_cell(gates) : gates};
}

/// -> gradients of x, h, c, weight_ih, weight_hh and of either bias (4 H). `layer_backward`: lstm_layer_backward.
template <auto layer_backward>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_cell_backward(Tensor grad_h, Tensor grad_c, Tensor x,
                                                                              Tensor h, Tensor c, Tensor weight_ih,
                                                                              Tensor weight_hh, Tensor c_next,
                                                                              Tensor gates) {
    const char* op = "lstm_cell_backward";
    check_input(op, "x", x, 2);
    check_input(op, "gates", gates, 2);
    check_input(op, "c_next", c_next, 2);
    // The output of the one step is its last h: all of grad_h comes in there, and none by way of the sequence.
    auto [grad_x, grad_h0, grad_c0, grad_weight_ih, grad_weight_hh, grad_bias] =
        layer_backward(std::nullopt, grad_h, grad_c, std::nullopt, as_step(x), h, c, weight_ih, weight_hh,
                       as_step(c_next), as_step(gates), as_step(c_next), true, true);
    return {as_cell(grad_x), grad_h0, grad_c0, grad_weight_ih, grad_weight_hh, grad_bias};
}

}  // namespace ops
}  // namespace cellstep
