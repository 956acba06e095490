"""From the operators of ``forward`` to stages in one line: scaling, dense layers, LSTMs, and what the heads see."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cellstep.rescue.code import Node, Reader, Unreadable

_ACTIVATIONS = {"relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid", "hardsigmoid": "hardsigmoid"}
_STATELESS = {"item", "select", "slice", "squeeze", "unsqueeze", "expand", "transpose"}
_ZEROS = {"zeros", "zeros_like", "new_zeros"}
_MOVES = {"unsqueeze", "squeeze", "transpose", "permute", "view", "flatten", "slice", "select", "t"}
_END = (1 << 63) - 1
_SUM_DEPTH = 8  # of sums within sums: more would be followed twice each


@dataclass(eq=False)
class Affine:
    """x op value, or value op x: "add", "sub", "mul" or "div"."""

    op: str
    value: Tensor | float
    reverse: bool = False


@dataclass(eq=False)
class Activation:
    name: str


@dataclass(eq=False)
class Linear:
    weight: Tensor  # (out, in)
    bias: Tensor | None
    roots: list[Tensor]  # the tensors of the file


@dataclass(eq=False)
class Move:
    """Dimensions in another order or number; the values stay."""

    op: str
    args: tuple[Any, ...]


@dataclass(eq=False)
class Recurrent:
    """An LSTM or a cell: parameters in torch's order of names, rows in gate order i, f, g, o.

    ``roots``: the tensors of the file that the parameters were made of. ``states``: what it starts from.
    """

    weights: list[Tensor]
    roots: list[Tensor]
    states: list[Any]
    is_cell: bool = True
    bias: bool = True
    num_layers: int = 1
    dropout: float = 0.0
    bidirectional: bool = False
    batch_first: bool = True
    output: str = "sequence"  # or "h_n", "hidden": both directions of h_n; of a cell "loop" or "step"

    @property
    def input_size(self) -> int:
        return self.weights[0].size(1)

    @property
    def output_size(self) -> int:
        return self.weights[1].size(1) * (2 if self.bidirectional else 1)


Stage = Affine | Activation | Linear | Move | Recurrent


@dataclass(eq=False)
class Line:
    """Stages from the input to the answer, without moves, and what the heads see, as a Chain names it."""

    stages: list[Stage]
    answers: str


_Terms = tuple[list[tuple[Node, Tensor, Tensor]], list[tuple[Tensor, Tensor]]]
_Gates = tuple[list[Any], Any, Any]


class Lines:
    """Looks for stages in what a :class:`Reader` has read."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._cells: dict[Node, Recurrent | None] = {}
        self._sources: dict[Node, Any] = {}
        self._gates: dict[Node, _Gates | None] = {}

    def found(self) -> Iterator[Recurrent | Linear]:
        """Every LSTM, cell and dense layer of the code, each once."""
        seen: set[tuple[int, ...]] = set()
        for node in list(self._reader.nodes):
            stage: Recurrent | Linear | None = None
            if node.op == "lstm":
                stage = self._lstm(node, "sequence")
            elif node.op in ("mul", "item"):
                stage = self._cell(node)
            elif node.op == "linear":
                stage = self._linear(node)
            if stage is not None:
                roots = stage.roots if isinstance(stage, Recurrent) else stage.roots[:1]
                key = tuple(id(root) for root in roots)
                if key not in seen:
                    seen.add(key)
                    yield stage

    def line(self) -> Line:
        """The way from the first input to the first tensor of the answer.

        Raises:
            Unreadable: there is no one way, or something on it is not understood.
        """
        node: Any = self._reader.result
        while isinstance(node, (tuple, list)) and node:
            node = node[0]
        stages: list[Stage] = []
        first = self._first_input()
        while node is not first:
            if not isinstance(node, Node):
                raise Unreadable("an answer that does not come from the first input")
            if node.op == "item" and node.args[0] is first and node.args[1] == 0:
                break
            stage, node = self._step(node)
            stages.append(stage)
        return _laid_out(stages[::-1])

    def _first_input(self) -> Node | None:
        return next((node for node in self._reader.nodes if node.op == "input"), None)

    def _step(self, node: Node) -> tuple[Stage, Any]:
        """The last stage before a value, and the value before that."""
        op, args = node.op, node.args
        cell = self._cell(node)
        if cell is not None:
            return cell, self._sources[node]
        if op == "item" and isinstance(args[0], Node) and args[0].op == "lstm" and args[1] in (0, 1):
            stage = self._lstm(args[0], ("sequence", "h_n")[args[1]])
            if stage is not None:
                return stage, args[0].args[0]
        if op == "cat":
            ends = self._both_ends(args)
            if ends is not None:
                stage = self._lstm(ends, "hidden")
                if stage is not None and stage.bidirectional:
                    return stage, ends.args[0]
        if op == "linear":
            return self._linear(node), args[0]
        if op in _ACTIVATIONS:
            return Activation(_ACTIVATIONS[op]), args[0]
        if op == "softmax":
            return Activation(f"softmax {args[1]}"), args[0]
        if op in ("add", "sub", "mul", "div", "rsub") and len(args) == 2:
            for k, value in enumerate(args):
                if isinstance(value, Tensor) or type(value) in (int, float):
                    reverse = (k == 0) != (op == "rsub")
                    return Affine(op.removeprefix("r"), value, reverse), args[1 - k]
        if op in ("steps",):
            return Move("steps", args[1:]), args[0]
        if op in _MOVES:
            return Move(op, args[1:]), args[0]
        if op == "either":
            raise Unreadable("an 'if' between two ways to the answer")
        if op == "carried":
            raise Unreadable("a value carried from step to step outside of a cell")
        raise Unreadable(f"'{op}' on the way to the answer" if op != "name" else f"the name {args[0]}")

    def _linear(self, node: Node) -> Linear:
        _, weight, bias = node.args
        return Linear(weight, bias, [self._reader.origin(part) for part in (weight, bias) if part is not None])

    def _lstm(self, node: Node, output: str) -> Recurrent | None:
        args = node.args
        if len(args) != 9 or not all(isinstance(part, tuple) for part in args[1:3]):
            return None
        weights, (bias, layers, dropout, _, bidirectional, batch_first) = list(args[2]), args[3:]
        if not all(isinstance(weight, Tensor) for weight in weights) or type(layers) is not int or not weights:
            return None
        if not all(isinstance(flag, bool) for flag in (bias, bidirectional, batch_first)):
            return None
        share = float(dropout) if isinstance(dropout, (int, float)) else 0.0
        return Recurrent(
            weights, weights, list(args[1]), False, bias, layers, share, bidirectional, batch_first, output
        )  # fmt: skip

    def _both_ends(self, args: tuple[Any, ...]) -> Node | None:
        """The LSTM whose last layer's two hidden states are put side by side."""
        parts = args[0]
        if not isinstance(parts, tuple) or len(parts) != 2 or (args[1] if len(args) > 1 else 0) not in (1, -1):
            return None
        found = []
        for part in parts:
            while isinstance(part, Node) and part.op == "slice" and _is_whole(part.args[1:]):
                part = part.args[0]
            if not isinstance(part, Node) or part.op != "select" or part.args[1] != 0:
                return None
            item = part.args[0]
            if not isinstance(item, Node) or item.op != "item" or item.args[1] != 1:
                return None
            found.append((item.args[0], part.args[2]))
        (one, first), (other, second) = found
        if one is not other or not isinstance(one, Node) or one.op != "lstm" or type(one.args[4]) is not int:
            return None
        rows = 2 * one.args[4]
        return one if (first % rows, second % rows) == (rows - 2, rows - 1) else None

    # Cells

    def _cell(self, node: Node) -> Recurrent | None:
        """The cell whose new h a value is: torch's own, or the formula written out."""
        if node not in self._cells:
            self._cells[node] = None  # until known: a value cannot lie behind itself
            self._cells[node] = self._torch_cell(node) or self._written_cell(node)
        return self._cells[node]

    def _torch_cell(self, node: Node) -> Recurrent | None:
        call = node.args[0] if node.op == "item" and node.args[1] == 0 else None
        if not isinstance(call, Node) or call.op != "lstm_cell" or not isinstance(call.args[1], tuple):
            return None
        weights = [weight for weight in call.args[2:] if weight is not None]
        if len(weights) not in (2, 4) or not all(isinstance(weight, Tensor) for weight in weights):
            return None
        states = list(call.args[1])
        if len(states) != 2 or not self._is_state(states[0], node) or not self._is_memory(states[1], call, 1):
            return None
        self._sources[node] = call.args[0]
        return Recurrent(weights, weights, states, bias=len(weights) == 4, output=self._mode(states[0]))

    def _written_cell(self, node: Node) -> Recurrent | None:
        gates = self._formula(node)
        if gates is None:
            return None
        terms, c, new = gates
        if not self._is_memory(c, new, None):
            return None
        size = terms[0][0][0][1].size(0)
        parts = [_by_source(products, size) for products, _ in terms]
        sources = list(parts[0])
        if len(sources) != 2 or any(set(part) != set(sources) for part in parts):
            return None
        states = [source for source in sources if self._is_state(source, node)]
        if len(states) != 1:
            return None
        (h,) = states
        (x,) = (source for source in sources if source is not h)
        if any(part[h].shape != (size, size) or part[x].shape != parts[0][x].shape for part in parts):
            return None
        if any(bias.shape != (size,) for _, biases in terms for bias, _ in biases):
            return None
        weights = [torch.cat([part[source] for part in parts]) for source in (x, h)]
        roots = [self._reader.origin(root) for products, _ in terms for _, _, root in products]
        roots += [root for _, biases in terms for _, root in biases]
        if all(len(biases) == len(terms[0][1]) for _, biases in terms) and len(terms[0][1]) in (1, 2):
            biases = [torch.cat([biases[k][0] for _, biases in terms]) for k in range(len(terms[0][1]))]
            weights += [*biases, torch.zeros_like(biases[0])][:2]
        elif any(biases for _, biases in terms):
            return None
        self._sources[node] = x
        return Recurrent(weights, roots, [h, c], bias=len(weights) == 4, output=self._mode(h))

    def _formula(self, node: Node) -> _Gates | None:
        """Products and biases of i, f, g and o, the old c and the new one, of h = o tanh(f c + i g)."""
        if node not in self._gates:
            self._gates[node] = _formula(node)
        return self._gates[node]

    def _is_state(self, value: Any, node: Node) -> bool:
        """Whether a value is what a cell with the new h ``node`` starts a step from."""
        while isinstance(value, Node) and value.op in _STATELESS and not self._is_call(value):
            value = value.args[0]
        if isinstance(value, Tensor):
            return True
        if not isinstance(value, Node):
            return False
        if value.op == "carried":
            return _plain(self._reader.carried.get(value)) is node
        if value.op == "input":
            return value is not self._first_input()
        if value.op in _ZEROS:
            return True
        if self._is_call(value) and self._is_call(node):
            return all(a is b for a, b in zip(value.args[0].args[2:], node.args[0].args[2:], strict=False))
        mine, other = self._formula(node), self._formula(value)
        return mine is not None and other is not None and _roots(mine) == _roots(other)

    def _is_memory(self, value: Any, new: Node, item: int | None) -> bool:
        """Whether a cell's old c is the c of the step before: the value ``new``, or an item of it."""
        value = _plain(value)
        if not isinstance(value, Node) or value.op != "carried":
            return isinstance(value, (Node, Tensor))
        end = _plain(self._reader.carried.get(value))
        return end is new if item is None else _is(end, "item") and end.args == (new, item)

    def _is_call(self, node: Node) -> bool:
        return node.op == "item" and isinstance(node.args[0], Node) and node.args[0].op == "lstm_cell"

    def _mode(self, h: Any) -> str:
        while isinstance(h, Node) and h.op in _STATELESS and not self._is_call(h):
            h = h.args[0]
        return "step" if isinstance(h, Tensor) or h.op == "input" or h.op in _ZEROS else "loop"


