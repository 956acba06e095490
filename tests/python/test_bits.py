"""In inference a result is the same to the bit on every instruction set with fused multiply-add, for any number of
threads, any split of the batch and any cut of the sequence into calls."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch

import cellstep
from cellstep.nn import LSTM, Chain

# (steps, batch, inputs, hidden, layers, options): one for each way in which the engine cuts up a call on two threads,
# large enough for it to be worth waking one (a million multiply-adds); sizes that leave tails of every width.
SCHEDULES = {
    "rows in shares": (30, 32, 10, 50, 2, {}),
    "rows in shares, uneven": (40, 13, 10, 37, 2, {}),
    "wavefront": (603, 1, 10, 50, 2, {}),
    "wavefront of three": (403, 3, 10, 43, 3, {}),
    "units in shares": (5, 1, 64, 520, 1, {}),
    "units in shares, some rows": (3, 7, 64, 515, 2, {}),
    "directions": (130, 1, 10, 64, 2, {"bidirectional": True}),
    "directions, some rows": (60, 3, 10, 51, 1, {"bidirectional": True}),
}
# Layers with options have a sweep of their own.
OPTIONS = {
    "peephole": (90, 12, 10, 37, 2, {"peephole": True, "coupled": True}),
    "layer norm": (150, 9, 10, 29, 2, {"layer_norm": True}),
    "projection": (400, 1, 10, 61, 2, {"proj_size": 50}),
    "small": (70, 5, 3, 3, 2, {}),
}
CASES = SCHEDULES | OPTIONS
ONE_WAY = [name for name in CASES if not CASES[name][-1].get("bidirectional")]
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(name, dtype=torch.float32):
    steps, batch, inputs, hidden, layers, options = CASES[name]
    torch.manual_seed(0)
    lstm = LSTM(inputs, hidden, layers, dtype=dtype, **options).eval()
    state = tuple(
        torch.randn(layers * (2 if lstm.bidirectional else 1), batch, size, dtype=dtype)
        for size in (lstm.proj_size or hidden, hidden)
    )
    return lstm, torch.randn(steps, batch, inputs, dtype=dtype), state


def run(lstm, x, state):
    with torch.no_grad():
        y, (h, c) = lstm(x, state)
    return y, h, c


def same(a, b):
    return all(x.numpy().tobytes() == y.contiguous().numpy().tobytes() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_threads(name, dtype):
    lstm, x, state = make(name, dtype)
    alone = run(lstm, x, state)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert same(alone, run(lstm, x, state))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][1] > 1])
def test_batch_split(name, threads):
    torch.set_num_threads(threads)
    lstm, x, state = make(name)
    whole = run(lstm, x, state)
    for sizes in ([1] * x.size(1), [2] * (x.size(1) // 2) + [1] * (x.size(1) % 2), [x.size(1) - 1, 1]):
        parts = [
            run(lstm, part.contiguous(), (h.contiguous(), c.contiguous()))
            for part, h, c in zip(x.split(sizes, 1), *(s.split(sizes, 1) for s in state), strict=True)
        ]
        assert same(whole, [torch.cat(part, 1) for part in zip(*parts, strict=True)])


def cuts(steps, *lengths):
    """Lengths of pieces: the given ones over and over, until all steps are covered."""
    pieces = []
    while sum(pieces) < steps:
        pieces.append(min(lengths[len(pieces) % len(lengths)], steps - sum(pieces)))
    return pieces


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ONE_WAY)
def test_cut_into_calls(name, threads):
    torch.set_num_threads(threads)
    lstm, x, state = make(name)
    whole = run(lstm, x, state)
    for lengths in ((1,), (63, 1, 65), (64,), (7, 127, 2)):
        now, outputs = state, []
        for piece in x.split(cuts(len(x), *lengths)):
            y, *now = run(lstm, piece, tuple(now))
            outputs.append(y)
        assert same(whole, [torch.cat(outputs), *now])


@pytest.mark.parametrize("name", ONE_WAY)
def test_session(tmp_path, name):
    """The torch-free session gives what the layer gives, a step, a call or any pieces at a time."""
    lstm, x, _ = make(name)
    cellstep.export(Chain(lstm, answers="every"), tmp_path / "m.cellstep")
    session = cellstep.runtime.Session(tmp_path / "m.cellstep")
    zero = [torch.zeros_like(part[:, :1]) for part in make(name)[2]]
    expected = run(lstm, x[:, :1].contiguous(), tuple(zero))[0][:, 0]
    rows = x[:, 0].contiguous()
    for lengths in ((len(x),), (1,), (63, 1, 65), (64,)):
        session.reset()
        parts = [torch.from_numpy(session.run(piece.numpy())) for piece in rows.split(cuts(len(x), *lengths))]
        assert same([expected], [torch.cat(parts)])
    session.reset()
    assert same([expected], [torch.stack([torch.from_numpy(session.step(row)) for row in rows.numpy()])])


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, cellstep, test_bits as t
for threads in (1, 2):
    torch.set_num_threads(threads)
    print(cellstep.runtime.instruction_set(), *(t.digest(name, dtype) for name in t.CASES for dtype in t.DTYPES))
"""


def digest(name, dtype):
    lstm, x, state = make(name, dtype)
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in run(lstm, x, state))).hexdigest()


def test_instruction_sets():
    """AVX2 and AVX-512 agree; baseline, which rounds products, does not, which is how this test would fail."""

    def on(instruction_set):
        environment = {**os.environ, "CELLSTEP_CPU": instruction_set}
        command = [sys.executable, "-c", PROGRAM, os.path.dirname(__file__)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        one, two = (line.split() for line in done.stdout.splitlines())
        assert one == two
        return one

    name, *widest = on("avx512")
    if name in ("native", "baseline"):
        pytest.skip("no two instruction sets with fused multiply-add here")
    assert on("avx2") == ["avx2", *widest]
    base, *others = on("baseline")
    assert base == "baseline"
    assert not set(others) & set(widest)
