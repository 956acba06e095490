"""examples/wasm in headless Chromium: its forecasts are those of Python's Session in the same arithmetic."""

import html
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from targets import REQUIRED, SOURCE, zig

import cellstep
from cellstep.nn import Forecaster
from cellstep.train import load_series, sample_path

ANSWER = """
import sys
import numpy as np
from cellstep.runtime import Session
session = Session(sys.argv[1])
np.save(sys.argv[3], session.run(np.load(sys.argv[2]))[:, 0])
"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The page's folder with an untrained model that is scaled as the sample series is, and its address."""
    missing = [name for name, there in (("zig", zig()), ("chromium", shutil.which("chromium"))) if not there]
    if missing:
        (pytest.fail if REQUIRED else pytest.skip)(f"lacks {', '.join(missing)}: run scripts/embedded_tools.sh")
    directory = tmp_path_factory.mktemp("site")
    torch.manual_seed(0)
    series = load_series(sample_path)
    model = Forecaster(len(series.names), 50, 2, 1).eval()
    target = series.values[:, series.names.index("ghi_wm2")]
    model.set_scaling(
        *(torch.tensor(f(series.values, 0), dtype=torch.float32) for f in (np.mean, np.std)),
        *(torch.tensor([f(target)], dtype=torch.float32) for f in (np.mean, np.std)),
    )
    model.feature_names, model.output_names, model.window, model.horizon = series.names, ["ghi_wm2"], 48, 3
    cellstep.export(model, directory / "m.cellstep")
    command = ["sh", SOURCE / "examples" / "wasm" / "build.sh", directory / "m.cellstep", directory / "site"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr[-3000:]
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=directory / "site"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield directory, f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()
    server.server_close()


def dump(address, directory):
    """The page's HTML once its script has run. On a busy machine the browser may not wait for that: then once more."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory / 'profile'}", "--dump-dom"]
    for seconds in (20, 60, 180):
        command = ["chromium", *options, f"--virtual-time-budget={1000 * seconds}", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        if re.search(r"each\.|Error:", text_of(done.stdout, "status")):
            break
    return done.stdout


def text_of(page, identity):
    return html.unescape(re.search(rf'id="{identity}"[^>]*>(.*?)</', page, re.S).group(1))


def test_the_page_forecasts_as_python_does(site):
    directory, address = site
    page = dump(address, directory)
    assert re.fullmatch(r"720 steps, [\d.]+ µs each\.", text_of(page, "status"))
    assert (text_of(page, "output"), text_of(page, "horizon")) == ("ghi_wm2", "3")
    times, numbers = zip(*(line.split(",") for line in text_of(page, "numbers").splitlines()), strict=True)
    series = load_series(sample_path)
    assert times[:2] == ("1997-01-01T00:00", "1997-01-01T01:00")

    np.save(directory / "x.npy", series.values[: len(numbers)].astype(np.float32))
    command = [sys.executable, "-c", ANSWER, directory / "m.cellstep", directory / "x.npy", directory / "y.npy"]
    subprocess.run(command, check=True, env={**os.environ, "CELLSTEP_CPU": "baseline"})
    expected = np.load(directory / "y.npy")
    assert len(expected) == 720 and np.ptp(expected) > 1
    np.testing.assert_array_equal(np.array(numbers, np.float32), expected)


def test_a_damaged_model_is_said_on_the_page(site):
    directory, address = site
    file = directory / "site" / "forecaster.cellstep"
    good = file.read_bytes()
    file.write_bytes(good[:-8] + bytes(8 * [1]))
    try:
        status = text_of(dump(address, directory), "status")
    finally:
        file.write_bytes(good)
    assert status.startswith("Error: ") and "checksum" in status
