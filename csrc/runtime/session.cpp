#include <cstring>
#include <new>

#include "runtime/handles.h"

using cellstep::core::Answers;
using cellstep::core::Image;
using cellstep::core::ImageHeader;
using cellstep::core::ImageRecord;
using cellstep::core::RecordKind;
using cellstep::runtime::c_count;
using cellstep::runtime::h_count;
using cellstep::runtime::most_steps;
using cellstep::runtime::Parts;
using cellstep::runtime::Slide;
using cellstep::runtime::state_count;

namespace cellstep {
namespace runtime {

namespace {

std::size_t test_steps(const Image& image) {
    const ImageRecord* record = image.find(RecordKind::test_vector);
    return record ? record->sizes[0] : 0;
}

}  // namespace

std::size_t own_steps(const Image& image) {
    // Of another model a plan for any number of steps takes no more memory than the longest chunk.
    if (!is_bidirectional(image)) return most_steps;
    constexpr std::size_t without_window = 64;
    const std::size_t window = image.header().window ? image.header().window : without_window;
    return window > test_steps(image) ? window : test_steps(image);
}

std::size_t window_steps(const Image& image, std::size_t window) {
    if (window == 0) window = image.header().window;
    return window <= most_steps ? window : 0;
}

}  // namespace runtime
}  // namespace cellstep

namespace {

/// Cuts the parts of a session for calls of so many steps.
void place(Parts& parts, const cellstep_model* model, std::size_t steps, cellstep_session& session) {
    const Image& image = model->image;
    session.model = model;
    session.work.steps = steps ? steps : cellstep::runtime::own_steps(image);
    session.work.batch = 1;
    session.state = parts.values(state_count(model));
    session.answer_steps = is_bidirectional(image) ? cellstep::runtime::test_steps(image) : 1;
    session.answers = parts.values(std::uint64_t{session.answer_steps} * image.header().output_size);
    cellstep::runtime::place(parts, image, session.work);
}

/// Cuts the parts of a sliding window of so many steps.
void place(Parts& parts, const cellstep_model* model, std::size_t window, Slide& slide) {
    const std::uint64_t size = cellstep::core::prepared_size<float>(model->image);
    slide.window = window;
    slide.size = static_cast<std::size_t>(size);
    slide.slots = parts.values(2 * window * size);
    slide.state = parts.values(state_count(model));
}

cellstep_status reserve(cellstep_session* session, std::size_t steps) CELLSTEP_NONBLOCKING {
    const Image& image = session->model->image;
    if (steps <= session->work.steps || !is_bidirectional(image)) return CELLSTEP_OK;
#if !defined(CELLSTEP_NO_HEAP)
    CELLSTEP_UNCHECKED_BEGIN  // the one call that allocates, as its declaration says
        if (session->on_heap) return cellstep::runtime::remake(image, session->work, steps, session->work.parallel);
    CELLSTEP_UNCHECKED_END
#endif
    return CELLSTEP_ERROR_STEPS;
}

cellstep_status run(cellstep_session* session, const float* x, const unsigned char* reset, std::size_t steps, float* y,
                    Answers answers) {
    const cellstep_status status = reserve(session, steps);
    if (status != CELLSTEP_OK) return status;
    const ImageHeader& header = session->model->image.header();
    cellstep::core::run_model<float>(*session->work.plan,
                                     {steps,
                                      1,
                                      {x, static_cast<std::ptrdiff_t>(header.input_size), 0, 1},
                                      1,
                                      session->state,
                                      session->state + h_count(session->model),
                                      {y, static_cast<std::ptrdiff_t>(header.output_size), 0},
                                      answers,
                                      reset,
                                      1,
                                      0,
                                      session->work.threads()},
                                     session->work.scratch);
    return CELLSTEP_OK;
}

/// What a model answers to a whole window.
Answers window_answers(const cellstep_model* model) {
    const bool hidden = model->image.header().answers == static_cast<std::uint32_t>(Answers::hidden);
    return hidden ? Answers::hidden : Answers::last;
}

void copy(float* to, const float* from, std::size_t count) { std::memcpy(to, from, count * sizeof(float)); }

/// Writes the initial state, h, then c. It is not kept: memory is dearer than a look into the file.
void make_fresh(const cellstep_model* model, float* state) {
    cellstep::core::initial_state<float>(model->image, 1, state, state + h_count(model));
}

void begin_anew(Slide& slide) {
    slide.seen = 0;
    slide.next = 0;
}

/// Whether two records that compute want the same of a session's memory and state.
bool is_alike(const ImageRecord& a, const ImageRecord& b) {
    constexpr std::uint32_t no_matter = cellstep::core::LayerFlags::initial;
    return a.kind == b.kind && a.layout == b.layout && std::memcmp(a.sizes, b.sizes, sizeof(a.sizes)) == 0 &&
           (a.flags | no_matter) == (b.flags | no_matter);
}

/// The record from `record` on that is a layer, or the end.
const ImageRecord* next_layer(const Image& image, const ImageRecord* record) {
    for (; record != image.end(); ++record) {
        const auto kind = static_cast<RecordKind>(record->kind);
        if (kind == RecordKind::dense || kind == RecordKind::lstm) break;
    }
    return record;
}

bool same_shape(const Image& a, const Image& b) {
    const ImageHeader& first = a.header();
    const ImageHeader& second = b.header();
    if (first.input_size != second.input_size || first.output_size != second.output_size ||
        first.state_layers != second.state_layers || first.h_size != second.h_size || first.c_size != second.c_size)
        return false;
    const ImageRecord* of_a = next_layer(a, a.begin());
    const ImageRecord* of_b = next_layer(b, b.begin());
    while (of_a != a.end() && of_b != b.end()) {
        if (!is_alike(*of_a, *of_b)) return false;
        of_a = next_layer(a, of_a + 1);
        of_b = next_layer(b, of_b + 1);
    }
    return of_a == a.end() && of_b == b.end();
}

/// Replays steps of a test vector; `largest` receives the largest difference, unless that of other steps is larger.
cellstep_status replay(cellstep_session* session, const float* x, std::size_t steps, const float* expected,
                       float tolerance, float* largest) {
    const cellstep_status status = run(session, x, nullptr, steps, session->answers, Answers::every);
    if (status != CELLSTEP_OK) return status;
    bool agrees = true;
    for (std::size_t at = 0; at < steps * session->model->image.header().output_size; ++at) {
        const float signed_difference = session->answers[at] - expected[at];
        const float difference = signed_difference < 0.0f ? -signed_difference : signed_difference;
        if (!(difference <= tolerance)) agrees = false;  // also for NaN
        if (!(difference <= *largest)) *largest = difference;
    }
    return agrees ? CELLSTEP_OK : CELLSTEP_ERROR_SELFTEST;
}

}  // namespace

