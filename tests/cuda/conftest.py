import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def emulated():
    """torch.ops.cellstep_emulated: the CUDA library's own sources, built for the processor."""
    cmake = str(Path(sys.executable).parent / "cmake")
    build = ROOT / "build/emulated"
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DCELLSTEP_BUILD_CUDA_EMULATED=ON", "-DCELLSTEP_BUILD_TOOLS=OFF"]
    options += [
        f"-DCMAKE_MAKE_PROGRAM={Path(sys.executable).parent / 'ninja'}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    build.mkdir(parents=True, exist_ok=True)
    with FileLock(build / "lock"):  # processes that test side by side share it
        for command in (
            [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *options],
            [cmake, "--build", build, "--target", "cellstep_ops_emulated", "--parallel", "2"],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    torch.ops.load_library(build / "tests/cuda/libcellstep_ops_emulated.so")
    return torch.ops.cellstep_emulated


@pytest.fixture
def poisoned():
    """Memory that torch allocates comes filled with 0xfe: NaN in float16, else values of 1e38 and more."""
    perturb = -6  # M_PERTURB of glibc's malloc.h
    ctypes.CDLL(None).mallopt(perturb, 0x01)
    yield
    ctypes.CDLL(None).mallopt(perturb, 0)
