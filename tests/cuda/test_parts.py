"""Kernels with weights over several blocks (csrc/ops/cuda/cluster_*.cu), emulated, against the formula in double."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from test_simt import HERE, ROOT, build, run


@dataclass
class Kernels:
    """What a program of tests compiles, what it is asked for, and what it says of sizes."""

    name: str  #: of the program, and of the kernel file beside those in `also`
    runs: tuple[str, ...]
    sizes: list[str]  #: from and to which shared memory and multiprocessors of an H100 hold all
    also: tuple[str, ...] = ()
    seeds: int = 4
    raced: str = "few"  #: what the thread sanitizer gets through

    @property
    def sources(self) -> list[Path]:
        kernels = [ROOT / f"csrc/ops/cuda/{name}.cu" for name in (self.name, *self.also)]
        return [HERE / f"{self.name}_test.cpp", *kernels]


TENSOR = Kernels(
    "cluster_tensor",
    ("cluster", "grid", "chosen"),
    [
        "forward cluster: H 1 to 832",
        "forward grid: H 1 to 2048",
        "backward cluster: H 1 to 688",
        "backward grid: H 1 to 2048",
    ],
    seeds=20,
)
FLOAT = Kernels(
    "cluster_float",
    ("cluster", "grid", "chosen"),
    [
        "forward cluster, 1 rows: H 2 to 576",
        "forward cluster, 16 rows: H 2 to 576",
        "forward grid, 1 rows: H 1 to 1728",
        "forward grid, 16 rows: H 1 to 1728",
        "backward cluster, 1 rows: H 5 to 576",
        "backward cluster, 16 rows: H 5 to 576",
        "backward grid, 1 rows: H 1 to 1584",
        "backward grid, 16 rows: H 1 to 1584",
    ],
    also=("cluster_float_backward",),
)
#: Against the kernels of single steps as well.
VARIANT = Kernels(
    "cluster_variant",
    ("alone", "together"),
    [
        "cluster, not normalised: H 2 to 528",
        "grid, not normalised: H 1 to 1728",
        "cluster, normalised: H 2 to 528",
        "grid, normalised: H 1 to 1728",
    ],
    also=("variant",),
    raced="races",
)
ALL = pytest.mark.parametrize("kernels", [TENSOR, FLOAT, VARIANT], ids=lambda kernels: kernels.name, scope="module")


@pytest.fixture(scope="module")
def program(kernels: Kernels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp(kernels.name), kernels.sources)


@ALL
def test_right(kernels: Kernels, program: Path) -> None:
    for what in kernels.runs:
        done = run(program, what)
        assert done.returncode == 0, done.stdout + done.stderr


@ALL
def test_what_fits(kernels: Kernels, program: Path) -> None:
    assert run(program, "sizes").stdout.splitlines()[:-1] == kernels.sizes


@ALL
def test_bits_hang_on_no_order(kernels: Kernels, program: Path) -> None:
    answers = [run(program, "few", seed=seed, blocks=(8, 1, 3, 100)[seed % 4]) for seed in range(kernels.seeds)]
    assert all(answer.returncode == 0 for answer in answers), answers
    assert len({answer.stdout for answer in answers}) == 1


@ALL
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitized(kernels: Kernels, sanitizer: str, tmp_path: Path) -> None:
    """``thread`` finds what is read before it was sent, or written while it is read: values, and shares of means."""
    what = kernels.raced if sanitizer == "thread" else "few"
    done = run(build(tmp_path, kernels.sources, sanitizer), what, seed=5)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
