"""LSTM layers out of a loaded TorchScript file."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from cellstep.convert.parts import filled
from cellstep.nn import LSTM, LSTMCell

_QUALIFIED = re.compile(r"__torch__\.torch\.nn\.modules\.rnn\.(?:___torch_mangle_\d+\.)?(LSTM|LSTMCell)")


def from_scripted(module: torch.jit.ScriptModule) -> dict[str, LSTM | LSTMCell]:
    """The torch.nn.LSTM and LSTMCell submodules of a scripted or traced module, as cellstep's.

    Weights are copied, with their dtype, device and training mode.

    Args:
        module: what ``torch.jit.load``, ``script`` or ``trace`` gave.

    Returns:
        Modules by dotted name; the name of the module itself is empty.

    Raises:
        TypeError: it is no ScriptModule.
        ValueError: there is no such submodule: it was frozen, which makes constants of the weights, or its cells are
            written by hand; or a submodule does not say how it lays out its input.
    """
    if not isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"expected a ScriptModule; got {type(module).__name__}; load a file with torch.jit.load, or use "
            "cellstep.convert.replace_lstm on a model in Python"
        )
    found: dict[str, LSTM | LSTMCell] = {}
    for name, child in module.named_modules():
        kind = torchs_kind(child)
        if kind:
            values = dict(child.named_parameters(recurse=False))
            found[name] = _cell(values) if kind == "LSTMCell" else _lstm(name, child, values)
            found[name].train(child.training)
    if not found:
        raise ValueError(
            "expected torch.nn.LSTM or LSTMCell among the submodules; got none; if the file was frozen or its cells "
            "are written by hand, read it with: cellstep import"
        )
    return found


def torchs_kind(module: nn.Module) -> str:
    """ "LSTM" or "LSTMCell" for torch's, scripted; else an empty string."""
    if not isinstance(module, torch.jit.ScriptModule):
        return ""
    match = _QUALIFIED.fullmatch(module._c._type().qualified_name())
    return match[1] if match else ""


def _cell(values: dict[str, Tensor]) -> LSTMCell:
    rows, inputs = values["weight_ih"].shape
    return filled(LSTMCell(inputs, rows // 4, "bias_ih" in values, device="meta"), values)


def _lstm(name: str, module: Any, values: dict[str, Tensor]) -> LSTM:
    layers = 1 + max(int(key.split("_l")[1].split("_")[0]) for key in values)
    rows, inputs = values["weight_ih_l0"].shape
    batch_first, dropout = _call(name, module)
    lstm = LSTM(
        inputs,
        rows // 4,
        layers,
        "bias_ih_l0" in values,
        batch_first,
        bidirectional="weight_ih_l0_reverse" in values,
        proj_size=len(values.get("weight_hr_l0", ())),
        device="meta",
    )
    lstm.dropout = dropout  # type: ignore[misc]  # the constructor warns of dropout on one layer
    return filled(lstm, values)


def _call(name: str, module: Any) -> tuple[bool, float]:
    """batch_first and dropout: attributes of a scripted module, constants in the code of a traced one."""
    if hasattr(module, "batch_first"):
        return module.batch_first, module.dropout
    calls = module.graph.findAllNodes("aten::lstm") if module._c._has_method("forward") else []
    # lstm(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
    values = [value.toIValue() for call in calls[:1] for value in list(call.inputs())[3:]]
    if len(values) != 6:
        raise ValueError(
            f"expected batch_first as an attribute or in the code of '{name}'; got neither; script the model again"
        )
    return bool(values[5]), float(values[2])
