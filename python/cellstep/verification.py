"""Proof by running: every artifact over the same windows, beside the model it came from."""

import copy
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cellstep.artifact import load
from cellstep.nn import Chain
from cellstep.quantization import TOLERANCES
from cellstep.table import read_cells
from cellstep.train.data import load_series, load_task, sample_path

Float32Array = NDArray[np.float32]

#: Programs and what they run.
_PROGRAMS = {".pt": "cellstep-run", ".pt2": "cellstep-run", ".cellstep": "cellstep-embed"}
_RUN_BY = {".cellstep": "Session", ".h": "Session", ".onnx": "onnxruntime", ".pte": "ExecuTorch"}
_TIMED_CALLS = 200
_LARGEST_SET = 512
#: What rounding a few times on the way to an output can come to.
_ROUNDING_ULPS = 4


@dataclass
class Row:
    """How far one way of running the model is from the reference."""

    name: str
    artifact: str
    weights: str = "float32"  #: how the weights of LSTM layers are stored
    difference: float = 0.0  #: largest, in the output's unit
    relative: float = 0.0  #: the same over the range of the reference's outputs
    ulps: int = 0  #: largest distance in float32 units in the last place
    bits: str = ""  #: a digest of all output bytes: equal where the outputs are equal to the bit
    latency: float | None = None  #: median of one window, microseconds
    problem: str = ""  #: why it did not run, if it did not


@dataclass
class Report:
    """The agreement table. ``span`` is the range of the reference's outputs, in their unit; ``tolerance`` that of
    full weights, see :meth:`allowed` for others."""

    rows: list[Row]
    windows: int
    span: float
    tolerance: float

    def allowed(self, row: Row) -> float:
        """Largest relative difference that passes: for narrow weights at least :data:`quantization.TOLERANCES`."""
        return max(self.tolerance, TOLERANCES.get(row.weights, 0.0))

    @property
    def failures(self) -> list[Row]:
        """Rows past the tolerance, or that did not run.

        A large offset on a small range leaves float32 too few digits for any tolerance on the range: a difference of
        a few units in the last place passes all the same.
        """
        return [
            row
            for row in self.rows
            if row.problem or not (row.relative <= self.allowed(row) or row.ulps <= _ROUNDING_ULPS)
        ]


def verify(
    model: Chain,
    artifacts: Iterable[str | os.PathLike[str]],
    windows: NDArray[Any] | None = None,
    tolerance: float = 2e-6,
    *,
    compiled: bool = False,
) -> Report:
    """Run a float32 model and its artifacts over the same windows.

    The reference is the eager model on torch's own operators, whose kernels are not ours.

    Args:
        artifacts: paths of files that :func:`cellstep.load` reads.
        windows: (N, T, input_size); by default those of :func:`test_windows`.
        tolerance: largest difference allowed, relative to the range of the reference's outputs. Artifacts of narrow
            weights may differ more: see :data:`cellstep.quantization.TOLERANCES`.
        compiled: run the model under ``torch.compile`` as well, which calls the C++ compiler of the machine.

    Raises:
        OSError, ValueError: an artifact cannot be loaded, or is of another model's sizes.
    """
    x = np.ascontiguousarray(test_windows(model) if windows is None else windows, np.float32)
    if x.ndim != 3 or x.shape[2] != model.input_size or 0 in x.shape:
        raise ValueError(f"expected windows of shape (N, T, {model.input_size}); got {x.shape}; check the features")
    ours = copy.deepcopy(model).float().eval()
    reference = ours.reference()

    truth = _eager(reference)(x)
    span = float(np.ptp(truth)) or float(np.abs(truth).max()) or 1.0
    report = Report([], len(x), span, tolerance)

    def add(name: str, artifact: str, run: Callable[[Float32Array], Float32Array], weights: str = "float32") -> None:
        y = run(x)
        one = x[:1]
        times = []
        for _ in range(_TIMED_CALLS):
            begin = time.perf_counter()
            run(one)
            times.append(time.perf_counter() - begin)
        report.rows.append(
            _compare(Row(name, artifact, weights, latency=float(np.median(times)) * 1e6), y, truth, span)
        )

    add("eager, torch kernels", "-", _eager(reference))
    add("eager, cellstep", "-", _eager(ours))
    if compiled:
        add("torch.compile", "-", _eager(torch.compile(ours, fullgraph=True, dynamic=True)))
    for path in artifacts:
        artifact = load(path)
        if (artifact.input_size, artifact.output_size) != (model.input_size, model.output_size):
            raise ValueError(
                f"expected artifacts of {model.input_size} inputs and {model.output_size} outputs like the model; "
                f"'{artifact.path}' has {artifact.input_size} and {artifact.output_size}; name one model's artifacts"
            )
        label = Path(artifact.path).name
        suffix = Path(artifact.path).suffix
        add(_RUN_BY.get(suffix, "Python"), label, artifact, artifact.weights)
        if suffix in _PROGRAMS:
            row = Row(_PROGRAMS[suffix], label, artifact.weights)
            report.rows.append(_run_program(row, artifact.path, artifact.feature_names, x, truth, span))
    return report


