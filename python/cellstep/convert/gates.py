"""Stacks of hand-written cells that keep one matrix a gate."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from cellstep.nn import Forecaster

_GATES = "ifgo"  # torch's order of rows


def from_gates(state_dict: Mapping[str, Tensor]) -> Forecaster:
    """A forecaster from a stack of hand-written cells that keep one matrix a gate.

    Args:
        state_dict: ``cells.{i}.W_i{g}`` (hidden, in), ``cells.{i}.W_h{g}`` (hidden, hidden) and ``cells.{i}.b_{g}``
            (hidden) for each gate g of i, f, g, o, and ``fc.weight`` (out, hidden), ``fc.bias`` (out). Each gate is
            ``x @ W_i.T + h @ W_h.T + b``; the last layer's last h goes through ``fc``; states start at zero.

    Raises:
        ValueError: a key is missing or unknown, or a shape does not fit.
    """
    layers = 1 + max((int(m[1]) for key in state_dict if (m := re.fullmatch(r"cells\.(\d+)\..+", key))), default=-1)
    expected = {f"cells.{i}.{name}" for i in range(layers) for g in _GATES for name in _gate_names(g)}
    expected |= {"fc.weight", "fc.bias"}
    missing, unknown = sorted(expected - set(state_dict)), sorted(set(state_dict) - expected)
    if missing or unknown or layers == 0:
        found = f"missing {', '.join(missing) or 'cells.0.*'}" if not unknown else f"unknown {', '.join(unknown)}"
        raise ValueError(f"expected cells.0.W_ii ... b_o and fc.weight, fc.bias; got keys with {found}")

    hidden, inputs = _matrix_shape(state_dict, "cells.0.W_ii")
    outputs, _ = _matrix_shape(state_dict, "fc.weight")
    weight = state_dict["fc.weight"]
    model = Forecaster(inputs, hidden, layers, outputs, dtype=weight.dtype, device=weight.device)
    shapes = {"fc.weight": (outputs, hidden), "fc.bias": (outputs,)}
    for i in range(layers):
        for g in _GATES:
            w_i, w_h, b = (f"cells.{i}.{name}" for name in _gate_names(g))
            shapes |= {w_i: (hidden, inputs if i == 0 else hidden), w_h: (hidden, hidden), b: (hidden,)}
    for key, shape in shapes.items():
        if tuple(state_dict[key].shape) != shape:
            raise ValueError(f"expected {key} of shape {shape}; got {tuple(state_dict[key].shape)}; check the sizes")

    with torch.no_grad():
        for i in range(layers):
            rows = [[state_dict[f"cells.{i}.{name}"] for name in _gate_names(g)] for g in _GATES]
            for name, parts in zip(("weight_ih", "weight_hh", "bias_ih"), zip(*rows, strict=True), strict=True):
                getattr(model.lstm, f"{name}_l{i}").copy_(torch.cat(parts))
            getattr(model.lstm, f"bias_hh_l{i}").zero_()
        model.head.weight.copy_(weight)
        model.head.bias.copy_(state_dict["fc.bias"])
    return model


def to_gates(model: Forecaster) -> dict[str, Tensor]:
    """The same model as one matrix a gate, under the keys that :func:`from_gates` reads.

    That layout knows no scaling: scaling of the model is multiplied into its first weights and its head, which gives
    the same outputs up to rounding.
    """
    offset, scale = model.input_offset.double(), model.input_scale.double()
    gates: dict[str, Tensor] = {}
    with torch.no_grad():
        for i in range(model.num_layers):
            weight_ih = getattr(model.lstm, f"weight_ih_l{i}").double()
            bias = getattr(model.lstm, f"bias_ih_l{i}").double() + getattr(model.lstm, f"bias_hh_l{i}").double()
            if i == 0:
                weight_ih = weight_ih * scale
                bias = bias - weight_ih @ offset
            weight_hh = getattr(model.lstm, f"weight_hh_l{i}").double()
            for names, parts in zip(
                zip(*(_gate_names(g) for g in _GATES), strict=True), (weight_ih, weight_hh, bias), strict=True
            ):
                for name, part in zip(names, parts.chunk(4), strict=True):
                    gates[f"cells.{i}.{name}"] = part
        gates["fc.weight"] = model.head.weight.double() * model.output_scale.double().unsqueeze(1)
        gates["fc.bias"] = model.head.bias.double() * model.output_scale.double() + model.output_offset.double()
    return {key: tensor.to(model.head.weight.dtype).clone() for key, tensor in gates.items()}


def _gate_names(gate: str) -> tuple[str, str, str]:
    return f"W_i{gate}", f"W_h{gate}", f"b_{gate}"


def _matrix_shape(state_dict: Mapping[str, Tensor], key: str) -> tuple[int, int]:
    shape = tuple(state_dict[key].shape)
    if len(shape) != 2:
        raise ValueError(f"expected {key} with two dimensions; got shape {shape}; check the sizes")
    return shape
