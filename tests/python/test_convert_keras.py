"""Against Keras 3 itself, on torch's operators but with its own formula of a step."""

import os

import numpy as np
import pytest
import torch

from cellstep.convert import from_keras, from_keras_model, from_torch, to_keras
from cellstep.nn import LSTM, Chain

# Keras with NumPy 2: its variables have an old __array__.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

# float32 on outputs below 1, with sums of some 20 terms in another order.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    os.environ["KERAS_BACKEND"] = "torch"
    os.environ["KERAS_HOME"] = str(tmp_path_factory.mktemp("keras"))  # it writes its configuration there
    import keras

    assert keras.backend.backend() == "torch"
    keras.utils.set_random_seed(0)
    return keras


@pytest.fixture(scope="module")
def x():
    return torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))


def built(layer, x):
    """The layer with weights that are all at work: Keras' own biases start at 0 and 1."""
    layer(x)
    rng = np.random.default_rng(0)
    layer.set_weights([rng.normal(0, 0.5, weight.shape).astype(np.float32) for weight in layer.get_weights()])
    return layer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias": False},
        {"recurrent_activation": "hard_sigmoid", "activation": "relu"},
        {"recurrent_activation": "sigmoid", "activation": "elu"},
        {"activation": "linear", "recurrent_activation": "tanh"},
        {"unroll": True},
    ],
    ids=str,
)
def test_an_lstm_layer(keras, x, options):
    layer = built(keras.layers.LSTM(4, return_sequences=True, return_state=True, **options), x)
    lstm = from_keras(layer)
    y, h, c = layer(x)
    got, (got_h, got_c) = lstm(x)
    torch.testing.assert_close((got, got_h[0], got_c[0]), (y, h, c), **CLOSE)
    assert lstm.bias == options.get("use_bias", True)


def test_a_list_of_weights(keras, x):
    layer = built(keras.layers.LSTM(4, recurrent_activation="hard_sigmoid"), x)
    # Not the layer, so its activation is not known; Keras 3's is hardsigmoid by torch's name.
    y, (h, _) = from_keras(layer.get_weights(), recurrent_activation="hardsigmoid")(x)
    torch.testing.assert_close(h[0], layer(x), **CLOSE)
    assert (from_keras(layer.get_weights())(x)[0][:, -1] - layer(x)).abs().max() > 1e-3


def test_hard_sigmoid_of_keras_2(keras, x):
    def hard_sigmoid(values):
        return torch.clamp(0.2 * torch.as_tensor(values) + 0.5, 0, 1)

    class Keras2(keras.layers.LSTM):
        def get_config(self):
            return {**super().get_config(), "recurrent_activation": "hard_sigmoid"}

    layer = built(Keras2(4, recurrent_activation=hard_sigmoid), x)
    lstm = from_keras(layer)
    assert lstm.gate_activation == "hard_sigmoid"
    torch.testing.assert_close(lstm(x)[0][:, -1], layer(x), **CLOSE)


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_bidirectional_layer(keras, x, use_bias):
    layer = built(keras.layers.Bidirectional(keras.layers.LSTM(4, return_sequences=True, use_bias=use_bias)), x)
    lstm = from_keras(layer)
    y, (h, _) = lstm(x)
    torch.testing.assert_close(y, layer(x), **CLOSE)
    torch.testing.assert_close(from_keras(layer.get_weights())(x)[0], y)
    # Without sequences Keras answers the state that each half ends in.
    layer.forward_layer.return_sequences = layer.backward_layer.return_sequences = layer.return_sequences = False
    torch.testing.assert_close(torch.cat([h[0], h[1]], 1), layer(x), **CLOSE)
    assert (y[:, -1] - layer(x)).abs().max() > 0.01


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"bias": False}], ids=str)
def test_to_keras(keras, x, options):
    lstm = LSTM(5, 4, 2, batch_first=True, **options)
    y = x
    for weights in to_keras(lstm):
        layer = keras.layers.LSTM(4, return_sequences=True, use_bias=lstm.bias)
        if lstm.bidirectional:
            layer = keras.layers.Bidirectional(layer)
        layer(y)
        layer.set_weights(weights)
        y = layer(y)
    torch.testing.assert_close(y, lstm(x)[0], **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {"proj_size": 2},
        {"peephole": True},
        {"layer_norm": True},
        {"coupled": True},
        {"num_layers": 2, "residual": True},
        {"output_activation": "relu"},
        {"cell_clip": 1.0},
        {"zoneout": 0.1},
        {"learn_initial_state": True},
    ],
    ids=str,
)
def test_what_keras_lacks_is_refused(options):
    name = next(key for key in options if key != "num_layers")
    with pytest.raises(ValueError, match=f"expected options that Keras has; got {name}"):
        to_keras(LSTM(5, 4, **options))


