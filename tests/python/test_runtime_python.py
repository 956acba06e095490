"""The Python face of the runtime: buffers, files that are mapped, threads, and what its import takes."""

import array
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from test_session import exported, series

from cellstep.nn import LSTM, Chain, Dense
from cellstep.runtime import ModelError, Pool, Session


def large(directory):
    torch.manual_seed(0)
    return exported(Chain(LSTM(64, 4), Dense(4, 1), answers="last").eval(), directory)


# Buffers


def readable(x):
    """The same values as anything that lies as float32 values in order."""
    return {
        "ndarray": x,
        "memoryview": memoryview(x),
        "array": array.array("f", x.ravel()) if x.ndim == 1 else memoryview(x.tobytes()).cast("f", x.shape),
        "tensor": torch.from_numpy(x),
        "read-only": memoryview(x).toreadonly(),
    }


@pytest.mark.parametrize("kind", readable(np.zeros(1, np.float32)))
def test_a_buffer_is_read_where_it_lies(kind, tmp_path):
    session = Session(large(tmp_path))
    x = series(40000, 64)  # 10 MB
    expected = session.forecast(x)
    source = readable(x)[kind]
    session.reset()
    tracemalloc.start()
    try:
        y = session.forecast(source)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(y, expected)
    assert peak < x.nbytes / 100  # NumPy tells tracemalloc of its arrays


def test_a_copy_would_be_noticed(tmp_path):
    session = Session(large(tmp_path))
    x = series(40000, 64)
    session.forecast(x)
    for converted in (x.astype(np.float64), np.asfortranarray(x), x[:, ::-1]):
        tracemalloc.start()
        try:
            session.forecast(converted)
            assert tracemalloc.get_traced_memory()[1] >= x.nbytes
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.tolist(),
        lambda x: x.astype(np.float64),
        lambda x: x.astype(">f4"),
        lambda x: memoryview(x.astype(np.float64)),
        lambda x: memoryview(x.astype(">f4")),
        lambda x: memoryview(np.asfortranarray(x)),
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: torch.from_numpy(np.asfortranarray(x)),
    ],
)
def test_anything_else_is_converted(make, artifacts, series):
    x = np.round(series)
    assert np.array_equal(Session(artifacts[".cellstep"]).run(make(x)), Session(artifacts[".cellstep"]).run(x))


def test_answers_lie_where_the_caller_wants(artifacts, series):
    session, other = Session(artifacts[".cellstep"]), Session(artifacts[".cellstep"])
    pool = Pool(artifacts[".cellstep"], 2)
    steps, one = np.empty((len(series), 1), np.float32), array.array("f", [0])
    assert session.run(series, out=steps) is steps and np.array_equal(steps, other.run(series))
    assert session.step(series[0], out=one) is one and one[0] == other.step(series[0])[0]
    assert session.forecast(series, out=one) is one and one[0] == other.forecast(series)[0]
    assert session.run(series, np.ones(len(series), bool), steps) is steps
    session.start_slide(2)
    other.start_slide(2)
    assert session.slide(series[0], out=one) is None and other.slide(series[0]) is None
    assert session.slide(series[1], out=one) is one and one[0] == other.slide(series[1])[0]
    both = memoryview(bytearray(8)).cast("f", (2, 1))
    assert pool.step(series[:2], out=both) is both
    assert both.tolist() == Pool(artifacts[".cellstep"], 2).step(series[:2]).tolist()


def test_an_out_that_will_not_do_is_refused(artifacts, series):
    session = Session(artifacts[".cellstep"])
    before = session.state
    frozen = np.zeros(1, np.float32)
    frozen.flags.writeable = False
    for wrong in (frozen, np.zeros(1), np.zeros(2, np.float32)[::2].astype(np.int32), [0.0], b"1234", "out"):
        with pytest.raises(TypeError, match="expected out as a writable, C-contiguous buffer of float32, got <class"):
            session.step(series[0], out=wrong)
    with pytest.raises(TypeError, match="expected out as a writable"):
        session.run(series, out=np.zeros((1, len(series)), np.float64).T)
    for wrong in (np.zeros(2, np.float32), np.zeros((1, 1), np.float32)):
        with pytest.raises(ValueError, match=r"expected out of shape \(1,\), got \("):
            session.step(series[0], out=wrong)
    assert all(map(np.array_equal, session.state, before))


