"""The operators themselves: gradients, shape inference, checked arguments, bits on every instruction set."""

import os
import re
import subprocess
import sys

import pytest
import torch

import cellstep.ops

ops = torch.ops.cellstep


def layer_arguments(dtype=torch.float64, steps=3, batch=2, inputs=4, hidden=5, bias=True, save=True):
    g = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype).requires_grad_()

    biases = (leaf(4 * hidden), leaf(4 * hidden)) if bias else (None, None)
    return (
        leaf(steps, batch, inputs),
        leaf(batch, hidden),
        leaf(batch, hidden),
        leaf(4 * hidden, inputs),
        leaf(4 * hidden, hidden),
        *biases,
        save,
    )


def cell_arguments(**options):
    x, *rest = layer_arguments(steps=1, **options)
    return (x[0].detach().requires_grad_(), *rest)


def dense_arguments(dtype=torch.float64, bias=True):
    return (
        torch.randn(2, 3, 6, dtype=dtype, requires_grad=True),
        torch.randn(4, 6, dtype=dtype, requires_grad=True),
        torch.randn(4, dtype=dtype, requires_grad=True) if bias else None,
    )


CASES = [
    pytest.param(lambda: (ops.lstm_layer, layer_arguments(), 3), id="layer"),
    pytest.param(lambda: (ops.lstm_layer, layer_arguments(bias=False), 3), id="layer-no-bias"),
    pytest.param(lambda: (ops.lstm_layer, layer_arguments(save=False), 3), id="layer-unsaved"),
    pytest.param(lambda: (ops.lstm_cell, cell_arguments(), 2), id="cell"),
    pytest.param(lambda: (ops.lstm_cell, cell_arguments(bias=False), 2), id="cell-no-bias"),
    pytest.param(lambda: (ops.lstm_cell, cell_arguments(save=False), 2), id="cell-unsaved"),
    pytest.param(lambda: (ops.dense, dense_arguments(), None), id="dense"),
    pytest.param(lambda: (ops.dense, dense_arguments(bias=False), None), id="dense-no-bias"),
]


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    op, arguments, outputs = case()
    assert torch.autograd.gradcheck(lambda *a: op(*a)[:outputs] if outputs else op(*a), arguments)


@pytest.mark.parametrize("case", CASES)
def test_second_derivative(case):
    op, arguments, outputs = case()
    assert torch.autograd.gradgradcheck(lambda *a: op(*a)[:outputs] if outputs else op(*a), arguments)


def image_of(model):
    from cellstep.exporters.deploy import image

    return torch.frombuffer(bytearray(image(model)), dtype=torch.uint8)


def backward_arguments():
    x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, _ = [
        a.detach() if torch.is_tensor(a) else a for a in layer_arguments()
    ]
    y, h_n, c_n, gates, cells = ops.lstm_layer(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, True)
    grads = torch.randn_like(y), torch.randn_like(h), torch.randn_like(c), torch.randn_like(cells)
    return *grads, x, h, c, weight_ih, weight_hh, y, gates, cells, True, True


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    op, arguments, _ = case()
    torch.library.opcheck(op.default, arguments)


def test_opcheck_of_backward_and_inference(model):
    arguments = backward_arguments()
    torch.library.opcheck(ops.lstm_layer_backward.default, arguments)
    _, grad_h, grad_c, _, x, h, c, weight_ih, weight_hh, _, gates, cells, _, _ = arguments
    torch.library.opcheck(
        ops.lstm_cell_backward.default, (grad_h, grad_c, x[0], h, c, weight_ih, weight_hh, cells[0], gates[0])
    )
    for answers, lengths, reset in (
        (0, None, None),
        (1, None, None),
        (1, torch.tensor([7, 0, 3]), torch.rand(3, 7) > 0.5),
    ):
        torch.library.opcheck(
            ops.run_model.default,
            (image_of(model), torch.randn(3, 7, 10), *model.initial_state(3), 1, answers, lengths, reset),
        )


def test_time_and_batch_stay_dynamic_under_export():
    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = cellstep.nn.LSTM(4, 6, 2)

        def forward(self, x):
            return self.lstm(x)[0]

    module = Stack().eval()
    dims = {0: torch.export.Dim("time", min=2, max=10000), 1: torch.export.Dim("batch", min=2, max=100)}
    with torch.no_grad():
        exported = torch.export.export(module, (torch.randn(5, 3, 4),), dynamic_shapes=(dims,))
        for steps, batch in ((2, 2), (7, 5), (300, 11)):
            x = torch.randn(steps, batch, 4)
            assert torch.equal(exported.module()(x), module(x))


