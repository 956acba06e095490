"""The ``.pt2`` road: dynamic batch and time, in Python, in cellstep-run, and in programs of a user's own."""

import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_with_cmake, make_forecaster, random_steps, read_csv, run_command, write_csv

import cellstep
from cellstep.nn import LSTM, Chain, Dense

ROOT = Path(__file__).parents[2]
STEPS = (1, 7, 5000)


def compiled(call):
    """What the compiler gives, without its own warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


@pytest.fixture(scope="module")
def chain():
    torch.manual_seed(0)
    model = Chain(LSTM(4, 6, 2, bidirectional=True, batch_first=True), Dense(12, 3, "tanh"), answers="every").eval()
    model.feature_names = [f"f{k}" for k in range(4)]
    return model


@pytest.fixture(scope="module")
def package(chain, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    cellstep.export(chain, path)
    return path


@pytest.fixture(scope="module")
def stream_package(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "stream.pt2"
    cellstep.export(model, path)
    return path


@pytest.mark.parametrize("steps", STEPS)
def test_cellstep_run_takes_any_number_of_steps(chain, package, tmp_path, steps):
    x = torch.randn(steps, 4, generator=torch.Generator().manual_seed(steps))
    done = run_command(
        "cellstep-run", package, write_csv(tmp_path / "x.csv", x, chain.feature_names), "--window", steps
    )
    assert done.returncode == 0, done.stderr
    _, rows, y = read_csv(done.stdout)
    with torch.no_grad():
        assert np.array_equal(y, chain(x).numpy())
    assert list(rows) == list(range(steps))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("steps", STEPS)
def test_python_takes_any_number_of_steps_and_rows(chain, package, steps, batch):
    x = torch.randn(batch, steps, 4, generator=torch.Generator().manual_seed(steps))
    with torch.no_grad():
        assert np.array_equal(cellstep.load(package)(x), chain(x).numpy())


def test_stream_and_windows_lie_in_one_package(model, stream_package):
    artifact = cellstep.load(stream_package)
    x = random_steps(model, 3, 12)
    state = artifact.initial_state(3)
    for step in range(12):
        y, state = artifact.step(x[:, step], state)
    with torch.no_grad():
        expected = model(x).numpy()
    assert np.array_equal(y, expected) and np.array_equal(artifact(x), expected)
    again, _ = artifact.run(x, artifact.initial_state(3))
    assert np.array_equal(again[:, -1], expected)


@pytest.mark.skipif(sys.platform != "linux", reason="linker flags are those of ELF systems")
def test_a_program_without_torchscript(model, stream_package, tmp_path):
    build_with_cmake(ROOT / "examples/libtorch_package", tmp_path, "-DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed")
    done = subprocess.run([tmp_path / "forecast_package", stream_package], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    state = model.initial_state(1)
    for step, line in enumerate(done.stdout.splitlines()):
        with torch.no_grad():
            y, state = model.step(torch.full((1, 10), 0.5 * step), state)
        assert np.float32(line.split(",")[1]) == y.numpy()
    assert step == 4


def test_a_module_of_ones_own_exported_from_2_to_10_000_steps(tmp_path):
    """No shape of the export is in the program: it runs below the range as well."""
    torch.manual_seed(0)
    lstm = LSTM(4, 6, num_layers=2, bidirectional=True).eval()
    time, batch = torch.export.Dim("time", min=2, max=10_000), torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(lstm, (torch.randn(20, 2, 4),), dynamic_shapes=({0: time, 1: batch},))
    path = compiled(lambda: torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "lstm.pt2")))
    build_with_cmake(ROOT / "tests/consumer/exported", tmp_path / "build")
    command = [tmp_path / "build/exported", path, "3", "4", *map(str, STEPS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    reference = torch.nn.LSTM(4, 6, num_layers=2, bidirectional=True).double()
    reference.load_state_dict({name: value.double() for name, value in lstm.state_dict().items()})
    for line, steps in zip(done.stdout.splitlines(), STEPS, strict=True):
        first, *values = line.split(",")
        t, n, i = torch.meshgrid(*(torch.arange(size).double() for size in (steps, 3, 4)), indexing="ij")
        x = (t + 2 * n + 3 * i).sin().float()
        y = torch.tensor([float(value) for value in values]).view(steps, 3, 12)
        with torch.no_grad():
            assert int(first) == steps and torch.equal(y, lstm(x)[0])
            # Outputs are below 1, and float32 rounds to 6e-8, some ten times on the way.
            torch.testing.assert_close(y.double(), reference(x.double())[0], rtol=0, atol=2e-6)


def test_rows_are_reset_by_a_program_of_its_own(tmp_path):
    torch.manual_seed(0)
    model = Chain(LSTM(2, 3, learn_initial_state=True), LSTM(3, 4), answers="every").eval()
    with torch.no_grad():
        model.lstms[0].initial_h.normal_()
    cellstep.export(model, tmp_path / "m.pt2")
    reset = torch._inductor.package.load_package(str(tmp_path / "m.pt2"), "reset")
    for rows in (1, 5):
        state, mask = (torch.randn(1, rows, 7), torch.randn(1, rows, 7)), torch.arange(rows) % 2 == 0
        with torch.no_grad():
            expected = model.reset(state, mask)
        for one, other in zip(reset(*state, mask), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs binutils")
def test_the_compiled_code_is_for_any_cpu_of_the_kind(package, tmp_path):
    with zipfile.ZipFile(package) as archive:
        archive.extractall(tmp_path)
    libraries = list(tmp_path.rglob("*.so"))
    assert len(libraries) == 4
    for library in libraries:
        code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
        assert "ret" in code and not re.search(r"%[yz]mm", code)


def test_loading_says_nothing(package):
    program = "import sys, cellstep; cellstep.load(sys.argv[1])([[[0.0] * 4]])"
    done = subprocess.run([sys.executable, "-c", program, package], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_step_from_a_state_needs_no_window(model, stream_package):
    artifact = cellstep.load(stream_package)
    x = random_steps(model, 2, 9)
    y, state = artifact.run(x[:, :4], artifact.initial_state(2))
    rest, _ = artifact.run(x[:, 4:], state)
    with torch.no_grad():
        expected, _ = model.run(x, model.initial_state(2))
    assert np.array_equal(np.concatenate([y, rest], 1), expected.numpy())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"no zip"])
def test_files_that_are_none(tmp_path, content):
    path = tmp_path / "broken.pt2"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected a .pt2 package"):
        cellstep.load(path)
    done = run_command("cellstep-run", path, write_csv(tmp_path / "x.csv", torch.zeros(3, 1), ["a"]))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_strangers_package_is_named_as_such(tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 1), (torch.zeros(1, 2),))
    path = compiled(lambda: torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "other.pt2")))
    with pytest.raises(ValueError, match="expected a .pt2 package that cellstep exported"):
        cellstep.load(path)
    done = run_command("cellstep-run", path, write_csv(tmp_path / "x.csv", torch.zeros(3, 1), ["a"]))
    assert done.returncode == 2 and "cellstep exported" in done.stderr and done.stderr.count("\n") == 1


def test_half_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a float32 or float64 model"):
        cellstep.export(make_forecaster().bfloat16(), tmp_path / "half.pt2")
    assert not list(tmp_path.iterdir())
