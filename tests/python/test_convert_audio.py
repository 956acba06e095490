"""Amplifier models: files as the three projects write them, against their formulas in NumPy."""

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

import cellstep
from cellstep.convert import from_guitarml, from_nam, from_rtneural

# float32 on outputs of about 1, with sums of some 20 terms in another order, over 20 steps.
CLOSE = {"rtol": 1e-5, "atol": 5e-6}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def run_layer(x, w, r, b, h=None, c=None):
    """x (T, I), columns of w (I, 4 H) and r (H, 4 H) in the order i, f, g, o -> (T, H)."""
    hidden = len(r)
    h = np.zeros(hidden) if h is None else h
    c = np.zeros(hidden) if c is None else c
    outputs = []
    for row in x:
        i, f, g, o = np.split(row @ w + h @ r + b, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.array(outputs)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def sound(rng, inputs=1):
    return rng.normal(0, 1, (20, inputs))


def answers(chain, x):
    """From the chain and from its torch-free file, a sample a call."""
    y = chain(torch.tensor(x, dtype=torch.float32))
    assert y.shape == (len(x), chain.output_size)
    return y


def check(chain, x, expected, tmp_path):
    torch.testing.assert_close(answers(chain, x), torch.tensor(expected, dtype=torch.float32), **CLOSE)
    cellstep.export(chain, tmp_path / "model.cellstep")
    stream = cellstep.runtime.Session(tmp_path / "model.cellstep")
    steps = np.stack([stream.step(row) for row in x.astype(np.float32)])
    np.testing.assert_allclose(steps.reshape(expected.shape), expected, **CLOSE)


# RTNeural


def keras_layer(kind, arrays, activation=""):
    return {
        "type": kind,
        "activation": activation,
        "shape": [None, None, arrays[-1].shape[-1] // (4 if kind == "lstm" else 1)],
        "weights": [array.tolist() for array in arrays],
    }


def rtneural_keras(rng, inputs=1, sizes=(8, 5), outputs=1):
    """time-distributed-dense, then LSTMs of different sizes, then dense; arrays as Keras' get_weights() gives them."""
    widths = [inputs, 6, *sizes]
    first = [rng.normal(0, 0.5, shape) for shape in ((inputs, 6), (6,))]
    lstms = [
        [rng.normal(0, 0.5, shape) for shape in ((a, 4 * b), (b, 4 * b), (4 * b,))]
        for a, b in itertools.pairwise(widths[1:])
    ]
    last = [rng.normal(0, 0.5, shape) for shape in ((sizes[-1], outputs), (outputs,))]
    document = {
        "in_shape": [None, None, inputs],
        "layers": [
            keras_layer("time-distributed-dense", first, "tanh"),
            *(keras_layer("lstm", arrays, "tanh") for arrays in lstms),
            keras_layer("dense", last),
        ],
    }

    def reference(x):
        x = np.tanh(x @ first[0] + first[1])
        for w, r, b in lstms:
            x = run_layer(x, w, r, b)
        return x @ last[0] + last[1]

    return document, reference


@pytest.mark.parametrize("inputs", [1, 3])
def test_rtneural_in_its_keras_layout(rng, inputs, tmp_path):
    document, reference = rtneural_keras(rng, inputs, outputs=2)
    (tmp_path / "model.json").write_text(json.dumps(document))
    x = sound(rng, inputs)
    chain = from_rtneural(tmp_path / "model.json")
    check(chain, x, reference(x), tmp_path)
    assert [(lstm.input_size, lstm.hidden_size) for lstm in chain.lstms] == [(6, 8), (8, 5)]


def test_rtneural_with_an_activation_layer(rng, tmp_path):
    document, reference = rtneural_keras(rng, outputs=3)
    document["layers"].append({"type": "activation", "activation": "softmax", "shape": [None, None, 3], "weights": []})
    x = sound(rng)
    y = np.exp(reference(x))
    check(from_rtneural(document), x, y / y.sum(1, keepdims=True), tmp_path)


@pytest.mark.parametrize(
    ("extra", "formula"),
    [
        ({"in_skip": 1}, lambda model, x: model(x) + x),
        ({"in_gain": -6.0, "out_gain": 12.0}, lambda model, x: 10**0.6 * model(10**-0.3 * x)),
        ({"in_skip": 1, "in_gain": 6, "out_gain": -6}, lambda model, x: 10**-0.3 * model(10**0.3 * x) + x),
        ({"in_skip": 0, "in_gain": 0, "out_gain": None, "samplerate": 48000}, lambda model, x: model(x)),
    ],
)
def test_rtneural_as_aida_x_extends_it(rng, extra, formula, tmp_path):
    document, reference = rtneural_keras(rng)
    x = sound(rng)
    check(from_rtneural(document | extra), x, formula(reference, x), tmp_path)


class Torch(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 8)
        self.lstm2 = nn.LSTM(8, 5, 2, bias=False)
        self.hidden = nn.Linear(5, 4)
        self.dense = nn.Linear(4, 2, bias=False)

    def forward(self, x):
        x, _ = self.lstm2(self.lstm(x)[0])
        return self.dense(torch.relu(self.hidden(x)))


def test_rtneural_in_its_pytorch_layout(tmp_path, rng):
    model = Torch()
    document = {name: value.tolist() for name, value in model.state_dict().items()}
    x = sound(rng)
    with torch.no_grad():
        expected = model(torch.tensor(x, dtype=torch.float32))
    check(from_rtneural(document, dense_activations=["relu"]), x, expected.numpy(), tmp_path)


def test_a_gain_is_of_the_sound_alone(rng, tmp_path):
    document, reference = rtneural_keras(rng, 3)
    x = sound(rng, 3)
    louder = x * [10**0.3, 1, 1]
    check(from_rtneural(document | {"in_gain": 6}), x, reference(louder), tmp_path)


# NeuralAmpModeler


def nam(rng, inputs=1, hidden=4, layers=2, outputs=1, **config):
    """lstm.cpp reads for each layer W (4 H, I + H) in rows, b, then h and c; then the head's rows and bias."""
    numbers, parts = [], []
    for layer in range(layers):
        width = hidden if layer else inputs
        shapes = ((4 * hidden, width + hidden), (4 * hidden,), (hidden,), (hidden,))
        parts.append([rng.normal(0, 0.5, shape) for shape in shapes])
    head = [rng.normal(0, 0.5, (outputs, hidden)), rng.normal(0, 0.5, outputs)]
    for array in [array for part in parts for array in part] + head:
        numbers += array.ravel().tolist()
    document = {
        "version": "0.5.4",
        "metadata": {"loudness": -20.0},
        "architecture": "LSTM",
        "config": {"input_size": inputs, "hidden_size": hidden, "num_layers": layers, **config},
        "weights": numbers,
        "sample_rate": 48000,
    }

    def reference(x):
        for w, b, h, c in parts:
            width = w.shape[1] - hidden
            x = run_layer(x, w[:, :width].T, w[:, width:].T, b, h, c)
        return x @ head[0].T + head[1]

    return document, reference


@pytest.mark.parametrize("options", [{}, {"layers": 1, "hidden": 3}, {"inputs": 3, "outputs": 2, "out_channels": 2}])
def test_nam(rng, options, tmp_path):
    document, reference = nam(rng, **options)
    (tmp_path / "model.nam").write_text(json.dumps(document))
    chain = from_nam(tmp_path / "model.nam")
    x = sound(rng, options.get("inputs", 1))
    check(chain, x, reference(x), tmp_path)
    h, c = chain.initial_state(1)
    assert h.abs().min() > 0  # the file's own state, not zero
    assert c.abs().min() > 0


# GuitarML


def guitarml(inputs=1, outputs=1, layers=1, skip=1, bias=True):
    """As CoreAudioML saves a SimpleRNN: torch's LSTM and Linear, time first."""
    rec, lin = nn.LSTM(inputs, 7, layers), nn.Linear(7, outputs, bias)
    state = {f"rec.{k}": v.tolist() for k, v in rec.state_dict().items()}
    state |= {f"lin.{k}": v.tolist() for k, v in lin.state_dict().items()}
    data = {
        "model": "SimpleRNN",
        "input_size": inputs,
        "skip": skip,
        "output_size": outputs,
        "unit_type": "LSTM",
        "num_layers": layers,
        "hidden_size": 7,
        "bias_fl": bias,
    }

    @torch.no_grad()
    def reference(x):
        x = torch.tensor(x, dtype=torch.float32).unsqueeze(1)
        y = lin(rec(x)[0])
        return (y + x[:, :, 0:skip] if skip else y)[:, 0].numpy()

    return {"model_data": data, "state_dict": state}, reference


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inputs": 2},
        {"inputs": 3, "layers": 2},
        {"skip": 0, "bias": False},
        {"inputs": 3, "outputs": 2, "skip": 2},
        {"inputs": 3, "outputs": 2, "skip": 1},
    ],
    ids=str,
)
def test_guitarml(rng, options, tmp_path):
    document, reference = guitarml(**options)
    (tmp_path / "model.json").write_text(json.dumps(document))
    x = sound(rng, options.get("inputs", 1))
    check(from_guitarml(tmp_path / "model.json"), x, reference(x), tmp_path)


