# The kernels, and the operators that call them: what the CUDA library and its emulation are built of.
set(CELLSTEP_CUDA_KERNELS pointwise.cu)
set(CELLSTEP_CUDA_OPERATORS library.cpp)
foreach(kind KERNELS OPERATORS)
  list(TRANSFORM CELLSTEP_CUDA_${kind} PREPEND ${CMAKE_CURRENT_LIST_DIR}/)
endforeach()
