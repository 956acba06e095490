"""What an archive holds that cellstep knows: LSTMs, cells, dense layers, scaling, and states that were saved."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cellstep.nn import LSTM, Chain, Dense, LSTMCell, Scale, Unscale
from cellstep.rescue.archive import Archive, Object, read_archive
from cellstep.rescue.code import Reader, Unreadable
from cellstep.rescue.line import Affine, Line, Linear, Lines, Recurrent

_SCALING = re.compile(
    r"_?(in|input|inputs|x|obs|observation|feature|features|out|output|outputs|y|target|action)?_?"
    r"(scale|scaler|scaling|mean|std|var|offset|shift|min|max|loc|gain)_?"
)
_STATE = re.compile(r"_*(h|c|hx|cx|h_?0|c_?0|h_?n|c_?n|.*hidden.*|.*state.*|.*memory.*|cell|.*cell_state)_?\d*")
_GATES = "ifgo"
_ODD = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass
class Finding:
    """What was found in a file, by the names that the file uses; constants of its code are named c0, c1, ...

    Attributes:
        modules: LSTMs and cells.
        dense: layers with a weight (out, in), without the activation that may follow them.
        scaling: buffers and constants that scale, in whatever sense the code uses them.
        state: saved states that are not zero.
        unknown: what is not understood, a line each.
        order: the keys of modules, dense and scaling in the order in which the file holds them.
        line: the way from input to answer, if the code was understood as a whole.
        reason: why there is no such way, or why it makes no chain; otherwise empty.
    """

    modules: dict[str, LSTM | LSTMCell] = field(default_factory=dict)
    dense: dict[str, Dense] = field(default_factory=dict)
    scaling: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    line: Line | None = None
    reason: str = ""


def read(path: str | os.PathLike[str]) -> Finding:
    """Look through a TorchScript file of any torch since 1.0, without running anything of it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no TorchScript archive, is damaged, or holds what such a file has no reason to hold.
    """
    return _Search(read_archive(path)).finding


class _Search:
    def __init__(self, archive: Archive) -> None:
        self.finding = Finding()
        self._names: dict[int, str] = {}  # of the file's tensors
        self._used: set[int] = set()
        self._positions: dict[str, int] = {}
        tensors = []
        for name, value in _tensors(archive.root):
            if id(value) not in self._names:
                self._names[id(value)] = name
                tensors.append(value)
        held = len(tensors)
        for k, value in enumerate(archive.constants):
            if isinstance(value, Tensor) and id(value) not in self._names:
                self._names[id(value)] = f"c{k}"
                tensors.append(value)
        self._place = {id(tensor): k for k, tensor in enumerate(tensors)}

        reader = Reader(archive)
        lines = Lines(reader)
        try:
            reader.read()
            self.finding.line = lines.line()
        except Unreadable as error:
            self.finding.reason = str(error)
        except _ODD as error:
            self.finding.reason = f"code out of the ordinary ({type(error).__name__})"
        try:
            self._take_code(lines)
        except _ODD as error:
            self.finding.unknown.append(f"code out of the ordinary ({type(error).__name__})")
        self._take_objects(archive.root)
        self._take_scaling(tensors)
        self._take_states(tensors[:held])
        self._list_unknown(archive, tensors)
        self.finding.order = sorted(self._positions, key=self._positions.__getitem__)

    def _take_code(self, lines: Lines) -> None:
        found = list(lines.found())
        for stage in found:
            if isinstance(stage, Recurrent):
                name = self._common_name(stage.roots)
                self._keep(name, stage.roots, lambda stage=stage: _module(stage), self.finding.modules)
                for kind, state in zip("hc", stage.states, strict=False):
                    if isinstance(state, Tensor) and state.is_floating_point() and bool(state.any()):
                        self.finding.state[self._names.get(id(state), f"{name}.{kind}")] = state
                    if id(state) in self._names:
                        self._used.add(id(state))
        for stage in found:
            if isinstance(stage, Linear) and id(stage.roots[0]) not in self._used:
                self._keep(
                    self._common_name(stage.roots), stage.roots, lambda stage=stage: _dense(stage), self.finding.dense
                )

    def _common_name(self, roots: Sequence[Tensor]) -> str:
        """The module that holds the tensors: cells.0 of cells.0.W_ii; a constant by its own name."""
        names = [self._names[id(root)] for root in roots if id(root) in self._names]
        if not names:
            return "computed"
        if re.fullmatch(r"c\d+", names[0]):
            return names[0]
        owners = [name.split(".")[:-1] for name in names]
        common = [parts[0] for parts in zip(*owners, strict=False) if len(set(parts)) == 1]
        return ".".join(common) or names[0]

    def _keep(self, name: str, roots: Sequence[Tensor], make: Any, into: dict[str, Any]) -> bool:
        try:
            made = make()
        except (ValueError, RuntimeError) as error:
            self.finding.unknown.append(f"{name}: {' '.join(str(error).split())[:200]}")
            return False
        while name in self._positions:
            name += "'"
        into[name] = made
        self._positions[name] = min((self._place.get(id(root), 0) for root in roots), default=0)
        self._used.update(id(root) for root in roots)
        return True

    def _take_objects(self, root: Object) -> None:
        for path, item in _objects(root):
            tensors = {name: value for name, value in item.state.items() if isinstance(value, Tensor)}
            fresh = {name: value for name, value in tensors.items() if id(value) not in self._used}
            name = path or "model"
            kind = item.name.rpartition(".")[2]
            for stage in _by_names(fresh):
                if isinstance(stage, Recurrent):
                    others = [key for key, value in fresh.items() if not any(value is root for root in stage.roots)]
                    if kind in ("LSTM", "LSTMCell", "") or not others:
                        self._keep(name, stage.roots, lambda stage=stage: _module(stage), self.finding.modules)
                elif kind in ("Linear", "Dense", "NonDynamicallyQuantizableLinear") or (
                    set(fresh) == {"weight", "bias"} and kind not in ("Embedding", "Bilinear")
                ):
                    self._keep(name, stage.roots, lambda stage=stage: _dense(stage), self.finding.dense)

    def _take_scaling(self, tensors: Sequence[Tensor]) -> None:
        constants = (
            {id(s.value) for s in self.finding.line.stages if isinstance(s, Affine)} if self.finding.line else set()
        )
        for tensor in tensors:
            name = self._names[id(tensor)]
            named = _SCALING.fullmatch(name.rpartition(".")[2]) and tensor.is_floating_point()
            if id(tensor) not in self._used and (named or id(tensor) in constants):
                self.finding.scaling[name] = tensor
                self._positions[name] = self._place[id(tensor)]
                self._used.add(id(tensor))

    def _take_states(self, tensors: Sequence[Tensor]) -> None:
        sizes = {size for module in self.finding.modules.values() for size in _state_sizes(module)}
        for tensor in tensors:
            name = self._names[id(tensor)]
            if id(tensor) in self._used or not _STATE.fullmatch(name.rpartition(".")[2].lower()):
                continue
            if tensor.dim() and tensor.size(-1) in sizes and tensor.is_floating_point():
                self._used.add(id(tensor))
                if bool(tensor.any()):
                    self.finding.state[name] = tensor

    def _list_unknown(self, archive: Archive, tensors: Sequence[Tensor]) -> None:
        left: dict[str, list[str]] = {}
        kinds = {path: item.name.rpartition(".")[2] for path, item in _objects(archive.root)}
        for tensor in tensors:
            if id(tensor) not in self._used and tensor.is_floating_point() and tensor.numel():
                owner, _, name = self._names[id(tensor)].rpartition(".")
                left.setdefault(owner, []).append(f"{name} {tuple(tensor.shape)}")
        for owner, names in left.items():
            kind = kinds.get(owner)
            where = f"{owner or 'model'} ({kind})" if kind else owner or "model"
            self.finding.unknown.append(f"{where}: {', '.join(names)}")


def _objects(root: Object) -> Iterator[tuple[str, Object]]:
    """Every object below a root once, with its path."""
    todo, seen = [("", root)], {id(root)}
    while todo:
        path, item = todo.pop(0)
        yield path, item
        below = []
        for name, value in item.state.items():
            children = value if isinstance(value, (list, tuple)) else [value]
            for k, child in enumerate(children):
                if isinstance(child, Object) and id(child) not in seen:
                    seen.add(id(child))
                    end = f"{name}.{k}" if isinstance(value, (list, tuple)) else name
                    below.append((f"{path}.{end}".lstrip("."), child))
        todo[:0] = below


def _tensors(root: Object) -> Iterator[tuple[str, Tensor]]:
    for path, item in _objects(root):
        for name, value in item.state.items():
            values = value if isinstance(value, (list, tuple)) else [value]
            for k, tensor in enumerate(values):
                if isinstance(tensor, Tensor):
                    end = f"{name}.{k}" if isinstance(value, (list, tuple)) else name
                    yield f"{path}.{end}".lstrip("."), tensor


def _by_names(tensors: dict[str, Tensor]) -> list[Recurrent | Linear]:
    """What a module of these tensors is, by torch's names or those of one matrix a gate; nothing if it is neither."""
    if "weight_ih_l0" in tensors:
        layers = 1 + max(
            int(name[len("weight_ih_l") :]) for name in tensors if re.fullmatch(r"weight_ih_l\d{1,4}", name)
        )
        both, bias = "weight_ih_l0_reverse" in tensors, "bias_ih_l0" in tensors
        kinds = ["weight_ih", "weight_hh", *["bias_ih", "bias_hh"] * bias, *["weight_hr"] * ("weight_hr_l0" in tensors)]
        names = [f"{kind}_l{k}{end}" for k in range(layers) for end in ["", "_reverse"][: 1 + both] for kind in kinds]
        if all(name in tensors for name in names):
            weights = [tensors[name] for name in names]
            return [Recurrent(weights, weights, [], False, bias, layers, 0.0, both, False)]
        return []
    if "weight_ih" in tensors and "weight_hh" in tensors:
        bias = "bias_ih" in tensors and "bias_hh" in tensors
        weights = [tensors[name] for name in ("weight_ih", "weight_hh", *["bias_ih", "bias_hh"] * bias)]
        return [Recurrent(weights, weights, [], bias=bias)]
    columns = [[f"{kind}{g}" for g in _GATES] for kind in ("W_i", "W_h", "b_")]
    two = [[f"b_{side}{g}" for g in _GATES] for side in "ih"]
    if all(name in tensors for name in two[0] + two[1]):
        columns[2:] = two
    if all(name in tensors for column in columns for name in column):
        roots = [tensors[name] for column in columns for name in column]
        shapes = [{tensors[name].shape for name in column} for column in columns]
        if all(len(shape) == 1 and len(next(iter(shape))) > 0 for shape in shapes):
            weights = [torch.cat([tensors[name] for name in column]) for column in columns]
            weights += [torch.zeros_like(weights[2])] * (len(weights) == 3)
            return [Recurrent(weights, roots, [])]
    if "weight" in tensors and tensors["weight"].dim() == 2:
        roots = [tensors[key] for key in ("weight", "bias") if key in tensors]
        return [Linear(roots[0], tensors.get("bias"), roots)]
    return []


