"""No kernel keeps registers in memory: what the compiler says of each kernel file for the H100."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).parents[2] / "csrc/ops/cuda").glob("*.cu"))
REPORT = re.compile(
    r"Compiling entry function '(\w+)'.*?\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
    re.DOTALL,
)


def spills(report: str) -> dict[str, tuple[int, int]]:
    """Bytes that are stored and loaded, by kernel."""
    return {name: (int(stores), int(loads)) for name, stores, loads in REPORT.findall(report)}


def test_a_spill_is_found():
    report = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90a'
ptxas info    : Function properties for _Z1aPf
    8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_90a'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
    assert spills(report) == {"_Z1aPf": (8, 12), "_Z1bPf": (0, 0)}


@pytest.mark.parametrize("source", KERNELS, ids=lambda source: source.stem)
def test_no_kernel_spills(source, tmp_path):
    """A file takes nvcc up to some minutes; ccache, where there is one, keeps what it says of a file as it was."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("no nvcc on PATH")
    command = [nvcc, "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
    command += ["-c", str(source), "-o", str(tmp_path / "kernels.o")]
    if ccache := shutil.which("ccache"):
        command.insert(0, ccache)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = spills(done.stdout + done.stderr)
    assert found, "expected ptxas to report on every kernel"
    assert {name: sizes for name, sizes in found.items() if any(sizes)} == {}
