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

/// Version of this library, as "0.1.0".
__attribute__((visibility("default"))) const char* cellstep_ops_version(void);

#ifdef __cplusplus
}
#endif
