"""Weights over several blocks, sums in float (csrc/ops/cuda/cluster_float*.cu), emulated, against double."""

from pathlib import Path

import pytest
from test_simt import HERE, ROOT, build, run

SOURCES = [HERE / "cluster_float_test.cpp"]
SOURCES += [ROOT / "csrc/ops/cuda" / name for name in ("cluster_float.cu", "cluster_float_backward.cu")]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cluster_float"), SOURCES)


@pytest.mark.parametrize("what", ["cluster", "grid", "chosen"])
def test_sizes_and_parts(program: Path, what: str) -> None:
    done = run(program, what)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_fits(program: Path) -> None:
    """Every size up to the largest: the shared memory and the multiprocessors of an H100 hold them."""
    lines = run(program, "sizes").stdout.splitlines()[:-1]
    assert lines == [
        "forward cluster, 1 rows: H to 576",
        "forward cluster, 16 rows: H to 576",
        "forward grid, 1 rows: H to 1728",
        "forward grid, 16 rows: H to 1728",
        "backward cluster, 1 rows: H to 576",
        "backward cluster, 16 rows: H to 576",
        "backward grid, 1 rows: H to 1584",
        "backward grid, 16 rows: H to 1584",
    ]


def test_bits_hang_on_no_order(program: Path) -> None:
    answers = [run(program, "few", seed=seed, blocks=blocks) for seed, blocks in ((0, 8), (1, 1), (2, 3), (3, 100))]
    assert all(answer.returncode == 0 for answer in answers), answers
    assert len({answer.stdout for answer in answers}) == 1


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitized(sanitizer: str, tmp_path: Path) -> None:
    """``thread`` finds values that are read before they were sent, or written while they are read."""
    done = run(build(tmp_path, SOURCES, sanitizer), "few", seed=5)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