size_t cellstep_memory_required(const cellstep_model* model) { return cellstep_memory_required_for(model, 0); }

size_t cellstep_memory_required_for(const cellstep_model* model, size_t steps) {
    if (!model || steps > most_steps) return 0;
    cellstep_session none{};
    Parts parts(nullptr);
    parts.take(sizeof(none));
    place(parts, model, steps, none);
    return parts.required();
}

cellstep_status cellstep_session_init(const cellstep_model* model, void* memory, size_t memory_size,
                                      cellstep_session** session) {
    return cellstep_session_init_for(model, 0, memory, memory_size, session);
}

cellstep_status cellstep_session_init_for(const cellstep_model* model, size_t steps, void* memory, size_t memory_size,
                                          cellstep_session** session) {
    if (session) *session = nullptr;
    if (!model || !memory || !session || steps > most_steps) return CELLSTEP_ERROR_ARGUMENT;
    const cellstep_status status =
        cellstep::runtime::memory_fits(memory, memory_size, cellstep_memory_required_for(model, steps));
    if (status != CELLSTEP_OK) return status;
    Parts parts(memory);
    cellstep_session* made = new (parts.take(sizeof(cellstep_session))) cellstep_session{};
    place(parts, model, steps, *made);
    cellstep::runtime::make_plan(model->image, made->work);
    cellstep_session_reset(made);
    *session = made;
    return CELLSTEP_OK;
}

cellstep_status cellstep_session_step(cellstep_session* session, const float* x, float* y) {
    return cellstep_session_run_reset(session, x, nullptr, 1, y);
}

cellstep_status cellstep_session_run(cellstep_session* session, const float* x, size_t steps, float* y) {
    return cellstep_session_run_reset(session, x, nullptr, steps, y);
}

cellstep_status cellstep_session_run_reset(cellstep_session* session, const float* x, const unsigned char* reset,
                                           size_t steps, float* y) {
    if (!session || (steps > 0 && (!x || !y))) return CELLSTEP_ERROR_ARGUMENT;
    return run(session, x, reset, steps, y, Answers::every);
}

cellstep_status cellstep_session_forecast(cellstep_session* session, const float* x, size_t steps, float* y) {
    if (!session || !x || !y || steps == 0) return CELLSTEP_ERROR_ARGUMENT;
    return run(session, x, nullptr, steps, y, window_answers(session->model));
}

size_t cellstep_slide_memory_required(const cellstep_model* model, size_t window) {
    if (!model) return 0;
    Slide none{};
    Parts parts(nullptr);
    const std::size_t steps = cellstep::runtime::window_steps(model->image, window);
    place(parts, model, steps, none);
    return steps > 0 ? parts.required() : 0;
}

