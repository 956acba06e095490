#include "cellstep/runtime.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "core/engine.h"
#include "core/image.h"
#include "core/kernels.h"

using cellstep::core::Answers;
using cellstep::core::Image;
using cellstep::core::ImageHeader;
using cellstep::core::ImageRecord;
using cellstep::core::ImageStatus;
using cellstep::core::Parallel;
using cellstep::core::Plan;
using cellstep::core::RecordKind;

struct cellstep_model {
    Image image;
    void* owned;  // the copy of the bytes, or null if they are used in place
};

namespace {

/// A window that moves by one step at a time.
struct Slide {
    std::size_t window = 0;  // 0: none
    std::size_t seen = 0;    // steps so far, but no more than the window has
    std::size_t next = 0;    // slot of the next step
    float* slots = nullptr;  // (2 window, prepared_size): each step twice, a window apart, so that wherever the newest
                             // lies the last `window` steps lie one behind the other
    float* state = nullptr;  // h, then c
};

}  // namespace

struct cellstep_session {
    const cellstep_model* model;
    const Plan<float>* plan;
    float* state;    // h, then c
    float* initial;  // the same of a fresh stream
    float* scratch;
    std::size_t most_steps;  // of one call of the engine, to which longer ones are cut
    Parallel parallel;
    Slide slide;

    const Parallel* threads() const { return parallel.threads > 1 ? &parallel : nullptr; }
};

namespace {

/// Packed weights and the memory of sessions begin at a cache line: elsewhere the kernels take half as long again.
constexpr std::align_val_t line{64};

void* allocate(std::size_t bytes) { return ::operator new(bytes ? bytes : 1, line, std::nothrow); }

float* allocate_values(std::size_t count) { return static_cast<float*>(allocate(count * sizeof(float))); }

void release(const void* memory) { ::operator delete(const_cast<void*>(memory), line); }

/// Steps in a call of the engine: of a bidirectional model, which needs the whole sequence at once and memory for all
/// of it, as many as it has seen, and at first few.
constexpr std::size_t first_steps = 64;
constexpr std::size_t any_steps = std::size_t{1} << 30;
/// Steps of a window: as many as a deploy file may name.
constexpr std::size_t longest_window = std::size_t{1} << 24;

cellstep_status from(ImageStatus status) { return static_cast<cellstep_status>(status); }

std::size_t h_count(const cellstep_model* model) {
    const ImageHeader& header = model->image.header();
    return static_cast<std::size_t>(header.state_layers) * header.h_size;
}

std::size_t c_count(const cellstep_model* model) {
    const ImageHeader& header = model->image.header();
    return static_cast<std::size_t>(header.state_layers) * header.c_size;
}

/// Checks `data` and makes a model of it. Takes over `owned`, which is freed if the data are refused.
cellstep_status adopt(const void* data, std::size_t size, void* owned, cellstep_model** model) {
    Image image;
    cellstep_status status = from(open_image(data, size, &image));
    if (status == CELLSTEP_OK) status = from(check_values(image));
    if (status == CELLSTEP_OK && image.header().dtype != 0) status = CELLSTEP_ERROR_DTYPE;
    if (status == CELLSTEP_OK) {
        *model = new (std::nothrow) cellstep_model{image, owned};
        if (!*model) status = CELLSTEP_ERROR_MEMORY;
    }
    if (status != CELLSTEP_OK) release(owned);
    return status;
}

/// Makes a session ready for calls of so many steps on these threads; unchanged if there is no memory.
bool prepare(cellstep_session* session, std::size_t steps, const Parallel& parallel) {
    const Image& image = session->model->image;
    void* memory = allocate(cellstep::core::plan_bytes<float>(image));
    if (!memory) return false;
    const Parallel* threads = parallel.threads > 1 ? &parallel : nullptr;
    const Plan<float>* plan = cellstep::core::make_plan<float>(image, steps, 1, threads, memory);
    float* scratch = allocate_values(cellstep::core::plan_scratch(*plan));
    if (!scratch) {
        release(memory);
        return false;
    }
    release(session->plan);
    release(session->scratch);
    session->plan = plan;
    session->scratch = scratch;
    session->most_steps = steps;
    session->parallel = parallel;
    return true;
}

bool reserve(cellstep_session* session, std::size_t steps) {
    return steps <= session->most_steps || !cellstep::core::is_bidirectional(session->model->image) ||
           prepare(session, steps, session->parallel);
}

std::size_t state_count(const cellstep_model* model) { return h_count(model) + c_count(model); }

cellstep_status run(cellstep_session* session, const float* x, const unsigned char* reset, std::size_t steps, float* y,
                    Answers answers) {
    if (!reserve(session, steps)) return CELLSTEP_ERROR_MEMORY;
    const ImageHeader& header = session->model->image.header();
    const std::ptrdiff_t inputs = static_cast<std::ptrdiff_t>(header.input_size);
    const std::ptrdiff_t outputs = static_cast<std::ptrdiff_t>(header.output_size);
    while (steps > 0) {
        const std::size_t part = steps < session->most_steps ? steps : session->most_steps;
        cellstep::core::run_model<float>(*session->plan,
                                         {part,
                                          1,
                                          {x, inputs, 0, 1},
                                          1,
                                          session->state,
                                          session->state + h_count(session->model),
                                          {y, outputs, 0},
                                          answers,
                                          reset,
                                          1,
                                          0,
                                          session->threads()},
                                         session->scratch);
        x += static_cast<std::ptrdiff_t>(part) * inputs;
        if (reset) reset += part;
        if (answers == Answers::every) y += static_cast<std::ptrdiff_t>(part) * outputs;
        steps -= part;
    }
    return CELLSTEP_OK;
}

/// What a model answers to a whole window.
Answers window_answers(const cellstep_model* model) {
    const bool hidden = model->image.header().answers == static_cast<std::uint32_t>(Answers::hidden);
    return hidden ? Answers::hidden : Answers::last;
}

}  // namespace

