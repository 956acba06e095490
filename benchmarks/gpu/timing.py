"""Times of calls on a device, by its own events, several ways in turn; on a processor too, to try it all."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], object]
#: A block fills this many microseconds, or is one call: an event costs one or two.
BLOCK_US = 150.0
FEWEST, MOST = 5, 200


class StandIn:
    """An event of the processor's clock."""

    def __init__(self) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "StandIn") -> float:
        return (end.at - self.at) * 1e3


class Clock:
    """Events of one device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.rounds, self.each = (FEWEST, 3) if self.cuda else (1, 1)  # of a comparison at least, and blocks in one

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True) if self.cuda else StandIn()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def blocks(self, call: Call, calls: int, blocks: int) -> list[float]:
        """Microseconds of a call in each of so many blocks. The host waits at the end alone."""
        marks = [(self.event(), self.event()) for _ in range(blocks)]
        for begin, end in marks:
            begin.record()
            for _ in range(calls):
                call()
            end.record()
        self.wait()
        return [begin.elapsed_time(end) * 1e3 / calls for begin, end in marks]


@dataclass
class Budget:
    """Seconds that a part of the run may take, and what is left of them."""

    seconds: float
    begin: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begin)


@dataclass
class Samples:
    us: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.us)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def median(self) -> float:
        return self.quantile(0.5)


def median(values: list[float]) -> float:
    return Samples(values).median


def compare(calls: dict[str, Call], clock: Clock, seconds: float) -> tuple[dict[str, Samples], dict[str, float]]:
    """Times of every way, and how many times as long each takes as the first: the median over rounds in which all run.

    Which way begins a round alternates, as clocks drift. A round has three blocks of each, and an untimed call before
    them fetches back what the others have put out of the caches.
    """
    for call in calls.values():
        for _ in range(clock.each):
            call()
    clock.wait()
    single = {name: median(clock.blocks(call, 1, clock.each)) for name, call in calls.items()}
    counts = {name: max(1, round(BLOCK_US / max(us, 1e-3))) for name, us in single.items()}
    samples = {name: Samples() for name in calls}
    first = next(iter(calls))
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    names, budget, rounds = list(calls), Budget(seconds), 0
    gc.collect()
    gc.disable()
    try:
        while rounds < clock.rounds or (rounds < MOST and budget.left() > 0):
            found = {}
            for name in names if rounds % 2 == 0 else reversed(names):
                calls[name]()
                times = clock.blocks(calls[name], counts[name], clock.each)
                samples[name].us += times
                found[name] = median(times)
            for name in names:
                ratios[name].append(found[name] / found[first])
            rounds += 1
            if budget.left() < -4 * seconds and rounds >= 3:  # calls of seconds: three rounds have to do
                break
    finally:
        gc.enable()
    return samples, {name: median(found) for name, found in ratios.items() if name != first}


def leave_capture() -> None:
    """After a capture that failed: torch's generator takes itself to be in it still, and gives no random numbers."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(torch.Generator(generator.device).graphsafe_get_state())


def capture(call: Call, clock: Clock) -> Call:
    """The call as a CUDA graph.

    Raises:
        RuntimeError: it cannot be captured.
    """
    if not clock.cuda:
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = call()
    except Exception:
        leave_capture()
        raise

    def replay(graph: Any = graph, kept: object = kept) -> None:  # what it wrote stays its own as long as it lives
        graph.replay()

    return replay
