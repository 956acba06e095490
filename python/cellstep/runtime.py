"""Run a ``.cellstep`` deploy file on NumPy arrays. Importing this module imports no torch.

>>> session = Session("forecaster.cellstep")
>>> y = session.step(x)      # one step of a stream; the session carries the state
>>> pool = Pool("forecaster.cellstep", 100)
>>> y = pool.step(x, reset)  # one step of a hundred streams, some of them begun anew

What is fed may be anything that NumPy makes an array of. C-contiguous float32 values are read where they lie, whoever
owns them: an ``ndarray``, an ``array.array("f")``, a ``memoryview``, a tensor on the CPU. Anything else is converted
into a copy. Answers are new NumPy arrays, or lie in ``out``, where a call is given a writable buffer of their shape;
that is returned then. NumPy is imported by the first call that needs it, so not by one from buffer to buffer.
"""

from __future__ import annotations

import os

from cellstep import _runtime
from cellstep._runtime import ModelError, instruction_set

TYPE_CHECKING = False  # as type checkers know it, without the module typing
if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    Float32Array = NDArray[np.float32]
    #: What a model is made from: the path of a deploy file, its bytes, or the ``model`` of another session or pool.
    Source = str | os.PathLike[str] | bytes | _runtime.Model

__all__ = ["ModelError", "Pool", "Session", "instruction_set"]


def _load(source: Source, allow_nonfinite: bool) -> _runtime.Model:
    if isinstance(source, _runtime.Model):
        return source
    if isinstance(source, bytes):
        return _runtime.Model.from_bytes(source, allow_nonfinite)
    return _runtime.Model.from_file(os.fspath(source), allow_nonfinite)


class Session:
    """One stream through a model, with the state (h, c) of every layer, zero at first.

    Several sessions may share the model that another one loaded: ``Session(other.model)``. A session belongs to one
    thread at a time; different sessions may run at once, as every call releases the GIL.

    Args:
        source: path of a deploy file, its bytes, or the ``model`` of another session. A regular file is mapped into
            memory and not read, so it must not change while the model lives; rename a new one over it, as
            :func:`cellstep.export` does.
        threads: how many threads share the work of a call, this session's own. It pays for long runs of several layers,
            for bidirectional models and for layers of hundreds of units; the numbers stay the same to the bit.
        allow_nonfinite: take a file whose weights are NaN or infinite, which is refused otherwise.

    Raises:
        ValueError: ``threads`` is not between 1 and 1024.
        OSError: the file cannot be read.
        ModelError: the file is damaged, of another version, or no deploy file; a ValueError.
        RuntimeError: in any call: the session is in a call on another thread.
    """

    def __init__(self, source: Source, threads: int = 1, *, allow_nonfinite: bool = False) -> None:
        self._use(_load(source, allow_nonfinite))
        self._session = _runtime.Session(self.model, threads)

    def _use(self, model: _runtime.Model) -> None:
        self.model = model
        self.input_size = self.model.input_size
        self.output_size = self.model.output_size
        self.state_layers = self.model.num_layers
        self.h_size = self.model.h_size
        self.c_size = self.model.hidden_size
        self.answers = ("every", "last", "hidden")[self.model.answers]
        self.feature_names = self.model.feature_names
        self.output_names = self.model.output_names
        self.window = self.model.window
        self.horizon = self.model.horizon
        self.weights = self.model.weights

    def step(self, x: ArrayLike, out: Any = None) -> Float32Array:
        """Move one step: x (input_size) gives y (output_size). ValueError for another shape."""
        return self._session.step(x, out)

    def run(self, x: ArrayLike, reset: ArrayLike | None = None, out: Any = None) -> Float32Array:
        """Move T steps: x (T, input_size) gives y (T, output_size), to the bit what T calls of step give.

        Where ``reset`` (T, bool) is set, the state is put to the initial one before the step. A bidirectional model
        sees the T steps as the whole sequence.
        """
        return self._session.run(x, reset, out)

    def forecast(self, x: ArrayLike, out: Any = None) -> Float32Array:
        """Answer a window: x (T, input_size) gives y (output_size). T must be at least 1.

        The output of the last step, or what the heads make of the last hidden state if the model was made so.
        """
        return self._session.forecast(x, out)

    def start_slide(self, window: int | None = None) -> None:
        """Begin a sliding window of the last ``window`` steps, by default the model's own, or begin it anew.

        Raises:
            ValueError: ``window`` is not between 1 and 2**24, or is left out and the model names none.
        """
        if window is not None and window < 1:
            raise ValueError(f"expected a window of at least one step, got {window}")
        self._session.start_slide(window or 0)

    def slide(self, x: ArrayLike, out: Any = None) -> Float32Array | None:
        """Move the window one step: x (input_size), its newest step, gives y (output_size).

        None until as many steps have come as the window has. Then y is to the bit what ``forecast`` gives for the last
        T steps from the initial state; what hangs on a step alone, up to the input part of the first LSTM layer, is
        computed once and kept. The state that ``step`` carries is neither read nor changed. The first call begins a
        window as ``start_slide()`` does.

        Raises:
            ValueError: x has another shape, or the model names no window and ``start_slide`` was not called.
        """
        return self._session.slide(x, out)

    def reset(self) -> None:
        """Put the state to the initial one, zero or learned."""
        self._session.reset()

    def swap(self, source: Source, *, allow_nonfinite: bool = False) -> None:
        """Go on with another model of the same shape, as between two steps of a stream.

        The state stays, the initial one becomes the new model's, and a sliding window begins anew.

        Args:
            source: see above; a model that another session has loaded makes this a matter of a microsecond.

        Raises:
            ValueError: the models differ in sizes, in their layers, or in how weights are stored; nothing changes then.
            OSError, ModelError: as above.
        """
        model = _load(source, allow_nonfinite)
        self._session.swap(model)
        self._use(model)

    @property
    def state(self) -> tuple[Float32Array, Float32Array]:
        """Copies of h (state_layers, h_size) and c (state_layers, c_size). Assign a pair to set them."""
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


