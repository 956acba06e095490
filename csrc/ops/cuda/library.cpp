#include "operators.h"
#include "ops/cell.h"
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

CELLSTEP_OPERATORS(library) {
    library.impl("lstm_cell", TORCH_BOX(&cellstep::ops::lstm_cell<cellstep::cuda::lstm_layer>));
    library.impl("lstm_cell_backward",
                 TORCH_BOX(&cellstep::ops::lstm_cell_backward<cellstep::cuda::lstm_layer_backward>));
    library.impl("lstm_layer", TORCH_BOX(&cellstep::cuda::lstm_layer));
    library.impl("lstm_layer_backward", TORCH_BOX(&cellstep::cuda::lstm_layer_backward));
    library.impl("lstm_packed", TORCH_BOX(&cellstep::cuda::lstm_packed));
    library.impl("lstm_packed_backward", TORCH_BOX(&cellstep::cuda::lstm_packed_backward));
    library.impl("lstm_layers", TORCH_BOX(&cellstep::cuda::lstm_layers));
    library.impl("lstm_layers_backward", TORCH_BOX(&cellstep::cuda::lstm_layers_backward));
    library.impl("has_kernels", TORCH_BOX(&here));
    library.impl("lstm_variant", TORCH_BOX(&cellstep::ops::lstm_variant<cellstep::cuda::variant_layer>));
    library.impl("dense", TORCH_BOX(&cellstep::cuda::dense));
    library.impl("activate", TORCH_BOX(&cellstep::cuda::activate));
    library.impl("run_records", TORCH_BOX(&cellstep::cuda::run_records));
}
