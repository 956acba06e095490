"""Which kernel is the fastest where: what csrc/ops/cuda/choose.cpp's table is set from."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from benchmarks.gpu.report import number, table
from benchmarks.gpu.rows import Row
from benchmarks.gpu.timing import Budget, Clock, capture, median
from benchmarks.gpu.ways import Case, cellstep_lstm, forced, precision

#: As CELLSTEP_CUDA_KERNEL names them.
KERNELS = ("plain", "rows", "block", "tensor")
BATCHES = (1, 8, 32, 128, 512, 8192)
HIDDEN = (8, 16, 32, 48, 64, 96, 128, 160, 224, 320)
STEPS = 32


@dataclass
class Point:
    """Microseconds of each kernel that took the call; ``table``'s own choice is named ""."""

    dtype: str
    training: bool
    batch: int
    hidden: int
    us: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> str:
        own = {name: us for name, us in self.us.items() if name}
        return min(own, key=lambda name: own[name]) if own else "none"


def measure(device: torch.device, clock: Clock, seconds: float, small: bool = False) -> list[Point]:
    """All points, batch sizes and hidden sizes interleaved so that a budget that runs out leaves the rest coarse."""
    budget = Budget(seconds)
    batches, hidden = (BATCHES[:2], HIDDEN[:2]) if small else (BATCHES, HIDDEN)
    places = [(n, h) for n in batches for h in hidden]
    places = places[::2] + places[1::2]
    points = []
    for batch, units in places:
        for dtype in ("float32", "bfloat16"):
            if budget.left() <= 0:
                return points
            row = Row("tune", batch, 2 if small else STEPS, units, units, 1, dtype)
            points += _points(row, Case(row, device), clock)
    return sorted(points, key=lambda point: (point.dtype, point.training, point.batch, point.hidden))


def _points(row: Row, case: Case, clock: Clock) -> list[Point]:
    found = [Point(row.dtype, training, row.batch, row.hidden) for training in (False, True)]
    for kernel in (*KERNELS, ""):
        with forced(kernel), precision(row.dtype):
            try:
                way = cellstep_lstm(case)
                for point in found:
                    call = way.of(point.training)
                    assert call is not None
                    replay = capture(call, clock)
                    point.us[kernel] = median(clock.blocks(replay, 3, 5))
            except (RuntimeError, ValueError):
                continue  # the kernel does not do this call
    return found


def crossovers(points: list[Point]) -> list[str]:
    """For each type, pass and batch: up to which hidden size which kernel is the fastest."""
    lines = []
    for dtype, training, batch in dict.fromkeys((p.dtype, p.training, p.batch) for p in points):
        runs: list[tuple[str, int]] = []
        for point in points:
            if (point.dtype, point.training, point.batch) == (dtype, training, batch):
                if runs and runs[-1][0] == point.best:
                    runs[-1] = (point.best, point.hidden)
                else:
                    runs.append((point.best, point.hidden))
        said = ", ".join(f"{kernel} to {hidden}" for kernel, hidden in runs)
        lines.append(f"{dtype}, {'training' if training else 'forward'}, batch {batch}: {said}")
    return lines


def as_text(points: list[Point]) -> str:
    head = ["dtype", "pass", "batch", "hidden", *KERNELS, "the table's", "best", "lost by the table"]
    lines = []
    for point in points:
        chosen = point.us.get("")
        best = point.us.get(point.best)
        lost = f"{100 * (chosen / best - 1):.0f}%" if chosen and best else ""
        us = [number(point.us.get(kernel)) for kernel in (*KERNELS, "")]
        what = "training" if point.training else "forward"
        lines.append([point.dtype, what, str(point.batch), str(point.hidden), *us, point.best, lost])
    title = f"Microseconds of {STEPS} steps, one layer, CUDA graphs"
    return "\n\n".join([title, table(head, lines, 2), "\n".join(crossovers(points))])


def as_json(points: list[Point]) -> list[dict[str, Any]]:
    return [asdict(point) | {"best": point.best} for point in points]
