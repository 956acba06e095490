"""The rows of benchmarks/cuda.py: what is timed, what it must reach, what cuDNN does there, and what the device allows.

The floor of a row is the greatest of three times, with a launch on top, at rates that the same run measures:

- its products at the rate of a large product of the same type;
- its bytes at the rate of a large copy: inputs, outputs and weights once, and what training keeps, once each way;
- its chain of steps. A step costs a barrier among the blocks that hold one layer's weight_hh (one block, a cluster of
  16 or all of them: whichever is least among those whose registers and memory can), and that step's products on the
  blocks that the rows and layers can use. Layers run as a wavefront, directions side by side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

NN = "torch.nn.LSTM"
#: Without the product of the input, which is in cellstep's time and in torch's; and with it.
FLASH, FLASH_WHOLE = "FlashRNN", "FlashRNN and input product"
#: Bytes of a value of what is called a type here: TF32 is float32 whose products may be rounded.
BYTES = {"float32": 4, "TF32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
PASSES = ("forward", "training")
#: Bytes of weights that one multiprocessor keeps, in registers and shared memory together.
ON_CHIP = 380e3
CLUSTER = 16


@dataclass(frozen=True)
class Row:
    """One problem.

    Attributes:
        table: "small" or "large".
        lengths: the steps of each row of a packed batch, falling; empty for a padded one.
        goals: by pass, how many times as long the peer must take.
        against: the peer of the goals.
    """

    table: str
    batch: int
    time: int
    inputs: int
    hidden: int
    layers: int
    dtype: str
    goals: Mapping[str, float] = field(default_factory=dict, hash=False)
    bidirectional: bool = False
    lengths: tuple[int, ...] = ()
    against: str = NN

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def tokens(self) -> int:
        return sum(self.lengths) if self.lengths else self.batch * self.time

    @property
    def name(self) -> str:
        if self.lengths:
            sizes = f"{self.batch} of {min(self.lengths)} to {self.time}, {self.inputs}, {self.hidden}, {self.layers}"
        else:
            sizes = f"{self.batch:,}, {self.time:,}, {self.inputs:,}, {self.hidden:,}, {self.layers}"
        return sizes + (", bidirectional" if self.bidirectional else "") + (", packed" if self.lengths else "")


def spread(count: int, least: int, most: int) -> tuple[int, ...]:
    """Lengths at even distances, falling."""
    return tuple(most - round(at * (most - least) / (count - 1)) for at in range(count))


def _rows() -> list[Row]:
    small: list[tuple[tuple[int, int, int, int, int], Sequence[str], float, float | None]] = [
        ((1, 5, 10, 50, 2), ["float32"], 2.5, 2),
        ((1, 1000, 10, 50, 2), ["float32"], 2.5, 2),
        ((64, 48, 10, 50, 2), ["float32"], 2.5, 2),
        ((49152, 1, 2, 8, 2), ["float32"], 3, None),
        ((128, 256, 64, 64, 4), ["bfloat16", "float32"], 3, 2),
        ((32, 256, 64, 128, 2), ["float32", "float16"], 2, 1.5),
        ((64, 200, 64, 160, 1), ["float32"], 3, 2),
    ]
    rows = []
    for sizes, dtypes, forward, training in small:
        goals = {"forward": forward} | ({"training": training} if training else {})
        rows += [Row("small", *sizes, dtype, goals) for dtype in dtypes]
        # What torch does of itself with float32 weights, as cuDNN may round to TF32 unless told otherwise.
        rows += [Row("small", *sizes, dtype) for dtype in ("TF32", "float16", "bfloat16") if dtype not in dtypes]
    lengths = spread(64, 50, 1000)
    rows.append(Row("small", 64, 1000, 64, 128, 1, "float32", {"forward": 15, "training": 8}, lengths=lengths))

    def large(*sizes: int, dtype: str, goals: tuple[float, float], **more: Any) -> Row:
        return Row("large", *sizes, dtype, dict(zip(PASSES, goals, strict=True)), **more)

    return [
        *rows,
        large(1, 1024, 256, 256, 1, dtype="float32", goals=(4, 3)),
        large(1, 1024, 256, 256, 1, dtype="bfloat16", goals=(4, 3)),
        large(16, 1024, 512, 512, 1, dtype="bfloat16", goals=(4, 3)),
        large(16, 1024, 512, 512, 1, dtype="float32", goals=(3, 2)),
        # What torch does of itself with float32 weights.
        Row("large", 1, 1024, 256, 256, 1, "TF32"),
        Row("large", 16, 1024, 512, 512, 1, "TF32"),
        large(64, 256, 512, 512, 2, dtype="bfloat16", goals=(2.5, 2), bidirectional=True),
        large(16, 1024, 1024, 1024, 1, dtype="bfloat16", goals=(3, 2)),
        large(16, 1024, 768, 768, 1, dtype="bfloat16", goals=(2, 2), against=FLASH),
        large(16, 1024, 768, 768, 1, dtype="float16", goals=(1, 1)),
        large(64, 1000, 512, 512, 1, dtype="bfloat16", goals=(15, 8), lengths=spread(64, 100, 1000)),
    ]


ROWS = _rows()
#: A packed batch, the same tokens as rows of its longest length, of its mean length, and the batch filled up to its
#: longest. The first takes at most this many times the second, which has as many tokens and as long a chain of steps.
RAGGED_LIMIT = 1.1


def padded_forms(row: Row) -> dict[str, Row]:
    """What a packed row is compared with, by name."""
    longest, count = row.time, row.batch

    def form(batch: int, time: int) -> Row:
        return Row(row.table, max(batch, 1), time, row.inputs, row.hidden, row.layers, row.dtype)

    return {
        "same tokens, longest length": form(round(row.tokens / longest), longest),
        "same tokens, mean length": form(count, round(row.tokens / count)),
        "filled up": form(count, longest),
    }


def cudnn_algorithm(
    row: Row, forward: bool, capability: tuple[int, int] = (9, 0), multiprocessors: int = 132, proj_size: int = 0
) -> str:
    """Which of cuDNN's algorithms torch asks for.

    The rule is that of ``get_algo`` in PyTorch's aten/src/ATen/native/cudnn/RNN.cpp, for LSTM and cuDNN 8.2.1 or later:
    the persistent kernel for small H on padded input of any type but float64, the one of float16 for single layers in
    multiples of 128, and the standard algorithm, a launch a step and layer, for all else. The forward pass and the
    backward pass ask apart. A persistent kernel that was asked for may still be refused by cuDNN itself.
    """
    if row.lengths or proj_size or row.dtype == "float64":
        return "standard"
    if capability[0] >= 6 and row.hidden <= (192 if forward else 128):
        return "persistent, small H"
    fits = row.layers == 1 and not row.bidirectional and row.hidden <= 1024
    multiples = row.hidden % 128 == 0 and row.inputs % 128 == 0
    device = capability[0] >= 8 and multiprocessors >= 98 and capability[1] != 6
    if capability == (7, 0) or capability == (7, 2):
        raise ValueError("expected a device of compute capability 8.0 or later; got a Volta, whose rule is another")
    if row.dtype == "float16" and fits and multiples and device and row.batch % 8 == 0 and row.batch <= 128:
        return "persistent, static"
    return "standard"


@dataclass(frozen=True)
class Rates:
    """What the device can do, measured in the same run.

    Attributes:
        multiprocessors: of the device.
        flops: by type: operations a second of a large product, two a multiply-add.
        bandwidth: bytes a second that a large copy reads and writes.
        launch_us: of an empty kernel behind another.
        warp_step_us, block_step_us: an exchange of h, its barrier and the activations, within a warp and a block.
        block_us, cluster_us, grid_us: a barrier alone; None where the device has none or no compiler was there.
        source: "probe", or why some of them are figures of an H100 instead.
    """

    multiprocessors: int
    flops: Mapping[str, float]
    bandwidth: float
    launch_us: float = 2.5
    warp_step_us: float = 0.15
    block_step_us: float = 0.25
    block_us: float = 0.03
    cluster_us: float | None = 0.4
    grid_us: float | None = 1.5
    source: str = "assumed, as of an H100"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def operations(row: Row, training: bool) -> float:
    """Floating-point operations of all products; training has no gradient of the input."""
    gates, outputs = 4.0 * row.hidden, row.hidden * row.directions
    total = 0.0
    for layer in range(row.layers):
        inputs = row.inputs if layer == 0 else outputs
        total += 2 * row.tokens * gates * row.directions * inputs * ((3 if layer else 2) if training else 1)
        total += 2 * row.tokens * gates * row.directions * row.hidden * (3 if training else 1)
    return total


def traffic(row: Row, training: bool) -> float:
    """Bytes that have to move: x and y, weights, and gates and cells once in and once out where they are kept."""
    width, outputs = BYTES[row.dtype], row.hidden * row.directions
    weights = sum(
        4 * row.hidden * row.directions * ((row.inputs if layer == 0 else outputs) + row.hidden)
        for layer in range(row.layers)
    )
    kept = 2 * 5 * row.hidden * row.directions * row.layers * row.tokens if training else 0
    return float(width * ((2 if training else 1) * (weights + row.tokens * (row.inputs + outputs)) + kept))


def step_us(row: Row, rates: Rates) -> float:
    """Least microseconds of a step of the chain."""
    weights = 4.0 * row.hidden**2 * BYTES[row.dtype]
    work = 8.0 * row.hidden**2 * row.batch / rates.flops[row.dtype] * 1e6
    extra = rates.block_step_us - rates.block_us
    ways = []
    for blocks, barrier in ((1, rates.block_us), (CLUSTER, rates.cluster_us), (rates.multiprocessors, rates.grid_us)):
        if barrier is not None and weights <= blocks * ON_CHIP:
            share = min(rates.multiprocessors, row.batch * blocks) / rates.multiprocessors
            ways.append(extra + barrier + work / share)
    if not ways:  # weights come out of L2 in every step
        ways = [extra + (rates.grid_us or 1.5) + work]
    return min([*ways, rates.warp_step_us + work] if row.hidden <= 32 else ways)


def floor_us(row: Row, training: bool, rates: Rates) -> float:
    """Least microseconds of a row, as the head of this module says."""
    products = operations(row, training) / rates.flops[row.dtype] * 1e6
    bytes_us = traffic(row, training) / rates.bandwidth * 1e6
    chain = (row.time + row.layers - 1) * step_us(row, rates) * (2 if training else 1)
    return rates.launch_us * (2 if training else 1) + max(products, bytes_us, chain)
