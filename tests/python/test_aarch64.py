"""The core and the runtime for 64-bit ARM, cross-compiled and run under qemu: the bits are those of x86-64."""

import shutil
import subprocess
from pathlib import Path

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
    pytest.mark.skipif(
        bool(missing), reason=f"needs {' and '.join(missing)} (Debian: g++-aarch64-linux-gnu, qemu-user)"
    ),
    pytest.mark.skipif(
        cellstep.runtime.instruction_set() in ("baseline", "native"), reason="needs fused multiply-add on this machine"
    ),
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """cellstep-embed for either machine, from one source."""
    built = {}
    for name, options in {
        "x86": [],
        "arm": [
            "-DCMAKE_SYSTEM_NAME=Linux",
            "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            f"-DCMAKE_CXX_COMPILER={COMPILER}",
            f"-DCMAKE_C_COMPILER={COMPILER.replace('g++', 'gcc')}",
        ],
    }.items():
        directory = tmp_path_factory.mktemp(name)
        configure = ["-S", SOURCE, "-B", directory, "-G", "Ninja", "-DCELLSTEP_BUILD_OPS=OFF", *options]
        for arguments in (configure, ["--build", directory, "--target", "cellstep-embed"]):
            done = run_command("cmake", *arguments)
            assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        built[name] = [str(directory / "csrc" / "tools" / "cellstep-embed")]
    built["arm"] = [EMULATOR, "-L", "/usr/aarch64-linux-gnu", *built["arm"]]
    return built


def chain(hidden, **options):
    torch.manual_seed(hidden)
    model = Chain(LSTM(4, hidden, 2, **options), answers="every").eval()
    model.window = 12
    return model


MODELS = {
    "forecaster": lambda: make_forecaster(),
    "3": lambda: chain(3),
    "13": lambda: chain(13),
    "40 bidirectional": lambda: chain(40, bidirectional=True),
    "peephole coupled": lambda: chain(20, peephole=True, coupled=True),
    "layer norm": lambda: chain(20, layer_norm=True),
    "projection": lambda: chain(20, proj_size=7),
    "fast": lambda: chain(50),
    "bfloat16": lambda: chain(50),
    "float16": lambda: chain(50),
    "int8": lambda: chain(50),
}


@pytest.mark.parametrize("name", MODELS)
def test_bits_are_those_of_x86(programs, tmp_path, name):
    model = MODELS[name]()
    path = tmp_path / "m.cellstep"
    if name in ("bfloat16", "float16", "int8"):
        cellstep.export(cellstep.quantize(model, name), path)
    else:
        cellstep.export(model, path, fast_activations=name == "fast")
    names = model.feature_names or [f"f{k}" for k in range(model.input_size)]
    x = write_csv(tmp_path / "x.csv", random_steps(model, 60), names)
    stream = [] if "bidirectional" in name else ["--stream"]
    answers = {}
    for machine, command in programs.items():
        parts = [
            subprocess.run([*command, path, x, *options], capture_output=True, text=True, timeout=300)
            for options in ([], stream)
        ]
        assert all(part.returncode == 0 for part in parts), parts[0].stderr + parts[1].stderr
        answers[machine] = [part.stdout for part in parts]
    assert len(answers["x86"][0].splitlines()) > 20
    assert answers["arm"] == answers["x86"]  # nine digits, which tell every float32 from the next
