#include "variant_unit.h"

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
        h = kept(h, given, s.keep_h != nullptr, s.keep_h ? s.keep_h[place] : T(0), s.zoneout_h);
        s.h[place] = h;
        y = h;
    }
    s.y.data[row * s.y.row + at] = y;
    write_h_in(s, row, at, h);
}

template <class T>
__device__ T c_before(const VariantStep<T>& s, std::int64_t row, std::int64_t unit) {
    if (is_set(s, s.reset, s.reset_step, row)) return s.initial_c ? s.initial_c[unit] : T(0);
    return s.c[row * s.hidden_size + unit];
}

template <class T>
__device__ T sum_of(const VariantStep<T>& s, const UnitWeights<T>& w, int gate, std::int64_t row, std::int64_t unit,
                    const Normal<T>& of_hidden) {
    const std::int64_t place = (row * (s.coupled ? 3 : 4) + gate_place(s, gate)) * s.hidden_size + unit;
    return gate_sum(s, w, gate, s.input_sums[place], s.hidden_sums[place], of_hidden);
}

template <class T>
__device__ T raw_c(const VariantStep<T>& s, const UnitWeights<T>& w, std::int64_t row, std::int64_t unit, T c,
                   const Normal<T>& of_hidden) {
    const auto sum = [&](int gate) { return has_gate(s, gate) ? sum_of(s, w, gate, row, unit, of_hidden) : T(0); };
    return new_c(s, w, sum(0), sum(1), sum(2), c, s.mask_g ? s.mask_g[row * s.hidden_size + unit] : T(1));
}

/// The rest of a unit, from its c'.
template <class T>
__device__ void finish_unit(const VariantStep<T>& s, const UnitWeights<T>& w, bool projects, std::int64_t row,
                            std::int64_t unit, T c, T value, const Normal<T>& of_hidden, const Normal<T>& of_c) {
    const std::int64_t place = row * s.hidden_size + unit;
    const T out = new_h(s, w, sum_of(s, w, 3, row, unit, of_hidden), value, of_c);
    if (runs(s, row)) {
        const T next = kept(c, value, s.keep_c != nullptr, s.keep_c ? s.keep_c[place] : T(0), s.zoneout_c);
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
        const UnitWeights<T> w = unit_weights(s, unit);
        const T c = c_before(s, row, unit);
        finish_unit(s, w, argument.projects, row, unit, c, raw_c(s, w, row, unit, c, none), none, none);
    }
}

/// Of a row, the same in all threads.
template <class T>
__device__ Normal<T> normal(const T* values, std::int64_t count, T* memory) {
    T sum = 0;
    for (std::int64_t at = threadIdx.x; at < count; at += threads) sum += values[at];
    const T mean = block_combine(sum, memory, Add{}) / static_cast<T>(count);
    T squares = 0;
    for (std::int64_t at = threadIdx.x; at < count; at += threads) squares += (values[at] - mean) * (values[at] - mean);
    return normal_of(mean, block_combine(squares, memory, Add{}), static_cast<T>(count));
}

/// A block a row, since a row's sums are normalised together, and its c' again; a thread keeps to its units.
template <class T>
__global__ void normalised_gates(const Argument<T> argument) {
    const VariantStep<T>& s = argument.step;
    T* memory = reinterpret_cast<T*>(shared_memory());
    const std::int64_t units = s.hidden_size, width = (s.coupled ? 3 : 4) * units;
    for (std::int64_t row = blockIdx.x; row < s.batch; row += gridDim.x) {
        const Normal<T> of_hidden = normal(s.hidden_sums + row * width, width, memory);
        T* raw = s.m + row * units;
        for (std::int64_t unit = threadIdx.x; unit < units; unit += threads)
            raw[unit] = raw_c(s, unit_weights(s, unit), row, unit, c_before(s, row, unit), of_hidden);
        block_sync();
        const Normal<T> of_c = normal(raw, units, memory);
        for (std::int64_t unit = threadIdx.x; unit < units; unit += threads)
            finish_unit(s, unit_weights(s, unit), argument.projects, row, unit, c_before(s, row, unit), raw[unit],
                        of_hidden, of_c);
    }
}

template <class T>
__global__ void normalise_inputs(const VariantInputs<T> call) {
    T* memory = reinterpret_cast<T*>(shared_memory());
    const std::int64_t units = call.hidden_size, width = (call.coupled ? 3 : 4) * units;
    for (std::int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
        T* const sums = call.sums + row * width;
        const Normal<T> of_row = normal(sums, width, memory);
        for (std::int64_t at = threadIdx.x; at < width; at += threads) {
            const std::int64_t skipped = call.coupled && call.expanded && at >= units ? units : 0;
            sums[at] = of_row(sums[at]) * call.norm_ih[at + skipped];
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
    if (step.norm_hh)
        return launch(normalised_gates<T>, blocks_of(step.batch, 1), dim3(threads), 32 * sizeof(T), stream, argument);
    return launch(gates<T>, blocks_of(step.batch * step.hidden_size, threads), dim3(threads), 0, stream, argument);
}

template <class T>
const char* variant_project(const VariantStep<T>& step, void* stream) {
    if (step.batch == 0) return nullptr;
    return launch(project<T>, blocks_of(step.batch * step.recurrent_size, threads), dim3(threads), 0, stream, step);
}

template <class T>
const char* variant_inputs(const VariantInputs<T>& call, void* stream) {
    if (call.rows == 0) return nullptr;
    return launch(normalise_inputs<T>, blocks_of(call.rows, 1), dim3(threads), 32 * sizeof(T), stream, call);
}

#define CELLSTEP_INSTANTIATE(T)                                               \
    template const char* variant_inputs<T>(const VariantInputs<T>&, void*);   \
    template const char* variant_begin<T>(const VariantStep<T>&, void*);      \
    template const char* variant_step<T>(const VariantStep<T>&, bool, void*); \
    template const char* variant_project<T>(const VariantStep<T>&, void*);
CELLSTEP_INSTANTIATE(float)
CELLSTEP_INSTANTIATE(double)
#undef CELLSTEP_INSTANTIATE

}  // namespace cuda
}  // namespace cellstep
