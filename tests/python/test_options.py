"""What LSTM has beyond torch's, each option against its paper in NumPy, against torch's autograd, and at its edges."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

from cellstep.nn import LSTM, Chain, Dense, reset_state, truncated_bptt

SIZES = 4, 6
# float64 leaves rounding of 1e-16 a step; a few hundred sums bring it to some 1e-14, layer normalisation to 1e-13.
CLOSE = {"rtol": 1e-10, "atol": 1e-11}
ACTIVATIONS = ["sigmoid", "tanh", "relu", "linear", "hard_sigmoid", "hardsigmoid", "elu"]
VARIANTS = {
    "plain": {},
    "peephole": {"peephole": True},
    "layer_norm": {"layer_norm": True},
    "coupled": {"coupled": True},
    "coupled peephole": {"coupled": True, "peephole": True},
    "projection": {"proj_size": 3},
    "cell_clip": {"cell_clip": 0.1},
    "zoneout": {"zoneout": (0.2, 0.4)},
    "residual": {"num_layers": 3, "residual": True},
    "relu": {"activation": "relu"},
    "keras": {"gate_activation": "hard_sigmoid"},
    "hardsigmoid": {"gate_activation": "hardsigmoid", "output_activation": "linear"},
    "learned": {"learn_initial_state": True},
    "two layers, two ways": {"num_layers": 2, "bidirectional": True},
    "everything": {
        "num_layers": 2,
        "bidirectional": True,
        "proj_size": 3,
        "peephole": True,
        "layer_norm": True,
        "coupled": True,
        "residual": True,
        "cell_clip": 0.5,
        "zoneout": 0.1,
        "learn_initial_state": True,
        "output_activation": "hardsigmoid",
    },
}


def make(name="plain", seed=0, **more):
    torch.manual_seed(seed)
    lstm = LSTM(*SIZES, dtype=torch.float64, **{**VARIANTS.get(name, {}), **more})
    with torch.no_grad():
        for key, parameter in lstm.named_parameters():
            if key.startswith(("norm", "initial")):  # as made, they are ones and zeros
                parameter.add_(0.3 * torch.randn_like(parameter))
    return lstm


def steps_of(lstm, steps=6, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, batch, lstm.input_size, dtype=torch.float64, generator=generator)


def state_of(lstm, batch=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    rows = lstm.num_layers * (2 if lstm.bidirectional else 1)
    sizes = (lstm.proj_size or lstm.hidden_size, lstm.hidden_size)
    return tuple(torch.randn(rows, batch, size, dtype=torch.float64, generator=generator) for size in sizes)


def assert_same(a, b, **tolerance):
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        torch.testing.assert_close(x, torch.as_tensor(y), **(tolerance or CLOSE))


def assert_bits(a, b):
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        assert torch.equal(x, y)


# The references: one step of one row, straight from the papers, in NumPy and with none of our code.


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


NUMPY_ACTIVATIONS = {
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "linear": lambda x: x,
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "hard_sigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "hardsigmoid": lambda x: np.clip((x + 3) / 6, 0, 1),
}


def weights_of(lstm, layer=0):
    return {name: p.detach().numpy() for name, p in lstm.layer_parameters(layer).items()}


def sums_of(w, x, h):
    """W x + U h + b, by gate."""
    total = w["weight_ih"] @ x + w["bias_ih"] + w["weight_hh"] @ h + w["bias_hh"]
    return total.reshape(-1, SIZES[1])


def plain_step(w, x, h, c, gate=sigmoid, candidate=np.tanh, output=np.tanh, clip=np.inf):
    """Gers, Schmidhuber and Cummins 2000, with the activations and the clipping of the cell as given."""
    i, f, g, o = sums_of(w, x, h)
    c = np.clip(gate(f) * c + gate(i) * candidate(g), -clip, clip)
    return gate(o) * output(c), c


def peephole_step(w, x, h, c):
    """Gers and Schmidhuber 2000: the gates see the cell, the output gate the new one."""
    i, f, g, o = sums_of(w, x, h)
    p_i, p_f, p_o = w["weight_peephole"].reshape(3, -1)
    new = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * np.tanh(g)
    return sigmoid(o + p_o * new) * np.tanh(new), new


def coupled_step(w, x, h, c):
    """Greff et al. 2017, CIFG: f = 1 - i."""
    i, g, o = sums_of(w, x, h)
    i = sigmoid(i)
    c = (1 - i) * c + i * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def coupled_peephole_step(w, x, h, c):
    """Greff et al. 2017, with the peepholes that are left."""
    i, g, o = sums_of(w, x, h)
    p_i, p_o = w["weight_peephole"].reshape(2, -1)
    i = sigmoid(i + p_i * c)
    c = (1 - i) * c + i * np.tanh(g)
    return sigmoid(o + p_o * c) * np.tanh(c), c


def layer_norm_step(w, x, h, c):
    """Ba, Kiros and Hinton 2016, equations 20 to 22: LN(W_h h) + LN(W_x x) + b, and LN of the cell on its way out."""

    def normal(a, gain, shift=0):
        return gain * (a - a.mean()) / np.sqrt(a.var() + 1e-5) + shift

    sums = normal(w["weight_hh"] @ h, w["norm_hh"]) + normal(w["weight_ih"] @ x, w["norm_ih"])
    i, f, g, o = (sums + w["bias_ih"] + w["bias_hh"]).reshape(4, -1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(normal(c, w["norm_c"], w["norm_c_bias"])), c


def projected_step(w, x, h, c):
    """Sak, Senior and Beaufays 2014: what comes back and out is a projection of the hidden values."""
    m, c = plain_step(w, x, h, c)
    return w["weight_hr"] @ m, c


def zoneout_step(w, x, h, c):
    """Krueger et al. 2016, at inference: each unit the expectation of keeping and changing."""
    new_h, new_c = plain_step(w, x, h, c)
    return 0.2 * h + 0.8 * new_h, 0.4 * c + 0.6 * new_c


def with_activations(**names):
    return lambda *given: plain_step(*given, **{place: NUMPY_ACTIVATIONS[name] for place, name in names.items()})


REFERENCES = {
    "plain": plain_step,
    "peephole": peephole_step,
    "layer_norm": layer_norm_step,
    "coupled": coupled_step,
    "coupled peephole": coupled_peephole_step,
    "projection": projected_step,
    "cell_clip": lambda *given: plain_step(*given, clip=0.1),
    "zoneout": zoneout_step,
    "relu": with_activations(candidate="relu", output="relu"),
    "keras": with_activations(gate="hard_sigmoid"),
    "hardsigmoid": with_activations(gate="hardsigmoid", output="linear"),
}


def numpy_run(step, w, x, h, c):
    """x (T, I): y, and c of every step."""
    outputs, cells = [], []
    for row in x:
        h, c = step(w, row, h, c)
        outputs.append(h)
        cells.append(c)
    return np.stack(outputs), np.stack(cells)


@pytest.mark.parametrize("name", REFERENCES)
def test_forward_is_what_the_paper_says(name):
    lstm = make(name, return_cell_states=True).eval()
    x, (h, c) = steps_of(lstm), state_of(lstm)
    y, (h_n, c_n), cells = lstm(x, (h, c))
    for row in range(3):
        want, want_cells = numpy_run(
            REFERENCES[name], weights_of(lstm), x[:, row].numpy(), h[0, row].numpy(), c[0, row].numpy()
        )
        assert_same((y[:, row], cells[:, row]), (want, want_cells))
        assert_same((h_n[0, row], c_n[0, row]), (want[-1], want_cells[-1]))


@pytest.mark.parametrize("names", list(itertools.product(ACTIVATIONS, repeat=2)), ids="-".join)
def test_every_activation(names):
    gate, candidate = names
    lstm = make(gate_activation=gate, activation=candidate)
    x, (h, c) = steps_of(lstm, 3), state_of(lstm)
    step = with_activations(gate=gate, candidate=candidate, output=candidate)
    want, _ = numpy_run(step, weights_of(lstm), x[:, 0].numpy(), h[0, 0].numpy(), c[0, 0].numpy())
    assert_same(lstm(x, (h, c))[0][:, 0], want)
    assert_same(torch.jit.script(lstm)(x, (h, c))[0][:, 0], want)


def test_residual_is_a_sum_of_layers():
    lstm = make("residual")
    x = steps_of(lstm)
    y = x
    for layer in range(3):
        single = torch.nn.LSTM(y.size(2), 6, dtype=torch.float64)
        single.load_state_dict({f"{name}_l0": p for name, p in lstm.layer_parameters(layer).items()})
        y = single(y)[0] if layer == 0 else single(y)[0] + y
    assert_same(lstm(x)[0], y)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_by_differences(name, training):
    """gradcheck and gradgradcheck, of the last state and of every cell too; relu and clips have corners off the way."""
    lstm = make(name, return_cell_states=True).train(training)
    x, state = steps_of(lstm, 2, 2), state_of(lstm, 2)
    reset = torch.tensor([[False, True], [True, False]]) if lstm.learn_initial_state else None

    def run(x, h, c, *parameters):
        torch.manual_seed(5)  # for the masks of zoneout
        return tuple(tree_leaves(lstm(x, (h, c), None, reset)))

    inputs = [part.requires_grad_() for part in (x, *state)]
    assert torch.autograd.gradcheck(run, (*inputs, *lstm.parameters()), fast_mode=True)
    if (
        name != "everything"
    ):  # which takes half a minute; test_kernels_equal_autograd_of_torch has its second derivatives
        assert torch.autograd.gradgradcheck(run, (*inputs, *lstm.parameters()), fast_mode=True)


MASKS = {
    "recurrent_dropout": {"recurrent_dropout": 0.4},
    "candidate": {"recurrent_dropout": 0.4, "recurrent_dropout_on": "candidate"},
    "zoneout": {"zoneout": (0.3, 0.5)},
    "all masks": {"recurrent_dropout": 0.4, "zoneout": 0.3, "proj_size": 3, "peephole": True, "layer_norm": True},
}


@pytest.mark.parametrize("name", [*VARIANTS, *MASKS])
def test_kernels_equal_autograd_of_torch(name):
    """Values, first and second derivatives of what the modules run on, against the formula on torch's operators."""
    lstm = make(**{**VARIANTS, **MASKS}[name], return_cell_states=True)
    x = steps_of(lstm)
    found = []
    for use_ops in (True, False):
        lstm.use_ops = use_ops
        torch.manual_seed(3)
        leaves = [part.clone().requires_grad_() for part in (x, *state_of(lstm))]
        outputs = tree_leaves(lstm(leaves[0], tuple(leaves[1:])))
        total = sum((part * part.detach().sin()).sum() for part in outputs)
        inputs = [*leaves, *lstm.parameters()]
        first = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first if g is not None), inputs, allow_unused=True)
        plain = torch.autograd.grad(
            sum((part * part.detach().sin()).sum() for part in tree_leaves(_again(lstm, leaves))),
            inputs,
            allow_unused=True,
        )
        grads = [torch.zeros(()) if g is None else g for g in (*first, *second, *plain)]
        found.append([*outputs, *grads])
    assert_same([part for part in found[0] if part.dim()], [part for part in found[1] if part.dim()])


