# Finds the torch of the Python in use, as the targets
#   cellstep_torch_stable  headers and libtorch_cpu: all that the stable ABI needs;
#   cellstep_torch         the whole of libtorch, for cellstep-run.
# Not find_package(Torch): with a CUDA build of torch it demands a CUDA toolkit, which neither target needs.
find_package(Python REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import torch; print(torch.__path__[0]); print(torch.__version__)"
  OUTPUT_VARIABLE CELLSTEP_TORCH_ANSWER RESULT_VARIABLE CELLSTEP_TORCH_FAILED ERROR_QUIET
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(CELLSTEP_TORCH_FAILED)
  message(FATAL_ERROR "The operators need torch 2.11 or later in ${Python_EXECUTABLE}, which cannot import it. "
                      "Install torch there, or configure with -DCELLSTEP_BUILD_OPS=OFF for the torch-free part.")
endif()
string(REPLACE "\n" ";" CELLSTEP_TORCH_ANSWER "${CELLSTEP_TORCH_ANSWER}")
list(GET CELLSTEP_TORCH_ANSWER 0 CELLSTEP_TORCH_DIR)
list(GET CELLSTEP_TORCH_ANSWER 1 CELLSTEP_TORCH_VERSION)
if(CELLSTEP_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "The operators need torch 2.11 or later; ${Python_EXECUTABLE} has ${CELLSTEP_TORCH_VERSION}. "
                      "Install a newer torch, or configure with -DCELLSTEP_BUILD_OPS=OFF.")
endif()
message(STATUS "torch ${CELLSTEP_TORCH_VERSION} in ${CELLSTEP_TORCH_DIR}")
set(CELLSTEP_TORCH_LIB_DIR ${CELLSTEP_TORCH_DIR}/lib)

foreach(name torch torch_cpu c10)
  find_library(CELLSTEP_LIB_${name} ${name} PATHS ${CELLSTEP_TORCH_LIB_DIR} NO_DEFAULT_PATH REQUIRED)
endforeach()

add_library(cellstep_torch_stable INTERFACE)
target_include_directories(cellstep_torch_stable SYSTEM INTERFACE ${CELLSTEP_TORCH_DIR}/include)
target_compile_features(cellstep_torch_stable INTERFACE cxx_std_20)  # torch's headers ask for it from 2.13 on
target_link_libraries(cellstep_torch_stable INTERFACE ${CELLSTEP_LIB_torch_cpu})

add_library(cellstep_torch INTERFACE)
target_include_directories(cellstep_torch SYSTEM INTERFACE ${CELLSTEP_TORCH_DIR}/include
                                                           ${CELLSTEP_TORCH_DIR}/include/torch/csrc/api/include)
target_compile_features(cellstep_torch INTERFACE cxx_std_20)
target_link_libraries(cellstep_torch INTERFACE ${CELLSTEP_LIB_torch} ${CELLSTEP_LIB_torch_cpu} ${CELLSTEP_LIB_c10})

# Where cellstep-run looks for its libraries: beside it in the environment it is installed into.
if(SKBUILD)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import os, sysconfig as s; print(os.path.relpath(s.get_path('platlib'), s.get_path('scripts')))"
    OUTPUT_VARIABLE CELLSTEP_SITE_FROM_SCRIPTS OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(CELLSTEP_RUN_RPATH "$ORIGIN/${CELLSTEP_SITE_FROM_SCRIPTS}/cellstep/lib"
                         "$ORIGIN/${CELLSTEP_SITE_FROM_SCRIPTS}/torch/lib")
else()
  set(CELLSTEP_RUN_RPATH "$ORIGIN/../${CELLSTEP_LIB_DIR}" ${CELLSTEP_TORCH_LIB_DIR})
endif()
