// A cell step is a layer of one step: all goes its road.
#include "operators.h"

namespace cellstep {
namespace cuda {

namespace {

/// (N, K) as (1, N, K), or back.
Tensor as_step(const Tensor& tensor) { return torch::stable::unsqueeze(tensor, 0); }
Tensor as_cell(const Tensor& tensor) { return torch::stable::squeeze(tensor, 0); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lstm_cell(Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh,
                                             Maybe bias_ih, Maybe bias_hh, bool save) {
    ops::check_input("lstm_cell", "x", x, 2);
    const auto [y, h_n, c_n, gates, cells] = lstm_layer(as_step(x), h, c, weight_ih, weight_hh, bias_ih, bias_hh, save);
    return {h_n, c_n, save ? as_cell(gates) : gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_cell_backward(Tensor grad_h, Tensor grad_c, Tensor x,
                                                                              Tensor h, Tensor c, Tensor weight_ih,
                                                                              Tensor weight_hh, Tensor c_next,
                                                                              Tensor gates) {
    const char* op = "lstm_cell_backward";
    ops::check_input(op, "x", x, 2);
    ops::check_input(op, "gates", gates, 2);
    ops::check_input(op, "c_next", c_next, 2);
    // The output of the one step is its last h: all of grad_h comes in there, and none by way of the sequence.
    auto [grad_x, grad_h0, grad_c0, grad_weight_ih, grad_weight_hh, grad_bias] =
        lstm_layer_backward(std::nullopt, grad_h, grad_c, std::nullopt, as_step(x), h, c, weight_ih, weight_hh,
                            as_step(c_next), as_step(gates), as_step(c_next), true, true);
    return {as_cell(grad_x), grad_h0, grad_c0, grad_weight_ih, grad_weight_hh, grad_bias};
}

}  // namespace cuda
}  // namespace cellstep
