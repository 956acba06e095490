/// The schemas of all operators, whatever library has their kernels.
#pragma once

#include <torch/csrc/stable/library.h>

namespace cellstep {
namespace ops {

inline void define_operators(torch::stable::detail::StableLibrary& library) {
    library.def(
        "lstm_cell(Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
        "Tensor? bias_hh, bool save) -> (Tensor, Tensor, Tensor)");
    library.def(
        "lstm_cell_backward(Tensor grad_h, Tensor grad_c, Tensor x, Tensor h, Tensor c, Tensor weight_ih, "
        "Tensor weight_hh, Tensor c_next, Tensor gates) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    library.def(
        "lstm_layer(Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
        "Tensor? bias_hh, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
    library.def(
        "lstm_layer_backward(Tensor? grad_y, Tensor? grad_h, Tensor? grad_c, Tensor? grad_cells, Tensor x, Tensor h, "
        "Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor y, Tensor gates, Tensor cells, bool to_x, "
        "bool to_weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    library.def(
        "lstm_packed(Tensor x, Tensor? batch_sizes, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, "
        "Tensor? bias_ih, Tensor? bias_hh, Tensor? weight_hr, bool reverse, bool save_gates, "
        "bool save_cells) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
    library.def(
        "lstm_packed_backward(Tensor? grad_y, Tensor? grad_h, Tensor? grad_c, Tensor? grad_cells, Tensor x, "
        "Tensor? batch_sizes, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor? weight_hr, Tensor y, "
        "Tensor gates, Tensor cells, bool reverse, bool to_x, bool to_weights) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    library.def(
        "lstm_variant(Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
        "Tensor? bias_hh, Tensor? weight_hr, Tensor? weight_peephole, Tensor? norm_ih, Tensor? norm_hh, "
        "Tensor? norm_c, Tensor? norm_c_bias, Tensor? reset, Tensor? initial_h, Tensor? initial_c, Tensor? mask_h, "
        "Tensor? mask_g, Tensor? keep_h, Tensor? keep_c, bool coupled, float cell_clip, float zoneout_h, "
        "float zoneout_c, int gate_activation, int activation, int output_activation, bool save_cells) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
    library.def(
        "lstm_layers(Tensor x, Tensor? batch_sizes, Tensor? lengths, Tensor? reset, Tensor h, Tensor c, "
        "Tensor? initial_h, Tensor? initial_c, Tensor[] weights, bool biased, bool bidirectional, bool save) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    library.def(
        "lstm_layers_backward(Tensor? grad_y, Tensor? grad_h, Tensor? grad_c, Tensor? grad_cells, Tensor x, "
        "Tensor? batch_sizes, Tensor? lengths, Tensor? reset, Tensor h, Tensor c, Tensor[] weights, bool biased, "
        "bool bidirectional, Tensor y, Tensor outputs, Tensor gates, Tensor cells, bool to_x) "
        "-> (Tensor, Tensor, Tensor, Tensor[])");
    library.def("has_kernels(Tensor x) -> bool");
    library.def("dense(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
    library.def("activate(Tensor x, int activation) -> Tensor");
    library.def(
        "lstm_stack(Tensor image, Tensor x, Tensor? h, Tensor? c, bool batch_first) -> (Tensor, Tensor, Tensor)");
    library.def(
        "run_model(Tensor image, Tensor x, Tensor? h, Tensor? c, int output_size, int answers, Tensor? lengths, "
        "Tensor? reset) -> (Tensor, Tensor, Tensor)");
    library.def(
        "run_records(int[] records, Tensor image, Tensor x, Tensor? h, Tensor? c, int output_size, int answers, "
        "Tensor? lengths, Tensor? reset) -> (Tensor, Tensor, Tensor)");
}

}  // namespace ops
}  // namespace cellstep
