"""The rows of the CPU benchmark, the least time each could take, and what each must reach. Data and arithmetic alone.

The floor of a row is the time that its arithmetic and its weights need at rates measured in the same run: a core's
fused multiply-adds a second (the peak) and the bytes a second that it reads from a working set of some size. Summed
over the layers, with G = 4 hidden_size rows of weights and B T tokens:

* the input projection, once a sequence: the larger of 2 G inputs B T / peak and bytes(weight_ih) / bandwidth(all
  weights of the stack);
* the recurrence: the larger of 2 G outputs B T / peak and the reads of weight_hh, in the first step out of all weights
  of the stack, in each of the other T - 1 out of a working set of weight_hh alone, as a layer can run through the
  sequence before the next one starts;
* with ``proj_size``, 2 proj_size hidden_size B T / peak.

A training step counts each product three times, once forward and twice backward, but the first layer's projection
twice, as nobody asks for the gradient of the input. Activations, latencies, the optimiser and the call itself are not
counted, so that no program reaches the floor of a small row. A multiply-add costs twice as much in float64 and a
quarter in int8, where one instruction does four times as many; weights in bfloat16 are widened to float32, which costs
nothing here but halves their bytes. A row can be faster than its floor where weights are read in turns from either end:
what was read last is then found in a smaller cache than the one that holds them all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Bytes of a weight, and multiply-adds of float32 that one of this type costs.
WEIGHT_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "int8": 1}
COST = {"float32": 1.0, "float64": 2.0, "bfloat16": 1.0, "float16": 1.0, "int8": 0.25}


@dataclass(frozen=True)
class Row:
    """What is measured: sizes as (batch, time, input_size, hidden_size, num_layers)."""

    section: str
    name: str
    batch: int
    time: int
    inputs: int
    hidden: int
    layers: int
    threads: int = 1
    dtype: str = "float32"
    proj: int = 0
    packed: bool = False

    @property
    def training(self) -> bool:
        return self.section == "training"

    @property
    def lengths(self) -> list[int]:
        """Steps of each row, longest first: all of ``time``, or from half of it to all of it."""
        if not self.packed:
            return [self.time] * self.batch
        least = self.time // 2
        spread = max(self.batch - 1, 1)
        return [self.time - round(at * (self.time - least) / spread) for at in range(self.batch)]


def _row(section: str, sizes: str, suffix: str = "", **options: Any) -> Row:
    batch, time, inputs, hidden, layers = (int(size) for size in sizes.split(", "))
    return Row(section, sizes + suffix, batch, time, inputs, hidden, layers, **options)


INFERENCE = [
    "1, 5, 10, 50, 2",
    "1, 1, 10, 50, 2",
    "1, 100, 10, 50, 2",
    "32, 100, 10, 50, 2",
    "1, 100, 32, 128, 2",
    "64, 100, 32, 128, 2",
    "1, 100, 64, 512, 1",
    "64, 50, 64, 512, 2",
    "1, 1, 1, 20, 1",
    "1, 48, 1, 16, 1",
]
TWO_THREADS = ["64, 100, 32, 128, 2", "64, 50, 64, 512, 2"]
LARGE_BATCH_1 = ["1, 100, 32, 128, 2", "1, 100, 64, 512, 1"]
TRAINING = ["64, 100, 32, 128, 2", "32, 48, 10, 50, 2"]
RAGGED = "64, 100, 32, 128, 2"
FLAT = "1, 100, 10, 50, 2"

#: What every row is compared with, and no peer.
HAND_WRITTEN = "hand-written cell"

#: The fastest peer in float32, of a row in another type.
FLOAT32_PEER = "best float32 peer"

RTNEURAL = "RTNeural's figure"
#: RTNeural's microseconds a step for one layer of 1 -> H, sizes fixed when it was compiled: measured on a two-core AVX2
#: machine of 100 GFLOP/s, not on the one that runs this.
RTNEURAL_US = {8: 0.069, 16: 0.128, 20: 0.243, 32: 0.229, 40: 0.329, 64: 1.222}
#: The same for two layers, 10 -> 50 -> 50.
RTNEURAL_STACK_US = {50: 2.3}

ROWS = [
    *(_row("inference", sizes) for sizes in INFERENCE),
    *(_row("threads", sizes, ", two threads", threads=2) for sizes in TWO_THREADS),
    *(_row("low", sizes, f", {dtype}", dtype=dtype) for sizes in LARGE_BATCH_1 for dtype in ("bfloat16", "int8")),
    _row("ragged", RAGGED, ", lengths from half to full", packed=True),
    *(
        _row("training", sizes, suffix, **options)
        for sizes in TRAINING
        for suffix, options in (
            (", training", {}),
            (", training, packed", {"packed": True}),
            (", training, proj_size", {"proj": int(sizes.split(", ")[3]) // 2}),
            (", training, float64", {"dtype": "float64"}),
            (", training, bfloat16", {"dtype": "bfloat16"}),
        )
    ),
    *(_row("runtime", f"1, 1, 1, {hidden}, 1", ", runtime") for hidden in RTNEURAL_US),
    *(_row("runtime", sizes, ", runtime") for sizes in ("1, 1, 10, 50, 2", "1, 1, 32, 128, 2")),
    _row("programs", "1, 1, 10, 50, 2", ", cellstep-run"),
    _row("programs", "1, 5, 10, 50, 2", ", cellstep-embed"),
    _row("programs", "1, 1, 10, 50, 2", ", cellstep-embed"),
    # Last, as it leaves a primitive in oneDNN's cache for every length.
    _row("flat", FLAT, ", a new length every call"),
]

SECTIONS = list(dict.fromkeys(row.section for row in ROWS))


def pick(only: Sequence[str]) -> list[Row]:
    """The rows of the sections or with the names given; all of them if none is given.

    Raises:
        ValueError: a name fits neither.
    """
    names = [row.name for row in ROWS]
    for name in only:
        if name not in SECTIONS and name not in names:
            raise ValueError(
                f"expected sections ({', '.join(SECTIONS)}) or names of rows, such as {names[0]!r}; got {name!r}; "
                "cpu.py --list prints them"
            )
    return [row for row in ROWS if not only or row.section in only or row.name in only]


@dataclass(frozen=True)
class Rates:
    """What the machine can do.

    Attributes:
        flops: operations a second on 1, 2, ... threads, two a multiply-add, in float32.
        bandwidth: (bytes of the working set, bytes read a second), by rising size.
    """

    flops: Sequence[float]
    bandwidth: Sequence[tuple[int, float]]

    def peak(self, threads: int = 1) -> float:
        """Operations a second; past the threads measured as many times the rate of one core."""
        return self.flops[threads - 1] if threads <= len(self.flops) else self.flops[0] * threads

    def read(self, working_set: float) -> float:
        """Bytes a second out of a working set, between the sizes measured on a line over the logarithm of the size."""
        below = None
        for size, rate in self.bandwidth:
            if size >= working_set:
                if below is None:
                    return rate
                share = math.log(working_set / below[0]) / math.log(size / below[0])
                return below[1] + share * (rate - below[1])
            below = (size, rate)
        return self.bandwidth[-1][1]


def _passes(row: Row, layer: int) -> tuple[int, int]:
    """How often a layer's input projection and its other products are computed: a gradient of the input is not."""
    return (3 if layer else 2, 3) if row.training else (1, 1)


