"""The emulator of tests/cuda/simt.h: right kernels pass, planted mistakes are found, with and without sanitizers."""

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def build(folder: Path, sources: list[Path], sanitizer: str = "") -> Path:
    """Compiles emulated kernels; with ``thread``, simt.cpp stays apart from what the sanitizer watches."""
    base = ["g++", "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DCELLSTEP_EMULATED"]
    base += [f"-I{HERE}", f"-I{ROOT / 'csrc/ops/cuda'}"]
    checks = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=undefined"] if sanitizer else []
    apart = ["-DCELLSTEP_SIMT_RACES"] if sanitizer == "thread" else checks
    emulator = folder / "simt.o"
    subprocess.run([*base, *apart, "-c", str(HERE / "simt.cpp"), "-o", str(emulator)], check=True)
    objects = [emulator]
    for source in sources:
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([*base, *checks, "-x", "c++", "-c", str(source), "-o", str(objects[-1])], check=True)
    program = folder / "program"
    subprocess.run([*base, *checks, *map(str, objects), "-o", str(program)], check=True)
    return program


def run(program: Path, *arguments: str, seed: int = 0, blocks: int = 8) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "CELLSTEP_SIMT_SEED": str(seed),
        "CELLSTEP_SIMT_BLOCKS": str(blocks),
        "TSAN_OPTIONS": "halt_on_error=1",
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture(scope="module", params=["", "address,undefined", "thread"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return build(tmp_path_factory.mktemp("simt"), [HERE / "simt_test.cpp"], request.param), request.param


@pytest.mark.parametrize("case", ["right", "tickets", "all_blocks_together", "streams"])
@pytest.mark.parametrize("blocks", [1, 3, 100])
def test_right(program: tuple[Path, str], case: str, blocks: int) -> None:
    answers = [run(program[0], case, seed=seed, blocks=blocks) for seed in range(4)]
    assert all(answer.returncode == 0 and not answer.stderr for answer in answers), answers
    assert len({answer.stdout for answer in answers}) == 1


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("all_blocks", "a block waits for another one that does not come"),
        ("unread_memory", "a sum of shared memory that was not written"),
        ("beyond", "a block wrote beside its shared memory"),
        ("before", "a block wrote beside its shared memory"),
        ("barrier_of_half", "a barrier that "),
        ("barrier_after_return", "a barrier that "),
        ("shuffle_of_half", "all threads wait at barriers that not all of their block or warp come to"),
        ("shuffle_meets_sync", "lanes of one warp meet for different things"),
        ("no_wait", "a value from another stream"),
        ("late_for_arrivals", "a thread is two phases of arrivals behind"),
        ("cluster_of_one", "clusters of one block cannot send"),
        ("no_grid", "expected a grid with at least one block"),
    ],
)
def test_planted(program: tuple[Path, str], case: str, line: str) -> None:
    if program[1].startswith("address") and case in ("beyond", "before"):
        line = "AddressSanitizer: use-after-poison"
    for seed in range(3):
        answer = run(program[0], case, seed=seed, blocks=3)
        assert answer.returncode != 0
        assert line in answer.stderr


def test_cluster_that_ends(program: tuple[Path, str]) -> None:
    answers = [run(program[0], "cluster_that_ends", seed=seed) for seed in range(3)]
    assert all("the shared memory of one that is not there" in answer.stderr for answer in answers)


def test_order_of_blocks(program: tuple[Path, str]) -> None:
    """Blocks that count on starting in order get by with seed 0 alone."""
    assert run(program[0], "no_tickets", blocks=2).returncode == 0
    answers = [run(program[0], "no_tickets", seed=seed, blocks=2) for seed in range(1, 4)]
    assert all("a block waits for another one that does not come" in answer.stderr for answer in answers)


def test_races(program: tuple[Path, str]) -> None:
    """Missing barriers change bits from seed to seed, and the thread sanitizer names the lines."""
    for case in ("no_sync", "warp_barrier_only", "one_word", "no_cluster_sync"):
        answers = [run(program[0], case, seed=seed) for seed in range(4)]
        if program[1] == "thread":
            assert all("ThreadSanitizer: data race" in answer.stderr for answer in answers), case
        else:
            assert len({answer.stdout for answer in answers}) > 1, case