def _again(lstm, leaves):
    torch.manual_seed(3)
    return lstm(leaves[0], tuple(leaves[1:]))


@pytest.mark.parametrize("name", [*VARIANTS, *MASKS])
def test_scripted_equals_eager(name):
    lstm = make(**{**VARIANTS, **MASKS}[name], return_cell_states=True)
    scripted = torch.jit.script(lstm)
    x, state = steps_of(lstm), state_of(lstm)
    lengths, reset = torch.tensor([6, 0, 3]), torch.rand(6, 3) < 0.3
    for arguments in ((x,), (x, state), (x, state, lengths), (x, state, None, reset), (x, state, lengths, reset)):
        for module in (lstm, scripted):  # TorchScript draws masks of several kinds in an order of its own
            module.train(name != "all masks")
        torch.manual_seed(4)
        expected = lstm(*arguments)
        torch.manual_seed(4)
        assert_bits(scripted(*arguments), expected)
    lstm.eval()
    assert_bits(scripted.eval()(x[:, 0]), lstm(x[:, 0]))


def test_reset_parameters_and_forget_bias():
    for coupled in (False, True):
        lstm = LSTM(
            4, 6, 2, bidirectional=True, forget_bias=1.5, coupled=coupled, layer_norm=True, learn_initial_state=True
        )
        for name, parameter in lstm.named_parameters():
            if name.startswith("bias"):
                # 1 - sigmoid(-1.5) = sigmoid(1.5)
                rows = parameter[:6] if coupled else parameter[6:12]
                value = 0.0 if "hh" in name else -1.5 if coupled else 1.5
                assert (rows == value).all()
            if name.startswith("norm"):
                assert (parameter == (0 if "bias" in name else 1)).all()
            if name.startswith("initial"):
                assert (parameter == 0).all()
        if not coupled:
            # With no input and no weights the forget gate is sigmoid of its bias.
            with torch.no_grad():
                plain = LSTM(1, 1, forget_bias=1.5)
                plain.weight_ih_l0.zero_()
                plain.weight_hh_l0.zero_()
                plain.bias_ih_l0[[0, 2, 3]] = plain.bias_hh_l0[[0, 2, 3]] = 0.0
                _, (_, c) = plain(torch.zeros(1, 1, 1), (torch.zeros(1, 1, 1), torch.ones(1, 1, 1)))
            assert c.item() == pytest.approx(torch.tensor(1.5).sigmoid().item(), rel=1e-6)
    with pytest.raises(ValueError, match="forget_bias"):
        LSTM(4, 6, bias=False, forget_bias=1.0)