def test_what_is_no_numbers_is_refused(artifacts):
    session = Session(artifacts[".cellstep"])
    for wrong in ("text", object(), ["a"] * 10, {}):
        with pytest.raises(TypeError, match="expected numbers as x, got"):
            session.step(wrong)
    for wrong in (array.array("f", [0] * 9), memoryview(bytes(80)).cast("f"), 1.0):
        with pytest.raises(ValueError, match=r"expected x of shape \(10,\), got \("):
            session.step(wrong)
    with pytest.raises(ValueError, match=r"expected x of shape \(10, 10\), got \(10,\)"):
        session.run(array.array("f", [0] * 10))


# Files


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_file_is_mapped_and_let_go(artifacts, tmp_path):
    path = tmp_path / "model.cellstep"
    path.write_bytes(artifacts[".cellstep"].read_bytes())

    def mapped():
        with open("/proc/self/maps") as maps:
            return str(path) in maps.read()

    session = Session(path)
    pool = Pool(session.model, 2)
    assert mapped()
    path.unlink()  # as a new file that is renamed over it does
    assert np.array_equal(pool.step(np.zeros((2, 10)))[0], session.step(np.zeros(10)))
    del session
    pool.step(np.zeros((2, 10)))  # the model lives as long as who uses it
    del pool
    with open("/proc/self/maps") as maps:
        assert str(path) not in maps.read()
    with pytest.raises(FileNotFoundError):
        Session(path)
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="shorter or longer"):
        Session(path)
    path.write_bytes(artifacts[".cellstep"].read_bytes()[:-1])
    with pytest.raises(ModelError, match="shorter or longer"):
        Session(path)
    assert not mapped()


# Threads


def test_a_session_is_one_thread_s_at_a_time(tmp_path):
    session = Session(large(tmp_path))
    x = series(4000, 64)
    told, stop = [], threading.Event()

    def other():
        while not stop.is_set():
            try:
                session.run(x)
            except RuntimeError as error:
                told.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    try:
        for _ in range(2000):
            for call in (
                lambda: session.run(x),
                session.reset,
                lambda: session.state,
                lambda: session.swap(session.model),
            ):
                try:
                    call()
                except RuntimeError as error:
                    told.append(str(error))
            if told:
                break
    finally:
        stop.set()
        thread.join()
    assert told and "this session is in a call on another thread" in told[0]
    session.run(x)


def test_calls_release_the_interpreter(tmp_path):
    """Another thread counts while a call runs that takes as long as many of its turns."""
    torch.manual_seed(0)
    session = Session(exported(Chain(LSTM(64, 300, 2), answers="last").eval(), tmp_path))
    x = series(3000, 64)
    counts, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            counts[0] += 1
            time.sleep(0)  # gives the interpreter back

    thread = threading.Thread(target=count)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody is made to give up the interpreter
    try:
        thread.start()
        stop.wait(0)
        seen = counts[0]
        session.forecast(x)
        assert counts[0] > seen
    finally:
        stop.set()
        sys.setswitchinterval(before)
        thread.join()


# What the import takes

START = """
import sys
before = set(sys.modules)
import array
from cellstep.runtime import Session
session = Session(sys.argv[1])
x, y = array.array("f", [0.5] * 10), array.array("f", [0])
session.step(x, out=y)
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not loaded & {"numpy", "torch", "typing", "pathlib", "importlib.metadata", "re"}, loaded
print(y[0])
import numpy
session.reset()
assert session.step([0.5] * 10).tolist() == y.tolist() and "torch" not in sys.modules
"""


def test_from_import_to_forecast_without_torch_and_numpy(artifacts):
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", START, artifacts[".cellstep"]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert np.float32(done.stdout) == Session(artifacts[".cellstep"]).step(np.full(10, 0.5))[0]


def test_the_package_still_knows_its_names():
    import importlib.metadata

    import cellstep

    assert cellstep.__version__ == importlib.metadata.version("cellstep")
    assert os.path.isdir(cellstep.cmake_prefix_path)
    with pytest.raises(AttributeError, match="module 'cellstep' has no attribute 'nothing'"):
        cellstep.nothing  # noqa: B018


def test_the_table_of_the_start():
    root = Path(__file__).parents[2]
    command = [sys.executable, root / "benchmarks/startup.py", "--runs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = {cells[1].strip(): cells[2:] for cells in (line.split("|") for line in done.stdout.splitlines()[2:])}
    assert next(iter(rows)) == "cellstep.runtime, buffers" and len(rows) == 4
    # Memory is no matter of the moment, as times are.
    assert float(rows["cellstep.runtime, buffers"][3]) < 0.1
