"""What benchmarks/cuda.py found: tables as text, as JSON, in README, and as a plot.

The tables are Markdown and read as they are: a machine with a GPU may have no package that draws others.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import NN, RAGGED_LIMIT, Rates, Row
from benchmarks.gpu.ways import OURS

#: A row falls short when it is this much below, as in cpu.py.
SLACK = 0.10
TITLES = {"small": "Small recurrences", "large": "Large recurrences"}
MODES = ("eager", "graph")


@dataclass
class Entry:
    """What came of one row in one pass.

    Attributes:
        algorithm: cuDNN's, by the rule of cudnn_algorithm.
        kernels: cellstep's, as the profiler saw them, and the launches of a call; peer_launches of nn.LSTM's.
        times: by way and mode: median and 99% of microseconds.
        ratios: by way and mode: how many times as long as cellstep.
        reasons: by way: why there are no times.
        parts: by way: the steps that were timed in place of all, where the times are scaled.
    """

    row: Row
    training: bool
    algorithm: str
    floor_us: float
    kernels: str = ""
    peer_launches: int = 0
    times: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def what(self) -> str:
        return "forward and backward" if self.training else "forward"

    @property
    def name(self) -> str:
        return f"{self.row.name}; {self.row.dtype}; {self.what}"

    @property
    def goal(self) -> float | None:
        return self.row.goals.get("training" if self.training else "forward")

    @property
    def ratio(self) -> float | None:
        """What is judged: the lesser of eager and graph."""
        found = self.ratios.get(self.row.against)
        return min(found.values()) if found else None

    @property
    def met(self) -> bool:
        return self.goal is None or (self.ratio is not None and self.ratio >= self.goal * (1 - SLACK))

    @property
    def beside_cudnn(self) -> float | None:
        """cuDNN's time over cellstep's, the lesser of eager and graph."""
        found = self.ratios.get(NN)
        return min(found.values()) if found else None

    @property
    def share(self) -> float | None:
        ours = self.times.get(OURS)
        return self.floor_us / min(median for median, _ in ours.values()) if ours else None

    def as_json(self) -> dict[str, Any]:
        found = asdict(self) | {"name": self.name, "goal": self.goal, "ratio": self.ratio, "met": self.met}
        return found | {"beside_cudnn": self.beside_cudnn, "share_of_floor": self.share}


@dataclass
class Ragged:
    """A packed row beside padded ones: microseconds of cellstep's forward pass."""

    row: Row
    packed_us: float
    padded_us: dict[str, float]

    @property
    def judged(self) -> float:
        return self.packed_us / next(iter(self.padded_us.values()))

    @property
    def met(self) -> bool:
        return self.judged <= RAGGED_LIMIT


@dataclass
class Report:
    date: str
    about: dict[str, Any]
    rates: Rates
    probe: dict[str, Any]
    entries: list[Entry]
    ragged: list[Ragged]
    seconds: float = 0.0

    def missed(self) -> list[str]:
        """A line for everything that fell short."""
        lines = []
        for entry in self.entries:
            if not entry.met:
                why = entry.reasons.get(OURS) or entry.reasons.get(entry.row.against) or "not measured"
                got = f"got {entry.ratio:.2f}" if entry.ratio is not None else why
                lines.append(f"missed: {entry.name}: expected {entry.goal} times {entry.row.against}; {got}")
        for found in self.ragged:
            if not found.met:
                lines.append(
                    f"missed: {found.row.name}: expected {RAGGED_LIMIT} times the padded time; got {found.judged:.2f}"
                )
        return lines

    def slower(self, slack: float = 0.0) -> list[str]:
        """A line for every row, with a goal or without, on which cuDNN is faster by more than the slack."""
        return [
            f"slower than cuDNN: {entry.name}: {NN} takes {entry.beside_cudnn:.2f} of cellstep's time"
            for entry in self.entries
            if entry.beside_cudnn is not None and entry.beside_cudnn < 1 - slack
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "date": self.date,
            "seconds": round(self.seconds, 1),
            "machine": self.about,
            "rates": self.rates.as_json(),
            "probe": self.probe,
            "rows": [entry.as_json() for entry in self.entries],
            "ragged": [asdict(found) | {"ratio": found.judged, "met": found.met} for found in self.ragged],
            "missed": self.missed(),
            "slower": self.slower(),
        }


