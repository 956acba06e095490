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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from machine import describe, file_name, measure_rates
from peers import SLOW_TO_BUILD
from programs import build_runtime
from report import Report, as_json, plot, print_report, write_readme
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
    rest = 0.005 if threads > 1 else 0.0
    return Effort(0.1, 3, 51, 2e-3, rest) if quick else Effort(rest=rest)


def measure_rows(rows: Sequence[Row], quick: bool, programs: dict[str, str], directory: Path) -> dict[str, Result]:
    """All rows, those of one number of threads in one process; a row that takes its process down is left out."""
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
            begun = ""
            for line in run_worker(job, directory):
                if "begin" in line:
                    begun = line["begin"]
                    left.remove(begun)
                else:
                    result = line["result"]
                    result["timings"] = {name: Timing(**timing) for name, timing in result["timings"].items()}
                    results[begun] = Result(**result)
            if begun not in results:
                results[begun or left.pop(0)] = Result(begun, reasons={"cellstep": "the process that ran it crashed"})
    return results


def run_worker(job: dict[str, Any], directory: Path) -> list[dict[str, Any]]:
    """What worker.py says, line by line; it may have died on the way."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        job_file, results = Path(place) / "job.json", Path(place) / "results.jsonl"
        job_file.write_text(json.dumps(job))
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(job["threads"]))
        results.touch()
        worker = [sys.executable, str(HERE / "worker.py"), str(job_file), str(results)]
        done = subprocess.run(worker, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        if not lines:
            raise RuntimeError(f"the measuring process did not start: {done.stdout.strip()[-1000:]}")
        return lines


def main(
    only: Annotated[list[str] | None, typer.Option(help="A section or the name of a row; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer blocks, and no peer that compiles.")] = False,
    output: Annotated[Path | None, typer.Option(help="The JSON file; the plot goes beside it.")] = None,
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
        if readme and (only or quick):
            raise ValueError("expected --readme with all rows in full; got --only or --quick beside it; leave them out")
        code = run(rows, quick, output, readme, programs)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    raise typer.Exit(code)


def run(rows: Sequence[Row], quick: bool, output: Path | None, readme: bool, programs: str) -> int:
    """Measure, print and write; the exit code."""
    about = describe()
    build = ROOT / "build" / "bench"
    rates, vectors = measure_rates(HERE / "rates.cpp", build, 20 if quick else 100)
    places = {"directory": programs, "runtime": ""}
    if any(row.section == "runtime" for row in rows):
        places["runtime"] = str(build_runtime(ROOT, build))
    results = measure_rows(rows, quick, places, build)
    date = datetime.date.today().isoformat()
    report = Report(date, quick, about, rates, vectors, rows, results, judge(rows, results, rates))
    print_report(report, CONSOLE)

    output = output or RESULTS / f"cpu-{file_name(about)}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(as_json(report), indent=1) + "\n")
    picture = output.parent / "cpu.svg"
    try:
        plot(report, picture)
    except ImportError as error:
        print(f"no plot: {error.name} is not installed")
    if readme:
        write_readme(report, ROOT / "README.md", picture)
    return 1 if report.missed else 0


if __name__ == "__main__":
    typer.run(main)
