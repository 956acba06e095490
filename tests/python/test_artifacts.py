"""Artifacts: the same bits from each, names and scaling inside, and damaged files refused."""

import copy
import itertools
import os
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
import torch
from conftest import make_forecaster, random_steps
from hypothesis import given, settings
from hypothesis import strategies as st

import cellstep
from cellstep.exporters.deploy import image
from cellstep.nn import LSTM, Chain, Dense, Scale, Skip, Unscale
from cellstep.runtime import ModelError, Session

SUFFIXES = [".pt", ".cellstep", ".safetensors"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_artifact_equals_the_eager_model_to_the_bit(model, artifacts, suffix):
    x = random_steps(model, 6, 12)
    artifact = cellstep.load(artifacts[suffix])
    with torch.no_grad():
        expected = model(x).numpy()
        outputs, state = model.run(x, model.initial_state(6))
    assert np.array_equal(artifact(x), expected)
    y, (h, c) = artifact.run(x, artifact.initial_state(6))
    assert np.array_equal(y, outputs) and np.array_equal(h, state[0]) and np.array_equal(c, state[1])
    y, end = artifact(x[:, 5:], artifact.run(x[:, :5], artifact.initial_state(6))[1])
    assert np.array_equal(y, expected) and np.array_equal(end[0], h)
    carried = artifact.initial_state(6)
    for step in range(12):
        y, carried = artifact.step(x[:, step], carried)
        assert np.array_equal(y, outputs[:, step])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_artifact_says_what_it_is(model, artifacts, suffix):
    artifact = cellstep.load(artifacts[suffix])
    assert (artifact.input_size, artifact.output_size, artifact.num_layers, artifact.hidden_size) == (10, 1, 2, 50)
    assert artifact.feature_names == model.feature_names and artifact.output_names == model.output_names
    assert (artifact.window, artifact.horizon) == (12, 3)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_artifact_names_the_shape_it_wants(artifacts, suffix):
    artifact = cellstep.load(artifacts[suffix])
    state = artifact.initial_state(2)
    for call, message in [
        (lambda: artifact(np.zeros((2, 4, 9))), r"expected x of shape \(N, T, 10\); got \(2, 4, 9\)"),
        (lambda: artifact(np.zeros((4, 10))), r"expected x of shape \(N, T, 10\); got \(4, 10\)"),
        (lambda: artifact(np.zeros((2, 0, 10))), "at least one step"),
        (lambda: artifact.step(np.zeros((2, 9)), state), r"expected x of shape \(N, 10\)"),
        (lambda: artifact.step(np.zeros((3, 10)), state), r"expected h of shape \(2, 3, 50\); got \(2, 2, 50\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@settings(max_examples=25, deadline=None)
@given(
    inputs=st.integers(1, 20),
    hidden=st.integers(1, 40),
    layers=st.integers(1, 3),
    outputs=st.integers(1, 5),
    steps=st.integers(1, 150),
    cut=st.integers(0, 150),
)
def test_session_equals_the_eager_model_at_any_size(inputs, hidden, layers, outputs, steps, cut):
    model = make_forecaster(inputs, hidden, layers, outputs)
    x = random_steps(model, steps)
    with torch.no_grad():
        expected, (h, c) = model.run(x.unsqueeze(0), model.initial_state(1))
    session = Session(image(model))
    cut = min(cut, steps)
    y = np.concatenate([session.run(x[:cut]), session.run(x[cut:])])
    assert np.array_equal(y, expected[0])
    assert np.array_equal(session.state[0], h[:, 0]) and np.array_equal(session.state[1], c[:, 0])
    session.reset()
    assert np.array_equal(session.forecast(x), expected[0, -1])
    assert session.selftest() >= 0


def test_session_state_is_copied_in_and_out(artifacts, series):
    session = Session(artifacts[".cellstep"])
    session.run(series[:20])
    saved = session.state
    rest = session.run(series[20:])
    other = Session(session.model)
    other.state = saved
    assert np.array_equal(other.run(series[20:]), rest)
    with pytest.raises(ValueError, match=r"expected h of shape \(2, 50\), got \(2, 49\)"):
        other.state = (np.zeros((2, 49)), np.zeros((2, 50)))


def test_session_takes_any_numbers_and_names_what_it_wants(artifacts, series):
    session = Session(artifacts[".cellstep"])
    first = session.step(series[0])
    for same in (series[0].tolist(), series[0].astype(np.float64), np.repeat(series[0], 2)[::2]):
        session.reset()
        assert np.array_equal(session.step(same), first)
    with pytest.raises(ValueError, match=r"expected x of shape \(10,\), got \(9,\)"):
        session.step(series[0, :9])
    with pytest.raises(ValueError, match=r"expected x of shape \(4, 10\), got \(4, 9\)"):
        session.run(series[:4, :9])
    with pytest.raises(ValueError, match="at least one step"):
        session.forecast(series[:0])
    with pytest.raises(TypeError, match="expected numbers as x"):
        session.step("text")
    assert session.run(series[:0]).shape == (0, 1)


def test_sessions_of_one_model_run_at_once(artifacts, series):
    shared = Session(artifacts[".cellstep"])
    expected = shared.run(series)
    answers = [None] * 8

    def work(place):
        session = Session(shared.model)
        for _ in range(50):
            session.reset()
            answers[place] = session.run(series)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(answer, expected) for answer in answers)


def test_runtime_imports_no_torch(artifacts):
    program = (
        "import sys; from cellstep.runtime import Session; Session(sys.argv[1]).selftest(); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program, artifacts[".cellstep"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_safetensors_round_trip_and_metadata(model, artifacts):
    loaded = cellstep.load_model(artifacts[".safetensors"])
    assert list(loaded.state_dict()) == list(model.state_dict())
    for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all(p.requires_grad for p in loaded.parameters())
    loaded(random_steps(model, 2, 3)).sum().backward()
    scripted = torch.jit.script(loaded)
    assert torch.equal(scripted(random_steps(model, 2, 3)), loaded(random_steps(model, 2, 3)))


def test_float64_model_goes_into_torchscript_and_is_refused_as_deploy_file(tmp_path):
    model = make_forecaster().double()
    cellstep.export(model, tmp_path / "m.pt")
    x = random_steps(make_forecaster(), 3, 7).double()
    with torch.no_grad():
        assert np.array_equal(cellstep.load(tmp_path / "m.pt")(x), model(x))
    with pytest.raises(ValueError, match="expected a float32 model"):
        cellstep.export(model, tmp_path / "m.cellstep")
    assert not (tmp_path / "m.cellstep").exists()
    with pytest.raises(ModelError, match="expected float32 weights"):
        Session(image(model))
    with pytest.raises(ValueError, match="expected a float32 or float64 model"):
        cellstep.export(make_forecaster().bfloat16(), tmp_path / "n.pt")


def test_export_errors_leave_the_old_file(tmp_path):
    path = tmp_path / "m.cellstep"
    path.write_bytes(b"old")
    broken = make_forecaster()
    with torch.no_grad():
        broken.head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="expected finite weights"):
        cellstep.export(broken, path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["m.cellstep"]
    with pytest.raises(ValueError, match="expected a path that ends in .cellstep, .h, .onnx"):
        cellstep.export(make_forecaster(), tmp_path / "m.xyz")
    with pytest.raises(TypeError, match="expected a cellstep.nn.Chain or LSTM; got Linear"):
        cellstep.export(torch.nn.Linear(1, 1), tmp_path / "m.pt")
    with pytest.raises(OSError, match="there is no directory"):
        cellstep.export(make_forecaster(), tmp_path / "none" / "m.pt")


def test_model_keeps_training_after_an_export(tmp_path):
    model = make_forecaster().train()
    before = copy.deepcopy(model.state_dict())
    cellstep.export(model, tmp_path / "m.cellstep")
    cellstep.export(model, tmp_path / "m.pt")
    assert model.training and model.lstm.use_ops and model.head.use_ops
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def with_checksum(data):
    return data[:12] + struct.pack("<I", zlib.crc32(data[:12] + bytes(4) + data[16:])) + data[16:]


def whole_chain():
    """Every record and option of a deploy file at once."""
    torch.manual_seed(0)
    options = {
        "bidirectional": True,
        "peephole": True,
        "layer_norm": True,
        "coupled": True,
        "zoneout": 0.1,
        "cell_clip": 2.0,
        "learn_initial_state": True,
    }
    model = Chain(
        Scale([1.0, 2.0], [3.0, 4.0]),
        Dense(2, 3, "relu"),
        LSTM(3, 4, 2, residual=True, proj_size=2, **options),
        LSTM(4, 3, gate_activation="hard_sigmoid", activation="relu"),
        Dense(3, 2, "softmax"),
        Unscale([1.0, 2.0], [3.0, 4.0]),
        Skip([1, 0]),
        answers="hidden",
    )
    model.feature_names, model.output_names = ["a", "b"], ["c", "d"]
    return model


MODELS = {"forecaster": lambda: make_forecaster(2, 3, 1), "whole chain": whole_chain}


@pytest.mark.parametrize("name", MODELS)
def test_every_flipped_bit_is_noticed(name):
    data = image(MODELS[name]())
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 1 << (place % 8)
        with pytest.raises(ModelError, match="cannot load the bytes given: "):
            Session(bytes(broken))


@pytest.mark.parametrize("name", MODELS)
def test_every_length_is_noticed(name):
    data = image(MODELS[name]())
    for length in range(len(data)):
        with pytest.raises(ModelError, match="shorter or longer"):
            Session(data[:length])
    with pytest.raises(ModelError, match="shorter or longer"):
        Session(data + b"\0")


@pytest.mark.parametrize("name", MODELS)
def test_header_and_records_are_checked_behind_a_right_checksum(name):
    """Every 32-bit field set to every value that makes trouble: an error or a model, never a crash."""
    data = image(MODELS[name]())
    records = struct.unpack_from("<I", data, 24)[0]
    refused = 0
    for place in range(0, 64 + 64 * records, 4):
        for value in (0, 1, 2, 3, 4, 5, 6, 7, 64, 2**16, 2**24, 2**24 + 1, 2**31, 2**32 - 1):
            broken = bytearray(data)
            struct.pack_into("<I", broken, place, value)
            try:
                session = Session(with_checksum(bytes(broken)))
            except ModelError:
                refused += 1
                continue
            # Window, horizon and the test vector's length may be anything that fits.
            session.run(np.zeros((3, session.model.input_size)))
            session.forecast(np.zeros((3, session.model.input_size)))
    assert refused > 130 * records


def test_weights_that_are_not_finite_are_refused_wherever_they_lie():
    data = image(whole_chain())
    records = struct.unpack_from("<I", data, 24)[0]
    tried = 0
    for record in range(records):
        (kind,) = struct.unpack_from("<I", data, 64 + 64 * record)
        offset, size = struct.unpack_from("<2Q", data, 64 + 64 * record + 32)
        if kind in (5, 6, 8):  # names and columns
            continue
        for place in range(offset, offset + size, 4):
            broken = bytearray(data)
            struct.pack_into("<f", broken, place, float("nan"))
            with pytest.raises(ModelError, match="finite"):
                Session(with_checksum(bytes(broken)))
            tried += 1
    assert tried > 500


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "shorter or longer"), (b"PK\3\4 not a deploy file", "begins with CELLSTEP"), (b"CELL", "shorter or longer")],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "m.cellstep"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"cannot load '{path}': .*{message}"):
        cellstep.load(path)