# Files that are wrong


def changed(document, path, value):
    """A copy with one value at a path of keys changed, or taken out where the value is None."""
    document = json.loads(json.dumps(document))
    *way, last = path
    inner = document
    for key in way:
        inner = inner[key]
    if value is None:
        del inner[last]
    elif callable(value):
        inner[last] = value(inner[last])
    else:
        inner[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["layers", 1, "type"], "gru", "expected layers lstm, dense, .*; got 'gru' in layers\\[1\\]"),
        (["layers", 1, "activation"], "relu", "expected activation tanh in layers\\[1\\]; got 'relu'"),
        (["layers", 3, "activation"], "prelu", "expected an activation of .*; got 'prelu'"),
        (["layers", 1, "shape", 2], 9, "expected kernel of layers\\[1\\] to be numbers of shape \\(6, 36\\)"),
        (["layers", 1, "shape"], None, "expected shape of layers\\[1\\] to be a positive number; got None"),
        (["layers", 1, "weights"], lambda w: w[:2], "expected 3 arrays of weights in layers\\[1\\]"),
        (["layers", 1, "weights", 1], lambda w: w[:-1], "expected recurrent kernel of layers\\[1\\]"),
        (["layers", 1, "weights", 1, 0], lambda w: w[:-1], "to be rows of one length; got different ones"),
        (["layers", 1, "weights", 2, 0], "x", "expected bias of layers\\[1\\] to be numbers"),
        (["layers", 1, "weights", 2, 0], float("nan"), "expected finite numbers in bias of layers\\[1\\]"),
        (["layers", 1, "weights", 2, 0], 1e300, "expected finite numbers"),
        (["layers", 1], 7, "expected layers\\[1\\] to be an object; got int"),
        (["in_shape"], [None, None, 2], "expected kernel of layers\\[0\\] to be numbers of shape \\(2, 6\\)"),
        (["in_shape"], None, "expected in_shape and layers, two lists"),
        (["in_skip"], 2, "expected in_skip of 0 or 1; got 2"),
        (["in_gain"], "loud", "expected in_gain to be a number; got 'loud'"),
        (["layers"], [], "expected an lstm layer among layers; got none"),
    ],
)
def test_wrong_rtneural_files(rng, path, value, message):
    document, _ = rtneural_keras(rng)
    with pytest.raises(ValueError, match=message):
        from_rtneural(changed(document | {"in_skip": 0, "in_gain": 0}, path, value))


