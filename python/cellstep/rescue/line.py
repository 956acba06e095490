"""From the operators of one step to stages in one line: scaling, dense layers, LSTMs.

The stages are a proposal. What the code does with batch and steps, and which step it answers from, is not read off
here: whoever proposes a model compares its numbers with those of the code on several steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cellstep.rescue.code import MOVES, Node, Unreadable

_ACTIVATIONS = ("relu", "tanh", "sigmoid", "hardsigmoid", "elu", "softmax")
_SUMS = {"add", "addmm", "linear", "matmul", "mm"}
_NODE_LIMIT = 5000  # values among which layers are looked for
_WAY_LIMIT = 1000  # values from the answer back to the input
_SUM_DEPTH = 8  # of sums within sums: more would be followed twice each


@dataclass(eq=False)
class Affine:
    """x op value, or value op x: "add", "sub", "mul" or "div"; "norm": x * value[0] + value[1]."""

    op: str
    value: Tensor
    reverse: bool = False
    root: Tensor | None = None  # the tensor of the file


@dataclass(eq=False)
class Activation:
    name: str


@dataclass(eq=False)
class Linear:
    weight: Tensor  # (out, in)
    bias: Tensor | None
    roots: list[Tensor]  # the tensors of the file


@dataclass(eq=False)
class Skipped:
    """Columns of the input that are added to the answer."""

    columns: list[int]


@dataclass(eq=False)
class Recurrent:
    """An LSTM or a cell: parameters in torch's order of names, rows in gate order i, f, g, o.

    ``roots``: the tensors of the file that the parameters were made of. ``states``: where h and c start, as nodes.
    """

    weights: list[Tensor]
    roots: list[Tensor]
    states: list[Node]
    is_cell: bool = True
    bias: bool = True
    num_layers: int = 1
    dropout: float = 0.0
    bidirectional: bool = False
    batch_first: bool = True

    @property
    def output_size(self) -> int:
        return self.weights[1].size(1) * (2 if self.bidirectional else 1)


Stage = Affine | Activation | Linear | Skipped | Recurrent


_Terms = tuple[list[tuple[Node, Tensor, list[Tensor]]], list[tuple[Tensor, list[Tensor]]]]


def stages(answer: Node, first: Node) -> list[Stage]:
    """The way from the first input to the answer.

    Raises:
        Unreadable: there is no one way, or something on it is not understood.
    """
    found: list[Stage] = []
    node, moved = answer, 0
    while node is not first:
        if len(found) + moved > _WAY_LIMIT:
            raise Unreadable("a way to the answer longer than is followed here")
        stage, before = _step(node, first, not found)
        if stage is not None:
            found.append(stage)
        else:
            moved += 1
        node = before
    if not any(isinstance(stage, Recurrent) for stage in found):
        raise Unreadable("an answer that passes through no LSTM")
    return found[::-1]


def layers(nodes: Sequence[Node]) -> Iterator[Recurrent | Linear]:
    """Every LSTM, cell and dense layer among operators, each once."""
    seen: set[tuple[int, ...]] = set()
    for node in reversed(nodes[:_NODE_LIMIT]):  # a sum with a bias before the product in it
        stage: Recurrent | Linear | None = None
        if node.op == "lstm":
            stage = _lstm(node)
        elif node.op in ("mul", "item"):
            found = _cell(node)
            stage = found[0] if found else None
        elif node.op in ("linear", "add", "addmm", "matmul", "mm"):
            layer = _linear(node)
            stage = layer[0] if layer else None
        if stage is not None:
            roots = stage.roots if isinstance(stage, Recurrent) else stage.roots[:1]
            key = tuple(id(root) for root in roots)
            if roots and key not in seen:
                seen.add(key)
                yield stage


def _step(node: Node, first: Node, last: bool) -> tuple[Stage | None, Node]:
    """The last stage before a value, None for one that changes no number, and the value before it."""
    op, args = node.op, node.args
    if node.constant:
        raise Unreadable("an answer that does not come from the first input")
    if op == "given":
        raise Unreadable("an answer that comes from another input than the first")
    cell = _cell(node)
    if cell is not None:
        return cell
    call = _lstm_behind(node)
    if call is not None:
        stage = _lstm(call)
        if stage is None:
            raise Unreadable("an LSTM whose weights are not those of the file")
        return stage, call.args[0]
    layer = _linear(node)
    if layer is not None:
        return layer
    if op in _ACTIVATIONS:
        return Activation(op), args[0]
    if op == "neg":
        return Affine("mul", torch.tensor(-1.0, dtype=torch.float64)), args[0]
    if op == "batch_norm":
        return _normalisation(node), args[0]
    if op in ("add", "sub", "mul", "div", "rsub"):
        return _arithmetic(node, first, last)
    if op in MOVES:
        sources = [source for source in _nodes(args) if not source.constant]
        if len(sources) == 1 and sources[0].value is not None and sources[0].value.numel() == node.value.numel():
            return None, sources[0]
        raise Unreadable(f"'{op}' that takes a part of the values or adds others")
    if op == "item" and isinstance(args[0], Node) and args[0].op in MOVES:
        raise Unreadable(f"'{args[0].op}' that takes a part of the values")
    raise Unreadable(f"'{args[0].op if op == 'item' else op}' on the way to the answer")


def _nodes(args: Any) -> list[Node]:
    found = []
    for arg in args:
        if isinstance(arg, Node):
            found.append(arg)
        elif isinstance(arg, tuple):
            found += _nodes(arg)
    return found


def _arithmetic(node: Node, first: Node, last: bool) -> tuple[Stage, Node]:
    """A sum, difference, product or quotient with a constant, or at the very end with columns of the input."""
    op, (one, other, *rest) = node.op, node.args
    if any(factor != 1 for factor in rest):
        raise Unreadable(f"'{op}' with a factor or another rounding")
    for value, source, reverse in ((other, one, op == "rsub"), (one, other, op != "rsub")):
        if isinstance(source, Node) and not source.constant:
            if isinstance(value, Node) and value.constant:
                return Affine(op.removeprefix("r"), value.value, reverse, _root(value)), source
            if type(value) in (int, float):
                return Affine(op.removeprefix("r"), torch.tensor(value, dtype=torch.float64), reverse), source
            if isinstance(value, Node) and last and op == "add" and _only_moved(value, first):
                columns = first.value.reshape(-1, first.value.size(-1))
                wanted = (
                    value.value.reshape(columns.size(0), -1) if value.value.numel() % columns.size(0) == 0 else None
                )
                if wanted is not None:
                    places = [(columns == column[:, None]).all(0).nonzero() for column in wanted.unbind(1)]
                    if all(len(place) for place in places):
                        return Skipped([int(place[0]) for place in places]), source
    raise Unreadable(f"'{op}' of two values that both come from the input")


def _only_moved(node: Node, first: Node) -> bool:
    while node is not first:
        sources = _nodes(node.args)
        if node.op not in MOVES or len(sources) != 1:
            return False
        (node,) = sources
    return True


def _normalisation(node: Node) -> Affine:
    """Batch normalisation as it is at inference: one factor and one summand a column."""
    _, weight, bias, mean, variance, _, _, epsilon, *_ = node.args
    if not (_is_constant(mean) and _is_constant(variance)) or type(epsilon) is not float:
        raise Unreadable("'batch_norm' without the statistics of its training")
    scale = (variance.value.double() + epsilon).rsqrt()
    scale = scale * weight.value if _is_constant(weight) else scale
    shift = -mean.value * scale + (bias.value if _is_constant(bias) else 0)
    return Affine("norm", torch.stack([scale, shift]))


def _root(value: Any) -> Tensor | None:
    """The tensor of the file that a constant is, or has the values of in another order."""
    while isinstance(value, Node):
        if value.root is not None:
            return value.root
        sources = _nodes(value.args)
        if len(sources) != 1:
            return None
        (value,) = sources
    return None


def _roots(value: Any) -> list[Tensor]:
    found = _root(value)
    return [] if found is None else [found]


def _is_constant(value: Any) -> bool:
    return isinstance(value, Node) and value.constant


def _linear(node: Node, state: bool = False) -> tuple[Linear, Node] | None:
    """A product with a constant matrix, and what is added to it: its layer and its input.

    ``state``: also of a constant, as the first state of a cell is one.
    """
    op, args = node.op, node.args
    if node.constant and not state:
        return None
    if op == "linear" and _is_constant(args[1]):
        bias = args[2] if len(args) > 2 else None
        if args[1].value.dim() == 2 and (bias is None or _is_constant(bias)):
            return Linear(args[1].value, bias and bias.value, _roots(args[1]) + _roots(bias)), args[0]
    if op in ("matmul", "mm") and _is_constant(args[1]) and args[1].value.dim() == 2:
        return Linear(args[1].value.t(), None, _roots(args[1])), args[0]
    if (
        op == "addmm"
        and all(factor == 1 for factor in args[3:])
        and _is_constant(args[0])
        and _is_constant(args[2])
        and args[0].value.dim() == 1
    ):
        return Linear(args[2].value.t(), args[0].value, _roots(args[2]) + _roots(args[0])), args[1]
    if op == "add" and all(factor == 1 for factor in args[2:]):
        for one, other in (args[:2], args[1::-1]):
            if isinstance(one, Node) and one.op in ("matmul", "mm", "linear") and _is_constant(other):
                found = _linear(one)
                if found and found[0].bias is None and other.value.shape == found[0].weight.shape[:1]:
                    layer, source = found
                    return Linear(layer.weight, other.value, layer.roots + _roots(other)), source
    return None


def _lstm_behind(node: Node) -> Node | None:
    """The LSTM of whose output or last hidden states a value is all, or a part, or parts side by side."""
    todo, seen, calls = [node], set(), set()
    while todo:
        part = todo.pop()
        if part in seen:
            continue
        seen.add(part)
        if len(seen) > _WAY_LIMIT:
            return None
        call, k = part.args if part.op == "item" else (part, None)
        if call.op == "lstm" and k in (0, 1):
            calls.add(call)
        elif call.op in MOVES:
            todo += _nodes(call.args)
        else:
            return None
    return calls.pop() if len(calls) == 1 else None


def _lstm(node: Node) -> Recurrent | None:
    _, states, parts, bias, layers, dropout, _, both, batch_first = node.args
    if not all(_is_constant(part) for part in parts) or type(layers) is not int or layers < 1:
        return None
    weights = [part.value for part in parts]
    return Recurrent(
        weights,
        [root for part in parts for root in _roots(part)],
        list(states),
        False,
        bool(bias),
        layers,
        float(dropout),
        bool(both),
        bool(batch_first),
    )


# Cells


def _cell(node: Node) -> tuple[Recurrent, Node] | None:
    """The cell whose new h a value is, torch's own or the formula written out, and its input."""
    if node.op == "item":
        call, k = node.args
        if call.op != "lstm_cell" or k != 0:
            return None
        weights = [weight for weight in call.args[2:] if weight is not None]
        if len(weights) not in (2, 4) or not all(_is_constant(weight) for weight in weights):
            return None
        roots = [root for weight in weights for root in _roots(weight)]
        values = [weight.value for weight in weights]
        return Recurrent(values, roots, list(call.args[1]), bias=len(weights) == 4), call.args[0]
    return _written_cell(node) if node.op == "mul" else None


