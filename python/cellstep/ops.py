"""The operators, as ``torch.ops.cellstep``: loads the library, adds shape inference and autograd.

Importing this module is all that a saved TorchScript model needs in a Python process. A C++ program links
``cellstep::ops`` instead. Shapes below: T steps, N rows, I inputs, H hidden units, L layers, O outputs.

``run_model(image, x, h, c, output_size, answers, lengths, reset) -> (y, h, c)`` runs a deploy file's bytes, a uint8
``image``, on N streams at once: x (N, T, I), or (N, I) for one step; h and c as :class:`cellstep.nn.Chain` has them,
or both None for the initial state; ``answers`` 0 for y (N, T, O), 1 for the last output and 2 for the one of the last
hidden state, (N, O); ``lengths`` (N, int64) the steps of each row; ``reset`` (N, T, bool) the rows whose state is put
to the initial one before the step. The state is given and returned, and no argument changes. Each row gets the numbers
that it would get alone, to the bit, wherever the steps are cut into calls: N streams by this operator, in a
:class:`cellstep.runtime.Pool` and in N sessions are the same.

``lstm_layers(x, batch_sizes, lengths, reset, h, c, initial_h, initial_c, weights, biased, bidirectional, save) -> (y,
h_n, c_n, outputs, gates, cells)`` runs a stack of plain layers in one call, on CUDA: x (T, N, I), or (P, I) packed as
``batch_sizes`` (T) on the CPU tells; ``lengths`` (N, int64) and ``reset`` (T, N, bool) beside x alone; h and c (L D, N,
H) with D directions; ``initial_h`` and ``initial_c`` (L D, H) what resets put, zero where they are None; ``weights`` of
each layer and in it of each direction: weight_ih, weight_hh and, if ``biased``, bias_ih, bias_hh. ``save`` keeps what
the gradient needs: outputs (L - 1, tokens, D H) of the layers before the last, gates (L D, P, 4 H) and cells (L D, P,
H), which have a gradient in a stack of one layer. ``run_records(records, image, x, h, c, output_size, answers, lengths,
reset)`` is ``run_model`` on CUDA: ``image`` lies on the device, and ``records`` are the words before its data, on the
host (:func:`cellstep.exporters.records.words`). ``has_kernels(x) -> bool`` says whether the device of x has operators.

The kernels for CUDA are a second library beside the first, loaded where torch finds a CUDA device;
:func:`cuda_missing` says why there are none.

The library is built on torch's stable ABI, which knows no autograd: without the registrations below a backward pass
would leave gradients ``None``. The gradient of each operator is an operator too; the gradient of that one
(``create_graph=True``) runs on torch's own operators.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cellstep.formula import (
    PLAIN_ACTIVATIONS,
    activate_backward,
    lstm_layers_steps,
    lstm_packed_steps,
    lstm_steps,
    lstm_steps_backward,
)

#: The shared library of operators, for ``torch.ops.load_library`` in a process without the rest of cellstep.
library_path = str(
    next((Path(__file__).parent / "lib").glob("*cellstep_ops.*"), Path(__file__).parent / "lib/libcellstep_ops.so")
)

if not torch._C._dispatch_has_kernel("cellstep::lstm_layer"):  # a second copy would register everything twice
    torch.ops.load_library(library_path)
elif torch._C._dispatch_has_kernel_for_dispatch_key("cellstep::lstm_layer", "Autograd"):
    raise ImportError(
        "expected cellstep's operators without gradients; got those that libcellstep_autograd (cellstep::autograd) has "
        "registered; import cellstep.ops in a process that does not load that library"
    )

#: The shared library of kernels for CUDA.
cuda_library_path = str(Path(library_path).with_name("libcellstep_ops_cuda.so"))


def _load_cuda() -> str | None:
    if torch._C._dispatch_has_kernel_for_dispatch_key("cellstep::lstm_layers", "CUDA"):
        return None
    if not torch.backends.cuda.is_built():
        return f"this torch, {torch.__version__}, is built without CUDA; install one that has it"
    # Asks the driver's management library; torch.cuda.is_available() would start CUDA, and forked processes lose it.
    if torch.cuda.device_count() == 0:
        return "torch finds no CUDA device; see torch.cuda.is_available()"
    if not Path(cuda_library_path).is_file():
        return f"'{cuda_library_path}' is not there; build it with make cuda"
    try:
        torch.ops.load_library(cuda_library_path)
    except OSError as error:
        return f"'{cuda_library_path}' does not load: {' '.join(str(error).split())}"
    return None


_cuda_missing = _load_cuda()


def cuda_missing() -> str | None:
    """Why calls on CUDA run on torch's own kernels, in one line; None where cellstep's are loaded."""
    return _cuda_missing


_Ctx = Any
_Grads = tuple[Tensor | None, ...]


def _register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what tells shapes, and refuses devices that differ: with one argument on the meta device it would else
    answer uninitialised memory for the ones that have values. ``batch_sizes`` is on the CPU, whatever the others."""
    schema = torch._C._jit_get_schemas_for_operator(f"cellstep::{name}")[0]
    apart = next((k for k, argument in enumerate(schema.arguments) if argument.name == "batch_sizes"), None)

    def register(shapes: Callable[..., Any]) -> Callable[..., Any]:
        def fake(*arguments: Any) -> Any:
            beside = [argument for place, argument in enumerate(arguments) if place != apart]
            devices = {
                tensor.device for tensor in torch.utils._pytree.tree_leaves(beside) if isinstance(tensor, Tensor)
            }
            if len(devices) > 1:
                found = " and ".join(sorted(map(str, devices)))
                raise RuntimeError(f"{name}: expected all tensors on one device; got {found}; move them to one")
            return shapes(*arguments)

        torch.library.register_fake(f"cellstep::{name}", fake)
        return shapes

    return register


