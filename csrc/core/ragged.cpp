#include "core/ragged.h"

#include <cstring>

#include "core/denormals.h"
#include "core/pack.h"

namespace cellstep {
namespace core {

std::size_t row_shares(const PackedSteps& steps, const Parallel* parallel, std::size_t work,
                       std::size_t (&begin)[max_row_shares + 1]) {
    const std::size_t tokens = all_steps(steps).tokens;
    // A tile of the matrix product has six rows; with fewer a share reads more weights than it computes with.
    constexpr std::size_t fewest_rows = 6;
    constexpr std::size_t worth_waking = 1u << 20;
    std::size_t shares = parallel ? parallel->threads : 1;
    const auto at_most = [&shares](std::size_t count) { shares = count < shares ? count : shares; };
    at_most(max_row_shares);
    at_most(steps.batch / fewest_rows);
    at_most(tokens * work / worth_waking);
    if (shares == 0) shares = 1;
    begin[0] = 0;
    begin[shares] = steps.batch;
    std::size_t row = 0;
    std::size_t before = 0;  // tokens of the rows above `row`
    std::size_t length = steps.steps;
    for (std::size_t share = 1; share < shares; ++share) {
        for (; row < steps.batch && before * shares < tokens * share; ++row) {
            while (length > 0 && steps.rows_of(length - 1) <= row) --length;
            before += length;
        }
        begin[share] = row;
    }
    return shares;
}

namespace {

template <class T>
std::size_t share_scratch(const RaggedForward<T>& layer) {
    // What a step wants, and h before the projection.
    return 64 * (layer.steps.batch + layer.input_size + layer.recurrent_size) + layer.steps.batch * layer.hidden_size;
}

template <class T>
std::size_t shares_of(const RaggedForward<T>& layer, std::size_t (&begin)[max_row_shares + 1]) {
    return row_shares(layer.steps, layer.parallel,
                      token_work(layer.input_size, layer.hidden_size, layer.recurrent_size), begin);
}

template <class T>
void run_rows(const RaggedForward<T>& layer, std::size_t first, std::size_t last, T* scratch) {
    const FlushDenormals flush;
    const std::size_t units = layer.hidden_size;
    const std::size_t recurrent = layer.recurrent_size;
    T* h = layer.h + first * recurrent;
    T* c = layer.c + first * units;
    T* hidden = scratch + 64 * (layer.steps.batch + layer.input_size + recurrent);
    Step<T> s{};
    s.input_size = layer.input_size;
    s.hidden_size = units;
    s.recurrent_size = recurrent;
    s.last_unit = units;
    s.weights = WeightType::full;
    s.packed = layer.packed;
    s.x_stride = static_cast<std::ptrdiff_t>(layer.input_size);
    s.h_stride = static_cast<std::ptrdiff_t>(recurrent);
    s.h_next_stride = static_cast<std::ptrdiff_t>(units);
    s.scratch = scratch;
    for_each_step(layer.steps, all_steps(layer.steps), false, first, last, [&](const StepRows& at) {
        T* y = layer.y + at.token * recurrent;
        s.rows = at.rows;
        s.x = layer.x + at.token * layer.input_size;
        s.h = h;
        s.c = c;
        s.c_next = layer.cells ? layer.cells + at.token * units : c;
        s.h_next = layer.projection ? hidden : y;
        s.gates = layer.gates ? layer.gates + at.token * gate_count * units : nullptr;
        kernels<T>().step(s);
        // The next step begins where this one ended: the weights that it read last may still lie in cache.
        s.backwards = !s.backwards;
        if (layer.projection) {
            std::memset(y, 0, at.rows * recurrent * sizeof(T));
            kernels<T>().product(
                {at.rows, recurrent, units, hidden, s.h_next_stride, 1, layer.projection, s.h_stride, y, s.h_stride});
        }
        // A row whose last step this was keeps its state; one whose first step comes finds its own.
        std::memcpy(h, y, at.rows * recurrent * sizeof(T));
        if (layer.cells) std::memcpy(c, s.c_next, at.rows * units * sizeof(T));
    });
}

}  // namespace

template <class T>
std::size_t ragged_scratch(const RaggedForward<T>& layer) {
    std::size_t begin[max_row_shares + 1];
    return shares_of(layer, begin) * share_scratch(layer);
}

template <class T>
void ragged_forward(const RaggedForward<T>& layer, T* scratch) {
    std::size_t begin[max_row_shares + 1];
    for_each(layer.parallel, shares_of(layer, begin), [&](std::size_t share) {
        run_rows(layer, begin[share], begin[share + 1], scratch + share * share_scratch(layer));
    });
}

template std::size_t ragged_scratch<float>(const RaggedForward<float>&);
template std::size_t ragged_scratch<double>(const RaggedForward<double>&);
template void ragged_forward<float>(const RaggedForward<float>&, float*);
template void ragged_forward<double>(const RaggedForward<double>&, double*);

}  // namespace core
}  // namespace cellstep
