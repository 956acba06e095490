"""LSTM modules that drop in for torch's: the same arguments, the same ``state_dict`` keys, the same answers.

Every module here goes through ``torch.jit.script`` at the top level. On a CPU in float32 and float64 it runs on
cellstep's operators, elsewhere on torch's own. With the environment variable ``CELLSTEP_DISABLE_OPS=1``, read at
import, everything runs on torch's own: a reference to compare with.
"""

import copy
import math
import os
from typing import Final, Optional

import torch
from torch import Tensor, nn

USE_OPS: bool = os.environ.get("CELLSTEP_DISABLE_OPS", "0") != "1"
if USE_OPS:
    import cellstep.ops  # noqa: F401  (registers torch.ops.cellstep)

State = tuple[Tensor, Tensor]


def _check_sizes(input_size: int, hidden_size: int) -> None:
    for name, value in (("input_size", input_size), ("hidden_size", hidden_size)):
        if not isinstance(value, int):
            raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
        if value <= 0:
            raise ValueError(f"{name} must be greater than zero, got {value}")


def _has_kernel(x: Tensor) -> bool:
    return x.device.type == "cpu" and (x.dtype == torch.float32 or x.dtype == torch.float64)


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
        _check_sizes(input_size, hidden_size)
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
        if self.use_ops and _has_kernel(x):
            h, c, _ = torch.ops.cellstep.lstm_cell(
                x, h, c, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, torch.is_grad_enabled()
            )
        else:
            h, c = torch.lstm_cell(x, [h, c], self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        if not batched:
            h, c = h.squeeze(0), c.squeeze(0)
        return h, c


class LSTM(nn.Module):
    """A stack of LSTM layers over whole sequences; a drop-in for :class:`torch.nn.LSTM`.

    ``lstm(input, (h_0, c_0)) -> (output, (h_n, c_n))`` with ``input`` (T, N, input_size), or (N, T, input_size) if
    ``batch_first``, or (T, input_size) without a batch; ``h`` and ``c`` (num_layers, N, hidden_size); a missing
    state is zero. Parameters are named as torch names them: ``weight_ih_l0``, ``weight_hh_l0``, ``bias_ih_l0``,
    ``bias_hh_l0`` and so on, rows in gate order i, f, g, o. ``dropout`` acts between layers while training.

    On cellstep's operators no bit of the output hangs on how a sequence is cut into calls or on which other rows
    are in the batch.

    Raises:
        ValueError: the input has a wrong number of dimensions or another dtype than the parameters.
        RuntimeError: a size does not fit, or the sequence is empty.
        NotImplementedError: ``bidirectional`` or ``proj_size`` is asked for.
    """

    input_size: Final[int]
    hidden_size: Final[int]
    num_layers: Final[int]
    bias: Final[bool]
    batch_first: Final[bool]
    dropout: Final[float]
    bidirectional: Final[bool]
    proj_size: Final[int]
    use_ops: Final[bool]
    _flat_weights: list[Tensor]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(input_size, hidden_size)
        if num_layers <= 0:
            raise ValueError(f"num_layers must be greater than zero, got {num_layers}")
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout should be a number in range [0, 1], got {dropout}")
        if bidirectional or proj_size:
            raise NotImplementedError("bidirectional and proj_size are not there yet: use torch.nn.LSTM for them")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        self.use_ops = USE_OPS
        for name, shape in self._parameter_shapes():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()
        self.__prepare_scriptable__()

    @torch.jit.unused
    def _parameter_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        rows = 4 * self.hidden_size
        shapes: list[tuple[str, tuple[int, ...]]] = []
        for layer in range(self.num_layers):
            inputs = self.input_size if layer == 0 else self.hidden_size
            shapes += [(f"weight_ih_l{layer}", (rows, inputs)), (f"weight_hh_l{layer}", (rows, self.hidden_size))]
            if self.bias:
                shapes += [(f"bias_ih_l{layer}", (rows,)), (f"bias_hh_l{layer}", (rows,))]
        return shapes

    def __prepare_scriptable__(self) -> "LSTM":
        # TorchScript cannot look a parameter up by a computed name, so scripted code reads this list. torch.jit.script
        # calls this hook first; the list holds the parameters themselves, so that moves and updates show in both.
        self._flat_weights = self._named_weights()
        return self

    @torch.jit.unused
    def _named_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name, _ in self._parameter_shapes()]

    @torch.jit.unused
    def reset_parameters(self) -> None:
        """Draw every parameter uniformly from ±1/sqrt(hidden_size), as torch does."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @torch.jit.unused
    def flatten_parameters(self) -> None:
        """Does nothing: the weights need no flat buffer. Kept so that callers of torch.nn.LSTM need no change."""

    @torch.jit.unused
    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        for name, default in (("num_layers", 1), ("bias", True), ("batch_first", False), ("dropout", 0.0)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text

    def _check(self, x: Tensor, h: Tensor, c: Tensor, weight: Tensor) -> None:
        """``x`` is (T, N, input_size)."""
        if not torch.jit.is_scripting():  # TorchScript cannot ask about autocast; there the operators compare
            if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
                raise ValueError(
                    f"LSTM: Expected input of the weights' dtype {weight.dtype}, got {x.dtype}; convert the input "
                    f"with input.to({weight.dtype}) or the module with module.to({x.dtype})"
                )
        if x.size(2) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.size(2)}"
            )
        if x.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        shape = torch.Size([self.num_layers, x.size(1), self.hidden_size])
        if h.shape != shape:
            raise RuntimeError(f"Expected hidden[0] size {shape}, got {h.shape}")
        if c.shape != shape:
            raise RuntimeError(f"Expected hidden[1] size {shape}, got {c.shape}")

    def forward(
        self, input: Tensor, hx: Optional[tuple[Tensor, Tensor]] = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if input.dim() != 2 and input.dim() != 3:
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        if not batched:
            x = input.unsqueeze(1)
        elif self.batch_first:
            x = input.transpose(0, 1)
        else:
            x = input
        if hx is None:
            zeros = x.new_zeros([self.num_layers, x.size(1), self.hidden_size])
            h, c = zeros, zeros
        else:
            h, c = hx
            if h.dim() != input.dim() or c.dim() != input.dim():
                raise RuntimeError(
                    f"For {input.dim()}-D input, hx and cx should be {input.dim()}-D too, "
                    f"got ({h.dim()}-D, {c.dim()}-D) tensors"
                )
            if not batched:
                h, c = h.unsqueeze(1), c.unsqueeze(1)
        if torch.jit.is_scripting():
            weights = self._flat_weights
        else:
            weights = self._named_weights()
        self._check(x, h, c, weights[0])

        if self.use_ops and _has_kernel(x):
            output, h, c = self._forward_ops(x, h, c, weights)
        else:
            output, h, c = torch.lstm(
                x, [h, c], weights, self.bias, self.num_layers, self.dropout, self.training, False, False
            )
        if not batched:
            output, h, c = output.squeeze(1), h.squeeze(1), c.squeeze(1)
        elif self.batch_first:
            output = output.transpose(0, 1)
        return output, (h, c)

    def _forward_ops(self, x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        last_h: list[Tensor] = []
        last_c: list[Tensor] = []
        bias_ih: Optional[Tensor] = None
        bias_hh: Optional[Tensor] = None
        per_layer = 4 if self.bias else 2
        for layer in range(self.num_layers):
            at = layer * per_layer
            if self.bias:
                bias_ih, bias_hh = weights[at + 2], weights[at + 3]
            x, h_n, c_n, _, _ = torch.ops.cellstep.lstm_layer(
                x, h[layer], c[layer], weights[at], weights[at + 1], bias_ih, bias_hh, torch.is_grad_enabled()
            )
            last_h.append(h_n)
            last_c.append(c_n)
            if self.dropout > 0.0 and layer + 1 < self.num_layers:
                x = nn.functional.dropout(x, self.dropout, self.training)
        return x, torch.stack(last_h), torch.stack(last_c)


class Forecaster(nn.Module):
    """An LSTM stack and a linear head on the last hidden state, in the user's own units.

    The scaling lies in four buffers: the layers see ``(x - input_offset) * input_scale``, and the answer is
    ``head * output_scale + output_offset``. :meth:`set_scaling` fills them from means and standard deviations.
    ``feature_names``, ``output_names``, ``window`` and ``horizon`` say what the columns are and what the model was
    trained for; they travel with every artifact and change no number.

    Args:
        input_size: features of a step.
        hidden_size: units of each layer.
        num_layers: layers of the stack.
        output_size: values forecast.
        dropout: between layers, while training.
        init_range: if given, all parameters start uniform in ±init_range; else as torch starts them.
    """

    input_size: Final[int]
    hidden_size: Final[int]
    num_layers: Final[int]
    output_size: Final[int]
    use_ops: Final[bool]
    feature_names: list[str]
    output_names: list[str]
    window: int
    horizon: int
    input_offset: Tensor
    input_scale: Tensor
    output_offset: Tensor
    output_scale: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        output_size: int = 1,
        *,
        dropout: float = 0.0,
        init_range: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.output_size = output_size
        self.use_ops = USE_OPS
        self.lstm = LSTM(
            input_size, hidden_size, num_layers, batch_first=True, dropout=dropout, device=device, dtype=dtype
        )
        self.head = nn.Linear(hidden_size, output_size, device=device, dtype=dtype)
        for side, size in (("input", input_size), ("output", output_size)):
            self.register_buffer(f"{side}_offset", torch.zeros(size, device=device, dtype=dtype))
            self.register_buffer(f"{side}_scale", torch.ones(size, device=device, dtype=dtype))
        self.feature_names = []
        self.output_names = []
        self.window = 0
        self.horizon = 0
        if init_range is not None:
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -init_range, init_range)

    @torch.jit.unused
    @torch.no_grad()
    def set_scaling(self, input_mean: Tensor, input_std: Tensor, output_mean: Tensor, output_std: Tensor) -> None:
        """Scale inputs to mean 0 and deviation 1, and outputs back from there.

        Args:
            input_mean, input_std: (input_size), in the units of the input; a deviation of 0 leaves its column at 0.
            output_mean, output_std: (output_size), in the units of the output.
        """
        self.input_offset.copy_(input_mean)
        self.input_scale.copy_(torch.where(input_std > 0, 1 / input_std, torch.zeros_like(input_std)))
        self.output_offset.copy_(output_mean)
        self.output_scale.copy_(output_std)

    @torch.jit.unused
    def reference(self) -> "Forecaster":
        """A copy for inference that runs on torch's own operators alone, whose kernels are not ours."""
        twin = copy.deepcopy(self).eval()
        twin.use_ops = False  # type: ignore[misc]
        twin.lstm.use_ops = False  # type: ignore[misc]
        return twin

    def forward(self, x: Tensor) -> Tensor:
        """Forecast from whole windows: (N, T, input_size) -> (N, output_size), or (T, input_size) -> (output_size)."""
        y, _ = self.lstm((x - self.input_offset) * self.input_scale)
        return self._answer(y.select(-2, y.size(-2) - 1))

    @torch.jit.export
    def run(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Carry a stream over several steps: (N, T, input_size) and a state give (N, T, output_size) and a state."""
        y, state = self.lstm((x - self.input_offset) * self.input_scale, state)
        return self._answer(y), state

    @torch.jit.export
    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Carry a stream over one step: (N, input_size) and a state give (N, output_size) and a state."""
        y, state = self.run(x.unsqueeze(-2), state)
        return y.squeeze(-2), state

    @torch.jit.export
    def initial_state(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """The zero state (h, c) of ``batch_size`` streams, (num_layers, batch_size, hidden_size) each."""
        zeros = self.head.weight.new_zeros([self.num_layers, batch_size, self.hidden_size])
        return zeros, zeros.clone()

    def _answer(self, h: Tensor) -> Tensor:
        if self.use_ops and _has_kernel(h):
            y = torch.ops.cellstep.dense(h, self.head.weight, self.head.bias)
        else:
            y = nn.functional.linear(h, self.head.weight, self.head.bias)
        answer: Tensor = y * self.output_scale + self.output_offset
        return answer