def test_inference_operator_has_no_silent_gradient(model):
    h, c = model.initial_state(1)
    y, _, _ = ops.run_model(image_of(model), torch.randn(1, 3, 10, requires_grad=True), h, c, 1, 1, None, None)
    with pytest.raises(RuntimeError, match="has no gradient: it runs an exported model"):
        y.sum().backward()


WRONG = {
    "rank": (0, lambda t: t[0], r"expected x with 3 dimensions, got shape \(2, 4\)"),
    "no steps": (0, lambda t: t[:0], "expected at least one step"),
    "state size": (1, lambda t: t[:, :3], r"expected weight_ih of shape|expected c of shape"),
    "state batch": (2, lambda t: t[:1], r"expected c of shape \(2, 5\), got \(1, 5\)"),
    "weight_ih": (3, lambda t: t[:, :2], r"expected weight_ih of shape \(20, 4\), got \(20, 2\)"),
    "weight_hh": (4, lambda t: t[:8], r"expected weight_hh of shape \(20, 5\), got \(8, 5\)"),
    "bias_ih": (5, lambda t: t[:3], r"expected bias_ih of shape \(20\), got \(3\)"),
    "bias_hh": (6, lambda t: t[:3], r"expected bias_hh of shape \(20\), got \(3\)"),
    "dtype of x": (0, lambda t: t.half(), "expected x of float32 or float64, got float16"),
    "integers": (0, lambda t: t.long(), "expected x of float32 or float64, got another type"),
    "dtype of a weight": (3, lambda t: t.float(), "expected weight_ih of float64 like the input, got float32"),
    "dtype of the state": (2, lambda t: t.float(), "expected c of float64 like the input, got float32"),
}


@pytest.mark.parametrize("what", WRONG)
def test_layer_checks_its_arguments(what):
    place, change, message = WRONG[what]
    arguments = [a.detach() if torch.is_tensor(a) else a for a in layer_arguments()]
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=message):
        ops.lstm_layer(*arguments)


@pytest.mark.parametrize("place", range(12))
def test_backward_checks_its_arguments(place):
    arguments = list(backward_arguments())
    arguments[place] = arguments[place][:-1]
    with pytest.raises(RuntimeError, match="expected .* got"):
        ops.lstm_layer_backward(*arguments)


def test_dense_checks_its_arguments():
    x, weight, bias = (a.detach() for a in dense_arguments())
    for wrong in ((x[..., :3], weight, bias), (x, weight[0], bias), (x, weight, bias[:2]), (x.float(), weight, bias)):
        with pytest.raises(RuntimeError, match="dense: expected"):
            ops.dense(*wrong)


