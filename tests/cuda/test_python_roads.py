"""The Python above lstm_layers, on CPU tensors: the operator gets kernels for the CPU, and modules are told that they
stand for CUDA's. Dispatch, autograd, its second derivative, torch.compile and torch.export are the same code on both.
"""

import copy

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import cellstep.ops
from cellstep.exporters.torchscript import PackedChain
from cellstep.formula import lstm_layers_steps
from cellstep.nn import LSTM, Chain, Dense

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _by_formula(x, batch_sizes, lengths, reset, h, c, initial_h, initial_c, weights, biased, bidirectional, save):
    arguments = (x, batch_sizes, lengths, reset, h, c, initial_h, initial_c, weights, biased, bidirectional)
    y, h_n, c_n, cells = (part.contiguous() for part in lstm_layers_steps(*arguments))
    layers, count = len(weights) // ((4 if biased else 2) * (2 if bidirectional else 1)), x.shape[:-1].numel()
    directions = 2 if bidirectional else 1
    if not save:
        return y, h_n, c_n, *(x.new_empty(0) for _ in range(3))
    outputs = x.new_zeros((layers - 1, *y.shape) if layers > 1 else (0,))
    gates = x.new_zeros(layers * directions, count, 4 * h.shape[2])
    every = x.new_zeros(layers * directions, count, h.shape[2])
    every[-directions:] = cells
    return y, h_n, c_n, outputs, gates, every


def _backward_by_formula(grad_y, grad_h, grad_c, grad_cells, x, sizes, lengths, reset, h, c, weights, *rest):
    biased, bidirectional, *_, to_x = rest
    # A kernel lies below autograd, which is wanted here.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        x, h, c, *weights = (part.detach().requires_grad_() for part in (x, h, c, *weights))
        answers = lstm_layers_steps(x, sizes, lengths, reset, h, c, None, None, weights, biased, bidirectional)
        given = [(a, g) for a, g in zip(answers, (grad_y, grad_h, grad_c, grad_cells), strict=True) if g is not None]
        inputs = (x, h, c, *weights)
        found = map(torch.zeros_like, inputs)
        if given:
            outputs, grads = zip(*given, strict=True)
            found = torch.autograd.grad(outputs, inputs, grads, allow_unused=True, materialize_grads=True)
    to_input, to_h, to_c, *to_weights = (grad.clone() for grad in found)
    return to_input if to_x else x.new_empty(0), to_h, to_c, to_weights


@pytest.fixture(params=["formula", "emulated"], autouse=True)
def on_cuda(request, monkeypatch):
    """CPU tensors take CUDA's roads, on kernels from the formula or on CUDA's own, emulated."""
    forward, backward = _by_formula, _backward_by_formula
    if request.param == "emulated":
        operators = request.getfixturevalue("emulated")
        forward, backward = operators.lstm_layers, operators.lstm_layers_backward
    library = torch.library.Library("cellstep", "IMPL")
    library.impl("lstm_layers", forward, "CPU")
    library.impl("lstm_layers_backward", backward, "CPU")
    for module in (cellstep.nn.lstm, cellstep.nn.dispatch):
        monkeypatch.setattr(module, "on_device", lambda x: x.dtype in _DTYPES)
    monkeypatch.setattr(cellstep.nn.lstm, "inference_only", lambda x: False)
    monkeypatch.setattr(cellstep.nn.chain, "inference_only", lambda x: False)
    torch.manual_seed(0)
    yield request.param
    library._destroy()


class Calls(TorchDispatchMode):
    """Names of cellstep's operators as they are called, and whether forward calls save."""

    def __enter__(self):
        self.names, self.saves = [], []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cellstep":
            self.names.append(func.__name__.removesuffix(".default"))
            if self.names[-1] == "lstm_layers":
                self.saves.append(args[-1])
        return func(*args, **(kwargs or {}))


