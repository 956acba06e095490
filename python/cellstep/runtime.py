"""Run a ``.cellstep`` deploy file on NumPy arrays. Importing this module imports no torch.

>>> session = Session("forecaster.cellstep")
>>> y = session.step(x)      # one step of a stream; the session carries the state
"""

import os

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellstep import _runtime
from cellstep._runtime import ModelError, instruction_set

__all__ = ["ModelError", "Session", "instruction_set"]

Float32Array = NDArray[np.float32]


class Session:
    """One stream through a model, with the state (h, c) of every layer, zero at first.

    Several sessions may share the model that another one loaded: ``Session(other.model)``. A session belongs to one
    thread at a time; different sessions may run at once, as every call releases the GIL.

    Args:
        source: path of a deploy file, its bytes, or the ``model`` of another session.

    Raises:
        OSError: the file cannot be read.
        ModelError: the file is damaged, of another version, or no deploy file; a ValueError.
    """

    def __init__(self, source: "str | os.PathLike[str] | bytes | _runtime.Model") -> None:
        if isinstance(source, _runtime.Model):
            self.model = source
        elif isinstance(source, bytes):
            self.model = _runtime.Model.from_bytes(source)
        else:
            self.model = _runtime.Model.from_file(os.fspath(source))
        self._session = _runtime.Session(self.model)

    def step(self, x: ArrayLike) -> Float32Array:
        """Move one step: x (input_size) gives y (output_size). ValueError for another shape."""
        return self._session.step(x)

    def run(self, x: ArrayLike) -> Float32Array:
        """Move T steps: x (T, input_size) gives y (T, output_size), to the bit what T calls of step give."""
        return self._session.run(x)

    def forecast(self, x: ArrayLike) -> Float32Array:
        """Like :meth:`run`, but y (output_size) is the output of the last step alone. T must be at least 1."""
        return self._session.forecast(x)

    def reset(self) -> None:
        """Set all states to zero."""
        self._session.reset()

    @property
    def state(self) -> tuple[Float32Array, Float32Array]:
        """Copies of h and c, (num_layers, hidden_size) each. Assign a pair to set them."""
        return self._session.state

    @state.setter
    def state(self, value: tuple[ArrayLike, ArrayLike]) -> None:
        self._session.state = value

    def selftest(self) -> float:
        """Replay the test vector of the file; its largest error in the output's units, -1 without a test vector.

        Raises:
            ModelError: the error is past the tolerance in the file.
        """
        return self.model.selftest()
