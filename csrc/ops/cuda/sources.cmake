# The kernels, and the operators that call them: what the CUDA library and its emulation are built of.
set(CELLSTEP_CUDA_KERNELS activate.cu block.cu cluster_tensor.cu pointwise.cu rows.cu streams.cu tensor.cu unpack.cu
                          variant.cu)
set(CELLSTEP_CUDA_OPERATORS activate.cpp choose.cpp dense.cpp layers.cpp library.cpp lstm_cell.cpp lstm_layer.cpp
                            lstm_layers.cpp lstm_packed.cpp lstm_variant.cpp pieces.cpp plain.cpp run_records.cpp)
foreach(kind KERNELS OPERATORS)
  list(TRANSFORM CELLSTEP_CUDA_${kind} PREPEND ${CMAKE_CURRENT_LIST_DIR}/)
endforeach()
