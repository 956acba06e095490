"""Times of calls, so that they can be compared: two ways of running the same thing, in turn, in one process."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from rows import Timing

Call = Callable[[], object]


@dataclass
class Effort:
    """How long to measure.

    Attributes:
        seconds: of one pair, where the calls are short enough for it.
        longest: of one pair in any case, past three blocks a side.
        fewest, most: blocks of each side, within that.
        block: seconds of a block, or one call where that takes longer.
        rest: seconds between blocks: thread pools spin for a while after their work, on the other side's core.
    """

    seconds: float = 0.6
    longest: float = 8.0
    fewest: int = 7
    most: int = 51
    block: float = 3e-3
    rest: float = 0.0


@dataclass
class Samples:
    """What one way of running took: the first call apart from all that were timed later."""

    first_ns: float
    ns: list[int] = field(default_factory=list)

    def timing(self) -> Timing:
        median, p99, p999 = np.percentile(self.ns, [50, 99, 99.9]) * 1e-3
        return Timing(float(median), float(p99), float(p999), self.first_ns * 1e-3, len(self.ns))


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's collector stops for everybody at any time, and belongs to nobody."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def time_calls(call: Call, count: int) -> list[int]:
    """Nanoseconds of each of ``count`` calls."""
    clock = time.perf_counter_ns
    times = []
    for _ in range(count):
        begin = clock()
        call()
        times.append(clock() - begin)
    return times


def calls_a_block(call: Call, effort: Effort) -> int:
    """As many calls as fill a block."""
    shortest = min(time_calls(call, 3))
    return max(1, min(5000, round(effort.block * 1e9 / max(shortest, 1))))


def enough(effort: Effort, blocks: int, seconds: float) -> bool:
    """Whether a pair that has so many blocks a side after so long needs no more."""
    if seconds >= effort.longest and blocks >= min(3, effort.fewest):
        return True
    return blocks >= effort.fewest and (blocks >= effort.most or seconds >= effort.seconds)


def pair(a: Call, b: Call, a_samples: Samples, b_samples: Samples, effort: Effort) -> float:
    """How many times as long ``b`` takes as ``a``: the median over pairs of blocks of the ratio of their medians.

    Blocks alternate, and so does which side begins, as clocks drift. An untimed call before each block of several
    fetches back what the other side has put out of the caches.
    """
    with no_collection():
        sides = [(call, samples, calls_a_block(call, effort)) for call, samples in ((a, a_samples), (b, b_samples))]
        ratios: list[float] = []
        begin = time.perf_counter()
        while not enough(effort, len(ratios), time.perf_counter() - begin):
            medians = [0.0, 0.0]
            for at in (0, 1) if len(ratios) % 2 == 0 else (1, 0):
                call, samples, count = sides[at]
                if effort.rest:
                    time.sleep(effort.rest)
                if count > 1:
                    call()
                times = time_calls(call, count)
                samples.ns += times
                medians[at] = float(np.median(times))
            ratios.append(medians[1] / medians[0])
    return float(np.median(ratios))
