"""The C and C++ faces of the runtime: memory of the caller's own, what no call does, threads, builds without a heap."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_forecaster
from test_consumer import ROOT, answers
from test_consumer import expected as five_steps  # noqa: F401 (a fixture)
from test_roads import make
from test_session import Library, exported, pointer

import cellstep
from cellstep.nn import LSTM, Chain, Dense
from cellstep.runtime import ModelError, Pool, Session

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the programs ask Linux and glibc")

INCLUDE = f"-I{ROOT / 'csrc/runtime/include'}"
PACKAGE = Path(cellstep.cmake_prefix_path)
ARCHIVE = PACKAGE / "lib/libcellstep_runtime_static.a"
CORE = ["dispatch", "engine", "image", "layer", "pack"]
SOURCES = [*(ROOT / f"csrc/core/{name}.cpp" for name in CORE), *sorted((ROOT / "csrc/runtime").glob("*.cpp"))]
OPTIONS = [
    "-std=c++17",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-psabi",
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-rtti",
]
#: How the core is built for one instruction set.
CORE_OPTIONS = [*OPTIONS, "-fno-math-errno", "-fno-trapping-math", f"-I{ROOT / 'csrc'}", INCLUDE]
CORE_OPTIONS += ["-DCELLSTEP_SINGLE_ISA", "-DCELLSTEP_ISA=native", '-DCELLSTEP_VERSION_STRING="0"']


def compile_with(*command):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def build_objects(directory, *options):
    """The core for this machine and the runtime, from their sources."""
    objects = []
    if cellstep.runtime.instruction_set() in ("avx2", "avx512") and "-m32" not in options:
        options += ("-mavx2", "-mfma", "-mf16c")
    for source in (ROOT / "csrc/core/kernels.cpp", *SOURCES):
        objects.append(directory / f"{source.stem}.o")
        compile_with("g++", *CORE_OPTIONS, *options, "-c", "-o", objects[-1], source)
    return objects


def run_program(*command):
    return subprocess.run([*map(str, command)], capture_output=True, timeout=300)


# What no call does

MODELS = {
    "forecaster": make_forecaster,
    "options": lambda: make("a chain with all stages"),
    "bidirectional": lambda: make("bidirectional"),
    "learned initial state": lambda: make("learn_initial_state"),
    "int8": lambda: cellstep.quantize(make_forecaster(), "int8"),
    "large": lambda: Chain(LSTM(20, 200), Dense(200, 3), answers="last").eval(),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two models of each kind that differ in their weights."""
    found = {}
    for name, make_model in MODELS.items():
        paths = []
        for place in range(2):
            model = make_model()
            if place and isinstance(model, Chain):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(0.75)
            paths.append(exported(model, tmp_path_factory.mktemp("pairs")))
        found[name] = paths
    return found


def expected_answers(paths):
    """What tests/cpp/realtime.cpp writes, by way of Python."""
    steps, window, streams = 16, 8, 7
    models = [Session(path).model for path in paths]
    session = Session(models[0])
    session.start_slide(window)
    try:
        pool = Pool(models[0], streams)
    except ValueError:
        pool = None
    inputs = session.input_size
    x = (np.arange(steps * streams * inputs) * 7 % 23).astype(np.float32) * np.float32(0.125) - np.float32(1.25)
    sequence, rows = x[: steps * inputs].reshape(steps, inputs), x.reshape(steps, streams, inputs)
    reset = np.arange(steps) % 5 == 3
    parts = []
    for model in (models[0], models[1], models[0]):
        session.swap(model)
        session.reset()
        if pool:
            parts += [session.step(step) for step in sequence]
        parts += [session.run(sequence), session.run(sequence, reset)]
        state = session.state
        parts.append(session.forecast(sequence))
        session.state = state
        parts.append(session.forecast(sequence))
        parts += [y for y in map(session.slide, sequence) if y is not None]
    for step in range(steps if pool else 0):
        if step == 9:
            pool.reset()
        if step == 12:
            pool.set_state(4, pool.state(2))
        flags = reset[step % 3 : step % 3 + streams] if step % 2 else None
        parts.append(pool.step(rows[step], flags))
    return np.concatenate([np.ravel(part) for part in parts])


