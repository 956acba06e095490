/// cellstep/ops.h: what a libtorch program needs to use cellstep's operators.
///
/// Loading the operator library registers torch.ops.cellstep; a linker that drops libraries without a used symbol
/// (`--as-needed`, the default on Debian) would drop it. The CMake target cellstep::ops prevents that; a program
/// built in another way calls cellstep_register_ops() once before it loads a model.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

/// Registers nothing by itself, as loading the library has done that: it is the symbol that keeps the library linked.
/// Returns 1.
__attribute__((visibility("default"))) int cellstep_register_ops(void);

/// Loads libcellstep_ops_cuda from beside this library, once: with it the operators run on CUDA tensors. Call it before
/// a model is moved to CUDA. Returns 1, or 0 where there is no such library or it does not load, as without a libtorch
/// that has CUDA; every model then still runs on CUDA tensors, by way of the CPU or on torch's own kernels. Safe from
/// any thread.
__attribute__((visibility("default"))) int cellstep_register_cuda(void);

/// Why cellstep_register_cuda returns 0, in one line; an empty text where it returns 1. Loads the library if nothing
/// has done so. The text lives as long as the process.
__attribute__((visibility("default"))) const char* cellstep_cuda_error(void);

/// Version of this library, as "0.1.0".
__attribute__((visibility("default"))) const char* cellstep_ops_version(void);

#ifdef __cplusplus
}
#endif
