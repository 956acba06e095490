"""One LSTM step as a module."""

import math
from typing import Final, Optional

import torch
from torch import Tensor, nn

from cellstep.nn.dispatch import USE_OPS, cast_to, has_kernel, widens


def check_size(name: str, value: int) -> None:
    """TypeError for what is no int, ValueError for what is no size."""
    if not isinstance(value, int):
        raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"{name} must be greater than zero, got {value}")


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


class LSTMCell(nn.Module):
    """One LSTM step; a drop-in for :class:`torch.nn.LSTMCell`.

    ``cell(input, (h, c)) -> (h, c)`` with ``input`` (N, input_size) or (input_size) and ``h``, ``c``
    (N, hidden_size) or (hidden_size); a missing state is zero. Parameters are ``weight_ih`` (4 hidden_size,
    input_size), ``weight_hh`` (4 hidden_size, hidden_size), ``bias_ih`` and ``bias_hh`` (4 hidden_size), rows in
    gate order i, f, g, o.

    Raises:
        ValueError: the input or the state has a wrong number of dimensions.
        RuntimeError: a size, dtype or device does not fit the parameters.
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
            self._check(x, h, 0, batched)
            self._check(x, c, 1, batched)
            if not batched:
                h, c = h.unsqueeze(0), c.unsqueeze(0)
        if x.size(1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {x.size(1)} expected {self.input_size}")
        if x.device != self.weight_ih.device or x.device != h.device or x.device != c.device:
            raise RuntimeError(
                f"Expected input, state and parameters on one device, got {x.device}, {h.device}, {c.device} and "
                f"{self.weight_ih.device}"
            )
        h, c = self._step(x, h, c)
        if not batched:
            h, c = h.squeeze(0), c.squeeze(0)
        return h, c

    def _step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if self.use_ops:  # constant: a TorchScript file without operators names none
            if widens(x) and h.dtype == x.dtype and c.dtype == x.dtype:
                return self._step_widened(x, h, c)
            if has_kernel(x):
                h, c, _ = torch.ops.cellstep.lstm_cell(
                    x, h, c, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, torch.is_grad_enabled()
                )
                return h, c
            if not torch.jit.is_scripting():
                if cast_to(x) is not None:
                    return self._step_cast(x, h, c)
        return torch.lstm_cell(x, [h, c], self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)

    @torch.jit.unused
    def _step_widened(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        wide = [None if t is None else t.float() for t in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)]
        h, c, _ = torch.ops.cellstep.lstm_cell(x.float(), h.float(), c.float(), *wide, torch.is_grad_enabled())
        return h.to(x.dtype), c.to(x.dtype)

    @torch.jit.unused
    def _step_cast(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Under autocast, which casts what torch.nn.LSTMCell is given and has."""
        parts = (x, h, c, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        cast = [None if part is None else part.to(cast_to(x)) for part in parts]
        h, c, _ = torch.ops.cellstep.lstm_cell(*cast, torch.is_grad_enabled())
        return h, c

    def _check(self, x: Tensor, part: Tensor, index: int, batched: bool) -> None:
        """One half of the state beside x (N, input_size)."""
        if part.dim() != 1 and part.dim() != 2:
            raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {part.dim()}D instead")
        if part.dim() != (2 if batched else 1):
            raise RuntimeError(
                f"Expected hx[{index}] to be {2 if batched else 1}D like the input, got {part.dim()}D instead"
            )
        if batched and part.size(0) != x.size(0):
            raise RuntimeError(f"Input batch size {x.size(0)} doesn't match hidden{index} batch size {part.size(0)}")
        if part.size(-1) != self.hidden_size:
            raise RuntimeError(
                f"hidden{index} has inconsistent hidden_size: got {part.size(-1)}, expected {self.hidden_size}"
            )