def _twins(*arguments, **options):
    """Ours and torch's with the same weights, in float64."""
    ours = LSTM(*arguments, dtype=torch.float64, **options)
    theirs = torch.nn.LSTM(*arguments, dtype=torch.float64, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _gradients(answers, tensors):
    """Of a loss in which every answer has a weight of its own."""
    generator = torch.Generator().manual_seed(7)
    loss = sum((a * torch.randn(a.shape, generator=generator, dtype=a.dtype)).sum() for a in answers)
    return torch.autograd.grad(loss, tensors, allow_unused=True)


def _close(found, expected):
    # Both in float64, with sums in another order.
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_stack_is_one_call_with_torchs_numbers_and_gradients(layers, bidirectional, bias):
    ours, theirs = _twins(3, 5, layers, bias=bias, batch_first=True, bidirectional=bidirectional)
    x = torch.randn(4, 6, 3, dtype=torch.float64, requires_grad=True)
    state = tuple(torch.randn(layers * (1 + bidirectional), 4, 5, dtype=torch.float64).requires_grad_() for _ in "hc")
    with Calls() as calls:
        y, (h, c) = ours(x, state)
        found = _gradients((y, h, c), (x, *state, *ours.parameters()))
    assert calls.names == ["lstm_layers", "lstm_layers_backward"] and calls.saves == [True]
    expected_y, (expected_h, expected_c) = theirs(x, state)
    _close((y, h, c), (expected_y, expected_h, expected_c))
    _close(found, _gradients((expected_y, expected_h, expected_c), (x, *state, *theirs.parameters())))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_rows_of_any_lengths_are_torchs_rows_alone(bidirectional):
    ours, theirs = _twins(3, 5, 2, bidirectional=bidirectional)
    x = torch.randn(7, 4, 3, dtype=torch.float64)
    lengths = torch.tensor([7, 1, 4, 0])
    for row, length in enumerate(lengths):
        x[length:, row] = torch.nan
    x.requires_grad_()
    with Calls() as calls:
        y, (h, c) = ours(x, lengths=lengths)
    assert calls.names == ["lstm_layers"]
    found = _gradients((y, h, c), (x, *ours.parameters()))
    rows = []
    for row, length in enumerate(lengths.tolist()):
        if length:
            answer, state = theirs(x[:length, row])
        else:
            answer, state = x.new_zeros(0, y.shape[2]), tuple(x.new_zeros(len(h), 5) for _ in "hc")
        rows.append((torch.cat([answer, x.new_zeros(7 - length, y.shape[2])]), *state))
    expected = [torch.stack(part, 1) for part in zip(*rows, strict=True)]
    _close((y, h, c), expected)
    _close(found, _gradients(expected, (x, *theirs.parameters())))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_reset_begins_a_sequence_anew(bidirectional):
    ours, theirs = _twins(3, 5, 1, bidirectional=bidirectional)
    x = torch.randn(6, 1, 3, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(6, 1, dtype=torch.bool)
    reset[4] = True
    with Calls() as calls:
        y, (h, c) = ours(x, reset=reset)
    assert calls.names == ["lstm_layers"]
    first, (h_1, c_1) = theirs(x[:4])
    second, (h_2, c_2) = theirs(x[4:])
    # The direction that runs forwards ends in the second part, the other one in the first.
    expected_h, expected_c = (torch.cat([b[:1], a[1:]]) for a, b in ((h_1, h_2), (c_1, c_2)))
    expected = torch.cat([first, second]), expected_h, expected_c
    _close((y, h, c), expected)
    parameters = zip(ours.parameters(), theirs.parameters(), strict=True)
    a, b = zip(*parameters, strict=True)
    _close(_gradients((y, h, c), (x, *a)), _gradients(expected, (x, *b)))


@pytest.mark.parametrize("sorted_", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_packed_sequence_is_one_call(sorted_, bidirectional):
    ours, theirs = _twins(3, 5, 2, bidirectional=bidirectional)
    lengths = [7, 4, 2] if sorted_ else [2, 7, 4]
    rows = [torch.randn(length, 3, dtype=torch.float64, requires_grad=True) for length in lengths]
    with Calls() as calls:
        y, (h, c) = ours(pack_sequence(rows, enforce_sorted=sorted_))
    assert calls.names == ["lstm_layers"]
    expected, (expected_h, expected_c) = theirs(pack_sequence(rows, enforce_sorted=sorted_))
    _close((y.data, h, c), (expected.data, expected_h, expected_c))
    assert torch.equal(y.batch_sizes, expected.batch_sizes)
    found = _gradients((y.data, h, c), (*rows, *ours.parameters()))
    _close(found, _gradients((expected.data, expected_h, expected_c), (*rows, *theirs.parameters())))


_BETWEEN = {
    "residual": ({"residual": True}, 3),
    "cells": ({"return_cell_states": True}, 3),
    "both": ({"residual": True, "return_cell_states": True, "bidirectional": True}, 3),
    "memory": ({"memory_efficient": True}, 1),
    "initial": ({"learn_initial_state": True}, 1),
    "none": ({"zoneout": 0.0, "recurrent_dropout": 0.2, "weight_drop": 0.3, "dropout": 0.2}, 1),
}


@pytest.mark.parametrize("name", _BETWEEN)
@pytest.mark.parametrize("ragged", [False, True])
def test_what_stands_between_layers_parts_the_calls(name, ragged, monkeypatch):
    """Against the road of CPU tensors, which is tested against the formula."""
    options, count = _BETWEEN[name]
    ours = LSTM(4, 5, 3, dtype=torch.float64, **{"residual": False, **options}).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.uniform_(-0.5, 0.5)
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    more = {"lengths": torch.tensor([6, 2, 4])} if ragged else {}

    def answers():
        output, state, *cells = ours(x, **more)
        return [output, *state, *cells]

    with Calls() as calls:
        found = answers()
    assert calls.names == ["lstm_layers"] * count
    to_found = _gradients(found, (x, *ours.parameters()))
    monkeypatch.setattr(cellstep.nn.lstm, "on_device", lambda x: False)
    expected = answers()
    _close(found, expected)
    _close(to_found, _gradients(expected, (x, *ours.parameters())))


@pytest.mark.parametrize("option", ["peephole", "layer_norm", "coupled", "proj_size", "cell_clip", "zoneout"])
def test_options_take_the_other_operators(option):
    ours = LSTM(4, 5, 2, **{option: {"proj_size": 3, "cell_clip": 0.5, "zoneout": 0.1}.get(option, True)}).eval()
    x = torch.randn(6, 3, 4)
    for more in ({}, {"lengths": torch.tensor([6, 2, 4])}, {"reset": torch.rand(6, 3) > 0.7}):
        with Calls() as calls:
            ours(x, **more)
        assert calls.names and "lstm_layers" not in calls.names


def test_dropout_between_layers_while_training():
    ours = LSTM(4, 5, 3, dropout=0.5)
    x = torch.randn(6, 3, 4)
    with Calls() as calls:
        y, _ = ours(x)
        y.sum().backward()
    assert calls.names == ["lstm_layers"] * 3 + ["lstm_layers_backward"] * 3
    assert not torch.equal(ours(x)[0], ours(x)[0])
    with Calls() as calls:
        ours.eval()(x)
    assert calls.names == ["lstm_layers"]


def test_learned_initial_state_with_resets():
    ours = LSTM(4, 5, 2, learn_initial_state=True, dtype=torch.float64)
    torch.nn.init.normal_(ours.initial_h)
    torch.nn.init.normal_(ours.initial_c)
    x, reset = torch.randn(6, 3, 4, dtype=torch.float64), torch.rand(6, 3) > 0.6
    with Calls() as calls, torch.no_grad():
        y, state = ours(x, reset=reset)
    assert calls.names == ["lstm_layers"]
    with Calls() as calls:  # of what a reset puts lstm_layers has no gradient
        expected, expected_state = ours(x, reset=reset)
        expected.sum().backward()
    assert calls.names[0] == "lstm_variant" and ours.initial_h.grad.abs().min() > 0
    _close((y, *state), (expected.detach(), *(part.detach() for part in expected_state)))


def test_nothing_is_kept_where_nothing_is_differentiated():
    x = torch.randn(6, 3, 4)
    for module, context, saves in (
        (LSTM(4, 5, 2), torch.no_grad(), [False]),
        (LSTM(4, 5, 2), torch.enable_grad(), [True]),
        (LSTM(4, 5, 2, memory_efficient=True), torch.enable_grad(), [False]),
        (LSTM(4, 5, 2, return_cell_states=True), torch.no_grad(), [False, True]),
    ):
        with Calls() as calls, context:
            module(x)
        assert calls.saves == saves


def _stack_arguments(bidirectional=False, layers=2, requires_grad=True, ragged=False):
    rows = layers * (1 + bidirectional)
    weights = []
    for layer in range(layers):
        for _ in range(1 + bidirectional):
            inputs = 3 if layer == 0 else 4 * (1 + bidirectional)
            weights += [torch.randn(16, inputs), torch.randn(16, 4), torch.randn(16), torch.randn(16)]
    weights = [(0.5 * weight).double().requires_grad_(requires_grad) for weight in weights]
    x, h, c = (torch.randn(*s, dtype=torch.float64) for s in ((5, 2, 3), (rows, 2, 4), (rows, 2, 4)))
    lengths = torch.tensor([5, 3]) if ragged else None
    reset = torch.rand(5, 2) > 0.7 if ragged else None
    inputs = [part.requires_grad_(requires_grad) for part in (x, h, c)]
    return inputs, lengths, reset, weights


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_the_gradient_of_the_gradient(eager, ragged):
    (x, h, c), lengths, reset, weights = _stack_arguments(True, ragged=ragged)
    operator = cellstep.ops.lstm_layers if eager else torch.ops.cellstep.lstm_layers

    def call(x, h, c, *weights):
        return operator(x, None, lengths, reset, h, c, None, None, list(weights), True, True, True)[:3]

    inputs = (x, h, c, *weights)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_what_a_reset_puts_has_a_gradient_by_the_formula():
    (x, h, c), lengths, reset, weights = _stack_arguments(ragged=True)
    first, second = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in "hc")

    def call(first, second):
        return torch.ops.cellstep.lstm_layers(x, None, lengths, reset, h, c, first, second, weights, True, False, True)[
            :3
        ]

    assert torch.autograd.gradcheck(call, (first, second))


def test_cells_have_a_gradient_in_a_stack_of_one_layer_alone():
    for layers in (1, 2):
        (x, h, c), *_, weights = _stack_arguments(layers=layers)
        arguments = (x, None, None, None, h, c, None, None, weights, True, False, True)
        for operator in (cellstep.ops.lstm_layers, torch.ops.cellstep.lstm_layers):
            *_, outputs, gates, cells = operator(*arguments)
            assert not outputs.requires_grad and not gates.requires_grad and cells.requires_grad == (layers == 1)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(save, ragged):
    (x, h, c), lengths, reset, weights = _stack_arguments(True, ragged=ragged)
    arguments = (x, None, lengths, reset, h, c, None, None, weights, True, True, save)
    torch.library.opcheck(torch.ops.cellstep.lstm_layers, arguments)
    if not save:
        return
    plain = [[weight.detach() for weight in part] if isinstance(part, list) else part for part in arguments[:-1]]
    plain = [part.detach() if isinstance(part, torch.Tensor) else part for part in plain]
    y, h_n, c_n, outputs, gates, cells = torch.ops.cellstep.lstm_layers(*plain, True)
    x, sizes, lengths, reset, h, c, _, _, weights, biased, bidirectional = plain
    grads = torch.randn_like(y), None, torch.randn_like(c_n), None
    more = (x, sizes, lengths, reset, h, c, weights, biased, bidirectional, y, outputs, gates, cells)
    for to_x in (False, True):
        torch.library.opcheck(torch.ops.cellstep.lstm_layers_backward, (*grads, *more, to_x))


def test_gradients_of_many_losses_at_once():
    ours, theirs = _twins(3, 5, 2)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    directions = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(m(x)[0], (x, *m.parameters()), directions, is_grads_batched=batched)
        if batched
        else [torch.stack(g) for g in zip(*(torch.autograd.grad(m(x)[0], (x, *m.parameters()), d) for d in directions))]  # noqa: B905
        for m, batched in ((ours, True), (theirs, False))
    )
    _close(found, expected)


@pytest.mark.parametrize("ragged", [False, True])
def test_compiled_once_for_all_sizes(ragged):
    ours = LSTM(3, 5, 2, bidirectional=True, dtype=torch.float64)

    def loss(x, lengths):
        y, (h, c) = ours(x, lengths=lengths if ragged else None)
        return y.square().sum() + h.sum() + c.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps, rows in ((6, 4), (7, 8), (9, 2)):
            x = torch.randn(steps, rows, 3, dtype=torch.float64, requires_grad=True)
            lengths = torch.randint(0, steps + 1, (rows,))
            tensors = (x, *ours.parameters())
            _close(torch.autograd.grad(compiled(x, lengths), tensors), torch.autograd.grad(loss(x, lengths), tensors))


def test_exported_for_all_sizes():
    ours = LSTM(3, 5, 2, batch_first=True, dtype=torch.float64)
    batch, time = torch.export.Dim("batch", min=1), torch.export.Dim("time", min=1)
    with torch.no_grad():
        x = torch.randn(2, 4, 3, dtype=torch.float64)
        program = torch.export.export(ours, (x,), dynamic_shapes=({0: batch, 1: time},), strict=False)
        assert [n for n in program.graph.nodes if n.target is torch.ops.cellstep.lstm_layers.default]
        for shape in ((3, 7, 3), (1, 1, 3)):
            x = torch.randn(shape, dtype=torch.float64)
            y, state = program.module()(x)
            expected, expected_state = ours(x)
            _close((y, *state), (expected, *expected_state))


@pytest.mark.parametrize("packed", [False, True])
def test_autocast_casts_what_torch_casts(packed):
    ours, x = LSTM(3, 5, 2), torch.randn(6, 2, 3)
    given = pack_padded_sequence(x, torch.tensor([6, 3])) if packed else x
    with torch.autocast("cpu", torch.bfloat16), Calls() as calls:
        y, (h, c) = ours(given)
    assert calls.names == ["lstm_layers"]
    wide, (wide_h, wide_c) = ours(given)
    y, wide = (pad_packed_sequence(part)[0] if packed else part for part in (y, wide))
    for narrow, expected in ((y, wide), (h, wide_h), (c, wide_c)):
        assert narrow.dtype == torch.bfloat16
        # 8 bits of mantissa in inputs, weights and state: some 2^-8 of values below 1.
        torch.testing.assert_close(narrow.float(), expected, rtol=0, atol=0.02)
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in ours.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_the_kernels(dtype):
    ours = LSTM(3, 5, 2).to(dtype)
    x = torch.randn(6, 2, 3, dtype=dtype)
    with Calls() as calls:
        y, _ = ours(x)
        y.sum().backward()
    assert calls.names == ["lstm_layers", "lstm_layers_backward"] and y.dtype == dtype


def test_a_copy_and_a_chain_take_the_same_road():
    chain = Chain(LSTM(3, 5, 2, batch_first=True, bidirectional=True), Dense(10, 2), answers="every").double()
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    lengths = torch.tensor([6, 1, 0, 3])
    reset = torch.rand(4, 6) > 0.7
    state = chain.initial_state(4)
    for model in (chain, copy.deepcopy(chain)):
        with Calls() as calls:
            model.answer(x, state, lengths)
            model.run(x, state, reset)
        assert [name for name in calls.names if name.startswith("lstm")] == ["lstm_layers"] * 2


def test_a_scripted_stack_has_both_roads(monkeypatch):
    monkeypatch.undo()
    graph = str(torch.jit.script(LSTM(3, 5, 2)).inlined_graph)
    assert all(name in graph for name in ("cellstep::has_kernels", "cellstep::lstm_layers", "cellstep::lstm_layer("))


def test_a_packed_chain_tells_its_records(on_cuda, request):
    """The words beside the image are those that run_records wants: of options, too, whose numbers lie in the data."""
    if on_cuda != "emulated":
        pytest.skip("run_records has kernels alone")
    for dtype in (torch.float32, torch.float64):
        options = {"cell_clip": 0.2, "zoneout": 0.1, "peephole": True}
        chain = Chain(LSTM(3, 6, 2, **options), LSTM(6, 5, bidirectional=True), Dense(10, 2), answers="every")
        packed = PackedChain(chain.to(dtype).eval())
        x, (h, c) = torch.randn(4, 7, 3, dtype=dtype), packed.initial_state(4)
        arguments = (packed.image, x, h, c, packed.output_size, 0, torch.tensor([7, 0, 3, 5]), None)
        found = request.getfixturevalue("emulated").run_records(packed.records, *arguments)
        expected = torch.ops.cellstep.run_model(*arguments)
        bound = 2e-6 if dtype == torch.float32 else 1e-14  # sums in another order
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=bound)
