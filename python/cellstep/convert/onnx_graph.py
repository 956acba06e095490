"""LSTM layers out of any ONNX graph: ``LSTM`` nodes, and steps that were written out as single operators."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cellstep.convert.onnx_cells import find_steps
from cellstep.convert.onnx_values import Scope, scopes
from cellstep.convert.parts import Array, reordered, single_layer, tensor
from cellstep.nn import LSTM

if TYPE_CHECKING:
    import onnx

_ORDER = "iofg"  # ONNX calls the candidate c
#: exp(-104) is half the smallest float32 there is: sigmoid and tanh give the same values beyond.
_SATURATED = 104.0


class Reversed(nn.Module):
    """An LSTM that reads its input from the last step to the first, as ONNX's direction "reverse" does.

    Called and answering as ``lstm``: ``output`` is in the order of the input, and the state is the one behind the
    first step. It is no stage of a chain, for it cannot follow a stream.

    Args:
        lstm: a layer of one direction.
    """

    def __init__(self, lstm: LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As :class:`cellstep.nn.LSTM` on padded input; each row is read from its own last step."""
        time = 1 if self.lstm.batch_first and input.dim() == 3 else 0
        if lengths is None or input.dim() != 3:
            y, state = self.lstm(input.flip(time), hx, lengths)
            return y.flip(time), state
        steps = torch.arange(input.size(time), device=input.device)
        ends = lengths.to(input.device).unsqueeze(1)
        order = torch.where(steps < ends, ends - 1 - steps, steps)  # (N, T)
        order = (order if time == 1 else order.t()).unsqueeze(2)
        y, state = self.lstm(input.gather(time, order.expand_as(input)), hx, lengths)
        return y.gather(time, order.expand_as(y)), state


def from_onnx(
    model: "onnx.ModelProto | str | os.PathLike[str]",
    names: Sequence[str] | None = None,
    inputs: Mapping[str, Array] | None = None,
) -> dict[str, LSTM | Reversed]:
    """The LSTM layers of a graph, wherever in it they are, bodies of If, Loop and Scan included.

    An ``LSTM`` node gives a layer with its direction, peepholes, coupled gates (``input_forget``), activations and
    layout: ``batch_first`` for layout 1. Where ONNX keeps directions on an axis of their own, (T, directions, N, H),
    the layer puts them side by side, (T, N, directions * H); its state is (directions, N, H) in either layout. A
    node's ``sequence_lens`` is the argument ``lengths``. A constant state, if it is not zero, is the layer's initial
    state; any other is the caller's to pass.

    onnxruntime's ``DynamicQuantizeLSTM`` gives a float32 layer with its 8-bit weights times their scales.

    A step that an exporter wrote out as matrix products, sigmoids and tanhs gives a layer too; of one unrolled over
    time the first step counts. It goes by the name of the node that multiplies its output gate in.

    Args:
        model: a file, or a model in memory with its external data in it.
        names: the layers to take; by default all. Nodes go by their name, or where they have none by their first
            output.
        inputs: values of graph inputs, by name, where weights or states come in by them.

    Returns:
        Layers by name, in the order of the graph.

    Warns:
        UserWarning: a layer was left out, and why, where others were found and ``names`` does not ask for it.

    Raises:
        ImportError: the package ``onnx`` is not there.
        OSError: the file cannot be read.
        ValueError: it is no ONNX file; there is no layer, or none of that name; or what was asked for cannot be
            converted: weights that the graph computes, activations or slopes that cellstep has not, different ones in
            the two directions, or a ``clip``, which in ONNX clips what goes into the activations.
    """
    try:
        import onnx
        from onnx import inliner
    except ImportError:
        raise ImportError("expected the package onnx; it is not installed; run: pip install cellstep[onnx]") from None
    if not isinstance(model, onnx.ModelProto):
        path = os.fspath(model)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"expected an .onnx file at '{path}'; there is none; check the path")
        try:
            model = onnx.load(path)
        except Exception as error:  # protobuf's and onnx's own have no base class in common
            reason = " ".join(str(error).split())
            raise ValueError(f"expected an ONNX file; '{path}' is none or is damaged: {reason}") from None
    names = [names] if isinstance(names, str) else names
    given = dict(inputs or {})
    unknown = sorted(set(given) - {value.name for value in [*model.graph.input, *model.graph.initializer]})
    if unknown:
        raise ValueError(f"expected inputs of the graph; got {', '.join(unknown)}; use the names that the graph has")
    try:
        converters = _converters(inliner.inline_local_functions(model) if model.functions else model, given)
    except Exception as error:  # a damaged file can be wrong in any way
        reason = " ".join(str(error).split())
        raise ValueError(f"expected a valid ONNX graph; got one that cannot be read: {reason}") from None
    if not converters:
        raise ValueError("expected a graph with LSTM nodes; got one without; check that it is the right file")
    missing = [name for name in names or () if name not in converters]
    if missing:
        there = ", ".join(f"'{name}'" for name in converters)
        raise ValueError(f"expected a layer '{missing[0]}'; got {there}; choose one of them")

    found: dict[str, LSTM | Reversed] = {}
    refused: list[str] = []
    for name, convert in converters.items():
        if names is None or name in names:
            try:
                found[name] = convert()
            except Exception as error:  # whatever is wrong with one node must not hide the others
                refused.append(f"'{name}': {' '.join(str(error).split())}")
    if refused and (names is not None or not found):
        raise ValueError(f"expected LSTM layers that cellstep can take; {'; '.join(refused)}")
    for reason in refused:
        warnings.warn(f"left out the LSTM layer {reason}", stacklevel=2)
    return found