def _module(stage: Recurrent) -> LSTM | LSTMCell:
    """A module with the weights of a stage; ValueError if their shapes are not those of an LSTM."""
    w_ih, w_hh = stage.weights[:2]
    if w_ih.dim() != 2 or w_hh.dim() != 2 or not w_ih.is_floating_point() or w_ih.numel() * w_hh.numel() == 0:
        raise ValueError(f"weights of shapes {tuple(w_ih.shape)} and {tuple(w_hh.shape)} are not those of an LSTM")
    hidden, recurrent = w_ih.size(0) // 4, w_hh.size(1)
    if w_ih.size(0) != 4 * hidden or w_hh.size(0) != 4 * hidden or recurrent > hidden:
        raise ValueError(f"weights of shapes {tuple(w_ih.shape)} and {tuple(w_hh.shape)} are not those of an LSTM")
    module: LSTM | LSTMCell
    if stage.is_cell:
        module = LSTMCell(w_ih.size(1), hidden, stage.bias, dtype=w_ih.dtype)
    else:
        each = 2 + 2 * stage.bias + (recurrent < hidden)
        if len(stage.weights) != each * stage.num_layers * (1 + stage.bidirectional):
            raise ValueError(f"{len(stage.weights)} weights are not those of an LSTM of {stage.num_layers} layers")
        module = LSTM(
            w_ih.size(1),
            hidden,
            stage.num_layers,
            stage.bias,
            stage.batch_first,
            stage.dropout if stage.num_layers > 1 else 0.0,
            stage.bidirectional,
            recurrent if recurrent < hidden else 0,
            dtype=w_ih.dtype,
        )
    _fill(module, stage.weights)
    return module.eval()


