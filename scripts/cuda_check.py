"""Builds, tests and times the CUDA kernels on a machine with a GPU, within ten minutes.

    python scripts/cuda_check.py --output OUT

The machine needs Python 3.10 with a CUDA build of torch 2.11 or later, nvcc, CMake and pybind11; everything else is
used where it is there. --wheels names a folder of wheels to take absent packages from (`pip download -d build/wheels
pytest numpy hypothesis`), --libraries one with libcellstep_ops.so, libcellstep_ops_cuda.so and _runtime*.so that were
built elsewhere.

Parts run one after another, each within its own time, and one that fails or runs out of time stops no other; the tables
come last. OUT holds what they said (check.log), the tables (check.txt, benchmark.*) and check.json: device, driver,
versions, date, results. Exit code 1: a part failed. 2: there is nothing to run on.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cuda-check"
#: All that is loaded: cellstep.nn and cellstep.ops need torch alone.
PACKAGE = BUILD / "python"
LIBRARIES = ("libcellstep_ops.so", "libcellstep_ops_cuda.so")
EMULATION = "libcellstep_ops_emulated.so"
#: Seconds of all parts together: ten minutes of a GPU are to do.
LIMIT = 570.0
#: Of those, what is kept for the benchmark, and at most what it may take.
BENCHMARK = (180.0, 240.0)
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


@dataclass
class Part:
    name: str
    seconds: float = 0.0
    passed: bool = False
    said: str = ""  #: one line


@dataclass
class Check:
    """The run: where it writes, what it found, and how long it may go on."""

    output: Path
    dry_run: bool
    limit: float
    reserve: float = 0.0  #: seconds kept for what comes last
    begin: float = field(default_factory=time.monotonic)
    parts: list[Part] = field(default_factory=list)

    def left(self) -> float:
        return self.limit - (time.monotonic() - self.begin)

    def run(self, name: str, seconds: float, command: Sequence[Any], **environment: str) -> Part:
        """A command as a part: it has ``seconds``, or what is left of all; what it says goes to check.log."""
        part = Part(name)
        self.parts.append(part)
        allowed = min(seconds, self.left() - self.reserve)
        if allowed < 1:
            part.said = "left out: the time was over"
            return part
        print(f"{name} ...", file=sys.stderr, flush=True)
        begin = time.monotonic()
        log = self.output / "check.log"
        with log.open("a") as file:
            start = file.tell()
            file.write(f"\n=== {name}: {' '.join(map(str, command))}\n")
            file.flush()
            process = subprocess.Popen(
                list(map(str, command)),
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=self.environment() | environment,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=allowed)
                part.said = "passed" if code == 0 else f"exit code {code}"
            except subprocess.TimeoutExpired:
                # The group: a sanitizer's child would hold the device.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code, part.said = -1, f"ran out of its {allowed:.0f} s"
        part.seconds = round(time.monotonic() - begin, 1)
        part.passed = code == 0
        said = log.read_bytes()[start:].decode(errors="replace")
        lines = [line for line in said.splitlines() if line.strip()][1:]
        if lines:
            part.said += f": {lines[-1].strip()[:160]}"
        print(f"{name}: {part.said} ({part.seconds} s)", file=sys.stderr, flush=True)
        return part

    def add(self, name: str, passed: bool, said: str) -> Part:
        part = Part(name, 0.0, passed, said)
        self.parts.append(part)
        return part

    def environment(self) -> dict[str, str]:
        path = [str(PACKAGE), str(BUILD / "packages"), os.environ.get("PYTHONPATH", "")]
        found = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONDONTWRITEBYTECODE": "1"}
        if self.dry_run:
            found["CELLSTEP_EMULATED_LIBRARY"] = str(BUILD / "cmake" / "tests" / "cuda" / EMULATION)
        return found


def find(program: str) -> str | None:
    """On the path, or where CUDA puts it."""
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    return shutil.which(program) or next(
        (found for place in places if place and (found := shutil.which(f"{place}/bin/{program}"))), None
    )


def said_by(*command: str) -> str:
    program = find(command[0])
    if program is None:
        return ""
    try:
        return subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=60).stdout.strip()
    except subprocess.TimeoutExpired:
        return ""


def describe() -> dict[str, Any]:
    """Device, driver, versions and date. ImportError without torch."""
    import torch

    about: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "driver": said_by("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "nvcc": (said_by("nvcc", "--version").splitlines() or [""])[-1],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "commit": said_by("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
    }
    if torch.cuda.is_available():
        about |= {"device": torch.cuda.get_device_name(0), "cudnn": torch.backends.cudnn.version()}
    return about


def absent(*packages: str) -> list[str]:
    import importlib.util

    sys.path.insert(0, str(BUILD / "packages"))
    return [package for package in packages if importlib.util.find_spec(package) is None]


def install_wheels(check: Check, wheels: Path) -> None:
    """Absent packages out of a folder, beside the environment and not into it."""
    wanted = absent("pytest", "numpy", "hypothesis", "rich", "typer", "safetensors")
    there = [name for name in wanted if any(path.name.lower().startswith(name) for path in wheels.glob("*.whl"))]
    if there:
        options = ["--no-index", "--find-links", wheels, "--target", BUILD / "packages", "--quiet"]
        check.run("wheels", 60, [sys.executable, "-m", "pip", "install", *options, *there])


def build(check: Check, libraries: Path | None) -> bool:
    """The libraries and the Python sources under build/cuda-check; whether they are there."""
    if libraries is None:
        cmake = find("cmake")
        if cmake is None or find("nvcc") is None:
            return check.add("build", False, "expected cmake and nvcc; found one of them or none").passed
        generator = ["-G", "Ninja"] if find("ninja") else []
        configure = [cmake, "-S", ROOT, "-B", BUILD / "cmake", *generator, "-DCMAKE_BUILD_TYPE=Release"]
        options = {"PYTHON": "ON", "TOOLS": "OFF", "CUDA": "ON", "CUDA_EMULATED": "ON" if check.dry_run else "OFF"}
        configure += [f"-DCELLSTEP_BUILD_{name}={value}" for name, value in options.items()]
        # Of the device that is here alone: seconds instead of minutes.
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CUDA_COMPILER={find('nvcc')}"]
        configure += [f"-DCMAKE_CUDA_ARCHITECTURES={architecture()}"]
        configure += [f"-Dpybind11_DIR={said_by(sys.executable, '-m', 'pybind11', '--cmakedir')}"]
        if not check.run("configure", 60, configure).passed:
            return False
        targets = ["cellstep_ops", "cellstep_ops_cuda", "cellstep_python"]
        if check.dry_run:
            targets.append("cellstep_ops_emulated")
        command = [cmake, "--build", BUILD / "cmake", "--parallel", os.cpu_count() or 1, "--target", *targets]
        if not check.run("build", 600 if check.dry_run else 240, command).passed:
            return False
        libraries = BUILD / "cmake"
    shutil.rmtree(PACKAGE, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "lib")
    shutil.copytree(ROOT / "python" / "cellstep", PACKAGE / "cellstep", ignore=ignore)
    (PACKAGE / "cellstep" / "lib").mkdir()
    for name in LIBRARIES:
        found = next(libraries.rglob(name), None)
        if found is None:
            return check.add("libraries", False, f"expected {name} in '{libraries}'; got none").passed
        shutil.copy2(found, PACKAGE / "cellstep" / "lib" / name)
    module = next(libraries.rglob("_runtime*.so"), None)
    if module is None:
        return check.add("libraries", False, f"expected the module _runtime in '{libraries}'; got none").passed
    shutil.copy2(module, PACKAGE / "cellstep" / module.name)
    return True


def architecture() -> str:
    """Of the device, as CMake names it."""
    import torch

    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return f"{major}{minor}{'a' if major == 9 else ''}-real"


def run_tests(check: Check) -> None:
    """At operator level, then what the Python tests have of CUDA; without pytest the operators' problems alone."""
    if absent("pytest"):
        check.add("tests", False, "pytest is not installed; --wheels takes it from a folder")
        return
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=20", "-rs"]
    only = ["-k", "emulated"] if check.dry_run else ["-k", "not emulated"]
    check.run("operators", 150, [*pytest, *only, "tests/cuda/test_kernels_gpu.py"])
    modules = ROOT / "tests" / "python" / "test_cuda.py"
    if not modules.exists():
        check.add("modules", False, "expected tests/python/test_cuda.py; there is none")
    elif missing := absent("numpy", "hypothesis"):
        check.add("modules", False, f"{', '.join(missing)} not installed; --wheels takes them from a folder")
    else:
        check.run("modules", 90, [*pytest, modules])


