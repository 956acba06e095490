"""Whole sequences on tensor cores (csrc/ops/cuda/tensor.cu) on the emulated device, against the formula in double."""

from pathlib import Path

import pytest
from test_simt import HERE, ROOT, build, run

SOURCES = [HERE / "tensor_test.cpp", ROOT / "csrc/ops/cuda/tensor.cu"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tensor"), SOURCES)


def test_every_size(program: Path) -> None:
    done = run(program)
    assert done.returncode == 0, done.stdout + done.stderr


def test_bits_hang_on_no_order(program: Path) -> None:
    """Of threads, nor on how many blocks there is room for; with one, whoever waits must wait for who has ended."""
    answers = [run(program, "few", seed=seed, blocks=blocks) for seed, blocks in ((0, 8), (1, 1), (2, 3), (3, 100))]
    assert all(answer.returncode == 0 for answer in answers), answers
    assert len({answer.stdout for answer in answers}) == 1


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitized(sanitizer: str, tmp_path: Path) -> None:
    done = run(build(tmp_path, SOURCES, sanitizer), "few", seed=5)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
