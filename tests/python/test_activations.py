"""Sigmoid and tanh of the kernels: every float32 against float64, and float64 against long double.

Errors count in units in the last place of the exact value. The kernels flush denormal numbers, so where the exact value
is one the unit is the smallest normal number: zero is right there, and so is that number.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import cellstep
from cellstep import _runtime
from cellstep.exporters.torchscript import PackedChain
from cellstep.formula import ACTIVATIONS
from cellstep.nn import LSTM, Chain

SIGN = 0x80000000
INFINITY = 0x7F800000  # the bits of float32's; those of NaN lie above
CHUNK = 1 << 18  # stays in cache


def activate(values, kind):
    return torch.ops.cellstep.activate(torch.from_numpy(values), ACTIVATIONS.index(kind)).numpy()


def floats(first, last):
    """All float32 with bits from `first` on, before `last`."""
    return np.arange(first, last, dtype=np.uint32).view(np.float32)


def bits_of(value):
    return int(np.float32(value).view(np.uint32))


def exact(x, kind):
    """In the type of x, which is wider than the one under test."""
    with np.errstate(over="ignore", under="ignore"):
        if kind == "tanh":
            return np.tanh(x)
        e = np.exp(-np.abs(x))
        return np.where(x < 0, e, np.ones_like(e)) / (1 + e)


def ulps(got, truth):
    """Largest error of `got` in its units in the last place."""
    info = np.finfo(got.dtype)
    _, exponent = np.frexp(truth)
    unit = np.ldexp(np.ones_like(truth), np.maximum(exponent - 1, info.minexp) - info.nmant)
    unit[np.abs(truth) < info.smallest_normal] = info.smallest_normal
    return float(np.max(np.abs(got - truth) / unit))


def ulps_from_one(got):
    """The same where the exact value rounds to 1 and the nearest it comes is half a unit."""
    return int(np.max(bits_of(1.0) - got.view(np.int32))) + 0.5


def worst_of(kind, first, last):
    """Largest error over all float32 with bits from `first` on, before `last`, of which none is NaN."""
    worst = 0.0
    for begin in range(first, last, CHUNK):
        x = floats(begin, min(begin + CHUNK, last))
        got = activate(x, kind)
        assert np.abs(got).max() <= 1
        worst = max(worst, ulps(got, exact(x.astype(np.float64), kind)))
    return worst


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_tanh_of_every_float32():
    small, saturated = bits_of(2.0**-13), bits_of(9.02)
    assert worst_of("tanh", small, saturated) <= 2
    for begin in range(0, SIGN, CHUNK):
        x = floats(begin, begin + CHUNK)
        got = activate(x, "tanh")
        negative = activate(-x, "tanh")
        if begin + CHUNK > INFINITY + 1:
            number = ~np.isnan(x)
            assert np.isnan(got[~number]).all() and np.isnan(negative[~number]).all()
            x, got, negative = x[number], got[number], negative[number]
        assert ((got.view(np.uint32) ^ negative.view(np.uint32)) == SIGN).all()
        if not len(x):
            continue
        assert (got <= 1).all()
        if begin >= saturated:  # the exact value is within half a unit of 1
            assert (got.view(np.int32) >= bits_of(1.0) - 1).all()
        elif begin + CHUNK <= small:  # |tanh(x) - x| <= |x|^3 / 3, a tenth of a unit
            distance = got.view(np.int32) - x.view(np.int32)
            if begin < bits_of(2.0**-126):
                distance[got == 0] = 0
            assert np.abs(distance).max() <= 1


def test_sigmoid_of_every_float32():
    half, one = bits_of(2.0**-26), bits_of(17.4)
    assert worst_of("sigmoid", half, one) <= 2
    denormal, nothing = bits_of(-89.0), bits_of(float("-inf")) + 1
    assert worst_of("sigmoid", SIGN + half, denormal) <= 2
    for first, last, value, units in (
        (0, half, 0.5, 1),
        (SIGN, SIGN + half, 0.5, 1),
        (one, INFINITY + 1, 1.0, 1),
        (denormal, nothing, 0.0, bits_of(2.0**-126)),
    ):
        for begin in range(first, last, CHUNK):
            got = activate(floats(begin, min(begin + CHUNK, last)), "sigmoid")
            assert np.abs(got.view(np.int32) - bits_of(value)).max() <= units
            assert got.max() <= 1
    for first in (INFINITY + 1, SIGN + INFINITY + 1):
        for begin in range(first, first + (1 << 23) - 1, CHUNK):
            x = floats(begin, min(begin + CHUNK, first + (1 << 23) - 1))
            assert np.isnan(x).all() and np.isnan(activate(x, "sigmoid")).all()


@pytest.mark.parametrize("kind", ["sigmoid", "tanh"])
def test_float64_is_within_two_and_a_half_units(kind):
    """Against long double. Numerator, denominator and quotient round by half a unit each, of a unit that may double
    from one to the next; not every float64 can be tried, and of these samples tanh comes to 2.1."""
    if np.finfo(np.longdouble).nmant < 63:
        pytest.skip("long double is no wider than double here")
    rng = np.random.default_rng(0)
    spread = np.ldexp(rng.uniform(1, 2, 300_000), rng.integers(-60, 11, 300_000))
    # Sums where 1 + exp(-x) is a tie, where n ln 2 is rounded, and where the exponential leaves the normal numbers.
    edges = np.log(2.0) * np.arange(-1080, 1080, 0.25)
    near = (edges[:, None] + rng.uniform(-1e-3, 1e-3, (1, 50))).ravel()
    x = np.concatenate([spread, -spread, rng.uniform(-40, 40, 300_000), near])
    got = activate(x, kind)
    assert np.abs(got).max() <= 1
    assert ulps(got, exact(x.astype(np.longdouble), kind)) <= 2.5
    infinity, nothing = float("inf"), float("nan")
    special = np.array([0.0, -0.0, infinity, -infinity, 1e308, -1e308, 5e-324, nothing, -nothing])
    expected = {
        "tanh": [0.0, -0.0, 1, -1, 1, -1, 5e-324, nothing, nothing],
        "sigmoid": [0.5, 0.5, 1, 0, 1, 0, 0.5, nothing, nothing],
    }[kind]
    got = activate(special, kind)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got[:2]), np.signbit(expected[:2]))


ELSEWHERE = """
import hashlib, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import torch
import test_activations as t
from cellstep import runtime
torch.set_num_threads(1)
narrow = np.arange(0, 1 << 32, 1021, dtype=np.uint32).view(np.float32)
wide = np.random.default_rng(0).integers(0, 1 << 64, 1 << 20, dtype=np.uint64).view(np.float64)
digest = hashlib.sha256()
worst = {np.float32: 0.0, np.float64: 0.0}
for kind in ("sigmoid", "tanh"):
    for x in (narrow, wide, np.linspace(-50, 50, 1 << 20)):
        number = x[~np.isnan(x)]
        got = t.activate(number, kind)
        assert np.abs(got).max() <= 1
        digest.update(got.tobytes())
        wider = np.float64 if x.dtype == np.float32 else np.longdouble
        worst[x.dtype.type] = max(worst[x.dtype.type], t.ulps(got, t.exact(number.astype(wider), kind)))
