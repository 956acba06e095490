"""The ``.onnx`` file: standard ``LSTM`` nodes where ONNX has words for a layer's options, a ``Scan`` where it has not.

``LSTM`` nodes say stacks, directions, peepholes, coupled gates, activations and lengths. Projections, zoneout, layer
normalisation, a clipped cell (the ``clip`` of ONNX clips what goes into the activations), resets amid a sequence,
cell states of every step, and float64 (onnxruntime's ``LSTM`` is float32 alone) become a ``Scan`` over the steps for
each direction of a layer, its body made of standard operators.
"""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import cellstep
from cellstep.exporters.files import replacing
from cellstep.nn import LSTM, Chain

if TYPE_CHECKING:
    import onnx

_KEY = "cellstep"
#: LayerNormalization came in with opset 17, nothing here needs a later one, and the older the set, the more read it.
_OPSET = 17
_IR_VERSION = 8  # the one of the release that brought opset 17
#: Names in ONNX's LSTM with alpha and beta, where one takes them.
_ACTIVATIONS: dict[str, tuple[str, tuple[float | None, float | None]]] = {
    "linear": ("Affine", (1.0, 0.0)),
    "relu": ("Relu", (None, None)),
    "elu": ("Elu", (1.0, None)),
    "sigmoid": ("Sigmoid", (None, None)),
    "tanh": ("Tanh", (None, None)),
    "hard_sigmoid": ("HardSigmoid", (0.2, 0.5)),
    "hardsigmoid": ("HardSigmoid", (1 / 6, 0.5)),
}

_DTYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64}

_Array = NDArray[Any]
_Weights = dict[str, _Array]
_Pieces = list[str]
_Shape = list[str | int | None]


def export_onnx(
    model: Chain,
    path: Path,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    lengths: bool = False,
    reset: bool = False,
) -> None:
    """Write a model as an ONNX graph for inference; batch and time are dynamic.

    Inputs ``x`` (N, T, input_size), ``h`` (state_layers, N, h_size), ``c`` (state_layers, N, c_size); outputs ``y``
    (N, output_size), or (N, T, output_size) if the model answers every step, ``h_n`` and ``c_n``. T is at least 1.
    The initial state, sizes and names are in the file's metadata under the key ``cellstep``, as JSON.

    Args:
        model: a float32 or float64 chain. onnxruntime has no ``LSTM`` in float64, so that one is all ``Scan``.
        path: is replaced if it exists.
        input_names: other names for x, h and c, in this order.
        output_names: other names for y, h_n and c_n, in this order.
        lengths: add an input ``lengths`` (N) int32, 0 to T each: steps of a row from there on do not count.
        reset: add an input ``reset`` (N, T) bool: where true, a new sequence begins in a row, from the initial state.

    Raises:
        ImportError: the package ``onnx`` is not there.
        ValueError: a wrong number of names or one name twice, another dtype, or weights that are not finite.
        OSError: the file cannot be written.
    """
    try:
        import onnx
    except ImportError:
        raise ImportError("expected the package onnx; it is not installed; run: pip install cellstep[onnx]") from None
    inputs = [*_names("input_names", input_names, ("x", "h", "c")), *["lengths"] * lengths, *["reset"] * reset]
    outputs = _names("output_names", output_names, ("y", "h_n", "c_n"))
    if len({*inputs, *outputs}) != len(inputs) + len(outputs):
        raise ValueError(f"expected names that differ; got inputs {inputs} and outputs {outputs}; rename the doubles")
    dtype = model.input_offset.dtype
    if dtype not in (torch.float32, torch.float64):
        # onnxruntime's LSTM on a CPU reads neither half format; converting would change the numbers unasked.
        raise ValueError(f"expected a float32 or float64 model for an ONNX file; got {dtype}; use model.float()")
    proto = _model(model, inputs, outputs, lengths, reset)
    onnx.checker.check_model(proto, full_check=True)
    with replacing(path) as temporary:
        temporary.write_bytes(proto.SerializeToString())


def _names(argument: str, given: Sequence[str] | None, default: tuple[str, str, str]) -> list[str]:
    if given is None:
        return list(default)
    if isinstance(given, str) or len(given) != 3 or not all(given):
        raise ValueError(f"expected three {argument}, for {', '.join(default)}; got {given!r}; name each of them")
    return list(given)