def test_recurrent_dropout_is_one_mask_a_sequence():
    """Gal and Ghahramani 2016: the same hidden values are dropped at every step of a row, the rest are scaled."""
    lstm = make(recurrent_dropout=0.5)
    x, (h, c) = steps_of(lstm, 7, 2), state_of(lstm, 2)
    torch.manual_seed(9)
    y, _ = lstm(x, (h, c))
    torch.manual_seed(9)
    mask = torch.nn.functional.dropout(torch.ones(2, 6, dtype=torch.float64), 0.5)
    assert set(mask.unique().tolist()) == {0.0, 2.0}

    def step(w, x, h, c):
        return plain_step(w, x, h * mask[row].numpy(), c)

    for row in range(2):
        want, _ = numpy_run(step, weights_of(lstm), x[:, row].numpy(), h[0, row].numpy(), c[0, row].numpy())
        assert_same(y[:, row], want)
    assert not torch.equal(lstm(x)[0], lstm(x)[0])
    assert_bits(lstm.eval()(x), make()(x))


def test_recurrent_dropout_on_the_candidate():
    """Semeniuta et al. 2016: only what is written to the cell is dropped, so that no memory is lost."""
    lstm = make(recurrent_dropout=0.5, recurrent_dropout_on="candidate")
    x, (h, c) = steps_of(lstm, 7, 1), state_of(lstm, 1)
    torch.manual_seed(9)
    y, _ = lstm(x, (h, c))
    torch.manual_seed(9)
    mask = torch.nn.functional.dropout(torch.ones(1, 6, dtype=torch.float64), 0.5)[0].numpy()

    def step(w, x, h, c):
        i, f, g, o = sums_of(w, x, h)
        c = sigmoid(f) * c + sigmoid(i) * mask * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c

    want, _ = numpy_run(step, weights_of(lstm), x[:, 0].numpy(), h[0, 0].numpy(), c[0, 0].numpy())
    assert_same(y[:, 0], want)
    assert_bits(lstm.eval()(x), make()(x))