def _plain(value: Any) -> Any:
    while isinstance(value, Node) and value.op in ("squeeze", "unsqueeze"):
        value = value.args[0]
    return value


def _roots(gates: _Gates) -> list[int]:
    return [id(root) for products, _ in gates[0] for _, _, root in products]


def _formula(node: Node) -> _Gates | None:
    for o, cell in _pairs(node, "mul"):
        if not (_is(o, "sigmoid") and _is(cell, "tanh")):
            continue
        for kept, new in _pairs(cell.args[0], "add"):
            for i, g in _pairs(new, "mul"):
                for f, c in _pairs(kept, "mul"):
                    if _is(i, "sigmoid") and _is(g, "tanh") and _is(f, "sigmoid"):
                        terms = [_terms(gate.args[0]) for gate in (i, f, g, o)]
                        if all(term is not None and term[0] for term in terms):
                            return terms, c, cell.args[0]
    return None


def _is(value: Any, op: str) -> bool:
    return isinstance(value, Node) and value.op == op


def _pairs(value: Any, op: str) -> list[tuple[Any, Any]]:
    if not _is(value, op) or len(value.args) != 2:
        return []
    one, other = value.args
    return [(one, other), (other, one)]


def _terms(value: Any, depth: int = 0) -> _Terms | None:
    """A sum as its products (source, weight, the file's tensor) and its constants (values, the file's tensor)."""
    if isinstance(value, Tensor):
        return [], [(value, value)]
    if not isinstance(value, Node) or depth > _SUM_DEPTH:
        return None
    if value.op == "linear":
        source, weight, bias = value.args
        return [(source, weight, weight)], [] if bias is None else [(bias, bias)]
    if value.op == "add" and len(value.args) == 2:
        one, other = _terms(value.args[0], depth + 1), _terms(value.args[1], depth + 1)
        return None if one is None or other is None else (one[0] + other[0], one[1] + other[1])
    rows = _rows(value, depth + 1)
    if rows is None:
        return None
    (products, biases), begin, end = rows
    return [(x, weight[begin:end], root) for x, weight, root in products], [(b[begin:end], root) for b, root in biases]