def test_wrong_files_for_the_other_kinds(tmp_path, artifacts):
    for suffix, message in ((".pt", "expected a TorchScript archive"), (".safetensors", "expected a safetensors file")):
        for content in (b"", b"text", artifacts[suffix].read_bytes()[:2000]):
            path = tmp_path / f"m{suffix}"
            path.write_bytes(content)
            with pytest.raises(ValueError, match=message) as error:
                cellstep.load(path)
            assert "\n" not in str(error.value)
    for suffix in SUFFIXES:
        with pytest.raises(OSError):
            cellstep.load(tmp_path / f"none{suffix}")
    with pytest.raises(ValueError, match="expected a file that ends in"):
        cellstep.load(tmp_path / "m.bin")


def test_safetensors_of_other_sizes_are_refused(tmp_path, artifacts):
    import safetensors.torch

    plain = tmp_path / "plain.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, plain)
    with pytest.raises(ValueError, match="has no cellstep metadata"):
        cellstep.load_model(plain)
    with safetensors.safe_open(artifacts[".safetensors"], framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    metadata["cellstep"] = metadata["cellstep"].replace('"hidden_size": 50', '"hidden_size": 1000000000')
    safetensors.torch.save_file(tensors, plain, metadata=metadata)
    with pytest.raises(ValueError, match="expected weights and configuration that fit"):
        cellstep.load_model(plain)


def test_selftest_notices_other_weights(artifacts):
    data = bytearray(artifacts[".cellstep"].read_bytes())
    records = struct.unpack_from("<I", data, 24)[0]
    for record in range(records):
        kind, *_ = struct.unpack_from("<I", data, 64 + 64 * record)
        if kind == 3:  # the dense head: bias first
            offset = struct.unpack_from("<Q", data, 64 + 64 * record + 32)[0]
            struct.pack_into("<f", data, offset, 5.0)
    with pytest.raises(ModelError, match="test vector in the file gives other numbers"):
        Session(with_checksum(bytes(data))).selftest()


@pytest.mark.parametrize("suffix", [".pt", ".cellstep", ".safetensors", ".onnx"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_reset_parts_a_sequence(tmp_path, suffix, bidirectional):
    """Rows of a batch parted at different steps are the pieces run by themselves."""
    torch.manual_seed(0)
    lstm = LSTM(3, 4, 2, bidirectional=bidirectional, learn_initial_state=True)
    model = Chain(lstm, Dense(8 if bidirectional else 4, 2), answers="every").eval()
    with torch.no_grad():
        lstm.initial_h.normal_()
        lstm.initial_c.normal_()
    cellstep.export(model, tmp_path / f"m{suffix}", **({"reset": True} if suffix == ".onnx" else {}))
    artifact = cellstep.load(tmp_path / f"m{suffix}")
    x = torch.randn(3, 9, 3)
    cuts = [[0, 9], [0, 4, 9], [0, 1, 8, 9]]
    reset = np.zeros((3, 9), bool)
    for row, places in enumerate(cuts):
        reset[row, places[1:-1]] = True
    y, _ = artifact.run(x, artifact.initial_state(3), reset)
    with torch.no_grad():
        for row, places in enumerate(cuts):
            for begin, end in itertools.pairwise(places):
                piece = model(x[row, begin:end]).numpy()
                # onnxruntime sums in another order.
                assert np.abs(y[row, begin:end] - piece).max() <= (2e-6 if suffix == ".onnx" else 0)


def test_reset_of_a_bidirectional_model_is_refused_where_it_cannot_be(tmp_path):
    cellstep.export(LSTM(3, 4, bidirectional=True), tmp_path / "m.onnx")
    artifact = cellstep.load(tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="expected no reset"):
        artifact.run(np.zeros((1, 4, 3)), artifact.initial_state(1), np.ones((1, 4), bool))