@_register_fake("lstm_cell")
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


@_register_fake("lstm_layer")
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


def _gradient_shapes(
    x: Tensor, h: Tensor, c: Tensor, weight_ih: Tensor, weight_hh: Tensor, to_x: bool = True, to_weights: bool = True
) -> tuple[Tensor, ...]:
    wanted = [(x, to_x), (h, True), (c, True), (weight_ih, to_weights), (weight_hh, to_weights)]
    like = [x.new_empty(tensor.shape if there else (0,)) for tensor, there in wanted]
    return (*like, x.new_empty(weight_ih.shape[0]))


@_register_fake("lstm_cell_backward")
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


@_register_fake("lstm_layer_backward")
def _(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    grad_cells: Tensor | None,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    to_x: bool,
    to_weights: bool,
) -> tuple[Tensor, ...]:
    return _gradient_shapes(x, h, c, weight_ih, weight_hh, to_x, to_weights)


@_register_fake("lstm_packed")
def _(
    x: Tensor,
    batch_sizes: Tensor | None,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    reverse: bool,
    save_gates: bool,
    save_cells: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, units = x.shape[0], c.shape[1]
    return (
        x.new_empty(tokens, h.shape[1]),
        x.new_empty(h.shape),
        x.new_empty(c.shape),
        x.new_empty((tokens, 4 * units) if save_gates else (0,)),
        x.new_empty((tokens, units) if save_cells else (0,)),
    )


@_register_fake("lstm_packed_backward")
def _(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    grad_cells: Tensor | None,
    x: Tensor,
    batch_sizes: Tensor | None,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    reverse: bool,
    to_x: bool,
    to_weights: bool,
) -> tuple[Tensor, ...]:
    to_weight_hr = x.new_empty((0,) if weight_hr is None or not to_weights else weight_hr.shape)
    return (*_gradient_shapes(x, h, c, weight_ih, weight_hh, to_x, to_weights), to_weight_hr)


def _stack_shape(weights: list[Tensor], biased: bool, bidirectional: bool) -> tuple[int, int]:
    """Layers and directions."""
    directions = 2 if bidirectional else 1
    return len(weights) // ((4 if biased else 2) * directions), directions


@_register_fake("lstm_layers")
def _(
    x: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    h: Tensor,
    c: Tensor,
    initial_h: Tensor | None,
    initial_c: Tensor | None,
    weights: list[Tensor],
    biased: bool,
    bidirectional: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    layers, directions = _stack_shape(weights, biased, bidirectional)
    tokens, units = x.shape[:-1], h.shape[2]
    count = math.prod(tokens)
    return (
        x.new_empty(*tokens, directions * units),
        x.new_empty(h.shape),
        x.new_empty(c.shape),
        x.new_empty((layers - 1, *tokens, directions * units) if save and layers > 1 else (0,)),
        x.new_empty((layers * directions, count, 4 * units) if save else (0,)),
        x.new_empty((layers * directions, count, units) if save else (0,)),
    )


@_register_fake("lstm_layers_backward")
def _(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    grad_cells: Tensor | None,
    x: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    h: Tensor,
    c: Tensor,
    weights: list[Tensor],
    biased: bool,
    bidirectional: bool,
    y: Tensor,
    outputs: Tensor,
    gates: Tensor,
    cells: Tensor,
    to_x: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    to_weights = [x.new_empty(weight.shape) for weight in weights]
    return x.new_empty(x.shape if to_x else (0,)), x.new_empty(h.shape), x.new_empty(c.shape), to_weights


@_register_fake("has_kernels")
def _(x: Tensor) -> bool:
    return x.device.type == "cpu" or (x.device.type == "cuda" and cuda_missing() is None)


@_register_fake("dense")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_register_fake("activate")
def _(x: Tensor, activation: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_register_fake("run_model")
def _shapes_of_run(
    image: Tensor,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    output_size: int,
    answers: int,
    lengths: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:-1], output_size) if answers == 0 else (x.shape[0], output_size)
    return (
        x.new_empty(shape),
        torch.empty_like(h, memory_format=torch.contiguous_format),
        torch.empty_like(c, memory_format=torch.contiguous_format),
    )


@_register_fake("run_records")
def _(records: list[int], *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    shapes: tuple[Tensor, Tensor, Tensor] = _shapes_of_run(*arguments)
    return shapes


@_register_fake("lstm_variant")
def _(x: Tensor, h: Tensor, c: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t, n, _ = x.shape
    save_cells = rest[-1]
    return (
        x.new_empty(t, n, h.shape[1]),
        torch.empty_like(h, memory_format=torch.contiguous_format),
        torch.empty_like(c, memory_format=torch.contiguous_format),
        x.new_empty((t, n, c.shape[1]) if save_cells else (0,)),
    )


#: Arguments of lstm_variant that have a gradient, by place.
_DIFFERENTIABLE = [
    *("x", "h", "c", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "weight_peephole"),
    *("norm_ih", "norm_hh", "norm_c", "norm_c_bias", "reset", "initial_h", "initial_c"),
]
_NO_GRADIENT = _DIFFERENTIABLE.index("reset")
_TENSORS = len(_DIFFERENTIABLE) + 4  # and four masks
#: What a layer without options has: the tensors up to ``weight_hr``, and these.
_PLAIN_TENSORS = _DIFFERENTIABLE.index("weight_hr") + 1
_PLAIN_OPTIONS = [False, 0.0, 0.0, 0.0, *PLAIN_ACTIVATIONS]

# Its backward pass is an operator as well, so that torch.compile and torch.export see one call and not its steps.
_library = torch.library.Library("cellstep", "FRAGMENT")
_library.define(
    "lstm_variant_backward(Tensor grad_y, Tensor grad_h, Tensor grad_c, Tensor? grad_cells, Tensor y, Tensor cells, "
    + str(torch.ops.cellstep.lstm_variant.default._schema).split("(", 1)[1].rsplit(", bool save_cells)", 1)[0]
    + f") -> ({', '.join(['Tensor'] * len(_DIFFERENTIABLE))})"
)


@_register_fake("lstm_variant_backward")
def _gradients_of_variant(*arguments: Any) -> tuple[Tensor, ...]:
    """Uninitialised: one for each of :data:`_DIFFERENTIABLE`, of no values for ``reset`` and for what is not there."""
    tensors = arguments[6 : 6 + len(_DIFFERENTIABLE)]
    return tuple(
        tensors[0].new_empty(0)
        if tensor is None or place == _NO_GRADIENT
        else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for place, tensor in enumerate(tensors)
    )


def _variant_backward(*arguments: Any) -> tuple[Tensor, ...]:
    found = lstm_steps_backward(*arguments)
    # Each output is memory of its own, as torch asks of an operator.
    return tuple(
        target.copy_(found[name]) if target.numel() and name in found else target.zero_()
        for name, target in zip(_DIFFERENTIABLE, _gradients_of_variant(*arguments), strict=True)
    )


_library.impl("lstm_variant_backward", _variant_backward, "CompositeExplicitAutograd")


def _plain_steps(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """:func:`lstm_steps` without options: y, h, c and c of every step."""
    nothing = [None] * (_TENSORS - len(tensors))
    return lstm_steps(*tensors, *nothing, *_PLAIN_OPTIONS)  # type: ignore[arg-type]


def _differentiable_gradients(steps: Callable[..., tuple[Tensor, ...]], grads: _Grads, inputs: _Grads) -> _Grads:
    """Gradients of a layer with a graph of their own, for a second backward pass through them."""
    with torch.enable_grad():
        # Aliases, so that the gradient stops at the layer's inputs and does not run on through their own history.
        aliases = [None if t is None else t.view_as(t) for t in inputs]
        results = zip(steps(*aliases), grads, strict=True)
        pairs = [(out, grad) for out, grad in results if grad is not None and out.requires_grad]
        if not pairs:
            return (None,) * len(inputs)
        outputs, given = zip(*pairs, strict=True)
        wanted = [t for t in aliases if t is not None and t.requires_grad]
        found = torch.autograd.grad(outputs, wanted, given, create_graph=True, allow_unused=True)
    by_id = {id(t): g for t, g in zip(wanted, found, strict=True)}
    return tuple(None if t is None else by_id.get(id(t)) for t in aliases)


def _setup_layer(ctx: _Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, save = inputs
    y, _, _, gates, cells = output
    ctx.save_for_backward(*tensors, y, gates, cells)
    ctx.saved = save
    ctx.mark_non_differentiable(gates)
    ctx.set_materialize_grads(False)


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _layer_backward(
    ctx: _Ctx, grad_y: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, _: None, grad_cells: Tensor | None
) -> _Grads:
    *inputs, y, gates, cells = ctx.saved_tensors
    grad_cells = grad_cells if ctx.saved else None
    if torch.is_grad_enabled():
        return (*_differentiable_gradients(_plain_steps, (grad_y, grad_h, grad_c, grad_cells), tuple(inputs)), None)
    if not ctx.saved:
        _, _, _, gates, cells = torch.ops.cellstep.lstm_layer(*inputs, True)
    to_x, to_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:5])
    *to_tensors, to_bias = torch.ops.cellstep.lstm_layer_backward(
        grad_y, grad_h, grad_c, grad_cells, *inputs[:5], y, gates, cells, to_x, to_weights
    )
    return (*_wanted(ctx, [*to_tensors, to_bias, to_bias]), None)


def _wanted(ctx: _Ctx, gradients: list[Tensor]) -> _Grads:
    """Those of the first arguments that are asked for: others may be empty, or of an argument that is not there."""
    return tuple(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False))


def _setup_packed(ctx: _Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse, ctx.saved_gates, ctx.saved_cells = inputs
    y, _, _, gates, cells = output
    ctx.save_for_backward(*tensors, y, gates, cells)
    ctx.mark_non_differentiable(gates)
    ctx.set_materialize_grads(False)


def _packed_backward(
    ctx: _Ctx, grad_y: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, _: None, grad_cells: Tensor | None
) -> _Grads:
    *inputs, y, gates, cells = ctx.saved_tensors
    grads = grad_y, grad_h, grad_c, grad_cells if ctx.saved_cells else None
    x, batch_sizes, h, c, weight_ih, weight_hh, _bias_ih, _bias_hh, weight_hr = inputs
    if torch.is_grad_enabled():

        def steps(*aliases: Tensor | None) -> tuple[Tensor, ...]:
            first, *others = aliases
            return lstm_packed_steps(first, batch_sizes, *others, ctx.reverse)  # type: ignore[arg-type, call-arg]

        to_input, *others = _differentiable_gradients(steps, grads, (x, *inputs[2:]))
        return (to_input, None, *others, None, None, None)
    if not (ctx.saved_gates and ctx.saved_cells):
        _, _, _, gates, cells = torch.ops.cellstep.lstm_packed(*inputs, ctx.reverse, True, True)
    needed = ctx.needs_input_grad
    to_x, to_h, to_c, to_ih, to_hh, to_bias, to_hr = torch.ops.cellstep.lstm_packed_backward(
        *grads,
        *(x, batch_sizes, h, c, weight_ih, weight_hh, weight_hr, y, gates, cells),
        *(ctx.reverse, needed[0], any(needed[4:6]) or needed[8]),
    )
    return (*_wanted(ctx, [to_x, to_x, to_h, to_c, to_ih, to_hh, to_bias, to_bias, to_hr]), None, None, None)


def _setup_layers(ctx: _Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, weights, ctx.biased, ctx.bidirectional, ctx.saved = inputs
    y, _, _, outputs, gates, cells = output
    layers, _ = _stack_shape(weights, ctx.biased, ctx.bidirectional)
    # The sweep back takes a gradient of the last layer's cells alone: with several layers they are no output to use.
    ctx.gives_cells = ctx.saved and layers == 1
    ctx.save_for_backward(*tensors, y, outputs, gates, cells, *weights)
    ctx.mark_non_differentiable(outputs, gates, *(() if ctx.gives_cells else (cells,)))
    ctx.set_materialize_grads(False)


def _gradients_of_layers(
    ctx: _Ctx,
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    grad_cells: Tensor | None,
    needs_x: bool,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Of the tensors before the weights, and of the weights."""
    x, batch_sizes, lengths, reset, h, c, initial_h, initial_c, *rest = ctx.saved_tensors
    (y, outputs, gates, cells), weights = rest[:4], rest[4:]
    grads = grad_y, grad_h, grad_c, grad_cells if ctx.gives_cells else None
    kind = ctx.biased, ctx.bidirectional
    # The kernels' sweep back knows resets to zero alone; and the vmap of is_grads_batched, the older one of torch,
    # takes no operator that answers a list.
    by_formula = torch.is_grad_enabled() or (reset is not None and initial_h is not None)
    if by_formula or any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads):

        def steps(x: Tensor, h: Tensor, c: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            first, second, *weights = others
            return lstm_layers_steps(x, batch_sizes, lengths, reset, h, c, first, second, weights, *kind)

        found = _differentiable_gradients(steps, grads, (x, h, c, initial_h, initial_c, *weights))
        to_x, to_h, to_c, to_initial_h, to_initial_c, *to_weights = found
        return [to_x, None, None, None, to_h, to_c, to_initial_h, to_initial_c], to_weights
    inputs = x, batch_sizes, lengths, reset, h, c
    if not ctx.saved:
        answers = torch.ops.cellstep.lstm_layers(*inputs, initial_h, initial_c, weights, *kind, True)
        _, _, _, outputs, gates, cells = answers
    to_x, to_h, to_c, to_weights = torch.ops.cellstep.lstm_layers_backward(
        *grads, *inputs, weights, *kind, y, outputs, gates, cells, needs_x
    )
    none = None if initial_h is None else torch.zeros_like(initial_h)  # without a reset they are not looked at
    tensors = [to_x if needs_x else None, None, None, None, to_h, to_c, none, none]
    return tensors, to_weights


def _layers_backward(
    ctx: _Ctx,
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    _outputs: None,
    _gates: None,
    grad_cells: Tensor | None,
) -> tuple[Any, ...]:
    tensors, weights = _gradients_of_layers(ctx, grad_y, grad_h, grad_c, grad_cells, ctx.needs_input_grad[0])
    return (*tensors, weights, None, None, None)


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
            _plain_steps, (grad_h.unsqueeze(0), None, grad_c, None), (x.unsqueeze(0), *rest)
        )
        return (None if to_x is None else to_x.squeeze(0), *others, None)
    if not ctx.saved:
        _, _, gates = torch.ops.cellstep.lstm_cell(*inputs, True)
    *to_tensors, to_bias = torch.ops.cellstep.lstm_cell_backward(grad_h, grad_c, *inputs[:5], c_next, gates)
    return (*to_tensors, *(None if bias is None else to_bias for bias in inputs[5:]), None)


def _setup_variant(ctx: _Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, _, _, cells = output
    ctx.save_for_backward(*inputs[:_TENSORS], y, cells)
    *ctx.options, ctx.saved = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)


def _layer_of_options_backward(
    ctx: _Ctx, grad_y: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, grad_cells: Tensor | None
) -> _Grads:
    *inputs, y, cells = ctx.saved_tensors
    nothing = (None,) * (4 + len(ctx.options) + 1)
    grad_cells = grad_cells if ctx.saved else None
    tensors, masks = tuple(inputs[: len(_DIFFERENTIABLE)]), inputs[len(_DIFFERENTIABLE) :]
    if torch.is_grad_enabled():

        def steps(*aliases: Tensor | None) -> tuple[Tensor, ...]:
            return lstm_steps(*aliases, *masks, *ctx.options)  # type: ignore[arg-type]

        return (*_differentiable_gradients(steps, (grad_y, grad_h, grad_c, grad_cells), tensors), *nothing)
    if not ctx.saved:
        _, _, _, cells = torch.ops.cellstep.lstm_variant(*inputs, *ctx.options, True)
    if ctx.options == _PLAIN_OPTIONS and all(tensor is None for tensor in inputs[_PLAIN_TENSORS:]):
        x, *rest, weight_hr = inputs[:_PLAIN_TENSORS]
        x, rows = x.flatten(0, 1), (None if grad is None else grad.flatten(0, 1) for grad in (grad_y, grad_cells))
        _, _, _, gates, cells = torch.ops.cellstep.lstm_packed(x, None, *rest, weight_hr, False, True, True)
        grad_y, grad_cells = rows
        to_x, to_h, to_c, to_ih, to_hh, to_bias, to_hr = torch.ops.cellstep.lstm_packed_backward(
            *(grad_y, grad_h, grad_c, grad_cells, x, None, *rest[:4], weight_hr, y.flatten(0, 1), gates, cells),
            *(False, True, True),
        )
        found = [to_x.view_as(inputs[0]), to_h, to_c, to_ih, to_hh, to_bias, to_bias, to_hr]
        plain = [None if tensor is None else grad for tensor, grad in zip(inputs, found, strict=False)]
        return (*plain, *(None,) * (len(_DIFFERENTIABLE) - _PLAIN_TENSORS), *nothing)
    found = torch.ops.cellstep.lstm_variant_backward(
        _or_zeros(grad_y, y),
        _or_zeros(grad_h, inputs[1]),
        _or_zeros(grad_c, inputs[2]),
        grad_cells,
        y,
        cells,
        *inputs,
        *ctx.options,
    )
    gradients = [None if tensor is None else grad for tensor, grad in zip(tensors, found, strict=True)]
    gradients[_NO_GRADIENT] = None
    return (*gradients, *nothing)


def _eager(operator: Any, setup: Callable[..., None], backward: Callable[..., _Grads]) -> Callable[..., Any]:
    """An operator for calls in eager mode, with the gradient that is registered for it below: what torch.library does
    for every call it does in Python and argument by argument, and that takes as long as a small layer."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: _Ctx, *arguments: Any) -> Any:
            output = operator(*arguments)
            setup(ctx, arguments, output)
            return output

    Eager.backward = staticmethod(backward)  # type: ignore[method-assign]

    def call(*arguments: Any) -> Any:
        return Eager.apply(*arguments) if torch.is_grad_enabled() else operator(*arguments)  # type: ignore[no-untyped-call]

    return call


lstm_layer = _eager(torch.ops.cellstep.lstm_layer.default, _setup_layer, _layer_backward)
lstm_packed = _eager(torch.ops.cellstep.lstm_packed.default, _setup_packed, _packed_backward)


class _EagerLayers(torch.autograd.Function):
    """As :func:`_eager`, with the list of weights last and flat, as autograd sees tensors alone."""

    @staticmethod
    def forward(ctx: _Ctx, biased: bool, bidirectional: bool, save: bool, *tensors: Any) -> Any:
        arguments = (*tensors[:8], list(tensors[8:]), biased, bidirectional, save)
        output = torch.ops.cellstep.lstm_layers.default(*arguments)
        _setup_layers(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: _Ctx, *grads: Any) -> Any:
        tensors, weights = _gradients_of_layers(ctx, grads[0], grads[1], grads[2], grads[5], ctx.needs_input_grad[3])
        return (None, None, None, *tensors, *weights)


def lstm_layers(*arguments: Any) -> tuple[Tensor, ...]:
    """``torch.ops.cellstep.lstm_layers`` for calls in eager mode, with the same gradient."""
    if not torch.is_grad_enabled():
        answer: tuple[Tensor, ...] = torch.ops.cellstep.lstm_layers.default(*arguments)
        return answer
    *tensors, weights, biased, bidirectional, save = arguments
    return _EagerLayers.apply(biased, bidirectional, save, *tensors, *weights)  # type: ignore[no-any-return, no-untyped-call]


def _setup_dense(ctx: _Ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _dense_backward(ctx: _Ctx, grad: Tensor) -> _Grads:
    x, weight = ctx.saved_tensors
    rows = grad.reshape(-1, weight.shape[0])
    to_weight = rows.t() @ x.reshape(-1, weight.shape[1])
    return grad @ weight, to_weight, rows.sum(0) if ctx.has_bias else None


def _setup_activate(ctx: _Ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.activation = inputs[1]


def _activate_backward(ctx: _Ctx, grad: Tensor) -> _Grads:
    return activate_backward(grad, ctx.saved_tensors[0], ctx.activation), None


torch.library.register_autograd("cellstep::lstm_variant", _layer_of_options_backward, setup_context=_setup_variant)
torch.library.register_autograd("cellstep::activate", _activate_backward, setup_context=_setup_activate)
torch.library.register_autograd("cellstep::lstm_layer", _layer_backward, setup_context=_setup_layer)
torch.library.register_autograd("cellstep::lstm_packed", _packed_backward, setup_context=_setup_packed)
torch.library.register_autograd("cellstep::lstm_layers", _layers_backward, setup_context=_setup_layers)
torch.library.register_autograd("cellstep::lstm_cell", _cell_backward, setup_context=_setup_cell)
torch.library.register_autograd("cellstep::dense", _dense_backward, setup_context=_setup_dense)


def _register_vmap(name: str) -> None:
    """For gradients of a graph that was made outside of ``vmap``: call by call. Inside, modules take torch's road."""
    operator = getattr(torch.ops.cellstep, name)

    def rule(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        def of_call(argument: Any, dim: Any, call: int) -> Any:
            if isinstance(argument, list):
                return [of_call(*pair, call) for pair in zip(argument, dim or [None] * len(argument), strict=True)]
            return argument if dim is None else argument.select(dim, call)

        answers = [
            operator(*(of_call(argument, dim, call) for argument, dim in zip(arguments, dims, strict=True)))
            for call in range(info.batch_size)
        ]
        outputs = torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *answers)
        return outputs, torch.utils._pytree.tree_map(lambda _: 0, outputs)

    torch.library.register_vmap(f"cellstep::{name}", rule)


for _name in ("lstm_cell", "lstm_layer", "lstm_layers", "lstm_packed", "lstm_variant"):
    _register_vmap(f"{_name}_backward")


def _no_gradient(name: str, remedy: str) -> None:
    def backward(ctx: _Ctx, *grads: Tensor) -> None:
        raise RuntimeError(f"cellstep::{name} has no gradient: {remedy}")

    torch.library.register_autograd(f"cellstep::{name}", backward)


_no_gradient("run_records", "it runs an exported model; train the module that was exported")
_no_gradient("run_model", "it runs an exported model; train the module that was exported")
_no_gradient("lstm_layer_backward", "call lstm_layer and let autograd differentiate it twice")
_no_gradient("lstm_layers_backward", "call lstm_layers and let autograd differentiate it twice")
_no_gradient("lstm_packed_backward", "call lstm_packed and let autograd differentiate it twice")
_no_gradient("lstm_cell_backward", "call lstm_cell and let autograd differentiate it twice")
_no_gradient("lstm_variant_backward", "call lstm_variant and let autograd differentiate it twice")
