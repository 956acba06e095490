# Where things are installed. In a wheel the prefix is the package's own folder in site-packages, so that one
# `find_package(cellstep)` finds headers and libraries beside the Python files; elsewhere it is the usual layout.
include(GNUInstallDirs)
if(SKBUILD)
  set(CELLSTEP_LIB_DIR lib)
  set(CELLSTEP_INCLUDE_DIR include)
  set(CELLSTEP_SCRIPTS_DIR ${SKBUILD_SCRIPTS_DIR})
else()
  set(CELLSTEP_LIB_DIR ${CMAKE_INSTALL_LIBDIR})
  set(CELLSTEP_INCLUDE_DIR ${CMAKE_INSTALL_INCLUDEDIR})
  set(CELLSTEP_SCRIPTS_DIR ${CMAKE_INSTALL_BINDIR})
endif()
set(CELLSTEP_CMAKE_DIR ${CELLSTEP_LIB_DIR}/cmake/cellstep)
