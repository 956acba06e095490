"""The CUDA library where there is no GPU: it loads into a CUDA torch, its kernels are there, and none spills."""

import importlib.util
import os
import re
import shutil
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
STACKS = re.compile(r"Function (\w+):\n.*?STACK:(\d+) .*?LOCAL:(\d+) ")
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


def cuobjdump() -> str | None:
    """NVIDIA's tool, from the toolkit or from PyPI."""
    wheel = importlib.util.find_spec("nvidia.cu13") if importlib.util.find_spec("nvidia") else None
    folders = [str(Path(place) / "bin") for place in (wheel and wheel.submodule_search_locations) or ()]
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=":".join(folders))


def kept_in_memory(report: str, architecture: str) -> dict[str, int]:
    """Bytes of memory that each thread has to itself, by kernel."""
    parts = report.split("arch = ")
    found = "".join(part for part in parts if part.startswith(f"{architecture}\n"))
    return {name: int(stack) + int(local) for name, stack, local in STACKS.findall(found)}


def test_a_spill_is_found():
    report = """
arch = sm_80
 Function _Z1aPf:
  REG:255 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:392 TEXTURE:0 SURFACE:0 SAMPLER:0

arch = sm_90a
 Function _Z1aPf:
  REG:255 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:392 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z1bPf:
  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:392 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert kept_in_memory(report, "sm_90a") == {"_Z1aPf": 8, "_Z1bPf": 0}


def test_no_kernel_spills(library):
    tool = cuobjdump()
    if not tool:
        pytest.skip("no cuobjdump, which make cuda installs")
    done = subprocess.run([tool, "--dump-resource-usage", library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "arch = sm_90a\n" not in done.stdout:
        pytest.skip("built for other architectures")
    found = kept_in_memory(done.stdout, "sm_90a")
    assert found, "expected the resources of kernels"
    assert {name: size for name, size in found.items() if size} == {}
