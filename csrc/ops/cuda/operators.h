/// The operators' kernels on CUDA, one file each; csrc/ops/operators.h has the shapes of those that the CPU has too.
/// All take float32, float64, float16 or bfloat16, with sums and the cell state inside a call in float32, in float64
/// for float64; any strides. They throw std::runtime_error for what does not fit, run on the current stream of the
/// input's device, and wait for nothing.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "ops/options.h"
#include "tensor.h"

namespace cellstep {
namespace cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer(Tensor x, Tensor h, Tensor c, Tensor weight_ih,
                                                              Tensor weight_hh, Maybe bias_ih, Maybe bias_hh,
                                                              bool save);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer_backward(
    Maybe grad_y, Maybe grad_h, Maybe grad_c, Maybe grad_cells, Tensor x, Tensor h, Tensor c, Tensor weight_ih,
    Tensor weight_hh, Tensor y, Tensor gates, Tensor cells, bool to_x, bool to_weights);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_packed(Tensor x, Maybe batch_sizes, Tensor h, Tensor c,
                                                               Tensor weight_ih, Tensor weight_hh, Maybe bias_ih,
                                                               Maybe bias_hh, Maybe weight_hr, bool reverse,
                                                               bool save_gates, bool save_cells);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_packed_backward(
    Maybe grad_y, Maybe grad_h, Maybe grad_c, Maybe grad_cells, Tensor x, Maybe batch_sizes, Tensor h, Tensor c,
    Tensor weight_ih, Tensor weight_hh, Maybe weight_hr, Tensor y, Tensor gates, Tensor cells, bool reverse, bool to_x,
    bool to_weights);

/// A plain stack: x (T, N, I), or (P, I) packed with batch_sizes (T) int64 on the CPU; lengths (N) int64 and reset
/// (T, N) bool of padded rows; h and c (L D, N, H); initial_h and initial_c (L D, H), what resets put, or zero;
/// weights: of each layer and in it of each direction weight_ih, weight_hh and, if `biased`, bias_ih, bias_hh.
/// -> y (T, N, D H) or (P, D H), h and c behind each row's last step, and with `save` the outputs of the layers before
/// the last (L - 1, ..., D H), gates (L D, P, 4 H) behind their activations and cells (L D, P, H); else these are
/// empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layers(Tensor x, Maybe batch_sizes, Maybe lengths,
                                                                       Maybe reset, Tensor h, Tensor c, Maybe initial_h,
                                                                       Maybe initial_c, std::vector<Tensor> weights,
                                                                       bool biased, bool bidirectional, bool save);

/// Of a call with zero as the initial state. grad_cells (D, P, H) is of the last layer. -> gradients of x, empty unless
/// `to_x`, of h, of c and of the weights in their order.
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_layers_backward(
    Maybe grad_y, Maybe grad_h, Maybe grad_c, Maybe grad_cells, Tensor x, Maybe batch_sizes, Maybe lengths, Maybe reset,
    Tensor h, Tensor c, std::vector<Tensor> weights, bool biased, bool bidirectional, Tensor y, Tensor outputs,
    Tensor gates, Tensor cells, bool to_x);

/// ops/options.h has the shapes.
std::tuple<Tensor, Tensor, Tensor, Tensor> variant_layer(ops::Variant call);

Tensor dense(Tensor x, Tensor weight, Maybe bias);

Tensor activate(Tensor x, std::int64_t activation);

/// run_model where the image's bytes lie on the device and `records`, on the host, are what a call must know of them:
/// the header and the records as the file has them, in 64-bit words, and then of each LSTM record cell_clip, zoneout of
/// h and zoneout of c as float64 words. x, h, c, lengths and reset lie on the image's device. All weights are computed
/// with in the model's own type: bfloat16, float16 and int8 ones are widened, int8 layers do not round their inputs as
/// they do on the CPU, and fast activations are computed exactly.
std::tuple<Tensor, Tensor, Tensor> run_records(std::vector<std::int64_t> records, Tensor image, Tensor x, Maybe h,
                                               Maybe c, std::int64_t output_size, std::int64_t answers, Maybe lengths,
                                               Maybe reset);

}  // namespace cuda
}  // namespace cellstep
