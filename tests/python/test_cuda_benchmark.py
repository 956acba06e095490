"""benchmarks/cuda.py: that it runs, judges and prints, without a GPU; never how fast anything is."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import report, tune  # noqa: E402
from benchmarks.gpu.report import Entry, Ragged, Report, as_text, read_marked  # noqa: E402
from benchmarks.gpu.rows import (  # noqa: E402
    FLASH,
    NN,
    ROWS,
    Rates,
    Row,
    cudnn_algorithm,
    floor_us,
    operations,
    padded_forms,
    spread,
    step_us,
)
from benchmarks.gpu.ways import OURS, own  # noqa: E402

#: Round figures: a step of a block costs 0.3 us, 0.1 of it the barrier.
RATES = Rates(100, dict.fromkeys(("float32", "TF32", "float16", "bfloat16"), 1e14), 1e12, 2.0, 0.2, 0.3, 0.1, 0.5, 2.0)


def run_cuda(*arguments, timeout=280):
    command = [sys.executable, ROOT / "benchmarks" / "cuda.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so():
    done = run_cuda()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: expected a CUDA device; torch finds none; --dry-run tries the script without one\n"


def test_a_dry_run_goes_through_every_part(tmp_path):
    output = tmp_path / "out" / "cuda.json"
    names = ["1, 5, 10, 50, 2", "49,152, 1, 2, 8, 2", "64 of 50 to 1000, 64, 128, 1, packed"]
    only = [word for name in names for word in ("--only", name)]
    done = run_cuda("--dry-run", "--tune", *only, "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(output.read_text())
    for row in said["rows"]:
        assert {OURS, NN} <= row["times"].keys() and set(row["times"][OURS]) == {"eager", "graph"}
        assert row["floor_us"] > 0 and row["share_of_floor"] > 0 and row["algorithm"]
    timed = {way for row in said["rows"] for way in row["times"]}
    assert timed == {OURS, NN, "hand-written", "torch.compile"}
    assert {row["row"]["dtype"] for row in said["rows"]} == {"float32", "TF32", "float16", "bfloat16"}
    assert said["ragged"][0]["padded_us"].keys() == padded_forms(ROWS[-1]).keys()
    assert said["tune"] and all(set(point["us"]) == {*tune.KERNELS, "", NN} for point in said["tune"])
    assert "cuDNN's algorithm" in done.stdout and f"| {' | '.join(tune.KERNELS)} |" in re.sub(" +", " ", done.stdout)
    assert "barrier of the grid" in done.stderr
    assert output.with_suffix(".md").read_text() == done.stdout
    assert output.with_suffix(".svg").read_text().count("<svg") == 1


def test_the_goals_are_all_there():
    goals = {(row.table, row.name, row.dtype): dict(row.goals) for row in ROWS if row.goals}
    assert len([key for key in goals if key[0] == "small"]) == 10
    assert len([key for key in goals if key[0] == "large"]) == 9
    assert goals["small", "49,152, 1, 2, 8, 2", "float32"] == {"forward": 3}
    assert goals["small", "32, 256, 64, 128, 2", "float16"] == {"forward": 2, "training": 1.5}
    assert goals["large", "64, 256, 512, 512, 2, bidirectional", "bfloat16"] == {"forward": 2.5, "training": 2}
    assert [row.against for row in ROWS].count(FLASH) == 1
    packed = [row for row in ROWS if row.lengths]
    assert all(len(row.lengths) == row.batch and max(row.lengths) == row.time for row in packed)
    assert len(set(ROWS)) == len(ROWS)


@pytest.mark.parametrize(
    ("sizes", "dtype", "forward", "backward"),
    [
        ((1, 5, 10, 50, 2), "float32", "persistent, small H", "persistent, small H"),
        ((32, 256, 64, 129, 2), "bfloat16", "persistent, small H", "standard"),
        ((32, 256, 64, 193, 2), "float32", "standard", "standard"),
        ((16, 9, 768, 768, 1), "float16", "persistent, static", "persistent, static"),
        ((16, 9, 768, 768, 1), "bfloat16", "standard", "standard"),
        ((16, 9, 768, 768, 2), "float16", "standard", "standard"),
        ((12, 9, 768, 768, 1), "float16", "standard", "standard"),
        ((136, 9, 768, 768, 1), "float16", "standard", "standard"),
        ((16, 9, 700, 768, 1), "float16", "standard", "standard"),
        ((1, 5, 10, 50, 2), "float64", "standard", "standard"),
    ],
)
def test_cudnn_algorithms(sizes, dtype, forward, backward):
    """Worked out by hand from the rule."""
    row = Row("", *sizes, dtype)
    assert (cudnn_algorithm(row, True), cudnn_algorithm(row, False)) == (forward, backward)


def test_cudnn_knows_no_packed_rows_and_no_projections():
    assert cudnn_algorithm(Row("", 2, 3, 4, 5, 1, "float32", lengths=(3, 1)), True) == "standard"
    assert cudnn_algorithm(Row("", 2, 3, 4, 5, 1, "float32"), True, proj_size=2) == "standard"
    assert cudnn_algorithm(Row("", 16, 9, 768, 768, 1, "float16"), True, (8, 6)) == "standard"


def test_floors_by_hand():
    chain = Row("", 1, 1000, 16, 64, 2, "float32")
    work = 8 * 64**2 / 1e14 * 1e6 * 100  # one multiprocessor of a hundred
    assert step_us(chain, RATES) == pytest.approx(0.3 + work)
    assert floor_us(chain, False, RATES) == pytest.approx(2 + 1001 * (0.3 + work))
    assert floor_us(chain, True, RATES) == pytest.approx(4 + 2002 * (0.3 + work))
    # Past one block's memory the barrier is a cluster's, and the grid's past that.
    assert step_us(Row("", 1, 9, 9, 512, 1, "bfloat16"), RATES) == pytest.approx(
        0.2 + 0.5 + 8 * 512**2 / 1e14 * 1e6 / 0.16
    )
    assert step_us(Row("", 1, 9, 9, 2048, 1, "bfloat16"), RATES) == pytest.approx(0.2 + 2 + 8 * 2048**2 / 1e14 * 1e6)
    many = Row("", 49152, 1, 2, 8, 1, "float32")
    moved = 4 * (4 * 8 * (2 + 8) + 49152 * (2 + 8)) / 1e12 * 1e6
    assert floor_us(many, False, RATES) == pytest.approx(2 + moved)
    assert operations(many, False) == 2 * 49152 * 32 * (2 + 8)
    assert operations(many, True) == 2 * 49152 * 32 * (2 * 2 + 3 * 8)


def test_padded_forms_have_the_tokens():
    row = Row("small", 64, 1000, 64, 128, 1, "float32", lengths=spread(64, 50, 1000))
    assert row.tokens == 33600
    forms = padded_forms(row)
    assert [(form.batch, form.time) for form in forms.values()] == [(34, 1000), (64, 525), (64, 1000)]


def found(goals, ratios, **more):
    row = Row("small", 1, 5, 10, 50, 2, "float32", goals)
    entry = Entry(row, False, "standard", 3.0, ratios={NN: ratios} if ratios else {}, **more)
    about = {"device": "none", "capability": [9, 0], "memory_gib": 1, "driver": "", "versions": {"torch": "2"}}
    return Report("2026-01-01", about, RATES, {}, [entry], [])


def test_the_lesser_ratio_is_judged_less_a_tenth():
    assert found({"forward": 2.5}, {"eager": 2.26, "graph": 9}).missed() == []
    lines = found({"forward": 2.5}, {"eager": 9, "graph": 2.24}).missed()
    assert lines == ["missed: 1, 5, 10, 50, 2; float32; forward: expected 2.5 times torch.nn.LSTM; got 2.24"]
    (line,) = found({"forward": 2.5}, {}, reasons={OURS: "no such kernel"}).missed()
    assert line.endswith("no such kernel")
    assert found({}, {}).missed() == []


def test_ragged_rows_are_judged_by_the_first_form():
    said = found({}, {})
    said.ragged.append(Ragged(ROWS[0], 1.12, {"same": 1.0, "other": 5.0}))
    assert said.missed() == ["missed: 1, 5, 10, 50, 2: expected 1.1 times the padded time; got 1.12"]
    assert "1.12" in as_text(said)


def test_readme_takes_the_tables_between_its_marks(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table of CUDA speed -->\nstale\n<!-- end of CUDA speed -->\nafter\n")
    report.write_readme(found({"forward": 2.5}, {"eager": 3.0}), readme)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text and " 3.00 |" in text
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="expected the lines <!-- table of CUDA speed -->"):
        read_marked(readme)


def test_what_is_slower_than_cudnn():
    said = found({}, {"eager": 0.95, "graph": 1.2})
    assert said.slower() == [
        "slower than cuDNN: 1, 5, 10, 50, 2; float32; forward: torch.nn.LSTM takes 0.95 of cellstep's time"
    ]
    assert said.slower(0.1) == [] and found({}, {"graph": 1.0}).slower() == found({}, {}).slower() == []
    assert "slower than cuDNN: 1, 5" in as_text(said) and " YES |" in as_text(said)


def test_crossovers():
    points = [
        tune.Point("float32", training, batch, hidden, {"plain": 9.0, "rows": rows, "block": block, "": 1.0})
        for hidden, rows in ((8, 1.0), (16, 2.0), (64, 5.0))
        for batch in (1, 8, 32)
        for training, block in ((False, 1.02 if batch == 8 else 4.0), (True, 9.0 if batch < 32 else 20.0))
    ]
    assert tune.crossovers(points) == [
        "float32, forward:",
        "  {Kernel::rows, ...}  H = 8: N 1 to 32; H = 16: N 1, 32",
        "  {Kernel::block, ...}  H = 8: N 8; H = 16: N 8; H = 64: N 1 to 32",
        "float32, backward:",
        "  {Kernel::plain, ...}  H = 8: N 1 to 32; H = 16: N 1 to 32; H = 64: N 1 to 32",
    ]


def test_where_the_table_is_slower_than_cudnn():
    points = [
        tune.Point("float32", False, 1, 8, {"block": 2.0, "": 3.0, NN: 2.5}),
        tune.Point("float32", True, 1, 8, {"block": 3.0, "": 3.0, NN: 2.5}),
        tune.Point("float32", True, 8, 8, {"block": 3.0, "": 3.0, NN: 3.5}),
    ]
    assert tune.slower(points) == [
        "slower than cuDNN: float32, forward, N = 1, H = 8: 3.00 us, cuDNN's 2.50; block takes 2.00 us",
        "slower than cuDNN: float32, training, N = 1, H = 8: 3.00 us, cuDNN's 2.50; no kernel is faster",
    ]


def test_kernel_names():
    names = [
        "void cellstep::cuda::(anonymous namespace)::block_kernel<float, 2>(cellstep::cuda::Forward)",
        "void cellstep::cuda::(anonymous namespace)::block_kernel<float, 2>(cellstep::cuda::Forward)",
        "ampere_sgemm_32x128_tn",
        "cellstep::cuda::pointwise(int)",
    ]
    assert own(names) == "block_kernel+pointwise (4)"
    assert own(names[2:3]) == "torch's (1)" and own([]) == ""
