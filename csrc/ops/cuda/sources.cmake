# The kernels, and the operators that call them: what the CUDA library and its emulation are built of.
set(CELLSTEP_CUDA_KERNELS activate.cu pointwise.cu unpack.cu variant.cu)
set(CELLSTEP_CUDA_OPERATORS activate.cpp dense.cpp library.cpp lstm_variant.cpp run_records.cpp)
foreach(kind KERNELS OPERATORS)
  list(TRANSFORM CELLSTEP_CUDA_${kind} PREPEND ${CMAKE_CURRENT_LIST_DIR}/)
endforeach()
