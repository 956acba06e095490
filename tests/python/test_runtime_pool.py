"""Pools of streams: equal to the bit to as many sessions, and to the operator and the module with a batch of them."""

import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_roads import ROWS, make
from test_session import exported

import cellstep
from cellstep.exporters.deploy import image
from cellstep.exporters.torchscript import packed
from cellstep.nn import LSTM, Chain, Dense, Scale, Skip
from cellstep.runtime import ModelError, Pool, Session

FORWARD_ROWS = [row for row in ROWS if row not in ("lengths", "reset", "bidirectional", "all of them at once")]


def steps_and_flags(streams, steps, inputs, seed=0):
    random = np.random.default_rng(seed)
    x = random.standard_normal((steps, streams, inputs)).astype(np.float32)
    return x, random.random((steps, streams)) < 0.2


def by_sessions(model, x, reset):
    """(steps, streams, output_size), and the states at the end: each stream in a session of its own."""
    sessions = [Session(model) for _ in range(x.shape[1])]
    y = np.stack([session.run(x[:, at], reset[:, at]) for at, session in enumerate(sessions)], axis=1)
    return y, [session.state for session in sessions]


def assert_equal_to_sessions(pool, x, reset):
    expected, states = by_sessions(pool.model, x, reset)
    for step in range(len(x)):
        # Without a mask where nothing is reset, which is another way through the kernels.
        y = pool.step(x[step], reset[step] if reset[step].any() else None)
        assert y.dtype == np.float32 and np.array_equal(y, expected[step]), step
    for stream, state in enumerate(states):
        assert all(map(np.array_equal, pool.state(stream), state)), stream


@pytest.mark.parametrize("streams", [1, 2, 5, 6, 33])
@pytest.mark.parametrize("row", FORWARD_ROWS)
def test_a_pool_is_as_many_sessions(row, streams, tmp_path):
    pool = Pool(exported(make(row), tmp_path), streams)
    x, reset = steps_and_flags(streams, 20, pool.input_size)
    assert_equal_to_sessions(pool, x, reset)


