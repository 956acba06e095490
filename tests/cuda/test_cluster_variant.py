"""All steps of a layer with options in one launch (csrc/ops/cuda/cluster_variant.cu), emulated, against the formula in
double and against the kernels of single steps."""

from pathlib import Path

import pytest
from test_simt import HERE, ROOT, build, run

KERNELS = [ROOT / "csrc/ops/cuda/cluster_variant.cu", ROOT / "csrc/ops/cuda/variant.cu"]
SOURCES = [HERE / "cluster_variant_test.cpp", *KERNELS]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cluster_variant"), SOURCES)


@pytest.mark.parametrize("what", ["alone", "together"])
def test_options(program: Path, what: str) -> None:
    done = run(program, what)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_fits(program: Path) -> None:
    """Every size up to the largest: the shared memory and the multiprocessors of an H100 hold them."""
    assert run(program, "sizes").stdout.splitlines()[:-1] == [
        "cluster, not normalised: H to 528",
        "grid, not normalised: H to 1728",
        "cluster, normalised: H to 528",
        "grid, normalised: H to 1728",
    ]


def test_bits_hang_on_no_order(program: Path) -> None:
    answers = [run(program, "few", seed=seed, blocks=blocks) for seed, blocks in ((0, 8), (1, 1), (2, 3), (3, 100))]
    assert all(answer.returncode == 0 for answer in answers), answers
    assert len({answer.stdout for answer in answers}) == 1


@pytest.mark.parametrize(("sanitizer", "what"), [("address,undefined", "few"), ("thread", "races")])
def test_sanitized(sanitizer: str, what: str, tmp_path: Path) -> None:
    """``thread`` finds values and shares of means that are read before they were sent, or written while they are
    read."""
    done = run(build(tmp_path, SOURCES, sanitizer), what, seed=5)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
