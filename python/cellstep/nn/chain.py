"""Whole models: scaling, layers, heads, in the user's own units."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Optional

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from cellstep.formula import ACTIVATIONS, activate
from cellstep.nn.dispatch import USE_OPS, has_kernel
from cellstep.nn.lstm import LSTM
from cellstep.nn.packed import inference_only, packed_image

#: What the heads of a chain see.
ANSWERS = ["every", "last", "hidden"]


class Dense(nn.Linear):
    """A linear layer and an activation: (..., in_features) -> (..., out_features).

    Args:
        activation: "linear", "relu", "sigmoid", "tanh", "elu", "softmax" (over the outputs), "hard_sigmoid",
            "hardsigmoid".
    """

    __jit_ignored_attributes__: ClassVar = ["_parameter_names"]

    use_ops: Final[bool]
    _activation: Final[int]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str = "linear",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if activation not in ACTIVATIONS:
            raise ValueError(f"expected an activation of {', '.join(ACTIVATIONS)}; got {activation!r}; choose one")
        self.activation = activation
        self._activation = ACTIVATIONS.index(activation)
        self._parameter_names = tuple(self._parameters)
        self.use_ops = USE_OPS

    @torch.jit.unused
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"

    def forward(self, input: Tensor) -> Tensor:
        if self.use_ops:  # constant: a TorchScript file without operators names none
            if has_kernel(input):
                y: Tensor = torch.ops.cellstep.dense(input, self.weight, self.bias)
                if self._activation > 0:
                    y = torch.ops.cellstep.activate(y, self._activation)
                return y
        return activate(nn.functional.linear(input, self.weight, self.bias), self._activation)


class _Scaling:
    """Offsets and scales of some columns, given as tensors, or as a count and filled later by set_scaling."""

    def __init__(self, size: "int | Tensor | Sequence[float]", scale: "Tensor | Sequence[float] | None" = None) -> None:
        if isinstance(size, int):
            self.offset, self.scale = torch.zeros(size), torch.ones(size)
        else:
            self.offset = torch.as_tensor(size)
            self.scale = torch.ones_like(self.offset) if scale is None else torch.as_tensor(scale)
        if self.offset.dim() != 1 or self.offset.shape != self.scale.shape:
            raise ValueError(
                f"expected an offset and a scale a column; got shapes {tuple(self.offset.shape)} and "
                f"{tuple(self.scale.shape)}; give two vectors of one length"
            )

    def __len__(self) -> int:
        return self.offset.numel()


class Scale(_Scaling):
    """First stage of a chain: x -> (x - offset) * scale. ``Scale(size)`` or ``Scale(offset, scale)``."""


class Unscale(_Scaling):
    """Late stage of a chain: y -> y * scale + offset. ``Unscale(size)`` or ``Unscale(offset, scale)``."""


class Skip:
    """Last stage of a chain: adds columns of what the chain was given to what it answers, one for each output."""

    def __init__(self, columns: Sequence[int]) -> None:
        self.columns = [int(column) for column in columns]


class Chain(nn.Module):
    """A model in one line: ``Chain(Scale(2), LSTM(2, 8), LSTM(8, 16, peephole=True), Dense(16, 1, "tanh"))``.

    Stages in this order, all but the LSTMs optional: :class:`Scale`, any :class:`Dense`, any :class:`LSTM`, any
    :class:`Dense`, :class:`Unscale`, :class:`Skip`. The layers see ``(x - input_offset) * input_scale``; the answer is
    ``heads * output_scale + output_offset``, plus the skipped columns of x as it came. :meth:`set_scaling` fills the
    four buffers from means and standard deviations. A chain is batch first, whatever its LSTMs are.

    An LSTM with ``return_cell_states`` hands its outputs and its cell states on, side by side.

    The state is (h, c). Where all LSTM layers have the same sizes it is shaped as torch shapes it, (layers and
    directions, N, size); otherwise the values of all layers lie side by side, (1, N, sum of the sizes).

    ``feature_names``, ``output_names``, ``window`` and ``horizon`` say what the columns are and what the model was
    trained for; they travel with every artifact and change no number.

    Args:
        answers: what the heads see and :meth:`forward` answers from: "last", the output of the last step; "hidden",
            the last hidden state, forward and backward side by side; "every", the output of every step.

    Raises:
        ValueError: stages are out of order or their sizes do not fit.
    """

    input_size: Final[int]
    output_size: Final[int]
    state_layers: Final[int]
    h_size: Final[int]
    c_size: Final[int]
    answers: Final[str]
    skip_columns: Final[list[int]]
    feature_names: list[str]
    output_names: list[str]
    window: int
    horizon: int
    input_offset: Tensor
    input_scale: Tensor
    output_offset: Tensor
    output_scale: Tensor
    _uniform: Final[bool]
    if TYPE_CHECKING:  # TorchScript has no type for these
        encoder: Sequence[Dense]
        lstms: Sequence[LSTM]
        heads: Sequence[Dense]

    def __init__(self, *stages: "Scale | Dense | LSTM | Unscale | Skip", answers: str = "last") -> None:
        super().__init__()
        if answers not in ANSWERS:
            raise ValueError(f"expected answers of {', '.join(ANSWERS)}; got {answers!r}; choose one")
        rest = list(stages)

        def take(kind: type) -> list[Any]:
            taken = []
            while rest and isinstance(rest[0], kind):
                taken.append(rest.pop(0))
            return taken

        scale, encoder, lstms, heads = take(Scale), take(Dense), take(LSTM), take(Dense)
        unscale, skip = take(Unscale), take(Skip)
        if rest or not lstms or max(len(scale), len(unscale), len(skip)) > 1:
            kinds = ", ".join(type(stage).__name__ for stage in stages)
            raise ValueError(
                "expected Scale, Dense..., LSTM..., Dense..., Unscale, Skip, in this order and with at least one LSTM; "
                f"got {kinds or 'nothing'}; reorder the stages"
            )
        first = encoder[0].in_features if encoder else lstms[0].input_size
        width = first
        for stage in (*scale, *encoder, *lstms, *heads, *unscale):
            needed, gives = _widths(stage)
            if needed != width:
                raise ValueError(
                    f"expected stages that fit each other; got {width} values for {type(stage).__name__}, which takes "
                    f"{needed}; change one of the sizes"
                )
            width = gives
        self.input_size = first
        self.output_size = width
        self.answers = answers
        self.skip_columns = skip[0].columns if skip else []
        if skip and (len(self.skip_columns) != width or not all(0 <= k < first for k in self.skip_columns)):
            raise ValueError(
                f"expected Skip with {width} columns, one an output, of the {first} inputs; got {self.skip_columns}; "
                "name as many columns as there are outputs"
            )
        self.encoder = nn.ModuleList(encoder)  # type: ignore[assignment]
        self.lstms = nn.ModuleList(lstms)  # type: ignore[assignment]
        self.heads = nn.ModuleList(heads)  # type: ignore[assignment]

        sizes = [(lstm.proj_size or lstm.hidden_size, lstm.hidden_size) for lstm in lstms]
        counts = [lstm.num_layers * (2 if lstm.bidirectional else 1) for lstm in lstms]
        self._uniform = len(set(sizes)) == 1
        self.state_layers = sum(counts) if self._uniform else 1
        self.h_size, self.c_size = (
            sizes[0]
            if self._uniform
            else (sum(n * h for n, (h, _) in zip(counts, sizes)), sum(n * c for n, (_, c) in zip(counts, sizes)))  # noqa: B905
        )
        like = lstms[0].weight_ih_l0.detach()
        for side, given in (("input", scale or [_Scaling(first)]), ("output", unscale or [_Scaling(width)])):
            for kind in ("offset", "scale"):
                self.register_buffer(f"{side}_{kind}", getattr(given[0], kind).to(like.device, like.dtype, copy=True))
        self.feature_names = []
        self.output_names = []
        self.window = 0
        self.horizon = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.input_offset.dtype

    @property
    def bidirectional(self) -> bool:
        """Whether a layer runs backwards in time as well, so that a sequence cannot be cut into calls."""
        return any(lstm.bidirectional for lstm in self.lstms)

    __jit_unused_properties__ = ["bidirectional", "dtype", "head", "hidden_size", "lstm", "num_layers"]  # noqa: RUF012

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
    def reference(self) -> "Chain":
        """A copy for inference that runs on torch's own operators alone, whose kernels are not ours."""
        twin = copy.deepcopy(self).eval()
        for module in twin.modules():
            if isinstance(module, (LSTM, Dense)):
                module.use_ops = False  # type: ignore[misc]
        return twin

    def forward(self, x: Tensor, lengths: Optional[Tensor] = None) -> Tensor:
        """Answer whole windows: (N, T, input_size) -> (N, output_size), or (N, T, output_size) for every step.

        Without a batch, (T, input_size), the answer has none either. ``lengths`` (N): the steps of each row, 0 allowed;
        the answers of steps past them, and the one answer of a row without steps, are zero. A ``PackedSequence`` says
        the same, and is answered by one if the model answers every step.
        """
        if not torch.jit.is_scripting():
            if isinstance(x, PackedSequence):
                return self._forward_packed(x)
        windows = x if x.dim() == 3 else x.unsqueeze(0)
        if not torch.jit.is_scripting():
            answer = self._run_image(windows, None, lengths, None, self.answers)
            if answer is not None:
                return answer[0] if x.dim() == 3 else answer[0].squeeze(0)
        h, c = self.initial_state(windows.size(0))
        y, _ = self._answer_by_layers(windows, h, c, lengths, None, self.answers)
        return y if x.dim() == 3 else y.squeeze(0)

    @torch.jit.unused
    def _run_image(
        self,
        x: Tensor,
        state: Optional[tuple[Tensor, Tensor]],
        lengths: Optional[Tensor],
        reset: Optional[Tensor],
        answers: str,
    ) -> Optional[tuple[Tensor, tuple[Tensor, Tensor]]]:
        """The answer on packed weights, or None where the call is anything but the plain case."""
        if not inference_only(x) or x.dim() != 3 or x.size(2) != self.input_size or x.size(1) == 0:
            return None
        if lengths is not None or reset is not None:
            return None
        weights = [*self._buffers.values()]
        for stages in (self.encoder, self.lstms, self.heads):
            for stage in stages:
                plain = type(stage) in (LSTM, Dense) and stage.use_ops
                if not plain or stage._forward_hooks or stage._forward_pre_hooks:
                    return None
                # Parametrised or pruned weights are not the module's parameters.
                if tuple(stage._parameters) != stage._parameter_names:
                    return None
                if stage.training and isinstance(stage, LSTM) and stage._random:
                    return None
                weights += stage._parameters.values()
        h, c = (None, None) if state is None else state
        if h is not None and c is not None:
            shapes = tuple((self.state_layers, x.size(0), size) for size in (self.h_size, self.c_size))
            if (h.shape, c.shape) != shapes or not (h.dtype == c.dtype == x.dtype and h.is_cpu and c.is_cpu):
                return None
        image = packed_image(self, x.dtype, weights, self._pack)
        if image is None:
            return None
        code = ANSWERS.index(answers)
        # Below autograd, where the operator's refusal to be differentiated lies: here nothing asks for it.
        with torch._C._AutoDispatchBelowAutograd():
            y, h, c = torch.ops.cellstep.run_model.default(image, x, h, c, self.output_size, code, None, None)
        return y, (h, c)

    @torch.jit.unused
    def _pack(self) -> bytes:
        from cellstep.exporters.deploy import image

        return image(self, test_vector=False)

    @torch.jit.unused
    def _forward_packed(self, packed: PackedSequence):  # type: ignore[no-untyped-def]
        x, lengths = pad_packed_sequence(packed, batch_first=True)
        y, _ = self.answer(x, self.initial_state(x.size(0)), lengths.to(x.device))
        if self.answers != "every":
            return y
        order = packed.sorted_indices
        if order is not None:
            y, lengths = y.index_select(0, order), lengths[order.cpu()]
        data = pack_padded_sequence(y, lengths, batch_first=True).data
        return PackedSequence(data, packed.batch_sizes, order, packed.unsorted_indices)

    @torch.jit.export
    def answer(
        self, x: Tensor, state: tuple[Tensor, Tensor], lengths: Optional[Tensor] = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """:meth:`forward` from a state on, with the state behind it."""
        return self._answer(x, state[0], state[1], lengths, None, self.answers)

    @torch.jit.export
    def run(
        self, x: Tensor, state: tuple[Tensor, Tensor], reset: Optional[Tensor] = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Carry a stream over several steps: (N, T, input_size) and a state give (N, T, output_size) and a state.

        ``reset`` (N, T) bool: rows whose state is put to the initial one before the step.
        """
        return self._answer(x, state[0], state[1], None, reset, "every")

    @torch.jit.export
    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Carry a stream over one step: (N, input_size) and a state give (N, output_size) and a state."""
        y, state = self.run(x.unsqueeze(-2), state, None)
        return y.squeeze(-2), state

    @torch.jit.export
    def initial_state(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """The state (h, c) of ``batch_size`` fresh streams: zero, or learned."""
        h: list[Tensor] = []
        c: list[Tensor] = []
        for lstm in self.lstms:
            state = lstm.initial_state(batch_size)
            h.append(state[0])
            c.append(state[1])
        return self._join(h), self._join(c)

    @torch.jit.export
    def reset(self, state: tuple[Tensor, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
        """The state with the rows of ``mask`` (N, bool) put to the initial one."""
        h, c = self.initial_state(mask.size(0))
        rows = mask.unsqueeze(0).unsqueeze(2)
        return torch.where(rows, h, state[0]), torch.where(rows, c, state[1])

    def _join(self, parts: list[Tensor]) -> Tensor:
        if self._uniform:
            return parts[0] if len(parts) == 1 else torch.cat(parts, 0)
        return torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1).unsqueeze(0)

    def _answer(
        self,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        lengths: Optional[Tensor],
        reset: Optional[Tensor],
        answers: str,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if not torch.jit.is_scripting():
            answer = self._run_image(x, (h, c), lengths, reset, answers)
            if answer is not None:
                return answer
        return self._answer_by_layers(x, h, c, lengths, reset, answers)

    def _answer_by_layers(
        self,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        lengths: Optional[Tensor],
        reset: Optional[Tensor],
        answers: str,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if not torch.jit.is_scripting():
            if lengths is not None and not isinstance(lengths, Tensor):
                lengths = torch.as_tensor(lengths)
        past: Optional[Tensor] = None
        if lengths is not None:
            if lengths.dim() != 1 or lengths.size(0) != x.size(0):
                raise ValueError(f"Chain: Expected lengths of shape ({x.size(0)},), got {lengths.shape}")
            # What lies past the end of a row may be anything. A NaN there would meet the gradient, zero or not.
            past = torch.arange(x.size(1), device=x.device).unsqueeze(0) >= lengths.to(x.device).unsqueeze(1)
            x = x.masked_fill(past.unsqueeze(2), 0.0)
        y = (x - self.input_offset) * self.input_scale
        for dense in self.encoder:
            y = dense(y)
        all_h: list[Tensor] = []
        all_c: list[Tensor] = []
        at = [0, 0]
        final = y
        for lstm in self.lstms:
            rows = lstm.num_layers * (2 if lstm.bidirectional else 1)
            h_size = lstm.proj_size if lstm.proj_size > 0 else lstm.hidden_size
            h_rows = 1 if self._uniform else h_size
            c_rows = 1 if self._uniform else lstm.hidden_size
            h_part = h.narrow(0 if self._uniform else 2, at[0], rows * h_rows)
            c_part = c.narrow(0 if self._uniform else 2, at[1], rows * c_rows)
            at[0] += rows * h_rows
            at[1] += rows * c_rows
            if not self._uniform:
                h_part = h_part.squeeze(0).unflatten(1, [rows, h_size]).transpose(0, 1)
                c_part = c_part.squeeze(0).unflatten(1, [rows, lstm.hidden_size]).transpose(0, 1)
            batch_first = lstm.batch_first
            marks = reset
            if marks is not None and not batch_first:
                marks = marks.transpose(0, 1)
            sequence = y if batch_first else y.transpose(0, 1)
            if lstm.return_cell_states:
                y, state, cells = lstm(sequence, (h_part, c_part), lengths, marks)
                y = torch.cat([y, cells], 2)
                final = torch.cat([_last_layer(part, lstm.bidirectional) for part in state], 1)
            else:
                y, state = lstm(sequence, (h_part, c_part), lengths, marks)
                final = _last_layer(state[0], lstm.bidirectional)
            if not batch_first:
                y = y.transpose(0, 1)
            all_h.append(state[0])
            all_c.append(state[1])

        skipped = x
        if answers != "every":
            skipped = _last_step(x, lengths)
            y = final if answers == "hidden" else _last_step(y, lengths)
        for dense in self.heads:
            y = dense(y)
        y = y * self.output_scale + self.output_offset
        if len(self.skip_columns) > 0:
            y = y + torch.stack([skipped.select(-1, column) for column in self.skip_columns], -1)
        if past is not None:
            y = y.masked_fill(past.unsqueeze(2) if answers == "every" else past[:, :1], 0.0)
        return y, (self._join(all_h), self._join(all_c))


def _last_step(x: Tensor, lengths: Optional[Tensor]) -> Tensor:
    """The last step of each row: (N, T, size) -> (N, size); of a row without steps the first one."""
    if lengths is None:
        return x.select(1, x.size(1) - 1)
    last = (lengths.to(x.device, torch.int64) - 1).clamp(min=0).unsqueeze(1).unsqueeze(2)
    return x.gather(1, last.expand(-1, -1, x.size(2))).squeeze(1)


def _last_layer(state: Tensor, bidirectional: bool) -> Tensor:
    """The last layer's part of h or c, directions side by side."""
    return torch.cat([state[-2], state[-1]], 1) if bidirectional else state[-1]


def _widths(stage: "Scale | Dense | LSTM | Unscale") -> tuple[int, int]:
    """Values a step that a stage takes and gives."""
    if isinstance(stage, LSTM):
        values = (stage.proj_size or stage.hidden_size) + (stage.hidden_size if stage.return_cell_states else 0)
        return stage.input_size, values * (2 if stage.bidirectional else 1)
    if isinstance(stage, Dense):
        return stage.in_features, stage.out_features
    return len(stage), len(stage)


class Forecaster(Chain):
    """An LSTM stack and a linear head on the last hidden state, in the user's own units: the commonest chain.

    Args:
        input_size: features of a step.
        hidden_size: units of each layer.
        num_layers: layers of the stack.
        output_size: values forecast.
        dropout: between layers, while training.
        init_range: if given, all parameters start uniform in ±init_range; else as torch starts them.
        options: any other of :class:`LSTM`'s.
    """

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
        **options: object,
    ) -> None:
        lstm = LSTM(
            input_size,
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=dropout,
            device=device,
            dtype=dtype,
            **options,  # type: ignore[arg-type]
        )
        _, width = _widths(lstm)
        super().__init__(lstm, Dense(width, output_size, device=device, dtype=dtype))
        if init_range is not None:
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -init_range, init_range)

    @property
    def lstm(self) -> LSTM:
        """The stack."""
        return self.lstms[0]

    @property
    def head(self) -> Dense:
        """The linear layer on it."""
        return self.heads[0]

    @property
    def num_layers(self) -> int:
        return self.lstm.num_layers

    @property
    def hidden_size(self) -> int:
        return self.lstm.hidden_size
