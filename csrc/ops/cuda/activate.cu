#include "activations.h"

namespace cellstep {
namespace cuda {

namespace {

constexpr int threads = 256;

struct Call {
    Activation activation;
    std::int64_t rows;
    std::int64_t width;
    const void* x;
    void* y;
};

template <class T>
__global__ void elementwise(const Call call) {
    using W = typename Wide<T>::type;
    const std::int64_t count = call.rows * call.width;
    const T* x = static_cast<const T*>(call.x);
    T* y = static_cast<T*>(call.y);
    for (std::int64_t at = std::int64_t{blockIdx.x} * threads + threadIdx.x; at < count;
         at += std::int64_t{gridDim.x} * threads)
        y[at] = from_float<T>(activated<W>(call.activation, to_float(x[at])));
}

/// A block a row, at any width.
template <class T>
__global__ void softmax(const Call call) {
    using W = typename Wide<T>::type;
    W* memory = reinterpret_cast<W*>(shared_memory());
    for (std::int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
        const T* x = static_cast<const T*>(call.x) + row * call.width;
        T* y = static_cast<T*>(call.y) + row * call.width;
        W largest = to_float(x[0]);
        for (std::int64_t at = threadIdx.x; at < call.width; at += threads)
            largest = Larger{}(largest, static_cast<W>(to_float(x[at])));
        largest = block_combine(largest, memory, Larger{});
        W sum = 0;
        for (std::int64_t at = threadIdx.x; at < call.width; at += threads) sum += exp_of(to_float(x[at]) - largest);
        sum = block_combine(sum, memory, Add{});
        for (std::int64_t at = threadIdx.x; at < call.width; at += threads)
            y[at] = from_float<T>(exp_of(to_float(x[at]) - largest) / sum);
    }
}

template <class T>
const char* start(const Activate& call) {
    const std::int64_t most = 65535;
    const std::int64_t count = call.rows * call.width;
    const Call argument{call.activation, call.rows, call.width, call.x, call.y};
    if (call.activation == Activation::softmax) {
        const std::int64_t blocks = call.rows < most ? call.rows : most;
        return launch(softmax<T>, dim3(static_cast<unsigned>(blocks)), dim3(threads), 32 * sizeof(double), call.stream,
                      argument);
    }
    const std::int64_t wanted = (count + threads - 1) / threads;
    const std::int64_t blocks = wanted < most ? wanted : most;
    return launch(elementwise<T>, dim3(static_cast<unsigned>(blocks)), dim3(threads), 0, call.stream, argument);
}

}  // namespace

const char* activate_values(const Activate& call) {
    if (call.rows == 0 || call.width == 0) return nullptr;
    switch (call.type) {
        case DataType::float32:
            return start<float>(call);
        case DataType::float64:
            return start<double>(call);
        case DataType::float16:
            return start<__half>(call);
        default:
            return start<__nv_bfloat16>(call);
    }
}

}  // namespace cuda
}  // namespace cellstep