const char* cellstep_status_text(cellstep_status status) {
    switch (status) {
        case CELLSTEP_OK:
            return "ok";
        case CELLSTEP_ERROR_ARGUMENT:
            return "a pointer is null or a count is out of range: check the arguments of the call";
        case CELLSTEP_ERROR_MEMORY:
            return "not enough memory: free some, or use a smaller model";
        case CELLSTEP_ERROR_FILE:
            return "the file cannot be opened or read: check its path and permissions";
        case CELLSTEP_ERROR_MAGIC:
        case CELLSTEP_ERROR_VERSION:
        case CELLSTEP_ERROR_LENGTH:
        case CELLSTEP_ERROR_CHECKSUM:
        case CELLSTEP_ERROR_FORMAT:
        case CELLSTEP_ERROR_DTYPE:
        case CELLSTEP_ERROR_NONFINITE:
        case CELLSTEP_ERROR_ALIGNMENT:
        case CELLSTEP_ERROR_NEWER:
            return cellstep::core::image_status_text(static_cast<ImageStatus>(status));
        case CELLSTEP_ERROR_SELFTEST:
            return "the test vector in the file gives other numbers here: report this machine and compiler";
        case CELLSTEP_PENDING:
            return "no answer yet, as the window is not full: give the steps that follow";
    }
    return "unknown status: the caller and the library are of different versions";
}

const char* cellstep_version(void) { return CELLSTEP_VERSION_STRING; }

const char* cellstep_instruction_set(void) { return cellstep::core::instruction_set(); }

cellstep_status cellstep_model_load_file(const char* path, cellstep_model** model) {
    if (!path || !model) return CELLSTEP_ERROR_ARGUMENT;
    *model = nullptr;
    std::FILE* file = std::fopen(path, "rb");
    if (!file) return CELLSTEP_ERROR_FILE;
    std::size_t size = 0;
    std::size_t capacity = 0;
    unsigned char* bytes = nullptr;
    cellstep_status status = CELLSTEP_OK;
    // Read to the end instead of asking for the length, so that a pipe works and a directory is an error.
    for (;;) {
        if (size == capacity) {
            capacity = capacity ? 2 * capacity : 1 << 16;
            unsigned char* larger = static_cast<unsigned char*>(allocate(capacity));
            if (!larger) {
                status = CELLSTEP_ERROR_MEMORY;
                break;
            }
            if (bytes) std::memcpy(larger, bytes, size);
            release(bytes);
            bytes = larger;
        }
        const std::size_t got = std::fread(bytes + size, 1, capacity - size, file);
        size += got;
        if (got == 0) {
            if (std::ferror(file)) status = CELLSTEP_ERROR_FILE;
            break;
        }
    }
    std::fclose(file);
    if (status != CELLSTEP_OK) {
        release(bytes);
        return status;
    }
    return adopt(bytes, size, bytes, model);
}

