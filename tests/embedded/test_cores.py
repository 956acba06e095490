"""examples/firmware on each core under emulation: the forecasts that it prints are those of Python's Session."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from models import make_models
from targets import FUSED, REQUIRED, SOURCE, STRICT

import cellstep
from cellstep.train import load_series, sample_path

CORES = {"m0plus": STRICT, "m3": STRICT, "m4f": FUSED, "m7": FUSED, "m55": FUSED}
STEPS = 48
ANSWER = """
import sys
import numpy as np
from cellstep.runtime import Session
np.save(sys.argv[3], Session(sys.argv[1]).run(np.load(sys.argv[2]))[:, 0])
"""


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The model's file, and the Session's answers to the series by arithmetic."""
    missing = [name for name in ("arm-none-eabi-g++", "qemu-system-arm", "make") if not shutil.which(name)]
    if missing:
        (pytest.fail if REQUIRED else pytest.skip)(f"lacks {', '.join(missing)}: run scripts/embedded_tools.sh")
    directory = tmp_path_factory.mktemp("firmware")
    cellstep.export(make_models()["forecaster"], directory / "m.cellstep")
    np.save(directory / "x.npy", load_series(sample_path).values[:STEPS].astype(np.float32))
    answers = {}
    for group, environment in ((FUSED, {}), (STRICT, {"CELLSTEP_CPU": "baseline"})):
        files = [directory / name for name in ("m.cellstep", "x.npy", f"{group}.npy")]
        subprocess.run([sys.executable, "-c", ANSWER, *files], check=True, env={**os.environ, **environment})
        answers[group] = np.load(files[2])
    assert (answers[FUSED] != answers[STRICT]).any()
    return directory, answers


@pytest.mark.parametrize("core", CORES)
def test_forecasts_are_those_of_the_session(expected, core):
    directory, answers = expected
    settings = {"CORE": core, "MODEL": directory / "m.cellstep", "BUILD": directory / core, "PYTHON": sys.executable}
    command = [
        "make",
        "-C",
        SOURCE / "examples" / "firmware",
        "run",
        *(f"{name}={at}" for name, at in settings.items()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = [float.fromhex(line) for line in done.stdout.splitlines() if "0x" in line and "p" in line]
    np.testing.assert_array_equal(np.array(numbers, np.float32), answers[CORES[core]])
