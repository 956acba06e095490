"""LSTM steps that an exporter wrote out as single operators."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cellstep.convert.onnx_values import Scope
from cellstep.convert.parts import Array, single_layer, tensor
from cellstep.nn import LSTM

if TYPE_CHECKING:
    import onnx

_MOVES = ("Cast", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")


@dataclass
class Step:
    """h' = sigmoid(o) tanh(c'), c' = sigmoid(f) c + sigmoid(i) tanh(g), by the names of the values in the graph."""

    node: "onnx.NodeProto"
    scope: Scope
    gates: dict[str, str]
    c: str
    new_c: str
    before: "Step | None" = None

    @property
    def new_h(self) -> str:
        return str(self.node.output[0])

    def layer(self) -> LSTM:
        """The step's weights as a layer.

        Raises:
            ValueError: the gates are not sums of matrix products with constant weights, of one input and one state.
        """
        sums = {gate: _sum(self.scope, value) for gate, value in self.gates.items()}
        sources = set(sums["i"].products)
        if len(sources) != 2 or any(set(part.products) != sources for part in sums.values()):
            raise ValueError(
                f"expected gates that are W x + R h + b; got products of {', '.join(sorted(sources)) or 'nothing'}; "
                "export the layer as an LSTM node"
            )
        recurrent = self._recurrent(sums["i"].products)
        (other,) = sources - {recurrent}
        hidden = sums["i"].products[recurrent].shape[0]
        rows = {
            "weight_ih": np.concatenate([sums[gate].products[other].T for gate in "ifgo"]),
            "weight_hh": np.concatenate([sums[gate].products[recurrent].T for gate in "ifgo"]),
            "bias_ih": np.concatenate([np.broadcast_to(sums[gate].bias, (hidden,)) for gate in "ifgo"]),
        }
        weights = {name: tensor(np.asarray(value, rows["weight_hh"].dtype)) for name, value in rows.items()}
        weights["bias_hh"] = torch.zeros_like(weights["bias_ih"])
        return single_layer([weights], batch_first=False)

    def _recurrent(self, products: dict[str, Array]) -> str:
        """Which of the two factors is h: by its size, or as what comes from where c comes from."""
        if self.before is not None and self.before.new_h in products:
            return self.before.new_h
        square = [name for name, weight in products.items() if weight.shape[0] == weight.shape[1]]
        if len(square) == 1:
            return square[0]
        origin = _origin(self.scope, self.c)
        together = [name for name in square if _origin(self.scope, name) == origin]
        if len(together) == 1:
            return together[0]
        raise ValueError(
            f"expected to tell h from x; got {' and '.join(products)}, of the same size and neither from where c "
            "comes from; export the layer as an LSTM node"
        )


def find_steps(scope: Scope) -> Iterator[Step]:
    """The first step of every written-out layer in a graph; its body's graphs are scopes of their own."""
    steps: dict[str, Step] = {}
    for node in scope.graph.node:
        step = _step(scope, node)
        if step is not None:
            step.before = steps.get(step.c)
            steps[step.new_c] = step
    for step in steps.values():
        if step.before is None or not _same_weights(step, step.before):
            yield step


def _same_weights(step: Step, before: Step) -> bool:
    try:
        pairs = [(_sum(s.scope, s.gates["i"]).products.values()) for s in (step, before)]
    except ValueError:
        return False
    return all(any(np.array_equal(a, b) for b in pairs[1]) for a in pairs[0])


def _step(scope: Scope, node: "onnx.NodeProto") -> Step | None:
    """The step that ends with a node, if one does."""

    def factors(value: str, *kinds: str) -> list[str] | None:
        """Inputs of the product's two factors, which are of these kinds; an empty kind stands for any value."""
        product = scope.producer(value)
        if product is None or product.op_type != "Mul":
            return None
        for pair in (list(product.input), list(reversed(product.input))):
            made = [scope.producer(name) for name in pair]
            if all(not kind or (maker and maker.op_type == kind) for kind, maker in zip(kinds, made, strict=True)):
                return [
                    maker.input[0] if kind and maker else name
                    for kind, maker, name in zip(kinds, made, pair, strict=True)
                ]
        return None

    ends = factors(node.output[0], "Sigmoid", "Tanh") if node.op_type == "Mul" else None
    total = scope.producer(ends[1]) if ends else None
    if ends is None or total is None or total.op_type != "Add":
        return None
    for fresh, kept in (total.input, reversed(total.input)):
        added, remembered = factors(fresh, "Sigmoid", "Tanh"), factors(kept, "Sigmoid", "")
        if added and remembered:
            gates = {"i": added[0], "f": remembered[0], "g": added[1], "o": ends[0]}
            return Step(node, scope, gates, remembered[1], ends[1])
    return None


@dataclass
class _Sum:
    """products[u] of the values u, one matrix (size of u, columns) each, and a bias."""

    products: dict[str, Array]
    bias: Array

    def columns(self, take: slice) -> "_Sum":
        bias = self.bias if self.bias.ndim == 0 or self.bias.shape[-1] == 1 else self.bias[..., take]
        return _Sum({name: weight[:, take] for name, weight in self.products.items()}, bias)


def _sum(scope: Scope, value: str) -> _Sum:
    """What a value is a sum of.

    Raises:
        ValueError: it is something else.
    """
    constant = scope.value(value)
    if constant is not None:
        return _Sum({}, constant if constant.ndim == 0 else constant.reshape(constant.shape[-1]))
    node = scope.producer(value)
    kind = "a value from outside" if node is None else node.op_type
    if node is not None and kind == "Identity":
        return _sum(scope, node.input[0])
    if node is not None and kind == "Add":
        one, other = (_sum(scope, name) for name in node.input)
        if not set(one.products) & set(other.products):
            return _Sum(one.products | other.products, one.bias + other.bias)
    if node is not None and kind in ("MatMul", "Gemm"):
        factor = scope.value(node.input[1])
        attributes = _attributes(node)
        unscaled = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        if factor is not None and factor.ndim == 2 and unscaled and not attributes.get("transA"):
            bias = _sum(scope, node.input[2]).bias if len(node.input) > 2 else np.zeros((), factor.dtype)
            return _Sum({node.input[0]: factor.T if attributes.get("transB") else factor}, bias)
    if node is not None and kind == "Split":
        whole = _sum(scope, node.input[0])
        columns = next((weight.shape[1] for weight in whole.products.values()), 0)
        sizes = _split_sizes(scope, node, columns)
        if _attributes(node).get("axis", 0) != 0 and sum(sizes) == columns:
            place = list(node.output).index(value)
            start = sum(sizes[:place])
            return whole.columns(slice(start, start + sizes[place]))
    raise ValueError(
        f"expected gates made of MatMul, Gemm, Add and Split with constant weights; got {kind} at '{value}'; export "
        "the layer as an LSTM node"
    )


def _attributes(node: "onnx.NodeProto") -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _split_sizes(scope: Scope, node: "onnx.NodeProto", columns: int) -> list[int]:
    """An input of the operator since opset 13, an attribute before, and equal parts where it has neither."""
    given = scope.value(node.input[1]) if len(node.input) > 1 else _attributes(node).get("split")
    return [columns // len(node.output)] * len(node.output) if given is None else [int(size) for size in given]


def _origin(scope: Scope, value: str) -> str:
    """Where a value comes from, past operators that only move values."""
    node = scope.producer(value)
    while node is not None and node.op_type in _MOVES:
        value = node.input[0]
        node = scope.producer(value)
    return value