def _written_cell(node: Node) -> tuple[Recurrent, Node] | None:
    for terms, c in _formulas(node):
        size = node.value.size(-1)
        parts = [_by_source(products) for products, _ in terms]
        sources = list(parts[0])
        if len(sources) != 2 or any(set(part) != set(sources) for part in parts):
            continue
        fitting = [source for source in sources if all(part[source].shape == (size, size) for part in parts)]
        # The state is what does not come from the input; with a state that is given, what c comes with.
        olds = [source for source in fitting if _is_like(source, c)]
        if len(olds) != 1:
            continue
        (h,) = olds
        (x,) = (source for source in sources if source is not h)
        if any(part[x].shape != parts[0][x].shape for part in parts):
            continue
        if any(bias.numel() != size for _, biases in terms for bias, _ in biases):
            continue
        weights = [torch.cat([part[source] for part in parts]) for source in (x, h)]
        roots = [root for products, _ in terms for _, _, roots in products for root in roots]
        roots += [root for _, biases in terms for _, roots in biases for root in roots]
        counts = {len(biases) for _, biases in terms}
        if counts == {0}:
            return Recurrent(weights, roots, [h, c], bias=False), x
        added = [sum((b.reshape(-1) for b, _ in biases), torch.zeros(size, dtype=torch.float64)) for _, biases in terms]
        if counts == {2}:
            both = [torch.cat([biases[k][0].reshape(-1) for _, biases in terms]) for k in (0, 1)]
        else:
            both = [torch.cat(added), torch.zeros(4 * size, dtype=torch.float64)]
        return Recurrent([*weights, *both], roots, [h, c]), x
    return None


