"""Measures rows in a process of its own: one number of threads for torch, OpenMP, ONNX Runtime and OpenVINO alike.

cpu.py starts it, with the job as JSON on standard input and the number of an open pipe as its argument: standard output
belongs to the libraries. A line of JSON goes out when a row begins and another when it ends, so that cpu.py knows which
row a crash belongs to.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import ours
import peers
import programs
import torch
from cases import Case, Way, quiet
from flat import measure_flat
from rows import FLOAT32_PEER, HAND_WRITTEN, ROWS, Result, Row
from timing import Effort, Samples, pair
from training import training_peers, training_ways

Build = Callable[[Case], Way]


def one_line(error: BaseException) -> str:
    """Why something did not run, in one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return (text or type(error).__name__)[:200]


class Measurement:
    """The ways that ran and gave the right answer."""

    def __init__(self, case: Case, result: Result) -> None:
        self.case = case
        self.result = result
        self.ways: dict[str, tuple[Way, Samples]] = {}

    def add(self, name: str, build: Build) -> None:
        """Build, call once, check; what fails leaves a reason."""
        try:
            with quiet():
                way = build(self.case)
                begin = time.perf_counter_ns()
                value = way.call()
                first = time.perf_counter_ns() - begin
            self.case.check(way.answer(value), way.dtype)
        except Exception as error:  # a peer may fail in any way it likes
            self.result.reasons[name] = one_line(error)
        else:
            self.ways[name] = (way, Samples(first))

    def compare(self, ours: str, other: str, effort: Effort) -> float:
        (a, a_samples), (b, b_samples) = self.ways[ours], self.ways[other]
        return pair(a.call, b.call, a_samples, b_samples, effort)


def measure(row: Row, effort: Effort, leave_out: Mapping[str, str]) -> Result:
    """Every way and peer of a row; peers named in ``leave_out`` have its reason instead."""
    result = Result(row.name)
    case = Case(row)
    measurement = Measurement(case, result)
    if row.training:
        own, others = training_ways(case), training_peers(case)
    else:
        own, others = ours.ways(case), peers.RAGGED_PEERS if row.packed else dict(peers.PEERS)
        if row.dtype != "float32":
            others |= peers.LOW_PEERS
    for name, build in own.items():
        measurement.add(name, build)
    running = list(measurement.ways)
    for name, build in others.items():
        if name in leave_out:
            result.reasons[name] = leave_out[name]
        else:
            measurement.add(name, build)
    theirs = [name for name in measurement.ways if name not in running]

    with quiet():
        for name in running[1:]:
            # The ratio is above 1 where the second way takes longer.
            if measurement.compare(running[0], name, effort) < 1:
                result.way = name
        result.way = result.way or (running[0] if running else "")
        for name in theirs:
            brief = replace(effort, seconds=0.0, fewest=3) if name == HAND_WRITTEN else effort
            if result.way:
                result.ratios[name] = measurement.compare(result.way, name, brief)
            else:  # there is nothing to compare with; the peer's time is of use all the same
                measurement.compare(name, name, brief)
    plain = {name: result.ratios[name] for name in peers.PEERS if name in result.ratios and name != HAND_WRITTEN}
    if row.dtype != "float32" and plain and not row.training:
        result.extra[FLOAT32_PEER] = min(plain.values())
    result.timings = {name: samples.timing() for name, (_, samples) in measurement.ways.items() if samples.ns}
    return result


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    torch.set_num_interop_threads(1)
    effort = Effort(**job["effort"])
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as out:

        def say(line: object) -> None:
            print(json.dumps(line), file=out)

        for name in job["rows"]:
            row = next(row for row in ROWS if row.name == name)
            say({"begin": name})
            try:
                if row.section in ("runtime", "programs"):
                    result = programs.measure(row, job["programs"], effort)
                elif row.section == "flat":
                    result = measure_flat(row, job["quick"])
                else:
                    result = measure(row, effort, job["leave_out"])
            except Exception as error:
                result = Result(name, reasons={"cellstep": one_line(error)})
            say({"result": asdict(result)})


if __name__ == "__main__":
    main()