@pytest.fixture(scope="module")
def realtime(tmp_path_factory):
    program = tmp_path_factory.mktemp("realtime") / "realtime"
    compile_with("g++", *OPTIONS, "-O1", INCLUDE, ROOT / "tests/cpp/realtime.cpp", "-o", program, ARCHIVE)
    return program


@pytest.mark.parametrize("memory", ["heap", "memory"])
@pytest.mark.parametrize("name", MODELS)
def test_no_call_allocates_or_enters_the_system(name, memory, pairs, realtime):
    done = run_program(realtime, *pairs[name], memory)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.frombuffer(done.stdout, np.float32), expected_answers(pairs[name]))


def test_what_is_forbidden_is_noticed(pairs, realtime):
    done = run_program(realtime, *pairs["forecaster"], "allocates")
    assert (done.returncode, done.stderr) == (3, b"an allocation\n")
    assert run_program(realtime, *pairs["forecaster"], "enters").returncode == -9


@pytest.fixture(scope="module")
def without_heap(tmp_path_factory):
    return build_objects(tmp_path_factory.mktemp("without_heap"), "-Os", "-DCELLSTEP_NO_HEAP")


def test_a_build_without_a_heap_needs_the_compiler_and_five_functions(without_heap, tmp_path):
    """No libm, no operator new, no malloc, no guard of a static local, no exception, no stdio."""
    compile_with("ld", "-r", "-o", tmp_path / "all.o", *without_heap)
    listed = subprocess.run(["nm", "-u", tmp_path / "all.o"], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"U (\w+)", listed)) <= {"memcpy", "memset", "memcmp", "memmove", "strlen"}
    defined = subprocess.run(["nm", "--defined-only", tmp_path / "all.o"], capture_output=True, text=True, check=True)
    names = set(re.findall(r"T (cellstep_\w+)", defined.stdout))
    assert {"cellstep_model_init", "cellstep_session_init", "cellstep_pool_init", "cellstep_session_selftest"} <= names
    assert not {name for name in names if re.search("load|create|destroy|parallel|slide_begin|map_file", name)}


def test_a_build_without_a_heap_gives_the_same_bits(without_heap, pairs, tmp_path):
    program, source = tmp_path / "realtime", ROOT / "tests/cpp/realtime.cpp"
    compile_with("g++", *OPTIONS, "-DCELLSTEP_NO_HEAP", INCLUDE, source, "-o", program, *without_heap)
    for paths in pairs.values():
        done = run_program(program, *paths, "memory")
        assert done.returncode == 0, done.stderr
        assert np.array_equal(np.frombuffer(done.stdout, np.float32), expected_answers(paths))


def test_every_symbol_of_the_header_is_there(without_heap):
    """In the library with a heap all that the header declares, without one all that it leaves."""
    header = (ROOT / "csrc/runtime/include/cellstep/runtime.h").read_text()

    def declared(*options):
        command = ["gcc", *options, "-E", "-x", "c", "-"]
        text = subprocess.run(command, input=header, capture_output=True, text=True, check=True).stdout
        return set(re.findall(r"\b(cellstep_\w+)\(", text)) - {"cellstep_run_tasks", "cellstep_task"}

    def defined(path):
        listed = subprocess.run(["nm", "--defined-only", *path], capture_output=True, text=True, check=True).stdout
        return set(re.findall(r"T (cellstep_\w+)", listed))

    assert declared() == defined([ARCHIVE])
    assert declared("-DCELLSTEP_NO_HEAP") == defined(without_heap)


# Function effects

KERNELS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512vnni"],
}


