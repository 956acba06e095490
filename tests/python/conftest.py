import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

import cellstep
from cellstep.nn import Forecaster

# A find of new examples belongs to whoever works on the code, not to whoever waits for a check of something else.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI") == "true":
    settings.load_profile("ci")


def make_forecaster(inputs=10, hidden=50, layers=2, outputs=1, *, seed=0, scaled=True):
    """A forecaster with random weights, and scaling as a weather series would have it."""
    torch.manual_seed(seed)
    model = Forecaster(inputs, hidden, layers, outputs)
    if scaled:
        ramp = torch.arange(inputs, dtype=torch.float32)
        model.set_scaling(100 * ramp, 1 + 3 * ramp, torch.full((outputs,), 120.0), torch.full((outputs,), 180.0))
    model.feature_names = [f"f{k}" for k in range(inputs)]
    model.output_names = [f"out{k}" for k in range(outputs)]
    model.window, model.horizon = 12, 3
    return model.eval()


def random_steps(model, *shape, seed=1):
    """Input that the model's scaling maps to standard normal values."""
    noise = torch.randn(*shape, model.input_size, generator=torch.Generator().manual_seed(seed))
    return (model.input_offset + noise / model.input_scale).detach()


def run_command(*command, **options):
    """Run a program of the environment."""
    program = Path(sys.executable).parent / command[0]
    return subprocess.run([program, *map(str, command[1:])], capture_output=True, text=True, timeout=300, **options)


def build_with_cmake(source, directory, *options):
    """A program of a user's own, against the installed package."""
    prefix = f"-DCMAKE_PREFIX_PATH={cellstep.cmake_prefix_path};{torch.utils.cmake_prefix_path}"
    configure = ["-S", source, "-B", directory, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", prefix, *options]
    for arguments in (configure, ["--build", directory]):
        done = run_command("cmake", *arguments)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def write_csv(path, x, names):
    lines = [",".join(["time", *names])]
    lines += [",".join([f"t{row}", *(f"{v:.9g}" for v in values)]) for row, values in enumerate(x.tolist())]
    Path(path).write_text("\n".join(lines) + "\n")
    return path


def read_csv(text):
    lines = text.splitlines()
    values = np.array([line.split(",") for line in lines[1:]], np.float64)
    return lines[0], values[:, 0].astype(int), values[:, 1:].astype(np.float32)


#: What PyTorch's own tests came to, counted as it counts them.
closing_lines = []


def pytest_sessionfinish(session):
    suite = sys.modules.get("test_torch_suite")
    if suite is not None and suite.passed:
        closing_lines.append(suite.closing_lines())
    if hasattr(session.config, "workeroutput"):  # one of several processes, of which another one prints
        session.config.workeroutput["closing_lines"] = closing_lines


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    closing_lines.extend(getattr(node, "workeroutput", {}).get("closing_lines", []))


def pytest_terminal_summary(terminalreporter):
    for line in closing_lines:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def model():
    return make_forecaster()


@pytest.fixture(scope="session")
def artifacts(model, tmp_path_factory):
    """Paths of one model as every kind of artifact, by suffix."""
    directory = tmp_path_factory.mktemp("artifacts")
    paths = {}
    for suffix in (".pt", ".cellstep", ".safetensors"):
        paths[suffix] = directory / f"model{suffix}"
        cellstep.export(model, paths[suffix])
    return paths


@pytest.fixture(scope="session")
def series(model):
    """(40, inputs): a stretch of input."""
    return random_steps(model, 40).numpy()


@pytest.fixture(scope="session")
def series_csv(model, series, tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("csv") / "series.csv", series, model.feature_names)