def _rows(value: Node, depth: int) -> tuple[_Terms, int, int] | None:
    """Of a part of a sum's columns: the terms of the whole, and which columns."""
    if value.op == "part" and type(value.args[1]) is int and type(value.args[2]) is int:
        whole, count, k, dim = value.args[0], value.args[1], value.args[2], value.args[3] if len(value.args) > 3 else 0
        size = None
    elif value.op == "item" and _is(value.args[0], "split") and type(value.args[0].args[1]) is int:
        (whole, size, dim), k, count = value.args[0].args, value.args[1], 0
    elif value.op == "slice" and len(value.args) > 1:
        if _is_whole(value.args[1:]):
            terms = _terms(value.args[0], depth)
            return None if terms is None else (terms, 0, _END)
        dim, begin, end = (*value.args[1:4], None, None)[:3]
        terms = _terms(value.args[0], depth)
        if terms is None or dim not in (1, -1) or value.args[4:] not in ((), (1,)):
            return None
        return terms, begin or 0, _END if end is None else end
    elif value.op == "slice":
        terms = _terms(value.args[0], depth)
        return None if terms is None else (terms, 0, _END)
    else:
        return None
    terms = _terms(whole, depth)
    if terms is None or not terms[0] or dim not in (1, -1) or type(k) is not int:
        return None
    total = terms[0][0][1].size(0)
    if size is None:
        if total % count:
            return None
        size = total // count
    return terms, k * size, (k + 1) * size


