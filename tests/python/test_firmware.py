"""The firmware example on an emulated Cortex-M4F: its numbers, and how small it is."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_forecaster

import cellstep
from cellstep.runtime import Session, instruction_set

ROOT = Path(__file__).parents[2]
TOOLS = ["make", "arm-none-eabi-g++", "qemu-system-arm"]

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)} (scripts/embedded_tools.sh)"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, and what the firmware prints of it."""
    directory = tmp_path_factory.mktemp("firmware")
    model = directory / "forecaster.cellstep"
    cellstep.export(make_forecaster(), model)
    command = ["make", "-s", "run", "firmware", "CORE=m4f", f"MODEL={model}", f"BUILD={directory}"]
    done = subprocess.run(
        [*command, f"PYTHON={sys.executable}"], cwd=ROOT / "examples/firmware", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return directory, Session(model), done.stdout.split("\n")


def series():
    sys.path.insert(0, str(ROOT / "examples/firmware"))
    try:
        from make_headers import sample_series
    finally:
        sys.path.pop(0)
    return np.array(sample_series(48), np.float32)


def test_it_prints_the_librarys_numbers(made):
    _, session, lines = made
    assert instruction_set() != "baseline", "the comparison needs fused multiply-add"
    truth = session.run(series())[:, 0]
    found = np.array([float.fromhex(line) for line in lines[:48]], np.float32)
    assert found.tobytes() == truth.tobytes()


def test_it_says_what_it_took(made):
    _, _, lines = made
    assert lines[48].startswith("memory ") and lines[49].startswith("instructions per step ")
    # Two layers of 50 units have 800 bytes of state, and 33,280 multiply-adds a step, each two instructions at least.
    assert 800 < int(lines[48].split()[1]) <= 1400
    assert int(lines[49].split()[-1]) > 66_560


def test_its_code_fits_8_kilobytes(made):
    directory, session, _ = made
    elf = directory / "firmware.elf"
    sizes = subprocess.run(["arm-none-eabi-size", "-A", elf], capture_output=True, text=True, check=True).stdout
    text = next(int(line.split()[1]) for line in sizes.splitlines() if line.startswith(".text"))
    symbols = subprocess.run(["arm-none-eabi-nm", "-S", elf], capture_output=True, text=True, check=True).stdout
    arrays = [line.split() for line in symbols.splitlines() if line.endswith((" forecaster_model", " series"))]
    assert len(arrays) == 2
    # gcc 12.2 makes 8,088 bytes; loader, start-up and memcpy are part of them.
    assert text - sum(int(array[1], 16) for array in arrays) <= 8192
