"""cellstep's speed on a GPU, against cuDNN, the compiled hand-written cell, FlashRNN and the device's limit.

    python benchmarks/cuda.py                   the rows of small recurrences: some two minutes
    python benchmarks/cuda.py --large           those of large ones too
    python benchmarks/cuda.py --tune            every kernel forced, and where each is the fastest, for choose.cpp
    python benchmarks/cuda.py --dry-run         a few steps of each row on the processor: its figures mean nothing

Barriers and rates are measured and printed first. What came of each row is written at once, so that a run that is cut
off leaves the rows before.

All ways of a row have the same weights and run in turn, a block of calls each, between the device's own events; a
ratio is the median over rounds. Every answer is compared with torch's in float64 before it is timed. The floor is what
gpu/rows.py says, at rates and barrier costs of the same run.

Exit code 1: a row falls short by more than 10%, or has no time, or cuDNN is faster by that much. 2: it cannot run, as
where there is no CUDA device.
"""

if __name__ == "cuda":  # torch looks for NVIDIA's package of that name, and the other programs here have this directory
    raise ImportError("expected NVIDIA's package cuda; this is a program: run python benchmarks/cuda.py")

import argparse
import dataclasses
import datetime
import json
import re
import sys
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Not this directory: a file cuda.py on the path hides NVIDIA's package of that name from torch.
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place or ".").resolve() != HERE)]

import torch  # noqa: E402
from benchmarks.gpu import report as reporting  # noqa: E402
from benchmarks.gpu import tune  # noqa: E402
from benchmarks.gpu.device import describe, measure_rates  # noqa: E402
from benchmarks.gpu.report import Entry, Ragged, Report  # noqa: E402
from benchmarks.gpu.rows import FLASH, FLASH_WHOLE, NN, ROWS, Row, cudnn_algorithm, floor_us, padded_forms, spread  # noqa: E402
from benchmarks.gpu.timing import Budget, Call, Clock, Samples, capture, compare  # noqa: E402
from benchmarks.gpu.ways import (  # noqa: E402
    COMPILED,
    COMPILED_STEPS,
    DIFFERENCE,
    HAND_WRITTEN,
    OURS,
    WAYS,
    Case,
    Way,
    cellstep_lstm,
    kernels,
    own,
    precision,
)

#: Seconds of a comparison of all ways of a row in one pass and mode.
SECONDS = 0.25


