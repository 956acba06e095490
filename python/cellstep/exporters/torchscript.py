"""The TorchScript artifact ``.pt``: the only file of the package that scripts, saves or loads TorchScript.

It is deprecated upstream in favour of ``torch.export``; this artifact is for the libtorch programs that exist.
"""

import copy
import os
from pathlib import Path
from typing import Any, Final, Optional

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import cellstep
from cellstep.exporters.deploy import image
from cellstep.exporters.files import replacing
from cellstep.exporters.records import words
from cellstep.exporters.settle import settled
from cellstep.nn import Chain
from cellstep.nn.chain import ANSWERS
from cellstep.nn.packed import aligned_bytes

_ATTRIBUTES = ["feature_names", "output_names", "window", "horizon", "answers"]
_SIZES = ["input_size", "output_size", "state_layers", "h_size", "c_size"]
_METHODS = ["answer", "initial_state", "reset", "run", "step"]
#: What a standalone file has not.
_PACKED = ["weights"]
#: Kept as tensors of the module where freezing would make constants of them, which do not move between devices.
_TENSORS = ["image", "initial_h", "initial_c"]
#: Kept as an attribute, as freezing would put it together anew from its numbers in every call.
_RECORDS = ["records"]


class PackedChain(nn.Module):
    """A chain for inference alone: the deploy image as one tensor, run by one operator a call.

    The methods are those of :class:`cellstep.nn.Chain`. It moves between devices as any module does; where a device
    has no kernels of cellstep's, the call itself takes place on the CPU.

    Args:
        weights: how the weights of LSTM layers are stored: "float32", which stands for the model's own type,
            "bfloat16", "float16" or "int8".
        factors: for int8, see :func:`cellstep.exporters.deploy.image`.
        fast_activations: see :func:`cellstep.exporters.deploy.export_deploy`.
    """

    input_size: Final[int]
    output_size: Final[int]
    state_layers: Final[int]
    h_size: Final[int]
    c_size: Final[int]
    answers: Final[str]
    weights: Final[str]
    _answers: Final[int]
    feature_names: list[str]
    output_names: list[str]
    records: list[int]
    image: Tensor
    initial_h: Tensor
    initial_c: Tensor

    def __init__(
        self,
        model: Chain,
        weights: str = "float32",
        factors: list[NDArray[Any]] | None = None,
        fast_activations: bool = False,
    ) -> None:
        super().__init__()
        self.input_size = model.input_size
        self.output_size = model.output_size
        self.state_layers = model.state_layers
        self.h_size = model.h_size
        self.c_size = model.c_size
        self.answers = model.answers
        self.weights = str(model.dtype).removeprefix("torch.") if weights == "float32" else weights
        self.window = model.window
        self.horizon = model.horizon
        self._answers = ANSWERS.index(model.answers)
        self.feature_names = list(model.feature_names)
        self.output_names = list(model.output_names)
        h, c = (part.detach().clone() for part in model.initial_state(1))
        self.register_buffer("initial_h", h)
        self.register_buffer("initial_c", c)
        data = image(model, weights, factors, fast_activations=fast_activations)
        self.records = words(data)
        self.register_buffer("image", aligned_bytes(data).to(h.device))
        self.eval()

    def train(self, mode: bool = True) -> "PackedChain":
        if mode:
            raise RuntimeError(
                "expected a model to train; got packed weights, which are for inference alone; train the float model "
                "and pack it again"
            )
        return super().train(mode)

    @torch.jit.unused
    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.output_size}, weights={self.weights}"

    def forward(self, x: Tensor, lengths: Optional[Tensor] = None) -> Tensor:
        windows = x if x.dim() == 3 else x.unsqueeze(0)
        y, _ = self.answer(windows, self.initial_state(windows.size(0)), lengths)
        return y if x.dim() == 3 else y.squeeze(0)

    @torch.jit.export
    def answer(
        self, x: Tensor, state: tuple[Tensor, Tensor], lengths: Optional[Tensor] = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self._run(x, state[0], state[1], self._answers, lengths, None)

    @torch.jit.export
    def run(
        self, x: Tensor, state: tuple[Tensor, Tensor], reset: Optional[Tensor] = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self._run(x, state[0], state[1], 0, None, reset)

    @torch.jit.export
    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self._run(x, state[0], state[1], 0, None, None)

    @torch.jit.export
    def initial_state(self, batch_size: int) -> tuple[Tensor, Tensor]:
        return self.initial_h.repeat(1, batch_size, 1), self.initial_c.repeat(1, batch_size, 1)

    @torch.jit.export
    def reset(self, state: tuple[Tensor, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
        rows = mask.unsqueeze(0).unsqueeze(2)
        return torch.where(rows, self.initial_h, state[0]), torch.where(rows, self.initial_c, state[1])

    def _run(
        self, x: Tensor, h: Tensor, c: Tensor, answers: int, lengths: Optional[Tensor], reset: Optional[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("expected an input without gradient; packed weights have none; train the float model")
        if lengths is not None:
            lengths = lengths.to(torch.int64)
        if x.is_cpu:
            y, h, c = torch.ops.cellstep.run_model(self.image, x, h, c, self.output_size, answers, lengths, reset)
            return y, (h, c)
        if self.image.device == x.device and torch.ops.cellstep.has_kernels(x):
            y, h, c = torch.ops.cellstep.run_records(
                self.records,
                self.image,
                x,
                h,
                c,
                self.output_size,
                answers,
                lengths.to(x.device) if lengths is not None else None,
                reset.to(x.device) if reset is not None else None,
            )
            return y, (h, c)
        y, h_n, c_n = torch.ops.cellstep.run_model(
            self.image.cpu(),
            x.cpu(),
            h.cpu(),
            c.cpu(),
            self.output_size,
            answers,
            lengths.cpu() if lengths is not None else None,
            reset.cpu() if reset is not None else None,
        )
        return y.to(x.device), (h_n.to(x.device), c_n.to(x.device))


def packed(model: Chain, fast_activations: bool = False) -> PackedChain:
    """The chain as one tensor and one operator. ValueError for another dtype than float32 and float64."""
    if model.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected a float32 or float64 model; got {model.dtype}; use model.float()")
    return PackedChain(model, fast_activations=fast_activations)


def export_torchscript(
    model: Chain | PackedChain,
    path: Path,
    standalone: bool = False,
    fast_activations: bool = False,
    settle: Any = None,
) -> None:
    """Script, freeze and save a model; the file's tensors are on the CPU, whatever the model's device.

    Args:
        standalone: on torch's own operators alone, for a libtorch that nobody can add a library to: any dtype and
            device, slower on a CPU.
        fast_activations: sigmoid and tanh of LSTM layers with an absolute error of up to 1.6e-5, in less time.
        settle: (T, input_size): streams begin in the state behind these steps.

    Raises:
        ValueError: the model is neither float32 nor float64, unless ``standalone``; or it is quantized, and it is;
            or ``fast_activations`` with either, as torch's own operators have none and quantized models are packed;
            or ``settle`` with ``standalone``, with a bidirectional model or of another shape.
    """
    if settle is not None and standalone:
        raise ValueError("expected standalone=False with settle; got True; leave one of them out")
    if fast_activations and (standalone or not isinstance(model, Chain)):
        raise ValueError(
            "expected fast_activations=False for a standalone file or a quantized model; got True; export the float "
            "model with standalone=False"
        )
    if standalone and not isinstance(model, Chain):
        raise ValueError("expected standalone=False for a quantized model, which has an operator of its own; got True")
    if isinstance(model, Chain) and standalone:
        module: nn.Module = model.reference().cpu()
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        scripted = torch.jit.script(module)  # unfrozen: constants would not move between devices
    else:
        program = packed(model, fast_activations) if isinstance(model, Chain) else model
        if settle is not None:
            program = _begun_from(program, settle)
        if not program.image.is_cpu:
            program = copy.deepcopy(program).cpu()
        scripted = torch.jit.freeze(
            torch.jit.script(program),
            preserved_attrs=_METHODS + _ATTRIBUTES + _SIZES + _PACKED + _TENSORS + _RECORDS,
        )
    with replacing(path) as temporary:
        # The version that wrote the file tells whoever lacks an operator what to install.
        torch.jit.save(scripted, temporary, _extra_files={"cellstep_version": cellstep.__version__})


def _begun_from(program: PackedChain, settle: Any) -> PackedChain:
    data, h, c = settled(program.image.cpu().numpy().tobytes(), settle)
    twin = copy.deepcopy(program)
    device = program.image.device
    twin.records = words(data)
    twin.image, twin.initial_h, twin.initial_c = (part.to(device) for part in (aligned_bytes(data), h, c))
    return twin


def load_torchscript(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Any:
    """Load what :func:`export_torchscript` wrote, onto a device.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no TorchScript archive, or not one that cellstep exported.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"expected a TorchScript file at '{name}'; there is none; check the path")
    try:
        module = torch.jit.load(name, map_location=device)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"expected a TorchScript archive; '{name}' is none or is damaged: {reason}") from None
    missing = [attribute for attribute in _METHODS + _ATTRIBUTES + _SIZES if not hasattr(module, attribute)]
    if missing:
        raise ValueError(f"expected a model that cellstep exported; '{name}' lacks {', '.join(missing)}")
    return module
