"""benchmarks/cpu.py: that it measures, prints and judges; never how fast anything is."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cpu  # noqa: E402
import timing  # noqa: E402
from cases import Case, Wrong  # noqa: E402
from machine import file_name, measure_rates  # noqa: E402
from peers import hand_written  # noqa: E402
from programs import read_latency  # noqa: E402
from report import Report, write_readme  # noqa: E402
from rows import (  # noqa: E402
    FLOAT32_PEER,
    HAND_WRITTEN,
    INFERENCE,
    MUST_REACH,
    ROWS,
    RTNEURAL,
    Rates,
    Result,
    Row,
    Timing,
    floor_us,
    judge,
    operations,
    pick,
)

#: Of the machine that the table of floors below was worked out for: 32 kB of L1 and 2 MB of L2.
KNOWN_RATES = Rates(
    [100e9, 200e9], [(32 << 10, 207e9), ((32 << 10) + 1, 100e9), (2 << 20, 100e9), ((2 << 20) + 1, 75e9)]
)
BY_NAME = {row.name: row for row in ROWS}


def run_cpu(*arguments):
    command = [sys.executable, BENCHMARKS / "cpu.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A quick run of two small rows, one with goals and one without, and of one that a program times."""
    output = tmp_path_factory.mktemp("bench") / "out" / "cpu.json"
    names = ["1, 1, 10, 50, 2", "1, 1, 1, 20, 1", "1, 1, 10, 50, 2, cellstep-embed"]
    done = run_cpu("--quick", "--output", output, *(word for name in names for word in ("--only", name)))
    assert output.exists(), done.stdout + done.stderr
    return SimpleNamespace(names=names, done=done, output=output, said=json.loads(output.read_text()))


def test_every_row_has_times_and_a_floor(tiny):
    assert [row["name"] for row in tiny.said["rows"]] == tiny.names
    for row in tiny.said["rows"]:
        assert row["way"] in row["timings"]
        assert row["floor_us"] > 0 and row["share_of_floor"] > 0
        for times in row["timings"].values():
            assert 0 < times["median"] <= times["p99"] <= times["p999"] and times["first"] > 0 and times["calls"] > 0


def test_every_peer_that_is_installed_runs_and_answers_right(tiny):
    row = tiny.said["rows"][0]
    left_out = {name for name, reason in row["reasons"].items() if reason == "left out by --quick"}
    absent = {name for name, reason in row["reasons"].items() if reason.endswith("is not installed")}
    assert left_out == {"torch.compile", "AOTInductor"}
    assert absent <= {"OpenVINO"}, row["reasons"]
    assert set(row["reasons"]) == left_out | absent
    assert set(row["ratios"]) | absent == {HAND_WRITTEN, "torch.nn.LSTM", "torch scripted", "ONNX Runtime", "OpenVINO"}
    assert row["best_peer"] == min(row["ratios"].keys() - {HAND_WRITTEN}, key=lambda name: row["ratios"][name])


def test_the_exit_code_follows_the_table(tiny):
    judged = tiny.said["must_reach"]
    assert {goal["row"] for goal in judged} == {tiny.names[0], tiny.names[2]}
    assert tiny.done.returncode == (0 if all(goal["met"] for goal in judged) else 1), tiny.done.stderr
    missed = [line for line in tiny.done.stdout.splitlines() if line.startswith("missed: ")]
    assert len(missed) == sum(not goal["met"] for goal in judged)


