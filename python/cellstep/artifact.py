"""Running any artifact from Python, all by the same calls on NumPy arrays."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellstep.runtime import Session

Array = NDArray[Any]
State = tuple[Array, Array]


class Artifact(ABC):
    """A model out of a file. State is (h, c), h (state_layers, N, h_size) and c (state_layers, N, c_size)."""

    bidirectional = False  #: whether no call for a part of a sequence can stand for the whole

    def __init__(self, path: str, source: Any) -> None:
        self.path = path
        self.input_size: int = source.input_size
        self.output_size: int = source.output_size
        self.state_layers: int = source.state_layers
        self.h_size: int = source.h_size
        self.c_size: int = source.c_size
        self.answers: str = source.answers
        self.feature_names: list[str] = list(source.feature_names)
        self.output_names: list[str] = list(source.output_names)
        self.window: int = source.window
        self.horizon: int = source.horizon
        self.dtype: np.dtype[Any] = np.dtype(np.float32)
        self._weights: str = getattr(source, "weights", "")

    @property
    def weights(self) -> str:
        """How the weights of LSTM layers are stored: "bfloat16", "float16" or "int8" if quantized, else the dtype."""
        return self._weights or str(self.dtype)

    @property
    def num_layers(self) -> int:
        """Rows of the state: layers times directions, or 1 where their sizes differ."""
        return self.state_layers

    @property
    def hidden_size(self) -> int:
        """Values in a row of c."""
        return self.c_size

    def initial_state(self, batch_size: int) -> State:
        """The state of ``batch_size`` fresh streams, zero or learned."""
        h, c = self._initial()
        return np.repeat(h, batch_size, axis=1), np.repeat(c, batch_size, axis=1)

    def reset(self, state: tuple[ArrayLike, ArrayLike], mask: ArrayLike) -> State:
        """The state with the rows of ``mask`` (N, bool) put to the initial one."""
        rows = np.asarray(mask, bool)
        old = self._checked_state(state, len(rows))
        fresh = self.initial_state(len(rows))
        chosen = rows[None, :, None]
        return np.where(chosen, fresh[0], old[0]), np.where(chosen, fresh[1], old[1])

    @overload
    def __call__(self, x: ArrayLike, *, lengths: ArrayLike | None = None) -> Array: ...
    @overload
    def __call__(
        self, x: ArrayLike, state: tuple[ArrayLike, ArrayLike], *, lengths: ArrayLike | None = None
    ) -> tuple[Array, State]: ...
    def __call__(
        self, x: ArrayLike, state: tuple[ArrayLike, ArrayLike] | None = None, *, lengths: ArrayLike | None = None
    ) -> Array | tuple[Array, State]:
        """Answer whole windows: (N, T, input_size) gives (N, output_size), or (N, T, output_size) for every step.

        With a state, the windows go on from there, and the answer comes with the state behind it. ``lengths`` (N): the
        steps of each row, 0 allowed.
        """
        windows = self._checked(x, 3)
        if windows.shape[1] == 0:
            raise ValueError("expected windows of at least one step; got none")
        if lengths is None:
            return (
                self._window(windows)
                if state is None
                else self._answer(windows, self._checked_state(state, len(windows)))
            )
        start = self.initial_state(len(windows)) if state is None else self._checked_state(state, len(windows))
        y, end = self._answer_ragged(windows, start, np.asarray(lengths))
        return y if state is None else (y, end)

    def run(
        self, x: ArrayLike, state: tuple[ArrayLike, ArrayLike], reset: ArrayLike | None = None
    ) -> tuple[Array, State]:
        """Carry streams on: (N, T, input_size) and a state give (N, T, output_size) and a state.

        ``reset`` (N, T) bool: rows whose state is put to the initial one before the step. ValueError: the model is
        bidirectional, and a file of its kind cannot part a sequence.
        """
        steps = self._checked(x, 3)
        carried = self._checked_state(state, len(steps))
        marks = None if reset is None else np.asarray(reset, bool)
        if marks is not None and marks.shape != steps.shape[:2]:
            raise ValueError(
                f"expected reset of shape {steps.shape[:2]}; got {marks.shape}; give a flag a row and step"
            )
        if steps.shape[1] == 0:
            return np.zeros((*steps.shape[:2], self.output_size), self.dtype), carried
        if marks is None or not marks.any():
            return self._run(steps, carried)
        return self._run_parted(steps, carried, marks)

    def step(self, x: ArrayLike, state: tuple[ArrayLike, ArrayLike]) -> tuple[Array, State]:
        """Carry streams one step on: (N, input_size) and a state give (N, output_size) and a state."""
        y, state = self.run(self._checked(x, 2)[:, None], state)
        return y[:, 0], state

    @abstractmethod
    def _initial(self) -> State:
        """The state of one fresh stream."""

    @abstractmethod
    def _run(self, x: Array, state: State) -> tuple[Array, State]:
        """Every step of at least one."""

    def _run_parted(self, x: Array, state: State, reset: Array) -> tuple[Array, State]:
        """Every step, with resets: a call for each stretch between them."""
        if self.bidirectional:
            raise ValueError(
                f"expected no reset for '{self.path}', as its model is bidirectional; got one; "
                "run each sequence by itself, or export as .pt or .cellstep"
            )
        y = np.empty((*x.shape[:2], self.output_size), self.dtype)
        cuts = [0, *(k for k in np.flatnonzero(reset.any(0)) if k), x.shape[1]]
        for begin, end in pairwise(cuts):
            if reset[:, begin].any():
                state = self.reset(state, reset[:, begin])
            y[:, begin:end], state = self._run(x[:, begin:end], state)
        return y, state

    def _window(self, x: Array) -> Array:
        return self._answer(x, self.initial_state(len(x)))[0]

    @abstractmethod
    def _answer(self, x: Array, state: State) -> tuple[Array, State]:
        """What the model was made to answer, from windows of one length."""

    def _answer_ragged(self, x: Array, state: State, lengths: Array) -> tuple[Array, State]:
        """Rows of one length together: no bit of a row hangs on the others."""
        if lengths.shape != x.shape[:1] or lengths.min(initial=0) < 0 or lengths.max(initial=0) > x.shape[1]:
            raise ValueError(
                f"expected {len(x)} lengths from 0 to {x.shape[1]}; got {lengths.tolist()}; give the steps of each row"
            )
        every = self.answers == "every"
        y = np.zeros((len(x), *([x.shape[1]] if every else []), self.output_size), self.dtype)
        h, c = (part.copy() for part in state)
        for length in np.unique(lengths[lengths > 0]):
            rows = lengths == length
            answer, (h[:, rows], c[:, rows]) = self._answer(x[rows, :length], (h[:, rows], c[:, rows]))
            if every:
                y[rows, :length] = answer
            else:
                y[rows] = answer
        return y, (h, c)

    def _checked(self, x: ArrayLike, dims: int) -> Array:
        array = np.ascontiguousarray(x, self.dtype)
        if array.ndim != dims or array.shape[-1] != self.input_size:
            expected = f"(N, T, {self.input_size})" if dims == 3 else f"(N, {self.input_size})"
            raise ValueError(f"expected x of shape {expected}; got {array.shape}; check the features")
        return array

    def _checked_state(self, state: tuple[ArrayLike, ArrayLike], batch_size: int) -> State:
        h, c = (np.ascontiguousarray(part, self.dtype) for part in state)
        for name, part, size in (("h", h, self.h_size), ("c", c, self.c_size)):
            expected = (self.state_layers, batch_size, size)
            if part.shape != expected:
                raise ValueError(f"expected {name} of shape {expected}; got {part.shape}; see initial_state")
        return h, c


class TorchArtifact(Artifact):
    """A module in torch: a loaded ``.pt`` or ``.pt2``, or the eager model of a ``.safetensors``."""

    def __init__(self, path: str, module: Any) -> None:
        super().__init__(path, module)
        self.module = module
        h, _ = module.initial_state(1)
        self.device = h.device
        self.dtype = np.dtype(str(h.dtype).removeprefix("torch."))

    def _initial(self) -> State:
        import torch

        with torch.inference_mode():
            h, c = self.module.initial_state(1)
        return h.detach().cpu().numpy(), c.detach().cpu().numpy()

    def _run(self, x: Array, state: State) -> tuple[Array, State]:
        return self._call(self.module.run, x, state)

    def _answer(self, x: Array, state: State) -> tuple[Array, State]:
        return self._call(self.module.answer, x, state)

    def _run_parted(self, x: Array, state: State, reset: Array) -> tuple[Array, State]:
        import torch

        return self._call(self.module.run, x, state, torch.tensor(reset, device=self.device))

    def _call(self, method: Any, x: Array, state: State, *more: Any) -> tuple[Array, State]:
        import torch

        with torch.inference_mode():
            inputs, h, c = (torch.tensor(part, device=self.device) for part in (x, *state))
            y, (h, c) = method(inputs, (h, c), *more)
        return y.cpu().numpy(), (h.cpu().numpy(), c.cpu().numpy())


class PackageArtifact(TorchArtifact):
    """A compiled ``.pt2``."""

    def __init__(self, path: str, module: Any) -> None:
        super().__init__(path, module)
        self.bidirectional = module.bidirectional

    def _run_parted(self, x: Array, state: State, reset: Array) -> tuple[Array, State]:
        return Artifact._run_parted(self, x, state, reset)

    def _window(self, x: Array) -> Array:
        import torch

        y: Array = self.module.forward(torch.tensor(x, device=self.device)).cpu().numpy()
        return y


class OnnxArtifact(Artifact):
    """An ``.onnx`` graph on onnxruntime."""

    def __init__(self, path: str) -> None:
        from cellstep.exporters.onnx_graph import load_onnx

        self.model = load_onnx(path)
        super().__init__(path, self.model)
        self.dtype = np.dtype(self.model.dtype)
        self.bidirectional = self.model.bidirectional

    def _initial(self) -> State:
        return self.model.initial(1)

    def _run(self, x: Array, state: State) -> tuple[Array, State]:
        if self.answers == "every":
            return self._answer(x, state)
        if self.answers == "hidden":
            raise ValueError(f"'{self.path}' answers from the last hidden state alone; export it with answers='every'")
        answers = []
        for step in range(x.shape[1]):
            y, state = self._answer(x[:, step : step + 1], state)
            answers.append(y)
        return np.stack(answers, 1), state

    def _run_parted(self, x: Array, state: State, reset: Array) -> tuple[Array, State]:
        if self.answers != "every" or not self.model.takes_reset:
            return super()._run_parted(x, state, reset)
        y, h, c = self.model.run_raw(x, *state, reset=reset)
        return y, (h, c)

    def _answer(self, x: Array, state: State) -> tuple[Array, State]:
        y, h, c = self.model.run_raw(x, *state)
        return y, (h, c)


class ExecutorchArtifact(Artifact):
    """A ``.pte`` program. Whole windows of its own size take one call, all others a call a step."""

    def __init__(self, path: str) -> None:
        from cellstep.exporters.executorch_program import load_executorch

        self.program = load_executorch(path)
        super().__init__(path, self.program)
        self.dtype = np.dtype(str(self.program.dtype).removeprefix("torch."))
        self.bidirectional = self.program.bidirectional

    def _initial(self) -> State:
        h, c = self.program.initial_state(1)
        return h.numpy(), c.numpy()

    def _window(self, x: Array) -> Array:
        if x.shape[1] != self.program.steps:
            return super()._window(x)
        answers = [self.program.forward(self._part(x, rows, 0)).numpy() for rows in self._groups(len(x))]
        every = [x.shape[1]] if self.answers == "every" else []
        return np.concatenate([np.empty((0, *every, self.output_size), self.dtype), *answers])[: len(x)]

    def _run(self, x: Array, state: State) -> tuple[Array, State]:
        if self.bidirectional:
            raise ValueError(
                f"expected windows of {self.program.steps} steps from the initial state, as the model of '{self.path}' "
                f"is bidirectional and of one static size; got {x.shape[1]} steps from a state; export another size"
            )
        y = np.empty((len(x), x.shape[1], self.output_size), self.dtype)
        h, c = (part.copy() for part in state)
        for rows in self._groups(len(x)):
            inputs, held = self._part(x, rows, 0), (self._part(h, rows, 1), self._part(c, rows, 1))
            count = len(x[rows])
            for step in range(x.shape[1]):
                answer, held = self.program.step(inputs[:, step].contiguous(), held)
                y[rows, step] = answer.numpy()[:count]
            h[:, rows], c[:, rows] = (part.numpy()[:, :count] for part in held)
        return y, (h, c)

    def _answer(self, x: Array, state: State) -> tuple[Array, State]:
        if self.answers == "hidden":
            raise ValueError(
                f"expected windows of {self.program.steps} steps from the initial state, as '{self.path}' answers from "
                f"the last hidden state alone; got {x.shape[1]} steps from a state; export it with answers='every'"
            )
        y, state = self._run(x, state)
        return (y if self.answers == "every" else y[:, -1]), state

    def _groups(self, count: int) -> list[slice]:
        """As many rows as a call takes, again and again."""
        size = self.program.batch_size
        return [slice(begin, begin + size) for begin in range(0, count, size)]

    def _part(self, array: Array, rows: slice, axis: int) -> Any:
        """Some rows as a tensor, zeros in the place of rows past the last one."""
        import torch

        part = array[rows] if axis == 0 else array[:, rows]
        missing = [(0, 0)] * array.ndim
        missing[axis] = (0, self.program.batch_size - part.shape[axis])
        return torch.from_numpy(np.pad(part, missing))


class DeployArtifact(Artifact):
    """A deploy file on the torch-free runtime: the rows of a batch one after another through one session."""

    def __init__(self, path: str, data: bytes | None = None) -> None:
        self.session = Session(path if data is None else data)
        super().__init__(path, self.session)

    def selftest(self) -> float:
        """Replay the test vector of the file; see :meth:`cellstep.runtime.Session.selftest`."""
        return self.session.selftest()

    def _initial(self) -> State:
        self.session.reset()
        h, c = self.session.state
        return h[:, None], c[:, None]

    def _run(self, x: Array, state: State) -> tuple[Array, State]:
        return self._rows(state, lambda row: self.session.run(x[row]), (*x.shape[:2], self.output_size))

    def _run_parted(self, x: Array, state: State, reset: Array) -> tuple[Array, State]:
        return self._rows(state, lambda row: self.session.run(x[row], reset[row]), (*x.shape[:2], self.output_size))

    def _answer(self, x: Array, state: State) -> tuple[Array, State]:
        if self.answers == "every":
            return self._run(x, state)
        return self._rows(state, lambda row: self.session.forecast(x[row]), (len(x), self.output_size))

    def _rows(self, state: State, call: Callable[[int], Array], shape: tuple[int, ...]) -> tuple[Array, State]:
        y = np.empty(shape, self.dtype)
        h, c = (part.copy() for part in state)
        for row in range(len(y)):
            self.session.state = (h[:, row], c[:, row])
            y[row] = call(row)
            h[:, row], c[:, row] = self.session.state
        return y, (h, c)


def _torch_device(device: Any) -> Any:
    """ValueError for what is no device of torch's, or one that is not here."""
    import torch

    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"expected a device that torch can use here, such as 'cpu' or 'cuda'; got {str(device)!r}: {reason}"
        ) from None
    return found


