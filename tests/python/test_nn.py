"""LSTM and LSTMCell beside torch's own, in values, gradients, errors and construction."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import make_forecaster, random_steps
from hypothesis import given, settings
from hypothesis import strategies as st

from cellstep.nn import LSTM, Forecaster, LSTMCell

# float64 leaves rounding of 1e-16 a step; float32 some 1e-7, which a few hundred sums bring to at most 2e-6.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
DTYPES = [torch.float32, torch.float64]


def pair(cls, *args, **kwargs):
    """Our module and torch's, with the same weights by way of state_dict."""
    ours = cls(*args, **kwargs)
    theirs = getattr(torch.nn, cls.__name__)(*args, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def flat(answer):
    return [answer] if isinstance(answer, torch.Tensor) else [t for part in answer for t in flat(part)]


def assert_close(ours, theirs, dtype):
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_lstm_equals_torch(dtype, bias, batch_first, layers):
    ours, theirs = pair(LSTM, 7, 19, layers, bias=bias, batch_first=batch_first, dtype=dtype)
    x = torch.randn(5, 11, 7, dtype=dtype)
    batch = 5 if batch_first else 11
    state = (torch.randn(layers, batch, 19, dtype=dtype), torch.randn(layers, batch, 19, dtype=dtype))
    assert_close(ours(x), theirs(x), dtype)
    assert_close(ours(x, state), theirs(x, state), dtype)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 12),
    batch=st.integers(0, 9),
    inputs=st.integers(1, 20),
    hidden=st.integers(1, 40),
    layers=st.integers(1, 3),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    given_state=st.booleans(),
)
def test_lstm_equals_torch_at_any_size(steps, batch, inputs, hidden, layers, bias, dtype, given_state):
    ours, theirs = pair(LSTM, inputs, hidden, layers, bias=bias, dtype=dtype)
    x = torch.randn(steps, batch, inputs, dtype=dtype)
    state = tuple(torch.randn(layers, batch, hidden, dtype=dtype) for _ in "hc") if given_state else None
    assert_close(ours(x, state), theirs(x, state), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 4, 5, 12, 13, 16, 17, 50])
