"""The ways to run a row: cellstep, torch.nn.LSTM on cuDNN, the hand-written cell as it is and compiled, FlashRNN."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.gpu.rows import FLASH, FLASH_WHOLE, NN, Row
from benchmarks.gpu.timing import Call
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

OURS = "cellstep"
HAND_WRITTEN = "hand-written"
COMPILED = "torch.compile"
#: Steps of the hand-written cell that are unrolled for the compiler: it takes seconds a step.
COMPILED_STEPS = 8
DTYPES = {
    "TF32": torch.float32,
    **{name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")},
}
#: Greatest difference from float64 beside the greatest value that an answer may show before it is timed: an error of
#: the type's products and state over a chain of steps that forgets; what is wrong differs by about 1.
DIFFERENCE = {"float32": 1e-4, "TF32": 2e-2, "float16": 2e-2, "bfloat16": 1e-1}


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """TF32 for both sides, or for none."""
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype == "TF32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul


@contextlib.contextmanager
def forced(kernel: str) -> Iterator[None]:
    """One of cellstep's kernels whatever its table says; "" leaves the choice to the table."""
    before = os.environ.pop("CELLSTEP_CUDA_KERNEL", None)
    if kernel:
        os.environ["CELLSTEP_CUDA_KERNEL"] = kernel
    try:
        yield
    finally:
        os.environ.pop("CELLSTEP_CUDA_KERNEL", None)
        if before is not None:
            os.environ["CELLSTEP_CUDA_KERNEL"] = before


class Case:
    """Fresh random numbers for a row: one set of weights for all ways, the input, and a gradient of the output."""

    def __init__(self, row: Row, device: torch.device) -> None:
        self.row, self.device, self.dtype = row, device, DTYPES[row.dtype]
        there = {"device": device, "dtype": self.dtype}  # millions of random weights are the device's work
        self.lstm = nn.LSTM(row.inputs, row.hidden, row.layers, bidirectional=row.bidirectional, **there)
        x = torch.randn(row.time, row.batch, row.inputs, device=device).to(self.dtype)
        self.x: Any = pack_padded_sequence(x, torch.tensor(row.lengths)) if row.lengths else x
        self.tokens = self.x.data if row.lengths else self.x
        outputs = row.hidden * row.directions
        self.grad = torch.randn(*self.tokens.shape[:-1], outputs, device=device).to(self.dtype)
        self._exact: Tensor | None = None

    def exact(self) -> Tensor:
        """The output in float64, by torch's own layer."""
        if self._exact is None:
            there = {"device": self.device, "dtype": torch.float64}
            row = self.row
            wide = nn.LSTM(row.inputs, row.hidden, row.layers, bidirectional=row.bidirectional, **there)
            wide.load_state_dict({name: value.double() for name, value in self.lstm.state_dict().items()})
            with torch.no_grad():
                self._exact = values(wide(self.x.to(torch.float64))[0])
        return self._exact

    def difference(self, output: Tensor) -> float:
        """Of an output from float64, beside its greatest value; infinite where it is no number."""
        exact = self.exact()[: output.shape[0]] if not self.row.lengths else self.exact()
        found = float((output.double() - exact).abs().amax() / exact.abs().amax().clamp_min(1e-30))
        return found if found == found else float("inf")


def values(output: Any) -> Tensor:
    return output.data if isinstance(output, PackedSequence) else output


@dataclass
class Way:
    """How to run a row.

    Attributes:
        output: gives y, to be compared.
        forward, training: the calls to time; None where there is none.
        scale: what their times are multiplied by, where they run a part of the sequence.
    """

    output: Callable[[], Tensor]
    forward: Call | None
    training: Call | None
    scale: float = 1.0

    def of(self, training: bool) -> Call | None:
        return self.training if training else self.forward


def _of_module(module: nn.Module, case: Case) -> Way:
    """The module as it answers, and a copy of it that learns."""
    module.eval()
    learning = copy.deepcopy(module).train()
    for layer in (module, learning):
        if isinstance(layer, nn.LSTM):
            layer.flatten_parameters()
    parameters = list(learning.parameters())

    def forward() -> Any:
        with torch.no_grad():
            return module(case.x)

    def training() -> object:
        return torch.autograd.grad(values(learning(case.x)[0]), parameters, case.grad)

    return Way(lambda: values(forward()[0]), forward, training)


def cudnn(case: Case) -> Way:
    return _of_module(case.lstm, case)


