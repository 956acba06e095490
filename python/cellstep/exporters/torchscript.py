"""The TorchScript artifact ``.pt``: the only file of the package that scripts, saves or loads TorchScript.

It is deprecated upstream in favour of ``torch.export``; this artifact is for the libtorch programs that exist.
"""

import os
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import cellstep
from cellstep.exporters.deploy import image
from cellstep.exporters.files import replacing
from cellstep.nn import Forecaster

_ATTRIBUTES = ["feature_names", "output_names", "window", "horizon"]
_SIZES = ["input_size", "output_size", "num_layers", "hidden_size"]
_METHODS = ["initial_state", "run", "step"]


class PackedForecaster(nn.Module):
    """A forecaster for inference alone: the deploy image as one tensor, run by one operator a call."""

    input_size: Final[int]
    output_size: Final[int]
    num_layers: Final[int]
    hidden_size: Final[int]
    dtype: Final[torch.dtype]
    feature_names: list[str]
    output_names: list[str]
    image: Tensor

    def __init__(self, model: Forecaster) -> None:
        super().__init__()
        self.input_size = model.input_size
        self.output_size = model.output_size
        self.num_layers = model.num_layers
        self.hidden_size = model.hidden_size
        self.dtype = model.head.weight.dtype
        self.feature_names = list(model.feature_names)
        self.output_names = list(model.output_names)
        self.window = model.window
        self.horizon = model.horizon
        self.register_buffer("image", torch.frombuffer(bytearray(image(model)), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Forecast from whole windows: (N, T, input_size) -> (N, output_size), or (T, input_size) -> (output_size)."""
        windows = x if x.dim() == 3 else x.unsqueeze(0)
        h, c = self.initial_state(windows.size(0))
        y, _, _ = torch.ops.cellstep.run_model(self.image, windows, h, c, self.output_size, True)
        answer: Tensor = y.squeeze(1)
        return answer if x.dim() == 3 else answer.squeeze(0)

    @torch.jit.export
    def run(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Carry a stream over several steps: (N, T, input_size) and a state give (N, T, output_size) and a state."""
        y, h, c = torch.ops.cellstep.run_model(self.image, x, state[0], state[1], self.output_size, False)
        return y, (h, c)

    @torch.jit.export
    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Carry a stream over one step: (N, input_size) and a state give (N, output_size) and a state."""
        y, state = self.run(x.unsqueeze(-2), state)
        return y.squeeze(-2), state

    @torch.jit.export
    def initial_state(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """The zero state (h, c) of ``batch_size`` streams, (num_layers, batch_size, hidden_size) each."""
        shape = [self.num_layers, batch_size, self.hidden_size]
        return torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype)


def export_torchscript(model: Forecaster, path: Path) -> None:
    """Script, freeze and save a float32 or float64 model. ValueError for another dtype."""
    if model.head.weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected a float32 or float64 model; got {model.head.weight.dtype}; use model.float()")
    scripted = torch.jit.script(PackedForecaster(model).eval())
    frozen = torch.jit.freeze(scripted, preserved_attrs=_METHODS + _ATTRIBUTES + _SIZES)
    with replacing(path) as temporary:
        # The version that wrote the file tells whoever lacks an operator what to install.
        torch.jit.save(frozen, temporary, _extra_files={"cellstep_version": cellstep.__version__})


def load_torchscript(path: str | os.PathLike[str]) -> Any:
    """Load what :func:`export_torchscript` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no TorchScript archive, or not one that cellstep exported.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"expected a TorchScript file at '{name}'; there is none; check the path")
    try:
        module = torch.jit.load(name, map_location="cpu")
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"expected a TorchScript archive; '{name}' is none or is damaged: {reason}") from None
    missing = [attribute for attribute in _METHODS + _ATTRIBUTES + _SIZES if not hasattr(module, attribute)]
    if missing:
        raise ValueError(f"expected a model that cellstep exported; '{name}' lacks {', '.join(missing)}")
    return module
