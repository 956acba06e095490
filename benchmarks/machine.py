"""The machine: what it is, what it can do, and the versions of what runs on it."""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rows import Rates

PACKAGES = ["cellstep", "torch", "onnxruntime", "onnx", "openvino", "numpy"]


def measure_rates(source: Path, directory: Path, milliseconds: int) -> tuple[Rates, str]:
    """Compile and run rates.cpp for one and two threads; the rates, and the vectors that they are of.

    Raises:
        RuntimeError: there is no compiler, or it refuses.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / "rates"
    options = ["-std=c++17", "-O3", "-ffp-contract=fast", "-pthread", str(source), "-o", str(program)]
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(f"expected a C++ compiler to measure the machine's rates; {compiler[0]!r} is none; set CXX")
    done = subprocess.run([*compiler, "-march=native", *options], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"expected {compiler[0]} to compile {source}; it says: {done.stderr.strip()[-500:]}")
    threads = min(2, os.cpu_count() or 1)
    said = json.loads(
        subprocess.run([program, str(threads), str(milliseconds)], capture_output=True, check=True).stdout
    )
    bandwidth = [(int(size), float(rate)) for size, rate in said["bandwidth"]]
    return Rates([float(rate) for rate in said["flops"]], bandwidth), said["vectors"]


def processor() -> str:
    """The name of the processor, as the system gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    named = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return re.sub(r"\(R\)|\(TM\)|CPU\s", "", named[1]).strip() if named else platform.machine()


def describe() -> dict[str, Any]:
    """Processor, cores, cellstep's instruction set, processes that ran before, system, and versions.

    A version is "not installed" where a peer is not.
    """
    from cellstep.runtime import instruction_set

    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "instruction_set": instruction_set(),
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def file_name(about: dict[str, Any]) -> str:
    """The machine as part of a file's name."""
    text = f"{about['processor']} {about['cores']} {about['instruction_set']}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
