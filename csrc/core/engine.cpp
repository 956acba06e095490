#include "core/engine.h"

#include <cstring>

namespace cellstep {
namespace core {

namespace {

/// Rows (steps times batch) of one chunk: enough to use the matrix product, few enough to stay in cache.
constexpr std::size_t chunk_rows = 64;

std::size_t chunk_steps(std::size_t steps, std::size_t batch) {
    const std::size_t chunk = batch < chunk_rows ? chunk_rows / batch : 1;
    return steps < chunk ? steps : chunk;
}

}  // namespace

template <class T>
std::size_t model_scratch(const Image& image, std::size_t steps, std::size_t batch) {
    if (steps == 0 || batch == 0) return 0;
    const ImageHeader& header = image.header();
    const std::size_t chunk = chunk_steps(steps, batch);
    const std::size_t widest = header.input_size > header.hidden_size ? header.input_size : header.hidden_size;
    return layer_scratch(chunk, batch, widest, header.hidden_size) + 2 * chunk * batch * header.hidden_size;
}

template <class T>
void run_model(const Image& image, const ModelRun<T>& run, T* scratch) {
    if (run.steps == 0 || run.batch == 0) return;
    const ImageHeader& header = image.header();
    const std::size_t units = header.hidden_size;
    const std::size_t state = run.batch * units;
    const std::size_t chunk = chunk_steps(run.steps, run.batch);
    T* hidden[2] = {scratch, scratch + chunk * state};
    T* layer_memory = scratch + 2 * chunk * state;

    for (std::size_t begin = 0; begin < run.steps; begin += chunk) {
        const std::size_t steps = run.steps - begin < chunk ? run.steps - begin : chunk;
        const bool answers = !run.last_only || begin + steps == run.steps;
        // The steps whose output is asked for, and where it goes.
        const std::size_t first = run.last_only ? steps - 1 : 0;
        T* y = run.y.data + (run.last_only ? 0 : static_cast<std::ptrdiff_t>(begin) * run.y.step_stride);

        SequenceView<T> x = run.x;
        x.data += static_cast<std::ptrdiff_t>(begin) * x.step_stride;
        const T* offset = nullptr;
        const T* scale = nullptr;
        std::size_t layer = 0;
        const T* source = nullptr;  // what the last record wrote, (steps, batch, width)
        bool has_head = false;
        for (const ImageRecord& record : image) {
            const T* data = image.data<T>(record);
            switch (static_cast<RecordKind>(record.kind)) {
                case RecordKind::input_scaling:
                    offset = data;
                    scale = data + record.sizes[0];
                    break;
                case RecordKind::lstm: {
                    T* target = hidden[layer % 2];
                    const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(units);
                    const std::ptrdiff_t step = static_cast<std::ptrdiff_t>(state);
                    T* h = run.h + layer * state;
                    layer_forward<T>({steps,
                                      run.batch,
                                      record.sizes[0],
                                      units,
                                      data,
                                      x,
                                      offset,
                                      scale,
                                      h,
                                      run.c + layer * state,
                                      {target, step, row},
                                      nullptr,
                                      nullptr},
                                     layer_memory);
                    std::memcpy(h, target + (steps - 1) * state, state * sizeof(T));
                    x = {target, step, row, 1};
                    offset = scale = nullptr;
                    source = target;
                    ++layer;
                    break;
                }
                case RecordKind::dense:
                    has_head = true;
                    for (std::size_t step = first; answers && step < steps; ++step)
                        dense_forward<T>(run.batch, units, record.sizes[1], data, source + step * state,
                                         static_cast<std::ptrdiff_t>(units),
                                         y + static_cast<std::ptrdiff_t>(step - first) * run.y.step_stride,
                                         run.y.row_stride);
                    break;
                default:
                    break;
            }
        }
        if (!answers) continue;

        const ImageRecord* scaling = image.find(RecordKind::output_scaling);
        const T* y_offset = scaling ? image.data<T>(*scaling) : nullptr;
        const std::size_t outputs = header.output_size;
        for (std::size_t step = first; step < steps; ++step) {
            for (std::size_t row = 0; row < run.batch; ++row) {
                T* target = y + static_cast<std::ptrdiff_t>(step - first) * run.y.step_stride +
                            static_cast<std::ptrdiff_t>(row) * run.y.row_stride;
                if (!has_head) std::memcpy(target, source + step * state + row * units, units * sizeof(T));
                for (std::size_t k = 0; y_offset && k < outputs; ++k)
                    target[k] = target[k] * y_offset[outputs + k] + y_offset[k];
            }
        }
    }
}

template std::size_t model_scratch<float>(const Image&, std::size_t, std::size_t);
template std::size_t model_scratch<double>(const Image&, std::size_t, std::size_t);
template void run_model<float>(const Image&, const ModelRun<float>&, float*);
template void run_model<double>(const Image&, const ModelRun<double>&, double*);

}  // namespace core
}  // namespace cellstep