def _by_source(products: list[tuple[Node, Tensor, Tensor]], size: int) -> dict[Node, Tensor]:
    """Weights by what they multiply; a product with two values side by side becomes two."""
    parts: dict[Node, Tensor] = {}
    for source, weight, _ in products:
        pieces = source.args[0] if _is(source, "cat") else None
        if isinstance(pieces, tuple) and len(pieces) == 2 and weight.size(1) > size:
            # The state has as many values as the cell; which of the two it is, is seen from where it comes.
            widths = (size, weight.size(1) - size) if _is_old(pieces[0]) else (weight.size(1) - size, size)
            for piece, columns in zip(pieces, weight.split(widths, 1), strict=True):
                parts[piece] = columns
        else:
            parts[source] = weight
    return parts


def _is_old(value: Any) -> bool:
    while isinstance(value, Node) and value.op in _STATELESS:
        value = value.args[0]
    return isinstance(value, Tensor) or (isinstance(value, Node) and value.op in ("carried", *_ZEROS))


def _is_whole(args: tuple[Any, ...]) -> bool:
    """Whether arguments of slice (dim, start, end, step) take everything."""
    start, end, step = (*args[1:], *(None, None, None)[len(args[1:]) :])[:3] if args else (None, None, None)
    return start in (None, 0) and end in (None, _END) and step in (None, 1)