def _is_like(source: Node, c: Node) -> bool:
    """Whether a value may be the h that goes with an old c: constant as that is, or given as that is."""
    return source.constant if c.constant else _origin(source) == _origin(c) == "given"


def _origin(node: Node) -> str:
    return _plain(node, narrow=True).op


def _plain(node: Node, narrow: bool = False) -> Node:
    """The value before moves that keep all of it, or before any moves."""
    while node.op in MOVES:
        sources = _nodes(node.args)
        if len(sources) != 1 or sources[0].value is None:
            break
        if not narrow and sources[0].value.numel() != node.value.numel():
            break
        (node,) = sources
    return node


def _formulas(node: Node) -> Iterator[tuple[list[_Terms], Node]]:
    """Products and biases of i, f, g and o, and the old c, of every way to read h = o tanh(f c + i g)."""
    for o, cell in _pairs(node, "mul"):
        if not (_is(o, "sigmoid") and _is(cell, "tanh")):
            continue
        for kept, new in _pairs(cell.args[0], "add"):
            for i, g in _pairs(new, "mul"):
                for f, c in _pairs(kept, "mul"):
                    if _is(i, "sigmoid") and _is(g, "tanh") and _is(f, "sigmoid"):
                        terms = [_terms(gate.args[0]) for gate in (i, f, g, o)]
                        known = [term for term in terms if term is not None and term[0]]
                        if len(known) == 4:
                            yield known, c


