"""Modules and chains out of what a file was found to hold."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cellstep.convert import parts
from cellstep.convert.parts import Module, filled
from cellstep.nn import LSTM, Chain, Dense, LSTMCell, Scale, Skip, Unscale
from cellstep.rescue.line import Activation, Affine, Linear, Recurrent, Skipped, Stage

_WIDTH_LIMIT = 4096  # of a diagonal matrix


def module(stage: Recurrent) -> LSTM | LSTMCell:
    """A module with the weights of a stage; ValueError if their shapes are not those of an LSTM."""
    w_ih, w_hh = stage.weights[:2]
    if w_ih.dim() != 2 or w_hh.dim() != 2 or not w_ih.is_floating_point() or w_ih.numel() * w_hh.numel() == 0:
        raise ValueError(f"weights of shapes {tuple(w_ih.shape)} and {tuple(w_hh.shape)} are not those of an LSTM")
    hidden, recurrent = w_ih.size(0) // 4, w_hh.size(1)
    if w_ih.size(0) != 4 * hidden or w_hh.size(0) != 4 * hidden or recurrent > hidden:
        raise ValueError(f"weights of shapes {tuple(w_ih.shape)} and {tuple(w_hh.shape)} are not those of an LSTM")
    if stage.is_cell:
        return _fill(LSTMCell(w_ih.size(1), hidden, stage.bias, device="meta"), stage.weights)
    each = 2 + 2 * stage.bias + (recurrent < hidden)
    if len(stage.weights) != each * stage.num_layers * (1 + stage.bidirectional):
        raise ValueError(f"{len(stage.weights)} weights are not those of an LSTM of {stage.num_layers} layers")
    lstm = LSTM(
        w_ih.size(1),
        hidden,
        stage.num_layers,
        stage.bias,
        stage.batch_first,
        stage.dropout if stage.num_layers > 1 else 0.0,
        stage.bidirectional,
        recurrent if recurrent < hidden else 0,
        device="meta",
    )
    return _fill(lstm, stage.weights)


def _fill(module: Module, weights: Sequence[Tensor]) -> Module:
    """:func:`filled`, from weights in the order of the parameters, in the dtype of the first."""
    names = [name for name, _ in module.named_parameters()]
    return filled(module, {n: weight.to(weights[0].dtype) for n, weight in zip(names, weights, strict=True)}).eval()


def dense(stage: Linear) -> Dense:
    bias = None if stage.bias is None else stage.bias.to(stage.weight.dtype)
    return parts.dense(stage.weight, bias, "linear").eval()


def chain(stages: Sequence[Stage], initial: Sequence[tuple[Tensor, Tensor] | None]) -> Chain:
    """Stages as a chain in float64 that answers every step.

    Args:
        initial: for each LSTM or cell among the stages the learned (h, c) that it starts from, (layers and directions,
            size), or None for zero.

    Raises:
        ValueError: a chain has no place for them.
    """
    return _Links(stages, initial).chain()


class _Links:
    def __init__(self, stages: Sequence[Stage], initial: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        self._line, self._initial = stages, list(initial)
        self._stages: list[Scale | Dense | LSTM | Unscale | Skip] = []
        self._pending: list[Affine] = []
        first = next(stage for stage in stages if isinstance(stage, (Linear, Recurrent)))
        self._width = (first.weight if isinstance(first, Linear) else first.weights[0]).size(1)

    def chain(self) -> Chain:
        skip: list[Skip] = []
        for stage in self._line:
            if isinstance(stage, Affine):
                self._pending.append(stage)
            elif isinstance(stage, Skipped):
                skip = [Skip(stage.columns)]
            else:
                self._add(stage)
        if self._pending:
            offset, scale = self._affine()
            self._stages.append(Unscale(offset, scale))
        return Chain(*self._stages, *skip, answers="every").eval()

    def _add(self, stage: Recurrent | Linear | Activation) -> None:
        past = any(isinstance(made, LSTM) for made in self._stages)
        between = past and not isinstance(self._stages[-1], LSTM)
        if isinstance(stage, Recurrent):
            if between or (past and self._pending):
                raise ValueError("something between two LSTMs that a chain has no place for")
            self._settle()
            self._stages.append(_as_lstm(module(stage), self._initial.pop(0)))
            self._width = stage.output_size
            return
        self._settle()
        if isinstance(stage, Linear):
            self._stages.append(dense(stage))
            self._width = stage.weight.size(0)
            return
        before = self._stages[-1] if self._stages else None
        if not isinstance(before, Dense) or before.activation != "linear":
            before = dense(Linear(self._diagonal(torch.ones(self._width, dtype=torch.float64)), None, []))
            self._stages.append(before)
        self._stages[-1] = parts.dense(before.weight, before.bias, stage.name)

    def _settle(self) -> None:
        """Place the scaling so far: first of all as Scale, later as a dense layer with a diagonal weight."""
        if not self._pending:
            return
        if self._stages:
            offset, scale = self._affine()
            self._stages.append(dense(Linear(self._diagonal(scale), offset, [])))
        else:
            self._stages.append(Scale(*self._input_affine()))
        self._pending = []

    def _diagonal(self, values: Tensor) -> Tensor:
        if self._width > _WIDTH_LIMIT:
            raise ValueError(f"{self._width:,} columns where scaling becomes a matrix")
        return torch.diag(values)

    def _columns(self, value: Tensor) -> Tensor:
        """One value a column."""
        if value.numel() not in (1, self._width) or (value.dim() and value.size(-1) != value.numel()):
            raise ValueError(f"scaling of shape {tuple(value.shape)} for {self._width} columns")
        return value.double().reshape(-1).expand(self._width).clone()

    def _affine(self) -> tuple[Tensor, Tensor]:
        """The pending stages as x * scale + offset: (offset, scale)."""
        scale, offset = torch.ones(self._width, dtype=torch.float64), torch.zeros(self._width, dtype=torch.float64)
        for stage in self._pending:
            if stage.op == "norm":
                factor, shift = (self._columns(part) for part in stage.value)
                scale, offset = scale * factor, offset * factor + shift
                continue
            value = self._columns(stage.value)
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
        return offset, scale

    def _input_affine(self) -> tuple[Tensor, Tensor]:
        """The pending stages as (x - offset) * scale."""
        first, *rest = self._pending
        if first.op in ("add", "sub") and not first.reverse:
            # An offset that comes first is kept as it is; a mean of the data is not rounded anew.
            shift = self._columns(first.value) * (-1 if first.op == "add" else 1)
            self._pending = rest
            offset, scale = self._affine()
            if not bool(offset.any()):
                return shift, scale
            self._pending = [first, *rest]
        offset, scale = self._affine()
        if bool(((scale == 0) & (offset != 0)).any()):
            raise ValueError("a column scaled with zero and shifted")
        return torch.where(scale == 0, 0.0, -offset / scale), scale


def assemble(modules: Mapping[str, LSTM | LSTMCell], denses: Mapping[str, Dense], names: Sequence[str]) -> Chain:
    """Found LSTMs, cells and dense layers as one model that answers from the last step, where the user knows the order.

    Args:
        names: of ``finding.modules`` and ``finding.dense``, in order; ``fc:relu`` names an activation of a dense one.

    Raises:
        ValueError: a name is not there, or the sizes do not fit.
    """
    stages: list[LSTM | Dense] = []
    for entry in names:
        name, _, activation = entry.partition(":")
        if name in denses:
            found = denses[name]
            stages.append(parts.dense(found.weight, found.bias, activation or "linear"))
        elif name in modules and not activation:
            stages.append(_as_lstm(modules[name]))
        else:
            there = ", ".join([*modules, *denses]) or "nothing"
            raise ValueError(f"expected names of found layers: {there}; got '{entry}'; choose among them")
    return Chain(*stages).eval()


def _as_lstm(module: LSTM | LSTMCell, initial: tuple[Tensor, Tensor] | None = None) -> LSTM:
    options: dict[str, Any] = {"learn_initial_state": initial is not None}
    if isinstance(module, LSTM):
        if initial is None:
            return module
        options |= {"num_layers": module.num_layers, "bidirectional": module.bidirectional}
        options |= {"proj_size": module.proj_size, "dropout": module.dropout}
    weights = list(module.parameters())
    lstm = LSTM(module.input_size, module.hidden_size, bias=module.bias, device="meta", **options)
    return _fill(lstm, [*weights, *(initial or ())])
