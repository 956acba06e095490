"""The bytes of a deploy file as records, and back; what they mean is described in ``csrc/core/image.h``."""

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from cellstep.nn.chain import ANSWERS

if TYPE_CHECKING:
    from cellstep.nn import Chain

_VERSION = 3
_ALIGNMENT = 64
_HEADER = struct.Struct("<8sIIQ10I")
_RECORD = struct.Struct("<8I4Q")
PACKED = 1  # the layout of csrc/core/pack.h; those of narrow weights follow


class Kind(IntEnum):
    """Of a record."""

    INPUT_SCALING = 1
    LSTM = 2
    DENSE = 3
    OUTPUT_SCALING = 4
    FEATURE_NAMES = 5
    OUTPUT_NAMES = 6
    TEST_VECTOR = 7
    SKIP = 8


class Flag(IntFlag):
    """What an LSTM record has."""

    BIDIRECTIONAL = 1
    PEEPHOLE = 2
    LAYER_NORM = 4
    COUPLED = 8
    RESIDUAL = 16
    INITIAL = 32
    CELLS = 64
    FAST = 128


@dataclass
class Record:
    kind: int
    sizes: tuple[int, ...]
    content: bytes
    layout: int = 0
    flags: int = 0
    activations: int = 0


def assemble(model: "Chain | SimpleNamespace", records: list[Record]) -> bytes:
    """The file of a model with these records; of the model dtype, sizes, window, horizon and answers."""
    offset = _HEADER.size + _RECORD.size * len(records)
    table = b""
    data = b""
    for record in records:
        data += bytes(-(offset + len(data)) % _ALIGNMENT)
        sizes = (*record.sizes, *[0] * (4 - len(record.sizes)))
        numbers = (record.kind, record.layout, *sizes, record.flags, record.activations)
        table += _RECORD.pack(*numbers, offset + len(data), len(record.content), 0, 0)
        data += record.content
    body = table + data

    def header(checksum: int) -> bytes:
        return _HEADER.pack(
            b"CELLSTEP",
            _VERSION,
            checksum,
            _HEADER.size + len(body),
            len(records),
            1 if model.dtype == torch.float64 else 0,
            model.input_size,
            model.output_size,
            model.state_layers,
            model.h_size,
            model.c_size,
            model.window,
            model.horizon,
            ANSWERS.index(model.answers),
        )

    return header(zlib.crc32(header(0) + body)) + body


def parse(data: bytes) -> tuple[SimpleNamespace, list[Record]]:
    """What :func:`assemble` made a file of, which is taken to be whole."""
    _, _, _, _, count, dtype, *rest, answers = _HEADER.unpack_from(data)
    names = ("input_size", "output_size", "state_layers", "h_size", "c_size", "window", "horizon")
    model = SimpleNamespace(
        dtype=torch.float64 if dtype else torch.float32,
        answers=ANSWERS[answers],
        **dict(zip(names, rest, strict=True)),
    )
    records = []
    for place in range(count):
        numbers = _RECORD.unpack_from(data, _HEADER.size + _RECORD.size * place)
        kind, layout, *sizes, flags, activations = numbers[:8]
        content = data[numbers[8] : numbers[8] + numbers[9]]
        records.append(Record(kind, tuple(sizes), content, layout, flags, activations))
    return model, records


def words(data: bytes) -> list[int]:
    """What ``run_records`` wants to know of a model whose data lie on a device, as 64-bit words: the header and the
    records of a file, and of each LSTM its cell_clip and its zoneout of h and of c as the bits of doubles."""
    model, records = parse(data)
    size = _HEADER.size + _RECORD.size * len(records)
    values = struct.Struct("<3d" if model.dtype == torch.float64 else "<3f")
    constants = b"".join(
        struct.pack("<3d", *values.unpack(record.content[-values.size :]))
        for record in records
        if record.kind == Kind.LSTM
    )
    table = data[:size] + constants
    return list(struct.unpack(f"<{len(table) // 8}q", table))