def test_weight_drop():
    """Merity et al. 2018: the recurrent weights themselves are dropped, once a sequence, the same for every row."""
    lstm = make(weight_drop=0.5, num_layers=2)
    x = steps_of(lstm)
    torch.manual_seed(9)
    y, _ = lstm(x)
    torch.manual_seed(9)
    theirs = torch.nn.LSTM(*SIZES, 2, dtype=torch.float64)
    dropped = dict(lstm.state_dict())
    torch.manual_seed(9)
    for layer in range(2):
        dropped[f"weight_hh_l{layer}"] = torch.nn.functional.dropout(dropped[f"weight_hh_l{layer}"], 0.5)
    theirs.load_state_dict(dropped)
    assert_same(y, theirs(x)[0])
    y.sum().backward()
    assert ((lstm.weight_hh_l1.grad == 0) == (dropped["weight_hh_l1"] == 0)).all()
    assert_bits(lstm.eval()(x), make(num_layers=2)(x))


def test_zoneout_keeps_units_as_often_as_it_says():
    lstm = make(zoneout=(0.3, 0.6), return_cell_states=True)
    x = steps_of(lstm, 40, 50)
    y, _, cells = lstm(x)
    kept_h, kept_c = (y[1:] == y[:-1]).double().mean(), (cells[1:] == cells[:-1]).double().mean()
    # 12,000 draws: the share is within 0.02 of the probability, 4 of its standard deviations.
    assert abs(kept_h - 0.3) < 0.02 and abs(kept_c - 0.6) < 0.02
    # Krueger et al. 2016, in training: each unit old or new, h from the cell before it was kept.
    w, (h, c) = weights_of(lstm), (y[4, 3].detach().numpy(), cells[4, 3].detach().numpy())
    new_h, new_c = plain_step(w, x[5, 3].numpy(), h, c)
    for got, old, new in ((y[5, 3], h, new_h), (cells[5, 3], c, new_c)):
        got = got.detach().numpy()
        assert (np.isclose(got, old, rtol=1e-12) | np.isclose(got, new, rtol=1e-10)).all()
    with pytest.raises(ValueError, match="zoneout"):
        LSTM(3, 4, zoneout=(0.1, 1.5))


@pytest.mark.parametrize("name", MASKS)
def test_seeds_decide_the_masks(name):
    lstm = make(**MASKS[name])
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        lstm.zero_grad()
        y, _ = lstm(steps_of(lstm))
        y.square().sum().backward()
        answers.append([y, *(p.grad.clone() for p in lstm.parameters())])
    assert_bits(answers[0], answers[1])
    assert not torch.equal(answers[0][0], answers[2][0])
    lstm.eval()
    assert_bits(lstm(steps_of(lstm)), lstm(steps_of(lstm)))


def test_learned_initial_state():
    lstm = make("learned", num_layers=2, bidirectional=True)
    x = steps_of(lstm)
    state = tuple(part.unsqueeze(1).repeat(1, 3, 1) for part in (lstm.initial_h, lstm.initial_c))
    assert_bits(lstm(x), lstm(x, state))
    assert_bits(lstm(x[:, 0]), lstm(x[:, 0], tuple(part[:, 0] for part in state)))
    packed = pack_padded_sequence(x, [3, 6, 1], enforce_sorted=False)
    assert_bits(lstm(packed)[0].data, lstm(packed, state)[0].data)
    lstm(x)[0].sum().backward()
    given = [lstm.initial_h.grad.clone(), lstm.initial_c.grad.clone()]
    theirs = torch.nn.LSTM(*SIZES, 2, bidirectional=True, dtype=torch.float64)
    theirs.load_state_dict({name: p for name, p in lstm.state_dict().items() if not name.startswith("initial")})
    leaves = [part.detach().requires_grad_() for part in state]
    theirs(x, tuple(leaves))[0].sum().backward()
    assert_same(given, [leaf.grad.sum(1) for leaf in leaves])
    lstm.zero_grad()
    lstm(x, tuple(torch.zeros_like(part) for part in state))[0].sum().backward()
    assert lstm.initial_h.grad is None
    reset = torch.zeros(6, 3, dtype=torch.bool)
    reset[3] = True
    lstm(x, tuple(torch.zeros_like(part) for part in state), None, reset)[0].sum().backward()
    assert lstm.initial_h.grad.abs().min() > 0 and lstm.initial_c.grad.abs().min() > 0