def _fill(module: torch.nn.Module, weights: Sequence[Tensor]) -> None:
    parameters = list(module.named_parameters())
    for (name, parameter), weight in zip(parameters, weights, strict=True):
        if parameter.shape != weight.shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)} where {tuple(parameter.shape)} fits the others")
        with torch.no_grad():
            parameter.copy_(weight)


def _dense(stage: Linear, activation: str = "linear") -> Dense:
    outputs, inputs = stage.weight.shape
    made = Dense(inputs, outputs, activation, stage.bias is not None, dtype=stage.weight.dtype)
    _fill(made, [stage.weight] if stage.bias is None else [stage.weight, stage.bias])
    return made.eval()


def _state_sizes(module: LSTM | LSTMCell) -> tuple[int, int]:
    return module.hidden_size, getattr(module, "proj_size", 0) or module.hidden_size


def chain(finding: Finding) -> Chain | None:
    """The found parts as one model, or None, with the reason in ``finding.reason``.

    Only the code of the file says what is computed from what, so a chain is made where the code was understood whole.
    It starts from zero, whatever state was saved. The answer is that of the first tensor that ``forward`` returns.
    """
    if finding.line is None:
        return None
    try:
        return _Links(finding.line).chain()
    except (ValueError, RuntimeError) as error:
        finding.reason = " ".join(str(error).split())
        return None


