"""Layers with options, heads and whole models as CUDA runs them, against torch's operators in float64 and against the
CPU's engine on the same file."""

import copy
import itertools
import random
from functools import partial

import pytest
import torch

from cellstep import formula
from cellstep.exporters import deploy, weights
from cellstep.exporters.records import words
from cellstep.nn import LSTM, Chain, Dense, Scale, Skip, Unscale

# Both sides round sums of some tens of products in orders of their own, 1e-7 a step, and a range of a few hundred
# steps at most amplifies it little: 2e-6 of the range is what torch's own operators keep in float32.
RANGE = 2e-6
CLOSE = {torch.float32: RANGE, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(CLOSE)
#: Of float32 layers that normalise, both sides rounding: values that lie close together are divided by as little as
#: sqrt(1e-5), which makes an error 316 times as large. The CPU's own answers are up to 1.6e-5 from those in float64.
NORMALISED = 2e-5


@pytest.fixture
def ops(emulated):
    return emulated


def assert_near(found, expected, tolerance, name=""):
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    expected = expected.double()
    largest = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        found.double(), expected, rtol=0.0, atol=tolerance * largest, msg=lambda m: f"{name}: {m}"
    )


# ---- lstm_variant

PARAMETERS = [
    *("x", "h", "c", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "weight_peephole", "norm_ih"),
    *("norm_hh", "norm_c", "norm_c_bias", "reset", "initial_h", "initial_c", "mask_h", "mask_g", "keep_h", "keep_c"),
]
SWITCHES = ["bias", "projection", "peephole", "norm", "coupled", "clip", "zoneout", "keep", "masks", "reset", "initial"]


def variant(seed, dtype, options, sizes=(5, 3, 4, 7), activations=(2, 3, 3)):
    """Arguments of a layer, as values of `dtype` in float64, and its options."""
    steps, batch, inputs, units = sizes
    generator = torch.Generator().manual_seed(seed)
    recurrent = max(1, units - 3) if "projection" in options else units
    rows = (3 if "coupled" in options else 4) * units

    def made(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(0.6).to(dtype).double()

    def mask(*shape):
        return (torch.rand(*shape, generator=generator) < 0.7).double()

    given = {
        "x": made(steps, batch, inputs),
        "h": made(batch, recurrent),
        "c": made(batch, units),
        "weight_ih": made(rows, inputs),
        "weight_hh": made(rows, recurrent),
    }
    if "bias" in options:
        given |= {"bias_ih": made(rows), "bias_hh": made(rows)}
    if "projection" in options:
        given["weight_hr"] = made(recurrent, units)
    if "peephole" in options:
        given["weight_peephole"] = made(rows - units)
    if "norm" in options:
        given |= {"norm_ih": made(rows), "norm_hh": made(rows), "norm_c": made(units), "norm_c_bias": made(units)}
    if "masks" in options:
        given |= {"mask_h": mask(batch, recurrent) / 0.75, "mask_g": mask(batch, units) / 0.75}
        given |= {name: given[name].to(dtype).double() for name in ("mask_h", "mask_g")}
    if "keep" in options:
        given |= {"keep_h": mask(steps, batch, recurrent), "keep_c": mask(steps, batch, units)}
    if "reset" in options:
        given["reset"] = torch.rand(steps, batch, generator=generator) < 0.3
    if "initial" in options:
        given |= {"initial_h": made(recurrent), "initial_c": made(units)}
    clip = 0.5 if "clip" in options else 0.0
    zoneout = (0.2, 0.4) if "zoneout" in options else (0.0, 0.0)
    return [given.get(name) for name in PARAMETERS], ["coupled" in options, clip, *zoneout, *activations]


def check_variant(ops, dtype, tensors, options):
    expected = formula.lstm_steps(*tensors, *options)
    cast = [t if t is None or t.dtype == torch.bool else t.to(dtype) for t in tensors]
    before = [None if t is None else t.clone() for t in cast]
    found = ops.lstm_variant(*cast, *options, True)
    for name, a, b in zip(("y", "h", "c", "cells"), found, expected, strict=True):
        assert a.dtype == dtype
        assert_near(a, b, CLOSE[dtype], name)
    for a, b in zip(cast, before, strict=True):
        assert a is b is None or torch.equal(a, b)
    *again, none = ops.lstm_variant(*cast, *options, False)
    assert none.shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ["", *SWITCHES])