cellstep_status cellstep_session_slide_init(cellstep_session* session, size_t window, void* memory,
                                            size_t memory_size) {
    if (!session || !memory) return CELLSTEP_ERROR_ARGUMENT;
    const std::size_t steps = cellstep::runtime::window_steps(session->model->image, window);
    if (steps == 0) return CELLSTEP_ERROR_ARGUMENT;
    cellstep_status status =
        cellstep::runtime::memory_fits(memory, memory_size, cellstep_slide_memory_required(session->model, steps));
    if (status == CELLSTEP_OK) status = reserve(session, steps);
    if (status != CELLSTEP_OK) return status;
    Parts parts(memory);
    place(parts, session->model, steps, session->slide);
    begin_anew(session->slide);
    return CELLSTEP_OK;
}

cellstep_status cellstep_session_slide(cellstep_session* session, const float* x, float* y) {
    if (!session || !x || !y || session->slide.window == 0) return CELLSTEP_ERROR_ARGUMENT;
    Slide& slide = session->slide;
    const cellstep_model* model = session->model;
    const cellstep::core::Plan<float>& plan = *session->work.plan;
    float* slot = slide.slots + slide.next * slide.size;
    cellstep::core::prepare_step<float>(plan, x, slot, session->work.scratch);
    copy(slot + slide.window * slide.size, slot, slide.size);
    slide.next = slide.next + 1 < slide.window ? slide.next + 1 : 0;
    if (slide.seen < slide.window && ++slide.seen < slide.window) return CELLSTEP_PENDING;
    make_fresh(model, slide.state);
    cellstep::core::run_model<float>(plan,
                                     {slide.window,
                                      1,
                                      {x, 0, 0, 1},
                                      1,
                                      slide.state,
                                      slide.state + h_count(model),
                                      {y, static_cast<std::ptrdiff_t>(model->image.header().output_size), 0},
                                      window_answers(model),
                                      nullptr,
                                      0,
                                      0,
                                      session->work.threads(),
                                      slide.slots + slide.next * slide.size},
                                     session->work.scratch);
    return CELLSTEP_OK;
}

cellstep_status cellstep_session_reset(cellstep_session* session) {
    if (!session) return CELLSTEP_ERROR_ARGUMENT;
    make_fresh(session->model, session->state);
    return CELLSTEP_OK;
}

cellstep_status cellstep_session_get_state(const cellstep_session* session, float* h, float* c) {
    if (!session || !h || !c) return CELLSTEP_ERROR_ARGUMENT;
    copy(h, session->state, h_count(session->model));
    copy(c, session->state + h_count(session->model), c_count(session->model));
    return CELLSTEP_OK;
}

cellstep_status cellstep_session_set_state(cellstep_session* session, const float* h, const float* c) {
    if (!session || !h || !c) return CELLSTEP_ERROR_ARGUMENT;
    copy(session->state, h, h_count(session->model));
    copy(session->state + h_count(session->model), c, c_count(session->model));
    return CELLSTEP_OK;
}

cellstep_status cellstep_session_swap_model(cellstep_session* session, const cellstep_model* model) {
    if (!session || !model) return CELLSTEP_ERROR_ARGUMENT;
    if (!same_shape(session->model->image, model->image)) return CELLSTEP_ERROR_SHAPE;
    session->model = model;
    cellstep::runtime::make_plan(model->image, session->work);
    begin_anew(session->slide);
    return CELLSTEP_OK;
}

cellstep_status cellstep_session_selftest(cellstep_session* session, float* error) {
    if (!session) return CELLSTEP_ERROR_ARGUMENT;
    if (error) *error = -1.0f;
    const Image& image = session->model->image;
    const ImageRecord* record = image.find(RecordKind::test_vector);
    cellstep_session_reset(session);
    if (!record) return CELLSTEP_OK;
    const std::size_t steps = record->sizes[0];
    const std::size_t at_once = is_bidirectional(image) ? steps : 1;
    if (at_once > session->answer_steps) return CELLSTEP_ERROR_STEPS;  // of a model that was swapped in
    const float* x = image.data<float>(*record) + 1;
    const float* expected = x + steps * image.header().input_size;
    const float tolerance = x[-1];
    float largest = 0.0f;
    cellstep_status status = CELLSTEP_OK;
    for (std::size_t step = 0; step < steps; step += at_once) {
        const cellstep_status replayed = replay(session, x + step * image.header().input_size, at_once,
                                                expected + step * image.header().output_size, tolerance, &largest);
        if (replayed != CELLSTEP_OK) status = replayed;
        if (status != CELLSTEP_OK && status != CELLSTEP_ERROR_SELFTEST) return status;
    }
    cellstep_session_reset(session);
    if (error) *error = largest;
    return status;
}
