#include "activations.h"

namespace cellstep {
namespace cuda {

namespace {

constexpr int threads = 128;

template <class T>
__device__ bool is_set(const VariantStep<T>& s, const unsigned char* flags, std::int64_t step, std::int64_t row) {
    return flags && flags[row * s.reset_row] && !(s.lengths && step >= s.lengths[row]);
}

template <class T>
__device__ bool runs(const VariantStep<T>& s, std::int64_t row) {
    return !s.lengths || s.step < s.lengths[row];
}

template <class T>
__device__ void write_h_in(const VariantStep<T>& s, std::int64_t row, std::int64_t at, T h) {
    const std::int64_t place = row * s.recurrent_size + at;
    if (is_set(s, s.next_reset, s.next_reset_step, row)) h = s.initial_h ? s.initial_h[at] : T(0);
    s.h_in[place] = s.mask_h ? h * s.mask_h[place] : h;
}

/// One value of h behind the step, of which `given` came out.
template <class T>
__device__ void finish_h(const VariantStep<T>& s, std::int64_t row, std::int64_t at, T given) {
    const std::int64_t place = row * s.recurrent_size + at;
    T h = s.h[place];
    T y = T(0);
    if (runs(s, row)) {
        if (is_set(s, s.reset, s.reset_step, row)) h = s.initial_h ? s.initial_h[at] : T(0);
        if (s.keep_h)
            h = s.keep_h[place] * h + (T(1) - s.keep_h[place]) * given;
        else if (s.zoneout_h > T(0))
            h = s.zoneout_h * h + (T(1) - s.zoneout_h) * given;
        else
            h = given;
        s.h[place] = h;
        y = h;
    }
    s.y.data[row * s.y.row + at] = y;
    write_h_in(s, row, at, h);
}

/// What layer normalisation makes of the sums of a row: (x - mean) inverse gain.
template <class T>
struct Normal {
    T mean;
    T inverse;
};

template <class T>
__device__ T row_sum(const VariantStep<T>& s, int gate, std::int64_t row, std::int64_t unit, const Normal<T>& of_input,
                     const Normal<T>& of_hidden) {
    const std::int64_t units = s.hidden_size;
    const int gates = s.coupled ? 3 : 4;
    const std::int64_t at = (s.coupled && gate > 1 ? gate - 1 : gate) * units + unit;
    const std::int64_t place = row * gates * units + at;
    T input = s.input_sums[place];
    T hidden = s.hidden_sums[place];
    if (s.norm_ih) {
        const std::int64_t gain = s.expanded ? gate * units + unit : at;
        input = (input - of_input.mean) * of_input.inverse * s.norm_ih[gain];
        hidden = (hidden - of_hidden.mean) * of_hidden.inverse * s.norm_hh[gain];
    }
    if (s.bias_ih) input += s.bias_ih[at];
    if (s.bias_hh) hidden += s.bias_hh[at];
    return input + hidden;
}

/// Peephole of gate 0 (i), 1 (f) or 2 (o).
template <class T>
__device__ T peephole(const VariantStep<T>& s, int gate, std::int64_t unit) {
    const int place = s.coupled && !s.expanded && gate == 2 ? 1 : gate;
    return s.peephole ? s.peephole[place * s.hidden_size + unit] : T(0);
}

template <class T>
__device__ T c_before(const VariantStep<T>& s, std::int64_t row, std::int64_t unit) {
    if (is_set(s, s.reset, s.reset_step, row)) return s.initial_c ? s.initial_c[unit] : T(0);
    return s.c[row * s.hidden_size + unit];
}

/// c', before zoneout.
template <class T>
__device__ T new_c(const VariantStep<T>& s, std::int64_t row, std::int64_t unit, T c, const Normal<T>& of_input,
                   const Normal<T>& of_hidden) {
    T at_i = row_sum(s, 0, row, unit, of_input, of_hidden);
    if (s.peephole) at_i += peephole(s, 0, unit) * c;
    const T i = activated(s.gate, at_i);
    T f = T(1) - i;
    if (!s.coupled) {
        T at_f = row_sum(s, 1, row, unit, of_input, of_hidden);
        if (s.peephole) at_f += peephole(s, 1, unit) * c;
        f = activated(s.gate, at_f);
    }
    T g = activated(s.candidate, row_sum(s, 2, row, unit, of_input, of_hidden));
    if (s.mask_g) g *= s.mask_g[row * s.hidden_size + unit];
    T value = f * c + i * g;
    if (s.cell_clip > T(0)) {
        value = value < -s.cell_clip ? -s.cell_clip : value;
        value = value > s.cell_clip ? s.cell_clip : value;
    }
    return value;
}

/// The rest of a unit, from its c' and from what the output activation sees of it.
template <class T>
__device__ void finish_unit(const VariantStep<T>& s, bool projects, std::int64_t row, std::int64_t unit, T c, T value,
                            T seen, const Normal<T>& of_input, const Normal<T>& of_hidden) {
    const std::int64_t place = row * s.hidden_size + unit;
    T at_o = row_sum(s, 3, row, unit, of_input, of_hidden);
    if (s.peephole) at_o += peephole(s, 2, unit) * value;
    const T out = activated(s.gate, at_o) * activated(s.output, seen);
    const bool running = runs(s, row);
    if (running) {
        T next = value;
        if (s.keep_c)
            next = s.keep_c[place] * c + (T(1) - s.keep_c[place]) * value;
        else if (s.zoneout_c > T(0))
            next = s.zoneout_c * c + (T(1) - s.zoneout_c) * value;
        s.c[place] = next;
        if (s.cells.data) s.cells.data[row * s.cells.row + unit] = next;
    } else if (s.cells.data) {
        s.cells.data[row * s.cells.row + unit] = T(0);
    }
    if (projects)
        s.m[place] = out;
    else
        finish_h(s, row, unit, out);
}

template <class T>
struct Argument {
    VariantStep<T> step;
    bool projects;
};

template <class T>
__global__ void begin(const VariantStep<T> s) {
    const std::int64_t count = s.batch * s.recurrent_size;
    for (std::int64_t at = std::int64_t{blockIdx.x} * threads + threadIdx.x; at < count;
         at += std::int64_t{gridDim.x} * threads)
        write_h_in(s, at / s.recurrent_size, at % s.recurrent_size, s.h[at]);
}

template <class T>
__global__ void project(const VariantStep<T> s) {
    const std::int64_t count = s.batch * s.recurrent_size;
    for (std::int64_t at = std::int64_t{blockIdx.x} * threads + threadIdx.x; at < count;
         at += std::int64_t{gridDim.x} * threads)
        finish_h(s, at / s.recurrent_size, at % s.recurrent_size, s.projected[at]);
}

template <class T>
__global__ void gates(const Argument<T> argument) {
    const VariantStep<T>& s = argument.step;
    const Normal<T> none{};
    const std::int64_t count = s.batch * s.hidden_size;
    for (std::int64_t at = std::int64_t{blockIdx.x} * threads + threadIdx.x; at < count;
         at += std::int64_t{gridDim.x} * threads) {
        const std::int64_t row = at / s.hidden_size, unit = at % s.hidden_size;
        const T c = c_before(s, row, unit);
        const T value = new_c(s, row, unit, c, none, none);
        finish_unit(s, argument.projects, row, unit, c, value, value, none, none);
    }
}

/// Mean and 1 / sqrt(variance + 1e-5) of a row, the same in all threads.
template <class T>
__device__ Normal<T> normal(const T* values, std::int64_t count, T* memory) {
    T sum = 0;
    for (std::int64_t at = threadIdx.x; at < count; at += threads) sum += values[at];
    const T mean = block_combine(sum, memory, Add{}) / static_cast<T>(count);
    T squares = 0;
    for (std::int64_t at = threadIdx.x; at < count; at += threads) squares += (values[at] - mean) * (values[at] - mean);
    const T variance = block_combine(squares, memory, Add{}) / static_cast<T>(count);
    return {mean, T(1) / static_cast<T>(sqrt(variance + T(1e-5)))};
}

/// A block a row, since a row's sums are normalised together, and its c' again; a thread keeps to its units.
template <class T>
__global__ void normalised_gates(const Argument<T> argument) {
    const VariantStep<T>& s = argument.step;
    T* memory = reinterpret_cast<T*>(shared_memory());
    const std::int64_t units = s.hidden_size, width = (s.coupled ? 3 : 4) * units;
    for (std::int64_t row = blockIdx.x; row < s.batch; row += gridDim.x) {
        const Normal<T> of_input = normal(s.input_sums + row * width, width, memory);
        const Normal<T> of_hidden = normal(s.hidden_sums + row * width, width, memory);
        T* raw = s.m + row * units;
        for (std::int64_t unit = threadIdx.x; unit < units; unit += threads)
            raw[unit] = new_c(s, row, unit, c_before(s, row, unit), of_input, of_hidden);
        block_sync();
        const Normal<T> of_c = normal(raw, units, memory);
        for (std::int64_t unit = threadIdx.x; unit < units; unit += threads) {
            const T value = raw[unit];
            const T seen = (value - of_c.mean) * of_c.inverse * s.norm_c[unit] + s.norm_c_bias[unit];
            finish_unit(s, argument.projects, row, unit, c_before(s, row, unit), value, seen, of_input, of_hidden);
        }
    }
}

dim3 blocks_of(std::int64_t count, std::int64_t each) {
    const std::int64_t wanted = (count + each - 1) / each;
    return dim3(static_cast<unsigned>(wanted < 65535 ? wanted : 65535));
}

}  // namespace

template <class T>
const char* variant_begin(const VariantStep<T>& step, void* stream) {
    if (step.batch == 0) return nullptr;
    return launch(begin<T>, blocks_of(step.batch * step.recurrent_size, threads), dim3(threads), 0, stream, step);
}

template <class T>
const char* variant_step(const VariantStep<T>& step, bool projects, void* stream) {
    if (step.batch == 0) return nullptr;
    const Argument<T> argument{step, projects};
    if (step.norm_ih)
        return launch(normalised_gates<T>, blocks_of(step.batch, 1), dim3(threads), 32 * sizeof(T), stream, argument);
    return launch(gates<T>, blocks_of(step.batch * step.hidden_size, threads), dim3(threads), 0, stream, argument);
}

template <class T>
const char* variant_project(const VariantStep<T>& step, void* stream) {
    if (step.batch == 0) return nullptr;
    return launch(project<T>, blocks_of(step.batch * step.recurrent_size, threads), dim3(threads), 0, stream, step);
}

#define CELLSTEP_INSTANTIATE(T)                                               \
    template const char* variant_begin<T>(const VariantStep<T>&, void*);      \
    template const char* variant_step<T>(const VariantStep<T>&, bool, void*); \
    template const char* variant_project<T>(const VariantStep<T>&, void*);
CELLSTEP_INSTANTIATE(float)
CELLSTEP_INSTANTIATE(double)
#undef CELLSTEP_INSTANTIATE

}  // namespace cuda
}  // namespace cellstep
