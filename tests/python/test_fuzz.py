"""The fuzzers: every kept input and everything that was ever found, then a short run of each."""

import os
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
fuzzing = runpy.run_path(str(ROOT / "tests" / "fuzz" / "run.py"))
SECONDS = float(os.environ.get("FUZZ_SECONDS", "20"))


@pytest.fixture(scope="module")
def folder():
    if fuzzing["compiler"]() is None:
        pytest.skip("no clang with libFuzzer here")
    folder = ROOT / "build" / "fuzz"
    fuzzing["build"](folder)
    return folder


@pytest.mark.parametrize("name", ["load", "session"])
def test_kept_inputs_and_findings(name, folder):
    program = folder / "tests" / "fuzz" / f"fuzz_{name}"
    files = [path for kept in fuzzing["inputs"](name) for path in sorted(kept.iterdir())]
    assert len(files) > 30
    done = subprocess.run([program, "-timeout=60", *files], capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stderr.count("Executed ") == len(files)


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2"])
def test_kept_inputs_on_other_instruction_sets(instruction_set, folder, monkeypatch):
    """What this machine takes of itself is the widest that it has."""
    monkeypatch.setenv("CELLSTEP_CPU", instruction_set)
    for name in ("load", "session"):
        seen = fuzzing["fuzz"](folder, name, 0)
        assert not seen["finding"] and seen["coverage"] > 500


@pytest.mark.parametrize("name", ["load", "session"])
def test_a_short_run(name, folder):
    seen = fuzzing["fuzz"](folder, name, SECONDS)
    assert not seen["finding"]
    assert seen["executions"] > 100


def test_a_finding_is_told(folder, tmp_path):
    """Both sanitizers are there, and the checks of the fuzzers themselves end the program."""
    program = folder / "tests" / "fuzz" / "fuzz_load"
    symbols = subprocess.run(["nm", program], capture_output=True, text=True).stdout
    assert "__asan_report_load4" in symbols and "__ubsan_handle_pointer_overflow" in symbols
    assert fuzzing["summary"]("a\nfuzz.cpp:3: not so: x == y\nb") == "fuzz.cpp:3: not so: x == y"
