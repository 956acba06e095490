"""ONNX files: the numbers of the eager model on onnxruntime, in standard LSTM nodes where ONNX has words for them."""

import sys

import numpy as np
import pytest
import torch
from conftest import make_forecaster, random_steps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cellstep
from cellstep.exporters.onnx_graph import export_onnx, load_onnx
from cellstep.nn import LSTM, Chain, Dense, Scale, Skip, Unscale

onnx = pytest.importorskip("onnx")
reference = pytest.importorskip("onnx.reference")
onnxruntime = pytest.importorskip("onnxruntime")

# What torch's own LSTM, the twin of the eager model, says of proj_size.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

#: Of the largest value: onnxruntime adds up in another order and has its own tanh and sigmoid, some 1e-7 a step.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
#: Layer normalisation divides by a deviation of sqrt(1e-5) or more, and its 1e-5 is a float32 attribute in ONNX.
NORM_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}

IN_NODES = {
    "plain": {},
    "without bias": {"bias": False},
    "bidirectional": {"bidirectional": True},
    "peephole": {"peephole": True},
    "coupled": {"coupled": True},
    "coupled peephole both ways": {"coupled": True, "peephole": True, "bidirectional": True},
    "residual": {"residual": True},
    "hard_sigmoid": {"gate_activation": "hard_sigmoid"},
    "hardsigmoid": {"gate_activation": "hardsigmoid", "output_activation": "relu", "bidirectional": True},
    "relu": {"activation": "relu"},
    "linear": {"activation": "linear"},
    "elu": {"activation": "elu", "gate_activation": "hard_sigmoid", "bidirectional": True},
    "swapped": {"gate_activation": "tanh", "activation": "hard_sigmoid", "output_activation": "hardsigmoid"},
    "learned start": {"learn_initial_state": True, "bidirectional": True},
    "training only": {"dropout": 0.5, "recurrent_dropout": 0.5, "weight_drop": 0.5},
}
IN_SCANS = {
    "projection": {"proj_size": 2},
    "projection both ways": {"proj_size": 3, "bidirectional": True, "residual": True},
    "layer_norm": {"layer_norm": True},
    "layer_norm without bias": {"layer_norm": True, "bias": False},
    "cell_clip": {"cell_clip": 0.3},
    "zoneout": {"zoneout": (0.1, 0.3)},
    "everything": {
        "proj_size": 2,
        "layer_norm": True,
        "coupled": True,
        "peephole": True,
        "zoneout": 0.2,
        "cell_clip": 0.5,
        "bidirectional": True,
        "residual": True,
        "learn_initial_state": True,
        "gate_activation": "hardsigmoid",
        "activation": "hard_sigmoid",
        "output_activation": "relu",
    },
}
OPTIONS = IN_NODES | IN_SCANS
SIZES = [(1, 1), (1, 7), (4, 3), (19, 5)]


def randomised(chain, seed=0, bound=0.6):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return chain.eval()


def width(lstm):
    return (lstm.proj_size or lstm.hidden_size) * (2 if lstm.bidirectional else 1)


def chain_of(lstm, answers="every", dtype=torch.float32):
    return randomised(Chain(lstm, Dense(width(lstm), 2, "tanh"), answers=answers)).to(dtype)


def random_inputs(chain, rows, steps, lengths=False, reset=False, seed=1):
    """x, h, c, lengths and reset; the lengths have 0 and T among them where there are rows enough."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=chain.dtype)

    ends = None
    if lengths:
        ends = torch.randint(0, steps + 1, (rows,), generator=generator)
        ends[: min(rows, 2)] = torch.tensor([0, steps])[: min(rows, 2)]
    flags = torch.rand(rows, steps, generator=generator) < 0.3 if reset else None
    h = normal(chain.state_layers, rows, chain.h_size)
    c = normal(chain.state_layers, rows, chain.c_size)
    return normal(rows, steps, chain.input_size), h, c, ends, flags


def eager(chain, x, h, c, lengths=None, reset=None):
    with torch.no_grad():
        y, (h, c) = chain._answer(x, h, c, lengths, reset, chain.answers)
    return y, h, c


def run(model, *inputs):
    return model.run_raw(*(None if value is None else value.numpy() for value in inputs))


def assert_close(actual, expected, tolerance):
    for name, a, b in zip(("y", "h", "c"), actual, expected, strict=True):
        b = b.numpy()
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert np.abs(a - b).max(initial=0) <= tolerance * max(1.0, np.abs(b).max(initial=0)), name


def tolerance_of(chain):
    normed = any(lstm.layer_norm for lstm in chain.lstms)
    return (NORM_TOLERANCE if normed else TOLERANCE)[chain.dtype]


def assert_same(chain, path, *, lengths=False, reset=False):
    """The file gives the numbers of the eager model, with cellstep's operators and without, at several sizes."""
    export_onnx(chain, path, lengths=lengths, reset=reset)
    model = load_onnx(path)
    for rows, steps in SIZES:
        inputs = random_inputs(chain, rows, steps, lengths, reset)
        actual = run(model, *inputs)
        for twin in (chain, chain.reference()):
            assert_close(actual, eager(twin, *inputs), tolerance_of(chain))