@pytest.mark.parametrize("bidirectional", [False, True])
def test_cell_states_of_every_step(bidirectional):
    lstm = make(num_layers=2, bidirectional=bidirectional, return_cell_states=True)
    plain = make(num_layers=2, bidirectional=bidirectional)
    x = steps_of(lstm)
    y, (h, c), cells = lstm(x)
    assert_bits((y, (h, c)), plain(x))
    assert cells.shape == (6, 3, 12 if bidirectional else 6)
    assert_bits(cells[-1, :, :6], c[-2 if bidirectional else -1])
    if bidirectional:
        assert_bits(cells[0, :, 6:], c[-1])
    else:
        for step in range(6):
            assert_bits(cells[step], plain(x[: step + 1])[1][1][-1])
    assert_bits(lstm(x[:, 1])[2], cells[:, 1])
    packed = pack_padded_sequence(x, [2, 6, 4], enforce_sorted=False)
    padded = lstm(x, lengths=[2, 6, 4])
    for mine, theirs in ((lstm(packed)[0], padded[0]), (lstm(packed)[2], padded[2])):
        assert_bits(pad_packed_sequence(mine)[0], theirs)
    assert padded[2][2:, 0].abs().sum() == 0
    batch_first = LSTM(*SIZES, 2, bidirectional=bidirectional, return_cell_states=True, batch_first=True).double()
    batch_first.load_state_dict(lstm.state_dict())
    assert_bits(batch_first(x.transpose(0, 1))[2].transpose(0, 1), cells)


def pieces_of(lstm, x, flags, state):
    """One row (T, I) run piece by piece, each from the initial state except at the given ends."""
    starts = [0, *(step for step in range(1, len(x)) if flags[step])]
    ends = [*starts[1:], len(x)]
    ways = 2 if lstm.bidirectional else 1
    outputs, last_h, last_c = [], None, None
    fresh = tuple(part[:, 0] for part in lstm.initial_state(1))
    for begin, end in zip(starts, ends, strict=True):
        h, c = (part.clone() for part in fresh)
        for way in range(ways):
            if way == 0 and begin == 0 and not flags[0]:
                h[0::ways], c[0::ways] = state[0][0::ways], state[1][0::ways]
            if way == 1 and end == len(x):
                h[1::ways], c[1::ways] = state[0][1::ways], state[1][1::ways]
        y, (h, c) = lstm(x[begin:end], (h, c))
        outputs.append(y)
        if last_h is None:
            last_h, last_c = h, c
        else:
            last_h[0::ways], last_c[0::ways] = h[0::ways], c[0::ways]
    return torch.cat(outputs), (last_h, last_c)


@pytest.mark.parametrize("lengths", [None, (7, 0, 4, 2)], ids=["whole", "ragged"])
@pytest.mark.parametrize("name", VARIANTS)
def test_reset_equals_pieces_run_alone(name, lengths):
    """Both ways: nothing crosses a flag, in the direction that runs backwards either."""
    lstm = make(name).eval()
    x, state = steps_of(lstm, 7, 4), state_of(lstm, 4)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for kind in (torch.bool, torch.uint8, torch.float32):
            reset = torch.rand(7, 4, generator=generator) < 0.4
            y, (h, c) = lstm(x, state, lengths, reset.to(kind))
            for row in range(4):
                length = 7 if lengths is None else lengths[row]
                given_state = tuple(part[:, row] for part in state)
                if length == 0:
                    assert_bits((h[:, row], c[:, row]), given_state)
                    continue
                alone = pieces_of(lstm, x[:length, row], reset[:length, row], given_state)
                assert_bits((y[:length, row], (h[:, row], c[:, row])), alone)
                assert y[length:, row].abs().sum() == 0


def test_reset_at_the_first_step_and_in_batch_first():
    lstm = make("learned", num_layers=2)
    x, state = steps_of(lstm), state_of(lstm)
    first = torch.zeros(6, 3, dtype=torch.bool)
    first[0, 1] = True
    rows = torch.tensor([False, True, False])
    fresh = lstm.initial_state(3)
    assert_bits(lstm(x, state, None, first), lstm(x, reset_state(state, rows, fresh)))
    other = LSTM(*SIZES, 2, learn_initial_state=True, batch_first=True, dtype=torch.float64)
    other.load_state_dict(lstm.state_dict())
    y, last = other(x.transpose(0, 1), state, None, first.t())
    assert_bits((y.transpose(0, 1), last), lstm(x, state, None, first))
    assert_bits(lstm(x[:, 1], None, None, first[:, 1])[0], lstm(x[:, 1])[0])
    for wrong in (first[:5], first[:, :2], first[0]):
        with pytest.raises(ValueError, match="reset"):
            lstm(x, state, None, wrong)
    with pytest.raises(ValueError, match="PackedSequence"):
        lstm(pack_padded_sequence(x, [6, 5, 1]), None, None, first)


