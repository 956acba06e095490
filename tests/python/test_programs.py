"""cellstep-run, cellstep-embed and `cellstep run`: the same numbers, and one clear line for what is wrong."""

import re
import zipfile

import numpy as np
import pytest
import torch
from conftest import make_forecaster, read_csv, run_command, write_csv

import cellstep
from cellstep.exporters.deploy import image

PROGRAMS = {"cellstep-run": ".pt", "cellstep-embed": ".cellstep", "cellstep": ".safetensors"}
EVERY = [pytest.param(name, suffix, id=name) for name, suffix in PROGRAMS.items()]


def call(program, *arguments):
    return run_command(program, *(["run"] if program == "cellstep" else []), *arguments)


def assert_refused(done, message):
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(("program", "suffix"), EVERY)
@pytest.mark.parametrize("flags", [(), ("--window", 7, "--stride", 3), ("--stream",)])
def test_outputs_equal_the_eager_model_to_the_bit(model, artifacts, series, series_csv, program, suffix, flags):
    done = call(program, artifacts[suffix], series_csv, *flags)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    header, rows, y = read_csv(done.stdout)
    x = torch.from_numpy(series)
    with torch.no_grad():
        if flags == ("--stream",):
            ends = list(range(40))
            expected = model.run(x.unsqueeze(0), model.initial_state(1))[0][0]
        else:
            window, stride = (12, 1) if not flags else (7, 3)
            ends = list(range(window - 1, 40, stride))
            expected = model(torch.stack([x[end - window + 1 : end + 1] for end in ends]))
    assert header == "row,out0" and rows.tolist() == ends
    assert np.array_equal(y, expected.numpy())


@pytest.mark.parametrize(("program", "suffix"), EVERY)
def test_output_file_and_latency(artifacts, series_csv, tmp_path, program, suffix):
    path = tmp_path / "out.csv"
    printed = call(program, artifacts[suffix], series_csv).stdout
    done = call(program, artifacts[suffix], series_csv, "--output", path, "--repeat", 50)
    assert done.returncode == 0 and done.stdout == "" and path.read_text() == printed
    numbers = re.search(
        r"over 50 calls: first ([\d.]+), median ([\d.]+), 99% ([\d.]+), 99.9% ([\d.]+), maximum ([\d.]+)", done.stderr
    )
    _, median, p99, p999, maximum = map(float, numbers.groups())
    assert 0 < median <= p99 <= p999 <= maximum


@pytest.mark.parametrize("program", ["cellstep-run", "cellstep-embed"])
def test_help_and_version(program):
    assert "usage: " + program in run_command(program, "--help").stdout
    assert run_command(program, "--version").stdout == f"{program} {cellstep.__version__}\n"


HEADER = ",".join(["time", *(f"f{k}" for k in range(10))])
ROW = ",".join(["t", *"1234567890"])


def rows(count, **changes):
    lines = [ROW] * count
    for place, line in changes.items():
        lines[int(place[1:])] = line
    return "\n".join([HEADER, *lines]) + "\n"