def kinds(path):
    """The kinds of nodes of a file, those in bodies too."""
    found = []

    def walk(graph):
        for node in graph.node:
            found.append(node.op_type)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    walk(attribute.g)

    walk(onnx.load(path).graph)
    return found


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("inputs", ["", "lengths", "reset", "lengths reset"])
@pytest.mark.parametrize("answers", ["last", "hidden", "every"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_equals_the_eager_model(path, name, answers, inputs):
    chain = chain_of(LSTM(3, 4, 2, **OPTIONS[name]), answers)
    assert_same(chain, path, lengths="lengths" in inputs, reset="reset" in inputs)


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("name", IN_NODES)
def test_what_onnx_has_words_for_is_one_lstm_node_a_layer(path, name, lengths):
    export_onnx(chain_of(LSTM(3, 4, 3, **IN_NODES[name])), path, lengths=lengths)
    found = kinds(path)
    assert found.count("LSTM") == 3
    assert not {"Scan", "Loop", "If"} & set(found)
    assert all(not node.domain for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("name", IN_SCANS)
def test_the_rest_is_one_scan_a_direction(path, name):
    lstm = LSTM(3, 4, 3, **IN_SCANS[name])
    export_onnx(chain_of(lstm), path)
    found = kinds(path)
    assert found.count("Scan") == 3 * (2 if lstm.bidirectional else 1)
    assert not {"LSTM", "Loop", "If"} & set(found)


def test_reset_takes_a_scan_for_every_layer(path):
    export_onnx(chain_of(LSTM(3, 4, 2)), path, reset=True)
    assert kinds(path).count("Scan") == 2 and "LSTM" not in kinds(path)


def test_a_plain_stack_is_lstm_nodes_and_what_moves_axes(path):
    export_onnx(Chain(LSTM(3, 4, 2), answers="every"), path)
    assert set(kinds(path)) == {"LSTM", "Transpose", "Squeeze", "Split", "Concat", "Identity"}


@pytest.mark.parametrize("answers", ["last", "hidden", "every"])
@pytest.mark.parametrize("inputs", ["", "lengths", "reset", "lengths reset"])
def test_whole_chain_of_different_sizes(path, answers, inputs):
    chain = randomised(
        Chain(
            Scale(3),
            Dense(3, 5, "relu"),
            Dense(5, 4, "sigmoid", bias=False),
            LSTM(4, 6, 2, bidirectional=True),
            LSTM(12, 5, proj_size=3),
            LSTM(3, 2, peephole=True, batch_first=True),
            Dense(2, 4, "hardsigmoid"),
            Dense(4, 2),
            Unscale(2),
            Skip([2, 0]),
            answers=answers,
        )
    )
    chain.set_scaling(torch.ones(3), torch.tensor([2.0, 0.5, 0.0]), torch.full((2,), -3.0), torch.tensor([5.0, 0.1]))
    assert chain.state_layers == 1
    assert_same(chain, path, lengths="lengths" in inputs, reset="reset" in inputs)


@pytest.mark.parametrize(
    "activation", ["linear", "relu", "sigmoid", "tanh", "softmax", "hard_sigmoid", "hardsigmoid", "elu"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_of_dense_layers(path, activation, dtype):
    chain = Chain(Dense(3, 4, activation), LSTM(4, 5), Dense(5, 3, activation), answers="every").to(dtype)
    assert_same(randomised(chain), path)


def test_bidirectional_chain_without_heads_answers_its_output(path):
    for answers in ("last", "hidden", "every"):
        chain = randomised(Chain(LSTM(3, 4, 2, bidirectional=True), answers=answers))
        assert_same(chain, path, lengths=True)


@pytest.mark.parametrize("name", ["plain", "bidirectional", "layer_norm", "everything"])
@pytest.mark.parametrize("inputs", ["", "lengths reset"])
def test_float64_is_all_scan(path, name, inputs):
    chain = chain_of(LSTM(3, 4, 2, **OPTIONS[name]), dtype=torch.float64)
    assert_same(chain, path, lengths="lengths" in inputs, reset="reset" in inputs)
    assert "LSTM" not in kinds(path)
    assert load_onnx(path).initial(1)[0].dtype == np.float64


_ACTIVATIONS = st.sampled_from(["linear", "relu", "sigmoid", "tanh", "hard_sigmoid", "hardsigmoid", "elu"])


@st.composite
def lstms(draw, inputs):
    hidden = draw(st.integers(1, 17))
    return LSTM(
        inputs,
        hidden,
        draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
        proj_size=draw(st.sampled_from([0, 0, hidden // 2])),
        peephole=draw(st.booleans()),
        layer_norm=draw(st.sampled_from([False, False, True])),
        coupled=draw(st.booleans()),
        residual=draw(st.booleans()),
        # Gates that are not bounded let c grow without end, and with it the rounding error of what is subtracted.
        gate_activation=draw(st.sampled_from(["sigmoid", "tanh", "hard_sigmoid", "hardsigmoid"])),
        activation=draw(_ACTIVATIONS),
        output_activation=draw(_ACTIVATIONS),
        cell_clip=draw(st.sampled_from([None, None, 0.4])),
        zoneout=draw(st.sampled_from([0.0, 0.0, (0.0, 0.2), (0.3, 0.0)])),
        learn_initial_state=draw(st.booleans()),
    )


@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_chain_equals_the_eager_model(path, data, seed):
    inputs = data.draw(st.integers(1, 5))
    stages = [data.draw(lstms(inputs))]
    if data.draw(st.booleans()):
        stages.append(data.draw(lstms(width(stages[0]))))
    if data.draw(st.booleans()):
        stages.append(Dense(width(stages[-1]), 3, data.draw(_ACTIVATIONS)))
    # Small weights: linear layers on linear layers otherwise grow, and rounding errors in their gates with them.
    chain = randomised(Chain(*stages, answers=data.draw(st.sampled_from(["last", "hidden", "every"]))), seed, 0.25)
    chain = chain.to(data.draw(st.sampled_from([torch.float32, torch.float64])))
    lengths, reset = data.draw(st.booleans()), data.draw(st.booleans())
    rows, steps = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    export_onnx(chain, path, lengths=lengths, reset=reset)
    given_inputs = random_inputs(chain, rows, steps, lengths, reset, seed)
    if lengths:
        ends = data.draw(st.lists(st.integers(0, steps), min_size=rows, max_size=rows))
        given_inputs = (*given_inputs[:3], torch.tensor(ends), given_inputs[4])
    assert_close(run(load_onnx(path), *given_inputs), eager(chain, *given_inputs), tolerance_of(chain))


@pytest.mark.parametrize("name", ["plain", "peephole", "coupled", "zoneout", "projection", "layer_norm"])
def test_state_carries_a_stream_over_cuts(path, name):
    chain = chain_of(LSTM(3, 4, 2, **OPTIONS[name]))
    export_onnx(chain, path)
    model = load_onnx(path)
    x, h, c, _, _ = random_inputs(chain, 3, 24)
    expected = eager(chain, x, h, c)
    h, c = h.numpy(), c.numpy()
    parts = []
    for start, stop in ((0, 1), (1, 2), (2, 9), (9, 24)):
        y, h, c = model.run_raw(x[:, start:stop].numpy(), h, c)
        parts.append(y)
    assert_close((np.concatenate(parts, 1), h, c), expected, tolerance_of(chain))


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_a_long_stream_stays_close(path, name):
    chain = chain_of(LSTM(3, 24, 2, **OPTIONS[name]))
    export_onnx(chain, path)
    inputs = random_inputs(chain, 2, 1500)
    assert_close(run(load_onnx(path), *inputs), eager(chain, *inputs), tolerance_of(chain))


@pytest.mark.parametrize("name", ["bidirectional", "everything"])
@pytest.mark.parametrize("answers", ["last", "hidden", "every"])
def test_what_lies_past_a_length_is_not_read(path, name, answers):
    chain = chain_of(LSTM(3, 4, 2, **OPTIONS[name]), answers)
    export_onnx(chain, path, lengths=True)
    model = load_onnx(path)
    x, h, c, lengths, _ = random_inputs(chain, 6, 5, lengths=True)
    expected = run(model, x, h, c, lengths)
    past = torch.arange(5)[None, :, None] >= lengths[:, None, None]
    for got, want in zip(run(model, x.masked_fill(past, torch.nan), h, c, lengths), expected, strict=True):
        assert np.array_equal(got, want)
    assert np.array_equal(expected[1][:, 0], h[:, 0].numpy()) and np.array_equal(expected[2][:, 0], c[:, 0].numpy())
    if answers == "every":
        assert not expected[0][0].any() and not expected[0][past[:, :, 0].numpy()].any()


def test_lengths_and_resets_left_out_are_all_steps_and_none(path):
    chain = chain_of(LSTM(3, 4, bidirectional=True))
    x, h, c, lengths, reset = random_inputs(chain, 3, 5, True, True)
    export_onnx(chain, path, lengths=True, reset=True)
    assert_close(run(load_onnx(path), x, h, c), eager(chain, x, h, c), tolerance_of(chain))
    export_onnx(chain, path)
    with pytest.raises(ValueError, match="expected a file with the input lengths"):
        run(load_onnx(path), x, h, c, lengths)
    with pytest.raises(ValueError, match="export it with reset=True"):
        run(load_onnx(path), x, h, c, None, reset)


@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"peephole": True}, {"zoneout": 0.2}, {"layer_norm": True, "proj_size": 2}],
    ids=str,
)
def test_the_reference_evaluator_agrees(path, options):
    """A second reader, for what it implements: no lengths, no other activations, no scan backwards."""
    chain = chain_of(LSTM(3, 4, 2, **options))
    export_onnx(chain, path)
    x, h, c, _, _ = random_inputs(chain, 3, 5)
    evaluator = reference.ReferenceEvaluator(str(path))
    actual = evaluator.run(None, {"x": x.numpy(), "h": h.numpy(), "c": c.numpy()})
    assert_close(actual, eager(chain, x, h, c), tolerance_of(chain))


@pytest.mark.parametrize("reset", [False, True])
def test_forecaster_in_its_own_units(path, reset):
    forecaster = make_forecaster()
    export_onnx(forecaster, path, reset=reset)
    model = load_onnx(path)
    x = random_steps(forecaster, 6, 12)
    y, h, c = model.run_raw(x.numpy(), *model.initial(6))
    with torch.no_grad():
        expected = forecaster(x)
        _, state = forecaster.run(x, forecaster.initial_state(6))
    assert_close((y, h, c), (expected, *state), 1e-5)


def test_the_file_says_what_it_is(path):
    chain = make_forecaster(3, 4)
    export_onnx(chain, path)
    proto = onnx.load(path)
    assert (proto.producer_name, proto.producer_version) == ("cellstep", cellstep.__version__)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 17)]
    assert [entry.key for entry in proto.metadata_props] == ["cellstep"]
    model = load_onnx(path)
    assert (model.input_size, model.output_size, model.state_layers, model.h_size, model.c_size) == (3, 1, 2, 4, 4)
    assert (model.answers, model.window, model.horizon) == ("last", 12, 3)
    assert (model.feature_names, model.output_names) == (chain.feature_names, chain.output_names)
    assert model.dtype == np.float32


def test_learned_initial_states_are_in_the_file(path):
    for chain in (
        chain_of(LSTM(3, 4, 2, learn_initial_state=True, proj_size=3)),
        randomised(Chain(LSTM(3, 4, learn_initial_state=True), LSTM(4, 5))),
    ):
        export_onnx(chain, path)
        for actual, expected in zip(load_onnx(path).initial(3), chain.initial_state(3), strict=True):
            assert np.array_equal(actual, expected.detach().numpy())


def shape_of(value):
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def test_names_and_shapes_of_the_graph(path):
    chain = Chain(LSTM(3, 8, proj_size=2), LSTM(2, 5), Dense(5, 4))
    export_onnx(chain, path, input_names=["obs", "h_in", "c_in"], output_names=("actions", "h_out", "c_out"))
    graph = onnx.load(path).graph
    assert {value.name: shape_of(value) for value in graph.input} == {
        "obs": ["N", "T", 3],
        "h_in": [1, "N", 7],
        "c_in": [1, "N", 13],
    }
    assert {value.name: shape_of(value) for value in graph.output} == {
        "actions": ["N", 4],
        "h_out": [1, "N", 7],
        "c_out": [1, "N", 13],
    }
    export_onnx(Chain(LSTM(3, 4), answers="every"), path, lengths=True, reset=True)
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["x", "h", "c", "lengths", "reset"]
    assert [value.name for value in graph.output] == ["y", "h_n", "c_n"]
    assert shape_of(graph.input[3]) == ["N"] and shape_of(graph.input[4]) == ["N", "T"]
    assert shape_of(graph.output[0]) == ["N", "T", 4]


def test_names_of_the_inside_make_way(path):
    chain = chain_of(LSTM(3, 4, zoneout=0.1), "last")
    names = ["scan", "matmul", "value"]
    export_onnx(chain, path, input_names=names, output_names=["add", "transpose", "weight_ih"])
    inputs = random_inputs(chain, 2, 3)
    assert_close(run(load_onnx(path), *inputs), eager(chain, *inputs), tolerance_of(chain))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"input_names": ["x"]}, r"expected three input_names, for x, h, c; got \['x'\]"),
        ({"input_names": "xhc"}, "expected three input_names"),
        ({"output_names": ["y", "h", ""]}, "expected three output_names, for y, h_n, c_n"),
        ({"output_names": ["y", "h", "c"]}, "expected names that differ"),
        ({"input_names": ["lengths", "h", "c"], "lengths": True}, "expected names that differ"),
    ],
)
def test_bad_names_are_refused(path, names, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(Chain(LSTM(3, 4)), path, **names)
    assert not path.exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_formats_are_refused(path, dtype):
    with pytest.raises(ValueError, match=rf"expected a float32 or float64 model .* got {dtype}; use model.float"):
        export_onnx(Chain(LSTM(3, 4)).to(dtype), path)
    assert not path.exists()


def test_weights_that_are_not_finite_are_refused(path):
    chain = Chain(LSTM(3, 4))
    with torch.no_grad():
        chain.lstms[0].weight_hh_l0[0, 0] = torch.nan
    path.write_text("old")
    with pytest.raises(ValueError, match="expected finite weights"):
        export_onnx(chain, path)
    assert path.read_text() == "old"


def test_missing_packages_are_named(path, monkeypatch):
    export_onnx(Chain(LSTM(3, 4)), path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"package onnx; .* pip install cellstep\[onnx\]"):
        export_onnx(Chain(LSTM(3, 4)), path)
    load_onnx(path)  # needs onnxruntime alone
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"package onnxruntime; .* pip install cellstep\[onnx\]"):
        load_onnx(path)


def test_files_that_are_none_are_refused(path):
    with pytest.raises(FileNotFoundError, match="expected an .onnx file"):
        load_onnx(path)
    path.write_bytes(b"no protobuf")
    with pytest.raises(ValueError, match="expected an ONNX file"):
        load_onnx(path)
    export_onnx(Chain(LSTM(3, 4)), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="expected an ONNX file"):
        load_onnx(path)
    proto = onnx.load_from_string(whole)
    for config, message in (("{}", "is damaged: 'input_size'"), ("no json", "is damaged"), ("[]", "is damaged")):
        onnx.helper.set_model_props(proto, {"cellstep": config})
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(ValueError, match=message):
            load_onnx(path)
    onnx.helper.set_model_props(proto, {})
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="has no cellstep metadata"):
        load_onnx(path)


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        export_onnx(Chain(LSTM(3, 4)), tmp_path / "none" / "model.onnx")
