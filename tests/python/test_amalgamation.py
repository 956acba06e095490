"""The pair of cellstep.h and cellstep.cpp, as a firmware project gets it, with each compiler and no option of ours."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_forecaster
from test_roads import make

import cellstep
from cellstep.runtime import Session

ROOT = Path(__file__).parents[2]
ZIG = [sys.executable, "-m", "ziglang"]
#: C++ and C compilers.
COMPILERS = {"gcc": (["g++"], ["gcc"]), "clang": (["clang++"], ["clang"]), "zig": ([*ZIG, "c++"], [*ZIG, "cc"])}
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
#: Without heap, exceptions and libraries there is little that a program can want of its linker.
ALLOWED = {"memcpy", "memset", "memcmp", "memmove", "bcmp", "strlen", "sqrtf", "_GLOBAL_OFFSET_TABLE_"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pair")
    subprocess.run([sys.executable, ROOT / "scripts/amalgamate.py", directory], check=True)
    assert sorted(path.name for path in directory.iterdir()) == ["cellstep.cpp", "cellstep.h"]
    return directory


def compiler(name):
    cxx, c = COMPILERS[name]
    if name == "zig":
        if subprocess.run([*ZIG, "version"], capture_output=True).returncode:
            pytest.skip("no ziglang in this environment")
    elif not shutil.which(cxx[0]) or not shutil.which(c[0]):
        pytest.skip(f"no {cxx[0]} on this machine")
    return cxx, c


def compiled(name, pair, directory, *options):
    """The object file of the pair."""
    cxx, _ = compiler(name)
    flags = ["-std=c++17", *WARNINGS[:2], "-Werror", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]
    command = [*cxx, *flags, *options, "-c", pair / "cellstep.cpp", "-o", directory / "cellstep.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory / "cellstep.o"


def program(name, pair, directory, *options):
    """A C program with it."""
    _, c = compiler(name)
    compiled(name, pair, directory, *options)
    source = Path(__file__).parent / "amalgamated.c"
    command = [*c, "-std=c11", *WARNINGS, "-I", pair, source, directory / "cellstep.o", "-o", directory / "program"]
    done = subprocess.run([*command, "-lm"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory / "program"


def outputs(program, path, x):
    done = subprocess.run([program, path], input=x.tobytes(), capture_output=True)
    assert done.returncode == 0, done.stderr
    return np.frombuffer(done.stdout, np.float32).reshape(len(x), -1)


@pytest.mark.parametrize("optimise", ["-O2", "-Os"])
@pytest.mark.parametrize("name", COMPILERS)
def test_its_numbers_are_the_librarys(name, optimise, pair, tmp_path):
    # That nothing else is fused than what is written so is up to the pair: no option here says it.
    runner = program(name, pair, tmp_path, optimise, "-mfma", "-mf16c")
    models = {row: make(row) for row in ("plain", "layer_norm", "proj_size", "a chain with all stages")}
    models["int8"] = cellstep.quantize(make("peephole"), "int8")
    models["forecaster"] = make_forecaster()
    for row, model in models.items():
        path = tmp_path / "model.cellstep"
        cellstep.export(model, path)
        session = Session(path)
        x = np.random.default_rng(0).standard_normal((20, session.input_size)).astype(np.float32)
        assert outputs(runner, path, x).tobytes() == session.run(x).tobytes(), row


@pytest.mark.parametrize("name", COMPILERS)
def test_it_wants_nothing_of_an_operating_system(name, pair, tmp_path):
    small = ["-DCELLSTEP_FLOAT32_ONLY", "-DCELLSTEP_PLAIN_ONLY", "-DCELLSTEP_NO_TEXTS"]
    for options in ([], small):
        found = compiled(name, pair, tmp_path, "-Os", *options)
        done = subprocess.run(["nm", "--undefined-only", "--format=posix", found], capture_output=True, text=True)
        assert done.returncode == 0
        assert {line.split()[0] for line in done.stdout.splitlines()} <= ALLOWED


def test_one_line_says_that_fast_math_is_not_for_it(pair, tmp_path):
    done = subprocess.run(
        ["g++", "-std=c++17", "-ffast-math", "-c", pair / "cellstep.cpp", "-o", tmp_path / "x.o"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "compile without -ffast-math" in done.stderr


def test_a_wrong_command_line_is_told_so():
    done = subprocess.run([sys.executable, ROOT / "scripts/amalgamate.py"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "usage: amalgamate.py DIRECTORY\n"