def test_each_option(ops, option, dtype):
    check_variant(ops, dtype, *variant(1, dtype, {option, "bias"}))


@pytest.mark.parametrize("seed", range(40))
def test_options_together(ops, seed):
    choose = random.Random(seed)
    options = {option for option in SWITCHES if choose.random() < 0.5}
    sizes = choose.choice([(5, 3, 4, 7), (1, 1, 1, 1), (3, 2, 5, 130), (4, 33, 3, 4), (9, 1, 8, 16)])
    activations = [choose.randrange(7) for _ in range(3)]
    check_variant(ops, torch.float64, *variant(seed, torch.float64, options, sizes, activations))


@pytest.mark.parametrize("without", [{"keep"}, {"keep", "projection"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_over_many_steps(ops, dtype, without):
    options = set(SWITCHES) - without
    check_variant(ops, dtype, *variant(3, dtype, options, (60, 3, 4, 7)))


@pytest.mark.parametrize("kernel", ["", "plain"])
@pytest.mark.parametrize(
    "without", [{"keep", "projection"}, {"zoneout", "projection", "coupled"}, {"norm", "projection"}]
)
def test_one_launch_and_step_by_step(ops, kernel, without, monkeypatch):
    monkeypatch.setenv("CELLSTEP_CUDA_KERNEL", kernel)
    check_variant(ops, torch.float32, *variant(7, torch.float32, set(SWITCHES) - without, (7, 5, 4, 37)))


def test_variant_takes_any_strides(ops):
    tensors, options = variant(4, torch.float64, set(SWITCHES))
    expected = ops.lstm_variant(*tensors, *options, True)
    strided = [
        None if t is None else torch.stack([t, torch.ones_like(t)], -1)[..., 0] if t.dim() < 2 else t.mT.contiguous().mT
        for t in tensors
    ]
    found = ops.lstm_variant(*strided, *options, True)
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b, 1e-14)


def test_variant_without_rows(ops):
    tensors, options = variant(5, torch.float32, {"projection", "norm", "reset"}, (4, 0, 3, 5))
    cast = [t if t is None or t.dtype == torch.bool else t.float() for t in tensors]
    y, h, c, cells = ops.lstm_variant(*cast, *options, True)
    assert y.shape == (4, 0, 2) and h.shape == (0, 2) and c.shape == (0, 5) and cells.shape == (4, 0, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(0, 3, 4)}, "at least one step"),
        ({"h": torch.zeros(3, 8)}, "7 values, or fewer"),
        ({"c": torch.zeros(2, 7)}, "expected c of shape"),
        ({"weight_hh": torch.zeros(28, 6)}, "expected weight_hh of shape"),
        ({"weight_ih": torch.zeros(28, 4, dtype=torch.float64)}, "weight_ih of float32"),
        ({"norm_c": torch.zeros(7)}, "together, or none"),
        ({"reset": torch.zeros(5, 3)}, "as bool"),
        ({"x": torch.zeros(5, 3, 4, dtype=torch.int32)}, "expected x of float32"),
        ({"activation": 7}, "activations below 7"),
    ],
)
def test_variant_refuses(ops, change, message):
    tensors, options = variant(6, torch.float32, {"bias"})
    cast = [None if t is None else t.float() for t in tensors]
    for name, value in change.items():
        if name == "activation":
            options[-1] = value
        else:
            cast[PARAMETERS.index(name)] = value
    with pytest.raises(RuntimeError, match=message) as error:
        ops.lstm_variant(*cast, *options, False)
    assert "\n" not in str(error.value).strip()


