"""The torch-free session beyond one stream: sliding windows, threads, the memory of models, denormal numbers."""

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_forecaster
from test_roads import ROWS, make

import cellstep
from cellstep.nn import LSTM, Chain, Dense, Scale, Skip
from cellstep.runtime import Session

INPUTS = 4


def exported(model, directory):
    path = directory / "model.cellstep"
    cellstep.export(model, path)
    return path


def series(steps, inputs=INPUTS, seed=3):
    return np.random.default_rng(seed).standard_normal((steps, inputs)).astype(np.float32)


def whole(session, window):
    """The window from the initial state, all of it computed."""
    session.reset()
    return session.forecast(window)


# Sliding windows


@pytest.mark.parametrize("window", [1, 2, 17, 70])
@pytest.mark.parametrize("row", [row for row in ROWS if row not in ("lengths", "reset")])
def test_a_slide_gives_what_the_whole_window_gives(row, window, tmp_path):
    sliding = Session(exported(make(row), tmp_path))
    other = Session(sliding.model)
    sliding.start_slide(window)
    # Several times round the ring; 70 is longer than a chunk of the engine.
    x = series(3 * window + 200)
    answers = [sliding.slide(step) for step in x]
    assert all(answer is None for answer in answers[: window - 1])
    for last in range(window, len(x) + 1):
        assert np.array_equal(answers[last - 1], whole(other, x[last - window : last])), last


@pytest.mark.parametrize("answers", ["every", "last", "hidden"])
@pytest.mark.parametrize("hidden", [3, 8, 16, 31, 50])
def test_a_slide_of_any_size_and_kind_of_answer(hidden, answers, tmp_path):
    torch.manual_seed(hidden)
    chain = Chain(
        Scale([1.0, 2.0, 0.0, 4.0], [0.5, 1.0, 2.0, 0.1]),
        Dense(INPUTS, 5, "relu"),
        LSTM(5, hidden, 2, bidirectional=hidden % 2 == 0),
        Dense(hidden * (1 + (hidden % 2 == 0)), 3),
        Skip([3, 0, 1]),
        answers=answers,
    ).eval()
    sliding = Session(exported(chain, tmp_path))
    other = Session(sliding.model)
    sliding.start_slide(12)
    x = series(60)
    for last in range(1, len(x) + 1):
        y = sliding.slide(x[last - 1])
        assert y is None if last < 12 else np.array_equal(y, whole(other, x[last - 12 : last]))