class Pool:
    """Many streams through one model, which move together: for simulators and servers of many voices.

    Each stream has its own state, zero at first, and gets the numbers that a :class:`Session` of its own would give it,
    to the bit. ``torch.ops.cellstep.run_model`` gives the same for a batch, with the state given and returned.

    Args:
        source: as for :class:`Session`.
        streams: how many, 1 to 2**24.
        threads: how many threads share the work of a call, this pool's own; the numbers stay the same to the bit.
        allow_nonfinite: as for :class:`Session`.

    Raises:
        ValueError: ``streams`` or ``threads`` is out of range, or the model is bidirectional, which answers whole
            sequences and not step by step.
        OSError, ModelError, RuntimeError: as for :class:`Session`.
    """

    def __init__(self, source: Source, streams: int, threads: int = 1, *, allow_nonfinite: bool = False) -> None:
        self.model = _load(source, allow_nonfinite)
        self._pool = _runtime.Pool(self.model, streams, threads)
        self.streams = streams
        self.input_size = self.model.input_size
        self.output_size = self.model.output_size

    def step(self, x: ArrayLike, reset: ArrayLike | None = None, out: Any = None) -> Float32Array:
        """Move every stream one step: x (streams, input_size) gives y (streams, output_size).

        Where ``reset`` (streams, bool) is set, the state of the stream is put to the initial one before. ValueError for
        another shape.
        """
        return self._pool.step(x, reset, out)

    def reset(self) -> None:
        """Put the state of every stream to the initial one, zero or learned."""
        self._pool.reset()

    def state(self, stream: int) -> tuple[Float32Array, Float32Array]:
        """Copies of h (state_layers, h_size) and c (state_layers, c_size) of one stream. IndexError without it."""
        return self._pool.state(stream)

    def set_state(self, stream: int, state: tuple[ArrayLike, ArrayLike]) -> None:
        """Set the state of one stream, such as that of a session. IndexError or ValueError if it does not fit."""
        self._pool.set_state(stream, state)