# ---- dense and activate


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 5), (5,), (2, 3, 5), (0, 5), (4, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_dense(ops, dtype, shape, bias):
    torch.manual_seed(0)
    x = torch.randn(*shape).to(dtype)
    weight = torch.randn(9, shape[-1]).to(dtype)
    shift = torch.randn(9).to(dtype) if bias else None
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if shift is None else shift.double())
    assert_near(ops.dense(x, weight, shift), expected, CLOSE[dtype])
    assert_near(ops.dense(x, weight.t().contiguous().t(), shift), expected, CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", range(8))
@pytest.mark.parametrize("shape", [(3, 5), (1,), (2, 3, 257), (300, 1), (0, 4), (4, 0)])
def test_activate(ops, dtype, activation, shape):
    torch.manual_seed(0)
    x = (4 * torch.randn(*shape)).to(dtype)
    expected = formula.activate(x.double(), activation)
    found = ops.activate(x, activation)
    assert found.dtype == dtype
    assert_near(found, expected, CLOSE[dtype])
    assert torch.equal(ops.activate(x, activation), found)
    assert_near(ops.activate(x.unsqueeze(-1).expand(*shape, 2)[..., 0], activation), expected, CLOSE[dtype])


@pytest.mark.parametrize("activation", range(8))
def test_activate_at_the_edges(ops, activation):
    x = torch.tensor([[-1e4, -90.0, -1e-30, -0.0, 1e-30, 90.0, 1e4], [float("nan"), 1, 2, 3, 4, 5, 6]])
    expected = formula.activate(x.double(), activation)
    torch.testing.assert_close(ops.activate(x, activation).double(), expected, rtol=0, atol=3e-7, equal_nan=True)


def test_heads_refuse(ops):
    with pytest.raises(RuntimeError, match="below 8, got 8"):
        ops.activate(torch.zeros(2), 8)
    with pytest.raises(RuntimeError, match="got a scalar"):
        ops.activate(torch.tensor(1.0), 1)
    with pytest.raises(RuntimeError, match="expected weight of shape"):
        ops.dense(torch.zeros(2, 3), torch.zeros(4, 2), None)
    with pytest.raises(RuntimeError, match="expected bias of shape"):
        ops.dense(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3))


# ---- run_records


def scales(size):
    ramp = torch.arange(size, dtype=torch.float32)
    return 3 * ramp - 1, 1 / (1 + 0.5 * ramp)


CHAINS = {
    "forecaster": lambda: [Scale(*scales(5)), LSTM(5, 10, 2), Dense(10, 2), Unscale(*scales(2))],
    "bare": lambda: [LSTM(3, 16)],
    "two ways": lambda: [LSTM(4, 7, 2, bidirectional=True), Dense(14, 3, "softmax")],
    "encoder": lambda: [Scale(*scales(3)), Dense(3, 6, "relu"), Dense(6, 5, "tanh"), LSTM(5, 20), Dense(20, 1)],
    "heads": lambda: [LSTM(4, 6), Dense(6, 200, "elu"), Dense(200, 9, "softmax"), Unscale(*scales(9))],
    "skip": lambda: [Scale(*scales(4)), LSTM(4, 9), Dense(9, 2), Unscale(*scales(2)), Skip([3, 1])],
    "sizes": lambda: [LSTM(3, 8, 2), LSTM(8, 5, bidirectional=True), LSTM(10, 5, bidirectional=True), Dense(10, 2)],
    "residual": lambda: [LSTM(6, 6, 3, residual=True), Dense(6, 1)],
    "residual between": lambda: [LSTM(4, 6, 2), LSTM(6, 6, residual=True), LSTM(6, 6), Dense(6, 1)],
    "projection": lambda: [LSTM(3, 9, 2, proj_size=4, bidirectional=True), Dense(8, 2)],
    "peephole": lambda: [LSTM(3, 8), LSTM(8, 8, peephole=True, coupled=True), LSTM(8, 8), Dense(8, 1)],
    "norm": lambda: [LSTM(3, 7, 2, layer_norm=True, coupled=True, bidirectional=True, proj_size=3)],
    "keras": lambda: [LSTM(3, 7, gate_activation="hard_sigmoid", activation="elu", output_activation="relu")],
    "clip": lambda: [LSTM(3, 7, 2, cell_clip=0.2), Dense(7, 1)],
    "zoneout": lambda: [LSTM(3, 7, zoneout=(0.1, 0.3), bidirectional=True), Dense(14, 1)],
    "learned": lambda: [LSTM(3, 7, 2, learn_initial_state=True), LSTM(7, 7), Dense(7, 1)],
    "learned sizes": lambda: [
        LSTM(3, 4, learn_initial_state=True),
        LSTM(4, 6, learn_initial_state=True, peephole=True),
    ],
    "cells": lambda: [LSTM(3, 5, return_cell_states=True, bidirectional=True), LSTM(20, 5), Dense(5, 1)],
    "cells last": lambda: [LSTM(4, 6), LSTM(6, 6, residual=True, return_cell_states=True), Dense(12, 2)],
    "deep": lambda: [LSTM(3, 4, 20), Dense(4, 1)],
}
BOTH_WAYS = [name for name, make in CHAINS.items() if any(s.bidirectional for s in make() if isinstance(s, LSTM))]


