# find_package(cellstep) gives
#   cellstep::runtime         the torch-free runtime, shared: #include <cellstep/runtime.h>
#   cellstep::runtime_static  the same as an archive
#   cellstep::ops             the torch operators, if this build has them: #include <cellstep/ops.h>; find Torch too
include("${CMAKE_CURRENT_LIST_DIR}/cellstepTargets.cmake")
