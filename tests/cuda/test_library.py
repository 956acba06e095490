"""The CUDA library where there is no GPU: it loads into a CUDA torch, and its kernels are there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cellstep.ops import library_path

LIBRARY = Path(__file__).parents[2] / "build/cuda/csrc/ops/cuda/libcellstep_ops_cuda.so"
OPERATORS = [
    *("lstm_cell", "lstm_cell_backward", "lstm_layer", "lstm_layer_backward", "lstm_packed", "lstm_packed_backward"),
    *("lstm_layers", "lstm_layers_backward", "lstm_variant", "dense", "activate", "run_records", "has_kernels"),
]
PROGRAM = """
import sys
import torch
for library in sys.argv[1:3]:
    torch.ops.load_library(library)
for name in sys.argv[3:]:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cellstep::{name}", "CUDA"), name
print(torch.__version__)
"""


@pytest.fixture
def library():
    if not LIBRARY.exists():
        pytest.skip("make cuda has not been run")
    return LIBRARY


def test_needs_the_libraries_it_takes_symbols_from(library):
    """The names stand in the library's dynamic section; of CUDA itself it needs nothing, as that is linked in."""
    names = library.read_bytes()
    for needed in (b"libtorch_cuda.so", b"libtorch_cpu.so"):
        assert needed + b"\0" in names
    assert b"libcudart.so" not in names


def test_loads_into_a_cuda_torch(library):
    """CELLSTEP_CUDA_TORCH: the site-packages of a Python like this one with a CUDA build of torch."""
    site = os.environ.get("CELLSTEP_CUDA_TORCH")
    if not site:
        pytest.skip("CELLSTEP_CUDA_TORCH is not set")
    command = [sys.executable, "-S", "-c", PROGRAM, library_path, library, *OPERATORS]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": site})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "+cu" in done.stdout
