# find_package(cellstep) gives
#   cellstep::runtime         the torch-free runtime, shared: #include <cellstep/runtime.h>
#   cellstep::runtime_static  the same as an archive
#   cellstep::ops             the torch operators, if this build has them: #include <cellstep/ops.h>; find Torch too
#   cellstep::autograd        their gradients, if this build has them (CELLSTEP_BUILD_AUTOGRAD), for programs that
#                             train: #include <cellstep/autograd.h>; brings cellstep::ops
include("${CMAKE_CURRENT_LIST_DIR}/cellstepTargets.cmake")