@pytest.mark.parametrize("weights", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("row", ["plain", "proj_size", "layer_norm", "a chain with all stages"])
def test_a_pool_with_narrow_weights(row, weights, tmp_path):
    pool = Pool(exported(cellstep.quantize(make(row), weights), tmp_path), 7)
    assert_equal_to_sessions(pool, *steps_and_flags(7, 20, pool.input_size))


@st.composite
def chains(draw):
    """A model that runs forwards, of any sizes and options."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    inputs, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    stages = [Scale(torch.randn(inputs), 0.1 + torch.rand(inputs))] if draw(st.booleans()) else []
    stages.append(Dense(inputs, width, draw(st.sampled_from(["linear", "relu", "tanh"]))))
    for _ in range(draw(st.integers(1, 3))):
        hidden = draw(st.integers(1, 40))
        options = {name: draw(st.booleans()) for name in ("peephole", "layer_norm", "coupled", "learn_initial_state")}
        projected = draw(st.integers(0, hidden - 1)) if not options["layer_norm"] else 0
        lstm = LSTM(width, hidden, draw(st.integers(1, 2)), proj_size=projected, **options)
        for parameter in lstm.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        stages.append(lstm)
        width = projected or hidden
    outputs = draw(st.integers(1, 5))
    stages.append(Dense(width, outputs, draw(st.sampled_from(["linear", "softmax"]))))
    if draw(st.booleans()):
        stages.append(Skip(draw(st.lists(st.integers(0, inputs - 1), min_size=outputs, max_size=outputs))))
    return Chain(*stages, answers=draw(st.sampled_from(["every", "last", "hidden"]))).eval()


@settings(max_examples=40, deadline=None)
@given(chains(), st.integers(1, 20), st.integers(1, 3), st.integers(0, 2**16))
def test_any_model_in_a_pool_is_sessions_operator_and_module(model, streams, threads, seed):
    pool = Pool(image(model), streams, threads)
    steps = 6
    x, reset = steps_and_flags(streams, steps, pool.input_size, seed)
    expected, _ = by_sessions(pool.model, x, reset)
    got = np.stack([pool.step(x[step], reset[step]) for step in range(steps)])
    assert np.array_equal(got, expected)

    # The contract of the operator: a batch is as many streams, its state given and returned, one step or many.
    program, whole = packed(model), torch.from_numpy(x).transpose(0, 1).contiguous()
    flags = torch.from_numpy(reset).T.contiguous()
    state = program.initial_state(streams)
    with torch.no_grad():
        y, _ = program.run(whole, state, flags)
        assert np.array_equal(y.transpose(0, 1).numpy(), expected)
        for step in range(steps):
            y, state = program.run(whole[:, step : step + 1], state, flags[:, step : step + 1])
            assert np.array_equal(y[:, 0].numpy(), expected[step])
        for stream in range(streams):
            h, c = pool.state(stream)
            assert np.array_equal(state[0][:, stream].numpy(), h) and np.array_equal(state[1][:, stream].numpy(), c)
        # The module itself, whose reset runs layer by layer: other kernels, so to rounding.
        y, _ = model.run(whole, model.initial_state(streams), flags)
        np.testing.assert_allclose(y.transpose(0, 1).numpy(), expected, rtol=2e-5, atol=2e-5)


def test_threads_change_no_bit_of_a_pool(tmp_path):
    torch.manual_seed(0)
    many = exported(Chain(LSTM(4, 50, 2), Dense(50, 2), answers="every").eval(), tmp_path)
    x, reset = steps_and_flags(256, 5, 4)
    alone = Pool(many, 256)
    for threads in (2, 3):
        pool = Pool(many, 256, threads)
        alone.reset()
        for step in range(len(x)):
            assert np.array_equal(pool.step(x[step], reset[step]), alone.step(x[step], reset[step]))


def test_states_travel_between_pools_and_sessions(artifacts, series):
    pool, session = Pool(artifacts[".cellstep"], 3), Session(artifacts[".cellstep"])
    session.run(series)
    pool.set_state(1, session.state)
    y = pool.step(np.tile(series[0], (3, 1)))
    assert np.array_equal(y[1], session.step(series[0]))
    assert np.array_equal(y[0], y[2]) and not np.array_equal(y[0], y[1])
    session.state = pool.state(2)
    assert np.array_equal(pool.step(np.tile(series[1], (3, 1)))[2], session.step(series[1]))
    pool.reset()
    assert all((part == 0).all() for stream in range(3) for part in pool.state(stream))


def test_a_pool_says_what_it_wanted(artifacts, series, tmp_path):
    pool = Pool(artifacts[".cellstep"], 3)
    x = np.zeros((3, 10), np.float32)
    for wrong in (x[:2], x[:, :9], x[0], x[None]):
        with pytest.raises(ValueError, match=r"expected x of shape \(3, 10\), got \("):
            pool.step(wrong)
    for wrong in ([True], np.zeros((3, 1), bool), "yes"):
        with pytest.raises(ValueError, match="expected reset with one flag for each of the 3 streams"):
            pool.step(x, wrong)
    for wrong in (-1, 3):
        with pytest.raises(IndexError, match=f"expected a stream from 0 to 2, got {wrong}"):
            pool.state(wrong)
        with pytest.raises(IndexError, match=f"expected a stream from 0 to 2, got {wrong}"):
            pool.set_state(wrong, pool.state(0))
    h, c = pool.state(0)
    with pytest.raises(ValueError, match=r"expected c of shape \(2, 50\), got \(1, 50\)"):
        pool.set_state(0, (h, c[:1]))
    for streams in (0, -1, 2**24 + 1):
        with pytest.raises(ValueError, match=f"expected streams from 1 to 16777216, got {streams}"):
            Pool(artifacts[".cellstep"], streams)
    with pytest.raises(ValueError, match="expected threads from 1 to 1024, got 0"):
        Pool(artifacts[".cellstep"], 2, 0)
    with pytest.raises(ValueError, match="a bidirectional model answers whole sequences and not step by step"):
        Pool(exported(make("bidirectional"), tmp_path), 2)
    with pytest.raises(ModelError):
        Pool(b"CELLSTEP", 2)


def test_a_pool_is_one_thread_s_at_a_time(tmp_path):
    torch.manual_seed(0)
    streams = 2000
    pool = Pool(exported(Chain(LSTM(64, 128), answers="every").eval(), tmp_path), streams)
    x = np.zeros((streams, 64), np.float32)
    stop, told = threading.Event(), []

    def other():
        while not stop.is_set():
            try:
                pool.step(x)
            except RuntimeError as error:
                told.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    try:
        for _ in range(1000):
            try:
                pool.step(x)
            except RuntimeError as error:
                told.append(str(error))
            if told:
                break
    finally:
        stop.set()
        thread.join()
    assert told and "this pool is in a call on another thread" in told[0]
    pool.step(x)  # and goes on


def test_pools_of_one_model_run_at_once(artifacts):
    """As many threads as there are processors and more, each with a pool; the model is shared."""
    model = Session(artifacts[".cellstep"]).model
    x, reset = steps_and_flags(9, 50, 10)
    expected, _ = by_sessions(model, x, reset)
    answers = [None] * (2 + (os.cpu_count() or 1))

    def run(place):
        pool = Pool(model, 9)
        answers[place] = np.stack([pool.step(x[step], reset[step]) for step in range(len(x))])

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(answers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(answer, expected) for answer in answers)