def cellstep_lstm(case: Case) -> Way:
    from cellstep.nn import LSTM

    row = case.row
    there = {"device": case.device, "dtype": case.dtype}
    module = LSTM(row.inputs, row.hidden, row.layers, bidirectional=row.bidirectional, **there)
    module.load_state_dict(case.lstm.state_dict())
    return _of_module(module, case)


def cell_by_cell(x: Tensor, weights: list[list[Tensor]]) -> Tensor:
    """The stack as a notebook has it, step by step."""
    for weight_ih, weight_hh, bias_ih, bias_hh in weights:
        h = c = x.new_zeros(x.size(1), weight_hh.size(1))
        outputs = []
        for step in range(x.size(0)):
            gates = nn.functional.linear(x[step], weight_ih, bias_ih) + nn.functional.linear(h, weight_hh, bias_hh)
            i, f, g, o = gates.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        x = torch.stack(outputs)
    return x


def _by_cell(case: Case, function: Callable[..., Tensor]) -> Way:
    row = case.row
    if row.lengths or row.bidirectional:
        raise ValueError("the hand-written cell is for padded rows of one direction")
    steps = min(row.time, COMPILED_STEPS)
    x, grad = case.x[:steps].clone(), case.grad[:steps].clone()
    weights = case.lstm.all_weights
    parameters = list(case.lstm.parameters())

    def forward() -> Tensor:
        with torch.no_grad():
            return function(x, weights)

    def training() -> object:
        return torch.autograd.grad(function(x, weights), parameters, grad)

    return Way(forward, forward, training, row.time / steps)


def hand_written(case: Case) -> Way:
    return _by_cell(case, cell_by_cell)


def compiled(case: Case) -> Way:
    torch._dynamo.reset()
    # Without a device the compiler's own road is tried with the backend that generates nothing.
    backend = "inductor" if case.device.type == "cuda" else "eager"
    return _by_cell(case, torch.compile(cell_by_cell, fullgraph=True, dynamic=False, backend=backend))


def flash(case: Case, with_product: bool = False) -> Way:
    """FlashRNN's fused kernel; one layer, one direction, 16 bits. It takes the gates' sums of the input: their product
    is made before, or in each call."""
    row = case.row
    if row.layers > 1 or row.bidirectional or row.lengths or row.dtype not in ("float16", "bfloat16"):
        raise ValueError("is timed for padded single layers in 16 bits")
    from flashrnn import flashrnn

    (weight_ih, weight_hh, bias_ih, bias_hh), h = case.lstm.all_weights[0], row.hidden
    recurrent = weight_hh.detach().view(4, 1, h, h).clone().requires_grad_()
    bias = (bias_ih + bias_hh).detach().view(4, 1, h).clone().requires_grad_()
    first = case.x.new_zeros(2, row.batch, 1, 1, h)
    grad = case.grad.transpose(0, 1).unsqueeze(2).contiguous()

    def product() -> Tensor:
        return nn.functional.linear(case.x.transpose(0, 1), weight_ih).view(row.batch, row.time, 4, 1, h)

    given = None if with_product else product().detach().requires_grad_()
    leaves = [weight_ih if given is None else given, recurrent, bias]

    def run() -> Tensor:
        sums = product() if given is None else given
        states, _ = flashrnn(
            sums, recurrent, bias, states=first, function="lstm", backend="cuda_fused", dtype=row.dtype
        )
        return states[0]

    def forward() -> object:
        with torch.no_grad():
            return run()

    return Way(
        lambda: run().detach().squeeze(2).transpose(0, 1), forward, lambda: torch.autograd.grad(run(), leaves, grad)
    )


WAYS: dict[str, Callable[[Case], Way]] = {
    OURS: cellstep_lstm,
    NN: cudnn,
    HAND_WRITTEN: hand_written,
    COMPILED: compiled,
    FLASH: flash,
    FLASH_WHOLE: lambda case: flash(case, with_product=True),
}


def kernels(call: Call, device: torch.device) -> list[str]:
    """Names of the kernels that a call starts, in order, as the profiler sees them; none without a device."""
    if device.type != "cuda":
        return []
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)]


def own(names: list[str]) -> str:
    """cellstep's kernels among them, each once and without namespaces and template arguments, and how many launches
    there are in all."""
    ours = [name.replace("(anonymous namespace)::", "") for name in names if "cellstep" in name]
    short = [name.split("(")[0].split("<")[0].split("::")[-1].split()[-1] for name in ours]
    said = "+".join(dict.fromkeys(short)) or ("torch's" if names else "")
    return f"{said} ({len(names)})" if names else said
