"""The CUDA operators against float64 from the formula: all sizes on the device, small ones on the emulation."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import (
    KERNELS,
    Problem,
    Target,
    backward,
    find_target,
    forced,
    forward,
    has,
    may_refuse,
    poison,
    small,
    takes,
    wrong,
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
#: Kernels whose weights lie over several blocks, and sizes about where each form and type of them ends.
SHARED = [kernel for kernel in KERNELS if kernel.startswith("cluster")]
UNITS = [256, 384, 512, 620, 768, 832, 1000, 1024, 1536, 1790, 2048]
#: Names by which scripts/cuda_check.py runs the tests of one kernel apart from the others.
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel or "chosen")


@pytest.fixture(scope="module", params=["emulated", "cuda"])
def target(request: pytest.FixtureRequest) -> Target:
    if request.param == "emulated" and not os.environ.get("CELLSTEP_EMULATED_LIBRARY"):
        request.getfixturevalue("emulated")  # builds it
    found = find_target(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    if not has(found, "lstm_layers"):
        assert found.emulated, "the CUDA library has no lstm_layers"
        pytest.skip("the emulation was built without lstm_layers")
    return found


@pytest.fixture
def device(target: Target) -> Target:
    if target.emulated:
        pytest.skip("needs a CUDA device")
    return target


def check(target: Target, kernel: str, sizes: tuple[int, ...], dtype: torch.dtype, **options: Any) -> None:
    gradients = options.pop("gradients", True)
    if not takes(kernel, dtype, sizes[3], sizes[5]):
        pytest.skip(f"{kernel} is not for H = {sizes[3]} in {dtype} in {sizes[5]} directions")
    problem = Problem(sizes, dtype, target.device, **options)  # type: ignore[arg-type]
    with forced(kernel):
        assert not wrong(target, problem, gradients)


def wrong_or_refused(target: Target, problem: Problem) -> list[str]:
    try:
        return wrong(target, problem, True)
    except RuntimeError as error:
        if may_refuse(problem, error):
            return []
        raise


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@each_kernel
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 1, 1), (5, 3, 2, 7, 2, 1), (4, 2, 3, 33, 1, 2), (3, 17, 5, 50, 2, 1), (2, 9, 4, 16, 3, 2)]
)
def test_sizes(target: Target, kernel: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    check(target, kernel, sizes, dtype)


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {"lengths": True},
        {"reset": True},
        {"lengths": True, "reset": True},
        {"packed": True},
        {"biased": False},
        {"biased": False, "packed": True},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("directions", [1, 2])
def test_ragged(target: Target, kernel: str, dtype: torch.dtype, options: dict[str, bool], directions: int) -> None:
    check(target, kernel, (7, 5, 3, 13, 2, directions), dtype, **options)


@each_kernel
def test_nothing_in_the_batch(target: Target, kernel: str) -> None:
    """No rows: empty answers, and weight gradients of zero."""
    problem = Problem((3, 0, 2, 5, 2, 1), torch.float32, target.device)
    with forced(kernel):
        outputs = forward(target, problem, True)
        gradients = backward(target, problem, outputs)
    assert outputs[0].shape == (3, 0, 5) and outputs[1].shape == (2, 0, 5)
    assert all(float(gradient.abs().sum()) == 0 for gradient in gradients)


@each_kernel
def test_strides(target: Target, kernel: str) -> None:
    """What a batch-first caller hands over, and rows of a wider array: the answer of a copy."""
    dtype = torch.float16 if kernel in ("tensor", "cluster") else torch.float32
    problem = Problem((6, 4, 3, 11, 1, 1), dtype, target.device)
    x, *rest = problem.arguments(False)
    wide = torch.full((4, 6, 8), float("nan"), dtype=dtype, device=target.device)
    wide[:, :, 2:5] = x.transpose(0, 1)
    with forced(kernel):
        expected = target.ops.lstm_layers(x, *rest)
        poison(target)
        found = target.ops.lstm_layers(wide[:, :, 2:5].transpose(0, 1), *rest)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("units", [50, 512, 1024])
def test_bits(target: Target, kernel: str, dtype: torch.dtype, units: int) -> None:
    """The same bits on every run. What differs is counted on the device: to look at it each time would wait for it."""
    if not takes(kernel, dtype, units) or (units > 50 and kernel not in SHARED):
        pytest.skip(f"{kernel} is not for H = {units} in {dtype}")
    sizes = (4, 5, 3, small(units), 2, 1) if target.emulated else (40 if units == 50 else 12, 37, 10, units, 2, 1)
    problem = Problem(sizes, dtype, target.device, lengths=True, made_on=target.device)
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    with forced(kernel):
        run = run_both(target, problem)
        first = run()
        differ = torch.zeros((), dtype=torch.int64, device=target.device)
        for _ in range(3 if target.emulated else 1000):
            for a, b in zip(first, run(), strict=True):
                differ += (a.view(bits) != b.view(bits)).sum()
    assert int(differ) == 0


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kernel", SHARED)
def test_shared_weights(target: Target, kernel: str, dtype: torch.dtype, units: int) -> None:
    """One row and many, both directions, ragged rows, where no block holds a layer."""
    if not takes(kernel, dtype, units):
        pytest.skip(f"{kernel} is not for H = {units} in {dtype}")
    if target.emulated and units not in UNITS[::5]:
        pytest.skip("a few sizes in place of those for the device are enough")
    many = 9 if target.emulated else 150
    here = small(units) if target.emulated else units
    for steps, rows, directions, options in (
        (7, 1, 1, {}),
        (5, 3, 2, {"lengths": True, "reset": True}),
        (5, 7, 1, {"packed": True}),
        (3, many, 2, {"packed": True}),
        (3, many, 1, {"lengths": True}),
    ):
        sizes = (steps, rows, 6, here, 1, directions)
        problem = Problem(sizes, dtype, target.device, seed=rows, made_on=target.device, **options)
        with forced(kernel):
            assert not wrong(target, problem, True), (sizes, options)


@pytest.mark.parametrize("units", [*range(1, 300, 13), 31, 32, 63, 64, 65, 127, 128, 155, 219, 220, 256, 299, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@each_kernel
def test_every_hidden_size(device: Target, kernel: str, units: int, dtype: torch.dtype) -> None:
    if not takes(kernel, dtype, units):
        pytest.skip(f"{kernel} is not for H = {units} in {dtype}")
    with forced(kernel):
        assert not wrong_or_refused(device, Problem((6, 11, 5, units, 2, 1), dtype, device.device, seed=units))


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 65536, 2, 8, 2, 1),
        (2, 4099, 3, 24, 1, 2),
        (10000, 1, 3, 20, 1, 1),
        (10000, 2, 3, 100, 1, 1),
        (100, 64, 64, 128, 2, 1),
        (5, 300, 129, 300, 1, 2),
        (3, 2, 1000, 17, 1, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", [""], ids=["chosen"])
def test_large(device: Target, kernel: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    # The graph of 10,000 steps is the processor's work of minutes; a hundred times the steps show what is lost in one.
    check(device, kernel, sizes, dtype, gradients=sizes[0] < 1000)


def run_problem(target: Target, problem: Problem) -> Callable[[], list[torch.Tensor]]:
    arguments = problem.arguments(False)
    return lambda: list(target.ops.lstm_layers(*arguments))


def run_both(target: Target, problem: Problem) -> Callable[[], list[torch.Tensor]]:
    """Forward and backward, with arguments that are there before."""
    x, batch_sizes, lengths, reset, h, c, _, _, weights, biased, bidirectional, _ = problem.arguments(True)
    grads = [grad.to(target.device) for grad in (problem.pack(problem.grad_y), problem.grad_h, problem.grad_c)]
    batch = (x, batch_sizes, lengths, reset, h, c)

    def run() -> list[torch.Tensor]:
        outputs = target.ops.lstm_layers(*batch, None, None, weights, biased, bidirectional, True)
        *gradients, of_weights = target.ops.lstm_layers_backward(
            *(*grads, None, *batch, weights, biased, bidirectional, outputs[0], *outputs[3:], True)
        )
        return [*outputs, *gradients, *of_weights]

    return run


@each_kernel
def test_two_streams(device: Target, kernel: str) -> None:
    """Two calls at once answer what each answers alone."""
    dtype = torch.float32 if takes(kernel, torch.float32, 50) else torch.float16
    problems = [Problem((200, 33, 10, 50, 2, 1), dtype, device.device, seed=seed) for seed in (1, 2)]
    with forced(kernel):
        calls = [run_problem(device, problem) for problem in problems]
        alone = [call() for call in calls]
        streams = [torch.cuda.Stream() for _ in calls]
        torch.cuda.synchronize()
        together: list[list[list[torch.Tensor]]] = [[], []]
        for _ in range(20):
            for call, stream, found in zip(calls, streams, together, strict=True):
                with torch.cuda.stream(stream):
                    found.append(call())
        torch.cuda.synchronize()
    for expected, found in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for answers in found for a, b in zip(expected, answers, strict=True))


@each_kernel
def test_graph(device: Target, kernel: str) -> None:
    """A captured call, replayed on other input, gives the bits of an eager one, forwards and backwards."""
    dtype = torch.float32 if takes(kernel, torch.float32, 50) else torch.float16
    problem, other = (Problem((20, 9, 10, 50, 2, 1), dtype, device.device, seed=seed) for seed in (1, 2))
    problem.x, problem.h = problem.x.to(device.device), problem.h.to(device.device)  # what the graph reads
    call = run_both(device, problem)
    with forced(kernel):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()
        problem.x.copy_(other.x)
        problem.h.copy_(other.h)
        for answer in found:
            if answer.is_floating_point():
                answer.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        expected = call()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
