"""Builds, tests and times the CUDA kernels on a machine with a GPU, within ten minutes.

    python scripts/cuda_check.py --large --tune --output OUT

The machine needs Python 3.10 with a CUDA build of torch 2.11 or later, nvcc, CMake and pybind11; everything else is
used where it is there. --wheels names a folder of wheels to take absent packages from (`pip download -d build/wheels
pytest numpy hypothesis flashrnn`), --libraries one with libcellstep_ops.so and libcellstep_ops_cuda.so that were built
elsewhere, with _runtime*.so and cuda_probe (of benchmarks/cuda_probe.cu), each of which is built where it is missing or
made for another Python: where the GPU is there for minutes, all that is to be done before.

Tests and sanitizers come first and run beside one another, as what they wait for is the processor; then the tables
alone. Each part has its own time, and one that fails, hangs or runs out of time stops no other. OUT holds what each
said (logs/), the tables (check.txt, and cuda-DEVICE.json, .md and .svg, as benchmarks/results/ keeps them) and
check.json: device, driver, versions, date, results. All of it is there at any time, should the whole be stopped. Exit
code 1: a part failed. 2: there is nothing to run on.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cuda-check"
#: All that is loaded: cellstep.nn and cellstep.ops need torch alone.
PACKAGE = BUILD / "python"
LIBRARIES = ("libcellstep_ops.so", "libcellstep_ops_cuda.so")
PROBE = BUILD / "cuda_probe"
EMULATION = "libcellstep_ops_emulated.so"
#: Seconds of all parts together: ten minutes of a GPU are to do.
LIMIT = 570.0
#: Of those, what is kept for the benchmark, without the rows of large recurrences and with them.
BENCHMARK, LARGE_BENCHMARK = 180.0, 260.0
#: Of those, what tests and sanitizers have at least, should a build have taken long.
TESTS = 150.0
#: Of those, what --tune takes.
TUNE = 70.0
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
#: Parts of tests/cuda/test_kernels_gpu.py, by pytest's -k: kernels whose blocks wait for one another hang if they fail,
#: and are to take no others with them.
OPERATORS = {
    "operators": "plain or rows or block or tensor",
    "the table's choice": "chosen",
    "cluster": "cluster and not cluster_float",
    "cluster_float": "cluster_float",
}


@dataclass
class Part:
    name: str
    seconds: float = 0.0
    passed: bool = False
    said: str = ""  #: one line


@dataclass
class Job:
    """A command that is to run as a part, within ``seconds``."""

    name: str
    seconds: float
    command: Sequence[Any]
    environment: dict[str, str] = field(default_factory=dict)
    nothing: int = 0  #: the exit code that says that there was nothing to do, if that passes


@dataclass
class Check:
    """The run: where it writes, what it found, and how long it may go on."""

    output: Path
    dry_run: bool
    limit: float
    reserve: float = 0.0  #: seconds kept for what comes last
    emulation: Path | None = None  #: of a dry run
    begin: float = field(default_factory=time.monotonic)
    parts: list[Part] = field(default_factory=list)

    def left(self) -> float:
        return self.limit - (time.monotonic() - self.begin)

    def run(self, name: str, seconds: float, command: Sequence[Any]) -> Part:
        return self.together([Job(name, seconds, command)])[0]

    def together(self, jobs: Sequence[Job]) -> list[Part]:
        """Runs jobs beside one another, as many at once as there are pairs of processors."""
        processors = os.cpu_count() or 1
        at_once = max(1, min(len(jobs), processors // 2))
        shared = {"OMP_NUM_THREADS": str(max(1, processors // at_once))} if at_once > 1 else {}
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(lambda job: self._do(job, shared), jobs))

    def _do(self, job: Job, shared: dict[str, str]) -> Part:
        """It has its seconds, or what is left of all; what it says goes to a file of its own."""
        part = Part(job.name)
        self.parts.append(part)
        allowed = min(job.seconds, self.left() - self.reserve)
        if allowed < 1:
            part.said = "left out: the time was over"
            return part
        print(f"{job.name} ...", file=sys.stderr, flush=True)
        begin = time.monotonic()
        log = self.output / "logs" / (re.sub(r"[^a-z0-9]+", "-", job.name.lower()) + ".log")
        with log.open("w") as file:
            file.write(f"=== {' '.join(map(str, job.command))}\n")
            file.flush()
            process = subprocess.Popen(
                list(map(str, job.command)),
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=self.environment() | shared | job.environment,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=allowed)
                part.said = "passed" if code in (0, job.nothing) else f"exit code {code}"
            except subprocess.TimeoutExpired:
                # The group: a sanitizer's child would hold the device.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code, part.said = -1, f"ran out of its {allowed:.0f} s"
        part.seconds = round(time.monotonic() - begin, 1)
        part.passed = code in (0, job.nothing)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][1:]
        if lines:
            part.said += f": {lines[-1].strip()[:160]}"
        print(f"{job.name}: {part.said} ({part.seconds} s)", file=sys.stderr, flush=True)
        return part

    def add(self, name: str, passed: bool, said: str) -> Part:
        part = Part(name, 0.0, passed, said)
        self.parts.append(part)
        return part

    def environment(self) -> dict[str, str]:
        path = [str(PACKAGE), str(BUILD / "packages"), os.environ.get("PYTHONPATH", "")]
        found = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONDONTWRITEBYTECODE": "1"}
        if PROBE.exists():
            found["CELLSTEP_CUDA_PROBE"] = str(PROBE)
        if self.emulation:
            found["CELLSTEP_EMULATED_LIBRARY"] = str(self.emulation)
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
    options = ["--no-index", "--find-links", wheels, "--target", BUILD / "packages", "--quiet"]
    install = [sys.executable, "-m", "pip", "install", *options]
    if there:
        check.run("wheels", 60, [*install, *there])
    # A peer of one row: what else it lacks takes nothing from the tests.
    if absent("flashrnn") and any(wheels.glob("flashrnn*.whl")):
        check.run("FlashRNN", 60, [*install, "flashrnn"])


def compile_targets(check: Check, folder: Path, options: dict[str, str], targets: Sequence[str]) -> bool:
    """Builds targets in a folder; whether that went well."""
    programs = {name: find(name) for name in ("cmake", *(["nvcc"] if "CUDA" in options else []))}
    if missing := [name for name, program in programs.items() if program is None]:
        return check.add(f"build {folder.name}", False, f"expected {', '.join(missing)}; not found").passed
    cmake = programs["cmake"]
    generator = ["-G", "Ninja"] if find("ninja") else []
    configure = [cmake, "-S", ROOT, "-B", folder, *generator, "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DCELLSTEP_BUILD_{name}={value}" for name, value in options.items()]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    if "nvcc" in programs:
        # Of the device that is here alone: seconds instead of minutes.
        configure += [f"-DCMAKE_CUDA_COMPILER={programs['nvcc']}", f"-DCMAKE_CUDA_ARCHITECTURES={architecture()}"]
    configure += [f"-Dpybind11_DIR={said_by(sys.executable, '-m', 'pybind11', '--cmakedir')}"]
    if not check.run(f"configure {folder.name}", 60, configure).passed:
        return False
    command = [cmake, "--build", folder, "--parallel", os.cpu_count() or 1, "--target", *targets]
    return check.run(f"build {folder.name}", 1800 if check.dry_run else 240, command).passed


def build(check: Check, libraries: Path | None) -> bool:
    """The libraries and the Python sources under build/cuda-check; whether they are there."""
    if libraries is None:
        options = {"PYTHON": "ON", "TOOLS": "OFF", "CUDA": "ON", "CUDA_EMULATED": "ON" if check.dry_run else "OFF"}
        targets = ["cellstep_ops", "cellstep_ops_cuda", "cellstep_python"]
        if check.dry_run:
            targets.append("cellstep_ops_emulated")
        libraries = BUILD / "libraries"
        if not compile_targets(check, libraries, options, targets):
            return False
    shutil.rmtree(PACKAGE, ignore_errors=True)
    PROBE.unlink(missing_ok=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "lib")
    shutil.copytree(ROOT / "python" / "cellstep", PACKAGE / "cellstep", ignore=ignore)
    (PACKAGE / "cellstep" / "lib").mkdir()
    for name in LIBRARIES:
        found = next(libraries.rglob(name), None)
        if found is None:
            return check.add("libraries", False, f"expected {name} in '{libraries}'; got none").passed
        shutil.copy2(found, PACKAGE / "cellstep" / "lib" / name)
    # It belongs to one version of Python, which may be another where the libraries were built.
    name = f"_runtime{sysconfig.get_config_var('EXT_SUFFIX')}"
    module = next(libraries.rglob(name), None)
    if module is None:
        options = {"PYTHON": "ON", "TOOLS": "OFF", "OPS": "OFF"}
        if not compile_targets(check, BUILD / "module", options, ["cellstep_python"]):
            return False
        module = next((BUILD / "module").rglob(name))
    shutil.copy2(module, PACKAGE / "cellstep" / name)
    if check.dry_run:
        check.emulation = next(libraries.rglob(EMULATION), None)
        if check.emulation is None:
            return check.add("libraries", False, f"expected {EMULATION} in '{libraries}'; got none").passed
    if probe := next((path for path in libraries.rglob("cuda_probe") if path.is_file()), None):
        shutil.copy2(probe, PROBE)
    return True


def architecture() -> str:
    """Of the device, as CMake names it."""
    import torch

    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return f"{major}{minor}{'a' if major == 9 else ''}-real"


def tests(check: Check) -> list[Job]:
    """At operator level, then what the Python tests have of CUDA."""
    if absent("pytest"):
        check.add("tests", False, "pytest is not installed; --wheels takes it from a folder")
        return []
    # A test that hangs ends its part, which says which one it was, and not the whole of its time.
    pytest = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--maxfail=20", "-rs", "--no-header"]
    # Versions of torch and pytest differ in what they warn of, which is no failure of a kernel.
    pytest += ["-W", "default"]
    pytest += ["-o", f"faulthandler_timeout={180 if check.dry_run else 60}", "-o", "faulthandler_exit_on_timeout=true"]
    where, seconds = ("emulated", 600.0) if check.dry_run else ("not emulated", 180.0)
    jobs = [
        Job(name, seconds, [*pytest, "-k", f"{where} and ({which})", "tests/cuda/test_kernels_gpu.py"])
        for name, which in OPERATORS.items()
    ]
    modules = ROOT / "tests" / "python" / "test_cuda.py"
    if not modules.exists():
        check.add("modules", False, "expected tests/python/test_cuda.py; there is none")
    elif missing := absent("numpy", "hypothesis"):
        check.add("modules", False, f"{', '.join(missing)} not installed; --wheels takes them from a folder")
    else:
        # Without a device pytest finds no test to run, and says so.
        jobs.append(Job("modules", 150, [*pytest, modules], nothing=5 if check.dry_run else 0))
    return jobs


def sanitizers(check: Check) -> list[Job]:
    """compute-sanitizer's tools over every kernel, with memory from the driver itself so that each end is watched."""
    program = find("compute-sanitizer")
    script = [sys.executable, "tests/cuda/sanitize.py"]
    if check.dry_run:
        return [Job("every kernel", 300, [*script, "emulated"])]
    if program is None:
        check.add("compute-sanitizer", False, "is not installed")
        return [Job("every kernel", 90, script)]
    jobs = []
    for tool in SANITIZERS:
        options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        if tool == "initcheck":
            # What torch itself leaves unwritten is none of ours, but what it writes has to be seen.
            options += ["--track-unused-memory", "no"]
        else:
            options += ["--kernel-name", "kernel_substring=cellstep"]
        if tool == "memcheck":
            # Questions that the driver answers with an error are no finding; a launch that fails ends the script.
            options += ["--report-api-errors", "no"]
        jobs.append(Job(tool, 180, [program, *options, *script], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    return jobs


def benchmark(check: Check, options: Sequence[str], device: str) -> Path:
    """The tables, as benchmarks/cuda.py prints them; where they lie."""
    check.reserve = 0.0
    allowed = max(30.0, check.left() - 5)
    tune = min(TUNE, allowed / 4) if "--tune" in options else 0.0
    # Beside the rows and --tune: rates and barriers, for which the probe is compiled, and a last row that runs over.
    seconds = max(20.0, allowed - 50 - tune)
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    output = check.output / f"cuda-{name}.json"
    command = [sys.executable, "benchmarks/cuda.py", "--output", output]
    command += (
        ["--dry-run"]
        if check.dry_run
        else ["--seconds", f"{seconds:.0f}", "--compile-seconds", "40", "--tune-seconds", f"{tune:.0f}"]
    )
    check.run("benchmark", 900 if check.dry_run else allowed, [*command, *options])
    return output.with_suffix(".md")


def write(check: Check, about: dict[str, Any], tables: Path | None) -> str:
    """What is known so far, as JSON and as text; the text."""
    failed = [part for part in check.parts if not part.passed]
    seconds = round(time.monotonic() - check.begin, 1)
    found = {"machine": about, "seconds": seconds, "parts": [asdict(part) for part in check.parts]}
    (check.output / "check.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [f"{name}: {value}" for name, value in about.items()]
    lines += ["", *(f"{'passed' if p.passed else 'FAILED'}  {p.name}, {p.seconds} s: {p.said}" for p in check.parts)]
    lines += ["", f"{len(check.parts)} parts in {seconds} s; failed: {', '.join(p.name for p in failed) or 'none'}"]
    if tables is not None and tables.exists():
        lines += ["", tables.read_text()]
    text = "\n".join(lines)
    (check.output / "check.txt").write_text(text + "\n")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "cuda-check" / "out", help="where results go")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels for packages that are absent")
    parser.add_argument("--libraries", type=Path, help="a folder with both libraries, instead of building them")
    parser.add_argument("--limit", type=float, help=f"seconds of everything; {LIMIT:.0f}, or none of a dry run")
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

    shutil.rmtree(arguments.output / "logs", ignore_errors=True)
    (arguments.output / "logs").mkdir(parents=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    only = arguments.only or ["tests", "sanitize", "benchmark"]
    reserve = (LARGE_BENCHMARK if arguments.large or arguments.tune else BENCHMARK) if "benchmark" in only else 0.0
    limit = arguments.limit or (7200.0 if arguments.dry_run else LIMIT)
    check = Check(arguments.output.resolve(), arguments.dry_run, limit, reserve)
    if arguments.wheels:
        install_wheels(check, arguments.wheels.resolve())
    tables = None
    if build(check, arguments.libraries.resolve() if arguments.libraries else None):
        kinds: dict[str, Callable[[Check], list[Job]]] = {"tests": tests, "sanitize": sanitizers}
        jobs = [job for name, jobs_of in kinds.items() if name in only for job in jobs_of(check)]
        if jobs:
            check.reserve = min(check.reserve, max(check.left() - TESTS, 0.0))
            check.together(jobs)
            write(check, about, None)
        if "benchmark" in only:
            more = [f"--{name}" for name in ("large", "tune") if getattr(arguments, name)]
            tables = benchmark(check, more, about.get("device", "dry run"))
    print(write(check, about, tables))
    return 0 if all(part.passed for part in check.parts) else 1


if __name__ == "__main__":
    sys.exit(main())