def test_more_wrong_rtneural_files(rng):
    document, _ = rtneural_keras(rng)
    with pytest.raises(ValueError, match="expected in_gain and out_gain that cancel where in_skip is set"):
        from_rtneural(document | {"in_skip": 1, "out_gain": 3})
    with pytest.raises(ValueError, match="expected dense_activations for the PyTorch layout alone"):
        from_rtneural(document, dense_activations=["tanh"])
    state = {name: value.tolist() for name, value in Torch().state_dict().items()}
    with pytest.raises(ValueError, match="expected an activation a dense layer; got 1 too many"):
        from_rtneural(state, dense_activations=["tanh", "linear", "relu"])
    for module, message in (
        (nn.GRU(1, 4), r"expected rnn.weight_ih_l0 to be numbers of shape \(16, 1\); got float64 of shape \(12, 1\)"),
        (nn.LSTM(1, 4, bidirectional=True), "unknown bias_hh_l0_reverse"),
        (nn.LSTM(1, 4, proj_size=2), "unknown weight_hr_l0"),
        (nn.Conv1d(1, 4, 3), r"expected rnn.weight to be numbers of shape \('any', 'any'\)"),
        (nn.PReLU(), "expected rnn.weight"),
    ):
        model = {f"rnn.{name}": value.tolist() for name, value in module.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            from_rtneural(model)
    with pytest.raises(ValueError, match="expected layers of torch.nn.LSTM and Linear; got 'norm' with running_mean"):
        from_rtneural({"norm.running_mean": [0.0]})
    with pytest.raises(ValueError, match="got a file with model_data; use cellstep.convert.from_guitarml"):
        from_rtneural(guitarml()[0])
    with pytest.raises(ValueError, match="got a file with architecture; use cellstep.convert.from_nam"):
        from_rtneural(nam(rng)[0])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["architecture"], "WaveNet", "expected a .nam file of architecture LSTM; got 'WaveNet'"),
        (["architecture"], None, "got None"),
        (["version"], "0.4.1", "expected .nam version 0.5 to 0.7; got '0.4.1'"),
        (["version"], "1.5.0", "got '1.5.0'"),
        (["version"], None, "got None"),
        (["config"], None, "expected an object config in the file"),
        (["config", "head"], {}, "got head too"),
        (["config", "hidden_size"], 0, "expected hidden_size to be a positive number; got 0"),
        (["config", "hidden_size"], "4", "got '4'"),
        (["config", "num_layers"], True, "got True"),
        (["config", "in_channels"], 2, "expected in_channels=1, the input_size; got 2"),
        (["config", "num_layers"], 10**30, "expected .* weights for 10+ layers"),
        (["config", "hidden_size"], 10**9, "expected .* weights for 2 layers of 1000000000 units"),
        (
            ["weights"],
            lambda w: w[:-1],
            "expected 261 weights for 2 layers of 4 units, 1 inputs and 1 outputs; got 260",
        ),
        (["weights"], lambda w: [*w, 0.0], "got 262; the file is damaged"),
        (["weights"], {}, "got dict"),
        (["weights", 5], [1.0], "expected weights to be rows of one length"),
        (["weights", 5], "1.0", "expected weights to be numbers"),
        (["weights", 5], float("inf"), "expected finite numbers in weights"),
    ],
)
def test_wrong_nam_files(rng, path, value, message):
    document, _ = nam(rng)
    with pytest.raises(ValueError, match=message):
        from_nam(changed(document, path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["model_data"], None, "expected an object model_data"),
        (["state_dict"], [1], "expected an object state_dict in the file; got list"),
        (["model_data", "unit_type"], "GRU", "expected a SimpleRNN of unit_type LSTM; got SimpleRNN of GRU"),
        (["model_data", "model"], "GatedConvNet", "got GatedConvNet of LSTM"),
        (["model_data", "skip"], 3, "expected skip of 0, 1 or 1, at most the inputs; got 3"),
        (["model_data", "hidden_size"], 8, r"expected rec.weight_ih_l0 to be numbers of shape \(32, 1\)"),
        (["model_data", "num_layers"], 2, "missing rec.bias_hh_l1"),
        (["model_data", "num_layers"], 10**30, "expected weights of 10+ layers; got 6 in all"),
        (["state_dict", "lin.bias"], None, "missing lin.bias"),
        (["state_dict", "rec.weight_ih_l0_reverse"], [[0.0]], "unknown rec.weight_ih_l0_reverse"),
        (["state_dict", "lin.weight"], [[0.0] * 6], r"expected lin.weight to be numbers of shape \(1, 7\)"),
    ],
)
def test_wrong_guitarml_files(path, value, message):
    with pytest.raises(ValueError, match=message):
        from_guitarml(changed(guitarml()[0], path, value))


@pytest.mark.parametrize("converter", [from_rtneural, from_nam, from_guitarml])
def test_files_that_are_none(converter, tmp_path):
    path = tmp_path / "model.json"
    with pytest.raises(FileNotFoundError):
        converter(path)
    for text, message in (
        (b'{"weights": [1, ', "expected a JSON file; .* is none or is damaged"),
        (b"\xff\xfe\x00", "expected a JSON file"),
        (b"[" * 100_000, "expected a JSON file"),
        (b"[]", "expected a JSON object in .*; got list"),
        (b"{}", "expected"),
    ):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=message):
            converter(path)