def operations(row: Row) -> float:
    """Floating-point operations of all products of a row, two a multiply-add."""
    tokens = sum(row.lengths)
    outputs = row.proj or row.hidden
    total = 0.0
    for layer in range(row.layers):
        inputs = row.inputs if layer == 0 else outputs
        projection, others = _passes(row, layer)
        total += 2.0 * tokens * 4 * row.hidden * (projection * inputs + others * outputs)
        total += 2.0 * tokens * others * row.proj * row.hidden
    return total


def floor_us(row: Row, rates: Rates) -> float:
    """Least microseconds of a row, as the head of this module says."""
    peak = rates.peak(row.threads) / COST[row.dtype]
    width = WEIGHT_BYTES[row.dtype]
    outputs = row.proj or row.hidden
    tokens, steps = sum(row.lengths), max(row.lengths)
    gates = 4 * row.hidden
    layer_inputs = [row.inputs, *[outputs] * (row.layers - 1)]
    stack = sum(width * gates * (inputs + outputs) for inputs in layer_inputs)
    recurrent = width * gates * outputs
    seconds = 0.0
    for layer, inputs in enumerate(layer_inputs):
        projection, others = _passes(row, layer)
        work = 2.0 * gates * inputs * tokens / peak
        seconds += projection * max(work, width * gates * inputs / rates.read(stack))
        reads = recurrent / rates.read(stack) + (steps - 1) * recurrent / rates.read(recurrent)
        seconds += others * max(2.0 * gates * outputs * tokens / peak, reads)
        seconds += others * 2.0 * row.proj * row.hidden * tokens / peak
    return seconds * 1e6


@dataclass(frozen=True)
class Goal:
    """A figure of a row that must reach ``least``.

    ``against`` is a peer's name, "best peer" or "best float32 peer" (how many times as long it takes), "floor" (the
    floor over the time), "FMA peak" (operations a second over the peak) or "limit" (``limit_us`` over the time).
    """

    row: str
    against: str
    least: float
    limit_us: float = 0.0