for dtype in (np.float32, np.float64):
    for gate in (0, 2):
        digest.update(t.fast_gate(np.linspace(-20, 20, 100_003).astype(dtype), gate).tobytes())
print(runtime.instruction_set(), *worst.values(), digest.hexdigest())
"""


def on(instruction_set):
    environment = {**os.environ, "CELLSTEP_CPU": instruction_set}
    command = [sys.executable, "-c", ELSEWHERE, os.path.dirname(__file__)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, *worst, digest = done.stdout.split()
    return name, *map(float, worst), digest


def test_instruction_sets_agree():
    """To the bit with fused multiply-add; without it the argument's reduction rounds once more, for four units."""
    widest, single, double, digest = on("avx512")
    assert single <= 2
    assert double <= 2.5
    if widest == "native":
        pytest.skip("one instruction set on this architecture")
    name, single, double, _ = on("baseline")
    assert name == "baseline"
    assert max(single, double) <= 4
    if widest == "baseline":
        pytest.skip("this machine has no AVX2")
    name, *_, other = on("avx2")
    assert (name, other) == ("avx2", digest)


# What the fast variant promises, and what float32's roundings of the fit's quotient add.
FAST_TANH = 1.6e-5 + 2e-7
FAST_SIGMOID = 8e-6 + 2e-7


