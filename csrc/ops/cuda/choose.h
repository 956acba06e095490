/// The one place that says which kernel does a call. CELLSTEP_CUDA_KERNEL=plain, rows, block, tensor, cluster
/// or cluster_float in the environment forces one, for tests.
#pragma once

#include "kernels.h"

namespace cellstep {
namespace cuda {

enum class Kernel { plain, rows, block, tensor, cluster, cluster_float };

struct Choice {
    Kernel kernel;
    bool whole;  ///< all layers in one launch
};

/// `whole` is the call with all layers, null where there are too many for one launch; `layer` one with a layer's sums
/// given. Throws where the kernel that is forced can do neither.
Choice choose(const char* op, const Forward* whole, const Forward& layer);

/// `rows` and `cluster_float` have no way back: forced, they leave this choice free.
Kernel choose(const char* op, const Backward& call);

/// Starts a kernel that fits; not the plain one, which is no single launch.
const char* start(Kernel kernel, const Forward& call);
const char* start(Kernel kernel, const Backward& call);
std::size_t progress_words(Kernel kernel, const Forward& call);
std::size_t progress_words(Kernel kernel, const Backward& call);

}  // namespace cuda
}  // namespace cellstep
