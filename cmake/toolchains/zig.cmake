# Cross-compiles with the clang and the C libraries of the PyPI package ziglang, found in the project's environment or
# in the Python on the path. ZIG_TARGET is zig's name of the target; the preset sets it beside CMAKE_SYSTEM_NAME.
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ZIG ZIG_TARGET ZIG_CPU)
if(NOT ZIG)
  foreach(python ${CMAKE_CURRENT_LIST_DIR}/../../.venv/bin/python $ENV{VIRTUAL_ENV}/bin/python python3 python)
    execute_process(COMMAND ${python} -c "import os, ziglang; print(os.path.dirname(ziglang.__file__))"
                    OUTPUT_VARIABLE directory OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
    if(NOT failed)
      set(ZIG ${directory}/zig CACHE FILEPATH "the compiler of the PyPI package ziglang")
      break()
    endif()
  endforeach()
  if(NOT ZIG)
    message(FATAL_ERROR "The target ${ZIG_TARGET} needs zig: run scripts/embedded_tools.sh, or pip install ziglang, "
                        "or configure with -DZIG=/path/to/zig.")
  endif()
endif()

set(options -target ${ZIG_TARGET})
if(ZIG_CPU)
  list(APPEND options -mcpu=${ZIG_CPU})
endif()
set(CMAKE_C_COMPILER ${ZIG} cc ${options})
set(CMAKE_CXX_COMPILER ${ZIG} c++ ${options})
# zig's archiver is a subcommand, and CMAKE_AR takes the name of a program alone.
foreach(language C CXX)
  set(CMAKE_${language}_ARCHIVE_CREATE "\"${ZIG}\" ar qc <TARGET> <LINK_FLAGS> <OBJECTS>")
  set(CMAKE_${language}_ARCHIVE_APPEND "\"${ZIG}\" ar q <TARGET> <LINK_FLAGS> <OBJECTS>")
  set(CMAKE_${language}_ARCHIVE_FINISH "\"${ZIG}\" ranlib <TARGET>")
endforeach()
# A program would have zig build its C++ library first, which takes a minute for each target.
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