def _array(tensor: Tensor) -> _Array:
    array: _Array = tensor.detach().cpu().contiguous().numpy()
    if not np.isfinite(array).all():
        raise ValueError("expected finite weights; got NaN or infinity in the model; train it again")
    return array


class _Graph:
    """Nodes in the making. A Scan's body has nodes of its own, and the weights and names of the graph around it."""

    def __init__(self, dtype: np.dtype[Any], taken: Sequence[str]) -> None:
        from onnx import helper

        self.dtype = dtype
        self.element = helper.np_dtype_to_tensor_dtype(dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.names = set(taken)

    def body(self) -> "_Graph":
        body = copy.copy(self)
        body.nodes = []
        return body

    def name(self, hint: str) -> str:
        name, number = hint, 0
        while name in self.names:
            number += 1
            name = f"{hint}_{number}"
        self.names.add(name)
        return name

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """A node; an empty name stands for an input that is left out. Gives the names of its outputs."""
        from onnx import helper

        names = [self.name(kind.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=f"{kind}:{names[0]}", **attributes))
        return names

    def __call__(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output."""
        return self.add(kind, *inputs, **attributes)[0]

    def weight(self, hint: str, values: Any) -> str:
        from onnx import numpy_helper

        name = self.name(hint)
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def sizes(self, *values: int) -> str:
        return self.weight("sizes", np.array(values, np.int64))

    def number(self, value: float) -> str:
        return self.weight("value", np.array(value, self.dtype))

    def output(self, value: str, name: str) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node("Identity", [value], [name], name=f"Identity:{name}"))

    def pieces(self, value: str, sizes: list[int], axis: int) -> _Pieces:
        if len(sizes) == 1:
            return [value]
        return self.add("Split", value, self.sizes(*sizes), outputs=len(sizes), axis=axis)

    def joined(self, pieces: _Pieces, axis: int) -> str:
        return pieces[0] if len(pieces) == 1 else self("Concat", *pieces, axis=axis)


def _model(model: Chain, inputs: list[str], outputs: list[str], lengths: bool, reset: bool) -> "onnx.ModelProto":
    from onnx import TensorProto, helper

    graph = _Graph(_array(model.input_offset).dtype, [*inputs, *outputs])
    element = graph.element
    h: _Shape = [model.state_layers, "N", model.h_size]
    c: _Shape = [model.state_layers, "N", model.c_size]
    y: _Shape = ["N", "T", model.output_size] if model.answers == "every" else ["N", model.output_size]
    specs: list[tuple[int, _Shape]] = [(element, ["N", "T", model.input_size]), (element, h), (element, c)]
    if lengths:
        specs.append((TensorProto.INT32, ["N"]))
    if reset:
        specs.append((TensorProto.BOOL, ["N", "T"]))
    values = _chain(graph, model, inputs[:3], "lengths" if lengths else "", "reset" if reset else "")
    for value, name in zip(values, outputs, strict=True):
        graph.output(value, name)
    proto = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "cellstep",
            [helper.make_tensor_value_info(name, *spec) for name, spec in zip(inputs, specs, strict=True)],
            [
                helper.make_tensor_value_info(name, element, shape)
                for name, shape in zip(outputs, (y, h, c), strict=True)
            ],
            initializer=graph.weights,
        ),
        producer_name="cellstep",
        producer_version=cellstep.__version__,
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
    )
    helper.set_model_props(proto, {_KEY: json.dumps(_config(model))})
    return proto


def _config(model: Chain) -> dict[str, Any]:
    h, c = (_array(part)[:, 0].tolist() for part in model.initial_state(1))
    return {
        "version": cellstep.__version__,
        "input_size": model.input_size,
        "output_size": model.output_size,
        "state_layers": model.state_layers,
        "h_size": model.h_size,
        "c_size": model.c_size,
        "answers": model.answers,
        "bidirectional": model.bidirectional,
        "feature_names": list(model.feature_names),
        "output_names": list(model.output_names),
        "window": model.window,
        "horizon": model.horizon,
        "initial_state": {"h": h, "c": c},
    }


def _chain(graph: _Graph, model: Chain, inputs: list[str], lengths: str, reset: str) -> tuple[str, str, str]:
    """The whole model; inside, sequences are (T, N, size), as ONNX's LSTM reads them."""
    from onnx import TensorProto

    raw, h, c = inputs
    x = _scaled(graph, raw, model.input_offset, model.input_scale, before=True)
    for dense in model.encoder:
        x = _dense(graph, dense, x)
    x = graph("Transpose", x, perm=[1, 0, 2])
    ends = graph("Cast", lengths, to=TensorProto.INT64) if lengths else ""
    valid = _valid(graph, x, ends) if lengths else ""
    resets = _resets(graph, reset, valid, model.bidirectional) if reset else []

    layers = [(lstm, layer) for lstm in model.lstms for layer in range(lstm.num_layers)]
    directions = [2 if lstm.bidirectional else 1 for lstm, _ in layers]
    axis = 0 if model.state_layers == sum(directions) else 2

    def split(value: str, sizes: list[int]) -> _Pieces:
        """(1, N, size) of each layer and direction."""
        each = [size for size, count in zip(sizes, directions, strict=True) for _ in range(count)]
        return graph.pieces(value, [1] * len(each) if axis == 0 else each, axis)

    h_pieces = split(h, [lstm.proj_size or lstm.hidden_size for lstm, _ in layers])
    c_pieces = split(c, [lstm.hidden_size for lstm, _ in layers])
    last_h: _Pieces = []
    last_c: _Pieces = []
    for (lstm, layer), count in zip(layers, directions, strict=True):
        at = slice(len(last_h), len(last_h) + count)
        state = h_pieces[at], c_pieces[at]
        cells: _Pieces = []
        if reset or _needs_scan(lstm):
            y, h_n, c_n, cells = _scan_layer(graph, lstm, layer, x, *state, valid, resets)
        else:
            y, h_n, c_n = _lstm_node(graph, lstm, layer, x, *state, lengths)
        y = graph("Add", y, x) if lstm.residual and layer > 0 else y
        x = graph.joined([y, *cells], 2)
        last_h += h_n
        last_c += c_n
    final = last_h[-directions[-1] :]
    if model.lstms[-1].return_cell_states:
        final = final + last_c[-directions[-1] :]
    y = _answer(graph, model, raw, x, final, ends, valid)
    return y, graph.joined(last_h, axis), graph.joined(last_c, axis)


def _valid(graph: _Graph, x: str, ends: str) -> str:
    """(T, N, 1): whether a step of ``x`` (T, N, size) lies within its row's length, ``ends`` (N) int64."""
    steps = graph("Gather", graph("Shape", x), graph.weight("axis", np.int64(0)), axis=0)
    places = graph("Range", graph.weight("zero", np.int64(0)), steps, graph.weight("one", np.int64(1)))
    return graph("Less", graph("Unsqueeze", places, graph.sizes(1, 2)), graph("Unsqueeze", ends, graph.sizes(1)))


def _resets(graph: _Graph, reset: str, valid: str, both: bool) -> _Pieces:
    """(T, N, 1) for each direction: whether the state is to be cleared before a step.

    A flag parts its step from the one before in time, so on the way back it counts for that one.
    """
    forward = graph("Unsqueeze", graph("Transpose", reset, perm=[1, 0]), graph.sizes(2))
    if not both:
        return [forward]
    inside = graph("And", forward, valid) if valid else forward
    begin, one, axis, end = graph.sizes(0), graph.sizes(1), graph.sizes(0), graph.sizes(np.iinfo(np.int64).max)
    first = graph("Slice", inside, begin, one, axis)
    none = graph("And", first, graph("Not", first))
    return [forward, graph("Concat", graph("Slice", inside, one, end, axis), none, axis=0)]


def _answer(graph: _Graph, model: Chain, raw: str, x: str, final: _Pieces, ends: str, valid: str) -> str:
    """Heads, scaling and skipped columns of ``raw`` (N, T, input_size) on what the layers gave, (T, N, size)."""

    def last(sequence: str) -> str:
        """The last step of each row: (N, T, size) -> (N, size)."""
        if not ends:
            return graph("Gather", sequence, graph.weight("last", np.int64(-1)), axis=1)
        place = graph("Max", graph("Sub", ends, graph.sizes(1)), graph.sizes(0))
        return graph("GatherND", sequence, graph("Unsqueeze", place, graph.sizes(1)), batch_dims=1)

    if model.answers == "hidden":
        y = graph("Squeeze", graph.joined(final, 2), graph.sizes(0))
    else:
        y = graph("Transpose", x, perm=[1, 0, 2])
        y = last(y) if model.answers == "last" else y
    for dense in model.heads:
        y = _dense(graph, dense, y)
    y = _scaled(graph, y, model.output_offset, model.output_scale, before=False)
    if model.skip_columns:
        skipped = graph("Gather", raw, graph.sizes(*model.skip_columns), axis=2)
        y = graph("Add", y, skipped if model.answers == "every" else last(skipped))
    if valid:
        if model.answers == "every":
            answered = graph("Transpose", valid, perm=[1, 0, 2])
        else:
            answered = graph("Greater", graph("Unsqueeze", ends, graph.sizes(1)), graph.sizes(0))
        y = graph("Where", answered, y, graph.number(0))
    return y


def _scaled(graph: _Graph, x: str, offset: Tensor, scale: Tensor, *, before: bool) -> str:
    """``(x - offset) * scale`` before the layers, ``x * scale + offset`` behind; what changes nothing is left out."""
    shift = bool((offset != 0).any())
    stretch = bool((scale != 1).any())
    if before and shift:
        x = graph("Sub", x, graph.weight("input_offset", _array(offset)))
    if stretch:
        x = graph("Mul", x, graph.weight("input_scale" if before else "output_scale", _array(scale)))
    if not before and shift:
        x = graph("Add", x, graph.weight("output_offset", _array(offset)))
    return x


def _dense(graph: _Graph, dense: Any, x: str) -> str:
    x = graph("MatMul", x, graph.weight("dense_weight", _array(dense.weight).T))
    if dense.bias is not None:
        x = graph("Add", x, graph.weight("dense_bias", _array(dense.bias)))
    return _activated(graph, x, dense.activation)


def _activated(graph: _Graph, x: str, activation: str) -> str:
    if activation == "linear":
        return x
    if activation == "softmax":
        return graph("Softmax", x, axis=-1)
    if activation == "elu":  # written out, for onnxruntime has the operator in float32 alone
        below = graph("Sub", graph("Exp", graph("Min", x, graph.number(0))), graph.number(1))
        return graph("Where", graph("Less", x, graph.number(0)), below, x)
    kind, (alpha, beta) = _ACTIVATIONS[activation]
    if alpha is None or beta is None:
        return graph(kind, x)
    # Not the operator HardSigmoid: onnxruntime lacks it in float64, and its slope is an attribute in float32.
    slanted = graph("Add", graph("Mul", x, graph.number(alpha)), graph.number(beta))
    return graph("Clip", slanted, graph.number(0), graph.number(1))


def _needs_scan(lstm: LSTM) -> bool:
    return bool(
        lstm.proj_size
        or lstm.layer_norm
        or lstm.cell_clip > 0
        or lstm.zoneout_h > 0
        or lstm.zoneout_c > 0
        or lstm.return_cell_states
        or lstm.weight_ih_l0.dtype == torch.float64
    )


def _weights(lstm: LSTM, layer: int, reverse: bool) -> _Weights:
    return {name: _array(tensor) for name, tensor in lstm.layer_parameters(layer, reverse).items()}


def _lstm_node(
    graph: _Graph, lstm: LSTM, layer: int, x: str, h: _Pieces, c: _Pieces, lengths: str
) -> tuple[str, _Pieces, _Pieces]:
    """A layer as one LSTM node: (T, N, directions * H), and the state of each direction, (1, N, H)."""
    hidden = lstm.hidden_size
    sides = [_weights(lstm, layer, reverse) for reverse in (False, True)[: len(h)]]

    def stacked(hint: str, *names: str, order: str = "iofg") -> str:
        rows = [np.concatenate([_gate(side[name], order, hidden, lstm.coupled) for name in names]) for side in sides]
        return graph.weight(f"{hint}_l{layer}", np.stack(rows))

    activations = [_ACTIVATIONS[name] for name in (lstm.gate_activation, lstm.activation, lstm.output_activation)]
    kinds = [kind for kind, _ in activations]
    alphas, betas = ([slope[k] for _, slope in activations if slope[k] is not None] * len(sides) for k in range(2))
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": "bidirectional" if len(sides) == 2 else "forward"}
    if kinds != ["Sigmoid", "Tanh", "Tanh"]:
        attributes["activations"] = kinds * len(sides)
    if alphas:
        attributes["activation_alpha"] = alphas
    if betas:
        attributes["activation_beta"] = betas
    if lstm.coupled:
        attributes["input_forget"] = 1
    h_0, c_0 = graph.joined(h, 0), graph.joined(c, 0)
    y, h_n, c_n = graph.add(
        "LSTM",
        x,
        stacked("W", "weight_ih"),
        stacked("R", "weight_hh"),
        stacked("B", "bias_ih", "bias_hh") if lstm.bias else "",
        lengths,
        h_0,
        c_0,
        *([stacked("P", "weight_peephole", order="iof")] if lstm.peephole else []),
        outputs=3,
        **attributes,
    )
    if lengths:  # what a row of length 0 ends in is left open by ONNX, and is zero in onnxruntime
        empty = graph("Unsqueeze", graph("Equal", lengths, graph.weight("zero", np.int32(0))), graph.sizes(1))
        h_n, c_n = graph("Where", empty, h_0, h_n), graph("Where", empty, c_0, c_n)
    if len(sides) == 1:
        y = graph("Squeeze", y, graph.sizes(1))
    else:
        y = graph("Reshape", graph("Transpose", y, perm=[0, 2, 1, 3]), graph.sizes(0, 0, 2 * hidden))
    return y, graph.pieces(h_n, [1] * len(sides), 0), graph.pieces(c_n, [1] * len(sides), 0)


def _gate(rows: _Array, order: str, hidden: int, coupled: bool) -> _Array:
    """Rows of the gates in another order; the forget gate of a coupled layer, which nothing reads, is zero."""
    have = [gate for gate in "ifgo" if gate in order and not (coupled and gate == "f")]
    blocks = {gate: rows[k * hidden : (k + 1) * hidden] for k, gate in enumerate(have)}
    return np.concatenate([blocks.get(gate, np.zeros_like(rows[:hidden])) for gate in order])


def _scan_layer(
    graph: _Graph, lstm: LSTM, layer: int, x: str, h: _Pieces, c: _Pieces, valid: str, resets: _Pieces
) -> tuple[str, _Pieces, _Pieces, _Pieces]:
    """A layer as one Scan a direction; shapes as in :func:`_lstm_node`, and cells (T, N, H) if the layer gives them."""
    ends = [
        _scan(graph, lstm, layer, reverse, x, *state, valid, resets)
        for reverse, state in enumerate(zip(h, c, strict=True))
    ]
    outputs, last_h, last_c, cells = zip(*ends, strict=True)
    return graph.joined(list(outputs), 2), list(last_h), list(last_c), [part for part in cells if part]


def _scan(
    graph: _Graph, lstm: LSTM, layer: int, reverse: int, x: str, h: str, c: str, valid: str, resets: _Pieces
) -> tuple[str, str, str, str]:
    from onnx import TensorProto, helper

    want_cells = lstm.return_cell_states and layer + 1 == lstm.num_layers
    weights = _weights(lstm, layer, bool(reverse))
    element, hidden, recurrent = graph.element, lstm.hidden_size, lstm.proj_size or lstm.hidden_size
    body = graph.body()
    inputs: dict[str, tuple[int, int]] = {
        body.name("h"): (element, recurrent),
        body.name("c"): (element, hidden),
        body.name("a"): (element, len(weights["weight_ih"])),
    }
    before_h, before_c, a = inputs
    start_h, start_c = before_h, before_c
    sequences = [_projected(graph, x, weights, "ih")]
    if resets:
        sequences.append(resets[reverse])
        clear = body.name("clear")
        inputs[clear] = (TensorProto.BOOL, 1)
        place = layer * (2 if lstm.bidirectional else 1) + reverse
        initial_h, initial_c = (_array(part[place]) for part in lstm.initial_state(1))
        start_h = body("Where", clear, graph.weight("initial_h", initial_h), before_h)
        start_c = body("Where", clear, graph.weight("initial_c", initial_c), before_c)
    after_h, after_c = _step(body, lstm, weights, a, start_h, start_c)
    if valid:
        sequences.append(valid)
        counts = body.name("counts")
        inputs[counts] = (TensorProto.BOOL, 1)
        # A reverse scan so waits in the state it was given until it comes to the last valid step.
        after_h, after_c = body("Where", counts, after_h, before_h), body("Where", counts, after_c, before_c)
    y = body("Identity", after_h)

    def values(specs: Mapping[str, tuple[int, int]]) -> list[Any]:
        return [helper.make_tensor_value_info(name, kind, ["N", size]) for name, (kind, size) in specs.items()]

    outputs = {after_h: (element, recurrent), after_c: (element, hidden), y: (element, recurrent)}
    if want_cells:
        outputs[body("Identity", after_c)] = element, hidden
    first = graph.sizes(0)
    last_h, last_c, y, *cells = graph.add(
        "Scan",
        graph("Squeeze", h, first),
        graph("Squeeze", c, first),
        *sequences,
        outputs=len(outputs),
        body=helper.make_graph(body.nodes, graph.name("step"), values(inputs), values(outputs)),
        num_scan_inputs=len(sequences),
        **(
            {"scan_input_directions": [1] * len(sequences), "scan_output_directions": [1] * (len(outputs) - 2)}
            if reverse
            else {}
        ),
    )
    return y, graph("Unsqueeze", last_h, first), graph("Unsqueeze", last_c, first), "".join(cells)


def _projected(graph: _Graph, x: str, weights: _Weights, side: str) -> str:
    """``LN(W x) + b``, LN where the layer has it; the weights go to the graph, for all steps."""
    x = graph("MatMul", x, graph.weight(f"weight_{side}", weights[f"weight_{side}"].T))
    return _normalised(graph, x, weights.get(f"norm_{side}"), weights.get(f"bias_{side}"))


def _normalised(graph: _Graph, x: str, gain: _Array | None, shift: _Array | None) -> str:
    shifts = [] if shift is None else [graph.weight("shift", shift)]
    if gain is not None:
        return graph("LayerNormalization", x, graph.weight("gain", gain), *shifts, axis=-1, epsilon=1e-5)
    return graph("Add", x, *shifts) if shifts else x


def _step(body: _Graph, lstm: LSTM, weights: _Weights, a: str, h: str, c: str) -> tuple[str, str]:
    """One step as in :func:`cellstep.formula.lstm_steps`: h (N, R) and c (N, H) behind it."""
    hidden = lstm.hidden_size
    peepholes = np.split(weights["weight_peephole"], 2 if lstm.coupled else 3) if lstm.peephole else []

    def gate(x: str, cell: str, place: int) -> str:
        if peepholes:
            x = body("Add", x, body("Mul", cell, body.weight("peephole", peepholes[place])))
        return _activated(body, x, lstm.gate_activation)

    def mixed(old: str, new: str, zoneout: float) -> str:
        if zoneout == 0:
            return new
        return body("Add", body("Mul", old, body.number(zoneout)), body("Mul", new, body.number(1 - zoneout)))

    sums = body("Add", a, _projected(body, h, weights, "hh"))
    at_i, *at_f, at_g, at_o = body.add("Split", sums, outputs=len(weights["weight_ih"]) // hidden, axis=-1)
    i = gate(at_i, c, 0)
    f = body("Sub", body.number(1), i) if lstm.coupled else gate(at_f[0], c, 1)
    g = _activated(body, at_g, lstm.activation)
    new_c = body("Add", body("Mul", f, c), body("Mul", i, g))
    if lstm.cell_clip > 0:
        new_c = body("Clip", new_c, body.number(-lstm.cell_clip), body.number(lstm.cell_clip))
    o = gate(at_o, new_c, -1)
    seen = _normalised(body, new_c, weights.get("norm_c"), weights.get("norm_c_bias"))
    new_h = body("Mul", o, _activated(body, seen, lstm.output_activation))
    if lstm.proj_size:
        new_h = body("MatMul", new_h, body.weight("weight_hr", weights["weight_hr"].T))
    return mixed(h, new_h, lstm.zoneout_h), mixed(c, new_c, lstm.zoneout_c)


class OnnxModel:
    """A file of :func:`export_onnx` on onnxruntime, one thread.

    ``input_size``, ``output_size``, ``state_layers``, ``h_size``, ``c_size``, ``answers``, ``feature_names``,
    ``output_names``, ``window`` and ``horizon`` are those of the chain; ``dtype`` is what it computes in.
    """

    def __init__(self, session: Any, config: dict[str, Any]) -> None:
        self._session = session
        self._inputs = [value.name for value in session.get_inputs()]
        self.dtype: np.dtype[Any] = np.dtype(_DTYPES[session.get_inputs()[0].type])
        self.input_size = int(config["input_size"])
        self.output_size = int(config["output_size"])
        self.state_layers = int(config["state_layers"])
        self.h_size = int(config["h_size"])
        self.c_size = int(config["c_size"])
        self.answers = str(config["answers"])
        self.bidirectional = bool(config["bidirectional"])
        self.takes_reset = "reset" in self._inputs[3:]
        self.feature_names = [str(name) for name in config["feature_names"]]
        self.output_names = [str(name) for name in config["output_names"]]
        self.window = int(config["window"])
        self.horizon = int(config["horizon"])
        self._initial = [
            np.array(config["initial_state"][part], self.dtype).reshape(self.state_layers, 1, size)
            for part, size in (("h", self.h_size), ("c", self.c_size))
        ]

    def initial(self, batch_size: int) -> tuple[_Array, _Array]:
        """The state (h, c) of ``batch_size`` fresh streams: zero, or learned."""
        h, c = (np.repeat(part, batch_size, axis=1) for part in self._initial)
        return h, c

    def run_raw(
        self, x: _Array, h: _Array, c: _Array, lengths: _Array | None = None, reset: _Array | None = None
    ) -> tuple[_Array, _Array, _Array]:
        """Run the graph once: y, h and c of :func:`export_onnx`, whose inputs these are, in the model's dtype.

        A file with the inputs ``lengths`` and ``reset`` takes all steps, and resets nothing, where they are None.

        Raises:
            ValueError: ``lengths`` or ``reset`` is given, and the file has no such input.
        """
        feeds = dict(zip(self._inputs, (x, h, c), strict=False))
        for name, given, default, kind in (
            ("lengths", lengths, np.full(x.shape[0], x.shape[1]), np.int32),
            ("reset", reset, np.zeros(x.shape[:2]), np.bool_),
        ):
            if name in self._inputs[3:]:
                feeds[name] = np.asarray(default if given is None else given, kind)
            elif given is not None:
                raise ValueError(f"expected a file with the input {name}; got one without; export it with {name}=True")
        y, h, c = self._session.run(None, feeds)
        return y, h, c


def load_onnx(path: str | os.PathLike[str]) -> OnnxModel:
    """Load what :func:`export_onnx` wrote.

    Raises:
        ImportError: the package ``onnxruntime`` is not there.
        OSError: the file cannot be read.
        ValueError: it is no ONNX file, or not one that cellstep exported.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ImportError(
            "expected the package onnxruntime; it is not installed; run: pip install cellstep[onnx]"
        ) from None
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"expected an .onnx file at '{name}'; there is none; check the path")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised
    try:
        session = onnxruntime.InferenceSession(name, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own have no base class in common
        reason = " ".join(str(error).split())
        raise ValueError(f"expected an ONNX file; '{name}' is none or is damaged: {reason}") from None
    metadata = session.get_modelmeta().custom_metadata_map
    if _KEY not in metadata:
        raise ValueError(f"expected a model that cellstep exported; '{name}' has no cellstep metadata; export it again")
    try:
        return OnnxModel(session, json.loads(metadata[_KEY]))
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"expected cellstep's metadata to be whole; '{name}' is damaged: {reason}") from None