@pytest.mark.parametrize("weights", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize(
    "row",
    ["plain", "bidirectional", "proj_size", "layer_norm", "coupled", "all of them at once", "a chain with all stages"],
)
def test_a_slide_with_narrow_weights(row, weights, tmp_path):
    sliding = Session(exported(cellstep.quantize(make(row), weights), tmp_path))
    other = Session(sliding.model)
    sliding.start_slide(9)
    # Steps of different sizes, as int8 scales each by its own.
    x = series(120) * np.logspace(-3, 2, 120, dtype=np.float32)[:, None]
    for last in range(1, len(x) + 1):
        y = sliding.slide(x[last - 1])
        assert y is None if last < 9 else np.array_equal(y, whole(other, x[last - 9 : last]))


def test_a_slide_takes_the_window_of_the_model_and_leaves_the_stream_alone(artifacts, model, series):
    session, stream, other = (Session(artifacts[".cellstep"]) for _ in range(3))
    for last in range(1, len(series) + 1):
        y = session.slide(series[last - 1])
        assert (y is None) == (last < model.window)
        assert np.array_equal(session.step(series[last - 1]), stream.step(series[last - 1]))
        if y is not None:
            assert np.array_equal(y, whole(other, series[last - model.window : last]))


def test_a_slide_begins_anew(artifacts, series):
    session, other = (Session(artifacts[".cellstep"]) for _ in range(2))
    for window in (3, 3, 7, 1, 40):
        session.start_slide(window)
        answers = [session.slide(step) for step in series]
        assert [answer is None for answer in answers] == [True] * (window - 1) + [False] * (41 - window)
        assert np.array_equal(answers[-1], whole(other, series[-window:]))
    session.start_slide(5)
    session.slide(series[0])
    session.reset()  # of the stream
    assert [session.slide(step) is None for step in series[:4]] == [True, True, True, False]


def test_a_slide_refuses_what_it_cannot_take(artifacts, series, tmp_path):
    session = Session(artifacts[".cellstep"])
    with pytest.raises(ValueError, match=r"expected x of shape \(10,\), got \(9,\)"):
        session.slide(series[0, :9])
    with pytest.raises(ValueError, match=r"expected x of shape \(10,\), got \(2, 10\)"):
        session.slide(series[:2])
    for window in (0, -1):
        with pytest.raises(ValueError, match=f"a window of at least one step, got {window}"):
            session.start_slide(window)
    with pytest.raises(ValueError, match=r"a window of 1 to 16777216 steps, got 16777217"):
        session.start_slide(2**24 + 1)
    # None of these counted as a step.
    assert sum(session.slide(step) is None for step in series) == 11
    without = Session(exported(Chain(LSTM(INPUTS, 3), answers="every").eval(), tmp_path))
    for call in (without.start_slide, lambda: without.slide(np.zeros(INPUTS))):
        with pytest.raises(ValueError, match=r"the model names none: call start_slide\(T\) first"):
            call()


# Threads

#: Model and steps that each way of sharing work needs.
SHARED = {
    "layers as a wavefront": (lambda: Chain(LSTM(INPUTS, 50, 3), Dense(50, 2), answers="every"), 1000),
    "options as a wavefront": (
        lambda: Chain(LSTM(INPUTS, 40, 2, layer_norm=True), LSTM(40, 30, peephole=True), answers="every"),
        1200,
    ),
    "directions side by side": (lambda: Chain(LSTM(INPUTS, 40, 2, bidirectional=True), answers="every"), 300),
    "units of a large layer": (lambda: Chain(LSTM(INPUTS, 400), answers="every"), 20),
    "too little work": (lambda: Chain(LSTM(INPUTS, 8), answers="every"), 30),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    paths = {}
    for name, (make_model, _) in SHARED.items():
        torch.manual_seed(0)
        paths[name] = exported(make_model().eval(), tmp_path_factory.mktemp("shared"))
    return paths


def everything(session, x):
    """Bits of all that a session gives: runs of several lengths in a row, a forecast and the state."""
    session.reset()
    parts = [session.run(x), session.run(x[: len(x) // 3]), session.run(x[:1]), session.forecast(x), *session.state]
    return b"".join(part.tobytes() for part in parts)


@pytest.mark.parametrize("name", SHARED)
def test_threads_change_no_bit(name, shared):
    x = series(SHARED[name][1])
    alone = everything(Session(shared[name]), x)
    for threads in (1, 2, 3, 4):
        session = Session(shared[name], threads=threads)
        for _ in range(3):
            assert everything(session, x) == alone, threads
        sliding, other = Session(shared[name], threads=threads), Session(shared[name])
        sliding.start_slide(len(x) - 2)
        answers = [sliding.slide(step) for step in x]
        assert np.array_equal(answers[-1], whole(other, x[2:]))


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["layers as a wavefront", "directions side by side", "units of a large layer"])
def test_threads_change_no_bit_of_narrow_weights(name, weights, tmp_path):
    torch.manual_seed(0)
    path = exported(cellstep.quantize(SHARED[name][0]().eval(), weights), tmp_path)
    x = series(SHARED[name][1])
    alone = everything(Session(path), x)
    assert everything(Session(path, threads=3), x) == alone


def test_threads_are_counted(artifacts):
    for threads in (0, -1, 1025):
        with pytest.raises(ValueError, match=f"threads from 1 to 1024, got {threads}"):
            Session(artifacts[".cellstep"], threads=threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_runs_a_session_with_threads(shared):
    name = "layers as a wavefront"
    x = series(SHARED[name][1])
    session = Session(shared[name], threads=3)
    expected = everything(session, x)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if everything(session, x) == expected else 1
            del session
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, TASK, ctypes.c_void_p)


class Library:
    """The C API itself, from the shared library that the wheel carries."""

    def __init__(self):
        directory = Path(cellstep.ops.library_path).parent
        (path,) = directory.glob("*cellstep_runtime.*")
        self.calls = ctypes.CDLL(str(path))
        name = self.calls.cellstep_model_feature_name
        name.restype, name.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]
        self.calls.cellstep_status_text.restype = ctypes.c_char_p

    def __call__(self, name, *arguments):
        """The status of a call. Pointers are passed as such, numbers as sizes."""
        sized = [ctypes.c_size_t(value) if isinstance(value, int) else value for value in arguments]
        return getattr(self.calls, f"cellstep_{name}")(*sized)

    def model(self, path):
        handle = ctypes.c_void_p()
        assert self("model_load_file", str(path).encode(), ctypes.byref(handle)) == 0
        return handle

    def session(self, model):
        handle = ctypes.c_void_p()
        assert self("session_create", model, ctypes.byref(handle)) == 0
        return handle


@pytest.fixture(scope="module")
def library():
    return Library()


def pointer(values):
    return ctypes.c_void_p(values.ctypes.data)


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("order", ["forwards", "backwards"])
@pytest.mark.parametrize("name", [name for name in SHARED if name != "too little work"])
def test_tasks_may_run_in_any_order(name, order, threads, shared, library):
    """With threads that are none: the tasks of a call run one after the other."""
    counts = []

    @RUN
    def run(_, count, task, argument):
        counts.append(count)
        for index in range(count) if order == "forwards" else reversed(range(count)):
            task(argument, index)

    x = series(SHARED[name][1])
    expected = Session(shared[name]).run(x)
    model = library.model(shared[name])
    session = library.session(model)
    for use in (run, None, run):
        given = len(counts)
        assert library("session_set_parallel", session, threads, None, use) == 0
        assert library("session_reset", session) == 0
        y = np.zeros_like(expected)
        assert library("session_run", session, pointer(x), len(x), pointer(y)) == 0
        assert np.array_equal(y, expected)
        assert (max(counts[given:], default=0) > 1) == (use is not None)
    library("session_destroy", session)
    library("model_destroy", model)


def test_the_c_api_names_wrong_arguments(library, shared, artifacts):
    argument, pending = 1, 13
    model = library.model(shared["too little work"])
    session = library.session(model)
    x, y = np.zeros(INPUTS, np.float32), np.full(8, 5.0, np.float32)
    assert library("session_set_parallel", session, 0, None, RUN(lambda *_: None)) == argument
    assert library("session_set_parallel", None, 2, None, RUN(lambda *_: None)) == argument
    assert library("session_slide", session, pointer(x), pointer(y)) == argument  # before a window began
    assert library("session_slide_begin", session, 0) == argument  # the model names no window
    assert library("session_slide_begin", session, 2**24 + 1) == argument
    assert library("session_slide_begin", None, 3) == argument
    assert library("session_slide_begin", session, 2) == 0
    assert library("session_slide", session, None, pointer(y)) == argument
    assert library("session_slide", session, pointer(x), None) == argument
    assert library("session_slide", session, pointer(x), pointer(y)) == pending
    assert (y == 5.0).all()
    assert b"the window is not full" in library.calls.cellstep_status_text(pending)
    assert library("session_slide", session, pointer(x), pointer(y)) == 0
    assert (y != 5.0).all()
    library("session_destroy", session)
    library("model_destroy", model)


# Memory of models


def test_weights_begin_at_a_cache_line(artifacts, library):
    """Names lie at multiples of 64 bytes from the beginning of a file, as weights do."""
    image = artifacts[".cellstep"].read_bytes()
    models = []
    for _ in range(8):
        models.append(library.model(artifacts[".cellstep"]))
        handle = ctypes.c_void_p()
        assert library("model_load_memory", image, len(image), ctypes.byref(handle)) == 0
        models.append(handle)
    for model in models:
        assert library.calls.cellstep_model_feature_name(model, 0) % 64 == 0
        library("model_destroy", model)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("hidden", [3, 200])  # shorter and longer than what is read at once
def test_a_pipe_is_read_and_a_directory_is_not(hidden, tmp_path):
    path = exported(make_forecaster(hidden=hidden), tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(path.read_bytes(),))
    writer.start()
    session = Session(pipe)
    writer.join()
    x = series(5, 10)
    assert np.array_equal(session.run(x), Session(path).run(x))
    with pytest.raises(IsADirectoryError):
        Session(tmp_path)


# Denormal numbers


def flushes():
    """Whether this thread takes denormal numbers for zero, as operands or as results."""
    smallest = np.full(1, np.finfo(np.float32).tiny)
    denormal = np.full(1, 1, np.int32).view(np.float32)
    return bool(smallest * np.float32(0.5) == 0), bool(denormal * np.float32(2**30) == 0)


def calls_of(path):
    x = series(40, 10)
    session = Session(path)
    session.start_slide(3)
    yield lambda: session.step(x[0])
    yield lambda: session.run(x)
    yield lambda: session.forecast(x)
    yield lambda: session.slide(x[0])
    threaded = Session(path, threads=2)
    yield lambda: threaded.run(np.tile(x, (20, 1)))
    chain = Chain(LSTM(10, 6, 2, bidirectional=True), LSTM(12, 5, layer_norm=True), Dense(5, 2), answers="every").eval()
    batch = torch.from_numpy(x).reshape(4, 10, 10)
    yield lambda: chain(batch).sum().backward()
    with torch.no_grad():
        yield lambda: chain(batch)


def test_calls_leave_the_control_register_as_it_was(artifacts):
    assert flushes() == (False, False)
    for call in calls_of(artifacts[".cellstep"]):
        call()
        assert flushes() == (False, False)
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot set the register here")
    try:
        assert flushes() == (True, True)
        for call in calls_of(artifacts[".cellstep"]):
            call()
            assert flushes() == (True, True)
    finally:
        torch.set_flush_denormal(False)


DECAY = """
import hashlib, sys, numpy as np
from cellstep.runtime import Session, instruction_set
digests = []
for path in sys.argv[1:]:
    session = Session(path)
    for size in (1e-30, 1e-37, 1e-38, 1e-39, 1e-44):
        h, c = session.state
        session.state = np.full_like(h, size), np.full_like(c, -size)
        y = session.run(np.zeros((300, session.input_size), np.float32))
        parts = [y, *session.state]
        assert all(np.isfinite(part).all() for part in parts)
        # No bias, small weights: h and c shrink at each step, until they are flushed to zero.
        assert all((part == 0).all() for part in session.state), session.state
        digests += [part.tobytes() for part in parts]
print(instruction_set(), hashlib.sha256(b"".join(digests)).hexdigest())
"""


def test_a_state_that_decays_ends_at_zero_on_every_instruction_set(tmp_path):
    paths = []
    for options in ({}, {"peephole": True}, {"zoneout": 0.1}):
        torch.manual_seed(0)
        directory = tmp_path / str(len(paths))
        directory.mkdir()
        paths.append(exported(Chain(LSTM(INPUTS, 20, 2, bias=False, **options), answers="every").eval(), directory))

    def run_on(instruction_set):
        environment = {**os.environ, "CELLSTEP_CPU": instruction_set}
        command = [sys.executable, "-c", DECAY, *map(str, paths)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    name, widest = run_on("avx512")
    baseline = run_on("baseline")
    if name in ("native", "baseline"):
        assert baseline == [name, widest]
    else:
        assert run_on("avx2") == ["avx2", widest]