def test_gradients_equal_torch(dtype, hidden):
    ours, theirs = pair(LSTM, 3, hidden, 2, dtype=dtype)
    leaves = [torch.randn(6, 4, 3, dtype=dtype), *(torch.randn(2, 4, hidden, dtype=dtype) for _ in "hc")]
    weight = torch.randn(6, 4, hidden, dtype=dtype)
    gradients = []
    for module in (ours, theirs):
        x, h, c = (leaf.clone().requires_grad_() for leaf in leaves)
        y, (h_n, c_n) = module(x, (h, c))
        ((y * weight).sum() + h_n.sum() + (c_n * c_n).sum()).backward()
        gradients.append([x.grad, h.grad, c.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*gradients, strict=True):
        assert a is not None
        # Gradients of weights are sums over all steps and rows, so the error grows with their size.
        torch.testing.assert_close(a, b, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_cell_equals_torch(dtype, bias):
    ours, theirs = pair(LSTMCell, 7, 19, bias=bias, dtype=dtype)
    x = torch.randn(4, 7, dtype=dtype)
    state = (torch.randn(4, 19, dtype=dtype), torch.randn(4, 19, dtype=dtype))
    assert_close(ours(x), theirs(x), dtype)
    assert_close(ours(x, state), theirs(x, state), dtype)
    assert_close(ours(x[0], (state[0][0], state[1][0])), theirs(x[0], (state[0][0], state[1][0])), dtype)
    assert_close(ours(x[:0]), theirs(x[:0]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unbatched(dtype):
    ours, theirs = pair(LSTM, 3, 5, 2, dtype=dtype)
    x = torch.randn(6, 3, dtype=dtype)
    state = (torch.randn(2, 5, dtype=dtype), torch.randn(2, 5, dtype=dtype))
    assert_close(ours(x), theirs(x), dtype)
    assert_close(ours(x, state), theirs(x, state), dtype)


def test_non_contiguous_input_and_state():
    ours, theirs = pair(LSTM, 3, 5, 2)
    x = torch.randn(3, 4, 12).permute(2, 1, 0)[::2]
    state = tuple(torch.randn(5, 4, 2).permute(2, 1, 0) for _ in "hc")
    assert not x.is_contiguous() and not state[0].is_contiguous()
    assert_close(ours(x, state), theirs(x, state), torch.float32)
    expanded = torch.randn(1, 1, 3).expand(6, 4, 3)
    assert_close(ours(expanded), theirs(expanded), torch.float32)


def test_dropout_between_layers_draws_as_torch_does():
    ours, theirs = pair(LSTM, 3, 16, 3, dropout=0.5)
    x = torch.randn(6, 4, 3)
    torch.manual_seed(7)
    a = ours(x)[0]
    torch.manual_seed(7)
    b = theirs(x)[0]
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    assert not torch.equal(a, ours(x)[0])
    ours.eval()
    assert torch.equal(ours(x)[0], ours(x)[0])


@pytest.mark.parametrize(
    ("shape", "state_shape"),
    [
        ((0, 2, 3), None),  # no step
        ((4, 2, 4), None),  # wrong input_size
        ((4,), None),  # wrong number of dimensions
        ((4, 2, 3, 1), None),
        ((4, 2, 3), (1, 2, 5)),  # wrong number of layers
        ((4, 2, 3), (2, 1, 5)),  # wrong batch
        ((4, 2, 3), (2, 2, 6)),  # wrong hidden_size
        ((4, 2, 3), (2, 5)),
        ((4, 3), (2, 1, 5)),
    ],
)
def test_wrong_sizes_raise_as_torch_does(shape, state_shape):
    ours, theirs = pair(LSTM, 3, 5, 2)
    x = torch.randn(shape)
    state = None if state_shape is None else (torch.randn(state_shape), torch.randn(state_shape))
    raised = []
    for module in (ours, theirs):
        with pytest.raises((RuntimeError, ValueError)) as error:
            module(x, state)
        raised.append(error.type)
    assert raised[0] is raised[1]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((0, 5), {}),
        ((3, 0), {}),
        ((3, 5, 0), {}),
        ((3, 5.0), {}),
        ((3, 5), {"dropout": 1.5}),
        ((3, 5), {"dropout": True}),
    ],
)
def test_wrong_constructor_arguments_raise_as_torch_does(args, kwargs):
    with pytest.raises((ValueError, TypeError)) as theirs:
        torch.nn.LSTM(*args, **kwargs)
    with pytest.raises(theirs.type):
        LSTM(*args, **kwargs)


def test_wrong_dtype_raises_as_torch_does():
    ours, theirs = pair(LSTM, 3, 5)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    for module in (theirs, ours):
        with pytest.raises(ValueError, match="dtype"):
            module(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arguments", [(3, 5), (3, 5, 2, True, False, 0.0, True, 2)], ids=["plain", "everything"])
def test_half_precision_computes_in_float32(dtype, arguments):
    half, wide = LSTM(*arguments, dtype=dtype), LSTM(*arguments)
    wide.load_state_dict(half.state_dict())
    x = torch.randn(4, 2, 3, dtype=dtype)
    answers = []
    for module, values in ((half, x), (wide, x.float())):
        y, (h, c) = module(values)
        (y.sum() + h.sum() + c.sum()).backward()
        answers.append([y, h, c, *(p.grad for p in module.parameters())])
    for a, b in zip(*answers, strict=True):
        assert torch.equal(a, b.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_the_cell(dtype):
    half, wide = LSTMCell(3, 5, dtype=dtype), LSTMCell(3, 5)
    wide.load_state_dict(half.state_dict())
    x = torch.randn(2, 3, dtype=dtype)
    for a, b in zip(half(x), wide(x.float()), strict=True):
        assert torch.equal(a, b.to(dtype))


def test_same_initial_weights_and_repr_as_torch():
    torch.manual_seed(3)
    ours = LSTM(3, 5, 2, batch_first=True)
    torch.manual_seed(3)
    theirs = torch.nn.LSTM(3, 5, 2, batch_first=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert repr(ours) == repr(theirs)
    assert repr(LSTMCell(3, 5)) == repr(torch.nn.LSTMCell(3, 5))


def test_copies_and_moves_keep_working():
    lstm = LSTM(3, 5, 2)
    x = torch.randn(4, 2, 3)
    expected = lstm(x)[0]
    assert torch.equal(copy.deepcopy(lstm)(x)[0], expected)
    assert torch.equal(pickle.loads(pickle.dumps(lstm))(x)[0], expected)
    lstm.double()
    assert lstm(x.double())[0].dtype == torch.float64
    lstm.float().flatten_parameters()
    lstm.weight_ih_l0 = torch.nn.Parameter(torch.zeros(20, 3))
    assert not torch.equal(lstm(x)[0], expected)
    replaced = {name: torch.zeros_like(p) for name, p in lstm.named_parameters()}
    assert torch.func.functional_call(lstm, replaced, (x,))[0].abs().max() == 0


def test_stream_cut_anywhere_gives_the_same_bits():
    lstm = LSTM(10, 50, 2)
    x = torch.randn(23, 3, 10)
    with torch.no_grad():
        whole, last = lstm(x)
        for cut in range(1, 23):
            first, state = lstm(x[:cut])
            second, state = lstm(x[cut:], state)
            assert torch.equal(torch.cat([first, second]), whole)
            assert torch.equal(state[0], last[0]) and torch.equal(state[1], last[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_of_a_batch_gives_the_same_bits_as_alone(dtype):
    lstm = LSTM(10, 50, 2, dtype=dtype)
    x = torch.randn(9, 14, 10, dtype=dtype)
    with torch.no_grad():
        whole, _ = lstm(x)
        for row in range(14):
            assert torch.equal(lstm(x[:, row : row + 1])[0], whole[:, row : row + 1])
        assert torch.equal(lstm(x[:, 2:9])[0], whole[:, 2:9])


def test_cell_gives_the_same_bits_as_the_layer():
    lstm, cell = LSTM(10, 21), LSTMCell(10, 21)
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in lstm.state_dict().items()})
    x = torch.randn(9, 4, 10)
    with torch.no_grad():
        whole, _ = lstm(x)
        state = None
        for step in range(9):
            state = cell(x[step], state)
            assert torch.equal(state[0], whole[step])


def test_forecaster_stream_equals_windows_to_the_bit():
    model = make_forecaster()
    x = random_steps(model, 5, 20)
    with torch.no_grad():
        forecast = model(x)
        outputs, end = model.run(x, model.initial_state(5))
        state = model.initial_state(5)
        for step in range(20):
            y, state = model.step(x[:, step], state)
            assert torch.equal(y, outputs[:, step])
    assert torch.equal(y, forecast)
    assert torch.equal(state[0], end[0]) and torch.equal(state[1], end[1])
    assert torch.equal(model(x[2]), forecast[2])


def test_forecaster_scaling_is_in_the_users_units():
    plain, scaled = make_forecaster(scaled=False), make_forecaster(scaled=True)
    x = random_steps(scaled, 5, 20)
    inside = (x - scaled.input_offset) * scaled.input_scale
    torch.testing.assert_close(scaled(x), plain(inside) * 180 + 120, rtol=0, atol=1e-3)


def test_constant_column_is_left_at_zero():
    model = Forecaster(2, 4)
    model.set_scaling(torch.tensor([5.0, 1.0]), torch.tensor([0.0, 2.0]), torch.zeros(1), torch.ones(1))
    assert model.input_scale.tolist() == [0.0, 0.5]


def test_init_range():
    model = Forecaster(10, 50, 2, init_range=0.1)
    values = torch.cat([p.flatten() for p in model.parameters()])
    assert values.abs().max() <= 0.1 and values.abs().max() > 0.099 and abs(values.mean()) < 1e-3


def test_reference_run_without_our_operators():
    """CELLSTEP_DISABLE_OPS=1: no operator of ours is even registered, scripted or eager, and the answer is the same."""
    program = """
import torch, warnings
warnings.simplefilter("ignore")
from cellstep.nn import LSTM, LSTMCell, Forecaster
assert not hasattr(torch.ops.cellstep, "lstm_layer")
torch.manual_seed(0)
x = torch.randn(5, 2, 3)
for module in (LSTM(3, 4, 2), Forecaster(3, 4, 2)):
    y = module(x)
    z = torch.jit.script(module)(x)
    y, z = (y, z) if torch.is_tensor(y) else (y[0], z[0])
    assert torch.equal(y, z)
torch.jit.script(LSTMCell(3, 4))(x[0])
assert "cellstep" not in torch.jit.script(LSTM(3, 4)).code
print(y.sum().item())
"""
    answers = []
    for value in ("0", "1"):
        environment = {**os.environ, "CELLSTEP_DISABLE_OPS": value}
        text = (
            program
            if value == "1"
            else "\n".join(line for line in program.splitlines() if not line.startswith("assert"))
        )
        done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answers.append(float(done.stdout))
    assert answers[0] == pytest.approx(answers[1], abs=2e-6)