BAD_TABLES = {
    "missing column": (rows(20).replace("f3", "g3"), "lacks f3"),
    "column twice": (rows(20).replace("time", "f3"), "column 'f3' once"),
    "text cell": (rows(20, _4=ROW.replace(",5,", ",five,")), "number in column 'f4'; '.*' line 6 has 'five'"),
    "NaN": (rows(20, _0=ROW.replace(",5,", ",nan,")), "number in column 'f4'; '.*' line 2 has 'nan'"),
    "infinity": (rows(20, _0=ROW.replace(",5,", ",-inf,")), "line 2 has '-inf'"),
    "too large": (rows(20, _0=ROW.replace(",5,", ",1e39,")), "line 2 has '1e39'"),
    "empty cell": (rows(20, _0=ROW.replace(",5,", ",,")), "line 2 has ''"),
    "ragged line": (rows(20, _2=ROW + ",1"), "expected 11 cells as in the header; '.*' line 4 has 12"),
    "empty file": ("", "expected a header line; '.*' is empty"),
    "no rows": (rows(0), "expected at least 12 data rows"),
    "window longer than the data": (rows(11), "expected at least 12 data rows for a window; '.*' has 11"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
@pytest.mark.parametrize(("program", "suffix"), EVERY)
def test_bad_tables(artifacts, tmp_path, program, suffix, name):
    text, message = BAD_TABLES[name]
    path = tmp_path / "bad.csv"
    path.write_text(text)
    output = tmp_path / "out.csv"
    assert_refused(call(program, artifacts[suffix], path, "--output", output), message)
    assert not output.exists()


@pytest.mark.parametrize(("program", "suffix"), EVERY)
def test_bad_arguments(artifacts, series_csv, tmp_path, program, suffix):
    path = artifacts[suffix]
    assert_refused(call(program, path, tmp_path / "none.csv"), "none.csv")
    assert_refused(call(program, tmp_path / f"none{suffix}", series_csv), f"none{suffix}")
    assert_refused(call(program, path, series_csv, "--window", "41"), "at least 41 data rows")
    assert_refused(call(program, path, series_csv, "--window", "-1"), "window")
    assert_refused(call(program, path, series_csv, "--windows", "3"), "--windows")
    assert_refused(call(program, path), "CSV|data")
    assert_refused(call(program, path, series_csv, "--output", tmp_path / "none" / "out.csv"), "none")


@pytest.mark.parametrize(("program", "suffix"), EVERY)
def test_forgiving_about_line_ends_quotes_and_order(artifacts, series, series_csv, tmp_path, program, suffix):
    expected = call(program, artifacts[suffix], series_csv).stdout
    lines = series_csv.read_text().splitlines()
    quoted = [",".join(f'"{cell}"' for cell in line.split(",")) for line in lines]
    turned = [",".join(reversed(line.split(","))) for line in lines]
    for text in ("\ufeff" + "\r\n".join(quoted) + "\r\n\r\n", "\n".join(turned)):
        path = tmp_path / "other.csv"
        path.write_bytes(text.encode())
        assert call(program, artifacts[suffix], path).stdout == expected


@pytest.mark.parametrize(("program", "suffix"), EVERY)
def test_damaged_and_renamed_models(artifacts, series_csv, tmp_path, program, suffix):
    content = artifacts[suffix].read_bytes()
    other = artifacts[".cellstep" if suffix == ".pt" else ".pt"].read_bytes()
    for wrong in (b"", b"text", content[: len(content) // 2], other):
        path = tmp_path / f"wrong{suffix}"
        path.write_bytes(wrong)
        assert_refused(call(program, path, series_csv), f"wrong{suffix}")


def test_bit_flipped_deploy_file(artifacts, series_csv, tmp_path):
    content = artifacts[".cellstep"].read_bytes()
    path = tmp_path / "flipped.cellstep"
    for place in np.linspace(0, len(content) - 1, 20).astype(int):
        broken = bytearray(content)
        broken[place] ^= 4
        path.write_bytes(bytes(broken))
        assert_refused(run_command("cellstep-embed", path, series_csv), "flipped.cellstep")


@pytest.mark.parametrize(("program", "suffix"), EVERY)
def test_file_of_another_model_and_models_without_names(tmp_path, series_csv, program, suffix):
    wide = make_forecaster(12, 5)
    cellstep.export(wide, tmp_path / f"wide{suffix}")
    assert_refused(call(program, tmp_path / f"wide{suffix}", series_csv), "lacks f10, f11")
    nameless = make_forecaster(3, 5)
    nameless.feature_names, nameless.output_names, nameless.window = [], [], 0
    path = tmp_path / f"nameless{suffix}"
    cellstep.export(nameless, path)
    assert_refused(call(program, path, series_csv), "expected 3 columns, as the model names none; '.*' has 11")
    table = tmp_path / "three.csv"
    table.write_text("a,b,c\n" + "1,2,3\n" * 5)
    assert_refused(call(program, path, table), "pass --window N or --stream")
    assert call(program, path, table, "--window", 5).stdout.startswith("row,y0\n4,")


def test_run_names_missing_operators_and_who_wrote_the_file(artifacts, series_csv, tmp_path):
    def rewritten(name, change):
        path = tmp_path / name
        with zipfile.ZipFile(artifacts[".pt"]) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
            for entry in source.namelist():
                data = source.read(entry)
                target.writestr(entry, change(entry, data))
        return path

    newer = rewritten(
        "newer.pt",
        lambda entry, data: (
            b"9.1.0"
            if entry.endswith("extra/cellstep_version")
            else data.replace(b"ops.cellstep.run_model", b"ops.cellstep.run_future")
        ),
    )
    done = run_command("cellstep-run", newer, series_csv)
    assert_refused(done, "needs cellstep::run_future; this cellstep-run is version .* by cellstep 9.1.0: install")
    foreign = rewritten("foreign.pt", lambda _, data: data.replace(b"ops.cellstep.run_model", b"ops.elsewhere.run_it"))
    done = run_command("cellstep-run", foreign, series_csv)
    assert_refused(done, "needs elsewhere::run_it; pass the library that registers elsewhere::run_it with --library")
    assert_refused(
        run_command("cellstep-run", foreign, series_csv, "--library", tmp_path / "none.so"), "none.so' cannot be loaded"
    )


def test_run_takes_a_scripted_forecaster_and_refuses_a_stranger(model, series_csv, artifacts, tmp_path):
    torch.jit.save(torch.jit.script(model), tmp_path / "scripted.pt")
    done = run_command("cellstep-run", tmp_path / "scripted.pt", series_csv)
    assert done.stdout == run_command("cellstep-run", artifacts[".pt"], series_csv).stdout
    torch.jit.save(torch.jit.script(torch.nn.Linear(10, 1)), tmp_path / "stranger.pt")
    done = run_command("cellstep-run", tmp_path / "stranger.pt", series_csv)
    assert_refused(done, "as cellstep exports it; '.*stranger.pt' lacks one of them")


def test_run_takes_a_float64_model(tmp_path, series, series_csv):
    model = make_forecaster().double()
    cellstep.export(model, tmp_path / "m.pt")
    done = run_command("cellstep-run", tmp_path / "m.pt", series_csv, "--window", 40, "--threads", 2)
    with torch.no_grad():
        expected = model(torch.from_numpy(series).double()).float().numpy()
    assert np.array_equal(read_csv(done.stdout)[2][0], expected)


def test_nan_weights_are_refused(tmp_path, series_csv):
    model = make_forecaster()
    data = bytearray(image(model))
    import struct
    import zlib

    struct.pack_into("<f", data, len(data) - 64, float("nan"))
    struct.pack_into("<I", data, 12, 0)
    struct.pack_into("<I", data, 12, zlib.crc32(bytes(data)))
    path = tmp_path / "nan.cellstep"
    path.write_bytes(bytes(data))
    assert_refused(run_command("cellstep-embed", path, series_csv), "NaN or infinite")


def test_wide_outputs_and_quoted_names(tmp_path):
    model = make_forecaster(3, 8, 1, 4)
    model.output_names = ["a,b", 'c"d', "e", "f"]
    x = np.zeros((12, 3), np.float32)
    table = write_csv(tmp_path / "x.csv", x, model.feature_names)
    answers = set()
    for program, suffix in PROGRAMS.items():
        cellstep.export(model, tmp_path / f"m{suffix}")
        answers.add(call(program, tmp_path / f"m{suffix}", table).stdout)
    assert len(answers) == 1 and answers.pop().startswith('row,"a,b","c""d",e,f\n11,')
