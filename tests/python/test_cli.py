"""The cellstep command and the agreement table."""

import re

import numpy as np
import pytest
import torch
from conftest import make_forecaster, random_steps, run_command
from test_programs import assert_refused
from test_train import write_series

import cellstep
from cellstep.verification import test_windows as windows_for
from cellstep.verification import verify


def test_help_and_version():
    done = run_command("cellstep", "--help")
    for command in ("train", "export", "convert", "run", "verify", "info"):
        assert command in done.stdout
    assert run_command("cellstep", "--version").stdout == f"cellstep {cellstep.__version__}\n"


def test_from_a_csv_to_an_agreement_table(tmp_path):
    data = write_series(tmp_path / "s.csv", 300, 3)
    options = [
        "--target",
        "c2",
        "--features",
        "c0,c2",
        "--window",
        "12",
        "--horizon",
        "2",
        "--hidden",
        "6",
        "--layers",
        "1",
        "--epochs",
        "2",
        "--seed",
        "3",
    ]
    model, plot = tmp_path / "m.safetensors", tmp_path / "plot.png"
    done = run_command("cellstep", "train", data, *options, "--output", model, "--plot", plot)
    assert done.returncode == 0, done.stderr
    for text in ("c2, 2 steps ahead of 12 steps of 2 columns", "the last value", "linear regression", "this model"):
        assert text in done.stdout
    assert "loss" in done.stderr and plot.read_bytes().startswith(b"\x89PNG")
    loaded = cellstep.load_model(model)
    assert (loaded.input_size, loaded.hidden_size, loaded.num_layers) == (2, 6, 1)
    assert loaded.feature_names == ["c0", "c2"] and (loaded.window, loaded.horizon) == (12, 2)

    deploy, torchscript = tmp_path / "m.cellstep", tmp_path / "m.pt"
    done = run_command("cellstep", "export", model, deploy, torchscript)
    assert done.returncode == 0 and "bytes" in done.stdout, done.stderr
    for path in (model, deploy, torchscript):
        done = run_command("cellstep", "info", path)
        assert done.returncode == 0 and "1 of 6 units" in done.stdout and "c0, c2" in done.stdout
    assert "passed" in run_command("cellstep", "info", deploy).stdout

    done = run_command("cellstep", "verify", deploy, torchscript, "--data", data)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert len(lines) == 6
    digests = [re.search(r"\b[0-9a-f]{8}\b", line)[0] for line in lines]
    assert len(set(digests[2:])) == 1


def test_verify_rows_agree_to_the_bit(model, artifacts):
    report = verify(model, [artifacts[".pt"], artifacts[".cellstep"]], random_steps(model, 20, 12).numpy())
    names = [row.name for row in report.rows]
    assert names == ["eager, torch kernels", "eager, cellstep", "Python", "cellstep-run", "Session", "cellstep-embed"]
    assert not report.failures and report.rows[0].difference == 0 and report.rows[0].ulps == 0
    assert len({row.bits for row in report.rows[1:]}) == 1
    assert all(row.latency > 0 for row in report.rows)


def test_verify_covers_every_road(tmp_path):
    model = make_forecaster(3, 5)
    cellstep.save(model, tmp_path / "m.safetensors")
    files = [tmp_path / name for name in ("m.pt", "m.pt2", "m.onnx", "m.pte", "m.cellstep")]
    done = run_command("cellstep", "export", tmp_path / "m.safetensors", *files)
    assert done.returncode == 0, done.stderr
    done = run_command("cellstep", "export", tmp_path / "m.safetensors", tmp_path / "alone.pt", "--standalone")
    assert done.returncode == 0, done.stderr
    done = run_command("cellstep", "verify", "--compile", *files, tmp_path / "alone.pt")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in done.stdout.splitlines() if line[0] == "│"]
    assert rows == [
        ["eager, torch kernels", "-"],
        ["eager, cellstep", "-"],
        ["torch.compile", "-"],
        ["Python", "m.pt"],
        ["cellstep-run", "m.pt"],
        ["Python", "m.pt2"],
        ["cellstep-run", "m.pt2"],
        ["onnxruntime", "m.onnx"],
        ["ExecuTorch", "m.pte"],
        ["Session", "m.cellstep"],
        ["cellstep-embed", "m.cellstep"],
        ["Python", "alone.pt"],
        ["cellstep-run", "alone.pt"],
    ]


def test_verify_notices_another_models_artifact(model, artifacts, tmp_path):
    other = make_forecaster(seed=5)
    report = verify(other, [artifacts[".cellstep"]], random_steps(model, 20, 12).numpy())
    assert [row.name for row in report.failures] == ["Session", "cellstep-embed"]
    cellstep.save(other, tmp_path / "other.safetensors")
    done = run_command("cellstep", "verify", tmp_path / "other.safetensors", artifacts[".cellstep"])
    assert done.returncode == 1 and "past 2.0e-06" in done.stderr
    with pytest.raises(ValueError, match="expected artifacts of 3 inputs"):
        verify(make_forecaster(3, 4), [artifacts[".cellstep"]])


def test_verify_counts_units_in_the_last_place(model, artifacts):
    nudged = make_forecaster()
    with torch.no_grad():
        nudged.output_offset.add_(1.0)
    report = verify(nudged, [artifacts[".cellstep"]], random_steps(model, 20, 12).numpy())
    assert report.rows[2].difference == pytest.approx(1.0, abs=1e-3) and report.rows[2].ulps > 10000


def test_default_windows_follow_the_model(model):
    x = windows_for(model)  # its columns are not the sample's
    assert x.shape == (64, 12, 10)
    inside = (torch.from_numpy(x) - model.input_offset) * model.input_scale
    assert abs(inside.mean()) < 0.1 and abs(inside.std() - 1) < 0.1
    sample = make_forecaster(2, 4)
    sample.feature_names, sample.output_names, sample.window = ["ghi_wm2", "cloud_cover_tenths"], ["ghi_wm2"], 24
    x = windows_for(sample)
    assert x.shape == (512, 24, 2) and np.isfinite(x).all() and x[..., 0].max() > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{csv}"], "expected --target"),
        (["train", "{csv}", "--target", "none"], "'none' is not among those"),
        (["train", "{dir}/none.csv", "--target", "c0"], "none.csv"),
        (["train", "{csv}", "--target", "c0", "--window", "1000"], "expected at least 1003 rows"),
        (["train", "{csv}", "--target", "c0", "--output", "m.pt"], "ends in .safetensors"),
        (["train", "{csv}", "--target", "c0", "--hidden", "0"], "hidden"),
        (["export", "{dir}/none.safetensors", "m.pt"], "none.safetensors"),
        (["export", "{model}", "{dir}/m.xyz"], "expected outputs that end in"),
        (["export", "{csv}", "{dir}/m.pt"], "expected a safetensors file"),
        (["verify", "{dir}/none.pt"], "expected the model as a .safetensors file"),
        (["info", "{csv}"], "expected a file that ends in"),
        (["what"], "what"),
    ],
)
def test_bad_input_is_one_line(artifacts, tmp_path, arguments, message):
    csv = write_series(tmp_path / "s.csv", 300)
    places = {"csv": csv, "dir": tmp_path, "model": artifacts[".safetensors"]}
    assert_refused(run_command("cellstep", *(a.format(**places) for a in arguments), cwd=tmp_path), message)
