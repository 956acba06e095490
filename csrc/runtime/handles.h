/// What stands behind the handles of cellstep/runtime.h, and how it lies in memory.
#pragma once

#include "cellstep/runtime.h"
#include "core/engine.h"
#include "core/image.h"
#include "core/parallel.h"

struct cellstep_model {
    cellstep::core::Image image;
    bool on_heap;         ///< the handle, and whatever else lies in its block
    const void* mapping;  ///< a mapped file of the image's length, or null
};

static_assert(sizeof(cellstep_model) <= CELLSTEP_MODEL_BYTES,
              "the handle of a model fits the memory that is asked for");

namespace cellstep {
namespace runtime {

/// A plan and the scratch memory of its calls.
struct Work {
    void* memory;  ///< of the plan
    const core::Plan<float>* plan;
    float* scratch;
    std::size_t steps;  ///< of one call, if the model is bidirectional
    std::size_t batch;
    core::Parallel parallel;
    void* block;  ///< of the heap, in place of what lies with the handle, or null

    const core::Parallel* threads() const { return parallel.threads > 1 ? &parallel : nullptr; }
};

/// A window that moves by one step at a time.
struct Slide {
    std::size_t window;  ///< 0: none
    std::size_t seen;    ///< steps so far, but no more than the window has
    std::size_t next;    ///< slot of the next step
    std::size_t size;    ///< values of a slot
    float* slots;        ///< (2 window, size): each step twice, a window apart, so that wherever the newest lies the
                         ///< last `window` steps lie one behind the other
    float* state;        ///< h, then c
    void* block;         ///< of the heap, or null; kept while a window lies in the caller's memory
    std::size_t block_size;
};

}  // namespace runtime
}  // namespace cellstep

struct cellstep_session {
    const cellstep_model* model;
    float* state;    ///< h, then c
    float* answers;  ///< (answer_steps, output_size): of the steps that a self-test makes at once
    std::size_t answer_steps;
    cellstep::runtime::Work work;
    cellstep::runtime::Slide slide;
    bool on_heap;
};

struct cellstep_pool {
    const cellstep_model* model;
    std::size_t streams;
    float* state;  ///< h (state_layers, streams, h_size), then c (state_layers, streams, c_size)
    cellstep::runtime::Work work;
    bool on_heap;
};

namespace cellstep {
namespace runtime {

/// Steps of a window or of a bidirectional call, and streams of a pool: as many as a deploy file may name.
constexpr std::size_t most_steps = std::size_t{1} << 24;

/// What memory that a caller gives is aligned to.
constexpr std::size_t caller_alignment = 8;
/// Weights and the memory of calls begin at a cache line: elsewhere the kernels take half as long again. For small
/// targets memory is dearer.
#if defined(CELLSTEP_COMPACT)
constexpr std::size_t line = caller_alignment;
#else
constexpr std::size_t line = 64;
#endif

/// Cuts memory into parts that begin at cache lines; without memory it only counts.
class Parts {
public:
    explicit Parts(void* memory) : next_(static_cast<unsigned char*>(memory)) {
        while (reinterpret_cast<std::uintptr_t>(next_) % line) ++next_;
    }

    void* take(std::uint64_t bytes) {
        void* const part = next_;
        const std::uint64_t whole = (bytes + line - 1) / line * line;
        bytes_ += whole;
        if (next_) next_ += static_cast<std::size_t>(whole);
        return part;
    }
    float* values(std::uint64_t count) { return static_cast<float*>(take(count * sizeof(float))); }

    /// Bytes that are enough for all parts so far, wherever memory of the caller's begins; 0 if size_t cannot say it.
    std::size_t required() const {
        const std::uint64_t bytes = bytes_ + line - caller_alignment;
        return bytes <= SIZE_MAX / 2 ? static_cast<std::size_t>(bytes) : 0;
    }

private:
    unsigned char* next_;
    std::uint64_t bytes_ = 0;
};

/// Whether a caller's memory will do for `required` bytes, which are 0 if there is no such thing.
cellstep_status memory_fits(const void* memory, std::size_t memory_size, std::size_t required);

std::size_t h_count(const cellstep_model* model) CELLSTEP_NONBLOCKING;
std::size_t c_count(const cellstep_model* model) CELLSTEP_NONBLOCKING;
inline std::size_t state_count(const cellstep_model* model) { return h_count(model) + c_count(model); }

/// Cuts the parts of `work`, which knows its steps, rows and threads.
void place(Parts& parts, const core::Image& image, Work& work);
/// Writes the plan of a work whose parts are there.
void make_plan(const core::Image& image, Work& work) CELLSTEP_NONBLOCKING;

/// Steps that a call of a session passes through its layers at once where the caller does not say.
std::size_t own_steps(const core::Image& image);
/// Steps of a window, 0 for the model's own; 0 if there is no such window.
std::size_t window_steps(const core::Image& image, std::size_t window);

#if !defined(CELLSTEP_NO_HEAP)
/// Makes `work` ready for other calls with memory from the heap; unchanged if there is none.
cellstep_status remake(const core::Image& image, Work& work, std::size_t steps, const core::Parallel& parallel);
#endif

}  // namespace runtime
}  // namespace cellstep
