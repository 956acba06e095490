"""One LSTM step as a module."""

import math
from typing import Final, Optional

import torch
from torch import Tensor, nn

from cellstep.nn.dispatch import USE_OPS, has_kernel


def check_size(name: str, value: int) -> None:
    """TypeError for what is no int, ValueError for what is no size."""
    if not isinstance(value, int):
        raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"{name} must be greater than zero, got {value}")


class LSTMCell(nn.Module):
    """One LSTM step; a drop-in for :class:`torch.nn.LSTMCell`.

    ``cell(input, (h, c)) -> (h, c)`` with ``input`` (N, input_size) or (input_size) and ``h``, ``c``
    (N, hidden_size) or (hidden_size); a missing state is zero. Parameters are ``weight_ih`` (4 hidden_size,
    input_size), ``weight_hh`` (4 hidden_size, hidden_size), ``bias_ih`` and ``bias_hh`` (4 hidden_size), rows in
    gate order i, f, g, o.

    Raises:
        ValueError: the input has a wrong number of dimensions.
        RuntimeError: a size or dtype does not fit the parameters.
    """

    input_size: Final[int]
    hidden_size: Final[int]
    use_ops: Final[bool]
    bias: bool
    bias_ih: Optional[Tensor]
    bias_hh: Optional[Tensor]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("input_size", input_size)
        check_size("hidden_size", hidden_size)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.use_ops = USE_OPS
        self.bias = bias
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size, device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size, device=device, dtype=dtype))
        for name in ("bias_ih", "bias_hh"):
            value = nn.Parameter(torch.empty(4 * hidden_size, device=device, dtype=dtype)) if bias else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter uniformly from ±1/sqrt(hidden_size), as torch does."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias else ", bias=False")

    def forward(self, input: Tensor, hx: Optional[tuple[Tensor, Tensor]] = None) -> tuple[Tensor, Tensor]:
        if input.dim() != 1 and input.dim() != 2:
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        if hx is None:
            zeros = x.new_zeros([x.size(0), self.hidden_size])
            h, c = zeros, zeros
        else:
            h, c = hx
            if h.dim() != input.dim() or c.dim() != input.dim():
                raise ValueError(
                    f"LSTMCell: Expected hx[0] and hx[1] to be {input.dim()}D like the input, "
                    f"got {h.dim()}D and {c.dim()}D instead"
                )
            if not batched:
                h, c = h.unsqueeze(0), c.unsqueeze(0)
        if self.use_ops and has_kernel(x):
            h, c, _ = torch.ops.cellstep.lstm_cell(
                x, h, c, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, torch.is_grad_enabled()
            )
        else:
            h, c = torch.lstm_cell(x, [h, c], self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        if not batched:
            h, c = h.squeeze(0), c.squeeze(0)
        return h, c