def make_chain(name, dtype=torch.float32, answers="last"):
    torch.manual_seed(sorted(CHAINS).index(name))
    chain = Chain(*CHAINS[name](), answers=answers)
    with torch.no_grad():
        for key, parameter in chain.named_parameters():
            if "initial" in key or "norm" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return chain.to(dtype).eval()


def file_of(chain, **options):
    data = deploy.image(chain, test_vector=False, **options)
    return words(data), torch.frombuffer(bytearray(data), dtype=torch.uint8)


def steps_of(chain, batch=3, steps=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, steps, chain.input_size, generator=generator, dtype=torch.float64)
    return (chain.input_offset + noise / chain.input_scale).to(chain.dtype).detach()


def state_of(chain, batch=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((chain.state_layers, batch, size) for size in (chain.h_size, chain.c_size))
    return [0.5 * torch.randn(*size, generator=generator, dtype=torch.float64).to(chain.dtype) for size in sizes]


def check_run(ops, chain, x, h, c, answers=0, lengths=None, reset=None, tolerance=None, **options):
    records, image = file_of(chain, **options)
    arguments = (x, h, c, chain.output_size, answers, lengths, reset)
    expected = torch.ops.cellstep.run_model(image, *arguments)
    found = ops.run_records(records, image, *arguments)
    for name, a, b in zip("yhc", found, expected, strict=True):
        assert_near(a, b, tolerance or CLOSE[x.dtype], name)
    assert all(torch.equal(a, b) for a, b in zip(ops.run_records(records, image, *arguments), found, strict=True))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CHAINS)
def test_model(ops, name, dtype):
    chain = make_chain(name, dtype)
    x, (h, c) = steps_of(chain), state_of(chain)
    check = partial(check_run, ops, chain, tolerance=NORMALISED if (name, dtype) == ("norm", torch.float32) else None)
    for answers in range(3):
        check(x, h, c, answers)
        check(x, None, None, answers)
    check(x[:, 0], h, c)
    check(x[:0], h[:, :0], c[:, :0])
    check(x[:1, :1].transpose(0, 1), h[:, :1], c[:, :1], 1)
    check(x.transpose(0, 1).contiguous().transpose(0, 1), h, c)
    check(torch.stack([x, x], -1)[..., 0], h.mT.contiguous().mT, c)


@pytest.mark.parametrize("name", [name for name in CHAINS if name != "deep"])  # which would take a minute
def test_lengths_and_resets(ops, name):
    chain = make_chain(name)
    x, (h, c) = steps_of(chain, 5), state_of(chain, 5)
    lengths = torch.tensor([3, 6, 0, 1, 6])
    reset = torch.rand(5, 6, generator=torch.Generator().manual_seed(3)) < 0.3
    for row, length in enumerate(lengths.tolist()):  # what is past a row's end is not to be seen
        x[row, length:] = float("nan")
    for answers, ends, flags in itertools.product(range(3), (None, lengths), (None, reset, reset.t().contiguous().t())):
        seen = torch.nan_to_num(x) if ends is None else x
        for state in ((h, c), (None, None)):
            check_run(ops, chain, seen, *state, answers, ends, flags, NORMALISED if name == "norm" else None)


