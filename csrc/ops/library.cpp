#include "cellstep/ops.h"
#include "ops/cell.h"
#include "ops/operators.h"
#include "ops/schemas.h"

namespace {

bool here(cellstep::ops::Tensor) { return true; }
bool elsewhere(cellstep::ops::Tensor) { return false; }

}  // namespace

STABLE_TORCH_LIBRARY(cellstep, library) { cellstep::ops::define_operators(library); }

STABLE_TORCH_LIBRARY_IMPL(cellstep, CPU, library) {
    library.impl("lstm_cell", TORCH_BOX(&cellstep::ops::lstm_cell<cellstep::ops::lstm_layer>));
    library.impl("lstm_cell_backward",
                 TORCH_BOX(&cellstep::ops::lstm_cell_backward<cellstep::ops::lstm_layer_backward>));
    library.impl("lstm_layer", TORCH_BOX(&cellstep::ops::lstm_layer));
    library.impl("lstm_layer_backward", TORCH_BOX(&cellstep::ops::lstm_layer_backward));
    library.impl("lstm_packed", TORCH_BOX(&cellstep::ops::lstm_packed));
    library.impl("lstm_packed_backward", TORCH_BOX(&cellstep::ops::lstm_packed_backward));
    library.impl("lstm_variant", TORCH_BOX(&cellstep::ops::lstm_variant<cellstep::ops::variant_layer>));
    library.impl("activate", TORCH_BOX(&cellstep::ops::activate));
    library.impl("dense", TORCH_BOX(&cellstep::ops::dense));
    library.impl("lstm_stack", TORCH_BOX(&cellstep::ops::lstm_stack));
    library.impl("run_model", TORCH_BOX(&cellstep::ops::run_model));
    library.impl("has_kernels", TORCH_BOX(&here));
}

STABLE_TORCH_LIBRARY_IMPL(cellstep, CompositeExplicitAutograd, library) {
    library.impl("has_kernels", TORCH_BOX(&elsewhere));
}

int cellstep_register_ops(void) { return 1; }

const char* cellstep_ops_version(void) { return CELLSTEP_VERSION_STRING; }
