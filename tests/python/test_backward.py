"""Training: gradients of plain layers, projections and ragged batches, against torch's own modules and autograd."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cellstep.formula import lstm_packed_steps
from cellstep.nn import LSTM

ops = torch.ops.cellstep

#: Both sides compute in float64 and differ in the order of their sums, of some thousand terms near 1.
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pair(*arguments, **options):
    ours = LSTM(*arguments, **options, dtype=torch.float64)
    theirs = torch.nn.LSTM(*arguments, **options, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def train(module, x, state, lengths=None, packed=True):
    """Answers and all gradients of a weighting of the output, h and c; ragged where there are lengths."""
    leaves = [part.detach().clone().requires_grad_() for part in (x, *state)]
    if lengths is None:
        output, last = module(leaves[0], tuple(leaves[1:]))
    elif packed:
        answer, last = module(pack_padded_sequence(leaves[0], lengths, enforce_sorted=False), tuple(leaves[1:]))
        output = pad_packed_sequence(answer, total_length=x.size(0))[0]
    else:
        output, last = module(leaves[0], tuple(leaves[1:]), lengths)
    total = (output * output.detach().cos()).sum() + (last[0] ** 2).sum() + last[1].sin().sum()
    return [output, *last], list(torch.autograd.grad(total, [*leaves, *module.parameters()]))


def state_of(module, rows):
    places = module.num_layers * (2 if module.bidirectional else 1)
    sizes = module.proj_size or module.hidden_size, module.hidden_size
    return tuple(torch.randn(places, rows, size, dtype=torch.float64) for size in sizes)


def assert_close(a, b, **tolerance):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **(tolerance or EXACT))


def assert_bits(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


SHAPES = st.tuples(
    *(st.integers(1, most) for most in (4, 14, 9, 37)), st.booleans(), st.booleans(), st.sampled_from([1, 2])
)


@given(SHAPES, st.data())
@settings(max_examples=60, deadline=None)
def test_gradients_are_those_of_torch(shape, data):
    steps, rows, inputs, units, bidirectional, projected, layers = shape
    proj_size = data.draw(st.integers(1, units - 1)) if projected and units > 1 else 0
    lengths = data.draw(st.none() | st.lists(st.integers(1, steps), min_size=rows, max_size=rows))
    torch.manual_seed(0)
    ours, theirs = pair(inputs, units, layers, bidirectional=bidirectional, proj_size=proj_size)
    x, state = torch.randn(steps, rows, inputs, dtype=torch.float64), state_of(ours, rows)
    expected = train(theirs, x, state, lengths)
    answer = train(ours, x, state, lengths)
    assert_close(answer[0] + answer[1], expected[0] + expected[1])


@pytest.mark.parametrize("options", [{}, {"proj_size": 48}, {"bidirectional": True}], ids=str)
def test_gradients_at_size_on_any_number_of_threads(options, threads):
    """Large enough for several chunks of steps and for shares of rows."""
    torch.manual_seed(0)
    ours, theirs = pair(32, 96, 2, **options)
    x, state = torch.randn(150, 33, 32, dtype=torch.float64), state_of(ours, 33)
    lengths = torch.arange(33) * 4 + 10
    for given_lengths in (None, lengths):
        expected = train(theirs, x, state, given_lengths)
        answers = []
        for count in (1, 2, 1, 2):
            threads(count)
            answers.append(train(ours, x, state, given_lengths))
            assert_close(answers[-1][0] + answers[-1][1], expected[0] + expected[1])
        assert_bits(answers[0][0], answers[1][0])  # forward: on any number of threads
        for first, again in ((0, 2), (1, 3)):  # backward: from call to call
            assert_bits(answers[first][1], answers[again][1])


@pytest.mark.parametrize("proj_size", [0, 5])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_ragged_row_has_the_bits_that_it_has_alone(bidirectional, proj_size):
    torch.manual_seed(0)
    lstm = LSTM(6, 21, 2, bidirectional=bidirectional, proj_size=proj_size)
    x, lengths = torch.randn(11, 9, 6), [3, 11, 1, 0, 7, 7, 2, 11, 5]
    output, (h, c) = lstm(x, None, lengths)
    scripted = torch.jit.script(lstm)(x, None, torch.tensor(lengths))  # on padded rows with masks
    assert_bits([output, h, c], [scripted[0], *scripted[1]])
    for row, length in enumerate(lengths):
        assert not output[length:, row].any()
        if length == 0:
            assert not h[:, row].any() and not c[:, row].any()
            continue
        alone, (h_alone, c_alone) = lstm(x[:length, row : row + 1])
        assert_bits([output[:length, row], h[:, row], c[:, row]], [alone[:, 0], h_alone[:, 0], c_alone[:, 0]])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"residual": True, "return_cell_states": True}], ids=["torch's", "ours"])
def test_lengths_packed_and_masked_are_one(batch_first, options):
    torch.manual_seed(0)
    lstm = LSTM(7, 7, 2, batch_first=batch_first, bidirectional=not options, **options)
    x, lengths = torch.randn(5, 4, 7), torch.tensor([2, 5, 1, 4])
    x = x.transpose(0, 1) if batch_first else x
    packed = lstm(pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False))
    ragged = lstm(x, lengths=lengths)
    masked = torch.jit.script(lstm)(x, None, lengths)
    for answer in (ragged, masked):
        assert_bits(answer[1], packed[1])
        for sequences in (0, 2)[: len(answer) - 1]:
            padded, _ = pad_packed_sequence(packed[sequences], batch_first)
            assert torch.equal(padded, answer[sequences])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_nothing_leaks_from_behind_the_end_of_a_row(bidirectional):
    torch.manual_seed(0)
    lstm = LSTM(3, 8, 2, bidirectional=bidirectional, dtype=torch.float64)
    lengths, state = torch.tensor([4, 0, 6, 1]), state_of(lstm, 4)
    clean = torch.randn(6, 4, 3, dtype=torch.float64)
    past = (torch.arange(6).unsqueeze(1) >= lengths).unsqueeze(2)
    dirty = clean.masked_fill(past, float("nan"))
    for a, b in zip(train(lstm, clean, state, lengths, False), train(lstm, dirty, state, lengths, False), strict=True):
        assert_bits(a, b)
    _, (to_x, *_) = train(lstm, dirty, state, lengths, False)
    assert not to_x.masked_select(past).any()


def test_no_rows_and_no_steps():
    lstm = LSTM(3, 5, 2, dtype=torch.float64)
    x, state = torch.randn(4, 3, 3, dtype=torch.float64), state_of(lstm, 3)
    outputs, gradients = train(lstm, x, state, torch.zeros(3, dtype=torch.int64), False)
    assert not outputs[0].any()
    assert_bits(outputs[1:], state)
    assert not any(gradient.any() for gradient in (gradients[0], *gradients[3:]))
    empty = train(lstm, x[:, :0], state_of(lstm, 0))
    assert empty[0][0].shape == (4, 0, 5)
    assert not any(gradient.any() for gradient in empty[1])


def packed_arguments(reverse, proj_size=0, ragged=True, biased=True):
    """Of lstm_packed, up to the flags."""
    generator = torch.Generator().manual_seed(1)

    def draw(*sizes):
        return (torch.randn(*sizes, dtype=torch.float64, generator=generator) / 2).requires_grad_()

    batch_sizes = torch.tensor([4, 3, 3, 1, 0]) if ragged else None
    units, recurrent = 6, proj_size or 6
    return (
        *(draw(11 if ragged else 12, 3), batch_sizes, draw(4, recurrent), draw(4, units)),
        *(draw(4 * units, 3), draw(4 * units, recurrent)),
        *((draw(4 * units), draw(4 * units)) if biased else (None, None)),
        *(draw(recurrent, units) if proj_size else None, reverse),
    )


PACKED = [(False, 0, True), (True, 0, True), (True, 4, True), (False, 4, False), (True, 0, False)]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_the_operator_and_its_gradients(case):
    arguments = packed_arguments(*case)
    *tensors, reverse = arguments
    answer, expected = ops.lstm_packed(*arguments, True, True), lstm_packed_steps(*tensors, reverse)
    assert_close([*answer[:3], answer[4]], expected)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    found = [
        torch.autograd.grad(sum((part * part.detach().sin()).sum() for part in parts), wanted)
        for parts in ([*answer[:3], answer[4]], expected)
    ]
    assert_close(*found)
    batch_sizes = arguments[1]

    def layer(*leaves):
        answer = ops.lstm_packed(leaves[0], batch_sizes, *leaves[1:], reverse, True, True)
        return answer[0], answer[1], answer[2], answer[4]

    leaves = [tensors[0], *tensors[2:]]
    torch.autograd.gradcheck(layer, leaves, fast_mode=True)
    torch.autograd.gradgradcheck(layer, leaves, fast_mode=True)
    for save in ((True, True), (False, True), (False, False)):
        torch.library.opcheck(ops.lstm_packed.default, (*arguments, *save))


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_opcheck_of_backward(case):
    *tensors, reverse = (t.detach() if isinstance(t, torch.Tensor) else t for t in packed_arguments(*case))
    x, batch_sizes, h, c, weight_ih, weight_hh, _, _, weight_hr = tensors
    y, h_n, c_n, gates, cells = ops.lstm_packed(*tensors, reverse, True, True)
    inputs = x, batch_sizes, h, c, weight_ih, weight_hh, weight_hr, y, gates, cells, reverse
    for grads in ((y, h_n, c_n, cells), (None, h_n, None, None)):
        for wanted in ((True, True), (False, True), (True, False)):
            torch.library.opcheck(ops.lstm_packed_backward.default, (*grads, *inputs, *wanted))


@pytest.mark.parametrize("which", ["input", "weights", "state"])
def test_what_needs_no_gradient_gets_none(which):
    torch.manual_seed(0)
    ours, theirs = pair(3, 9, 2, proj_size=4)
    x, state = torch.randn(5, 7, 3, dtype=torch.float64), state_of(ours, 7)
    found = []
    for module in (ours, theirs):
        leaves = [part.detach().clone() for part in (x, *state)]
        module.requires_grad_(which != "weights")
        leaves[0].requires_grad_(which != "input")
        if which != "state":
            leaves[1].requires_grad_()
        output, (h, c) = module(leaves[0], tuple(leaves[1:]))
        (output.square().sum() + h.sum() + c.sum()).backward()
        found.append([part.grad for part in (*leaves, *module.parameters())])
    assert [grad is None for grad in found[0]] == [grad is None for grad in found[1]]
    assert_close(*([grad for grad in grads if grad is not None] for grads in found))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_gradients_on_every_instruction_set(isa):
    """This file's comparison with torch in a process that is made to use one; what the machine lacks is not used."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch, test_backward as t\n"
        "for options in ({}, {'proj_size': 7}):\n"
        "    torch.manual_seed(0); ours, theirs = t.pair(5, 19, 2, bidirectional=True, **options)\n"
        "    x, state = torch.randn(6, 13, 5, dtype=torch.float64), t.state_of(ours, 13)\n"
        "    for lengths in (None, [6, 1, 3, 2, 2, 5, 4, 6, 1, 1, 2, 3, 4]):\n"
        "        t.assert_close(*(sum(t.train(m, x, state, lengths), []) for m in (ours, theirs)))\n"
    )
    command = [sys.executable, "-c", script, os.path.dirname(__file__)]
    done = subprocess.run(command, env={**os.environ, "CELLSTEP_CPU": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


WRONG = {
    "batch_sizes rise": (1, torch.tensor([3, 4, 3, 1]), "none larger than the one before"),
    "too many rows": (1, torch.tensor([5, 3, 3]), "from 0 to the 4 rows of h"),
    "below zero": (1, torch.tensor([4, 4, 4, -1]), "from 0 to the 4 rows"),
    "another sum": (1, torch.tensor([4, 3, 3]), "the sum of batch_sizes"),
    "type of batch_sizes": (1, torch.tensor([4.0, 3, 3, 1]), "as int64"),
    "no batch_sizes": (1, None, "expected x of 4 rows a step"),
    "x": (0, torch.zeros(11, 2, dtype=torch.float64), "expected weight_ih of shape"),
    "dtype": (0, torch.zeros(11, 3), "expected h of float32"),
    "h without projection": (2, torch.zeros(4, 5, dtype=torch.float64), "expected h of 6 values"),
    "bias": (6, torch.zeros(5, dtype=torch.float64), "expected bias_ih of shape"),
    "weight_hr": (8, torch.zeros(6, 5, dtype=torch.float64), "expected weight_hr of shape"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what):
    place, value, message = WRONG[what]
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in packed_arguments(False)]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        ops.lstm_packed(*arguments, True, True)


def test_memory_does_not_grow_with_the_number_of_lengths():
    """torch.nn.LSTM keeps a compiled primitive for every length it has met: about 1 MB each, 1.4 GB for these. Here a
    call keeps nothing. What is left is the heap's own play, seen from -5 to 9 MB; the limit is what 32 lengths would
    take there."""
    script = """
import sys, torch
from cellstep.nn import LSTM
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
torch.manual_seed(0)
torch.set_num_threads(1)
lstm = LSTM(4, 20, 2)
def step(length):
    x = torch.randn(length, 6, 4)
    lstm(x)[0].sum().backward()
    lstm(x, lengths=torch.randint(1, length + 1, (6,)))[0].sum().backward()
for _ in range(3):
    step(3000)
before = resident()
for length in torch.randperm(1500) + 1:
    step(int(length))
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 32e6