@pytest.mark.parametrize("name", [name for name in CHAINS if name not in BOTH_WAYS])
def test_a_stream_may_be_cut_anywhere(ops, name):
    chain = make_chain(name)
    records, image = file_of(chain)
    x, (h, c) = steps_of(chain, 2, 9), state_of(chain, 2)
    whole = ops.run_records(records, image, x, h, c, chain.output_size, 0, None, None)
    for cuts in ([1] * 9, [2, 7], [4, 1, 4]):
        at, state, outputs = 0, (h, c), []
        for count in cuts:
            part = x[:, at] if count == 1 else x[:, at : at + count]
            y, *state = ops.run_records(records, image, part, *state, chain.output_size, 0, None, None)
            outputs.append(y.reshape(2, count, -1))
            at += count
        for a, b in zip((torch.cat(outputs, 1), *state), whole, strict=True):
            assert_near(a, b, RANGE)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["forecaster", "two ways", "norm", "sizes"])
def test_narrow_weights(ops, name, stored):
    chain = make_chain(name)
    x, (h, c) = steps_of(chain), state_of(chain)
    check_run(ops, chain, x, h, c, weights=stored)


@pytest.mark.parametrize("hidden", [4, 12, 13, 16, 17, 21, 29, 33])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
def test_every_tail_of_panels(ops, hidden, stored):
    """int8 weights are widened, so the CPU's engine runs what they stand for as float32."""
    torch.manual_seed(hidden)
    chain = Chain(LSTM(5, hidden, bidirectional=True), Dense(2 * hidden, 1)).eval()
    x, (h, c) = steps_of(chain), state_of(chain)
    if stored != "int8":
        check_run(ops, chain, x, h, c, weights=stored)
        return
    # Two directions share the factors of their inputs.
    factors = torch.rand(5).add(0.5).numpy()
    records, image = file_of(chain, weights="int8", factors=[factors])
    widened = copy.deepcopy(chain)
    for reverse in (False, True):
        p = widened.lstms[0].layer_parameters(0, reverse)
        q = weights._int8(p["weight_ih"].detach().numpy(), p["weight_hh"].detach().numpy(), factors)
        p["weight_ih"].data.copy_(torch.from_numpy(q.q_ih * q.scale_x[:, None] * factors))
        p["weight_hh"].data.copy_(torch.from_numpy(q.q_hh * q.scale_h[:, None]))
    _, plain = file_of(widened)
    expected = torch.ops.cellstep.run_model(plain, x, h, c, 1, 0, None, None)
    found = ops.run_records(records, image, x, h, c, 1, 0, None, None)
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b, RANGE)
    # Rounded inputs cost the engine about 1 in 254 of each product.
    for a, b in zip(found, torch.ops.cellstep.run_model(image, x, h, c, 1, 0, None, None), strict=True):
        assert_near(a, b, 2e-2)


def test_fast_activations_are_exact(ops):
    chain = make_chain("forecaster")
    x, (h, c) = steps_of(chain), state_of(chain)
    found = []
    for fast in (False, True):
        records, image = file_of(chain, fast_activations=fast)
        found.append(ops.run_records(records, image, x, h, c, chain.output_size, 0, None, None))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_lengths_past_the_steps_count_as_all(ops):
    """Nobody on the host has seen them."""
    chain = make_chain("skip")
    records, image = file_of(chain)
    x, (h, c) = steps_of(chain), state_of(chain)
    for answers in range(3):
        wild = torch.tensor([2**40, -5, 6])
        tame = torch.tensor([6, 0, 6])
        found = ops.run_records(records, image, x, h, c, chain.output_size, answers, wild, None)
        expected = ops.run_records(records, image, x, h, c, chain.output_size, answers, tame, None)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_columns_past_the_inputs_are_not_read(ops):
    chain = make_chain("skip")
    records, image = file_of(chain)
    x, (h, c) = steps_of(chain), state_of(chain)
    column = image.numpy().tobytes().rindex((3).to_bytes(4, "little") + (1).to_bytes(4, "little"))
    image[column : column + 4] = 255
    y, _, _ = ops.run_records(records, image, x, h, c, chain.output_size, 0, None, None)
    assert y[..., 0].isnan().all() and y[..., 1].isfinite().all()


