"""Sequences in pieces of time: the same bits wherever they are cut and in whatever order the streams come on."""

import pytest
import torch
from test_emulated import Case, check

KERNELS = [
    ("block", torch.float32),
    ("block", torch.float16),
    ("tensor", torch.bfloat16),
    ("cluster", torch.float16),
    ("cluster_float", torch.float32),
    ("cluster_float", torch.float16),
]
UNCUT = 1000
ids = pytest.mark.parametrize("kernel, dtype", KERNELS, ids=lambda value: str(value).replace("torch.", ""))


def with_exact_products(case):
    """In a row and in a column of each weight_ih one value that is not zero: torch's products then have the same bits,
    whatever rows they are found with and in whatever order they add."""
    each = 4 if case.biased else 2
    for weight in case.weights[::each]:
        rows = torch.randperm(weight.shape[0], generator=case.generator)[: weight.shape[1]]
        weight.zero_()
        weight[rows, torch.arange(weight.shape[1])] = 0.5
    return case


def run(ops, case):
    """All that a call and its way back answer."""
    case.generator = torch.Generator().manual_seed(7)
    arguments = case.arguments()
    state = case.h, case.c, case.initial_h, case.initial_c
    found = ops.lstm_layers(*arguments, *state, case.weights, case.biased, case.directions == 2, True)
    unsaved = ops.lstm_layers(*arguments, *state, case.weights, case.biased, case.directions == 2, False)
    grads = [case.values(*tensor.shape) for tensor in (*found[:3], found[5][-case.directions :])]
    back = ops.lstm_layers_backward(
        *grads, *arguments, case.h, case.c, case.weights, case.biased, case.directions == 2, found[0], found[3],
        found[4], found[5], True,
    )  # fmt: skip
    return [*found, *unsaved[:3], *back[:3], *back[3]]


def same(found, expected, what):
    for number, (left, right) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(left, right), f"{what}: answer {number} has other bits"


@ids
@pytest.mark.parametrize("what", ["plain", "lengths", "reset", "packed"])
def test_the_same_bits_wherever_a_sequence_is_cut(emulated, poisoned, monkeypatch, kernel, dtype, what):
    monkeypatch.setenv("CELLSTEP_CUDA_KERNEL", kernel)
    case = with_exact_products(Case(8, 3, 3, 10, 2, dtype=dtype))
    if what == "lengths":
        case.with_lengths()
    if what == "reset":
        case.with_lengths().with_reset().with_initial()
    if what == "packed":
        case.packed()
    monkeypatch.setenv("CELLSTEP_CUDA_CHUNK", str(UNCUT))
    uncut = run(emulated, case)
    for steps in (1, 2, 3, 7):
        monkeypatch.setenv("CELLSTEP_CUDA_CHUNK", str(steps))
        same(run(emulated, case), uncut, f"pieces of {steps}")


@ids
def test_pieces_are_right(emulated, poisoned, monkeypatch, kernel, dtype):
    monkeypatch.setenv("CELLSTEP_CUDA_KERNEL", kernel)
    monkeypatch.setenv("CELLSTEP_CUDA_CHUNK", "3")
    check(emulated, Case(7, 3, 4, 9, 2, dtype=dtype).with_lengths().with_reset())
    check(emulated, Case(5, 3, 2, 6, 3, dtype=dtype).packed())


@pytest.mark.parametrize("seed", range(1, 7))
def test_the_same_bits_in_any_order_of_streams(emulated, poisoned, monkeypatch, seed):
    """The emulation runs streams as late as it may, or with a seed at any time."""
    monkeypatch.setenv("CELLSTEP_CUDA_KERNEL", "block")
    monkeypatch.setenv("CELLSTEP_CUDA_CHUNK", "2")
    case = with_exact_products(Case(9, 2, 3, 5, 3).with_lengths())
    late = run(emulated, case)
    monkeypatch.setenv("CELLSTEP_SIMT_SEED", str(seed))
    same(run(emulated, case), late, f"seed {seed}")
    monkeypatch.setenv("CELLSTEP_CUDA_CHUNK", str(UNCUT))
    same(run(emulated, case), late, "one piece")


def test_more_layers_than_streams(emulated, poisoned, monkeypatch):
    monkeypatch.setenv("CELLSTEP_CUDA_KERNEL", "block")
    monkeypatch.setenv("CELLSTEP_CUDA_CHUNK", "1")
    check(emulated, Case(3, 1, 2, 3, 10))


@pytest.mark.parametrize("directions", [1, 2])
def test_products_for_weights_beside_the_next_layer(emulated, poisoned, monkeypatch, directions):
    """Uncut, the sweeps run beside them: 0 leaves all to one stream."""
    monkeypatch.setenv("CELLSTEP_CUDA_KERNEL", "cluster")
    case = Case(2, 2, 3, 8, 3, directions, torch.bfloat16).with_lengths()
    answers = []
    for steps in ("0", str(UNCUT), "1" if directions == 2 else str(UNCUT)):
        monkeypatch.setenv("CELLSTEP_CUDA_CHUNK", steps)
        answers.append(check(emulated, case) if not answers else run(emulated, case))
    same(answers[2], answers[1], "two directions are not cut")
    monkeypatch.setenv("CELLSTEP_CUDA_CHUNK", "0")
    same(answers[1], run(emulated, case), "one stream")


def test_packed_rows_that_run_backwards_are_not_cut(emulated, poisoned, monkeypatch):
    monkeypatch.setenv("CELLSTEP_CUDA_KERNEL", "block")
    case = Case(5, 3, 2, 4).packed()
    found = []
    for steps in (str(UNCUT), "2"):
        monkeypatch.setenv("CELLSTEP_CUDA_CHUNK", steps)
        found.append(
            emulated.lstm_packed(case.pack(case.x), case.batch_sizes, case.h[0], case.c[0], *case.weights, None, True,
                                 True, True)
        )  # fmt: skip
    same(found[1], found[0], "backwards")


def test_the_variable_is_a_number(emulated, monkeypatch):
    case = Case(2, 1, 1, 2)
    for text in ("two", "-1", "2x"):
        monkeypatch.setenv("CELLSTEP_CUDA_CHUNK", text)
        with pytest.raises(RuntimeError, match=f"expected CELLSTEP_CUDA_CHUNK as a number of steps, got {text}"):
            run(emulated, case)