def _laid_out(stages: list[Stage]) -> Line:
    """Follow the dimensions along the stages: features stay last, and steps are all kept, or the last alone."""
    first = next((k for k, stage in enumerate(stages) if isinstance(stage, Recurrent)), None)
    if first is None:
        raise Unreadable("an answer that passes through no LSTM")
    tail = max(k for k, stage in enumerate(stages) if not isinstance(stage, Move))
    lstm = stages[first]
    assert isinstance(lstm, Recurrent)
    time = _axes(lstm).index("T") if not lstm.is_cell and lstm.output == "sequence" else None
    single = any(
        isinstance(stage, Move) and stage.op == "unsqueeze" and stage.args[0] == time for stage in stages[:first]
    )
    for stage in stages[:first]:
        if isinstance(stage, Move):
            _check_before(stage, lstm)
    axes: list[str] = []
    answers = "every"
    looped = False
    for k, stage in enumerate(stages[first:], first):
        if isinstance(stage, Recurrent):
            if answers != "every" or (axes and not stage.is_cell and axes != _axes(stage)):
                raise Unreadable("LSTMs that do not pass every step on")
            if stage.is_cell and axes not in ([], ["N", "F"]):
                raise Unreadable("a cell that is given whole sequences")
            axes = _axes(stage)
            if stage.output == "hidden":
                answers = "hidden"
            looped = stage.is_cell and stage.output == "loop"
        elif isinstance(stage, Activation) and stage.name.startswith("softmax"):
            if stage.name.split()[1] not in ("-1", str(len(axes) - 1)):
                raise Unreadable("a softmax over something else than the outputs")
        elif isinstance(stage, Move):
            if stage.op == "steps":
                if not looped or not isinstance(stage.args[0], int):
                    raise Unreadable("steps put together that no cell went through")
                axes.insert(stage.args[0] % (len(axes) + 1), "T")
                looped = False
            elif k > tail and stage.op in ("squeeze", "view", "flatten"):
                break
            else:
                axes, taken = _moved(stage, axes, single, stages[k - 1])
                if taken:
                    answers = "last"
            if not axes or axes[-1] != "F":
                raise Unreadable(f"'{stage.op}' that moves the features")
    if looped:
        answers = "last"
    return Line([stage for stage in stages if not isinstance(stage, Move)], answers)


def _axes(stage: Recurrent) -> list[str]:
    if stage.is_cell or stage.output == "hidden":
        return ["N", "F"]
    if stage.output == "h_n":
        return ["L", "N", "F"]
    return ["N", "T", "F"] if stage.batch_first else ["T", "N", "F"]


def _check_before(move: Move, lstm: Recurrent) -> None:
    """Refuse what touches the features of the input; batch and steps may lie as they like there."""
    args = move.args
    fine = {
        "unsqueeze": lambda: args[0] in (0, 1) or lstm.input_size == 1,
        "squeeze": lambda: len(args) == 1 and args[0] in (0, 1),
        "transpose": lambda: set(args) == {0, 1},
        "permute": lambda: args[0] == (1, 0, 2),
        "view": lambda: isinstance(args[0], tuple) and args[0][-1] in (-1, lstm.input_size),
        "slice": lambda: _is_whole(args),
        "select": lambda: lstm.is_cell and args[0] in (0, 1),
    }.get(move.op)
    if fine is None or not fine():
        raise Unreadable(f"'{move.op}' of the input")


def _moved(move: Move, axes: list[str], single: bool, before: Stage) -> tuple[list[str], bool]:
    """The dimensions after a move, and whether it takes the last step out of all."""
    op, args, count = move.op, move.args, len(axes)
    if op == "unsqueeze":
        at = args[0] % (count + 1)
        return [*axes[:at], "1", *axes[at:]], False
    if op in ("squeeze", "select", "slice") and args and isinstance(args[0], int):
        at = args[0] % count
        name = axes[at]
        rest = axes[:at] + axes[at + 1 :]
        if op == "slice" and _is_whole(args):
            return axes, False
        if op == "squeeze" and (name in ("1", "N") or (name == "T" and single)):
            return rest, False
        if op == "select" and name in ("N", "1") and args[1] == 0:
            return rest, False
        if op == "select" and name == "T":
            if isinstance(args[1], Node) and args[1].op == "step":
                return rest, False
            if args[1] == -1 or (single and args[1] == 0):
                return rest, not single
        if op == "slice" and name == "T" and args[1] == -1 and _is_whole((0, 0, *args[2:])):
            return [*axes[:at], "1", *axes[at + 1 :]], True
        if name == "L" and isinstance(before, Recurrent) and not before.bidirectional:
            if op == "select" and args[1] in (-1, before.num_layers - 1):
                return rest, True
            if op == "squeeze" and before.num_layers == 1:
                return rest, True
    if op == "slice" and not args:
        return axes, False
    if op == "transpose" and count > 1:
        one, other = (k % count for k in args)
        moved = list(axes)
        moved[one], moved[other] = moved[other], moved[one]
        return moved, False
    if op == "view" and isinstance(before, Recurrent) and args[0][-1] == before.output_size:
        rows = before.num_layers * (2 if before.bidirectional else 1)
        if axes[0] != "L" or rows == 1:
            return ["N"] * (len(args[0]) - 1) + ["F"], axes[0] == "L"
    if op == "permute":
        return [axes[k % count] for k in args[0]], False
    raise Unreadable(f"'{op}' after an LSTM")