@pytest.fixture
def small():
    chain = make_chain("forecaster")
    return [*file_of(chain), steps_of(chain), *state_of(chain), chain.output_size, 0, None, None]


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda records: [], "shorter or longer"),
        (0, lambda records: records[:-1], "words"),
        (0, lambda records: [*records, 0], "words"),
        (0, lambda records: records[:9], "shorter or longer"),
        (0, lambda records: [records[0] + 1, *records[1:]], "begins with CELLSTEP"),
        (0, lambda records: [records[0], records[1] + 1, *records[2:]], "newer than this library"),
        (0, lambda records: [records[0], records[1] - 1, *records[2:]], "older than this library"),
        (0, lambda records: [*records[:2], records[2] + 64, *records[3:]], "shorter or longer"),
        (1, lambda image: image[:-1], "shorter or longer"),
        (1, lambda image: image.float(), "uint8 bytes"),
        (1, lambda image: image.view(2, -1), "uint8 bytes"),
        (1, lambda image: torch.cat([image, image])[4 : 4 + len(image)], "aligned"),
        (2, lambda x: x.double(), "expected x of float32"),
        (2, lambda x: x.half(), "expected x of float32"),
        (2, lambda x: x[:, :, 1:], "expected x of shape"),
        (2, lambda x: x[:, :0], "at least one step"),
        (2, lambda x: x[0, 0], "dimensions"),
        (3, lambda h: None, "h and c, or neither"),
        (3, lambda h: h[:1], "expected h of shape"),
        (4, lambda c: c.double(), "expected c of float32"),
        (5, lambda size: 3, "output_size 2"),
        (6, lambda answers: 3, r"answers 0 \(every\)"),
        (7, lambda lengths: torch.ones(3), "int64"),
        (7, lambda lengths: torch.ones(2, dtype=torch.int64), "3 int64"),
        (8, lambda reset: torch.zeros(3, 6), "as bool"),
        (8, lambda reset: torch.zeros(6, 3, dtype=torch.bool), "expected reset of shape"),
    ],
)
def test_refusals(ops, small, place, change, message):
    small[place] = change(small[place])
    with pytest.raises(RuntimeError, match=message) as error:
        ops.run_records(*small)
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize("name", ["forecaster", "norm", "cells last", "learned sizes"])
def test_broken_records_never_crash(ops, name):
    """Bits and words of the records at random: a refusal, or the numbers of a model that fits the same image."""
    chain = make_chain(name)
    records, image = file_of(chain)
    x, (h, c) = steps_of(chain, 2, 2), state_of(chain, 2)
    choose = random.Random(0)
    refused = 0
    for _ in range(400):
        broken = list(records)
        for _ in range(choose.choice([1, 1, 2, 5])):
            at = choose.randrange(len(broken))
            if choose.random() < 0.6:
                value = broken[at] ^ (1 << choose.randrange(64))
            else:
                value = choose.choice([0, 1, -1, 2**62, choose.getrandbits(64), choose.choice(records)])
            broken[at] = (value + 2**63) % 2**64 - 2**63
        if choose.random() < 0.1:
            broken = broken[: choose.randrange(len(broken))]
        try:
            ops.run_records(broken, image, x, h, c, chain.output_size, 0, None, None)
        except RuntimeError as error:
            assert "\n" not in str(error).strip()
            refused += 1
    assert refused > 200
