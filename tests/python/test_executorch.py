"""The ``.pte`` road: one static size, whole windows and streams, rows in groups."""

import numpy as np
import pytest
import torch
from conftest import make_forecaster, random_steps

import cellstep
from cellstep.nn import LSTM, Chain, Dense


@pytest.fixture(scope="module")
def model():
    return make_forecaster(3, 5)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("executorch") / "model.pte"
    cellstep.export(model, path, batch_size=3)
    return path


def close(model, y, expected):
    # Outputs span hundreds; ExecuTorch's kernels sum in another order.
    assert y.dtype == np.float32 and np.abs(y - expected.numpy()).max() <= 2e-6 * float(model.output_scale.max())


@pytest.mark.parametrize("rows", [0, 1, 3, 7])
@pytest.mark.parametrize("steps", [1, 12, 15])  # 12 is the window
def test_any_number_of_rows_and_steps(model, path, rows, steps):
    x = random_steps(model, rows, steps)
    with torch.no_grad():
        expected = model(x)
    y = cellstep.load(path)(x)
    assert y.shape == (rows, 1)
    if rows:
        close(model, y, expected)


def test_a_stream_carries_its_state(model, path):
    artifact = cellstep.load(path)
    x = random_steps(model, 2, 9)
    y, state = artifact.run(x[:, :4], artifact.initial_state(2))
    rest, state = artifact.run(x[:, 4:], state)
    with torch.no_grad():
        expected, (h, c) = model.run(x, model.initial_state(2))
    close(model, np.concatenate([y, rest], 1), expected)
    assert np.abs(state[0] - h.numpy()).max() < 2e-6 and np.abs(state[1] - c.numpy()).max() < 2e-6


def test_rows_are_reset_by_a_method_of_its_own(path, model):
    program = cellstep.load(path).program
    h, c = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([True, False, True])
    h_n, c_n = program.reset((h, c), mask)
    expected = model.reset((h, c), mask)
    assert torch.equal(h_n, expected[0]) and torch.equal(c_n, expected[1])


def test_what_one_static_size_cannot_do_is_named(tmp_path):
    both = Chain(LSTM(3, 4, bidirectional=True), Dense(8, 1), answers="hidden").eval()
    cellstep.export(both, tmp_path / "both.pte", steps=6)
    artifact = cellstep.load(tmp_path / "both.pte")
    x = torch.randn(2, 6, 3)
    with torch.no_grad():
        assert np.abs(artifact(x) - both(x).numpy()).max() < 2e-6
    with pytest.raises(ValueError, match="expected windows of 6 steps"):
        artifact(x[:, :5])
    with pytest.raises(ValueError, match="expected windows of 6 steps"):
        artifact.run(x, artifact.initial_state(2))


def test_arguments_are_checked(tmp_path):
    model = make_forecaster(3, 5)
    with pytest.raises(ValueError, match="expected a float32 or float64 model"):
        cellstep.export(model.bfloat16(), tmp_path / "m.pte")
    model = make_forecaster(3, 5)
    model.window = 0
    with pytest.raises(ValueError, match="pass steps="):
        cellstep.export(model, tmp_path / "m.pte")
    with pytest.raises(ValueError, match="batch_size=0"):
        cellstep.export(model, tmp_path / "m.pte", steps=3, batch_size=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"no program", None])
def test_files_that_are_none(path, tmp_path, content):
    broken = tmp_path / "broken.pte"
    broken.write_bytes(path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(ValueError, match="expected an ExecuTorch program"):
        cellstep.load(broken)


def test_a_strangers_program_is_named_as_such(tmp_path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.exir import to_edge_transform_and_lower

        program = torch.export.export(torch.nn.Linear(2, 1), (torch.zeros(1, 2),))
        (tmp_path / "other.pte").write_bytes(to_edge_transform_and_lower(program).to_executorch().buffer)
    with pytest.raises(ValueError, match="cellstep exported"):
        cellstep.load(tmp_path / "other.pte")