cellstep_status cellstep_model_load_memory(const void* data, size_t size, cellstep_model** model) {
    if (!data || !model) return CELLSTEP_ERROR_ARGUMENT;
    *model = nullptr;
    void* copy = allocate(size);
    if (!copy) return CELLSTEP_ERROR_MEMORY;
    std::memcpy(copy, data, size);
    return adopt(copy, size, copy, model);
}

cellstep_status cellstep_model_load_in_place(const void* data, size_t size, cellstep_model** model) {
    if (!data || !model) return CELLSTEP_ERROR_ARGUMENT;
    *model = nullptr;
    return adopt(data, size, nullptr, model);
}

void cellstep_model_destroy(cellstep_model* model) {
    if (!model) return;
    release(model->owned);
    delete model;
}

cellstep_status cellstep_model_get_info(const cellstep_model* model, cellstep_model_info* info) {
    if (!model || !info) return CELLSTEP_ERROR_ARGUMENT;
    const ImageHeader& header = model->image.header();
    *info = {header.input_size, header.output_size, header.state_layers, header.c_size,
             header.window,     header.horizon,     header.h_size,       header.answers};
    return CELLSTEP_OK;
}

const char* cellstep_model_weights(const cellstep_model* model) {
    static const char* const names[] = {"float32", "bfloat16", "float16", "int8"};
    return model ? names[static_cast<int>(weight_type(*model->image.find(RecordKind::lstm)))] : nullptr;
}

const char* cellstep_model_feature_name(const cellstep_model* model, size_t index) {
    return model ? model->image.name(RecordKind::feature_names, index) : nullptr;
}

const char* cellstep_model_output_name(const cellstep_model* model, size_t index) {
    return model ? model->image.name(RecordKind::output_names, index) : nullptr;
}

cellstep_status cellstep_model_selftest(const cellstep_model* model, float* error) {
    if (!model) return CELLSTEP_ERROR_ARGUMENT;
    const ImageRecord* record = model->image.find(RecordKind::test_vector);
    if (error) *error = -1.0f;
    if (!record) return CELLSTEP_OK;
    cellstep_session* session = nullptr;
    const cellstep_status status = cellstep_session_create(model, &session);
    if (status != CELLSTEP_OK) return status;
    const ImageHeader& header = model->image.header();
    const std::size_t steps = record->sizes[0];
    const std::size_t count = steps * header.output_size;
    float* y = static_cast<float*>(std::malloc(count * sizeof(float)));
    const float* data = model->image.data<float>(*record);
    const float tolerance = data[0];
    const float* x = data + 1;
    const float* expected = x + steps * header.input_size;
    const cellstep_status ran = y ? run(session, x, nullptr, steps, y, Answers::every) : CELLSTEP_ERROR_MEMORY;
    if (ran != CELLSTEP_OK) {
        std::free(y);
        cellstep_session_destroy(session);
        return ran;
    }
    float largest = 0.0f;
    bool agrees = true;
    for (std::size_t at = 0; at < count; ++at) {
        const float difference = std::fabs(y[at] - expected[at]);
        if (!(difference <= tolerance)) agrees = false;  // also for NaN
        if (!(difference <= largest)) largest = difference;
    }
    std::free(y);
    cellstep_session_destroy(session);
    if (error) *error = largest;
    return agrees ? CELLSTEP_OK : CELLSTEP_ERROR_SELFTEST;
}

cellstep_status cellstep_session_create(const cellstep_model* model, cellstep_session** session) {
    if (!model || !session) return CELLSTEP_ERROR_ARGUMENT;
    *session = nullptr;
    cellstep_session* created = new (std::nothrow) cellstep_session{};
    if (!created) return CELLSTEP_ERROR_MEMORY;
    created->model = model;
    created->state = allocate_values(state_count(model));
    created->initial = allocate_values(state_count(model));
    const std::size_t steps = cellstep::core::is_bidirectional(model->image) ? first_steps : any_steps;
    if (!created->state || !created->initial || !prepare(created, steps, {})) {
        cellstep_session_destroy(created);
        return CELLSTEP_ERROR_MEMORY;
    }
    cellstep::core::initial_state<float>(model->image, 1, created->initial, created->initial + h_count(model));
    cellstep_session_reset(created);
    *session = created;
    return CELLSTEP_OK;
}

