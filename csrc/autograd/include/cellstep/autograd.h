/// cellstep/autograd.h: gradients of cellstep's operators for libtorch programs that train.
///
/// Loading the library registers them for every operator that a layer calls, differentiable themselves; a backward pass
/// through run_model is an error. In Python cellstep.ops registers its own, and only one registration may be active in
/// a process: where there is one already, this library leaves it alone and has an error instead, which Python raises
/// from torch.ops.load_library (in the main thread, whichever loads it) and a C++ program finds below. Link the CMake
/// target cellstep::autograd, which brings cellstep::ops.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

/// Registers nothing by itself, as loading the library has done that: it is the symbol that keeps the library linked
/// in a build without CMake. Returns 1 if this library's gradients are active, otherwise 0.
__attribute__((visibility("default"))) int cellstep_register_autograd(void);

/// Why this library's gradients are not active, in one line; NULL if they are. Valid as long as the library is loaded.
__attribute__((visibility("default"))) const char* cellstep_autograd_error(void);

#ifdef __cplusplus
}
#endif