def effects_of(source, directory, *options):
    """What clang says of a source's function effects."""
    pytest.importorskip("ziglang", reason="clang 20 or later comes in the package ziglang")
    command = [sys.executable, "-m", "ziglang", "c++", "-target", "x86_64-linux-musl", *OPTIONS, "-Wfunction-effects"]
    command += [f"-I{ROOT / 'csrc'}", INCLUDE, '-DCELLSTEP_VERSION_STRING="0"', *options, "-O0", "-c", source]
    environment = {**os.environ, "ZIG_LOCAL_CACHE_DIR": str(directory), "ZIG_GLOBAL_CACHE_DIR": str(directory)}
    command += ["-o", directory / "out.o"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    return done.returncode, done.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_clang_finds_nothing_that_blocks(source, tmp_path):
    code, text = effects_of(source, tmp_path)
    assert code == 0, text


@pytest.mark.parametrize("source", ["kernels", "int8"])
@pytest.mark.parametrize("isa", KERNELS)
def test_clang_finds_nothing_that_blocks_in_the_kernels(isa, source, tmp_path):
    code, text = effects_of(ROOT / f"csrc/core/{source}.cpp", tmp_path, f"-DCELLSTEP_ISA={isa}", *KERNELS[isa])
    assert code == 0, text


@pytest.mark.parametrize("mistake", ["delete new int;", "static int asked = cellstep_api_version(); (void)asked;"])
def test_clang_would_find_it(mistake, tmp_path):
    """Deep below a call that is marked."""
    text = (ROOT / "csrc/runtime/session.cpp").read_text()
    place = "void copy(float* to, const float* from, std::size_t count) {"
    assert place in text
    (tmp_path / "session.cpp").write_text(text.replace(place, place + mistake))
    code, text = effects_of(tmp_path / "session.cpp", tmp_path)
    assert code != 0 and "'nonblocking' attribute must not" in text, text


def test_every_call_on_a_stream_is_marked():
    header = (ROOT / "csrc/runtime/include/cellstep/runtime.h").read_text()
    call = r"CELLSTEP_API cellstep_status cellstep_((?:session|pool)_\w+)\([^;]*\)( CELLSTEP_NONBLOCKING)?;"
    plain = {name for name, marked in re.findall(call, header) if not marked}
    begin = {"session_init", "session_init_for", "session_create", "pool_init", "pool_create"}
    assert plain == begin | {"session_slide_init", "session_slide_begin", "session_set_parallel", "pool_set_parallel"}


# Threads


def test_thread_sanitizer_finds_nothing(pairs, tmp_path):
    objects = build_objects(tmp_path, "-O1", "-fsanitize=thread")
    program, source = tmp_path / "threads", ROOT / "tests/cpp/threads.cpp"
    compile_with("g++", "-std=c++17", "-O1", "-fsanitize=thread", "-pthread", INCLUDE, source, "-o", program, *objects)
    torch.manual_seed(0)
    wide = exported(Chain(LSTM(4, 50, 2), Dense(50, 2), answers="every").eval(), tmp_path)
    runs = [(*pairs[name], 40) for name in pairs] + [(wide, wide, 1000)]  # the last shares its layers as a wavefront
    for run in runs:
        done = run_program("setarch", "-R", program, *run)
        assert (done.returncode, done.stdout) == (0, b"equal\n"), done.stderr[-3000:]


# C++


@pytest.mark.parametrize(
    "options",
    [["g++", "-std=c++17"], ["g++", "-std=c++20"], ["g++", "-std=c++17", "-fno-exceptions", "-fno-rtti"]],
    ids=" ".join,
)
def test_the_wrapper(options, artifacts, five_steps, tmp_path):  # noqa: F811
    program, source = tmp_path / "wrapper", ROOT / "tests/cpp/wrapper.cpp"
    compile_with(*options, "-Wall", "-Wextra", "-Wpedantic", "-Werror", INCLUDE, source, "-o", program, ARCHIVE)
    done = subprocess.run([program, artifacts[".cellstep"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(answers(done.stdout), five_steps)


@pytest.mark.parametrize("package", ["cellstep", "cellstep-static"])
def test_a_program_by_way_of_pkg_config(package, artifacts, five_steps, tmp_path):  # noqa: F811
    environment = {**os.environ, "PKG_CONFIG_PATH": str(PACKAGE / "lib/pkgconfig")}
    ask = ["pkg-config", "--cflags", "--libs", package]
    flags = subprocess.run(ask, env=environment, capture_output=True, text=True, check=True).stdout.split()
    version = subprocess.run([*ask[:1], "--modversion", package], env=environment, capture_output=True, text=True)
    assert version.stdout.strip() == cellstep.__version__
    compile_with("gcc", "-std=c11", ROOT / "examples/embedded/main.c", "-o", tmp_path / "stream", *flags)
    found = {**os.environ, "LD_LIBRARY_PATH": str(PACKAGE / "lib")}
    command = [tmp_path / "stream", artifacts[".cellstep"]]
    done = subprocess.run(command, env=found, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(answers(done.stdout), five_steps)


@pytest.mark.parametrize("source", ["forecast.c", "forecast.cpp"])
def test_the_six_lines(source, artifacts, series, tmp_path):
    program = tmp_path / "forecast"
    compiler = ["gcc", "-std=c11"] if source.endswith(".c") else ["g++", "-std=c++17"]
    options = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", INCLUDE]
    compile_with(*compiler, *options, ROOT / "examples/embedded" / source, "-o", program, ARCHIVE, "-lstdc++", "-lm")
    window = "\n".join(",".join(f"{value:.9g}" for value in step) for step in series) + "\n"
    command = [program, artifacts[".cellstep"]]
    done = subprocess.run(command, input=window, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.float32(done.stdout) == Session(artifacts[".cellstep"]).forecast(series)[0]
    for arguments, code in (([ROOT / "README.md"], 1), ([], 2)):
        done = subprocess.run([program, *arguments], input=window, capture_output=True, text=True)
        assert done.returncode == code and done.stderr.startswith(("error: expected a deploy file", "usage: "))


# Memory of the caller's own, through the C API

ARGUMENT, MEMORY, NONFINITE, ALIGNMENT, STEPS, BIDIRECTIONAL, SHAPE = 1, 2, 10, 11, 14, 15, 16
MODEL_BYTES = 64


class Memory:
    """So many bytes at an address `off` past a cache line, and a guard on both sides."""

    def __init__(self, size, off=0):
        self.size = size
        self._all = np.full(size + 256, 0xA5, np.uint8)
        self._begin = (-self._all.ctypes.data) % 64 + 64 + off
        self.pointer = ctypes.c_void_p(self._all.ctypes.data + self._begin)

    def assert_guards_stand(self):
        outside = np.delete(self._all, slice(self._begin, self._begin + self.size))
        assert (outside == 0xA5).all()


class Handles(Library):
    def __init__(self):
        super().__init__()
        for name in ("memory_required", "memory_required_for", "slide_memory_required", "pool_memory_required"):
            getattr(self.calls, f"cellstep_{name}").restype = ctypes.c_size_t

    def made(self, name, *arguments):
        handle = ctypes.c_void_p(1)
        status = self(name, *arguments, ctypes.byref(handle))
        assert (handle.value is None) == (status != 0)
        return status, handle

    def model_in(self, image, options=0, memory=None):
        """Status, handle, and what must stay alive."""
        memory = memory or Memory(MODEL_BYTES)
        file = Memory(len(image))
        ctypes.memmove(file.pointer, image, len(image))
        unsigned = ctypes.c_uint(options)
        status, handle = self.made("model_init", memory.pointer, memory.size, file.pointer, len(image), unsigned)
        return status, handle, (memory, file)


@pytest.fixture(scope="module")
def library():
    return Handles()


def noise(steps, inputs):
    return np.random.default_rng(3).standard_normal((steps, inputs)).astype(np.float32)


@pytest.mark.parametrize("off", [0, 8, 56])
@pytest.mark.parametrize("steps", [0, 1, 5, 64, 1000])
@pytest.mark.parametrize("name", MODELS)
def test_a_session_stays_within_its_memory(name, steps, off, library, pairs):
    path = pairs[name][0]
    _, model, alive = library.model_in(path.read_bytes())
    memory = Memory(library("memory_required_for", model, steps), off)
    status, session = library.made("session_init_for", model, steps, memory.pointer, memory.size)
    assert status == 0
    other = Session(path)
    x = noise(1000, other.input_size)
    count = steps if name == "bidirectional" and steps else 64 if name == "bidirectional" else 1000
    y = np.empty((count, other.output_size), np.float32)
    for _ in range(2):
        assert library("session_run", session, pointer(x), count, pointer(y)) == 0
        assert np.array_equal(y, other.run(x[:count]))
    window = Memory(library("slide_memory_required", model, min(count, 9)), off)
    assert library("session_slide_init", session, min(count, 9), window.pointer, window.size) == 0
    other.start_slide(min(count, 9))
    for step in x[:30]:
        expected = other.slide(step)
        assert (library("session_slide", session, pointer(step), pointer(y)) == 0) == (expected is not None)
        assert expected is None or np.array_equal(y[0], expected)
    status = library("session_selftest", session, None)
    assert status == (STEPS if name == "bidirectional" and 0 < steps < 16 else 0)
    for place in (memory, window, *alive):
        place.assert_guards_stand()


@pytest.mark.parametrize("streams", [1, 3, 100])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "bidirectional"])
def test_a_pool_stays_within_its_memory(name, streams, library, pairs):
    path = pairs[name][0]
    _, model, alive = library.model_in(path.read_bytes())
    memory = Memory(library("pool_memory_required", model, streams), 24)
    status, pool = library.made("pool_init", model, streams, memory.pointer, memory.size)
    assert status == 0
    other = Pool(path, streams)
    x = noise(5 * streams, other.input_size).reshape(5, streams, -1)
    y = np.empty((streams, other.output_size), np.float32)
    for step in x:
        flags = (np.arange(streams) % 3 == 1).astype(np.uint8)
        assert library("pool_step", pool, pointer(step), pointer(flags), pointer(y)) == 0
        assert np.array_equal(y, other.step(step, flags))
    for place in (memory, *alive):
        place.assert_guards_stand()


def test_less_memory_for_fewer_steps(library, pairs):
    _, model, _alive = library.model_in(pairs["forecaster"][0].read_bytes())
    one, some, any_number = (library("memory_required_for", model, steps) for steps in (1, 8, 0))
    assert one < some < any_number == library("memory_required", model)
    assert 2 * one < any_number
    _, model, _alive = library.model_in(pairs["bidirectional"][0].read_bytes())
    own = library("memory_required", model)
    assert own == library("memory_required_for", model, 64)  # as this one names no window
    assert library("memory_required_for", model, 640) > 4 * own


def test_sums_that_size_t_cannot_hold_are_refused(pairs, tmp_path):
    """Where it has 32 bits; a sum that wraps would ask for too little."""
    (tmp_path / "try.cpp").write_text("#include <new>\nint main() {}\n")
    command = ["g++", "-m32", tmp_path / "try.cpp", "-o", tmp_path / "try"]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no 32-bit libraries here: scripts/embedded_tools.sh installs them")
    objects = build_objects(tmp_path, "-O1", "-m32", "-msse2", "-mfpmath=sse")
    compile_with("gcc", "-m32", INCLUDE, "-c", ROOT / "tests/cpp/sizes.c", "-o", tmp_path / "sizes.o")
    compile_with("g++", "-m32", "-o", tmp_path / "sizes", tmp_path / "sizes.o", *objects)
    for name, paths in pairs.items():
        done = subprocess.run([tmp_path / "sizes", paths[0]], capture_output=True, text=True)
        assert done.returncode == 0, name
        steps, streams, one = map(int, done.stdout.split())
        assert (steps == 0) == (name == "bidirectional") and streams == 0
        assert 0 < one < 2**20


def test_memory_that_will_not_do_is_refused(library, pairs):
    image = pairs["forecaster"][0].read_bytes()
    for size, off, status in ((63, 0, MEMORY), (64, 4, ALIGNMENT), (0, 0, MEMORY)):
        assert library.model_in(image, 0, Memory(size, off))[0] == status
    assert library.model_in(image, 2)[0] == ARGUMENT
    _, model, _alive = library.model_in(image)
    cases = {
        "session_init": (library("memory_required", model), ()),
        "session_init_for": (library("memory_required_for", model, 3), (3,)),
        "pool_init": (library("pool_memory_required", model, 3), (3,)),
    }
    for name, (size, arguments) in cases.items():
        for less, off, status in ((1, 0, MEMORY), (size, 0, MEMORY), (0, 4, ALIGNMENT), (0, 0, 0)):
            memory = Memory(size - less, off)
            assert library.made(name, model, *arguments, memory.pointer, memory.size)[0] == status, name
        assert library.made(name, None, *arguments, memory.pointer, memory.size)[0] == ARGUMENT
        assert library.made(name, model, *arguments, None, size)[0] == ARGUMENT
        assert library(name, model, *arguments, memory.pointer, memory.size, None) == ARGUMENT
    memory = Memory(library("memory_required", model))
    _, session = library.made("session_init", model, memory.pointer, memory.size)
    size = library("slide_memory_required", model, 5)
    for less, off, status in ((1, 0, MEMORY), (0, 4, ALIGNMENT)):
        window = Memory(size - less, off)
        assert library("session_slide_init", session, 5, window.pointer, window.size) == status
    x = y = pointer(np.zeros(64, np.float32))
    assert library("session_slide", session, x, y) == ARGUMENT  # none of them began
    for steps in (2**24 + 1, 2**63):
        assert library("memory_required_for", model, steps) == 0
        assert library("slide_memory_required", model, steps) == 0
        assert library("pool_memory_required", model, steps) == 0
        assert library.made("session_init_for", model, steps, memory.pointer, memory.size)[0] == ARGUMENT
        assert library.made("pool_init", model, steps, memory.pointer, memory.size)[0] == ARGUMENT
    assert library("pool_memory_required", model, 0) == 0
    assert library.made("pool_create", model, 0)[0] == ARGUMENT
    for name in ("memory_required", "slide_memory_required", "pool_memory_required"):
        assert library(name, None, 1) == 0


def test_a_bidirectional_session_is_bounded_by_its_memory(library, pairs):
    path = pairs["bidirectional"][0]
    _, model, _alive = library.model_in(path.read_bytes())
    memory = Memory(library("memory_required_for", model, 20))
    _, session = library.made("session_init_for", model, 20, memory.pointer, memory.size)
    other = Session(path)
    x = noise(30, other.input_size)
    y = np.full((30, other.output_size), 5, np.float32)
    h, c = other.state
    assert library("session_run", session, pointer(x), 21, pointer(y)) == STEPS
    assert library("session_forecast", session, pointer(x), 21, pointer(y)) == STEPS
    assert b"session's memory is for fewer" in library.calls.cellstep_status_text(STEPS)
    window = Memory(library("slide_memory_required", model, 21))
    assert library("session_slide_init", session, 21, window.pointer, window.size) == STEPS
    assert library("session_get_state", session, pointer(h), pointer(c)) == 0
    assert (y == 5).all() and (h == 0).all() and (c == 0).all()
    assert library("session_run", session, pointer(x), 20, pointer(y)) == 0
    assert np.array_equal(y[:20], other.run(x[:20]))
    assert library.made("pool_create", model, 2)[0] == BIDIRECTIONAL
    assert library.made("pool_init", model, 2, memory.pointer, memory.size)[0] == BIDIRECTIONAL
    assert library("pool_memory_required", model, 2) == 0
    assert b"no pool: use sessions" in library.calls.cellstep_status_text(BIDIRECTIONAL)


def test_threads_and_a_window_from_the_heap_for_a_session_in_memory(library, pairs):
    """They are freed by destroy, which leaves the caller's memory alone."""
    path = pairs["forecaster"][0]
    _, model, _alive = library.model_in(path.read_bytes())
    memory = Memory(library("memory_required", model))
    _, session = library.made("session_init", model, memory.pointer, memory.size)
    x, y = noise(12, 10), np.empty(1, np.float32)
    assert library("session_slide_begin", session, 12) == 0
    for step in x:
        status = library("session_slide", session, pointer(step), pointer(y))
    assert status == 0 and np.array_equal(y, Session(path).forecast(x))
    library("session_destroy", session)
    library("model_destroy", model)  # nothing to destroy
    memory.assert_guards_stand()
    assert library("api_version") == 1


# Models: swapped, and not finite


def test_a_swap_keeps_the_state_and_takes_everything_else(pairs):
    for name, paths in pairs.items():
        session, first, second = Session(paths[0]), Session(paths[0]), Session(paths[1])
        x = noise(20, session.input_size)
        session.start_slide(4)
        for step in x[:6]:
            session.slide(step)
        session.run(x)
        first.run(x)
        second.state = first.state
        session.swap(second.model)
        assert session.model is second.model
        assert all(map(np.array_equal, session.state, first.state))
        assert np.array_equal(session.run(x), second.run(x)), name
        session.reset()
        second.reset()
        assert all(map(np.array_equal, session.state, second.state))  # the initial one of the new model
        answers = [session.slide(step) for step in x[:4]]
        assert answers[:3] == [None] * 3 and np.array_equal(answers[3], second.forecast(x[:4]))
        session.selftest()


def test_models_of_another_shape_are_not_swapped_in(tmp_path):
    def path(name, *layers, answers="every"):
        directory = tmp_path / name
        directory.mkdir()
        return exported(Chain(*layers, answers=answers).eval(), directory)

    session = Session(path("this", LSTM(4, 6, 2), Dense(6, 2)))
    others = {
        "inputs": [LSTM(5, 6, 2), Dense(6, 2)],
        "units": [LSTM(4, 7, 2), Dense(7, 2)],
        "layers": [LSTM(4, 6, 1), Dense(6, 2)],
        "outputs": [LSTM(4, 6, 2), Dense(6, 3)],
        "heads": [LSTM(4, 6, 2), Dense(6, 6), Dense(6, 2)],
        "directions": [LSTM(4, 3, 1, bidirectional=True), Dense(6, 2)],
        "projection": [LSTM(4, 8, 2, proj_size=6), Dense(6, 2)],
        "options": [LSTM(4, 6, 2, peephole=True), Dense(6, 2)],
    }
    x = noise(5, 4)
    expected = Session(session.model).run(x)
    for name, layers in others.items():
        with pytest.raises(ValueError, match="the models differ in sizes or layers"):
            session.swap(path(name, *layers))
    narrow = tmp_path / "narrow.cellstep"
    cellstep.export(cellstep.quantize(Chain(LSTM(4, 6, 2), Dense(6, 2), answers="every").eval(), "bfloat16"), narrow)
    with pytest.raises(ValueError, match="the models differ in sizes or layers"):
        session.swap(narrow)
    with pytest.raises(ModelError, match="expected a deploy file"):
        session.swap(b"no deploy file")
    assert np.array_equal(session.run(x), expected)  # nothing changed
    session.swap(path("initial", LSTM(4, 6, 2, learn_initial_state=True), Dense(6, 2, "relu"), answers="last"))
    assert session.answers == "last"


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16", "int8"])
def test_weights_that_are_not_finite_are_taken_on_request(weights, tmp_path):
    from test_artifacts import with_checksum

    model = make_forecaster() if weights == "float32" else cellstep.quantize(make_forecaster(), weights)
    image = bytearray(exported(model, tmp_path).read_bytes())
    # The bias of the first LSTM record: behind the factors of the inputs, if there are any.
    records = [image[64 + 64 * at : 128 + 64 * at] for at in range(int.from_bytes(image[24:28], "little"))]
    (record,) = [record for record in records if record[0] == 2][:1]
    place = int.from_bytes(record[32:40], "little") + (64 if weights == "int8" else 0)
    image[place : place + 4] = np.float32(np.nan).tobytes()
    broken = with_checksum(bytes(image))
    path = tmp_path / "broken.cellstep"
    path.write_bytes(broken)
    for source in (broken, path):
        with pytest.raises(ModelError, match="NaN or infinite"):
            Session(source)
        assert np.isnan(Session(source, allow_nonfinite=True).run(np.zeros((3, 10)))).all()
        assert np.isnan(Pool(source, 2, allow_nonfinite=True).step(np.zeros((2, 10)))).all()
    damaged = bytearray(broken)
    damaged[-1] ^= 1
    with pytest.raises(ModelError, match="checksum"):
        Session(bytes(damaged), allow_nonfinite=True)