class _Links:
    """Puts the stages of a line together as those of a chain."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._stages: list[Scale | Dense | LSTM | Unscale] = []
        self._pending: list[Affine] = []
        first = next(stage for stage in line.stages if isinstance(stage, (Linear, Recurrent)))
        like = first.weight if isinstance(first, Linear) else first.weights[0]
        self._width, self._dtype = like.size(1), like.dtype

    def chain(self) -> Chain:
        between = False
        last = max(k for k, stage in enumerate(self._line.stages) if isinstance(stage, Recurrent))
        for k, stage in enumerate(self._line.stages):
            between = between or isinstance(stage, Recurrent)
            if isinstance(stage, Affine):
                self._pending.append(stage)
            else:
                self._settle()
                self._add(stage)
            if between and k < last and not isinstance(stage, Recurrent):
                raise ValueError("something between two LSTMs that a chain has no place for")
        if self._pending:
            offset, scale = self._affine()
            self._stages.append(Unscale(offset, scale))
        return Chain(*self._stages, answers=self._line.answers).eval()

    def _add(self, stage: Any) -> None:
        if isinstance(stage, Recurrent):
            self._stages.append(_as_lstm(_module(stage)))
            self._width = stage.output_size
        elif isinstance(stage, Linear):
            self._stages.append(_dense(stage))
            self._width = stage.weight.size(0)
        else:
            name = stage.name.split()[0]
            before = self._stages[-1] if self._stages else None
            if not isinstance(before, Dense) or before.activation != "linear":
                before = _dense(Linear(torch.eye(self._width, dtype=self._dtype), None, []))
                self._stages.append(before)
            made = Dense(before.in_features, before.out_features, name, before.bias is not None, dtype=self._dtype)
            _fill(made, list(before.parameters()))
            self._stages[-1] = made

    def _settle(self) -> None:
        """Place the scaling so far: first of all as Scale, later as a dense layer with a diagonal weight."""
        if not self._pending:
            return
        if self._stages:
            offset, scale = self._affine()
            self._stages.append(_dense(Linear(torch.diag(scale), offset, [])))
        else:
            self._stages.append(Scale(*self._input_affine()))
        self._pending = []

    def _values(self, value: Tensor | float) -> Tensor:
        """One value a column, as float64."""
        tensor = torch.as_tensor(value, dtype=torch.float64)
        if tensor.numel() not in (1, self._width) or (tensor.dim() and tensor.size(-1) != tensor.numel()):
            raise ValueError(f"scaling of shape {tuple(tensor.shape)} for {self._width} columns")
        return tensor.reshape(-1).expand(self._width).clone()

    def _affine(self) -> tuple[Tensor, Tensor]:
        """The pending stages as x * scale + offset."""
        scale, offset = torch.ones(self._width, dtype=torch.float64), torch.zeros(self._width, dtype=torch.float64)
        for stage in self._pending:
            value = self._values(stage.value)
            if stage.op == "mul":
                scale, offset = scale * value, offset * value
            elif stage.op == "div" and not stage.reverse:
                scale, offset = scale / value, offset / value
            elif stage.op == "add":
                offset = offset + value
            elif stage.op == "sub":
                scale, offset = (-scale, value - offset) if stage.reverse else (scale, offset - value)
            else:
                raise ValueError("a number divided by a value, which no chain does")
        return offset.to(self._dtype), scale.to(self._dtype)

    def _input_affine(self) -> tuple[Tensor, Tensor]:
        """The pending stages as (x - offset) * scale."""
        first, *rest = self._pending
        if first.op in ("add", "sub") and not first.reverse:
            # An offset that comes first is kept as it is; a mean of the data is not rounded anew.
            shift = self._values(first.value) * (-1 if first.op == "add" else 1)
            self._pending = rest
            offset, scale = self._affine()
            if not bool(offset.any()):
                return shift.to(self._dtype), scale
            self._pending = [first, *rest]
        offset, scale = (part.double() for part in self._affine())
        if bool(((scale == 0) & (offset != 0)).any()):
            raise ValueError("a column scaled with zero and shifted")
        shift = torch.where(scale == 0, 0.0, -offset / scale)
        return shift.to(self._dtype), scale.to(self._dtype)


def assemble(finding: Finding, names: Sequence[str]) -> Chain:
    """Found LSTMs, cells and dense layers as one model that answers from the last step, where the user knows the order.

    Args:
        names: of ``finding.modules`` and ``finding.dense``, in order; ``fc:relu`` names an activation of a dense one.

    Raises:
        ValueError: a name is not there, or the sizes do not fit.
    """
    stages: list[LSTM | Dense] = []
    for entry in names:
        name, _, activation = entry.partition(":")
        if name in finding.dense:
            found = finding.dense[name]
            dense = Dense(found.in_features, found.out_features, activation or "linear", found.bias is not None,
                          dtype=found.weight.dtype)  # fmt: skip
            _fill(dense, list(found.parameters()))
            stages.append(dense)
        elif name in finding.modules and not activation:
            stages.append(_as_lstm(finding.modules[name]))
        else:
            there = ", ".join([*finding.modules, *finding.dense]) or "nothing"
            raise ValueError(f"expected names of found layers: {there}; got '{entry}'; choose among them")
    return Chain(*stages).eval()


def _as_lstm(module: LSTM | LSTMCell) -> LSTM:
    if isinstance(module, LSTM):
        return module
    lstm = LSTM(module.input_size, module.hidden_size, bias=module.bias, dtype=module.weight_ih.dtype)
    _fill(lstm, list(module.parameters()))
    return lstm.eval()


def report(finding: Finding) -> str:
    """Lines for a reader: what was found, what was not understood, and what to look out for."""
    lines = []
    for name in finding.order:
        if name in finding.modules:
            module = finding.modules[name]
            kind = type(module).__name__
            layers = f", {module.num_layers} layers" if isinstance(module, LSTM) and module.num_layers > 1 else ""
            both = ", both directions" if isinstance(module, LSTM) and module.bidirectional else ""
            lines.append(f"found {name}: {kind} {module.input_size} -> {module.hidden_size}{layers}{both}")
        elif name in finding.dense:
            dense = finding.dense[name]
            lines.append(f"found {name}: dense {dense.in_features} -> {dense.out_features}")
        else:
            lines.append(f"found {name}: scaling of shape {tuple(finding.scaling[name].shape)}")
    if not lines:
        lines.append("found nothing that is known here")
    lines += [f"not understood: {line}" for line in finding.unknown]
    for name, value in finding.state.items():
        largest = float(value.abs().max())
        lines.append(
            f"warning: {name} is a saved state that is not zero (largest value {largest:.3g}); a chain starts from zero"
        )
    if finding.reason:
        lines.append(f"no chain: {finding.reason}")
    return "\n".join(lines)
