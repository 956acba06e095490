"""The measured table: on the terminal, as JSON, as Markdown in README, and as a plot."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rows import SECTIONS, SLACK, Rates, Result, Row, Verdict, floor_us, operations

TITLES = {
    "inference": "Inference from Python, one thread",
    "threads": "Two threads",
    "low": "Low precision",
    "ragged": "A ragged batch",
    "training": "Training: forward, backward, Adam",
    "runtime": "The torch-free runtime, one step",
    "programs": "One call from C++",
    "flat": "A new sequence length every call",
}
COLUMNS = "batch, time, input, hidden, layers"


@dataclass
class Report:
    """Everything that a run found."""

    date: str
    quick: bool
    machine: dict[str, Any]
    rates: Rates
    vectors: str
    rows: Sequence[Row]
    results: dict[str, Result]
    verdicts: Sequence[Verdict]

    def share(self, row: Row) -> float | None:
        """The floor over the time."""
        ours = self.results[row.name].ours
        return floor_us(row, self.rates) / ours.median if ours else None

    def sections(self) -> list[tuple[str, list[Row]]]:
        parts = [(section, [row for row in self.rows if row.section == section]) for section in SECTIONS]
        return [(section, rows) for section, rows in parts if rows]

    def ways(self, rows: Sequence[Row]) -> list[str]:
        """Names of everything that has a time in one of these rows: cellstep's ways, peers and references."""
        results = [self.results[row.name] for row in rows]
        return list(dict.fromkeys(name for result in results for name in (*result.timings, *result.ratios)))

    @property
    def missed(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if not verdict.met]

    def heading(self) -> str:
        about = self.machine
        versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        return (
            f"{self.date}; {about['processor']}, {about['cores']} cores, cellstep on {about['instruction_set']}; "
            f"{versions}; one core: {self.rates.flops[0] / 1e9:.0f} GFLOP/s of {self.vectors} multiply-adds, reads of "
            f"{_gigabytes(self.rates, 16)} from 16 kB, {_gigabytes(self.rates, 256)} from 256 kB, "
            f"{_gigabytes(self.rates, 8192)} from 8 MB"
        )


def _gigabytes(rates: Rates, kilobytes: int) -> str:
    return f"{rates.read(kilobytes * 1024) / 1e9:.0f} GB/s"


def number(value: float | None) -> str:
    """Microseconds and ratios to three figures or so."""
    if value is None:
        return ""
    if value < 1:
        return f"{value:.3f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%"


def _median(result: Result, name: str) -> float | None:
    """The time of a way, a peer or a reference; what was measured elsewhere is there as a ratio alone."""
    if name in result.timings:
        return result.timings[name].median
    return result.ours.median * result.ratios[name] if result.ours and name in result.ratios else None


def print_report(report: Report, console: Console) -> None:
    """Our times, the peers', why a cell is empty, and what must be reached."""
    console.print(report.heading(), soft_wrap=True)
    for section, rows in report.sections():
        _print_times(report, f"{TITLES[section]} ({COLUMNS}; microseconds)", rows, console)
    for row in report.rows:
        result = report.results[row.name]
        for what, value in result.extra.items():
            console.print(f"{row.name}: {what}: {number(value)}", soft_wrap=True, highlight=False)
    _print_reasons(report, console)
    if report.verdicts:
        _print_verdicts(report, console)


def _print_times(report: Report, title: str, rows: Sequence[Row], console: Console) -> None:
    times = ["median", "99%", "99.9%", "first", "floor", "share"]
    ours = _table(title, ["row", "way"], times, ["best peer"], ["ratio"])
    ways = report.ways(rows)
    medians = _table("", ["row"], ways)
    for row in rows:
        result = report.results[row.name]
        best = result.best_peer
        own = result.ours
        ours.add_row(
            row.name,
            result.way.removeprefix("cellstep "),
            *map(number, (own.median, own.p99, own.p999, own.first) if own else (None,) * 4),
            number(floor_us(row, report.rates)),
            percent(report.share(row)),
            best or "",
            number(result.ratios[best]) if best else "",
        )
        medians.add_row(row.name, *(number(_median(result, name)) for name in ways))
    console.print(ours)
    if any(len(report.ways([row])) > 1 for row in rows):
        console.print(medians)


def _table(title: str, *columns: Sequence[str]) -> Table:
    """Columns of text and columns of numbers, in turn."""
    table = Table(title=title or None, title_justify="left")
    for at, names in enumerate(columns):
        for name in names:
            table.add_column(name, justify="right" if at % 2 else "left")
    return table


def _print_reasons(report: Report, console: Console) -> None:
    rows: dict[tuple[str, str], list[str]] = {}
    for name, result in report.results.items():
        for who, reason in result.reasons.items():
            rows.setdefault((who, reason), []).append(name)
    for (who, reason), names in rows.items():
        where = f"{len(names)} rows" if len(names) > 2 else "; ".join(names)
        console.print(f"no time of {who} ({where}): {reason}", soft_wrap=True, highlight=False, markup=False)