def number(value: float | None) -> str:
    """Microseconds and ratios to three figures or so."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]], text: int = 1) -> str:
    """Markdown with even columns; the first ``text`` of them to the left."""
    widths = [max(len(line[at]) for line in [head, *lines]) for at in range(len(head))]

    def row(cells: Sequence[str]) -> str:
        padded = [cell.ljust(w) if at < text else cell.rjust(w) for at, (cell, w) in enumerate(zip(cells, widths))]  # noqa: B905
        return "| " + " | ".join(padded) + " |"

    rule = "| " + " | ".join("-" * w if at < text else "-" * (w - 1) + ":" for at, w in enumerate(widths)) + " |"
    return "\n".join([row(head), rule, *map(row, lines)])


def heading(report: Report) -> str:
    about, rates = report.about, report.rates
    versions = ", ".join(f"{name} {said}" for name, said in about["versions"].items())
    flops = ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in rates.flops.items())
    return (
        f"{report.date}; {about['device']}, compute capability {'.'.join(map(str, about['capability']))}, "
        f"{rates.multiprocessors} multiprocessors, {about['memory_gib']} GiB, driver {about['driver'] or 'unknown'}; "
        f"{versions}. Large products in TFLOP/s: {flops}; a large copy: {rates.bandwidth / 1e9:,.0f} GB/s."
    )


def barriers(report: Report) -> str:
    """What the floors stand on."""
    rates = report.rates
    figures = {
        "launch": rates.launch_us,
        "barrier of a block": rates.block_us,
        "barrier of a cluster of 16": rates.cluster_us,
        "barrier of the grid": rates.grid_us,
        "step within a warp": rates.warp_step_us,
        "step within a block": rates.block_step_us,
    }
    lines = [(name, "none" if value is None else f"{value:.3f}") for name, value in figures.items()]
    for key, value in report.probe.items():
        if (found := re.fullmatch(r"(block|cluster)_(\d+)_us", key)) and value not in figures.values():
            lines.append((f"barrier of a {found[1]} of {found[2]}", f"{value:.3f}"))
        if found := re.fullmatch(r"clusters_of_(\d+)", key):
            lines.append((f"clusters of {found[1]} at once", f"{value:.0f}"))
    return table([f"what costs time, us ({rates.source})", "us"], lines)


def _cell(entry: Entry, way: str, mode: str) -> str:
    times = entry.times.get(way, {}).get(mode)
    if times is None:
        return ""
    return ("~" if way in entry.parts else "") + f"{number(times[0])} ({number(times[1])})"


def speed_tables(report: Report, brief: bool = False) -> list[str]:
    """A table for each part, the first columns alone if ``brief``."""
    found = []
    for part, title in TITLES.items():
        entries = [entry for entry in report.entries if entry.row.table == part]
        if not entries:
            continue
        others = [way for way in dict.fromkeys(w for e in entries for w in e.times) if way not in (OURS, NN)]
        head = [f"{title}: batch, time, input, hidden, layers", "dtype", "pass", "cuDNN's algorithm"]
        head += ["cellstep's kernels (launches)"] if not brief else []
        head += [f"{way}, {mode}" for way in (OURS, NN) for mode in MODES]
        head += others if not brief else []
        head += ["ratio eager", "ratio graph", "must reach", "met", "slower than cuDNN", "floor", "share of the floor"]
        lines = []
        for entry in entries:
            ratios = entry.ratios.get(entry.row.against, {})
            line = [entry.row.name, entry.row.dtype, entry.what, entry.algorithm]
            line += [entry.kernels] if not brief else []
            line += [_cell(entry, way, mode) for way in (OURS, NN) for mode in MODES]
            line += [_cell(entry, way, "eager") for way in others] if not brief else []
            line += [number(ratios.get(mode)) for mode in MODES]
            goal = "" if entry.goal is None else f"{entry.goal:g}"
            line += [goal, "" if entry.goal is None else "yes" if entry.met else "NO"]
            beside = entry.beside_cudnn
            line += ["" if beside is None else "YES" if beside < 1 else "no", number(entry.floor_us)]
            line += ["" if entry.share is None else f"{100 * entry.share:.0f}%"]
            lines.append(line)
        found.append(table(head, lines, 4 if brief else 5))
    return found


def ragged_table(report: Report) -> str:
    lines = []
    for ragged in report.ragged:
        for name, us in ragged.padded_us.items():
            judged = us == next(iter(ragged.padded_us.values()))
            note = ("yes" if ragged.met else "NO") if judged else ""
            ratio = ragged.packed_us / us
            lines.append([ragged.row.name, name, number(ragged.packed_us), number(us), number(ratio), note])
    return table(
        ["packed rows", "beside the padded kernel with", "packed", "padded", "ratio", f"within {RAGGED_LIMIT}"],
        lines,
        2,
    )


NOTES = (
    "Microseconds, medians and in brackets the 99th percentile over blocks of calls; the input product is in all of "
    "them but FlashRNN's first column. What must be reached is judged by the lesser ratio, the peer's time over "
    "cellstep's (torch.nn.LSTM's, or FlashRNN's in the row of its own), less a tenth. Floors are derived from rates "
    "and barriers of the same run. ~: a few steps of the sequence were timed and multiplied, as unrolling takes the "
    "compiler seconds a step. cuDNN's algorithm is the one that torch asks for."
)


def reasons(report: Report) -> list[str]:
    said: dict[tuple[str, str], list[str]] = {}
    for entry in report.entries:
        for way, why in entry.reasons.items():
            said.setdefault((way, why), []).append(entry.name)
    return [
        f"{way}: {why}" + (f" ({names[0]})" if len(names) == 1 else f" ({len(names)} rows)")
        for (way, why), names in said.items()
    ]


def as_text(report: Report) -> str:
    """Everything, the table that is judged last."""
    parts = [barriers(report), heading(report), *reasons(report)]
    if report.ragged:
        parts.append(ragged_table(report))
    return "\n\n".join([*parts, *speed_tables(report), NOTES, *report.slower(), *report.missed()])


BLOCK = re.compile(r"(?<=<!-- table of CUDA speed -->\n).*?(?=<!-- end of CUDA speed -->)", re.DOTALL)


def read_marked(readme: Path) -> str:
    """The text of a README that has a place for the tables. ValueError if it has none."""
    text = readme.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        raise ValueError(
            f"expected the lines <!-- table of CUDA speed --> and <!-- end of CUDA speed --> in '{readme}'; got none; "
            "add them where the table belongs"
        )
    return text


def write_readme(report: Report, readme: Path) -> None:
    parts = [heading(report), *speed_tables(report, brief=True)]
    if report.ragged:
        parts.append(ragged_table(report))
    body = "\n\n".join([*parts, NOTES]) + "\n"
    readme.write_text(BLOCK.sub(lambda _: body, read_marked(readme)), encoding="utf-8")


def plot(report: Report, path: Path) -> None:
    """How many times as long the peer takes, with what must be reached; ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"
    entries = [entry for entry in report.entries if entry.ratio is not None]
    places = range(len(entries))
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.26 * len(entries)), layout="constrained")
    axis.barh(places, [(entry.ratio or 1) - 1 for entry in entries], left=1, color="tab:blue")
    goals = [float("nan") if entry.goal is None else entry.goal for entry in entries]
    axis.plot(goals, places, "|", color="black", markersize=9, label="must reach")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlabel("peer's time / cellstep's, the lesser of eager and CUDA graph")
    axis.set_yticks(places, [entry.name for entry in entries], fontsize=8)
    axis.set_ylim(len(entries) - 0.4, -0.6)
    axis.legend(loc="lower right", fontsize=8)
    figure.suptitle(f"{report.date}, {report.about['device']}", fontsize=10)
    figure.savefig(path)
    plt.close(figure)
