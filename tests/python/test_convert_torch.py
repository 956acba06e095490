"""Against torch's own LSTM and LSTMCell: what goes in and comes out, and what is swapped inside a model."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from cellstep.convert import from_torch, replace_lstm, to_torch
from cellstep.nn import LSTM, Chain, Dense, LSTMCell

# Outputs are below 1, sums run over some 20 terms and a handful of steps, and the orders of summation differ.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

OPTIONS = [
    {},
    {"bias": False, "batch_first": True},
    {"num_layers": 3, "dropout": 0.25},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "proj_size": 3},
    {"dtype": torch.float64, "bidirectional": True, "bias": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_lstm_goes_in_and_out(options):
    theirs = nn.LSTM(4, 6, **options).eval()
    theirs.weight_hh_l0.requires_grad_(False)
    ours = from_torch(theirs)
    x = torch.randn(5, 7, 4, dtype=theirs.weight_ih_l0.dtype)
    expected, got = theirs(x), ours(x)
    torch.testing.assert_close(got, expected, **CLOSE)
    back = to_torch(ours)
    for new in (ours, back):
        assert not new.training
        assert new.dropout == theirs.dropout
        assert not new.weight_hh_l0.requires_grad
        assert new.weight_ih_l0.requires_grad
        assert list(new.state_dict()) == list(theirs.state_dict())
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in new.state_dict().items())
        assert new.weight_ih_l0.data_ptr() != theirs.weight_ih_l0.data_ptr()
    assert type(back) is nn.LSTM
    assert repr(back) == repr(theirs)
    # torch.nn.LSTM runs on a list of its own, not on its attributes.
    torch.testing.assert_close(back(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_cell_goes_in_and_out(bias):
    theirs = nn.LSTMCell(4, 6, bias)
    ours = from_torch(theirs)
    x, state = torch.randn(5, 4), (torch.randn(5, 6), torch.randn(5, 6))
    torch.testing.assert_close(ours(x, state), theirs(x, state), **CLOSE)
    back = to_torch(ours)
    assert type(back) is nn.LSTMCell
    torch.testing.assert_close(back(x, state), theirs(x, state), rtol=0, atol=0)


def test_one_dropout_layer_warns_no_second_time():
    with pytest.warns(UserWarning, match="dropout"):
        theirs = nn.LSTM(2, 3, dropout=0.5)
    assert to_torch(from_torch(theirs)).dropout == 0.5
    assert replace_lstm(theirs).dropout == 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"peephole": True},
        {"layer_norm": True},
        {"coupled": True},
        {"num_layers": 2, "residual": True},
        {"gate_activation": "hard_sigmoid"},
        {"activation": "relu", "output_activation": "tanh"},
        {"output_activation": "relu"},
        {"cell_clip": 3.0},
        {"zoneout": (0.0, 0.1)},
        {"recurrent_dropout": 0.1},
        {"weight_drop": 0.1},
        {"learn_initial_state": True},
        {"return_cell_states": True},
    ],
    ids=str,
)
def test_what_torch_lacks_is_refused(options):
    name = next(key for key in options if key != "num_layers")
    with pytest.raises(ValueError, match=f"expected options that torch.nn.LSTM has; got .*{name}"):
        to_torch(LSTM(2, 3, **options))


def test_what_changes_no_number_is_no_reason_to_refuse():
    to_torch(LSTM(2, 3, residual=True, memory_efficient=True, forget_bias=1.0))


class OwnForward(nn.LSTM):
    def forward(self, x, hx=None):
        return super().forward(-x, hx)


def test_other_modules_are_refused():
    for module in (nn.GRU(2, 3), OwnForward(2, 3), nn.Sequential(nn.LSTM(2, 3))):
        with pytest.raises(TypeError, match="expected torch.nn.LSTM"):
            from_torch(module)
    for module in (nn.LSTM(2, 3), Chain(LSTM(2, 3))):
        with pytest.raises(TypeError, match="expected cellstep.nn.LSTM"):
            to_torch(module)


class Encoder(nn.Module):
    """LSTMs in every place that a module can lie in, one of them in two places, and two with one weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.LSTM(4, 5, batch_first=True, bidirectional=True)
        self.stack = nn.ModuleList([nn.LSTM(10, 10, batch_first=True) for _ in range(2)])
        self.named = nn.ModuleDict({"again": self.stack[0]})
        self.also = self.stack[0]
        self.tied = nn.LSTM(10, 10, batch_first=True)
        self.tied.weight_hh_l0 = self.stack[1].weight_hh_l0
        self.cell = nn.LSTMCell(10, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        y, _ = self.first(x)
        for layer in (*self.stack, self.named["again"], self.also, self.tied):
            y, _ = layer(y)
        h, _ = self.cell(y[:, -1])
        return self.head(h)


def test_replace_lstm_in_a_model_that_is_being_trained():
    torch.manual_seed(0)
    theirs = Encoder()
    ours = copy.deepcopy(theirs)
    x, target = torch.randn(6, 5, 4), torch.randn(6, 1)
    optimizers = [torch.optim.Adam(model.parameters(), 0.01) for model in (theirs, ours)]
    parameters = dict(ours.named_parameters(remove_duplicate=False))

    assert replace_lstm(ours) is ours

    assert not any(isinstance(module, (nn.LSTM, nn.LSTMCell)) for module in ours.modules())
    assert isinstance(ours.first, LSTM)
    assert isinstance(ours.cell, LSTMCell)
    assert ours.stack[0] is ours.named["again"] is ours.also
    assert list(ours.state_dict()) == list(theirs.state_dict())
    after = dict(ours.named_parameters(remove_duplicate=False))
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] for name in parameters)
    for _ in range(5):
        losses = []
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        # Adam divides by a root of the squared gradients, so rounding grows a little from step to step.
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("layer", [nn.LSTM(4, 6, 2, bidirectional=True), nn.LSTMCell(4, 6)], ids=["LSTM", "LSTMCell"])
def test_replace_lstm_of_the_layer_itself(layer):
    layer.eval()
    ours = replace_lstm(layer)
    assert isinstance(ours, (LSTM, LSTMCell))
    assert not ours.training
    assert all(a is b for a, b in zip(ours.parameters(), layer.parameters(), strict=True))
    x = torch.randn(3, 5, 4) if isinstance(layer, nn.LSTM) else torch.randn(5, 4)
    torch.testing.assert_close(ours(x), layer(x), **CLOSE)