def _print_verdicts(report: Report, console: Console) -> None:
    table = _table("Must reach", ["row", "against"], ["at least", "reached"], [""])
    for verdict in report.verdicts:
        goal = verdict.goal
        against = goal.against if goal.against != "best peer" else _best(report, goal.row)
        mark = "" if verdict.met else "[red]missed[/red]"
        table.add_row(goal.row, against, number(goal.least), number(verdict.value), mark)
    console.print(table)
    missed = report.missed
    reached = len(report.verdicts) - len(missed)
    console.print(f"{reached} of {len(report.verdicts)} reached within {SLACK:.0%}")
    for verdict in missed:
        goal = verdict.goal
        got = number(verdict.value) or f"nothing ({verdict.reason})"
        console.print(
            f"missed: {goal.row} against {goal.against}: expected {number(goal.least)}; got {got}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )


def _best(report: Report, name: str) -> str:
    best = report.results[name].best_peer if name in report.results else None
    return f"best peer: {best}" if best else "best peer"


def as_json(report: Report) -> dict[str, Any]:
    """All of it: sizes, times, ratios, reasons, goals."""
    rows = []
    for row in report.rows:
        result = report.results[row.name]
        rows.append(
            {
                **asdict(row),
                **asdict(result),
                "floor_us": floor_us(row, report.rates),
                "operations": operations(row),
                "share_of_floor": report.share(row),
                "best_peer": result.best_peer,
            }
        )
        del rows[-1]["row"]
    return {
        "date": report.date,
        "quick": report.quick,
        "machine": report.machine,
        "rates": {**asdict(report.rates), "vectors": report.vectors},
        "rows": rows,
        "must_reach": [
            {**asdict(verdict.goal), "value": verdict.value, "reason": verdict.reason, "met": verdict.met}
            for verdict in report.verdicts
        ],
    }


def markdown(report: Report, plot: str) -> str:
    """The tables that README takes in."""
    parts = [f"{report.heading()}.", f"![The best peer's time over cellstep's, and the share of the floor]({plot})"]
    for section, rows in report.sections():
        peers = [name for name in report.ways(rows) if not name.startswith("cellstep")]
        head = [f"{TITLES[section]}: {COLUMNS}", "cellstep", *peers, "best peer / cellstep", "share of the floor"]
        lines = [head, ["---", *["--:"] * (len(head) - 1)]]
        for row in rows:
            result = report.results[row.name]
            best = result.best_peer
            line = [
                row.name.removesuffix(", runtime").removesuffix(", two threads"),
                number(result.ours.median if result.ours else None),
                *(number(_median(result, name)) for name in peers),
                number(result.ratios[best]) if best else "",
                percent(report.share(row)),
            ]
            lines.append(line)
        used = [at for at in range(len(head)) if at < 2 or any(line[at] for line in lines[2:])]
        parts.append("\n".join("| " + " | ".join(line[at] for at in used) + " |" for line in lines))
    parts.append("Medians in microseconds. RTNeural's figures are of another machine, as `benchmarks/rows.py` says.")
    return "\n\n".join(parts)


BLOCK = re.compile(r"(?<=<!-- table of cpu speed -->\n).*?(?=<!-- end of cpu speed -->)", re.DOTALL)


def read_marked(readme: Path) -> str:
    """The text of a README that has a place for the tables.

    Raises:
        ValueError: it has none.
    """
    text = readme.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        raise ValueError(
            f"expected the lines <!-- table of cpu speed --> and <!-- end of cpu speed --> in '{readme}'; got none; "
            "add them where the table belongs"
        )
    return text


def write_readme(report: Report, readme: Path, plot: Path) -> None:
    """Put the tables between the marks of a README. ValueError if it has none."""
    text = read_marked(readme)
    table = markdown(report, plot.relative_to(readme.parent).as_posix())
    readme.write_text(BLOCK.sub(lambda _: table + "\n", text), encoding="utf-8")


def plot(report: Report, path: Path) -> None:
    """Two panels side by side: how many times as long the best peer takes, and the share of the floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"  # text as text: a third of the size

    rows = [row for row in report.rows if report.results[row.name].ours]
    names = [row.name for row in rows]
    results = [report.results[name] for name in names]
    least = {(verdict.goal.row, verdict.goal.against): verdict.goal.least for verdict in report.verdicts}
    goals = [
        least.get((result.row, "best peer"), least.get((result.row, result.best_peer or ""), float("nan")))
        for result in results
    ]
    ratios = [result.ratios[result.best_peer] if result.best_peer else float("nan") for result in results]
    shares = [100 * (report.share(row) or 0.0) for row in rows]
    places = range(len(rows))
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(11, 1.2 + 0.26 * len(rows)), layout="constrained", width_ratios=(3, 2)
    )
    left.barh(places, [ratio - 1 for ratio in ratios], left=1, color="tab:blue")
    left.plot(goals, places, "|", color="black", markersize=9, label="must reach")
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xscale("log")
    left.set_xticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
    left.minorticks_off()
    left.set_xlabel("best peer's time / cellstep's")
    left.set_yticks(places, names, fontsize=8)
    left.set_ylim(len(rows) - 0.4, -0.6)
    right.barh(places, shares, color="tab:green")
    right.set_xlim(0, max(100, *shares))
    right.set_xlabel("share of the floor, %")
    if any(goal == goal for goal in goals):
        left.legend(loc="lower right", fontsize=8)
    figure.suptitle(f"{report.date}, {report.machine['processor']}, {report.machine['instruction_set']}", fontsize=10)
    figure.savefig(path)
    plt.close(figure)
