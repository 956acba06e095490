"""Low-precision weights of the deploy file: how they are rounded, and the panels of ``csrc/core/pack.h`` they fill.

int8 weights are rounded by row, in two matrices: the one that the inputs meet, whose columns have taken up the
reciprocals of the inputs' factors, and the one that the hidden values meet. The step of a row is a 127th of its largest
weight, or of its matrix's where that leaves less error: so weights that were 8 bits before, by matrix, stay exact. The
values of a step are rounded as it comes, to 127 steps of the largest, m:

    sum = bias + scale_x * m_x / 127 * sum(q_ih * round(factors * x * 127 / m_x)) + the same of h without factors

(Symmetric quantization as in Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", without zero points; factors as in Xiao et al. 2023, "SmoothQuant".)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cellstep import _runtime

#: In the order of their layouts in the file, the first of which is 1.
WEIGHTS = ("float32", "bfloat16", "float16", "int8")

_Array = NDArray[Any]
_MOST = 127


@dataclass(frozen=True)
class _Int8:
    q_ih: _Array  # (rows, input_size), whole numbers in float32, like q_hh
    q_hh: _Array
    scale_x: _Array  # (rows) float32
    scale_h: _Array


def pack_weights(
    weights: str,
    weight_ih: _Array,
    weight_hh: _Array,
    bias_ih: _Array | None,
    bias_hh: _Array | None,
    coupled: bool,
    factors: _Array | None,
) -> bytes:
    """One direction of a layer in the layout of ``csrc/core/pack.h``; rows of the arguments are gates i, f, g, o.

    ``factors`` (input_size) float32: for int8, what each input is multiplied with before it is rounded.

    Raises:
        ValueError: a weight does not fit the type.
    """
    units = weight_hh.shape[0] // (3 if coupled else 4)
    inputs, recurrent = weight_ih.shape[1], weight_hh.shape[1]
    if weights == "float32":
        packed: bytes = _runtime.pack_layer(weight_ih, weight_hh, bias_ih, bias_hh, coupled).tobytes()
        return packed
    if weights != "int8":
        ih, hh = (rounded(weights, weight) for weight in (weight_ih, weight_hh))
        flat = _runtime.pack_layer(ih, hh, bias_ih, bias_hh, coupled)
        return b"".join(
            panel[0].tobytes() + _halves(weights, panel[1:]).tobytes()
            for panel in _panels(flat, units, 1 + inputs + recurrent)
        )
    assert factors is not None
    q = _int8(weight_ih, weight_hh, factors)
    # The scales travel through the packing as two more inputs.
    wide = np.concatenate([q.scale_x[:, None], q.scale_h[:, None], q.q_ih], 1)
    flat = _runtime.pack_layer(wide, q.q_hh, bias_ih, bias_hh, coupled)
    data = np.pad(factors, (0, -len(factors) % 16)).tobytes()
    for panel in _panels(flat, units, 3 + inputs + recurrent):
        parts = [panel[3 : 3 + inputs], panel[3 + inputs :]]
        data += panel[:3].tobytes()
        data += b"".join((-128 * part.sum(0)).astype(np.int32).tobytes() for part in parts)
        for part in parts:
            whole = np.pad(part, ((0, -len(part) % 4), (0, 0))).astype(np.int8)
            data += whole.reshape(-1, 4, panel.shape[1]).swapaxes(1, 2).tobytes()
    return data


def rounded(weights: str, weight: _Array) -> _Array:
    """A matrix as bfloat16 or float16 store it, in its own dtype; ValueError if that cannot hold a weight."""
    if weights == "float32":
        return weight
    dtype = torch.bfloat16 if weights == "bfloat16" else torch.float16
    values: _Array = torch.from_numpy(weight).to(dtype).double().numpy().astype(weight.dtype)
    if not np.isfinite(values).all():
        largest = np.abs(weight).max()
        raise ValueError(
            f"expected weights that {weights} can hold; got one of {largest:.6g}; choose int8 or leave them"
        )
    return values


def _halves(weights: str, values: _Array) -> _Array:
    if weights == "float16":
        return values.astype(np.float16)
    upper: _Array = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
    return upper


def _int8(weight_ih: _Array, weight_hh: _Array, factors: _Array) -> _Int8:
    q_ih, scale_x = _rows(weight_ih / factors.astype(np.float64))
    q_hh, scale_h = _rows(weight_hh.astype(np.float64))
    return _Int8(q_ih, q_hh, scale_x, scale_h)


def int8_error(weight_ih: _Array, factors: _Array, x: _Array) -> float:
    """Mean square error of x (n, inputs) times the transposed weights (rows, inputs) as an int8 layer forms it."""
    q, scale = _rows(weight_ih / factors.astype(np.float64))
    scaled = x * factors.astype(np.float64)
    step = np.abs(scaled).max(1, keepdims=True) / _MOST
    whole = np.rint(scaled / np.where(step > 0, step, 1))
    product = step * (whole @ q.T) * scale
    return float(np.square(product - x @ weight_ih.T.astype(np.float64)).mean())


def _rows(weight: _Array) -> tuple[_Array, _Array]:
    """Whole numbers and the scale of each row."""
    own = _whole(weight, np.abs(weight).max(1))
    common = _whole(weight, np.full(len(weight), np.abs(weight).max()))
    errors = [np.square(whole * scale[:, None].astype(np.float64) - weight).sum(1) for whole, scale in (own, common)]
    take = errors[1] < errors[0]
    return np.where(take[:, None], common[0], own[0]).astype(np.float32), np.where(take, common[1], own[1])


def _whole(weight: _Array, largest: _Array) -> tuple[_Array, _Array]:
    scale = (largest / _MOST).astype(np.float32)
    divisor = np.where(scale > 0, scale, 1).astype(np.float64)
    return np.clip(np.rint(weight / divisor[:, None]), -_MOST, _MOST), scale


def _panels(flat: _Array, units: int, rows: int) -> Iterator[_Array]:
    """The panels of a packed float layer, (rows, 4 * width) each."""
    at = 0
    while units > 0:
        width = 16 if units > 12 else 8 if units > 4 else 4
        yield flat[at : at + rows * 4 * width].reshape(rows, 4 * width)
        at += rows * 4 * width
        units -= width