def sanitize(check: Check) -> None:
    """compute-sanitizer's tools over every kernel, with memory from the driver itself so that each end is watched."""
    program = find("compute-sanitizer")
    script = [sys.executable, "tests/cuda/sanitize.py"]
    if check.dry_run:
        check.run("every kernel", 120, [*script, "emulated"])
        return
    check.run("every kernel", 60, script)
    if program is None:
        check.add("compute-sanitizer", False, "is not installed")
        return
    for tool in SANITIZERS:
        options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        if tool == "initcheck":
            # What torch itself leaves unwritten is none of ours, but what it writes has to be seen.
            options += ["--track-unused-memory", "no"]
        else:
            options += ["--kernel-name", "kernel_substring=cellstep"]
        check.run(tool, 60, [program, *options, *script], PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def benchmark(check: Check, options: Sequence[str]) -> str:
    """The tables, as benchmarks/cuda.py prints them."""
    check.reserve = 0.0
    allowed = min(BENCHMARK[1], check.left() - 5)
    seconds = max(30.0, allowed - 60 - (40 if "--tune" in options else 0))
    command = [sys.executable, "benchmarks/cuda.py", "--output", check.output / "benchmark.json"]
    command += (
        ["--dry-run"]
        if check.dry_run
        else ["--seconds", f"{seconds:.0f}", "--compile-seconds", "40", "--tune-seconds", "40"]
    )
    check.run("benchmark", allowed, [*command, *options])
    tables = check.output / "benchmark.md"
    return tables.read_text() if tables.exists() else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "cuda-check" / "out", help="where results go")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels for packages that are absent")
    parser.add_argument("--libraries", type=Path, help="a folder with both libraries, instead of building them")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of everything")
    parser.add_argument("--only", action="append", choices=["tests", "sanitize", "benchmark"], help="may be repeated")
    parser.add_argument("--large", action="store_true", help="the rows of large recurrences too")
    parser.add_argument("--tune", action="store_true", help="where each kernel is the fastest")
    parser.add_argument("--dry-run", action="store_true", help="on the emulation and the processor, to try the script")
    arguments = parser.parse_args()
    try:
        about = describe()
    except ImportError:
        print("error: expected torch for this Python; it is not installed; run another python", file=sys.stderr)
        return 2
    if "device" not in about and not arguments.dry_run:
        print(
            "error: expected a CUDA device; torch finds none; --dry-run tries the script without one", file=sys.stderr
        )
        return 2

    arguments.output.mkdir(parents=True, exist_ok=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    only = arguments.only or ["tests", "sanitize", "benchmark"]
    reserve = BENCHMARK[0] if "benchmark" in only else 0.0
    check = Check(arguments.output.resolve(), arguments.dry_run, arguments.limit, reserve)
    (check.output / "check.log").unlink(missing_ok=True)
    if arguments.wheels:
        install_wheels(check, arguments.wheels.resolve())
    tables = ""
    if build(check, arguments.libraries.resolve() if arguments.libraries else None):
        more = [f"--{name}" for name in ("large", "tune") if getattr(arguments, name)]
        steps: dict[str, Callable[[], object]] = {
            "tests": lambda: run_tests(check),
            "sanitize": lambda: sanitize(check),
        }
        for name, step in steps.items():
            if name in only:
                step()
        if "benchmark" in only:
            tables = benchmark(check, more)
    failed = [part for part in check.parts if not part.passed]
    seconds = round(time.monotonic() - check.begin, 1)
    found = {"machine": about, "seconds": seconds, "parts": [asdict(part) for part in check.parts]}
    (check.output / "check.json").write_text(json.dumps(found, indent=1) + "\n")
    summary = [f"{name}: {value}" for name, value in about.items()]
    summary += ["", *(f"{'passed' if p.passed else 'FAILED'}  {p.name}, {p.seconds} s: {p.said}" for p in check.parts)]
    summary += ["", f"{len(check.parts)} parts in {seconds} s; failed: {', '.join(p.name for p in failed) or 'none'}"]
    text = "\n".join([*summary, "", tables]) if tables else "\n".join(summary)
    (check.output / "check.txt").write_text(text + "\n")
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