def test_reset_in_a_deploy_file_goes_both_ways(tmp_path):
    """The torch-free engine parts a sequence where the module does."""
    import cellstep

    torch.manual_seed(0)
    model = Chain(
        LSTM(4, 5, 2, bidirectional=True), LSTM(10, 6, peephole=True, bidirectional=True), Dense(12, 2)
    ).eval()
    cellstep.export(model, tmp_path / "model.pt")
    exported = torch.jit.load(tmp_path / "model.pt")
    x = torch.randn(3, 8, 4)
    reset = torch.rand(3, 8) < 0.3
    with torch.no_grad():
        expected = model.run(x, model.initial_state(3), reset)
        assert_same(exported.run(x, exported.initial_state(3), reset), expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(model.run(x, model.initial_state(3))[0], expected[0], atol=1e-3)


@pytest.mark.parametrize("name", [name for name in VARIANTS if not VARIANTS[name].get("bidirectional")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streams_cut_anywhere_give_the_same_bits(name, dtype):
    lstm = make(name).to(dtype).eval()
    x, state = steps_of(lstm, 9).to(dtype), tuple(part.to(dtype) for part in state_of(lstm))
    reset = torch.rand(9, 3) < 0.2
    with torch.no_grad():
        for flags in (None, reset):
            whole, last = lstm(x, state, None, flags)
            for cut in range(1, 9):
                first, middle = lstm(x[:cut], state, None, None if flags is None else flags[:cut])
                second, end = lstm(x[cut:], middle, None, None if flags is None else flags[cut:])
                assert_bits((torch.cat([first, second]), end), (whole, last))
        for row in range(3):
            assert_bits(
                lstm(x[:, row : row + 1], tuple(part[:, row : row + 1] for part in state))[0],
                lstm(x, state)[0][:, row : row + 1],
            )


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("filling", [torch.nan, 1e300])
def test_what_lies_past_the_end_of_a_row_reaches_nothing(name, filling):
    """Linear activations blow up past the end, and a NaN times a gradient of zero is one."""
    lstm = make(name)
    lengths = torch.tensor([6, 0, 2])
    past = (torch.arange(6).unsqueeze(1) >= lengths).unsqueeze(2)
    found = []
    for fill in (0.0, filling):
        torch.manual_seed(3)
        x = steps_of(lstm).masked_fill(past, fill).requires_grad_()
        outputs = tree_leaves(lstm(x, state_of(lstm), lengths))
        total = sum(part.square().sum() for part in outputs)
        grads = torch.autograd.grad(total, [x, *lstm.parameters()], allow_unused=True)
        found.append([*outputs, *(g for g in grads if g is not None)])
    assert_bits(*found)
    assert all(part.isfinite().all() for part in found[0])


def test_a_growing_state_past_the_end_of_a_row():
    """With nothing to bound it, what a row would come to in 2,000 more steps is infinite."""
    lstm = make(gate_activation="linear", activation="linear")
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.fill_(1.5)
    x = torch.ones(2000, 2, 4, dtype=torch.float64) / 10
    x[3:] = 0
    y, last = lstm(x, lengths=[2, 1])
    assert_bits(y[:2, :1], lstm(x[:2, :1])[0])
    (y.sum() + last[0].sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in lstm.parameters())


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("how", ["whole", "lengths", "cells"])
def test_memory_efficient_gives_the_same_bits(how, bidirectional):
    options = {"num_layers": 2, "bidirectional": bidirectional, "return_cell_states": how == "cells"}
    found = []
    for efficient in (False, True):
        lstm = make(memory_efficient=efficient, **options)
        leaves = [part.requires_grad_() for part in (steps_of(lstm), *state_of(lstm))]
        outputs = tree_leaves(lstm(leaves[0], tuple(leaves[1:]), [6, 0, 3] if how == "lengths" else None))
        total = sum((part * part.detach().sin()).sum() for part in outputs)
        found.append([*outputs, *torch.autograd.grad(total, [*leaves, *lstm.parameters()])])
    assert_bits(*found)


def saved_bytes(lstm, x, *arguments):
    """What a forward pass keeps for the backward pass, each piece of memory once, without parameters and the input."""
    known = {part.untyped_storage().data_ptr() for part in (x, *lstm.parameters())}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer = lstm(x, *arguments)
    return sum(sizes.values()), answer


@pytest.mark.parametrize("lengths", [None, torch.full((16,), 1000)], ids=["whole", "lengths"])
def test_memory_that_memory_efficient_saves(lengths):
    """The figures of LSTM's docstring: 128 units, 16 rows, 1,000 steps, inputs as many as units."""
    kept = {}
    for efficient in (False, True):
        lstm = LSTM(128, 128, memory_efficient=efficient)
        kept[efficient], _ = saved_bytes(lstm, torch.randn(1000, 16, 128), None, lengths)
    values = 1000 * 16 * 128 * 4
    # The four gates and c; and y, and with lengths the input packed and the place of each of its rows.
    assert kept[False] - kept[True] == pytest.approx(5 * values, rel=0.01)
    assert kept[True] == pytest.approx(values if lengths is None else 2 * values, rel=0.01)


def test_truncated_bptt_carries_the_state_and_cuts_the_gradient():
    for batch_first in (False, True):
        torch.manual_seed(0)
        lstm = LSTM(4, 6, 2, batch_first=batch_first, dtype=torch.float64)
        x = torch.randn(11, 3, 4, dtype=torch.float64)
        sequence = x.transpose(0, 1) if batch_first else x
        whole, last = lstm(sequence)
        outputs, grads = [], []
        for output, state in truncated_bptt(lstm, sequence, 4):
            assert not state[0].requires_grad
            lstm.zero_grad()
            output.sum().backward()
            outputs.append(output.detach())
            grads.append(lstm.weight_hh_l0.grad.clone())
        assert [part.size(1 if batch_first else 0) for part in outputs] == [4, 4, 3]
        assert_bits((torch.cat(outputs, 1 if batch_first else 0), state), (whole, last))
        begin = lstm(sequence.narrow(1 if batch_first else 0, 0, 8))[1]
        lstm.zero_grad()
        tail = sequence.narrow(1 if batch_first else 0, 8, 3)
        lstm(tail, tuple(part.detach() for part in begin))[0].sum().backward()
        assert_same(grads[-1], lstm.weight_hh_l0.grad)
    assert [out.shape[0] for out, _ in truncated_bptt(lstm, sequence[0], 5)] == [5, 5, 1]
    model = Chain(LSTM(4, 6), Dense(6, 1)).double()
    parts = [output for output, _ in truncated_bptt(model, x.transpose(0, 1), 4)]
    assert_same(torch.cat(parts, 1), model.run(x.transpose(0, 1), model.initial_state(3))[0])
    with pytest.raises(ValueError, match="chunk"):
        next(truncated_bptt(lstm, sequence, 0))


def test_reset_state():
    state = torch.randn(2, 3, 6), torch.randn(2, 3, 4)
    for mask in (torch.tensor([True, False, True]), torch.tensor([1, 0, 1], dtype=torch.uint8)):
        h, c = reset_state(state, mask)
        assert h[:, [0, 2]].abs().sum() == c[:, [0, 2]].abs().sum() == 0
        assert_bits((h[:, 1], c[:, 1]), (state[0][:, 1], state[1][:, 1]))
    fresh = torch.ones(2, 3, 6), torch.ones(2, 3, 4)
    assert_bits(reset_state(state, torch.tensor([True] * 3), fresh), fresh)


@pytest.mark.parametrize("name", [*VARIANTS, *MASKS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_and_autocast(name, dtype):
    """On torch's operators where ours do not go; half precision keeps 8 bits, and a step loses half of the last."""
    lstm = make(**{**VARIANTS, **MASKS}[name], return_cell_states=True).eval()
    x, lengths = steps_of(lstm), torch.tensor([6, 0, 3])
    expected = tree_leaves(lstm(x, None, lengths))
    tolerance = {"rtol": 0, "atol": 0.1 if dtype == torch.bfloat16 else 1e-5}
    answers = tree_leaves(lstm.to(dtype)(x.to(dtype), None, lengths))
    assert all(part.dtype == dtype for part in answers)
    assert_same([part.double() for part in answers], expected, **tolerance)
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            answers = tree_leaves(lstm(x.float(), None, lengths))
        assert_same([part.double() for part in answers], expected, rtol=0, atol=0.1)
        sum(part.float().sum() for part in answers).backward()
        assert all(
            p.grad.dtype == torch.float32 for n, p in lstm.named_parameters() if n != "initial_h" and n != "initial_c"
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_vmap_forward_mode_and_hessians(name):
    lstm = make(name).eval()
    xs = torch.stack([steps_of(lstm, 3, 2, seed) for seed in range(3)])
    assert_same(torch.vmap(lambda x: lstm(x)[0])(xs), torch.stack([lstm(x)[0] for x in xs]))
    resets = torch.rand(3, 3, 2) < 0.4
    lengths = torch.tensor([[3, 0], [1, 2], [3, 3]])
    mapped = torch.vmap(lambda x, n, r: lstm(x, None, n, r)[0])(xs, lengths, resets)
    assert_same(mapped, torch.stack([lstm(x, None, n, r)[0] for x, n, r in zip(xs, lengths, resets, strict=True)]))
    x, tangent = xs[0], xs[1]
    _, forward = torch.func.jvp(lambda x: lstm(x)[0], (x,), (tangent,))
    jacobian = torch.autograd.functional.jacobian(lambda x: lstm(x)[0], x)
    assert_same(forward, torch.einsum("abcijk,ijk->abc", jacobian, tangent))
    assert_same(torch.func.jacrev(lambda x: lstm(x)[0])(x), jacobian)


def test_masks_under_vmap_need_a_choice_of_randomness():
    lstm = make(**MASKS["all masks"])
    xs = steps_of(lstm, 3, 2).unsqueeze(0).repeat(4, 1, 1, 1)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda x: lstm(x)[0])(xs)
    same = torch.vmap(lambda x: lstm(x)[0], randomness="same")(xs)
    assert_bits(same[0], same[1])
    different = torch.vmap(lambda x: lstm(x)[0], randomness="different")(xs)
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize(
    "options",
    [
        {"zoneout": -0.1},
        {"zoneout": [0.1, 0.1]},
        {"recurrent_dropout": 1.1},
        {"recurrent_dropout_on": "input"},
        {"weight_drop": "much"},
        {"cell_clip": -1.0},
        {"cell_clip": float("nan")},
        {"activation": "softmax"},
        {"gate_activation": "swish"},
        {"output_activation": "none"},
    ],
    ids=str,
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match="got"):
        LSTM(3, 4, **options)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_options_equal_the_formula_on_torchs_operators(data):
    """Shapes, options, lengths, resets: the module on kernels against its twin that runs on none, with gradients."""
    draw = data.draw
    hidden = draw(st.integers(1, 19), "hidden_size")
    activation = st.sampled_from(["tanh", "sigmoid", "linear", "hard_sigmoid"])
    options = {
        "num_layers": draw(st.integers(1, 3), "num_layers"),
        "proj_size": draw(st.integers(0, hidden - 1), "proj_size"),
        "gate_activation": draw(st.sampled_from(["sigmoid", "hard_sigmoid"]), "gate_activation"),
        "activation": draw(activation, "activation"),
        "output_activation": draw(activation, "output_activation"),
        "cell_clip": draw(st.sampled_from([None, 0.3, 5.0]), "cell_clip"),
        "zoneout": draw(st.sampled_from([0.0, 0.2, (0.1, 0.0)]), "zoneout"),
    }
    for name in ("bias", "batch_first", "bidirectional", "peephole", "layer_norm", "coupled", "residual"):
        options[name] = draw(st.booleans(), name)
    for name in ("learn_initial_state", "return_cell_states", "memory_efficient"):
        options[name] = draw(st.booleans(), name)
    inputs, steps, batch = (draw(st.integers(1, most)) for most in (7, 6, 4))
    torch.manual_seed(draw(st.integers(0, 1000), "seed"))
    lstm = LSTM(inputs, hidden, dtype=torch.float64, **options).eval()
    x = torch.randn(batch, steps, inputs) if lstm.batch_first else torch.randn(steps, batch, inputs)
    lengths = draw(st.none() | st.lists(st.integers(0, steps), min_size=batch, max_size=batch), "lengths")
    reset = (torch.rand(x.shape[:2]) < 0.3) if draw(st.booleans(), "reset") else None
    state = state_of(lstm, batch) if draw(st.booleans(), "state") else None
    found = []
    for use_ops in (True, False):
        lstm.use_ops = use_ops
        leaf = x.double().requires_grad_()
        outputs = tree_leaves(lstm(leaf, state, lengths, reset))
        total = sum((part * part.detach().cos()).sum() for part in outputs)
        grads = torch.autograd.grad(total, [leaf, *lstm.parameters()], allow_unused=True)
        found.append([*outputs, *(torch.zeros(1) if g is None else g for g in grads)])
    for a, b in zip(*found, strict=True):
        if a.shape == b.shape:  # what one road leaves out, the other may give as zeros
            # Layer normalisation of one unit divides by the root of 1e-5, and so do errors.
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
        else:
            assert a.abs().sum() == b.abs().sum() == 0


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_reset_and_cut_equals_pieces(data):
    """A stream in random chunks with random flags, against every piece alone, to the bit."""
    draw = data.draw
    name = draw(st.sampled_from([name for name in VARIANTS if not VARIANTS[name].get("bidirectional")]))
    lstm = make(name).eval()
    steps = draw(st.integers(1, 9))
    flags = torch.tensor(draw(st.lists(st.booleans(), min_size=steps, max_size=steps)))
    cuts = sorted(draw(st.sets(st.integers(1, steps), max_size=3)) - {steps})
    x, state = steps_of(lstm, steps, 1), state_of(lstm, 1)
    with torch.no_grad():
        expected = pieces_of(lstm, x[:, 0], flags, tuple(part[:, 0] for part in state))
        parts = []
        for piece, marks in zip(x.tensor_split(cuts), flags.unsqueeze(1).tensor_split(cuts), strict=True):
            y, state = lstm(piece, state, None, marks)
            parts.append(y)
    assert_bits((torch.cat(parts)[:, 0], tuple(part[:, 0] for part in state)), expected)
