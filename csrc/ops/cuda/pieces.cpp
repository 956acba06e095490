#include "pieces.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

namespace cellstep {
namespace cuda {

namespace {

/// Streams beside a call's at most; layers share them in turn.
constexpr int most_streams = 8;

std::optional<int> forced(const char* op) {
    const char* text = std::getenv("CELLSTEP_CUDA_CHUNK");
    if (!text || !*text) return std::nullopt;
    char* end = nullptr;
    const long steps = std::strtol(text, &end, 10);
    if (*end || steps < 0 || steps > std::numeric_limits<int>::max())
        ops::fail(op, ": expected CELLSTEP_CUDA_CHUNK as a number of steps, got ", text, ": unset it");
    return static_cast<int>(steps);
}

/// Whether a kernel heeds `from` and `to` of a call.
bool goes_on(Kernel kernel) { return kernel != Kernel::plain && kernel != Kernel::rows; }

// Microseconds, derived from an H100's data sheet; nothing of it was measured.
constexpr double time_of_piece = 10;  // a launch, and weights that come to the blocks again
constexpr double time_of_step = 1.5;

/// Of the products of a stack's inputs, at half of what the sheet says.
double time_of_products(const Stack& stack) {
    const double operations = stack.x.element_size() == 2 ? 4e8 : 3e7;
    double time = 0;
    for (const Weights& weights : stack.stages)
        time += 2.0 * double(stack.tokens()) * double(weights.weight_ih.numel()) / operations;
    return time;
}

/// Pieces that are likely to pay: k of them hide all but 1 / k of what can run beside something else.
int likely_count(const Device& device, const Stack& stack) {
    const double of_block = 160 * 1024;  // bytes of weights that a block keeps
    const double weights = double(4 * stack.units() * stack.units() * stack.x.element_size());
    const double products = time_of_products(stack);
    const double recurrences = time_of_step * stack.layers * stack.batch.steps.steps;
    const double blocks = std::ceil(weights / of_block) * std::ceil(stack.batch.steps.batch / 16.0);
    const double taken = std::min(1.0, blocks / std::max(1, device.multiprocessors()));
    const double at_once = std::min<double>(stack.layers, std::max(1.0, std::floor(1 / taken)));
    const double hidden = std::min(products, recurrences * (1 - taken)) + recurrences * (1 - 1 / at_once);
    return static_cast<int>(std::sqrt(hidden / time_of_piece));
}

}  // namespace

bool pieces_forced(const char* op) { return forced(op).value_or(0) > 0; }

int piece_steps(const char* op, const Device& device, const Stack& stack, Kernel kernel) {
    constexpr int shortest = 32;  // a launch for fewer costs more than they do
    const int steps = stack.batch.steps.steps;
    // A sequence that runs backwards would come to a piece with rows that begin there beside rows that go on.
    if (!goes_on(kernel) || stack.directions > 1 || stack.reverse) return steps;
    if (const auto given = forced(op)) return *given == 0 ? steps : std::min(*given, steps);
    const int count = likely_count(device, stack);
    return count < 2 ? steps : std::min(steps, std::max(shortest, (steps + count - 1) / count));
}

bool products_pay(const char* op, const Stack& stack) {
    if (const auto given = forced(op)) return *given > 0;
    return time_of_products(stack) / stack.layers > 2 * time_of_piece;
}

Pieces::Pieces(const char* op, const Device& device, const Batch& batch, int length) : batch_(batch), length_(length) {
    if (count() < 2) return;
    if (batch.device_lengths) {
        lengths_ = empty_of(ops::ScalarType::Int, *batch.device_lengths, {count(), batch.steps.batch});
        check_launch(op, lengths_in_pieces(ops::data<int>(*batch.device_lengths), batch.steps.batch, length, count(),
                                           ops::mutable_data<int>(*lengths_), device.stream()));
    }
    if (batch.device_offsets) {
        std::vector<int> offsets(batch.offsets.begin(), batch.offsets.end() - 1);
        for (std::size_t step = offsets.size(); step-- > 0;)
            offsets[step] -= offsets[step - step % std::size_t(length)];
        offsets_ = empty_of(ops::ScalarType::Int, *batch.device_offsets, {batch.steps.steps});
        check_launch(op,
                     put_ints(offsets.data(), batch.steps.steps, ops::mutable_data<int>(*offsets_), device.stream()));
    }
}

int Pieces::step_count(int piece) const { return std::min(length_, batch_.steps.steps - first_step(piece)); }

std::int64_t Pieces::most_tokens() const {
    std::int64_t most = 0;
    for (int piece = 0; piece < count(); ++piece) most = std::max(most, tokens(piece));
    return most;
}

Steps Pieces::steps(int piece) const {
    Steps steps = batch_.with_lengths();
    if (count() < 2) return steps;
    steps.steps = step_count(piece);
    steps.tokens = tokens(piece);
    if (offsets_) steps.offsets = ops::data<int>(*offsets_) + first_step(piece);
    if (lengths_) steps.lengths = ops::data<int>(*lengths_) + std::int64_t(piece) * steps.batch;
    if (steps.reset) steps.reset += std::int64_t(first_step(piece)) * steps.batch;
    return steps;
}

Streams::~Streams() {
    // An error that comes here has been there before.
    for (void* stream : layers_) {
        void* event = nullptr;
        if (!cuda::mark(stream, &event)) wait_for(call(), event);
        marks_.push_back(event);
    }
    for (void* event : marks_)
        if (event) forget(event);
}

void* Streams::layer(int number) {
    if (!beside_) return call();
    const auto at = static_cast<std::size_t>(number % most_streams);
    while (layers_.size() <= at) {
        void* stream = nullptr;
        check_launch(op_, device_.beside(static_cast<int>(layers_.size()), &stream));
        layers_.push_back(stream);
    }
    return layers_[at];
}

void* Streams::mark(void* stream) {
    if (!beside_) return nullptr;
    void* event = nullptr;
    const char* const error = cuda::mark(stream, &event);
    marks_.push_back(event);
    check_launch(op_, error);
    return event;
}

void Streams::wait(void* stream, void* event) {
    if (event) check_launch(op_, wait_for(stream, event));
}

}  // namespace cuda
}  // namespace cellstep
