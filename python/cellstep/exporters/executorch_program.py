"""The ``.pte`` program of ExecuTorch: its own portable operators, no library of ours, one static size.

A program holds three methods. ``forward``: x (N, T, input_size) -> y, from the initial state. ``step``: x (N,
input_size), h, c -> y (N, output_size), h, c. ``reset``: h, c, mask (N) bool -> h, c with the rows of the mask put to
the initial state. N and T are fixed when the program is made: ExecuTorch plans all memory ahead, and the steps of
``forward`` lie in it one after another.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cellstep
from cellstep.exporters.files import quiet, replacing
from cellstep.exporters.programs import Forward, Reset, Step
from cellstep.nn import Chain

_VERSION = "cellstep_version"
_NUMBERS = ["input_size", "output_size", "state_layers", "h_size", "c_size", "window", "horizon"]
_NAMES = ["feature_names", "output_names"]
_MISSING = "expected the package executorch; it is not installed; run: pip install cellstep[executorch]"


def export_executorch(
    model: Chain,
    path: Path,
    *,
    batch_size: int = 1,
    steps: int | None = None,
    partitioner: Sequence[Any] | None = None,
) -> None:
    """Lower a float32 or float64 model for ExecuTorch.

    Args:
        batch_size: rows of every call.
        steps: of a window; by default the model's ``window``.
        partitioner: of ExecuTorch, for a backend such as XNNPACK; without one the program needs portable operators
            alone.

    Raises:
        ImportError: the package ``executorch`` is not there.
        ValueError: another dtype, or a number of steps or rows that is none, or the model does not name its window.
        OSError: the file cannot be written.
    """
    with quiet():
        try:
            from executorch.exir import to_edge_transform_and_lower
        except ImportError:
            raise ImportError(_MISSING) from None
    if model.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected a float32 or float64 model for a .pte file; got {model.dtype}; use model.float()")
    steps = model.window if steps is None else steps
    if steps < 1 or batch_size < 1:
        raise ValueError(
            f"expected at least one row and one step, as a .pte has one static size; got batch_size={batch_size} and "
            f"steps={steps}; pass steps=, or set model.window"
        )
    twin = model.reference().cpu().requires_grad_(False)
    initial = twin.initial_state(1)
    h, c = (part.repeat(1, batch_size, 1) for part in initial)
    windows = h.new_zeros(batch_size, steps, model.input_size)
    methods: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
        "forward": (Forward(twin), (windows,)),
        "step": (Step(twin), (windows[:, 0], h, c)),
        "reset": (Reset(twin), (h, c, torch.ones(batch_size, dtype=torch.bool))),
    }
    constants: dict[str, Any] = {
        **{name: getattr(model, name) for name in (*_NUMBERS, *_NAMES, "answers")},
        **{f"initial_{name}": part.contiguous() for name, part in zip("hc", initial, strict=True)},
        "bidirectional": model.bidirectional,
        "batch_size": batch_size,
        "steps": steps,
        _VERSION: cellstep.__version__,
    }
    # oneDNN's operators would stand for the layers otherwise, and ExecuTorch has none of them.
    with quiet(), torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        programs = {name: torch.export.export(*what, strict=False) for name, what in methods.items()}
        lowered = to_edge_transform_and_lower(programs, partitioner=partitioner, constant_methods=constants)
        program = lowered.to_executorch()
    with replacing(path) as temporary:
        temporary.write_bytes(program.buffer)


class ExecutorchProgram:
    """A loaded program. Attributes are those of the chain, beside the ``batch_size`` and ``steps`` of every call."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self._methods: dict[str, Any] = {}
        self.input_size = int(self._constant("input_size"))
        self.output_size = int(self._constant("output_size"))
        self.state_layers = int(self._constant("state_layers"))
        self.h_size = int(self._constant("h_size"))
        self.c_size = int(self._constant("c_size"))
        self.window = int(self._constant("window"))
        self.horizon = int(self._constant("horizon"))
        self.answers = str(self._constant("answers"))
        self.feature_names: list[str] = self._call("feature_names")
        self.output_names: list[str] = self._call("output_names")
        self.bidirectional = bool(self._constant("bidirectional"))
        self.batch_size = int(self._constant("batch_size"))
        self.steps = int(self._constant("steps"))
        self._initial: tuple[Tensor, Tensor] = self._constant("initial_h"), self._constant("initial_c")
        self.dtype: torch.dtype = self._initial[0].dtype

    def initial_state(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """The state of ``batch_size`` fresh streams."""
        h, c = (part.repeat(1, batch_size, 1) for part in self._initial)
        return h, c

    def forward(self, x: Tensor) -> Tensor:
        """The method ``forward``: x (batch_size, steps, input_size)."""
        y: Tensor = self._call("forward", x)[0]
        return y

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The method ``step``: x (batch_size, input_size) and the state."""
        y, h, c = self._call("step", x, *state)
        return y, (h, c)

    def reset(self, state: tuple[Tensor, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
        """The method ``reset``: the state and a mask (batch_size)."""
        h, c = self._call("reset", *state, mask)
        return h, c

    def _constant(self, name: str) -> Any:
        return self._call(name)[0]

    def _call(self, name: str, *arguments: Tensor) -> Any:
        if name not in self._methods:
            self._methods[name] = self._program.load_method(name)
        # The next call writes over what this one answers.
        return [
            part.clone() if isinstance(part, Tensor) else part for part in self._methods[name].execute([*arguments])
        ]


def load_executorch(path: str | os.PathLike[str]) -> ExecutorchProgram:
    """Load what :func:`export_executorch` wrote.

    Raises:
        ImportError: the package ``executorch`` is not there.
        OSError: the file cannot be read.
        ValueError: it is no ExecuTorch program, or not one that cellstep exported.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"expected a .pte file at '{name}'; there is none; check the path")
    with quiet():
        try:
            from executorch.runtime import Runtime, Verification
        except ImportError:
            raise ImportError(_MISSING) from None
    try:
        program = Runtime.get().load_program(name, verification=Verification.InternalConsistency)
        if _VERSION not in program.method_names:
            raise ValueError(f"expected a program that cellstep exported; '{name}' is another; export it again")
        return ExecutorchProgram(program)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"expected an ExecuTorch program; '{name}' is none or is damaged: {reason}") from None
