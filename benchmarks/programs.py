"""Rows that other programs time: the torch-free session through its C API, cellstep-run and cellstep-embed."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import ours
from cases import Case
from rows import RTNEURAL, RTNEURAL_STACK_US, RTNEURAL_US, Result, Row, Timing
from timing import Effort

import cellstep


def find(program: str, directory: str) -> str:
    """The path of a program: in ``directory`` if one is given, beside the interpreter, or where the system looks.

    Raises:
        FileNotFoundError: it is nowhere.
    """
    places = [directory] if directory else [str(Path(sys.executable).parent), None]
    for place in places:
        if found := shutil.which(program, path=place):
            return found
    raise FileNotFoundError(f"{program} is not built; install cellstep, or say where it is with --programs")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """A program's output. RuntimeError with its last line if it fails, or if there is none."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not installed") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(said[-1] if said else f"{command[0]} ended with {done.returncode}")
    return done


def build_runtime(source: Path, directory: Path) -> Path:
    """Configure and build benchmarks/runtime.cpp, which takes no time the second time; the path of the program."""
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DCELLSTEP_BUILD_BENCHMARKS=ON"]
    without = [f"-DCELLSTEP_BUILD_{part}=OFF" for part in ("OPS", "TOOLS", "PYTHON")]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run("cmake", "-S", source, "-B", directory, *generator, *options, *without)
    run("cmake", "--build", directory, "--target", "cellstep_benchmark_runtime")
    return directory / "benchmarks" / "cellstep_benchmark_runtime"


def measure(row: Row, places: Mapping[str, str], effort: Effort) -> Result:
    """Run the row's program on the row's model and check what it answers."""
    with tempfile.TemporaryDirectory() as directory:
        if row.section == "runtime":
            program = build_runtime(Path(places["source"]), Path(places["build"]))
            return _runtime(row, program, Path(directory), effort)
        return _program(row, places["directory"], Path(directory))


def _runtime(row: Row, program: Path, directory: Path, effort: Effort) -> Result:
    case = Case(replace(row, time=64))
    path, inputs, outputs = (directory / name for name in ("model.cellstep", "x.f32", "y.f32"))
    cellstep.export(ours.chain(case), path)
    case.x.numpy().astype("<f4").tofile(inputs)
    said = json.loads(run(program, path, inputs, outputs, round(effort.seconds * 1000)).stdout)
    case.check(np.fromfile(outputs, "<f4").reshape(case.truth.shape).astype(np.float64), "float32")

    result = Result(row.name, way="cellstep runtime")
    for name, key in (("cellstep runtime", "step"), ("cellstep runtime, run", "run")):
        us = {what: value * 1e-3 for what, value in said[key].items()}
        result.timings[name] = Timing(us["median"], us["p99"], us["p999"], us["first"], said[key]["calls"])
    figures = RTNEURAL_US if row.layers == 1 else RTNEURAL_STACK_US
    if row.hidden in figures:
        result.ratios[RTNEURAL] = figures[row.hidden] / result.timings["cellstep runtime"].median
    return result


_LATENCY = re.compile(
    r"over (?P<calls>\d+) calls: first (?P<first>[\d.]+), median (?P<median>[\d.]+), "
    r"99% (?P<p99>[\d.]+), 99\.9% (?P<p999>[\d.]+)"
)


def read_latency(text: str) -> Timing:
    """What cellstep-run and cellstep-embed print after --repeat."""
    found = _LATENCY.search(text)
    if found is None:
        raise RuntimeError(f"expected a line of latencies; got {text.strip()!r}")
    values = {name: float(value) for name, value in found.groupdict().items()}
    return Timing(values["median"], values["p99"], values["p999"], values["first"], int(values["calls"]))


def _program(row: Row, place: str, directory: Path) -> Result:
    case = Case(row)
    name = row.name.rsplit(", ", 1)[1]
    command = find(name, place)
    path = directory / ("model.pt" if name == "cellstep-run" else "model.cellstep")
    cellstep.export(ours.chain(case, "last"), path)
    table = directory / "x.csv"
    header = ",".join(f"x{column}" for column in range(row.inputs))
    np.savetxt(table, case.x[0].numpy(), "%.9g", ",", header=header, comments="")
    # A step is one of a stream, which carries its state; the first one starts from zero as a window does.
    kind = ["--stream"] if name == "cellstep-run" else ["--window", row.time]
    done = run(command, path, table, *kind, "--repeat", 20000)
    answer = [float(cell) for cell in list(csv.reader(io.StringIO(done.stdout)))[-1][1:]]
    case.truth = case.truth[:, -1:]
    case.check(np.reshape(answer, case.truth.shape), "float32")
    return Result(row.name, way=name, timings={name: read_latency(done.stderr)})
