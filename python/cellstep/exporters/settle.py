"""A warm start: the state that a model settles in, as the initial one of the file it is exported to."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellstep.exporters.records import Flag, Kind, Record, assemble, parse
from cellstep.nn.packed import aligned_bytes


def settled(data: bytes, x: Any) -> tuple[bytes, Tensor, Tensor]:
    """The image whose streams begin where those of ``data`` are after the steps of x, and that state.

    The state is that of the image's own arithmetic, so that the outputs that follow are the same to the bit. The test
    vector gets the answers that this library gives from there.

    Args:
        data: an image without a bidirectional layer, such as a deploy file.
        x: (T, input_size), at least one step.

    Returns:
        The image, h (state_layers, 1, h_size) and c (state_layers, 1, c_size).

    Raises:
        ValueError: x has another shape or is not finite, or the model is bidirectional.
    """
    sizes, records = parse(data)
    given = x.detach().cpu() if isinstance(x, Tensor) else torch.from_numpy(np.array(x, np.float64))
    steps = given.to(sizes.dtype)
    if steps.dim() != 2 or steps.shape[1] != sizes.input_size or len(steps) == 0:
        raise ValueError(
            f"expected settle of shape (T, {sizes.input_size}), T at least 1; got {tuple(steps.shape)}; give the steps "
            "to run before the first one that counts"
        )
    if not steps.isfinite().all():
        raise ValueError("expected finite values in settle; got NaN or infinity; clean the series")
    if any(record.kind == Kind.LSTM and record.flags & Flag.BIDIRECTIONAL for record in records):
        raise ValueError(
            "expected a model that runs forwards alone for settle; got a bidirectional one, which begins anew with "
            "every sequence; leave settle out"
        )
    _, h, c = _run(data, sizes, steps, None, None)
    if not (h.isfinite().all() and c.isfinite().all()):
        raise ValueError("expected a state that stays finite; settle drove it to infinity; give other steps")
    rows = _rows(sizes, records, h, c)
    for record in records:
        if record.kind == Kind.LSTM:
            _begin_from(record, sizes.dtype, rows)
    for record in records:
        if record.kind == Kind.TEST_VECTOR:
            _answer_anew(record, sizes, data, h, c)
    return assemble(sizes, records), h, c


def _run(
    data: bytes, sizes: SimpleNamespace, x: Tensor, h: Tensor | None, c: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Every step of one row: y (T, output_size), and the state behind them."""
    with torch.no_grad():
        y, h, c = torch.ops.cellstep.run_model(
            aligned_bytes(data), x.unsqueeze(0), h, c, sizes.output_size, 0, None, None
        )
    return y.squeeze(0), h, c


def _rows(sizes: SimpleNamespace, records: list[Record], h: Tensor, c: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """h and c of each layer in order, however the header puts them together."""
    widths = [(record.sizes[2] or record.sizes[1], record.sizes[1]) for record in records if record.kind == Kind.LSTM]
    parts = (h.flatten().split([width for width, _ in widths]), c.flatten().split([width for _, width in widths]))
    return zip(*parts, strict=True)


def _begin_from(record: Record, dtype: torch.dtype, rows: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Puts the next row of the state where the initial one lies: behind all else of its direction."""
    bytes_each = dtype.itemsize
    _, hidden, projected, _ = record.sizes
    factors = 3 * bytes_each  # cell_clip and zoneout, which end the record
    old = ((projected or hidden) + hidden) * bytes_each if record.flags & Flag.INITIAL else 0
    state = b"".join(part.numpy().tobytes() for part in next(rows))
    end = len(record.content) - factors
    record.content = record.content[: end - old] + state + record.content[end:]
    record.flags |= Flag.INITIAL


def _answer_anew(record: Record, sizes: SimpleNamespace, data: bytes, h: Tensor, c: Tensor) -> None:
    """Replaces the answers of a test vector, tolerance and inputs kept."""
    steps = record.sizes[0]
    values = torch.frombuffer(bytearray(record.content), dtype=sizes.dtype)
    x = values[1 : 1 + steps * sizes.input_size].reshape(steps, sizes.input_size)
    y, _, _ = _run(data, sizes, x, h, c)
    record.content = torch.cat([values[: 1 + x.numel()], y.flatten()]).numpy().tobytes()