def one_line(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"{error.name or error} is not installed"
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def shrunk(row: Row) -> Row:
    """The row as a dry run has it."""
    lengths = spread(4, 1, 6) if row.lengths else ()
    batch, steps = (4, 6) if row.lengths else (min(row.batch, 4), min(row.time, 3))
    hidden, inputs = min(row.hidden, 16), min(row.inputs, 16)
    return dataclasses.replace(row, batch=batch, time=steps, hidden=hidden, inputs=inputs, lengths=lengths)


class Bench:
    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.clock, self.budget = device, Clock(device), Budget(seconds)
        self.about = describe(device)
        self.rates, self.probe = measure_rates(self.about, device, self.clock)
        self.report = Report(datetime.date.today().isoformat(), self.about, self.rates, self.probe, [], [])
        self.seconds = SECONDS if device.type == "cuda" else 0.0

    def entries(self, row: Row) -> list[Entry]:
        """Without times yet. No peer but the compiled ones has a limit, so what has no goal may still be timed."""
        capability = (self.about["capability"][0], self.about["capability"][1])
        passes = [False] if row.goals and "training" not in row.goals else [False, True]
        return [
            Entry(
                row,
                training,
                cudnn_algorithm(row, not training, capability, self.about["multiprocessors"]),
                floor_us(row, training, self.rates),
            )
            for training in passes
        ]

    def build(self, case: Case, names: list[str], entries: list[Entry]) -> dict[str, Way]:
        """The ways that run and answer right; why the others do not goes into the entries."""
        ways = {}
        for name in names:
            try:
                way = WAYS[name](case)
                difference = case.difference(way.output())
                if difference > DIFFERENCE[case.row.dtype]:
                    raise ValueError(f"its answer differs from float64 by {difference:.1e}")
                ways[name] = way
            except Exception as error:
                for entry in entries:
                    entry.reasons[name] = one_line(error)
        return ways

    def time(self, entry: Entry, ways: dict[str, Way], modes: tuple[str, ...]) -> None:
        """Fill in what ``ways`` take, cellstep first."""
        calls: dict[str, Call] = {}
        for name, way in ways.items():
            if (call := way.of(entry.training)) is not None:
                calls[name] = call
        for mode in modes:
            ready = dict(calls)
            if mode == "graph":
                for name in calls:
                    try:
                        ready[name] = capture(calls[name], self.clock)
                    except Exception as error:
                        del ready[name]
                        entry.reasons[f"{name}, graph"] = one_line(error)
            if OURS not in ready:
                # The peers' times are of use without ours.
                entry.reasons.setdefault(OURS, "has no call in this mode")
            if not ready:
                continue
            samples, ratios = compare(ready, self.clock, self.seconds)
            self.keep(entry, ways, mode, samples, ratios if OURS in ready else {})

    @staticmethod
    def keep(
        entry: Entry, ways: dict[str, Way], mode: str, samples: dict[str, Samples], ratios: dict[str, float]
    ) -> None:
        for name, found in samples.items():
            scale = ways[name].scale
            if mode in entry.times.get(name, {}):
                continue  # cellstep's, of the first comparison
            entry.times.setdefault(name, {})[mode] = (found.median * scale, found.quantile(0.99) * scale)
            if scale != 1:
                entry.parts[name] = COMPILED_STEPS
            if name in ratios:
                entry.ratios.setdefault(name, {})[mode] = ratios[name] * scale

    def run_row(self, row: Row) -> None:
        """cellstep and cuDNN, eager and as graphs, and what else must be beaten there."""
        entries = self.entries(row)
        self.report.entries += entries
        names = [OURS, NN] + ([FLASH, FLASH_WHOLE] if row.against == FLASH else [])
        if self.budget.left() <= 0:
            for entry in entries:
                entry.reasons[OURS] = "left out: the time given to the run was over"
            return
        with precision(row.dtype):
            try:
                ways = self.build(Case(row, self.device), names, entries)
            except Exception as error:
                for entry in entries:
                    entry.reasons[OURS] = one_line(error)
                return
            for entry in entries:
                try:
                    self.time(entry, ways, reporting.MODES)
                    # The profiler takes seconds for a peer's thousands of launches.
                    for name in (OURS, NN) if row.goals else (OURS,):
                        if name in ways and (call := ways[name].of(entry.training)) is not None:
                            seen = kernels(call, self.device)
                            if name == OURS:
                                entry.kernels = own(seen)
                            else:
                                entry.peer_launches = len(seen)
                except Exception as error:
                    entry.reasons[OURS] = one_line(error)

    def run_compiled(self, seconds: float) -> None:
        """The hand-written cell, as it is and compiled, on the rows that must be reached, until the time is over."""
        budget = Budget(min(seconds, self.budget.left()))
        done = set()
        for entry in [entry for entry in self.report.entries if entry.goal is not None]:
            row = entry.row
            if (row, entry.training) in done or OURS not in entry.times:
                continue
            done.add((row, entry.training))
            if budget.left() <= 0:
                entry.reasons[COMPILED] = "left out: the time given to compilation was over"
                continue
            with precision(row.dtype):
                try:
                    ways = self.build(Case(row, self.device), [OURS, HAND_WRITTEN, COMPILED], [entry])
                    self.time(entry, ways, ("eager",))
                except Exception as error:
                    entry.reasons[COMPILED] = one_line(error)

    def run_ragged(self, row: Row) -> None:
        """Whether a packed batch costs what its tokens cost."""
        forms = padded_forms(row)
        try:
            with precision(row.dtype):
                ways = {"packed": cellstep_lstm(Case(row, self.device))}
                ways |= {name: cellstep_lstm(Case(form, self.device)) for name, form in forms.items()}
                calls = {name: way.forward for name, way in ways.items() if way.forward is not None}
                samples, _ = compare(calls, self.clock, self.seconds)
            times = {name: found.median for name, found in samples.items()}
            self.report.ragged.append(Ragged(row, times.pop("packed"), times))
        except Exception as error:
            print(f"{row.name}: no comparison with padded rows: {one_line(error)}", file=sys.stderr)


def run(arguments: argparse.Namespace) -> int:
    begin = time.monotonic()
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    torch.manual_seed(0)
    bench = Bench(device, arguments.seconds)
    rows = [row for row in ROWS if row.table == "small" or arguments.large]
    rows = [row for row in rows if not arguments.only or row.name in arguments.only or row.dtype in arguments.only]
    if not rows:
        raise ValueError(f"expected names of rows, such as {ROWS[0].name!r}, or types; got {arguments.only}")
    if arguments.dry_run:
        rows = list(dict.fromkeys(shrunk(row) for row in rows))
    name = re.sub(r"[^a-z0-9]+", "-", bench.about["device"].lower()).strip("-")
    output = arguments.output or (None if arguments.dry_run else HERE / "results" / f"cuda-{name}.json")
    report: Report = bench.report
    points: list[tune.Point] = []
    order = {row: at for at, row in enumerate(rows)}

    def write() -> str:
        """What is known so far."""
        report.entries.sort(key=lambda entry: (order[entry.row], entry.training))
        report.seconds = time.monotonic() - begin
        text = "\n\n".join([reporting.as_text(report), *([tune.as_text(points)] if points else [])])
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            found = report.as_json() | ({"tune": tune.as_json(points)} if points else {})
            output.write_text(json.dumps(found, indent=1) + "\n")
            output.with_suffix(".md").write_text(text + "\n")
        return text

    print(reporting.barriers(report), file=sys.stderr)
    # What must be reached first, and of that the large recurrences, so that a time that runs out costs it last; but
    # FlashRNN compiles itself for each size, which may take minutes.
    ordered = sorted(rows, key=lambda row: (not row.goals, row.against == FLASH, row.table == "small"))
    for at, row in enumerate(ordered, 1):
        print(f"{at} of {len(rows)}: {row.name}; {row.dtype}", file=sys.stderr)
        bench.run_row(row)
        if row.lengths and bench.budget.left() > 0:
            bench.run_ragged(row)
        write()
    bench.run_compiled(arguments.compile_seconds)
    write()
    if arguments.tune:
        points += tune.measure(device, bench.clock, arguments.tune_seconds, arguments.dry_run)
    print(write())
    if output is not None:
        try:
            reporting.plot(report, output.with_suffix(".svg"))
        except ImportError as error:
            print(f"no plot: {error.name} is not installed", file=sys.stderr)
    if arguments.readme:
        reporting.write_readme(report, ROOT / "README.md")
    if arguments.dry_run:
        return 0 if all({OURS, NN} <= entry.times.keys() for entry in report.entries) else 1
    return 1 if report.missed() or report.slower(reporting.SLACK) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="the rows of large recurrences too")
    parser.add_argument("--tune", action="store_true", help="time every kernel that can be forced")
    parser.add_argument("--only", action="append", help="the name of a row or a type; may be repeated")
    parser.add_argument("--seconds", type=float, default=180, help="for the rows in all")
    parser.add_argument("--compile-seconds", type=float, default=60, help="for torch.compile, of those")
    parser.add_argument("--tune-seconds", type=float, default=60, help="for --tune, beside them")
    parser.add_argument("--output", type=Path, help="the JSON file; the tables and the plot take its name")
    parser.add_argument("--readme", action="store_true", help="put the tables into README.md")
    parser.add_argument("--dry-run", action="store_true", help="a few steps on the processor, to try the script")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*deprecat.*")
    try:
        if not arguments.dry_run and not torch.cuda.is_available():
            raise RuntimeError("expected a CUDA device; torch finds none; --dry-run tries the script without one")
        if arguments.readme:
            reporting.read_marked(ROOT / "README.md")
        return run(arguments)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
