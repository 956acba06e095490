/// What the plain road runs between torch's products, and what turns a batch's description into one that kernels read.
/// Shapes and terms as in kernels.h; "before" and "behind" are in the order in which the direction runs.
#pragma once

#include "kernels.h"

namespace cellstep {
namespace cuda {

/// Of a device, asked for once.
int multiprocessors(int device);

/// target (count) = values, which lie on the host: they travel as arguments of launches, so that nothing waits and a
/// graph may capture it.
const char* put_ints(const int* values, std::int64_t count, int* target, void* stream);

/// target (batch) = lengths, cut to 0 to steps.
const char* cut_lengths(const std::int64_t* lengths, int batch, int steps, int* target, void* stream);

/// target (batch) = the steps of each packed row.
const char* packed_lengths(const Steps& steps, int* target, void* stream);

/// target (pieces, batch): the steps that each row has in each piece of `steps` steps.
const char* lengths_in_pieces(const int* lengths, int batch, int steps, int pieces, int* target, void* stream);

/// One step of one stage. Tokens of its rows: first, first + 1 and so on.
struct Step {
    Steps steps;
    bool reverse;
    int step;
    int rows;
    std::int64_t first;
    int before;  ///< the step before, or -1
    int before_rows;
    std::int64_t before_first;
    int behind;  ///< the step behind, or -1
    int behind_rows;
};

/// The state with which a stage begins.
struct CellBegin {
    DataType type;
    Steps steps;
    bool reverse;
    int hidden_size;
    int recurrent_size;
    const void* h;          ///< (N, R)
    const void* c;          ///< (N, H)
    const void* initial_h;  ///< (R), or null: zero
    const void* initial_c;  ///< (H), or null: zero
    void* h_state;          ///< (N, R): what the first step reads
    void* c_state;          ///< (N, H), in the type of sums
    void* c_n;              ///< (N, H), or null where c_state is of the same type
    void* stream;
};
const char* cell_begin(const CellBegin& call);

/// The gates of a step, its cells and outputs.
struct CellForward {
    DataType type;
    Step at;
    int hidden_size;
    const void* sums;      ///< (P, 4 H), of this stage: W_ih x
    const void* products;  ///< (rows, 4 H): W_hh h
    WeightView bias_ih;
    WeightView bias_hh;
    const void* initial_h;
    const void* initial_c;
    void* h_state;  ///< (N, H): h behind the step, reset for the next; or null, where a projection follows
    void* c_state;  ///< (N, H), in the type of sums
    void* c_n;      ///< (N, H), or null where c_state is of the same type
    void* y;        ///< of token 0
    std::int64_t y_row;
    std::int64_t y_first;  ///< the token that y begins with
    void* gates;           ///< null, or (P, 4 H); may be `sums`
    void* cells;           ///< null, or (P, H)
    std::int64_t sums_first;
    void* stream;
};
const char* cell_forward(const CellForward& call);

/// Gradients of a step's gate sums.
struct CellBackward {
    DataType type;
    Step at;
    int hidden_size;
    const void* c;          ///< (N, H), what the stage began with
    const void* initial_c;  ///< (H), or null: zero
    const void* gates;      ///< (P, 4 H)
    const void* cells;      ///< (P, H)
    const void* grad_y;     ///< of token 0, or null
    std::int64_t grad_y_row;
    const void* grad_cells;  ///< (P, H), or null
    const void* grad_h_n;    ///< (N, H), or null
    const void* grad_c_n;    ///< (N, H), or null
    const void* products;    ///< (N, H): what the step behind sends to h; with `whole` all of h's gradient
    bool whole;
    void* c_state;    ///< (N, H), in the type of sums: what the step behind sends to c
    void* grad_sums;  ///< (P, 4 H)
    void* grad_h;     ///< (N, H): of the rows whose first step lies before this one
    void* stream;
};
const char* cell_backward(const CellBackward& call);

/// grad_outputs (P, R) of a step: that of y, and what the step behind sends.
struct ProjectBackward {
    DataType type;
    Step at;
    int recurrent_size;
    const void* grad_y;    ///< (P, R), or null
    const void* grad_h_n;  ///< (N, R), or null
    const void* products;  ///< (N, R)
    void* grad_outputs;    ///< (P, R)
    void* stream;
};
const char* project_backward(const ProjectBackward& call);

/// The gradients of the state that a stage began with.
struct CellFinish {
    DataType type;
    Steps steps;
    bool reverse;
    int begun;  ///< rows that have a step, unless lengths tell
    int hidden_size;
    int recurrent_size;
    const void* products;  ///< (N, R)
    const void* c_state;   ///< (N, H), in the type of sums
    const void* grad_h_n;  ///< (N, R), or null
    const void* grad_c_n;  ///< (N, H), or null
    void* grad_h;          ///< (N, R)
    void* grad_c;          ///< (N, H)
    void* stream;
};
const char* cell_finish(const CellFinish& call);

/// target (P, R): the h that each token's step read; zeros past a row's length.
struct HiddenBefore {
    DataType type;
    Steps steps;
    bool reverse;
    int recurrent_size;
    const void* h;          ///< (N, R), what the stage began with
    const void* initial_h;  ///< (R), or null: zero
    const void* y;          ///< of token 0
    std::int64_t y_row;
    void* target;
    void* stream;
};
const char* hidden_before(const HiddenBefore& call);

/// target (tokens, H) = o tanh(c): what a projection reads.
const char* hidden_again(DataType type, std::int64_t tokens, int hidden_size, const void* gates, const void* cells,
                         void* target, void* stream);

/// target (T N, width) = values, with zeros past each row's length.
const char* keep_lengths(DataType type, const Steps& steps, int width, const void* values, void* target, void* stream);

/// Pieces into which column_sums cuts `rows` rows: as many rows of `columns` sums does its scratch have.
int column_pieces(std::int64_t rows);

/// target (columns) = sums over the rows of values (rows, columns), always in the same order.
const char* column_sums(DataType type, std::int64_t rows, int columns, const void* values, void* scratch, void* target,
                        void* stream);

}  // namespace cuda
}  // namespace cellstep