def test_run_model_checks_its_arguments(model):
    image, x = image_of(model), torch.randn(2, 4, 10)
    h, c = model.initial_state(2)
    damaged = image.clone()
    damaged[24] = 200
    for wrong, message in [
        ((image[:-1], x, h, c, 1, 1, None, None), "shorter or longer"),
        ((image.float(), x, h, c, 1, 1, None, None), "expected image as the uint8 bytes"),
        ((torch.zeros(0, dtype=torch.uint8), x, h, c, 1, 1, None, None), "run_model: "),
        ((damaged, x, h, c, 1, 1, None, None), "records contradict"),
        ((image, x.double(), h, c, 1, 1, None, None), "expected x of float32 like the model, got float64"),
        ((image, x[..., :9], h, c, 1, 1, None, None), r"expected x of shape \(2, 4, 10\), got \(2, 4, 9\)"),
        ((image, x[:, :0], h, c, 1, 1, None, None), "at least one step"),
        ((image, x, h[:1], c, 1, 1, None, None), r"expected h of shape \(2, 2, 50\), got \(1, 2, 50\)"),
        ((image, x, h, c, 2, 1, None, None), "expected output_size 1"),
        ((image, x, h, c, 1, 3, None, None), "expected answers 0"),
        ((image, x, h, c, 1, 1, torch.tensor([1, 5]), None), "expected lengths from 0 to the 4 steps of x, got 5"),
        ((image, x, h, c, 1, 1, torch.tensor([1]), None), "expected lengths of 2 int64 values"),
        ((image, x, h, c, 1, 1, None, torch.zeros(2, 3, dtype=torch.bool)), r"expected reset of shape \(2, 4\)"),
        ((image, x, h, c, 1, 1, None, torch.zeros(2, 4)), "expected reset as bool"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.run_model(*wrong)


def test_sparse_input_is_refused():
    x, *rest = (a.detach() if torch.is_tensor(a) else a for a in layer_arguments())
    with pytest.raises(NotImplementedError, match="cellstep::lstm_layer"):
        ops.lstm_layer(x.to_sparse(), *rest)


PROGRAM = """
import hashlib, torch, cellstep
from cellstep.nn import LSTM
torch.manual_seed(0)
digests = []
for dtype in (torch.float32, torch.float64):
    for hidden in (3, 8, 13, 50, 64):
        lstm = LSTM(10, hidden, 2, dtype=dtype)
        x = 3 * torch.randn(31, 7, 10, dtype=dtype)
        with torch.no_grad():
            y, (h, c) = lstm(x)
        digests.append(hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in (y, h, c))).hexdigest())
print(cellstep.runtime.instruction_set(), hashlib.sha256("".join(digests).encode()).hexdigest())
"""


def run_on(instruction_set):
    environment = {**os.environ, "CELLSTEP_CPU": instruction_set}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_bits_are_the_same_on_every_instruction_set_with_fused_multiply_add():
    """On x86-64: AVX2 and AVX-512 are equal to the bit; baseline has no such instruction."""
    name, widest = run_on("avx512")
    if name == "native":
        pytest.skip("one instruction set on this architecture")
    assert run_on("baseline")[0] == "baseline"
    if name == "baseline":
        pytest.skip("this machine has no AVX2")
    assert run_on("avx2") == ["avx2", widest]


@pytest.mark.parametrize("kind", ["tanh", "sigmoid"])
def test_activations_are_accurate_and_bounded(kind):
    """With zero weights a gate's sum is its bias, and with the other gates saturated c is i * g: the activation."""
    small = torch.logspace(-30, 2, 20001)
    values = torch.cat([torch.linspace(-100, 100, 200001), small, -small])
    activate = getattr(torch, kind)
    for part in values.split(512):
        n = len(part)
        one = torch.full((n,), 100.0)
        zero = torch.zeros(1, n)
        gates = torch.cat((one, zero[0], part, one) if kind == "tanh" else (part, zero[0], one, one))
        weights = torch.zeros(4 * n, 1), torch.zeros(1, 1).expand(4 * n, n)
        c = ops.lstm_layer(torch.zeros(1, 1, 1), zero, zero, *weights, gates, None, False)[2][0]
        truth = activate(part.double())
        assert c.abs().max() <= 1
        ulp = torch.exp2(torch.floor(torch.log2(truth.abs())) - 23)
        # Two roundings of the quotient's parts, one of the quotient, and the series' own error of a quarter. Below
        # exp(-87) = 1.6e-38, where float32 has denormal numbers alone, the sigmoid is flushed to zero.
        assert ((c.double() - truth).abs() <= 2.5 * ulp + 1.7e-38).all()


def test_elu_is_accurate_and_bounded():
    x = torch.cat([torch.linspace(-100, 100, 200001), torch.logspace(-30, 2, 20001), -torch.logspace(-30, 2, 20001)])
    y = torch.ops.cellstep.activate(x, 6)
    truth = torch.nn.functional.elu(x.double())
    assert y.min() >= -1
    ulp = torch.exp2(torch.floor(torch.log2(truth.abs())) - 23)
    assert ((y.double() - truth).abs() <= 2.5 * ulp).all()
    assert torch.ops.cellstep.activate(torch.tensor([float("nan")]), 6).isnan().all()


@pytest.mark.skipif(sys.platform != "linux", reason="nm reads ELF here")
def test_libraries_hold_no_unstable_symbol():
    def undefined(path):
        done = subprocess.run(["nm", "-DC", "--undefined-only", path], capture_output=True, text=True, check=True)
        return done.stdout

    library = cellstep.ops.library_path
    assert not re.search(r"\b(at|c10)::", undefined(library))
    everything = subprocess.run(["nm", "-DC", library], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(at|c10)::", everything)
    runtime = library.replace("cellstep_ops", "cellstep_runtime")
    for path in (runtime, cellstep._runtime.__file__):
        assert not re.search(r"torch|\b(at|c10)::|aoti", undefined(path))
