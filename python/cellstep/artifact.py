"""Running any artifact from Python, all by the same calls on NumPy arrays."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellstep import _runtime

Array = NDArray[Any]
State = tuple[Array, Array]


class Artifact(ABC):
    """A model out of a file. State is (h, c), (num_layers, N, hidden_size) each."""

    def __init__(self, path: str, source: Any) -> None:
        self.path = path
        self.input_size: int = source.input_size
        self.output_size: int = source.output_size
        self.num_layers: int = source.num_layers
        self.hidden_size: int = source.hidden_size
        self.feature_names: list[str] = list(source.feature_names)
        self.output_names: list[str] = list(source.output_names)
        self.window: int = source.window
        self.horizon: int = source.horizon
        self.dtype: np.dtype[Any] = np.dtype(np.float32)

    def initial_state(self, batch_size: int) -> State:
        """The zero state of ``batch_size`` streams."""
        shape = (self.num_layers, batch_size, self.hidden_size)
        return np.zeros(shape, self.dtype), np.zeros(shape, self.dtype)

    @overload
    def __call__(self, x: ArrayLike) -> Array: ...
    @overload
    def __call__(self, x: ArrayLike, state: tuple[ArrayLike, ArrayLike]) -> tuple[Array, State]: ...
    def __call__(self, x: ArrayLike, state: tuple[ArrayLike, ArrayLike] | None = None) -> Array | tuple[Array, State]:
        """Forecast from whole windows: (N, T, input_size) gives (N, output_size).

        With a state, the windows go on from there, and the answer is the forecast and the state behind it.
        """
        windows = self._checked(x, 3)
        if windows.shape[1] == 0:
            raise ValueError("expected windows of at least one step; got none")
        if state is None:
            return self._forecast(windows, self.initial_state(len(windows)))[0]
        return self._forecast(windows, self._checked_state(state, len(windows)))

    def run(self, x: ArrayLike, state: tuple[ArrayLike, ArrayLike]) -> tuple[Array, State]:
        """Carry streams on: (N, T, input_size) and a state give (N, T, output_size) and a state."""
        steps = self._checked(x, 3)
        start = self._checked_state(state, len(steps))
        if steps.shape[1] == 0:
            return np.zeros((len(steps), 0, self.output_size), self.dtype), start
        return self._run(steps, start)

    def step(self, x: ArrayLike, state: tuple[ArrayLike, ArrayLike]) -> tuple[Array, State]:
        """Carry streams one step on: (N, input_size) and a state give (N, output_size) and a state."""
        y, state = self.run(self._checked(x, 2)[:, None], state)
        return y[:, 0], state

    @abstractmethod
    def _run(self, x: Array, state: State) -> tuple[Array, State]: ...

    def _forecast(self, x: Array, state: State) -> tuple[Array, State]:
        y, state = self._run(x, state)
        return y[:, -1], state

    def _checked(self, x: ArrayLike, dims: int) -> Array:
        array = np.ascontiguousarray(x, self.dtype)
        if array.ndim != dims or array.shape[-1] != self.input_size:
            expected = f"(N, T, {self.input_size})" if dims == 3 else f"(N, {self.input_size})"
            raise ValueError(f"expected x of shape {expected}; got {array.shape}; check the features")
        return array

    def _checked_state(self, state: tuple[ArrayLike, ArrayLike], batch_size: int) -> State:
        h, c = (np.ascontiguousarray(part, self.dtype) for part in state)
        expected = (self.num_layers, batch_size, self.hidden_size)
        for name, part in (("h", h), ("c", c)):
            if part.shape != expected:
                raise ValueError(f"expected {name} of shape {expected}; got {part.shape}; see initial_state")
        return h, c


class TorchArtifact(Artifact):
    """A module in torch: a loaded ``.pt``, or the eager model of a ``.safetensors``."""

    def __init__(self, path: str, source: Any, module: Any, dtype: str) -> None:
        super().__init__(path, source)
        self.module = module
        self.dtype = np.dtype(dtype)

    def _run(self, x: Array, state: State) -> tuple[Array, State]:
        import torch

        with torch.inference_mode():
            y, (h, c) = self.module.run(torch.tensor(x), (torch.tensor(state[0]), torch.tensor(state[1])))
        return y.numpy(), (h.numpy(), c.numpy())


class DeployArtifact(Artifact):
    """A deploy file on the torch-free runtime: the rows of a batch one after another through one session."""

    def __init__(self, path: str) -> None:
        model = _runtime.Model.from_file(path)
        super().__init__(path, model)
        self.session = _runtime.Session(model)

    def selftest(self) -> float:
        """Replay the test vector of the file; see :meth:`cellstep.runtime.Session.selftest`."""
        return self.session.model.selftest()

    def _run(self, x: Array, state: State) -> tuple[Array, State]:
        return self._rows(x, state, self.session.run, (len(x), x.shape[1], self.output_size))

    def _forecast(self, x: Array, state: State) -> tuple[Array, State]:
        return self._rows(x, state, self.session.forecast, (len(x), self.output_size))

    def _rows(self, x: Array, state: State, call: Any, shape: tuple[int, ...]) -> tuple[Array, State]:
        y = np.empty(shape, self.dtype)
        h, c = (part.copy() for part in state)
        for row in range(len(x)):
            self.session.state = (h[:, row], c[:, row])
            y[row] = call(x[row])
            h[:, row], c[:, row] = self.session.state
        return y, (h, c)


def load(path: str | os.PathLike[str]) -> Artifact:
    """Load an artifact by its suffix: ``.pt``, ``.cellstep`` or ``.safetensors``.

    Raises:
        OSError: the file cannot be read.
        ValueError: the suffix is unknown, or the file is not what its suffix says.
    """
    name = os.fspath(path)
    suffix = Path(name).suffix
    if suffix == ".cellstep":
        return DeployArtifact(name)
    if suffix == ".pt":
        import cellstep.ops  # noqa: F401  (registers the operators that the archive calls)
        from cellstep.exporters.torchscript import load_torchscript

        module = load_torchscript(name)
        dtype = module.initial_state(1)[0].dtype
        return TorchArtifact(name, module, module, str(dtype).removeprefix("torch."))
    if suffix == ".safetensors":
        from cellstep.exporters import load_model

        model = load_model(name).eval()
        if str(model.head.weight.dtype) not in ("torch.float32", "torch.float64"):
            model = model.float()  # NumPy has no bfloat16
        dtype = model.head.weight.dtype
        return TorchArtifact(name, model, model, str(dtype).removeprefix("torch."))
    raise ValueError(f"expected a file that ends in .pt, .cellstep or .safetensors; got '{name}'; name an artifact")
