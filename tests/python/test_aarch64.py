"""The core and the runtime for 64-bit ARM, cross-compiled and run under qemu: the bits are those of x86-64."""

import csv
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_forecaster, random_steps, run_command, write_csv

import cellstep
from cellstep.nn import LSTM, Chain

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
SOURCE = Path(__file__).parents[2]

missing = [name for name in (COMPILER, EMULATOR) if not shutil.which(name)]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"lacks {' and '.join(missing)}: g++-aarch64-linux-gnu, qemu-user"),
    pytest.mark.skipif(cellstep.runtime.instruction_set() == "baseline", reason="no fused multiply-add here"),
]


@pytest.fixture(scope="module")
def embed(tmp_path_factory):
    """cellstep-embed for 64-bit ARM."""
    directory = tmp_path_factory.mktemp("arm")
    options = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_C_COMPILER": COMPILER.replace("g++", "gcc"),
        "CELLSTEP_BUILD_OPS": "OFF",
    }
    configure = ["-S", SOURCE, "-B", directory, "-G", "Ninja", *(f"-D{name}={at}" for name, at in options.items())]
    for arguments in (configure, ["--build", directory, "--target", "cellstep-embed"]):
        done = run_command("cmake", *arguments)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return [EMULATOR, "-L", "/usr/aarch64-linux-gnu", directory / "csrc" / "tools" / "cellstep-embed"]


def chain(hidden, answers="every", **options):
    torch.manual_seed(hidden)
    model = Chain(LSTM(4, hidden, 2, **options), answers=answers).eval()
    model.feature_names = [f"f{k}" for k in range(4)]
    return model


MODELS = {
    "forecaster": make_forecaster,
    "3": lambda: chain(3),
    "13": lambda: chain(13),
    "bidirectional": lambda: chain(40, answers="last", bidirectional=True),
    "peephole coupled": lambda: chain(20, peephole=True, coupled=True),
    "layer norm": lambda: chain(20, layer_norm=True),
    "projection": lambda: chain(20, proj_size=7),
    "fast": lambda: chain(50),
    "bfloat16": lambda: chain(50),
    "float16": lambda: chain(50),
    "int8": lambda: chain(50),
}


@pytest.mark.parametrize("name", MODELS)
def test_bits_are_those_of_x86(embed, tmp_path, name):
    model = MODELS[name]()
    steps = 60
    x = random_steps(model, steps)
    table = write_csv(tmp_path / "x.csv", x, model.feature_names)
    path = tmp_path / "m.cellstep"
    if name in ("bfloat16", "float16", "int8"):
        cellstep.export(cellstep.quantize(model, name), path)
    else:
        cellstep.export(model, path, fast_activations=name == "fast")
    session = cellstep.runtime.Session(path)
    if name == "bidirectional":
        expected, options = session.forecast(x.numpy()).reshape(1, -1), ["--window", str(steps)]
    else:
        expected, options = session.run(x.numpy()), ["--stream"]
    done = subprocess.run([*embed, path, table, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Nine digits tell every float32 from the next.
    answers = np.array([row[1:] for row in csv.reader(done.stdout.splitlines()[1:])], np.float32)
    np.testing.assert_array_equal(answers, expected)
