"""csrc/ops/cuda/rows.cu on the emulator, against the formula in double (rows_test.cpp)."""

from pathlib import Path

import pytest
from test_simt import HERE, ROOT, build, run

SOURCES = [ROOT / "csrc/ops/cuda/rows.cu", HERE / "rows_test.cpp"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("rows"), SOURCES, "address,undefined")


@pytest.mark.parametrize("arguments", [("sizes",), ("1", "10"), ("2", "10"), ("3", "10")], ids=lambda a: a[0])
def test_rows(program: Path, arguments: tuple[str, ...]) -> None:
    answers = [run(program, *arguments, seed=seed, blocks=blocks) for seed, blocks in ((0, 8), (3, 1))]
    for answer in answers:
        assert answer.returncode == 0 and not answer.stderr, answer.stdout + answer.stderr
        assert answer.stdout.startswith("equal ")
    assert answers[0].stdout == answers[1].stdout


def test_races(tmp_path: Path) -> None:
    """Few cases: the thread sanitizer takes a hundred times as long."""
    answer = run(build(tmp_path, SOURCES, "thread"), "5", "2")
    assert answer.returncode == 0 and not answer.stderr, answer.stdout + answer.stderr