def test_to_keras_takes_cellsteps_layer_alone():
    with pytest.raises(TypeError, match="expected cellstep.nn.LSTM; got Chain"):
        to_keras(Chain(LSTM(5, 4)))
    with pytest.raises(ValueError, match="expected a dtype that NumPy has; got torch.bfloat16"):
        to_keras(LSTM(5, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize("last", ["sequences", "step", "bidirectional"])
def test_a_model(keras, x, last):
    layers = keras.layers
    after = {
        "sequences": [layers.LSTM(4, return_sequences=True), layers.TimeDistributed(layers.Dense(3, "relu"))],
        "step": [layers.LSTM(4)],
        "bidirectional": [layers.Bidirectional(layers.LSTM(4))],
    }[last]
    normalization = layers.Normalization()
    normalization.adapt(3 + 2 * x.numpy())
    model = keras.Sequential(
        [
            keras.Input((None, 5)),
            normalization,
            layers.Dense(8, "tanh"),
            layers.LSTM(6, return_sequences=True, recurrent_activation="hard_sigmoid"),
            layers.Dropout(0.5),
            *after,
            layers.Dense(2),
            layers.Activation("softmax"),
        ]
    )
    chain = from_keras_model(model)
    raw = 3 + 2 * x
    torch.testing.assert_close(chain(raw), model(raw), **CLOSE)
    assert [(lstm.input_size, lstm.hidden_size) for lstm in chain.lstms] == [(8, 6), (6, 4)]
    inputs = keras.Input((None, 5))
    functional = keras.Model(inputs, layers.Dense(2)(layers.LSTM(4)(inputs)))
    torch.testing.assert_close(from_keras_model(functional)(x), functional(x), **CLOSE)


def test_recurrent_dropout_is_kept_and_dropout_of_the_input_is_warned_of(keras, x):
    lstm = from_keras(built(keras.layers.LSTM(4, recurrent_dropout=0.25), x))
    assert lstm.recurrent_dropout == 0.25
    assert not lstm.training
    with pytest.warns(UserWarning, match=r"Keras' dropout=0.5 of the input is left out"):
        from_keras(built(keras.layers.LSTM(4, dropout=0.5), x))


def test_layers_it_cannot_take(keras, x):
    layers = keras.layers
    for layer, message in (
        (layers.LSTM(4), "got one that is not built yet"),
        (built(layers.LSTM(4, go_backwards=True), x), "expected go_backwards=False; got True"),
        (built(layers.LSTM(4, activation="gelu"), x), "expected activation of .*; got 'gelu'"),
        (built(layers.Bidirectional(layers.LSTM(4), merge_mode="sum"), x), "expected merge_mode 'concat'; got 'sum'"),
        (
            built(
                layers.Bidirectional(layers.LSTM(4), backward_layer=layers.LSTM(4, "relu", go_backwards=True)),
                x,
            ),
            "expected one activation forward and backward",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            from_keras(layer)
    for layer in (built(layers.GRU(4), x), built(layers.Bidirectional(layers.GRU(4)), x), None):
        with pytest.raises(TypeError, match="expected a Keras LSTM"):
            from_keras(layer)


def test_models_it_cannot_take(keras):
    layers = keras.layers
    inputs = keras.Input((None, 5))
    sequence, h, c = layers.LSTM(5, return_sequences=True, return_state=True)(inputs)
    twice = layers.LSTM(5, return_sequences=True)
    for model, message in (
        (keras.Model(inputs, layers.add([inputs, sequence])), "gives its state away"),
        (keras.Model(inputs, [layers.Dense(2)(sequence), h]), "got 1 and 2"),
        (keras.Model(inputs, twice(twice(inputs))), "is used twice"),
        (keras.Sequential([inputs, layers.Conv1D(3, 2), layers.LSTM(4)]), "got Conv1D"),
        (keras.Sequential([keras.Input((None, 3, 5)), layers.TimeDistributed(layers.LSTM(4))]), "got TimeDistributed"),
        (keras.Sequential([inputs, layers.Dense(3)]), "with at least one LSTM"),
        (
            keras.Sequential([keras.Input((6, 5)), layers.Normalization(axis=1, mean=[0.0] * 6, variance=[1.0] * 6)]),
            "expected Normalization of the features",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            from_keras_model(model)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "got 0 arrays"),
        ([np.zeros((5, 16))] * 5, "got 5 arrays"),
        ([np.zeros((5, 16)), np.zeros((5, 16))], r"expected kernel .* got shapes \[\(5, 16\), \(5, 16\)\]"),
        ([np.zeros((5, 15)), np.zeros((3, 15))], "expected kernel"),
        ([np.zeros((5, 16)), np.zeros((4, 16)), np.zeros(32)], "expected kernel"),  # of CuDNNLSTM, with two biases
        (
            [np.zeros((5, 16)), np.zeros((4, 16)), np.zeros(16), *[np.zeros((5, 12)), np.zeros((3, 12)), np.zeros(12)]],
            "expected weight",
        ),
        ([np.zeros(16), np.zeros((4, 16))], "expected kernel with two dimensions"),
    ],
)
def test_wrong_lists_of_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        from_keras(weights)


def test_there_and_back_gives_the_same_weights():
    lstm = from_torch(torch.nn.LSTM(5, 4, batch_first=True, bidirectional=True))
    back = from_keras(to_keras(lstm)[0])
    for suffix in ("_l0", "_l0_reverse"):
        biases = getattr(lstm, f"bias_ih{suffix}") + getattr(lstm, f"bias_hh{suffix}")
        assert torch.equal(getattr(back, f"bias_ih{suffix}"), biases)
        assert not getattr(back, f"bias_hh{suffix}").any()
        for name in ("weight_ih", "weight_hh"):
            assert torch.equal(getattr(back, name + suffix), getattr(lstm, name + suffix))
