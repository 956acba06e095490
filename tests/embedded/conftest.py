"""Builds and runs all targets side by side, and prints the table of what came of it."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from models import NARROW, TOLERANCES, write_jobs
from targets import FUSED, REQUIRED, SOURCE, STRICT, TARGETS, build, run, session_answers, version

RESULTS = SOURCE / "benchmarks" / "results" / "embedded.json"


@dataclass
class Jobs:
    path: Path  #: the folder of models, inputs, torch's answers and the Session's
    instruction_sets: dict[str, str]  #: that of the Session by group


@dataclass
class Row:
    """What came of a target."""

    hashes: dict[str, str] = field(default_factory=dict)  #: of the answers of float32 models, and of narrow ones
    errors: dict[str, float] = field(default_factory=dict)  #: largest difference from torch by model
    note: str = ""


rows = {}


@pytest.fixture(scope="session")
def jobs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("jobs")
    write_jobs(directory)
    isas = {FUSED: session_answers(directory), STRICT: session_answers(directory, "baseline")}
    assert isas[FUSED] != "baseline", "expected a processor with AVX2 and FMA, on which Python's Session stands for it"
    return Jobs(directory, isas)


@pytest.fixture(scope="session")
def runs(jobs, request):
    """By target that is asked for and can be built: a future of its answers' folder, or of None if it is not run."""
    stems = [path.stem for path in sorted(jobs.path.glob("*.cellstep"))]
    asked = {item.callspec.params.get("target") for item in request.session.items if hasattr(item, "callspec")}
    wanted = [target for target in TARGETS if target in asked and not target.missing]
    pool = ThreadPoolExecutor(os.cpu_count())
    builds = {preset: pool.submit(build, preset) for preset in dict.fromkeys(target.preset for target in wanted)}

    def answers(target):
        program = builds[target.preset].result()
        return run(target, program, jobs.path, stems) if target.run and not target.lacks else None

    yield {target.name: pool.submit(answers, target) for target in wanted}
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def row(target):
    return rows.setdefault(target.name, Row())


@pytest.fixture
def outcome(runs, row, target):
    """The future of a target's answers. Where tools are missing: fails if they are required, or skips."""
    if target.missing:
        row.note = f"not built: lacks {', '.join(target.missing)}, see scripts/embedded_tools.sh"
        (pytest.fail if REQUIRED else pytest.skip)(row.note)
    row.note = target.note
    if target.lacks:
        row.note = f"built, not run: this processor lacks {', '.join(target.lacks)}"
    return runs[target.name]


@pytest.fixture
def answers(outcome, target):
    """The folder of a target's answers."""
    if target.lacks or outcome.exception():
        pytest.skip("did not run: see test_builds_and_runs")
    return outcome.result()


def shown_error(errors):
    return f"{max(errors):.1e}" if errors else "-"


def table(rows):
    """A Markdown table; errors are relative to the range of torch's outputs."""
    float32 = [name for name in TOLERANCES if name not in (*NARROW, "fast")]
    head = ["target", "compiler", "run by", "arithmetic", "float32 outputs", "16-bit, int8", "float32 to torch"]
    head += [*(f"{name} to torch" for name in ("fast", *NARROW)), "note"]
    lines = [head, ["---"] * len(head)]
    for target in TARGETS:
        if target.name not in rows:
            continue
        row = rows[target.name]
        errors = [shown_error([row.errors[name] for name in float32 if name in row.errors])]
        errors += [shown_error([row.errors[name]] if name in row.errors else []) for name in ("fast", *NARROW)]
        hashes = [row.hashes.get(kind, "-") for kind in ("float32", "narrow")]
        compiler = "-" if target.missing else version(target.compiler)
        lines.append([target.name, compiler, target.emulated_by, target.group, *hashes, *errors, row.note])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def pytest_terminal_summary(terminalreporter, exitstatus):
    if not rows:
        return
    terminalreporter.section("targets")
    terminalreporter.write(table(rows))
    if exitstatus == 0 and set(rows) == {target.name for target in TARGETS}:
        document = {
            "bounds": TOLERANCES,
            "targets": [
                {
                    "target": target.name,
                    "preset": target.preset,
                    "compiler": version(target.compiler),
                    "run by": target.emulated_by,
                    "arithmetic": target.group,
                    **vars(rows[target.name]),
                }
                for target in TARGETS
            ],
        }
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")
        terminalreporter.write_line(f"written to {RESULTS.relative_to(SOURCE)}")
