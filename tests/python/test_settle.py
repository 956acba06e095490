"""A warm start: an artifact that begins where a session is after some steps."""

import numpy as np
import pytest
import torch
from conftest import make_forecaster, random_steps, run_command, write_csv
from test_roads import ROWS, make
from test_session import series

import cellstep
from cellstep.exporters.torchscript import packed
from cellstep.runtime import ModelError, Pool, Session

FORWARD_ROWS = [row for row in ROWS if row not in ("lengths", "reset", "bidirectional", "all of them at once")]


def assert_begins_where(warm, cold, before, after):
    """A warm session gives at once, and after a reset, what a cold one gives behind the steps before."""
    cold.reset()
    cold.run(before)
    expected = cold.run(after)
    for _ in range(2):
        assert np.array_equal(warm.run(after), expected)
        warm.reset()
    warm.selftest()


def both(model, directory, **options):
    cellstep.export(model, directory / "cold.cellstep", **options)
    x = series(60)
    cellstep.export(model, directory / "warm.cellstep", settle=x[:50], **options)
    return Session(directory / "warm.cellstep"), Session(directory / "cold.cellstep"), x


@pytest.mark.parametrize("row", FORWARD_ROWS)
def test_a_file_begins_where_a_session_is(row, tmp_path):
    warm, cold, x = both(make(row), tmp_path)
    assert_begins_where(warm, cold, x[:50], x[50:])
    # Of all else nothing changes: the stream goes on from any state as before.
    warm.state = cold.state = tuple(part + 0.1 for part in cold.state)
    assert np.array_equal(warm.run(x), cold.run(x))


@pytest.mark.parametrize("weights", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("row", ["plain", "proj_size", "learn_initial_state", "a chain with all stages"])
def test_a_file_with_narrow_weights_begins_where_a_session_is(row, weights, tmp_path):
    warm, cold, x = both(cellstep.quantize(make(row), weights), tmp_path)
    assert warm.weights == weights
    assert_begins_where(warm, cold, x[:50], x[50:])


def test_a_file_with_fast_activations_begins_where_a_session_is(tmp_path):
    warm, cold, x = both(make("plain"), tmp_path, fast_activations=True)
    assert_begins_where(warm, cold, x[:50], x[50:])


def test_slides_resets_and_pools_begin_there_too(tmp_path):
    warm, cold, x = both(make("plain"), tmp_path)
    cold.run(x[:50])
    settled = cold.state
    warm.start_slide(4)
    for step in range(4):
        y = warm.slide(x[step])
    cold.state = settled
    assert np.array_equal(y, cold.forecast(x[:4]))
    pool = Pool(warm.model, 3)
    assert all(map(np.array_equal, pool.state(1), settled))
    pool.step(x[:3])
    pool.step(x[3:6], [False, True, False])
    cold.state = settled
    cold.run(x[4:5])
    assert all(map(np.array_equal, pool.state(1), cold.state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row", ["plain", "learn_initial_state", "a chain with all stages"])
def test_a_torchscript_file_begins_there(row, dtype, tmp_path):
    model = make(row).to(dtype)
    x = torch.from_numpy(series(60)).to(dtype)
    cellstep.export(model, tmp_path / "warm.pt", settle=x[:50])
    warm, cold = torch.jit.load(tmp_path / "warm.pt"), packed(model)
    with torch.no_grad():
        _, state = cold.run(x[None, :50], cold.initial_state(1))
        expected, _ = cold.run(x[None, 50:], state)
        assert all(map(torch.equal, warm.initial_state(1), state))
        assert torch.equal(warm.run(x[None, 50:], warm.initial_state(1))[0], expected)
        assert torch.equal(warm(x[None, 50:]), expected)


def test_the_header_and_the_file_are_the_same_bytes(tmp_path):
    from cellstep.exporters.header import read_header

    for suffix in (".cellstep", ".h"):
        cellstep.export(make("plain"), tmp_path / f"warm{suffix}", settle=series(20))
    assert read_header(tmp_path / "warm.h") == (tmp_path / "warm.cellstep").read_bytes()


def test_settling_twice_is_settling_once_with_all_steps(tmp_path):
    """By way of an image that has an initial state already."""
    from cellstep.exporters.deploy import deploy_bytes
    from cellstep.exporters.settle import settled

    data, x = deploy_bytes(make("learn_initial_state")), series(40)
    once, twice = settled(data, x)[0], settled(settled(data, x[:15])[0], x[15:])[0]
    assert np.array_equal(Session(once).run(x), Session(twice).run(x)) and len(once) == len(twice) == len(data)


def test_a_test_vector_still_finds_a_wrong_state(tmp_path):
    from test_artifacts import with_checksum

    data = bytearray((both(make("plain"), tmp_path), (tmp_path / "warm.cellstep").read_bytes())[1])
    state = np.concatenate([part.ravel() for part in Session(bytes(data)).state]).tobytes()
    place = data.index(state[:16])
    data[place : place + 4] = np.float32(0.9).tobytes()
    with pytest.raises(ModelError, match="gives other numbers"):
        Session(with_checksum(bytes(data))).selftest()


def test_what_cannot_settle_is_refused(tmp_path):
    model, x = make("plain"), series(20)
    target = tmp_path / "m.cellstep"
    for wrong in (x[:, :3], x[0], x[:0], x[None]):
        with pytest.raises(ValueError, match=r"expected settle of shape \(T, 4\), T at least 1; got \("):
            cellstep.export(model, target, settle=wrong)
    with pytest.raises(ValueError, match="expected finite values in settle"):
        cellstep.export(model, target, settle=np.full((3, 4), np.nan))
    with pytest.raises(ValueError, match="runs forwards alone for settle"):
        cellstep.export(make("bidirectional"), target, settle=x)
    with pytest.raises(ValueError, match="expected standalone=False with settle"):
        cellstep.export(model, tmp_path / "m.pt", settle=x, standalone=True)
    with pytest.raises(TypeError, match="settle"):
        cellstep.export(model, tmp_path / "m.onnx", settle=x)
    assert not list(tmp_path.iterdir())


def test_the_command_line_settles(tmp_path):
    model = make_forecaster()
    x = random_steps(model, 30).numpy()
    table = write_csv(tmp_path / "silence.csv", x[:20], model.feature_names)
    source = tmp_path / "m.safetensors"
    cellstep.save(model, source)
    done = run_command("cellstep", "export", source, tmp_path / "m.cellstep", "--settle", table)
    assert done.returncode == 0, done.stderr
    cellstep.export(model, tmp_path / "cold.cellstep")
    before = np.loadtxt(table, delimiter=",", skiprows=1, usecols=range(1, 11), dtype=np.float32)
    assert_begins_where(Session(tmp_path / "m.cellstep"), Session(tmp_path / "cold.cellstep"), before, x[20:])
    done = run_command("cellstep", "export", source, tmp_path / "m.onnx", "--settle", table)
    assert done.returncode == 2 and "expected outputs that end in .cellstep, .h or .pt with --settle" in done.stderr
