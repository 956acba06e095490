/// The operators' kernels on CUDA, one file each; csrc/ops/operators.h has their shapes. All take float32, float64,
/// float16 or bfloat16, with sums and the cell state inside a call in float32, in float64 for float64; any strides.
/// They throw std::runtime_error for what does not fit, run on the current stream of the input's device, and wait for
/// nothing.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "tensor.h"

namespace cellstep {
namespace cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_variant(
    Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Maybe bias_ih, Maybe bias_hh, Maybe weight_hr,
    Maybe weight_peephole, Maybe norm_ih, Maybe norm_hh, Maybe norm_c, Maybe norm_c_bias, Maybe reset, Maybe initial_h,
    Maybe initial_c, Maybe mask_h, Maybe mask_g, Maybe keep_h, Maybe keep_c, bool coupled, double cell_clip,
    double zoneout_h, double zoneout_c, std::int64_t gate_activation, std::int64_t activation,
    std::int64_t output_activation, bool save_cells);

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
