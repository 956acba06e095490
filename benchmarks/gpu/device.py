"""The device: what it is, and what it can do, measured."""

import json
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.rows import Rates
from benchmarks.gpu.timing import Clock, median
from benchmarks.gpu.ways import DTYPES, precision

PROBE = Path(__file__).parents[1] / "cuda_probe.cu"


def describe(device: torch.device) -> dict[str, Any]:
    """Name, size, driver and versions."""
    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    for package in ("cellstep", "flashrnn", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    if device.type != "cuda":
        return {"device": "none: a dry run on the processor", "capability": [9, 0], "multiprocessors": 132} | {
            "memory_gib": 0.0,
            "driver": "",
            "versions": versions,
        }
    said = torch.cuda.get_device_properties(device)
    versions |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    return {
        "device": said.name,
        "capability": [said.major, said.minor],
        "multiprocessors": said.multi_processor_count,
        "memory_gib": round(said.total_memory / 2**30, 1),
        "driver": _ask("driver_version"),
        "clocks": _ask("clocks.sm,clocks.mem,clocks.max.sm"),
        "versions": versions,
    }


def _ask(query: str) -> str:
    """What nvidia-smi says; "" where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()


def run_probe(capability: list[int]) -> dict[str, float] | str:
    """The figures of cuda_probe.cu, or why there are none. CELLSTEP_CUDA_PROBE names one that was compiled before."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            program = os.environ.get("CELLSTEP_CUDA_PROBE") or _compile_probe(capability, f"{directory}/probe")
            done = subprocess.run([program], capture_output=True, text=True, timeout=30)
        except (OSError, RuntimeError) as error:
            return str(error)
        except subprocess.TimeoutExpired as error:
            return f"{Path(error.cmd[0]).name} did not end within {error.timeout:.0f} seconds"
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr.strip() or "cuda_probe failed"


def _compile_probe(capability: list[int], program: str) -> str:
    compiler = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if compiler is None:
        raise RuntimeError("no nvcc to build cuda_probe.cu with")
    architecture = "".join(map(str, capability))
    options = ["-std=c++17", "-O3", f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    built = subprocess.run([compiler, *options, PROBE, "-o", program], capture_output=True, text=True, timeout=60)
    if built.returncode:
        raise RuntimeError(f"nvcc refuses cuda_probe.cu: {built.stderr.strip()[-300:]}")
    return program


def measure_rates(about: dict[str, Any], device: torch.device, clock: Clock) -> tuple[Rates, dict[str, Any]]:
    """Rates of the device and everything that the probe said."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 64
    flops = {}
    for dtype in ("float32", "TF32", "float16", "bfloat16"):
        a = torch.randn(size, size, device=device).to(DTYPES[dtype])
        with precision(dtype):
            for _ in range(3):
                a @ a
            flops[dtype] = 2.0 * size**3 / (median(clock.blocks(lambda a=a: a @ a, 1, 7 if cuda else 3)) * 1e-6)
    source = torch.empty(2**30 if cuda else 2**16, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    copied = median(clock.blocks(lambda: target.copy_(source), 1, 9))
    bandwidth = 2.0 * source.numel() / (copied * 1e-6)
    probe = run_probe(about["capability"]) if cuda else "a dry run"
    if isinstance(probe, str):
        return Rates(about["multiprocessors"], flops, bandwidth, source=f"assumed, as of an H100: {probe}"), {}
    rates = Rates(
        about["multiprocessors"],
        flops,
        bandwidth,
        probe["launch_us"],
        probe["warp_step_us"],
        probe["block_step_us"],
        probe["block_256_us"],
        probe.get("cluster_16_us", probe.get("cluster_8_us")),
        probe.get("grid_us"),
        "probe",
    )
    return rates, probe
