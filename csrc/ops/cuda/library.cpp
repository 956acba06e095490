#include "operators.h"
#include "ops/schemas.h"

// Of the CUDA library, or of its emulation, which has a namespace of its own.
#if defined(CELLSTEP_CUDA)
#define CELLSTEP_OPERATORS(library) STABLE_TORCH_LIBRARY_IMPL(cellstep, CUDA, library)
#else
STABLE_TORCH_LIBRARY(cellstep_emulated, library) { cellstep::ops::define_operators(library); }
#define CELLSTEP_OPERATORS(library) STABLE_TORCH_LIBRARY_IMPL(cellstep_emulated, CPU, library)
#endif

namespace {

bool here(cellstep::cuda::Tensor) { return true; }

}  // namespace

CELLSTEP_OPERATORS(library) { library.impl("has_kernels", TORCH_BOX(&here)); }
