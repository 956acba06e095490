"""What an archive holds that cellstep knows: LSTMs, cells, dense layers, scaling, and states that were saved."""

import contextlib
import copy
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cellstep.nn import LSTM, Chain, Dense, LSTMCell
from cellstep.rescue import build
from cellstep.rescue.archive import Archive, Object, read_archive
from cellstep.rescue.code import ODD
from cellstep.rescue.line import Affine, Linear, Recurrent, layers
from cellstep.rescue.match import Match, search, state_sizes

_SCALING = re.compile(
    r"_?(in|input|inputs|x|obs|observation|feature|features|out|output|outputs|y|target|action)?_?"
    r"(scale|scaler|scaling|mean|std|var|offset|shift|min|max|loc|gain)_?"
)
_STATE = re.compile(r"_*(h|c|hx|cx|h_?0|c_?0|h_?n|c_?n|.*hidden.*|.*state.*|.*memory.*|cell|.*cell_state)_?\d*")
_GATES = "ifgo"

_SMALL = (torch.float16, torch.bfloat16)


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
        chain: the model as a whole, if its code was followed from input to answer and gives the chain's numbers.
        match: how the two were compared.
        reason: why there is no chain; otherwise empty.
        notes: what else a user should know.
        archive: what was read.
    """

    archive: Archive

    modules: dict[str, LSTM | LSTMCell] = field(default_factory=dict)
    dense: dict[str, Dense] = field(default_factory=dict)
    scaling: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    chain: Chain | None = None
    match: Match | None = None
    reason: str = ""
    notes: list[str] = field(default_factory=list)


def read(path: str | os.PathLike[str]) -> Finding:
    """Look through a TorchScript file of any torch since 1.0; nothing of it is run by Python or torch.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no TorchScript archive, is damaged, or holds what such a file has no reason to hold; or it
            runs on cellstep's operators, and is better made anew from its ``.safetensors``.
    """
    archive = read_archive(path)
    if any("ops.cellstep." in text for text in archive.sources.values()):
        raise ValueError(
            f"expected a TorchScript file on torch's own operators; got one on cellstep's ('{path}'); "
            "export the .safetensors file or the module that it was made from"
        )
    return _Search(archive).finding


class _Search:
    def __init__(self, archive: Archive) -> None:
        self.finding = Finding(archive)
        self._names: dict[int, str] = {}  # of the file's tensors
        self._used: set[int] = set()
        self._positions: dict[str, int] = {}
        tensors = []
        for name, value in _tensors(archive.root):
            if id(value) not in self._names:
                self._names[id(value)] = name
                tensors.append(value)
        for k, value in enumerate(archive.constants):
            if isinstance(value, Tensor) and id(value) not in self._names:
                self._names[id(value)] = f"c{k}"
                tensors.append(value)
        self._place = {id(tensor): k for k, tensor in enumerate(tensors)}
        self._dtype = next((t.dtype for t in tensors if t.is_floating_point() and t.dim() == 2), torch.float32)

        found = search(archive, _columns(tensors), _states(archive.root, tensors))
        line = found.match.line if found.match else []
        self.finding.match, self.finding.reason = found.match, found.reason
        seen = [stage for stage in line if isinstance(stage, (Recurrent, Linear))]
        with contextlib.suppress(*ODD):  # of operators out of the ordinary; the search says why it found no chain
            seen += layers(found.nodes)
        self._take_code(seen)
        self._take_objects(archive.root)
        self._take_scaling(tensors, {id(stage.root) for stage in line if isinstance(stage, Affine)})
        self._take_states(tensors)
        self._list_unknown(archive, tensors)
        self.finding.order = sorted(self._positions, key=self._positions.__getitem__)
        if found.match is not None:
            self._take_match(found.match)
        if archive.root.state.get("training") is True:
            self.finding.notes.append("it was saved in training mode; it is taken as it answers in evaluation mode")

    def _take_match(self, match: Match) -> None:
        dtype = self._dtype
        if dtype in _SMALL:
            self.finding.notes.append(
                f"its weights are {str(dtype).removeprefix('torch.')}; they are written as float32"
            )
            dtype = torch.float32
        if match.layout.stepwise and not match.keeps_state:
            self.finding.notes.append("it starts anew in every call; the files written can carry a state, too")
        self.finding.notes += [f"it takes {limit}; the files written take any" for limit in match.limits]
        self.finding.chain = match.chain.to(dtype)

    def _take_code(self, found: Sequence[Recurrent | Linear]) -> None:
        for stage in found:
            if isinstance(stage, Recurrent) and not self._used.intersection(map(id, stage.roots)):
                self._keep(self._common_name(stage.roots), stage)
        for stage in found:
            if isinstance(stage, Linear) and stage.roots and id(stage.roots[0]) not in self._used:
                self._keep(self._common_name(stage.roots), stage)

    def _common_name(self, roots: Sequence[Tensor]) -> str:
        """The module that holds the tensors: cells.0 of cells.0.W_ii; a constant by its own name."""
        names = [self._names[id(root)] for root in roots if id(root) in self._names]
        if not names:
            return "computed"
        if re.fullmatch(r"c\d+", names[0]):
            return names[0]
        owners = [name.split(".")[:-1] for name in names]
        common = [parts[0] for parts in zip(*owners, strict=False) if len(set(parts)) == 1]
        return ".".join(common) or "model"

    def _keep(self, name: str, stage: Recurrent | Linear) -> None:
        try:
            made = build.module(stage) if isinstance(stage, Recurrent) else build.dense(stage)
        except (ValueError, RuntimeError) as error:
            self.finding.unknown.append(f"{name}: {' '.join(str(error).split())[:200]}")
            return
        while name in self._positions:
            name += "'"
        into: dict[str, Any] = self.finding.modules if isinstance(stage, Recurrent) else self.finding.dense
        into[name] = made.to(self._dtype)
        self._positions[name] = min((self._place.get(id(root), 0) for root in stage.roots), default=0)
        self._used.update(id(root) for root in stage.roots)

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
                        self._keep(name, stage)
                elif kind in ("Linear", "Dense", "NonDynamicallyQuantizableLinear") or (
                    set(fresh) == {"weight", "bias"} and kind not in ("Embedding", "Bilinear")
                ):
                    self._keep(name, stage)

    def _take_scaling(self, tensors: Sequence[Tensor], scales: set[int]) -> None:
        for tensor in tensors:
            name = self._names[id(tensor)]
            named = _SCALING.fullmatch(name.rpartition(".")[2]) and tensor.is_floating_point()
            if id(tensor) not in self._used and (named or id(tensor) in scales):
                self.finding.scaling[name] = tensor
                self._positions[name] = self._place[id(tensor)]
                self._used.add(id(tensor))

    def _take_states(self, tensors: Sequence[Tensor]) -> None:
        """What the code keeps from call to call, or else what has the name and the size of a state."""
        saved = {id(tensor) for tensor in self.finding.match.saved} if self.finding.match else set()
        sizes = {size for module in self.finding.modules.values() for size in _sizes(module)}
        for tensor in tensors:
            name = self._names[id(tensor)]
            named = _STATE.fullmatch(name.rpartition(".")[2].lower()) and tensor.dim() and tensor.size(-1) in sizes
            if id(tensor) in saved or (self.finding.match is None and named and id(tensor) not in self._used):
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


def compare(finding: Finding, chain: Chain) -> None:
    """Take a chain of the user's making instead of what the code says, and see whether it gives the code's numbers."""
    proposal = copy.deepcopy(chain).double()
    sizes = proposal.initial_state(1)
    found = search(finding.archive, [chain.input_size], [(sizes[0].size(0), chain.h_size, chain.c_size)], proposal)
    finding.chain, finding.match, finding.reason = chain, found.match, found.reason
    if found.match is not None:
        chain.answers = found.match.chain.answers  # type: ignore[misc]


def _columns(tensors: Sequence[Tensor]) -> list[int]:
    """What the number of input columns may be: weights have so many, or so many rows where they lie transposed."""
    matrices = [tensor for tensor in tensors if tensor.dim() == 2 and tensor.is_floating_point() and tensor.numel()]
    found = [tensor.size(1) for tensor in matrices] + [tensor.size(0) for tensor in matrices]
    for small, large in (sorted(tensor.shape) for tensor in matrices):
        # A cell's weight of input and state side by side, of all gates together or of one.
        found += [n for n in (large - small, large - small // 4, small - large // 4) if n > 0]
    return found


def _states(root: Object, tensors: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    """What the sizes of a state may be: those of the LSTMs by name, and of as many layers as weights look like it."""
    found = []
    for _, item in _objects(root):
        known = _by_names({name: value for name, value in item.state.items() if isinstance(value, Tensor)})
        found += [state_sizes(stage) for stage in known if isinstance(stage, Recurrent) and stage.weights[1].dim() == 2]
    shapes = [sorted(tensor.shape) for tensor in tensors if tensor.dim() == 2 and tensor.numel()]
    for small, large in shapes:
        if large in (small, 4 * small):
            found += [(count, small, small) for count in range(1, 1 + min(8, shapes.count([small, large])))]
    return found


def _sizes(module: LSTM | LSTMCell) -> tuple[int, int]:
    return module.hidden_size, getattr(module, "proj_size", 0) or module.hidden_size


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


def report(finding: Finding) -> list[str]:
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
            f"warning: {name} is a saved state that is not zero (largest value {largest:.3g}); "
            "the files written start from zero"
        )
    lines += [f"note: {note}" for note in finding.notes]
    return lines
