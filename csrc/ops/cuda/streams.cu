#include "streams.h"

#include <map>
#include <mutex>
#include <tuple>

#include "device.h"

namespace cellstep {
namespace cuda {

#if defined(CELLSTEP_EMULATED)

const char* stream_beside(int, void*, int number, void** found) {
    *found = simt::stream_beside(number);
    return nullptr;
}

const char* mark(void* stream, void** event) {
    *event = simt::mark(stream);
    return nullptr;
}

const char* wait_for(void* stream, void* event) {
    simt::wait_for(stream, event);
    return nullptr;
}

void forget(void* event) { simt::forget(event); }

#else

namespace {

const char* said(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* stream_beside(int device, void* stream, int number, void** found) {
    static std::mutex mutex;
    static std::map<std::tuple<int, void*, int>, cudaStream_t> streams;
    const std::lock_guard<std::mutex> lock(mutex);
    cudaStream_t& known = streams[{device, stream, number}];
    cudaError_t error = cudaSuccess;
    if (!known) {
        // Also while a graph is captured, which what is made here takes no part in.
        cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
        error = cudaThreadExchangeStreamCaptureMode(&mode);
        int least = 0, greatest = 0;
        if (error == cudaSuccess) error = cudaDeviceGetStreamPriorityRange(&least, &greatest);
        if (error == cudaSuccess) error = cudaStreamCreateWithPriority(&known, cudaStreamNonBlocking, greatest);
        cudaThreadExchangeStreamCaptureMode(&mode);
    }
    *found = known;
    return said(error);
}

const char* mark(void* stream, void** event) {
    cudaEvent_t made = nullptr;
    cudaError_t error = cudaEventCreateWithFlags(&made, cudaEventDisableTiming);
    *event = made;
    if (error == cudaSuccess) error = cudaEventRecord(made, static_cast<cudaStream_t>(stream));
    return said(error);
}

const char* wait_for(void* stream, void* event) {
    return said(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(event), 0));
}

void forget(void* event) { cudaEventDestroy(static_cast<cudaEvent_t>(event)); }

#endif

}  // namespace cuda
}  // namespace cellstep