void cellstep_session_destroy(cellstep_session* session) {
    if (!session) return;
    release(session->slide.slots);
    release(session->slide.state);
    release(session->plan);
    release(session->state);
    release(session->initial);
    release(session->scratch);
    delete session;
}

cellstep_status cellstep_session_set_parallel(cellstep_session* session, size_t threads, void* context,
                                              cellstep_run_tasks run) {
    if (!session || (run && threads == 0)) return CELLSTEP_ERROR_ARGUMENT;
    const Parallel parallel{run ? threads : 1, context, run};
    return prepare(session, session->most_steps, parallel) ? CELLSTEP_OK : CELLSTEP_ERROR_MEMORY;
}

cellstep_status cellstep_session_step(cellstep_session* session, const float* x, float* y) {
    return cellstep_session_run(session, x, 1, y);
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

cellstep_status cellstep_session_slide_begin(cellstep_session* session, size_t window) {
    if (!session) return CELLSTEP_ERROR_ARGUMENT;
    if (window == 0) window = session->model->image.header().window;
    if (window == 0 || window > longest_window) return CELLSTEP_ERROR_ARGUMENT;
    if (!reserve(session, window)) return CELLSTEP_ERROR_MEMORY;
    Slide& slide = session->slide;
    if (window != slide.window) {
        Slide fresh;
        fresh.window = window;
        fresh.slots = allocate_values(2 * window * cellstep::core::prepared_size(*session->plan));
        fresh.state = allocate_values(state_count(session->model));
        const bool enough = fresh.slots && fresh.state;
        const Slide& unused = enough ? slide : fresh;
        release(unused.slots);
        release(unused.state);
        if (!enough) return CELLSTEP_ERROR_MEMORY;
        slide = fresh;
    }
    slide.seen = 0;
    slide.next = 0;
    return CELLSTEP_OK;
}

cellstep_status cellstep_session_slide(cellstep_session* session, const float* x, float* y) {
    if (!session || !x || !y || session->slide.window == 0) return CELLSTEP_ERROR_ARGUMENT;
    Slide& slide = session->slide;
    const cellstep_model* model = session->model;
    const std::size_t size = cellstep::core::prepared_size(*session->plan);
    float* slot = slide.slots + slide.next * size;
    cellstep::core::prepare_step<float>(*session->plan, x, slot, session->scratch);
    std::memcpy(slot + slide.window * size, slot, size * sizeof(float));
    slide.next = slide.next + 1 < slide.window ? slide.next + 1 : 0;
    if (slide.seen < slide.window && ++slide.seen < slide.window) return CELLSTEP_PENDING;
    std::memcpy(slide.state, session->initial, state_count(model) * sizeof(float));
    cellstep::core::run_model<float>(*session->plan,
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
                                      session->threads(),
                                      slide.slots + slide.next * size},
                                     session->scratch);
    return CELLSTEP_OK;
}

cellstep_status cellstep_session_reset(cellstep_session* session) {
    if (!session) return CELLSTEP_ERROR_ARGUMENT;
    std::memcpy(session->state, session->initial, state_count(session->model) * sizeof(float));
    return CELLSTEP_OK;
}

cellstep_status cellstep_session_get_state(const cellstep_session* session, float* h, float* c) {
    if (!session || !h || !c) return CELLSTEP_ERROR_ARGUMENT;
    std::memcpy(h, session->state, h_count(session->model) * sizeof(float));
    std::memcpy(c, session->state + h_count(session->model), c_count(session->model) * sizeof(float));
    return CELLSTEP_OK;
}

cellstep_status cellstep_session_set_state(cellstep_session* session, const float* h, const float* c) {
    if (!session || !h || !c) return CELLSTEP_ERROR_ARGUMENT;
    std::memcpy(session->state, h, h_count(session->model) * sizeof(float));
    std::memcpy(session->state + h_count(session->model), c, c_count(session->model) * sizeof(float));
    return CELLSTEP_OK;
}
