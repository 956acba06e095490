"""The LSTM stack."""

import math
import warnings
from typing import TYPE_CHECKING, ClassVar, Final, Optional

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import cellstep
from cellstep.formula import ACTIVATIONS, lstm_steps
from cellstep.nn.cell import check_flag, check_size
from cellstep.nn.dispatch import USE_OPS, autocasting, cast_to, has_kernel, on_device, transforms_active, widens
from cellstep.nn.packed import inference_only, packed_image

_LAYER_ACTIVATIONS = ACTIVATIONS[:-1]  # softmax is for heads
_SIGMOID, _TANH = 2, 3


def _backwards(flags: Tensor) -> Tensor:
    """Flags (T, N) in the order of a sweep backwards: they part a step from the one before it in time, which comes
    after it there."""
    return torch.cat([torch.zeros_like(flags[:1]), flags[:-1]])


class LSTM(nn.Module):
    """A stack of LSTM layers over whole sequences; a drop-in for :class:`torch.nn.LSTM`.

    ``lstm(input, (h_0, c_0)) -> (output, (h_n, c_n))`` with ``input`` (T, N, input_size), or (N, T, input_size) if
    ``batch_first``, or (T, input_size) without a batch, or a ``PackedSequence``. With D directions and R =
    ``proj_size`` or ``hidden_size``: ``output`` (T, N, D R), ``h`` (D num_layers, N, R), ``c`` (D num_layers, N,
    hidden_size); a missing state is zero or learned. Parameters are named as torch names them, rows in gate order i,
    f, g, o. :func:`cellstep.formula.lstm_steps` is the formula of a step.

    On cellstep's operators no bit of the output hangs on how a sequence is cut into calls or on which other rows
    are in the batch.

    Beyond torch's arguments, and in every artifact:

    Args:
        peephole: i and f see the c before the step, o the one after (``weight_peephole``, rows i, f, o).
        layer_norm: of W_ih x, W_hh h and c (``norm_ih``, ``norm_hh``, ``norm_c``, ``norm_c_bias``); the gates' shifts
            are the biases.
        coupled: f = 1 - i; parameters have rows i, g, o alone.
        residual: every layer after the first adds its input to its output.
        gate_activation, activation, output_activation: of i, f, o; of g; of c on its way to h, by default as of g.
            "sigmoid", "tanh", "relu", "elu", "linear", "hard_sigmoid" (0.2 x + 0.5 cut to 0..1: Keras 2, ONNX) or
            "hardsigmoid" (relu6(x + 3) / 6: torch, Keras 3).
        cell_clip: c is cut to ±cell_clip in every step.
        zoneout: share of units that keep their old value in a step, or a pair (of h, of c); its expectation in eval.
        learn_initial_state: ``initial_h``, ``initial_c`` are parameters, used where no state is given.
        return_cell_states: the answer is (output, (h_n, c_n), cells), cells (T, N, D hidden_size) of the last layer.

    in training alone:

    Args:
        recurrent_dropout, recurrent_dropout_on: dropout with one mask a sequence, on the "hidden" values that come
            back (Gal and Ghahramani 2016) or on the "candidate" g (Semeniuta et al. 2016).
        weight_drop: dropout on ``weight_hh`` (DropConnect, Merity et al. 2018).
        forget_bias: initial value of the forget gate's bias (ValueError without ``bias``).
        memory_efficient: the forward pass keeps no gates, and the backward pass computes them again: with 128 units,
            16 rows and 1,000 steps a layer keeps 16 MB where it otherwise keeps 57 MB.

    On CUDA a stack of plain layers is one call, whatever the lengths and resets, and a call a layer where something
    stands between the layers. Nothing is read back from the device: there ``lengths`` that lie on it are cut to 0 to T,
    where others are refused beyond that.

    The backward pass of plain layers, with ``proj_size`` or without, in one direction or two, is a kernel; with an
    option that changes the formula it runs on torch's own operators, step by step.

    Raises:
        ValueError: the input has a wrong number of dimensions or another dtype than the parameters.
        RuntimeError: a size or device does not fit, or the sequence is empty.
    """

    __jit_unused_properties__: ClassVar = ["all_weights"]
    __jit_ignored_attributes__: ClassVar = ["_parameter_names", "_random"]

    input_size: Final[int]
    hidden_size: Final[int]
    num_layers: Final[int]
    bias: Final[bool]
    batch_first: Final[bool]
    dropout: Final[float]
    bidirectional: Final[bool]
    proj_size: Final[int]
    peephole: Final[bool]
    layer_norm: Final[bool]
    coupled: Final[bool]
    residual: Final[bool]
    cell_clip: Final[float]
    zoneout_h: Final[float]
    zoneout_c: Final[float]
    recurrent_dropout: Final[float]
    recurrent_dropout_on: Final[str]
    weight_drop: Final[float]
    learn_initial_state: Final[bool]
    return_cell_states: Final[bool]
    memory_efficient: Final[bool]
    use_ops: Final[bool]
    _activations: Final[list[int]]
    _plain: Final[bool]
    _names: list[str]
    _flat_weights: list[Tensor]
    _initial: list[Tensor]
    if TYPE_CHECKING:  # there if learned
        initial_h: Tensor
        initial_c: Tensor

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
        *,
        peephole: bool = False,
        layer_norm: bool = False,
        coupled: bool = False,
        residual: bool = False,
        gate_activation: str = "sigmoid",
        activation: str = "tanh",
        output_activation: str | None = None,
        cell_clip: float | None = None,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_on: str = "hidden",
        weight_drop: float = 0.0,
        forget_bias: float | None = None,
        learn_initial_state: bool = False,
        return_cell_states: bool = False,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        check_size("input_size", input_size)
        check_size("hidden_size", hidden_size)
        check_size("num_layers", num_layers)
        check_flag("bias", bias)
        check_flag("batch_first", batch_first)
        if proj_size < 0:
            raise ValueError("proj_size should be a positive integer or zero to disable projections")
        if proj_size >= hidden_size:
            raise ValueError("proj_size has to be smaller than hidden_size")
        zoneout_h, zoneout_c = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)
        for name, share in (
            ("dropout", dropout),
            ("zoneout", zoneout_h),
            ("zoneout", zoneout_c),
            ("recurrent_dropout", recurrent_dropout),
            ("weight_drop", weight_drop),
        ):
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise ValueError(f"{name} should be a number in range [0, 1], got {share}")
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects "
                f"num_layers greater than 1, but got dropout={dropout} and num_layers={num_layers}",
                stacklevel=2,
            )
        if forget_bias is not None and not bias:
            raise ValueError(f"forget_bias should be None without bias, got {forget_bias}")
        if recurrent_dropout_on not in ("hidden", "candidate"):
            raise ValueError(f'recurrent_dropout_on should be "hidden" or "candidate", got {recurrent_dropout_on!r}')
        if cell_clip is not None and not cell_clip >= 0:
            raise ValueError(f"cell_clip should be positive, or 0 or None for no clipping, got {cell_clip}")
        output_activation = activation if output_activation is None else output_activation
        for name in (gate_activation, activation, output_activation):
            if name not in _LAYER_ACTIVATIONS:
                raise ValueError(f"an activation should be one of {', '.join(_LAYER_ACTIVATIONS)}, got {name!r}")

        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bool(bidirectional)
        self.proj_size = proj_size
        self.peephole = peephole
        self.layer_norm = layer_norm
        self.coupled = coupled
        self.residual = residual
        self.gate_activation = gate_activation
        self.activation = activation
        self.output_activation = output_activation
        self.cell_clip = float(cell_clip or 0.0)
        self.zoneout_h = float(zoneout_h)
        self.zoneout_c = float(zoneout_c)
        self.recurrent_dropout = float(recurrent_dropout)
        self.recurrent_dropout_on = recurrent_dropout_on
        self.weight_drop = float(weight_drop)
        self.forget_bias = forget_bias
        self.learn_initial_state = learn_initial_state
        self.return_cell_states = return_cell_states
        self.memory_efficient = memory_efficient
        self.use_ops = USE_OPS
        codes = [_LAYER_ACTIVATIONS.index(name) for name in (gate_activation, activation, output_activation)]
        self._activations = codes
        self._plain = not (peephole or layer_norm or coupled or self.cell_clip) and codes == [_SIGMOID, _TANH, _TANH]

        layer_shapes = [self._shapes(layer) for layer in range(num_layers)]
        self._names = list(layer_shapes[0])
        for layer, shapes in enumerate(layer_shapes):
            for suffix in self._suffixes(layer):
                for name, shape in shapes.items():
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(name + suffix, parameter)
        if learn_initial_state:
            rows = len(self._suffixes(0)) * num_layers
            for name, size in (("initial_h", proj_size or hidden_size), ("initial_c", hidden_size)):
                self.register_parameter(name, nn.Parameter(torch.empty(rows, size, device=device, dtype=dtype)))
        self._flat_weights = []
        self._initial = []
        self._parameter_names = tuple(self._parameters)
        self._random = bool(dropout or zoneout_h or zoneout_c or recurrent_dropout or weight_drop)
        self.reset_parameters()

    @torch.jit.unused
    def _shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Parameters of a layer, in torch's order and then cellstep's own."""
        hidden, out = self.hidden_size, self.proj_size or self.hidden_size
        rows = (3 if self.coupled else 4) * hidden
        inputs = self.input_size if layer == 0 else out * (2 if self.bidirectional else 1)
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, inputs), "weight_hh": (rows, out)}
        if self.bias:
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        if self.proj_size:
            shapes["weight_hr"] = (self.proj_size, hidden)
        if self.peephole:
            shapes["weight_peephole"] = (rows - hidden,)
        if self.layer_norm:
            shapes |= {"norm_ih": (rows,), "norm_hh": (rows,), "norm_c": (hidden,), "norm_c_bias": (hidden,)}
        return shapes

    @torch.jit.unused
    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"] if self.bidirectional else [f"_l{layer}"]

    @torch.jit.unused
    def layer_parameters(self, layer: int, reverse: bool = False) -> dict[str, Tensor]:
        """The parameters of one layer in one direction, by name without suffix."""
        suffix = self._suffixes(layer)[int(reverse)]
        return {name: getattr(self, name + suffix) for name in self._names}

    def __prepare_scriptable__(self) -> "LSTM":
        # TorchScript cannot look a parameter up by a computed name, so scripted code reads these lists.
        # torch.jit.script calls this hook first; the lists hold the parameters themselves, so that moves and updates
        # show in both.
        self._flat_weights = self._named_weights()
        self._initial = self._named_initial()
        return self

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters of each layer and direction, as torch.nn.LSTM lists them."""
        weights, count = self._named_weights(), len(self._names)
        return [weights[at : at + count] for at in range(0, len(weights), count)]

    @torch.jit.unused
    def _named_weights(self) -> list[Tensor]:
        return [
            getattr(self, name + suffix)
            for layer in range(self.num_layers)
            for suffix in self._suffixes(layer)
            for name in self._names
        ]

    @torch.jit.unused
    def _named_initial(self) -> list[Tensor]:
        return [self.initial_h, self.initial_c] if self.learn_initial_state else []

    @torch.jit.unused
    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every parameter uniformly from ±1/sqrt(hidden_size), as torch does.

        Gains of layer normalisation start at 1, its shift of c and learned initial states at 0, the forget gate's bias
        at ``forget_bias`` if that is given.
        """
        bound = 1.0 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters():
            if name.startswith("norm_c_bias") or name.startswith("initial_"):
                nn.init.zeros_(parameter)
            elif name.startswith("norm_"):
                nn.init.ones_(parameter)
            else:
                nn.init.uniform_(parameter, -bound, bound)
        if self.forget_bias is not None:
            # Coupled gates have i = 1 - f, and 1 - sigmoid(b) = sigmoid(-b).
            first, value = (0, -self.forget_bias) if self.coupled else (self.hidden_size, self.forget_bias)
            for name, parameter in self.named_parameters():
                if name.startswith("bias_"):
                    parameter[first : first + self.hidden_size] = value if name.startswith("bias_ih") else 0.0

    @torch.jit.unused
    def flatten_parameters(self) -> None:
        """Does nothing: the weights need no flat buffer. Kept so that callers of torch.nn.LSTM need no change."""

    @torch.jit.unused
    def configuration(self) -> dict[str, object]:
        """The arguments that make this module again, those at their defaults left out."""
        defaults = {
            "proj_size": 0,
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
            "peephole": False,
            "layer_norm": False,
            "coupled": False,
            "residual": False,
            "gate_activation": "sigmoid",
            "activation": "tanh",
            "output_activation": self.activation,
            "cell_clip": 0.0,
            "recurrent_dropout": 0.0,
            "recurrent_dropout_on": "hidden",
            "weight_drop": 0.0,
            "forget_bias": None,
            "learn_initial_state": False,
            "return_cell_states": False,
            "memory_efficient": False,
        }
        given = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        if self.zoneout_h or self.zoneout_c:
            given["zoneout"] = (self.zoneout_h, self.zoneout_c)
        return {"input_size": self.input_size, "hidden_size": self.hidden_size, **given}

    @torch.jit.unused
    def extra_repr(self) -> str:
        options = self.configuration()
        sizes = f"{options.pop('input_size')}, {options.pop('hidden_size')}"
        return ", ".join([sizes, *(f"{name}={value}" for name, value in options.items())])

    def initial_state(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """The state (h, c) where none is given: zero, or the learned one."""
        if self.learn_initial_state:
            h, c = self._initial_pair()
            return h.unsqueeze(1).expand(-1, batch_size, -1), c.unsqueeze(1).expand(-1, batch_size, -1)
        return self._zero_state(self._weights()[0], batch_size)

    def _zero_state(self, like: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        rows = self.num_layers * (2 if self.bidirectional else 1)
        h = like.new_zeros([rows, batch_size, self.proj_size if self.proj_size > 0 else self.hidden_size])
        return h, like.new_zeros([rows, batch_size, self.hidden_size])

    def _first_state(self, x: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """What a call without a state starts from: learned, or zero in the dtype of its input."""
        if self.learn_initial_state:
            return self.initial_state(batch_size)
        return self._zero_state(x, batch_size)

    def _initial_pair(self) -> tuple[Tensor, Tensor]:
        if torch.jit.is_scripting():
            return self._initial[0], self._initial[1]
        h, c = self._named_initial()
        return h, c

    def _weights(self) -> list[Tensor]:
        if torch.jit.is_scripting():
            return self._flat_weights
        return self._named_weights()

    def _check(
        self, x: Tensor, h: Tensor, c: Tensor, weight: Tensor, lengths: Optional[Tensor], reset: Optional[Tensor]
    ) -> None:
        """``x`` is (T, N, input_size)."""
        if not torch.jit.is_scripting():  # TorchScript cannot ask about autocast; there the operators compare
            if x.dtype != weight.dtype and not autocasting(x):
                raise ValueError(
                    f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                    f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
                )
        if x.device != weight.device or x.device != h.device or x.device != c.device:
            raise RuntimeError(
                f"Expected input, state and parameters on one device, got {x.device}, {h.device}, {c.device} and "
                f"{weight.device}"
            )
        if x.size(2) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.size(2)}"
            )
        if x.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        rows = self.num_layers * (2 if self.bidirectional else 1)
        shape = torch.Size([rows, x.size(1), self.proj_size if self.proj_size > 0 else self.hidden_size])
        if h.shape != shape:
            raise RuntimeError(f"Expected hidden[0] size {shape}, got {h.shape}")
        shape = torch.Size([rows, x.size(1), self.hidden_size])
        if c.shape != shape:
            raise RuntimeError(f"Expected hidden[1] size {shape}, got {c.shape}")
        if lengths is not None:
            if lengths.dim() != 1 or lengths.size(0) != x.size(1):
                raise ValueError(f"LSTM: Expected lengths of shape ({x.size(1)},), got {lengths.shape}")
            known = not lengths.is_cuda  # whoever reads a value there waits for the device
            if not torch.jit.is_scripting():
                known = known and not (torch.compiler.is_compiling() or transforms_active() or lengths.is_meta)
            if known and lengths.numel() > 0:
                least, most = int(lengths.min()), int(lengths.max())
                if least < 0 or most > x.size(0):
                    raise ValueError(
                        f"LSTM: Expected lengths from 0 to the {x.size(0)} steps of the input, got {least} to {most}"
                    )
        if reset is not None and (reset.dim() != 2 or reset.size(0) != x.size(0) or reset.size(1) != x.size(1)):
            raise ValueError(f"LSTM: Expected reset of one flag a step and row, got {reset.shape}")

    # TorchScript needs no return annotation here, and there is none that names the three kinds of answers.
    def forward(  # type: ignore[no-untyped-def]
        self,
        input: Tensor,
        hx: Optional[tuple[Tensor, Tensor]] = None,
        lengths: Optional[Tensor] = None,
        reset: Optional[Tensor] = None,
    ):
        """Run over whole sequences.

        Args:
            input, hx: see the class.
            lengths: (N) integers, the steps of each row, 0 allowed: what lies past them is not read, the output there
                is zero, and the state is the one behind the row's own last step.
            reset: (T, N) bool, or (N, T) if ``batch_first``: rows in which a new sequence begins with the step, from
                the initial state. The direction that runs backwards is parted at the same places.
        """
        if not torch.jit.is_scripting():
            if isinstance(input, PackedSequence):
                return self._forward_packed(input, hx, reset)
            if lengths is None and reset is None:
                answer = self._forward_image(input, hx)
                if answer is not None:
                    return answer
            if lengths is not None and not isinstance(lengths, Tensor):
                lengths = torch.as_tensor(lengths, dtype=None if len(lengths) else torch.int64)
        if lengths is not None:
            if lengths.is_floating_point() or lengths.dtype == torch.bool:
                raise ValueError(f"LSTM: Expected lengths as integers, got {lengths.dtype}; convert them with .long()")
        if reset is not None:
            reset = reset.to(input.device, torch.bool)
        if input.dim() != 2 and input.dim() != 3:
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        if not batched:
            x = input.unsqueeze(1)
            if lengths is not None:
                raise ValueError("LSTM: Expected a batched input with lengths, got a 2D one; cut the sequence instead")
            if reset is not None:
                reset = reset.unsqueeze(1)
        elif self.batch_first:
            x = input.transpose(0, 1)
            if reset is not None:
                reset = reset.transpose(0, 1)
        else:
            x = input
        # Asked for once: a parametrisation computes a weight whenever it is looked at.
        weights = self._weights()
        if hx is None:
            h, c = self._first_state(x, x.size(1))
        else:
            h, c = hx
            if h.dim() != input.dim() or c.dim() != input.dim():
                raise RuntimeError(
                    f"For {input.dim()}-D input, hx and cx should be {input.dim()}-D too, "
                    f"got ({h.dim()}-D, {c.dim()}-D) tensors"
                )
            if not batched:
                h, c = h.unsqueeze(1), c.unsqueeze(1)
        self._check(x, h, c, weights[0], lengths, reset)
        if lengths is not None:
            lengths = lengths.to(x.device, torch.int64)

        output, h, c, cells = self._stack(x, h, c, weights, lengths, reset)
        if not batched:
            output, h, c, cells = output.squeeze(1), h.squeeze(1), c.squeeze(1), cells.squeeze(1)
        elif self.batch_first:
            output, cells = output.transpose(0, 1), cells.transpose(0, 1)
        if self.return_cell_states:
            return output, (h, c), cells
        else:
            return output, (h, c)

    @torch.jit.unused
    def _forward_image(self, x: Tensor, hx: Optional[tuple[Tensor, Tensor]]):  # type: ignore[no-untyped-def]
        """The answer on packed weights, or None where the call is anything but the plain case."""
        if not self.use_ops or not inference_only(x) or self.return_cell_states or (self.training and self._random):
            return None
        if x.dim() != 3 or x.size(2) != self.input_size or x.size(1 if self.batch_first else 0) == 0:
            return None
        # Parametrised or pruned weights are not the module's parameters.
        if tuple(self._parameters) != self._parameter_names:
            return None
        weights = self._parameters.values()
        batch = x.size(0 if self.batch_first else 1)
        rows = self.num_layers * (2 if self.bidirectional else 1)
        shapes = ((rows, batch, self.proj_size or self.hidden_size), (rows, batch, self.hidden_size))
        if hx is not None and tuple(part.shape for part in hx) != shapes:
            return None
        h, c = (None, None) if hx is None else hx
        if h is not None and c is not None and not (h.dtype == c.dtype == x.dtype and h.is_cpu and c.is_cpu):
            return None
        image = packed_image(self, x.dtype, weights, self._pack)
        if image is None:
            return None
        y, h, c = torch.ops.cellstep.lstm_stack.default(image, x, h, c, self.batch_first)
        return y, (h, c)

    @torch.jit.unused
    def _pack(self) -> bytes:
        from cellstep.exporters.deploy import lstm_image

        return lstm_image(self)

    @torch.jit.unused
    def _forward_packed(self, packed: PackedSequence, hx: Optional[tuple[Tensor, Tensor]], reset: Optional[Tensor]):  # type: ignore[no-untyped-def]
        if reset is not None:
            raise ValueError("LSTM: Expected no reset with a PackedSequence; pass a padded input and lengths")
        if packed.data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {packed.data.dim()}")
        data = packed.data
        kernels = self.use_ops and (has_kernel(data) or widens(data) or cast_to(data) is not None)
        if self._packs(None) if kernels else self._torch_can(packed.data, False):
            return self._run_packed(packed, hx, kernels)
        if self.batch_first:
            padded, lengths = pad_packed_sequence(packed, batch_first=True)
        else:
            padded, lengths = pad_packed_sequence(packed)
        answer = self.forward(padded, hx, lengths)

        def pack(values: Tensor) -> PackedSequence:
            batch = 0 if self.batch_first else 1
            if packed.sorted_indices is not None:
                values = values.index_select(batch, packed.sorted_indices)
            data = pack_padded_sequence(values, sorted_lengths, batch_first=self.batch_first).data
            return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)

        sorted_lengths = lengths
        if packed.sorted_indices is not None:
            sorted_lengths = lengths[packed.sorted_indices.to(lengths.device)]
        if self.return_cell_states:
            return pack(answer[0]), answer[1], pack(answer[2])
        return pack(answer[0]), answer[1]

    @torch.jit.unused
    def _run_packed(self, packed: PackedSequence, hx: Optional[tuple[Tensor, Tensor]], kernels: bool):  # type: ignore[no-untyped-def]
        """Without padding: on cellstep's operators, or on torch.lstm, which runs on more devices."""
        data, batch_sizes, there, back = packed
        rows = int(batch_sizes[0])
        h, c = self._first_state(data, rows) if hx is None else hx
        weights = self._weights()
        self._check(data[:rows].unsqueeze(0), h, c, weights[0], None, None)
        if there is not None:
            h, c = h.index_select(1, there), c.index_select(1, there)
        if kernels:
            output, h, c, cells = self._stack(data, h, c, weights, None, None, batch_sizes)
        else:
            output, h, c = torch.lstm(
                data,
                batch_sizes,
                [h, c],
                weights,
                self.bias,
                self.num_layers,
                self.dropout,
                self.training,
                self.bidirectional,
            )
        if back is not None:
            h, c = h.index_select(1, back), c.index_select(1, back)
        answer = PackedSequence(output, batch_sizes, there, back)
        if self.return_cell_states:
            return answer, (h, c), PackedSequence(cells, batch_sizes, there, back)
        return answer, (h, c)

    @torch.jit.unused
    def _packs(self, reset: Optional[Tensor]) -> bool:
        """Whether a call on cellstep's operators may run on packed rows: plain layers, with nothing drawn for every
        step, and outside of graphs, which want sizes that do not hang on lengths."""
        if reset is not None or not self._plain or self.zoneout_h > 0.0 or self.zoneout_c > 0.0:
            return False
        if self.training and self.recurrent_dropout > 0.0:
            return False
        return not (torch.compiler.is_compiling() or torch.jit.is_tracing())

    @torch.jit.unused
    def _stack_of_rows(
        self, x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], lengths: Optional[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What :meth:`_stack` answers, on packed rows: past the end of a row nothing is read or computed."""
        steps, rows = x.size(0), x.size(1)
        if lengths is None:
            output, h, c, cells = self._stack(x.flatten(0, 1), h, c, weights, None, None)
            shape = (steps, rows)
            return output.unflatten(0, shape), h, c, cells.unflatten(0, shape) if self.return_cell_states else cells
        there = lengths.argsort(descending=True, stable=True)
        back = torch.empty_like(there).scatter_(0, there, torch.arange(rows))
        moments = torch.arange(steps).unsqueeze(1)
        present = moments < lengths[there]
        places = (moments * rows + there)[present]
        data = x.flatten(0, 1)
        data = data[places] if data.requires_grad else data.index_select(0, places)
        batch_sizes = present.sum(1)
        output, h, c, cells = self._stack(data, h[:, there], c[:, there], weights, None, None, batch_sizes)

        def padded(values: Tensor) -> Tensor:
            flat = values.new_zeros(steps * rows, values.size(1))
            return flat.index_copy(0, places, values).view(steps, rows, values.size(1))

        return padded(output), h[:, back], c[:, back], padded(cells) if self.return_cell_states else cells

    def _stack(
        self,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        weights: list[Tensor],
        lengths: Optional[Tensor],
        reset: Optional[Tensor],
        batch_sizes: Optional[Tensor] = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All layers: x (T, N, input_size) -> output, h_n, c_n, cells (empty unless asked for). In eager mode also x
        (P, input_size), packed as ``batch_sizes`` tells."""
        kernels = False
        if self.use_ops:  # constant: a TorchScript file without operators names none
            kernels = has_kernel(x)
        if torch.jit.is_scripting():
            if x.is_cuda and x.dtype != weights[0].dtype:  # autocast, which torch.lstm knows
                kernels = False
        else:
            if not kernels and self.use_ops:
                dtype = cast_to(x)
                if dtype is not None:
                    cast = [weight.to(dtype) for weight in weights]
                    with torch.autocast(x.device.type, enabled=False):
                        return self._stack(x.to(dtype), h.to(dtype), c.to(dtype), cast, lengths, reset, batch_sizes)
            if not kernels and self.use_ops and widens(x) and h.dtype == x.dtype and c.dtype == x.dtype:
                wide = [weight.float() for weight in weights]
                answers = self._stack(x.float(), h.float(), c.float(), wide, lengths, reset, batch_sizes)
                output, h, c, cells = [answer.to(x.dtype) for answer in answers]
                return output, h, c, cells
            # Plain layers over whole rows forwards are lstm_layer's, which takes x as it lies.
            beyond = lengths is not None or self.proj_size > 0 or self.bidirectional
            known = lengths is None or lengths.is_cpu
            if kernels and beyond and known and x.dim() == 3 and self._packs(reset) and not self._whole(x, reset):
                return self._stack_of_rows(x, h, c, weights, lengths)
        if self.use_ops:
            if kernels and self._whole(x, reset):
                return self._whole_stack(x, h, c, weights, lengths, reset, batch_sizes)
        if not kernels:
            if self._torch_can(x, lengths is not None or reset is not None):
                output, h, c = torch.lstm(
                    x,
                    [h, c],
                    weights,
                    self.bias,
                    self.num_layers,
                    self.dropout,
                    self.training,
                    self.bidirectional,
                    False,
                )
                return output, h, c, x.new_empty([0, 0, 0])
            if not torch.jit.is_scripting():
                if autocasting(x):
                    dtype = torch.get_autocast_dtype(x.device.type)
                    x, h, c = x.to(dtype), h.to(dtype), c.to(dtype)
                    weights = [weight.to(dtype) for weight in weights]

        if lengths is not None:
            # What lies past the end of a row may be anything. A NaN there would meet the gradient, zero or not.
            if x.is_cuda:
                lengths = lengths.clamp(0, x.size(0))
            past = torch.arange(x.size(0), device=x.device).unsqueeze(1) >= lengths.unsqueeze(0)
            x = x.masked_fill(past.unsqueeze(2), 0.0)
        initial_h: Optional[Tensor] = None
        initial_c: Optional[Tensor] = None
        if self.learn_initial_state and reset is not None:
            initial_h, initial_c = self._initial_pair()
            initial_h, initial_c = initial_h.to(x.dtype), initial_c.to(x.dtype)
        last_h: list[Tensor] = []
        last_c: list[Tensor] = []
        cells = x.new_empty([0] * x.dim())
        directions = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            outputs: list[Tensor] = []
            all_cells: list[Tensor] = []
            for direction in range(directions):
                place = layer * directions + direction
                at = place * len(self._names)
                p: dict[str, Tensor] = {}
                for k in range(len(self._names)):
                    p[self._names[k]] = weights[at + k]
                want_cells = self.return_cell_states and layer + 1 == self.num_layers
                y, h_n, c_n, direction_cells = self._direction(
                    kernels,
                    direction == 1,
                    x,
                    h[place],
                    c[place],
                    p,
                    lengths,
                    reset,
                    initial_h[place] if initial_h is not None else None,
                    initial_c[place] if initial_c is not None else None,
                    want_cells,
                    batch_sizes,
                )
                outputs.append(y)
                all_cells.append(direction_cells)
                last_h.append(h_n)
                last_c.append(c_n)
            y = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            if self.return_cell_states and layer + 1 == self.num_layers:
                cells = torch.cat(all_cells, -1) if self.bidirectional else all_cells[0]
            if self.residual and layer > 0:
                y = y + x
            if self.dropout > 0.0 and layer + 1 < self.num_layers:
                y = nn.functional.dropout(y, self.dropout, self.training)
            x = y
        return x, torch.stack(last_h), torch.stack(last_c), cells

    def _whole(self, x: Tensor, reset: Optional[Tensor]) -> bool:
        """Whether lstm_layers takes the stack, or each of its layers."""
        if not on_device(x) or not self._plain or self.proj_size > 0 or self.zoneout_h > 0.0 or self.zoneout_c > 0.0:
            return False
        if self.training and self.recurrent_dropout > 0.0:
            return False
        if self.return_cell_states and self.memory_efficient:  # it answers the cells together with the gates
            return False
        if self.learn_initial_state and reset is not None:  # of what resets put it has no gradient
            return not torch.is_grad_enabled()
        return True

    def _whole_stack(
        self,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        weights: list[Tensor],
        lengths: Optional[Tensor],
        reset: Optional[Tensor],
        batch_sizes: Optional[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """:meth:`_stack` in one call, or in one call a layer where something stands between the layers."""
        if self.weight_drop > 0.0:
            dropped: list[Tensor] = []
            for place in range(len(weights)):
                weight = weights[place]
                if place % len(self._names) == 1:  # weight_hh
                    weight = nn.functional.dropout(weight, self.weight_drop, self.training)
                dropped.append(weight)
            weights = dropped
        initial_h: Optional[Tensor] = None
        initial_c: Optional[Tensor] = None
        if self.learn_initial_state and reset is not None:
            initial_h, initial_c = self._initial_pair()
            initial_h, initial_c = initial_h.to(x.dtype), initial_c.to(x.dtype)
        keep = torch.is_grad_enabled() and not self.memory_efficient
        apart = self.return_cell_states or (self.num_layers > 1 and self.residual)
        if not apart and not (self.training and self.dropout > 0.0):
            y, h, c, _ = self._layers_call(x, batch_sizes, lengths, reset, h, c, initial_h, initial_c, weights, keep)
            return y, h, c, x.new_empty([0] * x.dim())
        rows = 2 if self.bidirectional else 1
        count = len(weights) // self.num_layers
        last_h: list[Tensor] = []
        last_c: list[Tensor] = []
        cells = x.new_empty([0] * x.dim())
        for layer in range(self.num_layers):
            last = layer + 1 == self.num_layers
            want_cells = self.return_cell_states and last
            at = layer * rows
            y, h_n, c_n, each = self._layers_call(
                x,
                batch_sizes,
                lengths,
                reset,
                h.narrow(0, at, rows),
                c.narrow(0, at, rows),
                initial_h.narrow(0, at, rows) if initial_h is not None else None,
                initial_c.narrow(0, at, rows) if initial_c is not None else None,
                weights[layer * count : (layer + 1) * count],
                keep or want_cells,
            )
            last_h.append(h_n)
            last_c.append(c_n)
            if want_cells:
                each = torch.cat([each[0], each[1]], -1) if self.bidirectional else each[0]
                cells = each.view(y.shape)
                if lengths is not None:
                    past = torch.arange(x.size(0), device=x.device).unsqueeze(1) >= lengths.unsqueeze(0)
                    cells = cells.masked_fill(past.unsqueeze(2), 0.0)
            if self.residual and layer > 0:
                y = y + x
            if self.dropout > 0.0 and not last:
                y = nn.functional.dropout(y, self.dropout, self.training)
            x = y
        return x, torch.cat(last_h), torch.cat(last_c), cells

    def _layers_call(
        self,
        x: Tensor,
        batch_sizes: Optional[Tensor],
        lengths: Optional[Tensor],
        reset: Optional[Tensor],
        h: Tensor,
        c: Tensor,
        initial_h: Optional[Tensor],
        initial_c: Optional[Tensor],
        weights: list[Tensor],
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """lstm_layers: y, h_n, c_n and the cells (stages, P, H) if saved."""
        if not torch.jit.is_scripting():
            if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
                return self._eager_layers(
                    x,
                    batch_sizes,
                    lengths,
                    reset,
                    h,
                    c,
                    initial_h,
                    initial_c,
                    weights,
                    self.bias,
                    self.bidirectional,
                    save,
                )
        y, h, c, _, _, cells = torch.ops.cellstep.lstm_layers(
            x, batch_sizes, lengths, reset, h, c, initial_h, initial_c, weights, self.bias, self.bidirectional, save
        )
        return y, h, c, cells

    @torch.jit.unused
    def _eager_layers(self, *arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, h, c, _, _, cells = cellstep.ops.lstm_layers(*arguments)
        return y, h, c, cells

    def _torch_can(self, x: Tensor, ragged: bool) -> bool:
        """Whether torch.lstm, which has kernels of its own for more devices, computes the same."""
        if ragged or not self._plain or self.return_cell_states or (self.residual and self.num_layers > 1):
            return False
        if self.zoneout_h > 0.0 or self.zoneout_c > 0.0:
            return False
        if self.training and (self.recurrent_dropout > 0.0 or self.weight_drop > 0.0):
            return False
        if torch.jit.is_scripting():
            return True
        return not transforms_active()

    def _direction(
        self,
        kernels: bool,
        reverse: bool,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        p: dict[str, Tensor],
        lengths: Optional[Tensor],
        reset: Optional[Tensor],
        initial_h: Optional[Tensor],
        initial_c: Optional[Tensor],
        want_cells: bool,
        batch_sizes: Optional[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One layer in one direction, rows of any lengths: x (T, N, I) -> y, h_n, c_n, cells."""
        if not torch.jit.is_scripting():
            if x.dim() == 2:
                return self._packed_layer(reverse, x, batch_sizes, h, c, p, want_cells)
        if lengths is None:
            if not reverse:
                return self._layer(kernels, x, h, c, p, reset, initial_h, initial_c, want_cells)
            y, h_n, c_n, cells = self._layer(
                kernels,
                x.flip(0),
                h,
                c,
                p,
                _backwards(reset.flip(0)) if reset is not None else None,
                initial_h,
                initial_c,
                want_cells,
            )
            return y.flip(0), h_n, c_n, cells.flip(0) if want_cells else cells

        steps = torch.arange(x.size(0), device=x.device).unsqueeze(1)
        ends = lengths.unsqueeze(0)
        past = steps >= ends
        order = torch.where(past, steps, ends - 1 - steps)
        if reverse:
            x = x.gather(0, order.unsqueeze(2).expand(-1, -1, x.size(2)))
            if reset is not None:
                reset = _backwards(reset.gather(0, order))
        if not self._plain:  # other activations could let the state grow past the end of a row until it overflows
            reset = past if reset is None else reset.logical_or(past)
        y, _, _, cells = self._layer(kernels, x, h, c, p, reset, initial_h, initial_c, True)
        last = (ends - 1).clamp(min=0).unsqueeze(2)
        started = (lengths > 0).unsqueeze(1)
        h_n = torch.where(started, y.gather(0, last.expand(-1, -1, y.size(2))).squeeze(0), h)
        c_n = torch.where(started, cells.gather(0, last.expand(-1, -1, cells.size(2))).squeeze(0), c)
        if reverse:
            y = y.gather(0, order.unsqueeze(2).expand(-1, -1, y.size(2)))
            cells = cells.gather(0, order.unsqueeze(2).expand(-1, -1, cells.size(2)))
        past = past.unsqueeze(2)
        return y.masked_fill(past, 0.0), h_n, c_n, cells.masked_fill(past, 0.0)

    @torch.jit.unused
    def _eager_layer(self, *arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, h, c, _, cells = cellstep.ops.lstm_layer(*arguments)
        return y, h, c, cells

    @torch.jit.unused
    def _packed_layer(
        self,
        reverse: bool,
        x: Tensor,
        batch_sizes: Optional[Tensor],
        h: Tensor,
        c: Tensor,
        p: dict[str, Tensor],
        want_cells: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One layer in one direction: x (P, I) -> y (P, R), h_n, c_n, cells (P, H)."""
        weight_hh = p["weight_hh"]
        if self.weight_drop > 0.0:
            weight_hh = nn.functional.dropout(weight_hh, self.weight_drop, self.training)
        biases = p.get("bias_ih"), p.get("bias_hh")
        keep = torch.is_grad_enabled() and not self.memory_efficient
        weights = p["weight_ih"], weight_hh, *biases, p.get("weight_hr")
        y, h, c, _, cells = cellstep.ops.lstm_packed(x, batch_sizes, h, c, *weights, reverse, keep, keep or want_cells)
        return y, h, c, cells

    def _layer(
        self,
        kernels: bool,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        p: dict[str, Tensor],
        reset: Optional[Tensor],
        initial_h: Optional[Tensor],
        initial_c: Optional[Tensor],
        want_cells: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One layer in one direction, all rows of one length: x (T, N, I) -> y, h_n, c_n, cells."""
        weight_hh = p["weight_hh"]
        if self.weight_drop > 0.0:
            weight_hh = nn.functional.dropout(weight_hh, self.weight_drop, self.training)
        mask_h: Optional[Tensor] = None
        mask_g: Optional[Tensor] = None
        keep_h: Optional[Tensor] = None
        keep_c: Optional[Tensor] = None
        if self.training:
            if self.recurrent_dropout > 0.0:
                if self.recurrent_dropout_on == "hidden":
                    mask_h = nn.functional.dropout(torch.ones_like(h), self.recurrent_dropout)
                else:
                    mask_g = nn.functional.dropout(torch.ones_like(c), self.recurrent_dropout)
            if self.zoneout_h > 0.0:
                keep_h = x.new_empty([x.size(0), x.size(1), h.size(1)]).bernoulli_(self.zoneout_h)
            if self.zoneout_c > 0.0:
                keep_c = x.new_empty([x.size(0), x.size(1), c.size(1)]).bernoulli_(self.zoneout_c)
        bias_ih, bias_hh = p.get("bias_ih"), p.get("bias_hh")
        gate_activation, activation, output_activation = self._activations
        if self.use_ops:
            zoned = self.zoneout_h > 0.0 or self.zoneout_c > 0.0
            masked = mask_h is not None or mask_g is not None
            plain = self._plain and self.proj_size == 0 and reset is None and not zoned and not masked
            # lstm_layer answers the cells together with the gates, which memory_efficient is not to keep.
            if kernels and plain and not (want_cells and self.memory_efficient):
                save = (torch.is_grad_enabled() and not self.memory_efficient) or want_cells
                if not torch.jit.is_scripting():
                    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
                        return self._eager_layer(x, h, c, p["weight_ih"], weight_hh, bias_ih, bias_hh, save)
                y, h, c, _, cells = torch.ops.cellstep.lstm_layer(
                    x, h, c, p["weight_ih"], weight_hh, bias_ih, bias_hh, save
                )
                return y, h, c, cells
            if kernels:
                y, h, c, cells = torch.ops.cellstep.lstm_variant(
                    x,
                    h,
                    c,
                    p["weight_ih"],
                    weight_hh,
                    bias_ih,
                    bias_hh,
                    p.get("weight_hr"),
                    p.get("weight_peephole"),
                    p.get("norm_ih"),
                    p.get("norm_hh"),
                    p.get("norm_c"),
                    p.get("norm_c_bias"),
                    reset,
                    initial_h,
                    initial_c,
                    mask_h,
                    mask_g,
                    keep_h,
                    keep_c,
                    self.coupled,
                    self.cell_clip,
                    self.zoneout_h,
                    self.zoneout_c,
                    gate_activation,
                    activation,
                    output_activation,
                    want_cells,
                )
                return y, h, c, cells
        return lstm_steps(
            x,
            h,
            c,
            p["weight_ih"],
            weight_hh,
            bias_ih,
            bias_hh,
            p.get("weight_hr"),
            p.get("weight_peephole"),
            p.get("norm_ih"),
            p.get("norm_hh"),
            p.get("norm_c"),
            p.get("norm_c_bias"),
            reset,
            initial_h,
            initial_c,
            mask_h,
            mask_g,
            keep_h,
            keep_c,
            self.coupled,
            self.cell_clip,
            self.zoneout_h,
            self.zoneout_c,
            gate_activation,
            activation,
            output_activation,
        )
