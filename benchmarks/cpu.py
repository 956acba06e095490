"""cellstep's speed on a CPU, against every peer and against what the machine can do.

    python benchmarks/cpu.py                       all rows: some eight minutes on two idle cores
    python benchmarks/cpu.py --quick               fewer blocks, and no peer that compiles for seconds
    python benchmarks/cpu.py --only inference --only "1, 1, 1, 8, 1, runtime"

Each pair of cellstep and a peer runs in turn in one process, a block of calls each; a ratio is the median over the
pairs of blocks. Every way of running a row has the same weights, and its answer is compared with torch's in float64
before it is timed. The floor is what rows.py says, at rates that rates.cpp measures in the same run.

Exit code 1: a row of "Must reach" falls short by more than 10%, or was asked for and has no time. 2: it cannot run.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from machine import describe, file_name, measure_rates
from peers import SLOW_TO_BUILD
from report import Report, as_json, plot, print_report, read_marked, write_readme
from rich.console import Console
from rows import Result, Row, Timing, judge, pick
from timing import Effort

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
#: Wider than a terminal that is none: nobody reads a table folded at 80 columns.
CONSOLE = Console(width=None if sys.stdout.isatty() else 160)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def effort_of(quick: bool, threads: int) -> Effort:
    rest = 0.05 if threads > 1 else 0.0
    return Effort(seconds=0.1, fewest=3, block=2e-3, rest=rest) if quick else Effort(rest=rest)


def measure_rows(rows: Sequence[Row], quick: bool, programs: dict[str, str]) -> dict[str, Result]:
    """All rows, those of one number of threads in one process; a row that takes its process down costs no other."""
    results: dict[str, Result] = {}
    leave_out = dict.fromkeys(SLOW_TO_BUILD, "left out by --quick") if quick else {}
    for threads in sorted({row.threads for row in rows}):
        left = [row.name for row in rows if row.threads == threads]
        while left:
            job: dict[str, Any] = {
                "rows": left,
                "threads": threads,
                "effort": asdict(effort_of(quick, threads)),
                "quick": quick,
                "leave_out": leave_out,
                "programs": programs,
            }
            for line in run_worker(job):
                if "begin" in line:
                    name = line["begin"]
                    left = left[left.index(name) + 1 :]
                    results[name] = Result(name, reasons={"cellstep": "the process that ran it crashed"})
                    print(f"{len(results)} of {len(rows)}: {name}", file=sys.stderr)
                else:
                    result = line["result"]
                    result["timings"] = {way: Timing(**times) for way, times in result["timings"].items()}
                    results[result["row"]] = Result(**result)
    return results


def run_worker(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What worker.py says, line by line; it may die on the way.

    Raises:
        RuntimeError: it died before its first row.
    """
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(job["threads"]))
    read, write = os.pipe()
    command = [sys.executable, str(HERE / "worker.py"), str(write)]
    # The libraries' own words go to a file, which is of use only if nothing else came.
    with (
        tempfile.TemporaryFile("w+") as noise,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=noise, stderr=noise, text=True, env=environment, pass_fds=[write]
        ) as worker,
        os.fdopen(read) as lines,
    ):
        os.close(write)
        assert worker.stdin is not None
        with worker.stdin:
            worker.stdin.write(json.dumps(job))
        silent = True
        for line in lines:
            silent = False
            yield json.loads(line)
        if silent:
            noise.seek(0)
            raise RuntimeError(f"the process that measures did not start: {noise.read().strip()[-1000:]}")


def main(
    only: Annotated[list[str] | None, typer.Option(help="A section or the name of a row; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer blocks, and no peer that compiles.")] = False,
    output: Annotated[Path | None, typer.Option(help="The JSON file; the plot takes its name.")] = None,
    readme: Annotated[bool, typer.Option("--readme", help="Put the tables into README.md.")] = False,
    programs: Annotated[str, typer.Option(help="Where cellstep-run and cellstep-embed are.")] = "",
    list_rows: Annotated[bool, typer.Option("--list", help="Print sections and rows, and stop.")] = False,
) -> None:
    """Measure cellstep on this machine's CPU against its peers and the machine's limit."""
    try:
        rows = pick(only or [])
        if list_rows:
            for row in rows:
                print(f"{row.section}: {row.name}")
            return
        if readme and (only or quick or output):
            raise ValueError("expected --readme alone: it takes in all rows and the plot; leave the other options out")
        if readme:
            read_marked(ROOT / "README.md")
        code = run(rows, quick, output, readme, programs)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    raise typer.Exit(code)


def run(rows: Sequence[Row], quick: bool, given: Path | None, readme: bool, programs: str) -> int:
    """Measure, print and write; the exit code."""
    about = describe()
    if about["load"] > 0.5:
        busy = f"the machine was busy in the last minute (load {about['load']:.1f})"
        print(f"warning: {busy}; what runs beside this spoils its figures", file=sys.stderr)
    build = ROOT / "build" / "bench"
    rates, vectors = measure_rates(HERE / "rates.cpp", build, 20 if quick else 100)
    places = {"directory": programs, "source": str(ROOT), "build": str(build)}
    results = measure_rows(rows, quick, places)
    date = datetime.date.today().isoformat()
    report = Report(date, quick, about, rates, vectors, rows, results, judge(rows, results, rates))
    print_report(report, CONSOLE)

    output = given or RESULTS / f"cpu-{file_name(about)}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(as_json(report), indent=1) + "\n")
    picture = given.with_suffix(".svg") if given else RESULTS / "cpu.svg"
    try:
        plot(report, picture)
    except ImportError as error:
        print(f"no plot: {error.name} is not installed")
    if readme:
        write_readme(report, ROOT / "README.md", picture)
    return 1 if report.missed else 0


if __name__ == "__main__":
    typer.run(main)
