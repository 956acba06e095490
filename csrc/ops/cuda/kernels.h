/// The launches of this directory, free of torch: what each kernel reads and writes. Shapes: T steps, N rows, I inputs,
/// H hidden units, L layers, D directions, P tokens, which are T N unless rows are packed. A "stage" is one layer in
/// one direction, number layer * D + direction. Every array is contiguous unless strides are named.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cellstep {
namespace cuda {

enum class DataType : int { float32, float64, float16, bfloat16 };

constexpr std::size_t value_bytes(DataType type) {
    return type == DataType::float64 ? 8 : type == DataType::float32 ? 4 : 2;
}

/// Stages of one launch at most.
constexpr int max_stages = 16;

/// Where weight `k` of unit u in gate g (i, f, g, o) lies, in values behind `data`:
/// g * gate + (u / 16) * panel + (u % 16) * unit + k * column. torch's layout (4 H, K) has gate = H K, panel = 16 K,
/// unit = K, column = 1; a deploy file's panels of 16 units are read where they lie.
struct WeightView {
    const void* data;  ///< null: there is none, as of a bias
    std::int64_t gate;
    std::int64_t panel;
    std::int64_t unit;
    std::int64_t column;
};

inline WeightView weight_view(const void* data, std::int64_t hidden_size, std::int64_t columns) {
    return {data, hidden_size * columns, 16 * columns, columns, 1};
}

struct StageWeights {
    WeightView weight_ih;  ///< of I columns in the first layer, D H in the others
    WeightView weight_hh;  ///< of H columns
    WeightView bias_ih;    ///< of one column; both biases are added
    WeightView bias_hh;
};

/// The steps of a batch. Token of step t and row n: (offsets ? offsets[t] : t * N) + n.
struct Steps {
    int steps;
    int batch;
    std::int64_t tokens;
    const int* offsets;          ///< (T) on the device, of packed rows, which then come by falling length; or null
    const int* lengths;          ///< (N) on the device, 0 to T, of packed rows always; or null: all T. Past its length
                                 ///< nothing of a row is read, and of a padded batch zeros are written there.
    const unsigned char* reset;  ///< (T, N) on the device, or null: rows to put to the initial state before the step
};

/// A state that goes from one piece of a sequence to the next, a launch each: h and c as the kernel has them, not
/// rounded to the type of the arrays, so that the bits do not hang on where a sequence is cut. Of calls with one
/// direction that is not reversed; the kernels that goes_on() of pieces.cpp names heed it.
struct Carried {
    float* h;  ///< (L D, N, H); null, as c: there is none
    float* c;  ///< (L D, N, H)
};

/// Whole sequences, all stages in one launch. A stage of odd direction runs from each row's last step to its first,
/// and resets part the same pairs of steps there: going backwards the state is put to the initial one behind a step
/// that has the flag.
struct Forward {
    DataType type;
    Steps steps;
    int input_size;
    int hidden_size;
    int layers;
    int directions;
    bool reverse;  ///< with one direction: that runs backwards
    StageWeights stages[max_stages];
    const void* x;          ///< (P, I), unless sums are given
    const void* sums;       ///< null, or (D, P, 4 H): W_ih x without biases; layers is 1 then
    const void* h;          ///< (L D, N, H)
    const void* c;          ///< (L D, N, H)
    Carried from;           ///< in place of h and c, where there is one
    Carried to;             ///< written beside h_n and c_n
    const void* initial_h;  ///< (L D, H) for resets, or null: zero
    const void* initial_c;  ///< (L D, H)
    void* outputs;          ///< (L - 1, P, D H): of the layers before the last, directions side by side
    void* y;                ///< (P, D H): of the last layer
    void* h_n;              ///< (L D, N, H), behind each row's last step; that of h where it has none
    void* c_n;              ///< (L D, N, H)
    void* gates;            ///< null, or (L D, P, 4 H): i, f, g, o behind their activations
    void* cells;            ///< null, or (L D, P, H): c behind each step
    int* progress;          ///< progress_words zeros on the device, by which blocks wait for one another
    int multiprocessors;
    void* stream;
};

/// The sweep back through one layer. A gradient that is null is zero.
struct Backward {
    DataType type;
    Steps steps;
    int hidden_size;
    int directions;
    bool reverse;  ///< with one direction: that runs backwards
    WeightView weight_hh[2];
    const void* c;             ///< (D, N, H), what the forward pass began with
    const void* initial_c;     ///< (D, H) for resets, or null: zero
    const void* gates;         ///< (D, P, 4 H)
    const void* cells;         ///< (D, P, H)
    const void* grad_outputs;  ///< (P, D H)
    const void* grad_cells;    ///< (D, P, H)
    const void* grad_h_n;      ///< (D, N, H)
    const void* grad_c_n;      ///< (D, N, H)
    Carried from;              ///< gradients in place of grad_h_n and grad_c_n, where there are any
    Carried to;                ///< written beside grad_h and grad_c
    void* grad_sums;           ///< (D, P, 4 H): gradient of the gate sums; zeros past a row's length
    void* grad_h;              ///< (D, N, H)
    void* grad_c;              ///< (D, N, H)
    int* progress;             ///< progress_words zeros on the device, of the kernels that have them
    int multiprocessors;
    void* stream;
};

// Each kernel answers whether it can do a call, and starts it: null, or what the driver says.

/// block.cu: a block keeps the weights of one stage in registers and shared memory, and the blocks of a stack run as a
/// wavefront. float32, float16, bfloat16; sums in float32.
bool block_fits(const Forward& call);
std::size_t block_progress_words(const Forward& call);
const char* block_forward(const Forward& call);
bool block_fits(const Backward& call);
const char* block_backward(const Backward& call);

/// tensor.cu: the same on tensor cores, eight rows and more a block. float16, bfloat16.
bool tensor_fits(const Forward& call);
std::size_t tensor_progress_words(const Forward& call);
const char* tensor_forward(const Forward& call);
bool tensor_fits(const Backward& call);
const char* tensor_backward(const Backward& call);

/// cluster_tensor.cu: one layer whose gate sums are given, on tensor cores, the weights of a direction over several
/// blocks: those of a cluster (compute capability 9.0) or, to H = 2,048, any of the grid. float16, bfloat16.
struct ClusterForm {
    enum Exchange { any, cluster, grid };
    Exchange exchange = any;  ///< any: as is likely fastest
    int parts = 0;            ///< blocks that share the weights; 0: as is likely fastest; 2, 4, 8 or 16 of a cluster
};
bool cluster_tensor_fits(const Forward& call, ClusterForm form = {});
std::size_t cluster_tensor_progress_words(const Forward& call, ClusterForm form = {});
const char* cluster_tensor_forward(const Forward& call, ClusterForm form = {});
bool cluster_tensor_fits(const Backward& call, ClusterForm form = {});
std::size_t cluster_tensor_progress_words(const Backward& call, ClusterForm form = {});
const char* cluster_tensor_backward(const Backward& call, ClusterForm form = {});

/// rows.cu: H to 64, any number of rows: a block takes many rows through all layers. All types.
bool rows_fits(const Forward& call);
const char* rows_forward(const Forward& call);

}  // namespace cuda
}  // namespace cellstep
