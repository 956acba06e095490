"""The operators, as ``torch.ops.cellstep``: loads the library, adds shape inference and autograd.

Importing this module is all that a saved TorchScript model needs in a Python process. A C++ program links
``cellstep::ops`` instead. Shapes below: T steps, N rows, I inputs, H hidden units, L layers, O outputs.

The library is built on torch's stable ABI, which knows no autograd: without the registrations below a backward pass
would leave gradients ``None``. The gradient of each operator is an operator too; the gradient of that one
(``create_graph=True``) runs on torch's own operators.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: The shared library of operators, for ``torch.ops.load_library`` in a process without the rest of cellstep.
library_path = str(
    next((Path(__file__).parent / "lib").glob("*cellstep_ops.*"), Path(__file__).parent / "lib/libcellstep_ops.so")
)

torch.ops.load_library(library_path)

_Ctx = Any
_Grads = tuple[Tensor | None, ...]


@torch.library.register_fake("cellstep::lstm_cell")
def _(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, units = h.shape
    return x.new_empty(n, units), x.new_empty(n, units), x.new_empty((n, 4 * units) if save else (0,))


@torch.library.register_fake("cellstep::lstm_layer")
def _(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    t, n, _ = x.shape
    units = h.shape[1]
    return (
        x.new_empty(t, n, units),
        x.new_empty(n, units),
        x.new_empty(n, units),
        x.new_empty((t, n, 4 * units) if save else (0,)),
        x.new_empty((t, n, units) if save else (0,)),
    )


def _gradient_shapes(x: Tensor, h: Tensor, c: Tensor, weight_ih: Tensor, weight_hh: Tensor) -> tuple[Tensor, ...]:
    like = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, h, c, weight_ih, weight_hh)]
    return (*like, x.new_empty(weight_ih.shape[0]))


@torch.library.register_fake("cellstep::lstm_cell_backward")
def _(
    grad_h: Tensor,
    grad_c: Tensor,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    c_next: Tensor,
    gates: Tensor,
) -> tuple[Tensor, ...]:
    return _gradient_shapes(x, h, c, weight_ih, weight_hh)


@torch.library.register_fake("cellstep::lstm_layer_backward")
def _(
    grad_y: Tensor,
    grad_h: Tensor,
    grad_c: Tensor,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
) -> tuple[Tensor, ...]:
    return _gradient_shapes(x, h, c, weight_ih, weight_hh)


@torch.library.register_fake("cellstep::dense")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("cellstep::run_model")
def _(
    image: Tensor, x: Tensor, h: Tensor, c: Tensor, output_size: int, last_only: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, t, _ = x.shape
    return (
        x.new_empty(n, 1 if last_only else t, output_size),
        torch.empty_like(h, memory_format=torch.contiguous_format),
        torch.empty_like(c, memory_format=torch.contiguous_format),
    )


def _reference_layer(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer on torch's own operators, differentiable as often as one likes."""
    outputs = []
    projected = torch.nn.functional.linear(x, weight_ih, bias_ih)
    for step in projected.unbind(0):
        i, f, g, o = (step + torch.nn.functional.linear(h, weight_hh, bias_hh)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs), h, c


def _differentiable_gradients(grads: _Grads, inputs: _Grads) -> _Grads:
    """Gradients of the layer with a graph of their own, for a second backward pass through them."""
    with torch.enable_grad():
        # Aliases, so that the gradient stops at the layer's inputs and does not run on through their own history.
        aliases = [None if t is None else t.view_as(t) for t in inputs]
        outputs = _reference_layer(*aliases)  # type: ignore[arg-type]
        wanted = [t for t in aliases if t is not None and t.requires_grad]
        found = torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True)
    by_id = {id(t): g for t, g in zip(wanted, found, strict=True)}
    return tuple(None if t is None else by_id.get(id(t)) for t in aliases)


def _setup_layer(ctx: _Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, save = inputs
    y, _, _, gates, cells = output
    ctx.save_for_backward(*tensors, y, gates, cells)
    ctx.saved = save
    ctx.mark_non_differentiable(gates, cells)
    ctx.set_materialize_grads(True)


def _layer_backward(ctx: _Ctx, grad_y: Tensor, grad_h: Tensor, grad_c: Tensor, *_: Tensor) -> _Grads:
    *inputs, y, gates, cells = ctx.saved_tensors
    if torch.is_grad_enabled():
        return (*_differentiable_gradients((grad_y, grad_h, grad_c), tuple(inputs)), None)
    if not ctx.saved:
        _, _, _, gates, cells = torch.ops.cellstep.lstm_layer(*inputs, True)
    *to_tensors, to_bias = torch.ops.cellstep.lstm_layer_backward(grad_y, grad_h, grad_c, *inputs[:5], y, gates, cells)
    return (*to_tensors, *(None if bias is None else to_bias for bias in inputs[5:]), None)


def _setup_cell(ctx: _Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, save = inputs
    _, c_next, gates = output
    ctx.save_for_backward(*tensors, c_next, gates)
    ctx.saved = save
    ctx.mark_non_differentiable(gates)
    ctx.set_materialize_grads(True)


def _cell_backward(ctx: _Ctx, grad_h: Tensor, grad_c: Tensor, _: Tensor) -> _Grads:
    *inputs, c_next, gates = ctx.saved_tensors
    if torch.is_grad_enabled():
        x, *rest = inputs
        to_x, *others = _differentiable_gradients(
            (grad_h.unsqueeze(0), torch.zeros_like(grad_h), grad_c), (x.unsqueeze(0), *rest)
        )
        return (None if to_x is None else to_x.squeeze(0), *others, None)
    if not ctx.saved:
        _, _, gates = torch.ops.cellstep.lstm_cell(*inputs, True)
    *to_tensors, to_bias = torch.ops.cellstep.lstm_cell_backward(grad_h, grad_c, *inputs[:5], c_next, gates)
    return (*to_tensors, *(None if bias is None else to_bias for bias in inputs[5:]), None)


def _setup_dense(ctx: _Ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _dense_backward(ctx: _Ctx, grad: Tensor) -> _Grads:
    x, weight = ctx.saved_tensors
    rows = grad.reshape(-1, weight.shape[0])
    to_weight = rows.t() @ x.reshape(-1, weight.shape[1])
    return grad @ weight, to_weight, rows.sum(0) if ctx.has_bias else None


torch.library.register_autograd("cellstep::lstm_layer", _layer_backward, setup_context=_setup_layer)
torch.library.register_autograd("cellstep::lstm_cell", _cell_backward, setup_context=_setup_cell)
torch.library.register_autograd("cellstep::dense", _dense_backward, setup_context=_setup_dense)


def _no_gradient(name: str, remedy: str) -> None:
    def backward(ctx: _Ctx, *grads: Tensor) -> None:
        raise RuntimeError(f"cellstep::{name} has no gradient: {remedy}")

    torch.library.register_autograd(f"cellstep::{name}", backward)


_no_gradient("run_model", "it runs an exported model; train the module that was exported")
_no_gradient("lstm_layer_backward", "call lstm_layer and let autograd differentiate it twice")
_no_gradient("lstm_cell_backward", "call lstm_cell and let autograd differentiate it twice")
