#include <new>

#include "core/kernels.h"
#include "runtime/handles.h"

using cellstep::core::Image;
using cellstep::core::ImageHeader;
using cellstep::core::ImageStatus;
using cellstep::core::RecordKind;
using cellstep::core::Values;

namespace cellstep {
namespace runtime {

cellstep_status memory_fits(const void* memory, std::size_t memory_size, std::size_t required) {
    if (reinterpret_cast<std::uintptr_t>(memory) % caller_alignment) return CELLSTEP_ERROR_ALIGNMENT;
    return required > 0 && memory_size >= required ? CELLSTEP_OK : CELLSTEP_ERROR_MEMORY;
}

std::size_t h_count(const cellstep_model* model) {
    const ImageHeader& header = model->image.header();
    return static_cast<std::size_t>(header.state_layers) * header.h_size;
}

std::size_t c_count(const cellstep_model* model) {
    const ImageHeader& header = model->image.header();
    return static_cast<std::size_t>(header.state_layers) * header.c_size;
}

void place(Parts& parts, const core::Image& image, Work& work) {
    work.memory = parts.take(core::plan_bytes<float>(image));
    work.scratch = parts.values(core::plan_scratch<float>(image, work.steps, work.batch, work.threads()));
}

void make_plan(const core::Image& image, Work& work) {
    work.plan = core::make_plan<float>(image, work.steps, work.batch, work.threads(), work.memory);
}

}  // namespace runtime
}  // namespace cellstep

#if defined(CELLSTEP_NO_TEXTS)
const char* cellstep_status_text(cellstep_status) { return "no texts in this build: see cellstep_status"; }
#else
const char* cellstep_status_text(cellstep_status status) {
    const char* const text = cellstep::core::image_status_text(static_cast<ImageStatus>(status));
    if (text) return text;
    switch (status) {
        case CELLSTEP_OK:
            return "ok";
        case CELLSTEP_ERROR_ARGUMENT:
            return "a pointer is null or a count is out of range: check the arguments of the call";
        case CELLSTEP_ERROR_MEMORY:
            return "not enough memory: give or free more, or use a smaller model";
        case CELLSTEP_ERROR_FILE:
            return "the file cannot be opened or read: check its path and permissions";
        case CELLSTEP_ERROR_SELFTEST:
            return "the test vector in the file gives other numbers here: report this machine and compiler";
        case CELLSTEP_PENDING:
            return "no answer yet, as the window is not full: give the steps that follow";
        case CELLSTEP_ERROR_STEPS:
            return "a bidirectional model needs the whole sequence at once, and the session's memory is for fewer "
                   "steps: make it with cellstep_session_init_for";
        case CELLSTEP_ERROR_BIDIRECTIONAL:
            return "a bidirectional model answers whole sequences and not step by step, so it has no pool: use "
                   "sessions";
        case CELLSTEP_ERROR_SHAPE:
            return "the models differ in sizes or layers, so none can take the other's place: create a new session";
        default:
            break;
    }
    return "unknown status: the caller and the library are of different versions";
}
#endif

const char* cellstep_version(void) { return CELLSTEP_VERSION_STRING; }

int cellstep_api_version(void) { return CELLSTEP_API_VERSION; }

const char* cellstep_instruction_set(void) { return cellstep::core::instruction_set(); }

cellstep_status cellstep_model_init(void* memory, size_t memory_size, const void* data, size_t size, unsigned options,
                                    cellstep_model** model) {
    if (model) *model = nullptr;
    if (!memory || !data || !model || (options & ~unsigned{CELLSTEP_ALLOW_NONFINITE})) return CELLSTEP_ERROR_ARGUMENT;
    const cellstep_status fits = cellstep::runtime::memory_fits(memory, memory_size, CELLSTEP_MODEL_BYTES);
    if (fits != CELLSTEP_OK) return fits;
    Image image;
    ImageStatus status = open_image(data, size, &image);
    if (status == ImageStatus::ok)
        status = check_values(image, options & CELLSTEP_ALLOW_NONFINITE ? Values::any : Values::finite);
    if (status == ImageStatus::ok && image.header().dtype != 0) status = ImageStatus::dtype;
    if (status == ImageStatus::ok) *model = new (memory) cellstep_model{image, false, nullptr};
    return static_cast<cellstep_status>(status);
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