def test_windows(model: Chain, data: str | os.PathLike[str] | None = None) -> Float32Array:
    """(N, T, input_size) windows to compare on, evenly spaced, at most 512.

    They are cut from ``data``, or by default from the test days of the sample series if the model was trained on its
    columns. Any other model gets noise of the mean and deviation that its scaling says.
    """
    length = model.window or 32
    if data is None and not set(model.feature_names) <= set(read_cells(sample_path).header) | {""}:
        data_names: list[str] = []
    else:
        data_names = model.feature_names
    if not data_names:
        if data is not None:
            raise ValueError("expected a model with feature names to read a CSV file for; this one has none")
        noise = torch.randn(64, length, model.input_size, generator=torch.Generator().manual_seed(0))
        spread = torch.where(model.input_scale == 0, 1.0, 1.0 / model.input_scale)
        return (model.input_offset + noise * spread).detach().float().numpy()
    series = load_series(data or sample_path)
    if data is None:
        target = model.output_names[0] if model.output_names else model.feature_names[0]
        task = load_task(series, target, model.feature_names, length, model.horizon or 1)
        x = task.inputs(task.test)
    else:
        values = read_cells(data).numbers(model.feature_names)
        if len(values) < length:
            raise ValueError(f"expected at least {length} rows for a window; '{os.fspath(data)}' has {len(values)}")
        x = np.lib.stride_tricks.sliding_window_view(values, length, axis=0).swapaxes(1, 2)
    picked = np.unique(np.linspace(0, len(x) - 1, min(len(x), _LARGEST_SET)).astype(np.int64))
    return np.ascontiguousarray(x[picked], np.float32)


def _eager(model: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Float32Array], Float32Array]:
    def run(x: Float32Array) -> Float32Array:
        with torch.inference_mode():
            y: Float32Array = model(torch.from_numpy(x)).numpy()
            return y

    return run


def _compare(row: Row, y: Float32Array, truth: Float32Array, span: float) -> Row:
    row.difference = float(np.abs(y.astype(np.float64) - truth).max())
    row.relative = row.difference / span
    row.ulps = int(np.abs(_ordered(y) - _ordered(truth)).max())
    row.bits = hashlib.sha256(np.ascontiguousarray(y, np.float32).tobytes()).hexdigest()[:8]
    return row


def _ordered(values: Float32Array) -> NDArray[np.int64]:
    """Float32 bit patterns as integers in the order of the numbers, so that neighbours differ by 1."""
    bits = np.ascontiguousarray(values, np.float32).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(2**31) - bits, bits)


def _run_program(row: Row, path: str, names: list[str], x: Float32Array, truth: Float32Array, span: float) -> Row:
    """Run the row's program over the windows, one under the other in a CSV file."""
    command = shutil.which(row.name, path=str(Path(sys.executable).parent)) or shutil.which(row.name)
    if command is None:
        row.problem = "not built"
        return row
    with tempfile.TemporaryDirectory() as directory:
        table = Path(directory) / "windows.csv"
        header = ",".join(f'"{name.replace(chr(34), chr(34) * 2)}"' for name in names) or ",".join(
            f"x{k}" for k in range(x.shape[2])
        )
        with table.open("w", encoding="utf-8") as file:
            np.savetxt(file, x.reshape(-1, x.shape[2]), "%.9g", ",", header=header, comments="")
        length = str(x.shape[1])
        options = ["--window", length, "--stride", length, "--repeat", str(_TIMED_CALLS)]
        done = subprocess.run([command, path, str(table), *options], capture_output=True, text=True)
    if done.returncode != 0:
        row.problem = done.stderr.strip() or f"exit code {done.returncode}"
        return row
    y = np.array([line.split(",")[1:] for line in done.stdout.splitlines()[1:]], np.float64).astype(np.float32)
    if y.size != truth.size:
        row.problem = f"gave {y.shape} outputs and not {truth.shape}"
        return row
    y = y.reshape(truth.shape)
    if median := re.search(r"median ([0-9.]+)", done.stderr):
        row.latency = float(median[1])
    return _compare(row, y, truth, span)