def _converters(model: "onnx.ModelProto", given: Mapping[str, Array]) -> dict[str, Callable[[], LSTM | Reversed]]:
    """What makes a layer, by name, for every layer in a model."""
    converters: dict[str, Callable[[], LSTM | Reversed]] = {}
    for scope in scopes(model, given):
        for name, convert in _layers(scope):
            unique, number = name, 1
            while unique in converters:
                number += 1
                unique = f"{name}#{number}"
            converters[unique] = convert
    return converters


def _layers(scope: Scope) -> Iterator[tuple[str, Callable[[], LSTM | Reversed]]]:
    """Name and converter of every layer in a graph, without those in bodies."""
    for node in scope.graph.node:
        if node.op_type == "LSTM" and node.domain in ("", "ai.onnx"):
            yield _name(node), partial(_layer, node, scope)
        elif node.op_type == "DynamicQuantizeLSTM" and node.domain == "com.microsoft":
            yield _name(node), partial(_layer, node, scope, quantized=True)
        elif node.op_type.endswith("LSTM"):
            yield _name(node), partial(_other, node)
    for step in find_steps(scope):
        yield _name(step.node), step.layer


def _name(node: "onnx.NodeProto") -> str:
    return node.name or next((output for output in node.output if output), node.op_type)


def _other(node: "onnx.NodeProto") -> LSTM:
    raise ValueError(
        f"expected the standard operator LSTM; got {node.domain}.{node.op_type}; convert the model it was made from"
    )


def _layer(node: "onnx.NodeProto", scope: Scope, quantized: bool = False) -> LSTM | Reversed:
    from onnx import helper

    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    direction = attributes.get("direction", b"forward").decode()
    sides = 2 if direction == "bidirectional" else 1
    if direction not in ("forward", "reverse", "bidirectional"):
        raise ValueError(f"expected direction forward, reverse or bidirectional; got {direction!r}; correct the file")

    def weight(place: int, name: str) -> Tensor | None:
        value = scope.value(node.input[place]) if len(node.input) > place and node.input[place] else None
        if value is None and len(node.input) > place and node.input[place]:
            raise ValueError(
                f"expected {name} to be constant; got what the graph computes or is given as '{node.input[place]}'; "
                "give its value in inputs"
            )
        return None if value is None else tensor(value)

    w, r, b, p = weight(1, "W"), weight(2, "R"), weight(3, "B"), weight(7, "P")
    if w is None or r is None:
        raise ValueError("expected W and R; got a node without; correct the file")
    if w.dim() != 3 or r.dim() != 3:
        raise ValueError(f"expected W and R of three axes; got {tuple(w.shape)} and {tuple(r.shape)}; correct the file")
    if quantized:
        w = _dequantized("W", w, weight(8, "W_scale"), weight(9, "W_zero_point"))
        r = _dequantized("R", r, weight(10, "R_scale"), weight(11, "R_zero_point"))
    hidden = r.shape[2]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "W": (w, (sides, 4 * hidden, w.shape[2])),
        "R": (r, (sides, 4 * hidden, hidden)),
        "B": (b, (sides, 8 * hidden)),
        "P": (p, (sides, 3 * hidden)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"expected {name} of shape {shape}; got {tuple(value.shape)}; correct the file")
    if attributes.get("hidden_size", hidden) != hidden:
        raise ValueError(
            f"expected hidden_size={hidden}, as R has it; got {attributes['hidden_size']}; correct the file"
        )

    coupled = bool(attributes.get("input_forget", 0))
    options = _activations(attributes, sides)
    _refuse_clip(attributes.get("clip", 0.0), options)
    want = "igo" if coupled else "ifgo"
    parts = []
    for side in range(sides):
        part = {"weight_ih": reordered(w[side], _ORDER, want), "weight_hh": reordered(r[side], _ORDER, want)}
        if b is not None:
            for name, half in zip(("bias_ih", "bias_hh"), b[side].chunk(2), strict=True):
                part[name] = reordered(half, _ORDER, want)
        if p is not None:
            part["weight_peephole"] = reordered(p[side], "iof", "io" if coupled else "ifo")
        parts.append(part)
    batch_first = attributes.get("layout", 0) == 1
    initial = _initial(node, scope, batch_first, parts[0]["weight_hh"], sides)
    lstm = single_layer(parts, batch_first=batch_first, initial=initial, coupled=coupled, **options)
    return Reversed(lstm) if direction == "reverse" else lstm


