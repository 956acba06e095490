"""Programs of a user's own, built against the installed package as its README says, and against the sources."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_with_cmake

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="linker flags and readelf are those of ELF systems")


def answers(text):
    return np.array([line.split(",")[1] for line in text.splitlines()], np.float64).astype(np.float32)


@pytest.fixture(scope="module")
def expected(model):
    state, outputs = model.initial_state(1), []
    with torch.no_grad():
        for step in range(5):
            y, state = model.step(torch.full((1, 10), 0.5 * step), state)
            outputs.append(y.item())
    return np.array(outputs, np.float32)


def test_libtorch_program_linked_as_needed(artifacts, expected, tmp_path):
    build_with_cmake(ROOT / "examples/libtorch", tmp_path, "-DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed")
    done = subprocess.run([tmp_path / "forecast", artifacts[".pt"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(answers(done.stdout), expected)


def test_libtorch_program_that_forgot_the_operators(artifacts, tmp_path):
    build_with_cmake(ROOT / "tests/consumer/forgot", tmp_path)
    done = subprocess.run([tmp_path / "forgot", artifacts[".pt"]], capture_output=True, text=True)
    assert done.returncode == 1 and "Unknown builtin op: cellstep::run_model" in done.stderr


def test_c_program(artifacts, expected, tmp_path):
    build_with_cmake(ROOT / "examples/embedded", tmp_path, "-DCMAKE_C_FLAGS=-Wall -Wextra -Wpedantic -Werror -std=c11")
    done = subprocess.run([tmp_path / "stream", artifacts[".cellstep"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(answers(done.stdout), expected)
    needed = subprocess.run(["ldd", tmp_path / "stream"], capture_output=True, text=True, check=True).stdout
    assert "cellstep_runtime" in needed and "torch" not in needed


@pytest.mark.parametrize("options", [[], ["-DCELLSTEP_SANITIZE=ON"], ["-DCELLSTEP_STRICT=ON"]], ids=str)
def test_c_program_by_add_subdirectory(artifacts, expected, tmp_path, options):
    build_with_cmake(ROOT / "tests/consumer/subdirectory", tmp_path / "build", *options)
    program = tmp_path / "build" / "subdirectory"
    done = subprocess.run([program, artifacts[".cellstep"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # A strict build rounds products before it adds, so it agrees to rounding and not to the bit; outputs span hundreds.
    tolerance = 1e-3 if "STRICT" in str(options) else 0
    assert np.abs(answers(done.stdout) - expected).max() <= tolerance
    if "SANITIZE" in str(options):
        content = artifacts[".cellstep"].read_bytes()
        broken = tmp_path / "broken.cellstep"
        for place in range(0, 64 + 64 * 8, 5):
            changed = bytearray(content)
            changed[place] ^= 0x41
            broken.write_bytes(bytes(changed))
            done = subprocess.run([program, broken], capture_output=True, text=True)
            assert done.returncode == 1 and done.stderr.startswith("error: "), done.stderr
