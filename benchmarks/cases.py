"""One row as a problem: weights, input and the answer that torch gives in float64."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rows import Row
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

#: Largest error an answer may have, over the largest value of the right one. A sum of several hundred products in
#: float32 rounds to some 1e-6 and a hundred steps do not add to it much, as a cell forgets; the other types have 8 and
#: 11 bits where float32 has 24; int8 rounds a weight to a 127th of the largest of its row.
TOLERANCE = {"float32": 2e-5, "float64": 1e-12, "bfloat16": 5e-2, "float16": 5e-3, "int8": 0.15}
#: The same for gradients, which are sums over all tokens.
GRADIENT_TOLERANCE = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 0.2}


class Wrong(Exception):
    """An answer that is not the right one."""


@dataclass
class Way:
    """One way of running a row.

    Attributes:
        call: does it once.
        answer: what a result of ``call`` says, (batch, time, outputs) in float64.
        dtype: what it computes in.
    """

    call: Callable[[], Any]
    answer: Callable[[Any], NDArray[np.float64]]
    dtype: str = "float32"


class Case:
    """The weights of a row are torch's own draw from seed 0; its input is standard normal."""

    def __init__(self, row: Row) -> None:
        self.row = row
        torch.manual_seed(0)
        self.module = nn.LSTM(row.inputs, row.hidden, row.layers, batch_first=True, proj_size=row.proj).eval()
        self.x = torch.randn(row.batch, row.time, row.inputs)
        self.lengths = torch.tensor(row.lengths)
        self.target = torch.randn(row.batch, row.time, row.proj or row.hidden)
        with torch.no_grad(), quiet():
            y, _ = self.copy(torch.float64)(self.packed(self.x.double()) if row.packed else self.x.double())
        self.truth = unpacked(y).numpy()

    def copy(self, dtype: torch.dtype = torch.float32) -> nn.LSTM:
        """torch's module with the weights of this case."""
        return self.fill(nn.LSTM(**self.sizes, batch_first=True, dtype=dtype)).eval()

    def fill(self, module: Any) -> Any:
        """The same module, with the weights of this case."""
        module.load_state_dict(self.module.state_dict())
        return module

    @property
    def sizes(self) -> dict[str, int]:
        row = self.row
        sizes = {"input_size": row.inputs, "hidden_size": row.hidden, "num_layers": row.layers}
        return sizes | ({"proj_size": row.proj} if row.proj else {})

    @property
    def time_first(self) -> NDArray[np.float32]:
        """The input as ONNX has it, (time, batch, inputs)."""
        return np.ascontiguousarray(self.x.transpose(0, 1).numpy())

    def packed(self, values: Tensor) -> PackedSequence:
        return pack_padded_sequence(values, self.lengths, batch_first=True)

    def check(self, y: NDArray[np.float64], dtype: str) -> float:
        """The error of an answer. Wrong if it is past the tolerance."""
        if y.shape != self.truth.shape:
            raise Wrong(f"wrong answer: expected shape {self.truth.shape}; got {y.shape}")
        error = float(np.abs(y - self.truth).max() / np.abs(self.truth).max())
        if not error <= TOLERANCE[dtype]:
            raise Wrong(f"wrong answer: expected an error of at most {TOLERANCE[dtype]:g} in {dtype}; got {error:.3g}")
        return error


def unpacked(y: Tensor | PackedSequence) -> Tensor:
    """(batch, time, outputs), zero past the end of a row."""
    return pad_packed_sequence(y, batch_first=True)[0] if isinstance(y, PackedSequence) else y


def as_array(y: Tensor | PackedSequence) -> NDArray[np.float64]:
    values: NDArray[np.float64] = unpacked(y).detach().double().numpy()
    return values


@contextmanager
def quiet() -> Iterator[None]:
    """torch's deprecations and hints are no news here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