def _is(value: Any, op: str) -> bool:
    return isinstance(value, Node) and value.op == op


def _pairs(value: Any, op: str) -> list[tuple[Node, Node]]:
    if not _is(value, op) or len(value.args) < 2 or not all(isinstance(arg, Node) for arg in value.args[:2]):
        return []
    one, other = value.args[:2]
    return [(one, other), (other, one)] if all(factor == 1 for factor in value.args[2:]) else []


def _terms(value: Node, depth: int = 0) -> _Terms | None:
    """A sum as its products (source, weight, the file's tensors) and its constants (values, the file's tensors)."""
    if depth > _SUM_DEPTH:
        return None
    if value.constant and (value.root is not None or value.op not in _SUMS | MOVES | {"item"}):
        return [], [(value.value, _roots(value))]
    if value.op in ("linear", "matmul", "mm", "addmm"):
        found = _linear(value, state=True)
        if found is not None:
            layer, source = found
            bias = [] if layer.bias is None else [(layer.bias, layer.roots[1:])]
            return [(source, layer.weight, layer.roots[: 1 if bias else None])], bias
        if value.op == "addmm" and all(factor == 1 for factor in value.args[3:]) and _is_constant(value.args[2]):
            added = _terms(value.args[0], depth + 1)
            source, weight = value.args[1:3]
            return None if added is None else ([*added[0], (source, weight.value.t(), _roots(weight))], added[1])
        return None
    if value.op == "add":
        pairs = _pairs(value, "add")
        if not pairs:
            return None
        one, other = (_terms(part, depth + 1) for part in pairs[0])
        return None if one is None or other is None else (one[0] + other[0], one[1] + other[1])
    if value.op in MOVES or value.op == "item":
        return _part(value, depth)
    return None


def _part(value: Node, depth: int) -> _Terms | None:
    """The terms of some columns of a sum; which ones is seen from the weights' rows that a cut takes."""
    cut = value.args[0] if value.op == "item" else value
    if cut.op not in MOVES:
        return None
    sources = _nodes(cut.args)
    if len(sources) != 1 or sources[0].value is None:
        return None
    (source,) = sources
    terms = _terms(source, depth + 1)
    whole = source.value
    if terms is None:
        return None
    if whole.numel() == value.value.numel():
        return terms
    rows = whole.numel() // whole.size(-1)
    places = torch.arange(whole.numel(), dtype=torch.float64).reshape(whole.shape)
    columns = _cut(cut, places, value).reshape(-1, value.value.numel() // rows)
    if not bool((columns % whole.size(-1) == columns[:1]).all()):
        return None
    take = columns[0].long()
    return (
        [(x, weight[take], roots) for x, weight, roots in terms[0]],
        [(bias.reshape(-1)[take], roots) for bias, roots in terms[1]],
    )


def _cut(cut: Node, places: Tensor, value: Node) -> Tensor:
    """A cut's own operator, made again on the numbers of the places."""
    args = [places if isinstance(arg, Node) else list(arg) if isinstance(arg, tuple) else arg for arg in cut.args]
    made = getattr(torch.ops.aten, cut.op)(*args)
    answer: Tensor = made[value.args[1]] if value.op == "item" else made
    return answer


def _by_source(products: list[tuple[Node, Tensor, list[Tensor]]]) -> dict[Node, Tensor]:
    """Weights by what they multiply; a product with two values side by side becomes two."""
    parts: dict[Node, Tensor] = {}
    for source, weight, _ in products:
        pieces = [source]
        if _is(source, "cat") and all(isinstance(piece, Node) and piece.value.dim() for piece in source.args[0]):
            widths = [piece.value.size(-1) for piece in source.args[0]]
            pieces = list(source.args[0]) if sum(widths) == weight.size(1) else pieces
        for piece, columns in zip(pieces, weight.split([piece.value.size(-1) for piece in pieces], 1), strict=True):
            plain = _plain(piece)
            parts[plain] = parts[plain] + columns if plain in parts else columns
    return parts