MUST_REACH = [
    Goal("1, 5, 10, 50, 2", "ONNX Runtime", 3),
    Goal("1, 5, 10, 50, 2", "torch.nn.LSTM", 15),
    Goal("1, 1, 10, 50, 2", "ONNX Runtime", 4),
    Goal("1, 1, 10, 50, 2", "torch.nn.LSTM", 20),
    Goal("1, 5, 10, 50, 2, cellstep-embed", "floor", 1 / 1.4),
    Goal("1, 1, 10, 50, 2, cellstep-embed", "floor", 1 / 1.4),
    Goal("1, 100, 10, 50, 2", "best peer", 1.7),
    Goal("32, 100, 10, 50, 2", "best peer", 1.7),
    Goal("1, 100, 32, 128, 2", "best peer", 1.6),
    *(
        Goal(sizes + threads, against, least)
        for sizes in TWO_THREADS
        for threads in ("", ", two threads")
        for against, least in (("best peer", 1.2), ("FMA peak", 0.8))
    ),
    Goal("1, 100, 64, 512, 1", "best peer", 1.3),
    # Like the row in float32: the peers that they are to leave behind compute in float32.
    Goal("1, 100, 64, 512, 1, bfloat16", FLOAT32_PEER, 2.2),
    Goal("1, 100, 64, 512, 1, int8", FLOAT32_PEER, 3.5),
    *(Goal(f"1, 1, 1, {hidden}, 1, runtime", RTNEURAL, 1.2) for hidden in RTNEURAL_US),
    Goal("64, 100, 32, 128, 2, training", "torch.nn.LSTM", 1.5),
    Goal("32, 48, 10, 50, 2, training", "torch.nn.LSTM", 2),
    *(
        Goal(f"{sizes}, training, {kind}", "torch.nn.LSTM", 3)
        for sizes in TRAINING
        for kind in ("packed", "proj_size", "float64")
    ),
    Goal("1, 1, 10, 50, 2, cellstep-run", "limit", 1, limit_us=5.0),
]

#: A row falls short when it is this much below: the machines are noisy.
SLACK = 0.10


@dataclass
class Timing:
    """Times of one way of running a row, in microseconds, over ``calls`` calls after the first."""

    median: float
    p99: float
    p999: float
    first: float
    calls: int


@dataclass
class Result:
    """What came of a row.

    Attributes:
        way: which of cellstep's ways ``ours`` is; "" if none ran.
        timings: by name: cellstep's ways, the peers and the references.
        ratios: by peer: how many times as long it takes, the median over pairs of blocks run in turn.
        reasons: by name: why there are no times.
        extra: further figures of the row, by what they are.
    """

    row: str
    way: str = ""
    timings: dict[str, Timing] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def ours(self) -> Timing | None:
        return self.timings.get(self.way)

    @property
    def best_peer(self) -> str | None:
        """The fastest peer; the hand-written cell is none."""
        peers = {name: ratio for name, ratio in self.ratios.items() if name != HAND_WRITTEN}
        return min(peers, key=lambda name: peers[name]) if peers else None


@dataclass
class Verdict:
    goal: Goal
    value: float | None
    reason: str = ""  #: why there is no value

    @property
    def met(self) -> bool:
        """Reached, within the slack."""
        return self.value is not None and self.value >= self.goal.least * (1 - SLACK)


def judge(rows: Sequence[Row], results: Mapping[str, Result], rates: Rates) -> list[Verdict]:
    """Every goal of the rows that were asked for; a row without a figure is a miss with the reason."""
    by_name = {row.name: row for row in rows}
    return [_judge(goal, by_name[goal.row], results.get(goal.row), rates) for goal in MUST_REACH if goal.row in by_name]


def _judge(goal: Goal, row: Row, result: Result | None, rates: Rates) -> Verdict:
    if result is None or result.ours is None:
        reasons = {} if result is None else result.reasons
        said = [reason for name, reason in reasons.items() if name.startswith("cellstep")] or list(reasons.values())
        return Verdict(goal, None, said[0] if said else "not measured")
    microseconds = result.ours.median
    if goal.against == "floor":
        return Verdict(goal, floor_us(row, rates) / microseconds)
    if goal.against == "FMA peak":
        return Verdict(goal, operations(row) / (microseconds * 1e-6) / rates.peak(row.threads))
    if goal.against == "limit":
        return Verdict(goal, goal.limit_us / microseconds)
    if goal.against == FLOAT32_PEER:
        value = result.extra.get(FLOAT32_PEER)
        return Verdict(goal, value, "" if value else "no time of a peer in float32")
    against = result.best_peer if goal.against == "best peer" else goal.against
    if against is None or against not in result.ratios:
        return Verdict(goal, None, result.reasons.get(goal.against, f"no time of {goal.against}"))
    return Verdict(goal, result.ratios[against])