def _dequantized(name: str, weight: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    """(sides, rows, columns) in float32 from 8-bit numbers as the operator has them, (sides, columns, rows).

    Scale and zero point are of a direction, (sides), or of a row, (sides, rows).
    """
    sides, _, rows = weight.shape
    if weight.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"expected {name} of 8 bits; got {weight.dtype}; correct the file")
    for part, value in (("scale", scale), ("zero_point", zero)):
        if value is None or tuple(value.shape) not in ((sides,), (sides, rows)):
            got = "none" if value is None else tuple(value.shape)
            raise ValueError(
                f"expected {name}_{part} of shape {(sides,)} or {(sides, rows)}; got {got}; correct the file"
            )
    assert scale is not None
    assert zero is not None
    columns = (sides, 1, -1)
    return ((weight.int() - zero.int().reshape(columns)) * scale.float().reshape(columns)).transpose(1, 2)


def _activations(attributes: dict[str, Any], sides: int) -> dict[str, Any]:
    """Activations by cellstep's names; slopes are handed out in the order of the functions that have some."""
    kinds = [kind.decode() for kind in attributes.get("activations", [])] or ["Sigmoid", "Tanh", "Tanh"] * sides
    if len(kinds) != 3 * sides:
        raise ValueError(f"expected {3 * sides} activations; got {', '.join(kinds)}; correct the file")
    slopes = [iter(attributes.get(f"activation_{name}", [])) for name in ("alpha", "beta")]
    ours = []
    for kind in kinds:
        lowered = kind.lower()
        alpha, beta = (
            (
                0.0 if default is None else next(values, default)
                for values, default in zip(slopes, _SLOPES[lowered], strict=True)
            )
            if lowered in _SLOPES
            else (0.0, 0.0)
        )
        name = next(
            (
                name
                for name, known, *slope in _ACTIVATIONS
                if known == lowered and (not slope or np.allclose((alpha, beta), slope[0], rtol=1e-6, atol=0))
            ),
            "",
        )
        if not name:
            slope = f" with alpha={alpha:g}, beta={beta:g}" if lowered in _SLOPES else ""
            raise ValueError(f"expected activations that cellstep has; got {kind}{slope}; it has no such one")
        ours.append(name)
    if ours[:3] != ours[-3:]:
        raise ValueError(f"expected the same activations forward and backward; got {', '.join(kinds)}; split the node")
    return dict(zip(("gate_activation", "activation", "output_activation"), ours[:3], strict=True))


#: cellstep's name, ONNX's in small letters, and alpha and beta where it takes them.
_ACTIVATIONS: list[tuple[Any, ...]] = [
    ("sigmoid", "sigmoid"),
    ("tanh", "tanh"),
    ("relu", "relu"),
    ("linear", "affine", (1.0, 0.0)),
    ("hard_sigmoid", "hardsigmoid", (0.2, 0.5)),
    ("hardsigmoid", "hardsigmoid", (1 / 6, 0.5)),
    ("elu", "elu", (1.0, 0.0)),
]
#: Alpha and beta by default; None where a function takes none.
_SLOPES: dict[str, tuple[float, float | None]] = {
    "affine": (1.0, 0.0),
    "hardsigmoid": (0.2, 0.5),
    "elu": (1.0, None),
}


def _refuse_clip(clip: float, options: dict[str, Any]) -> None:
    saturating = {"sigmoid", "tanh"}.issuperset(options.values())
    if clip and not (saturating and clip >= _SATURATED):
        raise ValueError(
            f"expected no clip; got {clip:g}, which clips what goes into the activations; cellstep clips the cell "
            "alone; take the attribute out of the node if your data never gets there"
        )


def _initial(
    node: "onnx.NodeProto", scope: Scope, batch_first: bool, like: Tensor, sides: int
) -> dict[str, Tensor] | None:
    """The constant state of a node, one row for all; None where it is zero, not there or not constant."""
    hidden = like.shape[1]
    rows: dict[str, Tensor] = {}
    dynamic = []
    for place, name in ((5, "initial_h"), (6, "initial_c")):
        rows[name] = like.new_zeros(sides, hidden)
        source = node.input[place] if len(node.input) > place else ""
        if not source:
            continue
        value = scope.value_for_any_batch(source)
        if value is None:
            dynamic.append(name)
            continue
        state = tensor(value).transpose(0, 1) if batch_first and value.ndim == 3 else tensor(value)
        if state.dim() != 3 or (state.shape[0], state.shape[2]) != (sides, hidden) or state.shape[1] == 0:
            raise ValueError(f"expected {name} of {sides} directions and {hidden} units; got {tuple(value.shape)}")
        if not torch.equal(state, state[:, :1].expand_as(state)):
            raise ValueError(f"expected one {name} for all rows; got different ones; leave it out of the node")
        rows[name] = state[:, 0].to(like.dtype)
    if not any(bool(row.any()) for row in rows.values()):
        return None
    if dynamic:
        raise ValueError(
            f"expected both states constant or none; got {dynamic[0]} from the graph; give its value in inputs"
        )
    return rows