def load(path: str | os.PathLike[str], device: Any = None) -> Artifact:
    """Load an artifact by its suffix.

    They are ``.pt``, ``.pt2``, ``.onnx``, ``.pte``, ``.cellstep``, ``.h`` and ``.safetensors``.

    Args:
        device: where the calls run, as torch names it; arrays go there and back. ``.pt`` and ``.safetensors`` run on
            any, a ``.pt2`` on the kind that it was compiled for, which is its default, all others on the CPU alone.

    Raises:
        OSError: the file cannot be read.
        ValueError: the suffix is unknown, or the file is not what its suffix says, or cannot run on the device.
        ImportError: a package that runs this kind of file is not installed.
    """
    name = os.fspath(path)
    suffix = Path(name).suffix
    if device is not None and suffix in (".cellstep", ".h", ".onnx", ".pte"):
        if str(device) != "cpu":
            raise ValueError(
                f"expected a .pt, .pt2 or .safetensors file for device={str(device)!r}; got '{name}', which runs on "
                "the CPU; export it as one of those"
            )
    elif device is not None and suffix in (".pt", ".pt2", ".safetensors"):
        device = _torch_device(device)
    if suffix == ".cellstep":
        return DeployArtifact(name)
    if suffix == ".h":
        from cellstep.exporters.header import read_header

        return DeployArtifact(name, read_header(name))
    if suffix == ".pt2":
        from cellstep.exporters.package import load_package

        return PackageArtifact(name, load_package(name, device))
    if suffix == ".onnx":
        return OnnxArtifact(name)
    if suffix == ".pte":
        return ExecutorchArtifact(name)
    if suffix == ".pt":
        from cellstep.exporters.torchscript import load_torchscript

        return TorchArtifact(name, load_torchscript(name, device or "cpu"))
    if suffix == ".safetensors":
        from cellstep.exporters import load_model

        model = load_model(name).eval()
        if str(model.dtype) not in ("torch.float32", "torch.float64"):
            model = model.float()  # NumPy has no bfloat16
        return TorchArtifact(name, model if device is None else model.to(device))
    raise ValueError(
        f"expected a file that ends in .pt, .pt2, .onnx, .pte, .cellstep, .h or .safetensors; got '{name}'; "
        "name an artifact"
    )
