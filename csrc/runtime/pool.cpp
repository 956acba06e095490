#include <cstring>
#include <new>

#include "runtime/handles.h"

using cellstep::core::Answers;
using cellstep::core::ImageHeader;
using cellstep::runtime::c_count;
using cellstep::runtime::h_count;
using cellstep::runtime::most_steps;
using cellstep::runtime::Parts;
using cellstep::runtime::state_count;

namespace {

/// Cuts the parts of a pool of so many streams.
void place(Parts& parts, const cellstep_model* model, std::size_t streams, cellstep_pool& pool) {
    pool.model = model;
    pool.streams = streams;
    pool.work.steps = 1;
    pool.work.batch = streams;
    pool.state = parts.values(std::uint64_t{streams} * state_count(model));
    cellstep::runtime::place(parts, model->image, pool.work);
}

/// Visits the rows of h and c of one stream in a pool's state, and where they lie in the state of a session.
template <class Visit>
void for_each_row(const cellstep_pool* pool, std::size_t stream, Visit visit) {
    const ImageHeader& header = pool->model->image.header();
    float* const c = pool->state + pool->streams * h_count(pool->model);
    for (std::size_t layer = 0; layer < header.state_layers; ++layer) {
        const std::size_t row = layer * pool->streams + stream;
        visit(pool->state + row * header.h_size, layer * header.h_size, c + row * header.c_size, layer * header.c_size);
    }
}

/// Copies the state of a session in.
void set_stream(cellstep_pool* pool, std::size_t stream, const float* h, const float* c) {
    const ImageHeader& header = pool->model->image.header();
    for_each_row(pool, stream, [&](float* h_row, std::size_t h_at, float* c_row, std::size_t c_at) {
        std::memcpy(h_row, h + h_at, header.h_size * sizeof(float));
        std::memcpy(c_row, c + c_at, header.c_size * sizeof(float));
    });
}

bool can_be(const cellstep_model* model, std::size_t streams) {
    return streams > 0 && streams <= most_steps && !is_bidirectional(model->image);
}

}  // namespace

size_t cellstep_pool_memory_required(const cellstep_model* model, size_t streams) {
    if (!model || !can_be(model, streams)) return 0;
    cellstep_pool none{};
    Parts parts(nullptr);
    parts.take(sizeof(none));
    place(parts, model, streams, none);
    return parts.required();
}

cellstep_status cellstep_pool_init(const cellstep_model* model, size_t streams, void* memory, size_t memory_size,
                                   cellstep_pool** pool) {
    if (pool) *pool = nullptr;
    if (!model || !memory || !pool) return CELLSTEP_ERROR_ARGUMENT;
    if (!can_be(model, streams))
        return is_bidirectional(model->image) ? CELLSTEP_ERROR_BIDIRECTIONAL : CELLSTEP_ERROR_ARGUMENT;
    const cellstep_status status =
        cellstep::runtime::memory_fits(memory, memory_size, cellstep_pool_memory_required(model, streams));
    if (status != CELLSTEP_OK) return status;
    Parts parts(memory);
    cellstep_pool* made = new (parts.take(sizeof(cellstep_pool))) cellstep_pool{};
    place(parts, model, streams, *made);
    cellstep::runtime::make_plan(model->image, made->work);
    cellstep_pool_reset(made);
    *pool = made;
    return CELLSTEP_OK;
}

cellstep_status cellstep_pool_step(cellstep_pool* pool, const float* x, const unsigned char* reset, float* y) {
    if (!pool || !x || !y) return CELLSTEP_ERROR_ARGUMENT;
    const ImageHeader& header = pool->model->image.header();
    const std::ptrdiff_t streams = static_cast<std::ptrdiff_t>(pool->streams);
    const std::ptrdiff_t inputs = static_cast<std::ptrdiff_t>(header.input_size);
    const std::ptrdiff_t outputs = static_cast<std::ptrdiff_t>(header.output_size);
    cellstep::core::run_model<float>(*pool->work.plan,
                                     {1,
                                      pool->streams,
                                      {x, streams * inputs, inputs, 1},
                                      pool->streams,
                                      pool->state,
                                      pool->state + pool->streams * h_count(pool->model),
                                      {y, streams * outputs, outputs},
                                      Answers::every,
                                      reset,
                                      streams,
                                      1,
                                      pool->work.threads()},
                                     pool->work.scratch);
    return CELLSTEP_OK;
}

cellstep_status cellstep_pool_reset(cellstep_pool* pool) {
    if (!pool) return CELLSTEP_ERROR_ARGUMENT;
    cellstep::core::initial_state<float>(pool->model->image, pool->streams, pool->state,
                                         pool->state + pool->streams * h_count(pool->model));
    return CELLSTEP_OK;
}

cellstep_status cellstep_pool_get_state(const cellstep_pool* pool, size_t stream, float* h, float* c) {
    if (!pool || !h || !c || stream >= pool->streams) return CELLSTEP_ERROR_ARGUMENT;
    const ImageHeader& header = pool->model->image.header();
    for_each_row(pool, stream, [&](const float* h_row, std::size_t h_at, const float* c_row, std::size_t c_at) {
        std::memcpy(h + h_at, h_row, header.h_size * sizeof(float));
        std::memcpy(c + c_at, c_row, header.c_size * sizeof(float));
    });
    return CELLSTEP_OK;
}

cellstep_status cellstep_pool_set_state(cellstep_pool* pool, size_t stream, const float* h, const float* c) {
    if (!pool || !h || !c || stream >= pool->streams) return CELLSTEP_ERROR_ARGUMENT;
    set_stream(pool, stream, h, c);
    return CELLSTEP_OK;
}
