"""The ``.cellstep`` deploy file; its format is described in ``csrc/core/image.h``."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellstep import _runtime
from cellstep.exporters.files import replacing
from cellstep.nn import Forecaster

_VERSION = 1
_ALIGNMENT = 64
_PACKED = 1  # the layout of csrc/core/pack.h
_INPUT_SCALING, _LSTM, _DENSE, _OUTPUT_SCALING, _FEATURE_NAMES, _OUTPUT_NAMES, _TEST_VECTOR = range(1, 8)
_TEST_STEPS = 16
#: Largest error that a self-test allows, relative to the largest output and its scale: float32 leaves some 1e-7 a
#: step, and a wrong weight or a broken kernel gives far more.
_TEST_TOLERANCE = 1e-5

_Array = NDArray[Any]
_Record = tuple[int, int, tuple[int, ...], bytes]


def export_deploy(model: Forecaster, path: Path) -> None:
    """Write the deploy file of a float32 model. ValueError for another dtype or for weights that are not finite."""
    if model.head.weight.dtype != torch.float32:
        raise ValueError(
            f"expected a float32 model for a deploy file; got {model.head.weight.dtype}; use model.float()"
        )
    data = image(model)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def image(model: Forecaster) -> bytes:
    """The bytes of a deploy file: packed weights, scaling, names and a test vector, in the model's own dtype."""
    lstm = model.lstm
    records: list[_Record] = [
        (_INPUT_SCALING, 0, (model.input_size,), _bytes(model.input_offset, model.input_scale)),
    ]
    for layer in range(model.num_layers):
        inputs = model.input_size if layer == 0 else model.hidden_size
        weights = [_array(getattr(lstm, f"{kind}_l{layer}")) for kind in ("weight_ih", "weight_hh")]
        biases = [_array(getattr(lstm, f"{kind}_l{layer}")) if lstm.bias else None for kind in ("bias_ih", "bias_hh")]
        packed = _runtime.pack_layer(*weights, *biases)
        records.append((_LSTM, _PACKED, (inputs, model.hidden_size), packed.tobytes()))
    head = _runtime.pack_dense(_array(model.head.weight), _array(model.head.bias))
    records.append((_DENSE, _PACKED, (model.hidden_size, model.output_size), head.tobytes()))
    records.append((_OUTPUT_SCALING, 0, (model.output_size,), _bytes(model.output_offset, model.output_scale)))
    for kind, names in ((_FEATURE_NAMES, model.feature_names), (_OUTPUT_NAMES, model.output_names)):
        if names:
            records.append((kind, 0, (len(names),), _encode(names)))
    records.append((_TEST_VECTOR, 0, (_TEST_STEPS,), _test_vector(model)))
    return _assemble(model, records)


def _array(tensor: Tensor) -> _Array:
    array: _Array = tensor.detach().cpu().contiguous().numpy()
    if not np.isfinite(array).all():
        raise ValueError("expected finite weights; got NaN or infinity in the model; train it again")
    return array


def _bytes(*tensors: Tensor) -> bytes:
    return b"".join(_array(tensor).tobytes() for tensor in tensors)


def _encode(names: list[str]) -> bytes:
    for name in names:
        if "\0" in name:
            raise ValueError(f"expected column names without zero bytes; got {name!r}; rename the column")
    return b"".join(name.encode() + b"\0" for name in names)


def _test_vector(model: Forecaster) -> bytes:
    """Tolerance, input and expected output, the last from torch's own operators in float64."""
    reference = model.reference().cpu().double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_TEST_STEPS, model.input_size, generator=generator, dtype=torch.float64)
    spread = torch.where(reference.input_scale == 0, 1.0, 1.0 / reference.input_scale)
    dtype = model.head.weight.dtype
    x = (reference.input_offset + noise * spread).to(dtype)
    with torch.no_grad():
        y, _ = reference.run(x.double().unsqueeze(0), reference.initial_state(1))
    tolerance = _TEST_TOLERANCE * (y.abs().max() + reference.output_scale.abs().max())
    return _bytes(tolerance.to(dtype).reshape(1), x, y.to(dtype))


def _assemble(model: Forecaster, records: list[_Record]) -> bytes:
    offset = 64 + 64 * len(records)
    table = b""
    data = b""
    for kind, layout, sizes, content in records:
        padding = -(offset + len(data)) % _ALIGNMENT
        data += bytes(padding)
        padded_sizes = (*sizes, *[0] * (4 - len(sizes)))
        table += struct.pack("<6IQ2Q2Q", kind, layout, *padded_sizes, 0, offset + len(data), len(content), 0, 0)
        data += content
    body = table + data

    def header(checksum: int) -> bytes:
        return struct.pack(
            "<8sIIQ8IQ",
            b"CELLSTEP",
            _VERSION,
            checksum,
            64 + len(body),
            len(records),
            1 if model.head.weight.dtype == torch.float64 else 0,
            model.input_size,
            model.output_size,
            model.num_layers,
            model.hidden_size,
            model.window,
            model.horizon,
            0,
        )

    return header(zlib.crc32(header(0) + body)) + body
