"""What the converters share: gate orders, and parameters put into modules."""

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cellstep.nn import LSTM, Dense

Array = NDArray[Any]
Module = TypeVar("Module", bound=nn.Module)


def filled(module: Module, values: Mapping[str, Tensor]) -> Module:
    """Give a module made on the meta device copies of ``values`` as its parameters; all there and of the right shape.

    Raises:
        ValueError: a shape does not fit.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        value = values[name].detach()
        if value.shape != parameter.shape:
            raise ValueError(
                f"expected {name} of shape {tuple(parameter.shape)}; got {tuple(value.shape)}; check the sizes"
            )
        # Not register_parameter: torch.nn.LSTM keeps a list of its weights up to date where attributes are set.
        setattr(module, name, nn.Parameter(value.clone(memory_format=torch.contiguous_format)))
    return module


def single_layer(
    directions: "list[dict[str, Tensor]]",
    *,
    batch_first: bool,
    initial: "dict[str, Tensor] | None" = None,
    **options: Any,
) -> LSTM:
    """An LSTM of one layer, for inference, from the parameters of its directions, rows in torch's gate order.

    Args:
        directions: ``weight_ih`` (4 H, I), ``weight_hh`` (4 H, H) and, each where the layer has it, ``bias_ih`` and
            ``bias_hh`` (4 H), ``weight_peephole``.
        initial: ``initial_h`` and ``initial_c`` (directions, H), if they are to be the initial state.
        options: of :class:`cellstep.nn.LSTM`.
    """
    _, inputs = matrix_shape("weight_ih", directions[0]["weight_ih"])
    _, hidden = matrix_shape("weight_hh", directions[0]["weight_hh"])
    lstm = LSTM(
        inputs,
        hidden,
        bias="bias_ih" in directions[0],
        batch_first=batch_first,
        bidirectional=len(directions) == 2,
        device="meta",
        peephole="weight_peephole" in directions[0],
        learn_initial_state=initial is not None,
        **options,
    )
    values = dict(initial or {})
    for suffix, direction in zip(("_l0", "_l0_reverse"), directions, strict=False):
        values |= {name + suffix: value for name, value in direction.items()}
    return filled(lstm, values).eval()


def dense(weight: Tensor, bias: Tensor | None, activation: str) -> Dense:
    """A dense layer with ``weight`` (out, in) and, if it has one, ``bias`` (out)."""
    outputs, inputs = matrix_shape("weight", weight)
    values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return filled(Dense(inputs, outputs, activation, bias=bias is not None, device="meta"), values)


def matrix_shape(name: str, value: Tensor) -> tuple[int, int]:
    """ValueError unless ``value`` is a matrix with something in it."""
    if value.dim() != 2 or value.numel() == 0:
        raise ValueError(f"expected {name} with two dimensions; got shape {tuple(value.shape)}; check the sizes")
    return value.shape[0], value.shape[1]


def reordered(rows: Tensor, have: str, want: str = "ifgo") -> Tensor:
    """Equal blocks of rows, one a gate, from the order ``have`` into the order ``want``."""
    blocks = dict(zip(have, rows.chunk(len(have)), strict=True))
    return torch.cat([blocks[gate] for gate in want])


def tensor(values: Array) -> Tensor:
    """A tensor with the values and type of an array; a copy."""
    if values.dtype.name == "bfloat16":  # NumPy has none of its own, and torch does not read another's
        return torch.from_numpy(values.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(values))
