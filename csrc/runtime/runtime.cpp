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
using cellstep::core::ModelRun;
using cellstep::core::RecordKind;

struct cellstep_model {
    Image image;
    void* owned;  // the copy of the bytes, or null if they are used in place
};

struct cellstep_session {
    const cellstep_model* model;
    float* h;
    float* c;
    float* scratch;
    std::size_t
        scratch_steps;  // as many steps as fit into scratch; calls are cut to them, but for bidirectional models
};

namespace {

/// As many steps as one inner call of a session may take: its scratch memory is sized for them.
constexpr std::size_t steps_per_call = 64;

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
    if (status != CELLSTEP_OK) std::free(owned);
    return status;
}

/// A bidirectional model needs the whole sequence at once, and so scratch memory for all of it.
bool reserve(cellstep_session* session, std::size_t steps) {
    if (steps <= session->scratch_steps || !cellstep::core::is_bidirectional(session->model->image)) return true;
    const std::size_t count = cellstep::core::model_scratch<float>(session->model->image, steps, 1, nullptr);
    float* larger = static_cast<float*>(std::malloc(count * sizeof(float)));
    if (!larger) return false;
    std::free(session->scratch);
    session->scratch = larger;
    session->scratch_steps = steps;
    return true;
}

cellstep_status run(cellstep_session* session, const float* x, const unsigned char* reset, std::size_t steps, float* y,
                    Answers answers) {
    if (!reserve(session, steps)) return CELLSTEP_ERROR_MEMORY;
    const ImageHeader& header = session->model->image.header();
    const std::ptrdiff_t inputs = static_cast<std::ptrdiff_t>(header.input_size);
    const std::ptrdiff_t outputs = static_cast<std::ptrdiff_t>(header.output_size);
    while (steps > 0) {
        const std::size_t part = steps < session->scratch_steps ? steps : session->scratch_steps;
        cellstep::core::run_model<float>(
            session->model->image,
            {part, 1, {x, inputs, 0, 1}, 1, session->h, session->c, {y, outputs, 0}, answers, reset, 1, 0, nullptr},
            session->scratch);
        x += static_cast<std::ptrdiff_t>(part) * inputs;
        if (reset) reset += part;
        if (answers == Answers::every) y += static_cast<std::ptrdiff_t>(part) * outputs;
        steps -= part;
    }
    return CELLSTEP_OK;
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
            return cellstep::core::image_status_text(static_cast<ImageStatus>(status));
        case CELLSTEP_ERROR_SELFTEST:
            return "the test vector in the file gives other numbers here: report this machine and compiler";
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
            unsigned char* larger = static_cast<unsigned char*>(std::realloc(bytes, capacity));
            if (!larger) {
                status = CELLSTEP_ERROR_MEMORY;
                break;
            }
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
        std::free(bytes);
        return status;
    }
    return adopt(bytes, size, bytes, model);
}

cellstep_status cellstep_model_load_memory(const void* data, size_t size, cellstep_model** model) {
    if (!data || !model) return CELLSTEP_ERROR_ARGUMENT;
    *model = nullptr;
    void* copy = std::malloc(size ? size : 1);
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
    std::free(model->owned);
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
    const std::size_t scratch = cellstep::core::model_scratch<float>(model->image, steps_per_call, 1, nullptr);
    cellstep_session* created = static_cast<cellstep_session*>(std::malloc(sizeof(cellstep_session)));
    float* state = static_cast<float*>(std::malloc((h_count(model) + c_count(model)) * sizeof(float)));
    float* memory = static_cast<float*>(std::malloc(scratch * sizeof(float)));
    if (!created || !state || !memory) {
        std::free(created);
        std::free(state);
        std::free(memory);
        return CELLSTEP_ERROR_MEMORY;
    }
    *created = {model, state, state + h_count(model), memory, steps_per_call};
    cellstep_session_reset(created);
    *session = created;
    return CELLSTEP_OK;
}

void cellstep_session_destroy(cellstep_session* session) {
    if (!session) return;
    std::free(session->h);
    std::free(session->scratch);
    std::free(session);
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
    const bool hidden = session->model->image.header().answers == static_cast<std::uint32_t>(Answers::hidden);
    return run(session, x, nullptr, steps, y, hidden ? Answers::hidden : Answers::last);
}

cellstep_status cellstep_session_reset(cellstep_session* session) {
    if (!session) return CELLSTEP_ERROR_ARGUMENT;
    cellstep::core::initial_state<float>(session->model->image, 1, session->h, session->c);
    return CELLSTEP_OK;
}

cellstep_status cellstep_session_get_state(const cellstep_session* session, float* h, float* c) {
    if (!session || !h || !c) return CELLSTEP_ERROR_ARGUMENT;
    std::memcpy(h, session->h, h_count(session->model) * sizeof(float));
    std::memcpy(c, session->c, c_count(session->model) * sizeof(float));
    return CELLSTEP_OK;
}

cellstep_status cellstep_session_set_state(cellstep_session* session, const float* h, const float* c) {
    if (!session || !h || !c) return CELLSTEP_ERROR_ARGUMENT;
    std::memcpy(session->h, h, h_count(session->model) * sizeof(float));
    std::memcpy(session->c, c, c_count(session->model) * sizeof(float));
    return CELLSTEP_OK;
}
