"""No kernel keeps registers in memory: what the compiler says of each kernel file for the H100."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "csrc/ops/cuda").glob("*.cu"))
KERNELS = [source for source in SOURCES if "__global__" in source.read_text()]
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


def report_of(nvcc: str, source: Path, folder: Path) -> str:
    command = [nvcc, "-std=c++17", "-arch=sm_90a", "-cubin", "-Xptxas", "-v", str(source)]
    command += ["-o", str(folder / f"{source.stem}.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    """What ptxas says of each file, some of which take it minutes."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("no nvcc on PATH")
    folder = tmp_path_factory.mktemp("cubins")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(KERNELS, pool.map(lambda source: report_of(nvcc, source, folder), KERNELS), strict=True))


@pytest.mark.parametrize("source", KERNELS, ids=lambda source: source.stem)
def test_no_kernel_spills(source: Path, reports: dict[Path, str]) -> None:
    found = spills(reports[source])
    assert found, "expected ptxas to report on every kernel"
    assert {name: sizes for name, sizes in found.items() if any(sizes)} == {}
