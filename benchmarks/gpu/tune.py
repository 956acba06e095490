"""Which kernel is the fastest where: what csrc/ops/cuda/choose.cpp's table is set from."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from benchmarks.gpu.report import number, table
from benchmarks.gpu.rows import NN, Row
from benchmarks.gpu.timing import Budget, Clock, capture, median
from benchmarks.gpu.ways import OURS, WAYS, Case, forced, precision

#: As CELLSTEP_CUDA_KERNEL names them.
KERNELS = ("plain", "rows", "block", "tensor", "cluster", "cluster_float")
#: What a block holds, and what several have to share; of these the batches are fewer, as each takes longer.
BATCHES = (1, 8, 32, 128, 512, 8192)
HIDDEN = (8, 16, 32, 48, 64, 96, 128, 160, 224)
LARGE_BATCHES = (1, 4, 16, 64, 256)
LARGE_HIDDEN = (320, 512, 640, 832, 1024, 1536, 2048)
STEPS = 32
#: A kernel is the best where no other is faster by more than this: what runs differ by.
NEAR = 0.03


@dataclass
class Point:
    """Microseconds of each kernel that took the call; ``table``'s own choice is named "", cuDNN as torch's module."""

    dtype: str
    training: bool
    batch: int
    hidden: int
    us: dict[str, float] = field(default_factory=dict)

    @property
    def own(self) -> dict[str, float]:
        return {name: us for name, us in self.us.items() if name in KERNELS}

    @property
    def best(self) -> str:
        return min(self.own, key=lambda name: self.own[name]) if self.own else "none"

    def near(self, kernel: str) -> bool:
        """Whether a kernel is as fast as the best."""
        return kernel in self.own and self.own[kernel] <= (1 + NEAR) * self.own[self.best]


def measure(device: torch.device, clock: Clock, seconds: float, small: bool = False) -> list[Point]:
    """All points, batch sizes and hidden sizes interleaved so that a budget that runs out leaves the rest coarse."""
    budget = Budget(seconds)
    if small:
        places = [(n, h) for n in BATCHES[:2] for h in HIDDEN[:2]]
    else:
        places = [(n, h) for h in LARGE_HIDDEN for n in LARGE_BATCHES] + [(n, h) for h in HIDDEN for n in BATCHES]
    points = []
    for batch, units in [place for at in (0, 2, 1, 3) for place in places[at::4]]:
        for dtype in ("float32", "bfloat16"):
            if budget.left() <= 0:
                break
            points += _points(Row("tune", batch, 2 if small else STEPS, units, units, 1, dtype), device, clock)
    return sorted(points, key=lambda point: (point.dtype, point.training, point.batch, point.hidden))


def _points(row: Row, device: torch.device, clock: Clock) -> list[Point]:
    found = [Point(row.dtype, training, row.batch, row.hidden) for training in (False, True)]
    try:
        case = Case(row, device)
        ways = {name: WAYS[name](case) for name in (OURS, NN)}
    except RuntimeError:
        return found  # without times: no memory for it
    for kernel in (*KERNELS, "", NN):
        with forced("" if kernel == NN else kernel), precision(row.dtype):
            for point in found:
                call = ways[NN if kernel == NN else OURS].of(point.training)
                assert call is not None
                try:
                    call()
                    point.us[kernel] = median(clock.blocks(capture(call, clock), 3, 5))
                except (RuntimeError, ValueError):
                    continue  # the kernel does not do this call
    return found


def _backward(points: list[Point]) -> list[Point]:
    """What training takes behind its forward pass, for which choose.cpp has a table of its own; ``rows`` has no such
    pass."""
    forward = {(p.dtype, p.batch, p.hidden): p.us for p in points if not p.training}
    found = []
    for point in points:
        before = forward.get((point.dtype, point.batch, point.hidden), {})
        us = {name: max(us - before[name], 0.0) for name, us in point.us.items() if name in before and name != "rows"}
        found.append(Point(point.dtype, True, point.batch, point.hidden, us))
    return [point for point, given in zip(found, points, strict=True) if given.training]


def crossovers(points: list[Point]) -> list[str]:
    """As the rules of choose.cpp are written: for each type, pass and kernel the hidden sizes at which it is as fast as
    any, with the batches at which it is so there."""
    lines = []
    points = [point for point in points if not point.training] + _backward(points)
    for dtype, training in dict.fromkeys((point.dtype, point.training) for point in points):
        here = [point for point in points if (point.dtype, point.training) == (dtype, training)]
        lines.append(f"{dtype}, {'backward' if training else 'forward'}:")
        for kernel in KERNELS:
            spans: dict[int, list[int]] = {}
            for point in here:
                if point.near(kernel):
                    spans.setdefault(point.hidden, []).append(point.batch)
            said = [f"H = {hidden}: N {_spans(spans[hidden], here, hidden)}" for hidden in sorted(spans)]
            if said:
                lines.append(f"  {{Kernel::{kernel}, ...}}  {'; '.join(said)}")
    return lines


def _spans(batches: list[int], points: list[Point], hidden: int) -> str:
    """Batches that follow one another, among those that were timed, as spans."""
    timed = sorted({point.batch for point in points if point.hidden == hidden})
    spans: list[list[int]] = []
    for batch in timed:
        if batch not in batches:
            continue
        if spans and timed.index(spans[-1][-1]) + 1 == timed.index(batch):
            spans[-1].append(batch)
        else:
            spans.append([batch])
    return ", ".join(f"{span[0]} to {span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)


def slower(points: list[Point]) -> list[str]:
    """Where the table's choice, or every kernel, is slower than cuDNN."""
    lines = []
    for point in points:
        ours, theirs = point.us.get(""), point.us.get(NN)
        if ours is not None and theirs is not None and ours > theirs:
            best = point.own.get(point.best, ours)
            why = "no kernel is faster" if best > theirs else f"{point.best} takes {number(best)} us"
            what = (
                f"{point.dtype}, {'training' if point.training else 'forward'}, N = {point.batch}, H = {point.hidden}"
            )
            lines.append(f"slower than cuDNN: {what}: {number(ours)} us, cuDNN's {number(theirs)}; {why}")
    return lines


def as_text(points: list[Point]) -> str:
    head = ["dtype", "pass", "batch", "hidden", *KERNELS, "the table's", NN, "best", "lost by the table"]
    lines = []
    for point in points:
        chosen = point.us.get("")
        best = point.us.get(point.best)
        lost = f"{100 * (chosen / best - 1):.0f}%" if chosen and best else ""
        us = [number(point.us.get(kernel)) for kernel in (*KERNELS, "", NN)]
        what = "training" if point.training else "forward"
        lines.append([point.dtype, what, str(point.batch), str(point.hidden), *us, point.best, lost])
    title = f"Microseconds of {STEPS} steps, one layer, one direction, input of the same width, CUDA graphs"
    rules = f"Where each kernel is as fast as any, within {100 * NEAR:.0f}%, for the rules of csrc/ops/cuda/choose.cpp:"
    return "\n\n".join([title, table(head, lines, 2), rules, "\n".join(crossovers(points)), *slower(points)])


def as_json(points: list[Point]) -> list[dict[str, Any]]:
    return [asdict(point) | {"best": point.best} for point in points]