def test_hooks_go_along():
    model = nn.Sequential(nn.LSTM(4, 6))
    calls = []
    handle = model[0].register_forward_hook(lambda module, args, output: calls.append(module))
    model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    x = torch.randn(3, 5, 4)
    expected, _ = model(x)
    replace_lstm(model)
    y, _ = model(x)
    torch.testing.assert_close(y, expected, **CLOSE)
    assert calls[1] is model[0]
    assert isinstance(calls[1], LSTM)
    handle.remove()
    model(x)
    assert len(calls) == 2


def weight_norm(layer):
    return parametrizations.weight_norm(layer, "weight_hh_l0")


def pruned(layer):
    prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)
    return layer


def old_weight_norm(layer):
    return nn.utils.weight_norm(layer, "weight_hh_l0")


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("change", [weight_norm, pruned, old_weight_norm])
def test_computed_weights_go_along(change):
    torch.manual_seed(0)
    theirs = nn.Sequential(change(nn.LSTM(4, 6, bidirectional=True)))
    ours = copy.deepcopy(theirs) if change is weight_norm else nn.Sequential(change(nn.LSTM(4, 6, bidirectional=True)))
    ours.load_state_dict(theirs.state_dict())
    computed = ours[0].weight_hh_l0.clone()
    replace_lstm(ours)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours[0].weight_hh_l0, computed)
    x = torch.randn(3, 5, 4)
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(x)[0].sum().backward()
        optimizer.step()
    # After a step of training, so that a weight that is no longer computed would show.
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], **CLOSE)
    torch.testing.assert_close(from_torch(theirs[0])(x)[0], theirs(x)[0], **CLOSE)
    if change is weight_norm:
        parametrize.remove_parametrizations(ours[0], "weight_hh_l0")
        assert type(ours[0]) is LSTM
        torch.testing.assert_close(ours(x)[0], theirs(x)[0], **CLOSE)


def test_a_refusal_changes_nothing():
    for other in (OwnForward(2, 3), torch.jit.script(nn.Sequential(nn.LSTM(2, 3)))):
        model = nn.Sequential(nn.LSTM(2, 3), other)
        with pytest.raises(ValueError, match=r"at '1(\.0)?'"):
            replace_lstm(model)
        assert isinstance(model[0], nn.LSTM)


@pytest.mark.parametrize("answers", ["last", "hidden"])
def test_a_head_on_the_last_output_and_one_on_the_last_states(answers):
    """The backward half of y[:, -1] has seen one step, that of h_n the whole sequence."""
    torch.manual_seed(0)
    lstm, head = nn.LSTM(3, 4, batch_first=True, bidirectional=True), nn.Linear(8, 2)
    x = torch.randn(5, 6, 3)
    y, (h, _) = lstm(x)
    expected = {"last": head(y[:, -1]), "hidden": head(torch.cat([h[0], h[1]], 1))}
    dense = Dense(8, 2)
    dense.load_state_dict(head.state_dict())
    chain = Chain(from_torch(lstm), dense, answers=answers)
    torch.testing.assert_close(chain(x), expected[answers], **CLOSE)
    assert (expected["last"] - expected["hidden"]).abs().max() > 0.01
