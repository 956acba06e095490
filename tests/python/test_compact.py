"""The engine for small targets has the bits of the other one, whatever the model, and says what a build leaves out."""

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_quantization import NARROW, VARIANTS
from test_roads import ROWS, make

import cellstep
from cellstep.exporters.deploy import image
from cellstep.nn import LSTM, Chain, Dense
from cellstep.runtime import Session, instruction_set

ROOT = Path(__file__).parents[2]
FLOATS = ctypes.POINTER(ctypes.c_float)
# What the C API calls them.
OK, DTYPE, UNSUPPORTED = 0, 9, 32


def build(directory, *options):
    """A runtime library of this source tree."""
    cmake = [Path(sys.executable).parent / "cmake"]
    configure = [*cmake, "-S", ROOT, "-B", directory, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    configure += ["-DCELLSTEP_BUILD_OPS=OFF", "-DCELLSTEP_BUILD_TOOLS=OFF", *options]
    for command in (configure, [*cmake, "--build", directory, "--target", "cellstep_runtime_shared"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return Library(directory / "csrc/runtime/libcellstep_runtime.so")


class Library:
    """A runtime library by its C API."""

    def __init__(self, path):
        self.c = ctypes.CDLL(path)
        for name in ("cellstep_status_text", "cellstep_instruction_set"):
            getattr(self.c, name).restype = ctypes.c_char_p

    @property
    def instruction_set(self):
        return self.c.cellstep_instruction_set().decode()

    def load(self, data):
        """A model, or the status that refuses it."""
        model = ctypes.c_void_p()
        status = self.c.cellstep_model_load_memory(data, ctypes.c_size_t(len(data)), ctypes.byref(model))
        return model if status == OK else status

    def refusal(self, path):
        status = self.load(path.read_bytes())
        assert isinstance(status, int), "the model was loaded"
        return status, self.c.cellstep_status_text(status).decode()

    def session(self, path):
        return CSession(self.c, self.load(path.read_bytes()))


class CSession:
    """The calls of cellstep.runtime.Session, to another library."""

    def __init__(self, c, model):
        assert isinstance(model, ctypes.c_void_p), f"status {model}"
        info = (ctypes.c_uint32 * 16)()
        assert c.cellstep_model_get_info(model, info) == OK
        self.c, self.model, self.outputs = c, model, info[1]
        self.handle = ctypes.c_void_p()
        assert c.cellstep_session_create(model, ctypes.byref(self.handle)) == OK

    def close(self):
        self.c.cellstep_session_destroy(self.handle)
        self.c.cellstep_model_destroy(self.model)

    def call(self, name, x, *arguments, rows=1):
        x = np.ascontiguousarray(x, np.float32)
        y = np.full((rows, self.outputs), np.nan, np.float32)
        function = getattr(self.c, f"cellstep_session_{name}")
        status = function(self.handle, x.ctypes.data_as(FLOATS), *arguments, y.ctypes.data_as(FLOATS))
        assert status in (OK, 13), self.c.cellstep_status_text(status)
        return y if status == OK else None

    def run(self, x, reset=None):
        flags = None if reset is None else np.ascontiguousarray(reset, np.uint8).ctypes.data_as(ctypes.c_void_p)
        return self.call("run_reset", x, flags, ctypes.c_size_t(len(x)), rows=len(x))

    def forecast(self, x):
        return self.call("forecast", x, ctypes.c_size_t(len(x)))[0]

    def step(self, x):
        return self.call("step", x)[0]

    def start_slide(self, window):
        assert self.c.cellstep_session_slide_begin(self.handle, ctypes.c_size_t(window)) == OK

    def slide(self, x):
        y = self.call("slide", x)
        return None if y is None else y[0]

    def reset(self):
        assert self.c.cellstep_session_reset(self.handle) == OK


def answers(session, x):
    """Everything that a session can be asked, in one array."""
    flags = np.random.default_rng(5).random(len(x)) < 0.3
    found = [session.run(x), session.run(x[:7], flags[:7]), session.run(x[:1]), session.run(x[3:40], flags[3:40])]
    session.reset()
    found += [session.step(step)[None] for step in x[:5]]
    found.append(session.forecast(x[5:25])[None])
    session.start_slide(4)
    found += [y[None] for y in map(session.slide, x[:9]) if y is not None]
    return np.concatenate(found)


def series(size, steps=70):
    return (2 * np.random.default_rng(1).standard_normal((steps, size))).astype(np.float32)


def sized(inputs, hidden, layers=1, **options):
    torch.manual_seed(hidden)
    chain = Chain(
        LSTM(inputs, hidden, layers, batch_first=True, **options), Dense(hidden, 2, "sigmoid"), answers="last"
    )
    return chain.eval()


#: Whatever the runtime can be given: every option, weights, size of the last panel, and kind of answer.
MODELS = {row: lambda row=row: make(row) for row in ROWS if row not in ("lengths", "reset")}
MODELS |= {f"quantization's {name}": variant for name, variant in VARIANTS.items()}
MODELS |= {f"{units} units": lambda units=units: sized(3, units, 2) for units in (1, 4, 5, 8, 12, 13, 16, 17, 50)}
MODELS |= {
    "answers hidden, one way": lambda: Chain(LSTM(3, 9, 2), Dense(9, 1, "softmax"), answers="hidden").eval(),
    "answers hidden, both ways": lambda: Chain(
        LSTM(3, 9, 2, bidirectional=True), Dense(18, 1), answers="hidden"
    ).eval(),
    "answers hidden, with cells": lambda: Chain(
        LSTM(3, 5, return_cell_states=True), Dense(10, 1), answers="hidden"
    ).eval(),
    "layer_norm in both directions": lambda: Chain(
        LSTM(4, 21, 2, layer_norm=True, bidirectional=True, peephole=True), answers="every"
    ).eval(),
}


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
    """With fused multiply-add, as the engine beside it has it here."""
    return build(tmp_path_factory.mktemp("compact"), "-DCELLSTEP_COMPACT=ON", "-DCMAKE_CXX_FLAGS=-mfma -mf16c")


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """Both engines, without fused multiply-add."""
    options = ["-DCELLSTEP_STRICT=ON"]
    return (
        build(tmp_path_factory.mktemp("strict_compact"), "-DCELLSTEP_COMPACT=ON", *options),
        build(tmp_path_factory.mktemp("strict"), *options),
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The smallest build there is."""
    options = ["-DCELLSTEP_COMPACT=ON", "-DCELLSTEP_FLOAT32_ONLY=ON", "-DCELLSTEP_PLAIN_ONLY=ON"]
    return build(tmp_path_factory.mktemp("small"), *options, "-DCMAKE_CXX_FLAGS=-mfma")


def exported(model, directory, **options):
    path = directory / "model.cellstep"
    cellstep.export(model, path, **options)
    return path


def check(path, *sessions):
    truth = answers(sessions[0], series(Session(path).input_size))
    assert np.isfinite(truth).all() and truth.any()
    for session in sessions[1:]:
        found = answers(session, series(Session(path).input_size))
        assert truth.tobytes() == found.tobytes(), np.abs(truth - found).max()


def test_it_is_the_compact_engine(compact, strict):
    assert compact.instruction_set == "compact" == strict[0].instruction_set != strict[1].instruction_set
    assert instruction_set() != "baseline", "the comparison needs fused multiply-add"


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_float_weights(name, fast, compact, strict, tmp_path):
    path = exported(MODELS[name](), tmp_path, fast_activations=fast)
    check(path, Session(path), compact.session(path))
    if not fast:
        check(path, strict[1].session(path), strict[0].session(path))


@pytest.mark.parametrize("weights", NARROW)
@pytest.mark.parametrize("name", MODELS)
def test_narrow_weights(name, weights, compact, strict, tmp_path):
    path = exported(cellstep.quantize(MODELS[name](), weights), tmp_path)
    check(path, Session(path), compact.session(path))
    check(path, strict[1].session(path), strict[0].session(path))


#: What the smallest build leaves out, and a word of its text.
LEFT_OUT = {
    "bidirectional": ("bidirectional", {}),
    "peephole": ("peephole", {}),
    "layer_norm": ("layer_norm", {}),
    "coupled": ("coupled", {}),
    "residual": ("residual", {}),
    "return_cell_states": ("return_cell_states", {}),
    "plain": ("fast_activations", {"fast_activations": True}),
    "proj_size": ("proj_size", {}),
    "hard_sigmoid, relu, elu": ("activations", {}),
    "cell_clip": ("cell_clip", {}),
    "zoneout": ("zoneout", {}),
}


@pytest.mark.parametrize("row", LEFT_OUT)
def test_the_smallest_build_says_what_it_leaves_out(row, small, compact, tmp_path):
    word, options = LEFT_OUT[row]
    path = exported(make(row), tmp_path, **options)
    status, text = small.refusal(path)
    assert UNSUPPORTED <= status < UNSUPPORTED + 16
    assert word in text and "CELLSTEP_PLAIN_ONLY" in text and "\n" not in text
    compact.session(path).close()


@pytest.mark.parametrize("weights", NARROW)
def test_the_smallest_build_takes_no_narrow_weights(weights, small, tmp_path):
    path = exported(cellstep.quantize(make("plain"), weights), tmp_path)
    status, text = small.refusal(path)
    assert UNSUPPORTED <= status < UNSUPPORTED + 16 and weights in text and "CELLSTEP_FLOAT32_ONLY" in text


def test_nor_float64(small, tmp_path):
    path = tmp_path / "model.cellstep"
    path.write_bytes(image(make("plain").double()))
    assert small.refusal(path)[0] == DTYPE


PLAIN = ["plain", "learn_initial_state", "num_layers, dropout", "quantization's plain", "answers hidden, one way"]


@pytest.mark.parametrize("name", [name for name in MODELS if name in PLAIN or name.endswith("units")])
def test_the_smallest_build_runs_the_rest(name, small, tmp_path):
    path = exported(MODELS[name](), tmp_path)
    check(path, Session(path), small.session(path))


def test_every_option_left_out_has_a_status_of_its_own(small, tmp_path):
    statuses = [small.refusal(exported(make(row), tmp_path, **options))[0] for row, (_, options) in LEFT_OUT.items()]
    assert len(set(statuses)) == len(LEFT_OUT)


@pytest.mark.parametrize("row", ["plain", "layer_norm", "learn_initial_state", "a chain with all stages"])
def test_a_pool_is_as_many_sessions(row, compact, tmp_path):
    path = exported(make(row), tmp_path)
    streams, steps = 3, 12
    model = compact.load(path.read_bytes())
    pool = ctypes.c_void_p()
    assert compact.c.cellstep_pool_create(model, ctypes.c_size_t(streams), ctypes.byref(pool)) == OK
    x = series(Session(path).input_size, steps * streams).reshape(steps, streams, -1)
    flags = (np.random.default_rng(2).random((steps, streams)) < 0.3).astype(np.uint8)
    sessions = [Session(path) for _ in range(streams)]
    truth = np.stack([session.run(x[:, at], flags[:, at]) for at, session in enumerate(sessions)], axis=1)
    found = np.full_like(truth, np.nan)
    for step in range(steps):
        pointers = [array[step].ctypes.data_as(ctypes.c_void_p) for array in (x, flags, found)]
        assert compact.c.cellstep_pool_step(pool, *pointers) == OK
    compact.c.cellstep_pool_destroy(pool)
    compact.c.cellstep_model_destroy(model)
    assert truth.tobytes() == found.tobytes()
