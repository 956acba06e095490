#include "device.h"
#include "pointwise.h"

#include <atomic>

namespace cellstep {
namespace cuda {

int multiprocessors(int device) {
#if defined(CELLSTEP_EMULATED)
    static_cast<void>(device);
    return 8;
#else
    static std::atomic<int> counts[64];
    std::atomic<int>& count = counts[device & 63];
    if (count == 0) {
        int found = 0;
        cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device);
        count = found;
    }
    return count;
#endif
}

}  // namespace cuda
}  // namespace cellstep
