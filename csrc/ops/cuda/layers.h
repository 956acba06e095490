/// The one road of all operators of plain LSTM layers: a stack over a batch, forward and backward. Shapes as in
/// kernels.h; arrays over tokens are (P, ...), whatever the operator's own shapes are.
#pragma once

#include <vector>

#include "tensor.h"

namespace cellstep {
namespace cuda {

/// The steps of a batch: what kernels read of them, and what the host knows.
struct Batch {
    Steps steps;
    std::vector<int> offsets;  ///< (T + 1) of packed rows, else empty
    Maybe device_offsets;      ///< (T) int32
    Maybe device_lengths;      ///< (N) int32
    Maybe reset;               ///< (T, N) bool

    /// What whole-sequence kernels read, which want the lengths of packed rows as well.
    Steps with_lengths() const {
        Steps answer = steps;
        if (device_lengths) answer.lengths = ops::data<int>(*device_lengths);
        return answer;
    }

    std::int64_t first(int step) const {
        return offsets.empty() ? std::int64_t(step) * steps.batch : offsets[static_cast<std::size_t>(step)];
    }
    int rows(int step) const { return static_cast<int>(first(step + 1) - first(step)); }
};

/// Of padded rows; lengths and reset have been checked.
Batch padded(const char* op, const Device& device, std::int64_t steps, std::int64_t batch, const Maybe& lengths,
             const Maybe& reset);

/// Of packed rows; checks batch_sizes against the tokens and rows there are. Without them every step has all rows.
Batch packed(const char* op, const Device& device, std::int64_t tokens, std::int64_t batch, const Maybe& batch_sizes,
             const Tensor& x);

struct Weights {
    Tensor weight_ih;
    Tensor weight_hh;
    Maybe bias_ih;
    Maybe bias_hh;
};

struct Stack {
    Batch batch;
    int layers;
    int directions;
    bool reverse;                 ///< with one direction: that runs backwards
    std::vector<Weights> stages;  ///< any strides
    Maybe weight_hr;              ///< (R, H), with one layer and one direction
    Tensor x;                     ///< (P, I), contiguous as all below
    Tensor h;                     ///< (L D, N, R), R = H without a projection
    Tensor c;                     ///< (L D, N, H)
    Maybe initial_h;              ///< (L D, H) for resets, or none: zero
    Maybe initial_c;

    std::int64_t tokens() const { return batch.steps.tokens; }
    std::int64_t inputs() const { return x.size(1); }
    std::int64_t units() const { return c.size(2); }
    std::int64_t recurrent() const { return h.size(2); }
    std::int64_t stage(int layer, int direction) const { return std::int64_t(layer) * directions + direction; }
    bool backwards(int direction) const { return reverse || direction == 1; }
};

struct Answers {
    Tensor y;        ///< (P, D R)
    Tensor h_n;      ///< (L D, N, R)
    Tensor c_n;      ///< (L D, N, H)
    Tensor outputs;  ///< (L - 1, P, D R)
    Maybe gates;     ///< (L D, P, 4 H)
    Maybe cells;     ///< (L D, P, H)
};

Answers forward(const char* op, const Device& device, const Stack& stack, bool save_gates, bool save_cells);

/// What a backward pass goes out from: results of the forward pass, and gradients, where any came.
struct Given {
    Tensor y;
    Maybe outputs;  ///< of more layers than one
    Tensor gates;
    Tensor cells;
    Maybe grad_y;      ///< (P, D R)
    Maybe grad_h;      ///< (L D, N, R)
    Maybe grad_c;      ///< (L D, N, H)
    Maybe grad_cells;  ///< (D, P, H), of the last layer
};

struct StageGradients {
    Maybe weight_ih;
    Maybe weight_hh;
    Maybe bias;  ///< of either
};

struct Gradients {
    Maybe x;  ///< (P, I)
    Tensor h;
    Tensor c;
    std::vector<StageGradients> stages;
    Maybe weight_hr;
};

Gradients backward(const char* op, const Device& device, const Stack& stack, const Given& given, bool to_x,
                   bool to_weights, bool to_biases);

/// Array `index` of equal ones that lie one behind the other.
inline Tensor part(const Tensor& arrays, std::int64_t index) {
    return ops::rows_of(arrays, index * arrays.size(1), arrays.size(1), arrays.size(2));
}
inline Maybe part(const Maybe& arrays, std::int64_t index) {
    return arrays ? Maybe(part(*arrays, index)) : std::nullopt;
}

/// The transpose of a matrix with any strides, without a copy.
inline Tensor transpose_of(const Tensor& matrix) {
    return ops::view_of(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

// plain.cpp: one stage with torch's products, a step at a time.

struct StageForward {
    const Stack& stack;
    int layer;
    int direction;
    Tensor input;  ///< (P, K)
    Tensor y;      ///< (P, D R), of which the direction writes its part
    Tensor h_n;    ///< (N, R)
    Tensor c_n;    ///< (N, H)
    Maybe gates;   ///< (P, 4 H)
    Maybe cells;   ///< (P, H)
};
void plain_forward(const char* op, const Device& device, const StageForward& stage);

struct StageBackward {
    const Stack& stack;
    int layer;
    int direction;
    Tensor gates;        ///< (P, 4 H)
    Tensor cells;        ///< (P, H)
    Maybe grad_y;        ///< (P, D R)
    Maybe grad_cells;    ///< (P, H)
    Maybe grad_h_n;      ///< (N, R)
    Maybe grad_c_n;      ///< (N, H)
    Tensor grad_sums;    ///< (P, 4 H)
    Tensor grad_h;       ///< (N, R)
    Tensor grad_c;       ///< (N, H)
    Maybe grad_outputs;  ///< (P, R) with a projection: the gradient of what it gave
};
void plain_backward(const char* op, const Device& device, const StageBackward& stage);

}  // namespace cuda
}  // namespace cellstep