def fast_gate(values, gate):
    """sigmoid (of gate 0, i) or tanh (of gate 2, g) as the fast variant has them, as c of a first step: c is i g.

    The input is the gate's sum; the other gate is saturated, which leaves it a sigmoid's error from 1.
    """
    x = torch.from_numpy(values).reshape(1, -1, 1)
    lstm = LSTM(1, 1, dtype=x.dtype)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.zero_()
        lstm.bias_ih_l0.copy_(torch.tensor([100.0, -100.0, 100.0, 100.0]))
        lstm.bias_ih_l0[gate] = 0
        lstm.weight_ih_l0[gate] = 1
        packed = PackedChain(Chain(lstm, answers="every").eval(), fast_activations=True)
        _, (_, c) = packed.run(x.transpose(0, 1), packed.initial_state(len(values)))
    return c.flatten().numpy()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("kind", "gate"), [("sigmoid", 0), ("tanh", 2)])
def test_fast_variant_is_within_its_error(dtype, kind, gate):
    """Over a million values from -20 to 20 and one float32 in 4093 of all the others; NaN stays NaN."""
    every = np.arange(0, 1 << 32, 4093, dtype=np.uint32).view(np.float32)
    x = np.concatenate([np.linspace(-20, 20, 1 << 20), every[~np.isnan(every)]]).astype(dtype)
    got = fast_gate(x, gate)
    assert np.abs(got).max() <= 1
    if kind == "sigmoid":
        assert got.min() >= 0
    error = np.abs(got - exact(x.astype(np.float64), kind)).max()
    assert 1e-6 < error <= FAST_TANH + FAST_SIGMOID  # more than the exact one has: it was the fast one that ran
    assert np.isnan(fast_gate(np.full(17, np.nan, dtype), gate)).all()


OPTIONS = [
    {},
    {"peephole": True, "coupled": True},
    {"layer_norm": True},
    {"proj_size": 2},
    {"bidirectional": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("hidden", [3, 20, 50])
def test_fast_variant_of_a_layer(tmp_path, options, hidden):
    """Close to the exact one, not equal to it; the same bits for a stream, a sequence and either kind of file."""
    torch.manual_seed(0)
    lstm = LSTM(4, hidden, 2, **options).eval()
    x = torch.randn(40, 5, 4)
    for name in ("m.cellstep", "m.pt"):
        cellstep.export(lstm, tmp_path / name, fast_activations=True)
    loaded = torch.jit.load(str(tmp_path / "m.pt"))
    with torch.no_grad():
        expected = lstm(x)[0].transpose(0, 1)
        fast, _ = loaded.run(x.transpose(0, 1), loaded.initial_state(5))
    error = (fast - expected).abs().max()
    # 1.6e-5 for each of five activations in a cell, over two layers and a memory of some steps; layer normalisation
    # divides the error by a deviation that may be small.
    assert 1e-7 < error < (1e-2 if options.get("layer_norm") else 1e-3)
    session = _runtime.Session(_runtime.Model.from_file(str(tmp_path / "m.cellstep")))
    session.model.selftest()  # raises
    np.testing.assert_array_equal(session.run(x[:, 0].contiguous().numpy()), fast[0].numpy())
    if not options.get("bidirectional"):
        session.reset()
        stream = np.stack([session.step(step) for step in x[:, 0].numpy()])
        np.testing.assert_array_equal(stream, fast[0].numpy())


def test_fast_variant_is_refused_where_there_is_none(tmp_path):
    lstm = LSTM(2, 3)
    with pytest.raises(ValueError, match="expected fast_activations=False"):
        cellstep.export(lstm, tmp_path / "m.pt", standalone=True, fast_activations=True)
    with pytest.raises(ValueError, match="expected fast_activations=False"):
        cellstep.export(
            cellstep.quantize(Chain(lstm, answers="every"), "bfloat16"), tmp_path / "m.cellstep", fast_activations=True
        )