def test_the_table_and_the_plot_come_out(tiny):
    for name in tiny.names:
        assert f"│ {name} " in tiny.done.stdout
    about = tiny.said["machine"]
    assert about["processor"] in tiny.done.stdout and f"torch {torch.__version__}" in tiny.done.stdout
    assert (tiny.output.parent / "cpu.svg").read_text().count("<svg") == 1
    assert tiny.said["rates"]["flops"][0] > 0 and len(tiny.said["rates"]["bandwidth"]) > 10


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "nonsense"], "expected sections (inference, "),
        (["--readme", "--quick"], "expected --readme alone"),
    ],
)
def test_bad_arguments_give_one_line(arguments, says):
    done = run_cpu(*arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {says}") and done.stderr.count("\n") == 1


def test_rows_are_picked_by_section_or_name():
    assert [row.name for row in pick(["inference"])] == INFERENCE
    assert [row.name for row in pick(["1, 48, 1, 16, 1"])] == ["1, 48, 1, 16, 1"]
    assert pick([]) == ROWS
    assert len(BY_NAME) == len(ROWS)
    assert {goal.row for goal in MUST_REACH} <= set(BY_NAME)


@pytest.mark.parametrize(
    ("name", "microseconds"),
    [
        ("32, 100, 10, 50, 2", 2050),
        ("1, 100, 32, 128, 2", 690),
        ("64, 100, 32, 128, 2", 27300),
        ("1, 100, 64, 512, 1", 5850),
        ("64, 50, 64, 512, 2", 211000),
    ],
)
def test_floors_of_a_known_machine(name, microseconds):
    """Worked out by hand and rounded, for the machine of KNOWN_RATES."""
    assert floor_us(BY_NAME[name], KNOWN_RATES) == pytest.approx(microseconds, rel=0.015)


def test_a_floor_by_the_formula():
    rates = Rates([1e9], [(1000, 4e9), (2000, 1e9)])
    row = Row("inference", "", 1, 3, 2, 4, 1)
    # weight_ih has 32 values and weight_hh 64: 384 bytes together, in the fastest memory.
    projection = max(2 * 16 * 2 * 3 / 1e9, 128 / 4e9)
    recurrence = max(2 * 16 * 4 * 3 / 1e9, 3 * 256 / 4e9)
    assert floor_us(row, rates) == pytest.approx((projection + recurrence) * 1e6)
    slow = Rates([1e15], rates.bandwidth)
    assert floor_us(row, slow) == pytest.approx((128 + 3 * 256) / 4e9 * 1e6)
    halves = Row("low", "", 1, 3, 2, 4, 1, dtype="bfloat16")
    assert floor_us(halves, slow) == pytest.approx(floor_us(row, slow) / 2)


def test_bandwidth_between_and_beyond_the_sizes_measured():
    rates = Rates([1.0, 1.9], [(1000, 8.0), (4000, 2.0)])
    assert rates.read(10) == rates.read(1000) == 8.0
    assert rates.read(2000) == pytest.approx(5.0)
    assert rates.read(4000) == rates.read(1e9) == 2.0
    assert rates.peak(2) == 1.9 and rates.peak(4) == 4.0


@pytest.mark.parametrize("sizes", [(1, 5, 10, 50, 2), (8, 4, 3, 16, 1)])
def test_operations_are_what_torch_counts(sizes):
    row = Row("inference", "", *sizes)
    way = hand_written(Case(row))
    with FlopCounterMode(display=False) as counter:
        way.call()
    assert counter.get_total_flops() == operations(row)


def test_lengths_run_from_half_to_full():
    row = next(row for row in ROWS if row.section == "ragged")
    assert max(row.lengths) == row.time and min(row.lengths) == row.time // 2
    assert row.lengths == sorted(row.lengths, reverse=True) and len(row.lengths) == row.batch
    full = Row("inference", "", row.batch, row.time, row.inputs, row.hidden, row.layers)
    assert operations(row) / operations(full) == pytest.approx(0.75, rel=0.01)


def judged(name, result):
    verdicts = judge([BY_NAME[name]], {name: result} if result else {}, KNOWN_RATES)
    return {verdict.goal.against: verdict for verdict in verdicts}


def result(name, median=1.0, ratios=None, **more):
    return Result(name, "cellstep", {"cellstep": Timing(median, median, median, median, 9)}, ratios or {}, **more)


def test_a_peer_is_met_within_a_tenth():
    name = "1, 5, 10, 50, 2"
    verdicts = judged(name, result(name, ratios={"ONNX Runtime": 2.71, "torch.nn.LSTM": 13.4}))
    assert verdicts["ONNX Runtime"].met and not verdicts["torch.nn.LSTM"].met


def test_the_best_peer_is_the_fastest_and_never_the_hand_written_cell():
    name = "1, 100, 10, 50, 2"
    verdict = judged(name, result(name, ratios={HAND_WRITTEN: 0.5, "OpenVINO": 1.6, "torch.nn.LSTM": 4.0}))["best peer"]
    assert verdict.value == 1.6 and verdict.met
    assert not judged(name, result(name, ratios={HAND_WRITTEN: 9.0}))["best peer"].met


def test_the_peak_the_floor_and_a_limit():
    name = "64, 100, 32, 128, 2, two threads"
    at_peak = operations(BY_NAME[name]) / KNOWN_RATES.flops[1] * 1e6
    verdicts = judged(name, result(name, at_peak / 0.75, {"OpenVINO": 1.0}))
    assert verdicts["FMA peak"].value == pytest.approx(0.75) and verdicts["FMA peak"].met
    assert not verdicts["best peer"].met
    name = "1, 1, 10, 50, 2, cellstep-embed"
    floor = floor_us(BY_NAME[name], KNOWN_RATES)
    assert judged(name, result(name, 1.4 * floor))["floor"].met
    assert not judged(name, result(name, 1.6 * floor))["floor"].met
    name = "1, 1, 10, 50, 2, cellstep-run"
    assert judged(name, result(name, 5.5))["limit"].met and not judged(name, result(name, 5.6))["limit"].met
    name = "1, 1, 1, 8, 1, runtime"
    assert judged(name, result(name, ratios={RTNEURAL: 1.2}))[RTNEURAL].met


def test_what_was_not_measured_is_missed_with_the_reason():
    name = "1, 100, 64, 512, 1, int8"
    assert not judged(name, None)[FLOAT32_PEER].met
    failed = Result(name, reasons={"OpenVINO": "is not installed", "cellstep Session": "no such thing yet"})
    verdict = judged(name, failed)[FLOAT32_PEER]
    assert not verdict.met and verdict.reason == "no such thing yet"
    measured = result(name, ratios={"ONNX Runtime": 3.0})
    assert not judged(name, measured)[FLOAT32_PEER].met
    measured.extra[FLOAT32_PEER] = 3.5
    assert judged(name, measured)[FLOAT32_PEER].met
    name = "1, 5, 10, 50, 2"
    verdict = judged(name, result(name, reasons={"ONNX Runtime": "is not installed"}))["ONNX Runtime"]
    assert not verdict.met and verdict.reason == "is not installed"


def test_a_row_that_takes_its_process_down_costs_no_other_row(monkeypatch):
    rows = [BY_NAME[name] for name in INFERENCE[:3]]

    def worker(job):
        for name in job["rows"]:
            yield {"begin": name}
            if name == rows[1].name:
                return
            yield {"result": {"row": name, "timings": {"a": dict(median=1, p99=1, p999=1, first=1, calls=1)}}}

    monkeypatch.setattr(cpu, "run_worker", worker)
    results = cpu.measure_rows(rows, True, {})
    assert [results[row.name].reasons for row in rows] == [{}, {"cellstep": "the process that ran it crashed"}, {}]
    assert results[rows[2].name].timings["a"] == Timing(1, 1, 1, 1, 1)


def test_a_pair_is_compared_by_blocks_in_turn(monkeypatch):
    """On a clock that only the calls move: one side takes three times as long, and once a block is disturbed."""
    now, order = [0], []

    def call(name, ns):
        def run():
            order.append(name)
            now[0] += ns * (100 if len(order) in range(200, 220) else 1)

        return run

    clock = SimpleNamespace(perf_counter_ns=lambda: now[0], perf_counter=lambda: now[0] * 1e-9, sleep=lambda _: None)
    monkeypatch.setattr(timing, "time", clock)
    a, b = timing.Samples(7), timing.Samples(8)
    ratio = timing.pair(call("a", 1000), call("b", 3000), a, b, timing.Effort(0.0, fewest=9, most=9, block=30e-6))
    assert ratio == 3.0
    assert len(a.ns) == 9 * 30 and len(b.ns) == 9 * 10
    blocks = "".join(order).replace("a" * 31, "A").replace("b" * 11, "B")
    assert "ABBAABBA" in blocks.replace("aaa", "").replace("bbb", "")
    assert a.timing().median == 1.0 and a.timing().first == 7e-3


def test_slow_calls_end_early_but_not_before_three_blocks():
    effort = timing.Effort(seconds=1.0, longest=8.0, fewest=7, most=9)
    assert not timing.enough(effort, 2, 100.0) and timing.enough(effort, 3, 8.0)
    assert not timing.enough(effort, 6, 7.9) and timing.enough(effort, 7, 1.0)
    assert not timing.enough(effort, 8, 0.9) and timing.enough(effort, 9, 0.0)


def test_latencies_of_the_programs_are_read():
    line = "latency in us over 200 calls: first 36.40, median 7.68, 99% 8.82, 99.9% 36.41, maximum 40.00\n"
    assert read_latency(line) == Timing(7.68, 8.82, 36.41, 36.40, 200)
    with pytest.raises(RuntimeError, match="expected a line of latencies; got ''"):
        read_latency("")


def test_a_wrong_answer_is_an_error():
    case = Case(Row("inference", "", 2, 3, 4, 5, 1))
    assert case.check(case.truth, "float32") == 0
    with pytest.raises(Wrong, match="expected an error of at most 2e-05 in float32"):
        case.check(case.truth + 1e-3, "float32")
    with pytest.raises(Wrong):
        case.check(case.truth * math.nan, "int8")
    with pytest.raises(Wrong, match="expected shape"):
        case.check(case.truth[:1], "float32")


def test_readme_takes_the_tables_between_its_marks(tmp_path):
    row = BY_NAME["1, 5, 10, 50, 2"]
    results = {row.name: result(row.name, 4.0, {"OpenVINO": 2.0})}
    about = {"processor": "A Processor", "cores": 2, "instruction_set": "avx2", "versions": {"torch": "9.9"}}
    report = Report("2026-01-02", False, about, KNOWN_RATES, "AVX2", [row], results, [])
    readme = tmp_path / "README.md"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="expected the lines <!-- table of cpu speed -->"):
        write_readme(report, readme, tmp_path / "benchmarks" / "cpu.svg")
    readme.write_text("before\n<!-- table of cpu speed -->\nold\n<!-- end of cpu speed -->\nafter\n")
    for _ in range(2):
        write_readme(report, readme, tmp_path / "benchmarks" / "cpu.svg")
    text = readme.read_text()
    assert (
        text.startswith("before\n<!-- table of cpu speed -->\n2026-01-02; A Processor, 2 cores") and "old" not in text
    )
    assert "| 1, 5, 10, 50, 2 | 4.00 | 8.00 | 2.00 | " in text and "](benchmarks/cpu.svg)" in text
    assert text.endswith("\n<!-- end of cpu speed -->\nafter\n")


def test_rates_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="expected a C\\+\\+ compiler .* 'no-such-compiler' is none; set CXX"):
        measure_rates(BENCHMARKS / "rates.cpp", tmp_path, 1)


def test_results_are_named_after_the_machine():
    assert file_name({"processor": "AMD EPYC 9R14", "cores": 2, "instruction_set": "avx2"}) == "amd-epyc-9r14-2-avx2"
