"""On a CUDA device. References are torch's own modules on the CPU in float64."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_forecaster, random_steps, read_csv, run_command
from torch.nn.utils.rnn import pack_sequence

import cellstep
import cellstep.ops
from cellstep.nn import LSTM, LSTMCell

if not torch.cuda.is_available():
    pytest.skip(f"needs a CUDA device: {cellstep.ops.cuda_missing()}", allow_module_level=True)
if cellstep.ops.cuda_missing():
    pytest.skip(f"needs cellstep's CUDA kernels: {cellstep.ops.cuda_missing()}", allow_module_level=True)

#: Relative to the largest value: sums in float32 and a state in it; in 16 bits inputs, weights and outputs are rounded
#: to 11 and 8 bits, and the state of every step with them.
_BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
#: Of gradients, whose sums run over all steps and rows.
_LOOSER = 10


@pytest.fixture(autouse=True)
def _exact_products():
    """The reference has no TF32, and torch's own products are part of some roads."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def _near(found, expected, dtype, factor=1):
    for a, b in zip(found, expected, strict=True):
        assert a.is_cuda and a.dtype == dtype
        bound = factor * _BOUNDS[dtype] * max(1.0, b.abs().max().item() if b.numel() else 0.0)
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=bound)


def _twins(dtype, *arguments, **options):
    """Ours on CUDA, and torch's with the same weights on the CPU in float64."""
    ours = LSTM(*arguments, **options).to("cuda", dtype)
    theirs = torch.nn.LSTM(*arguments, **options).double()
    theirs.load_state_dict({name: value.double().cpu() for name, value in ours.state_dict().items()})
    return ours, theirs


def _pair(dtype, *shape):
    """The same values on CUDA and on the CPU in float64."""
    value = torch.randn(*shape).to(dtype)
    return value.cuda().requires_grad_(), value.double().requires_grad_()


def _gradients(answers, tensors):
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(answer.shape, generator=generator, dtype=torch.float64) for answer in answers]
    return torch.autograd.grad(
        answers, tensors, [w.to(a.device, a.dtype) for w, a in zip(weights, answers, strict=True)]
    )


@pytest.mark.parametrize("dtype", _BOUNDS, ids=str)
@pytest.mark.parametrize("hidden", [1, 7, 32, 50, 128, 160, 300])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_layer_equals_torch(dtype, hidden, layers, bidirectional):
    ours, theirs = _twins(dtype, 10, hidden, layers, bidirectional=bidirectional, batch_first=True)
    (x, x_64), (h, h_64), (c, c_64) = (
        _pair(dtype, *shape) for shape in ((5, 12, 10), *[(layers * (1 + bidirectional), 5, hidden)] * 2)
    )
    y, state = ours(x, (h, c))
    expected, expected_state = theirs(x_64, (h_64, c_64))
    _near((y, *state), (expected, *expected_state), dtype)
    found = _gradients((y, *state), (x, h, c, *ours.parameters()))
    _near(found, _gradients((expected, *expected_state), (x_64, h_64, c_64, *theirs.parameters())), dtype, _LOOSER)


@pytest.mark.parametrize("batch", [0, 1, 3, 4096])
@pytest.mark.parametrize("steps", [1, 2, 100])
def test_any_batch_and_time(batch, steps):
    ours, theirs = _twins(torch.float32, 2, 8, 2)
    x, x_64 = _pair(torch.float32, steps, batch, 2)
    y, state = ours(x)
    expected, expected_state = theirs(x_64)
    _near((y, *state), (expected, *expected_state), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_rows_equal_torchs(dtype):
    ours, theirs = _twins(dtype, 6, 40, 2, bidirectional=True)
    rows = [_pair(dtype, length, 6) for length in (3, 50, 20, 1)]
    y, state = ours(pack_sequence([row for row, _ in rows], enforce_sorted=False))
    expected, expected_state = theirs(pack_sequence([row for _, row in rows], enforce_sorted=False))
    _near((y.data, *state), (expected.data, *expected_state), dtype)
    found = _gradients((y.data, *state), tuple(ours.parameters()))
    _near(found, _gradients((expected.data, *expected_state), tuple(theirs.parameters())), dtype, _LOOSER)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"residual": True, "return_cell_states": True},
        {"proj_size": 5},
        {"peephole": True},
        {"layer_norm": True, "coupled": True},
        {"cell_clip": 0.3, "zoneout": 0.1},
        {"activation": "relu", "gate_activation": "hard_sigmoid"},
        {"learn_initial_state": True},
        {"memory_efficient": True},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
@pytest.mark.parametrize("how", ["whole", "lengths", "reset"])
def test_options_lengths_and_resets_are_those_of_the_cpu(options, how):
    """The CPU's road in float64 is tested against the formula."""
    ours = LSTM(4, 8, 2, bidirectional=True, **options).eval()
    twin = copy.deepcopy(ours).double()
    ours.cuda()
    x, x_64 = _pair(torch.float32, 9, 3, 4)
    more = {"lengths": torch.tensor([9, 0, 4])} if how == "lengths" else {}
    if how == "reset":
        more = {"reset": torch.rand(9, 3) > 0.7}

    def answers(module, x, device):
        output, state, *cells = module(x, **{name: value.to(device) for name, value in more.items()})
        return [output, *state, *cells]

    found, expected = answers(ours, x, "cuda"), answers(twin, x_64, "cpu")
    _near(found, expected, torch.float32, 2)
    to_found = _gradients(found, (x, *ours.parameters()))
    _near(to_found, _gradients(expected, (x_64, *twin.parameters())), torch.float32, _LOOSER)


def test_lengths_on_the_device_are_cut_and_others_are_refused():
    ours, x = LSTM(3, 5).cuda(), torch.randn(4, 2, 3, device="cuda")
    y, state = ours(x, lengths=torch.tensor([9, -2], device="cuda"))
    expected, expected_state = ours(x, lengths=torch.tensor([4, 0], device="cuda"))
    assert torch.equal(y, expected) and all(map(torch.equal, state, expected_state))
    with pytest.raises(ValueError, match="lengths from 0 to the 4 steps"):
        ours(x, lengths=torch.tensor([9, -2]))


@pytest.mark.parametrize("dtype", _BOUNDS, ids=str)
def test_cell_equals_torch(dtype):
    ours = LSTMCell(6, 50).to("cuda", dtype)
    theirs = torch.nn.LSTMCell(6, 50).double()
    theirs.load_state_dict({name: value.double().cpu() for name, value in ours.state_dict().items()})
    (x, x_64), (h, h_64), (c, c_64) = (_pair(dtype, *shape) for shape in ((7, 6), (7, 50), (7, 50)))
    found, expected = ours(x, (h, c)), theirs(x_64, (h_64, c_64))
    _near(found, expected, dtype)
    to_found = _gradients(found, (x, h, c, *ours.parameters()))
    _near(to_found, _gradients(expected, (x_64, h_64, c_64, *theirs.parameters())), dtype, _LOOSER)


def test_the_gradient_of_the_gradient():
    ours = LSTM(3, 5, 2, bidirectional=True, dtype=torch.float64, device="cuda")
    x = torch.randn(4, 2, 3, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ours(x)[0], (x,), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["layer", "cell", "chain"])
def test_autocast_gives_what_torch_gives(dtype, kind):
    ours = {"layer": LSTM(6, 32, 2), "cell": LSTMCell(6, 32), "chain": make_forecaster(6, 32, scaled=False)}[
        kind
    ].cuda()
    shape = (7, 6) if kind == "cell" else (5, 7, 6)
    x = torch.randn(*shape, device="cuda")
    wide = ours(x)
    with torch.autocast("cuda", dtype):
        narrow = ours(x)
    first = [answer if isinstance(answer, torch.Tensor) else answer[0] for answer in (wide, narrow)]
    assert first[1].dtype == dtype or kind == "chain"
    torch.testing.assert_close(first[1].float(), first[0], rtol=0, atol=2 * _BOUNDS[dtype])
    first[1].float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


def test_modules_move_copy_and_load():
    model = make_forecaster()
    x = random_steps(model, 4, 12)
    expected = model(x).detach()
    scale = 2e-6 * 180 * 5  # of outputs in their own unit
    moved = copy.deepcopy(model).cuda()
    for module in (moved, copy.deepcopy(moved)):
        torch.testing.assert_close(module(x.cuda()).detach().cpu(), expected, rtol=0, atol=scale)
    other = make_forecaster(seed=3).cuda()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x.cuda()).detach().cpu(), expected, rtol=0, atol=scale)
    assert torch.equal(moved.cpu()(x).detach(), model(x).detach())


@pytest.mark.parametrize("how", ["to", "map_location", "load"])
@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("exported_from", ["cpu", "cuda"])
def test_a_file_moves_after_loading(how, standalone, exported_from, tmp_path):
    model = make_forecaster()
    x, reset = random_steps(model, 4, 12), torch.rand(4, 12) > 0.8
    expected, state = model.run(x, model.initial_state(4), reset)
    cellstep.export(copy.deepcopy(model).to(exported_from), tmp_path / "model.pt", standalone=standalone)
    scale = 2e-6 * 180 * 5
    if how == "load":
        artifact = cellstep.load(tmp_path / "model.pt", device="cuda")
        y, _ = artifact.run(x.numpy(), artifact.initial_state(4), reset.numpy())
        np.testing.assert_allclose(y, expected.detach(), rtol=0, atol=scale)
        return
    module = torch.jit.load(tmp_path / "model.pt", map_location="cuda" if how == "map_location" else "cpu")
    module.to("cuda")
    y, (h, c) = module.run(x.cuda(), module.initial_state(4), reset.cuda())
    assert y.is_cuda and h.is_cuda and c.is_cuda
    torch.testing.assert_close(y.cpu(), expected.detach(), rtol=0, atol=scale)
    torch.testing.assert_close(h.cpu(), state[0].detach(), rtol=0, atol=2e-5)
    back = module.to("cpu")
    assert back.run(x, back.initial_state(4))[0].device.type == "cpu"


def test_a_package_for_cuda(tmp_path):
    model = make_forecaster()
    x = random_steps(model, 4, 12)
    cellstep.export(copy.deepcopy(model).cuda(), tmp_path / "model.pt2")
    for device in (None, "cuda", "cuda:0"):
        artifact = cellstep.load(tmp_path / "model.pt2", device)
        np.testing.assert_allclose(artifact(x.numpy()), model(x).detach(), rtol=0, atol=2e-6 * 180 * 5)
    with pytest.raises(ValueError, match="expected device='cuda'"):
        cellstep.load(tmp_path / "model.pt2", "cpu")


@pytest.mark.skipif(not Path(sys.executable).with_name("cellstep-run").exists(), reason="it is not installed")
@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_runner_on_cuda(suffix, stream, series_csv, tmp_path):
    model = make_forecaster()
    cellstep.export(copy.deepcopy(model).cuda() if suffix == ".pt2" else model, tmp_path / f"model{suffix}")
    options = ["--stream"] if stream else []
    found = run_command("cellstep-run", tmp_path / f"model{suffix}", series_csv, "--device", "cuda", *options)
    assert found.returncode == 0, found.stderr
    cellstep.export(model, tmp_path / "reference.pt")
    expected = run_command("cellstep-run", tmp_path / "reference.pt", series_csv, *options)
    np.testing.assert_allclose(read_csv(found.stdout)[2], read_csv(expected.stdout)[2], rtol=0, atol=2e-6 * 180 * 5)


def _calls():
    """Modules and their inputs, on the device."""
    x = torch.randn(6, 4, 10, device="cuda")
    lengths = torch.tensor([6, 1, 0, 3], device="cuda")
    reset = torch.rand(6, 4, device="cuda") > 0.7
    for options in ({}, {"bidirectional": True}, {"proj_size": 5}, {"peephole": True}, {"residual": True}):
        module = LSTM(10, 24, 2, **options).cuda()
        for more in ({}, {"lengths": lengths}, {"reset": reset}):
            yield lambda x, module=module, more=more: module(x, **more)[0], x
    yield LSTMCell(10, 24).cuda(), x[0]
    model = make_forecaster().cuda()
    yield model, x


@pytest.mark.parametrize("gradient", [False, True])
def test_nothing_waits_for_the_device(gradient):
    for call, x in _calls():
        for mode in ("default", "error"):  # the first call may pay for what is lazy
            torch.cuda.set_sync_debug_mode(mode)
            try:
                with torch.set_grad_enabled(gradient):
                    y = call(x)
                    y = y if isinstance(y, torch.Tensor) else y[0]
                    if gradient:
                        y.sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_a_graph_replays_on_new_input():
    for call, x in _calls():
        given = torch.zeros_like(x)
        with torch.no_grad():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                call(given)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = call(given)
            for _ in range(3):
                given.copy_(torch.randn_like(given))
                graph.replay()
                expected = call(given)
                for a, b in zip(captured, expected, strict=True):
                    assert torch.equal(a, b)


def test_two_streams_at_once():
    module = LSTM(10, 50, 2).cuda()
    inputs = [torch.randn(200, 16, 10, device="cuda") for _ in range(2)]
    with torch.no_grad():
        expected = [module(x)[0] for x in inputs]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in inputs]
        for _ in range(20):
            found = []
            for stream, x in zip(streams, inputs, strict=True):
                with torch.cuda.stream(stream):
                    found.append(module(x)[0])
            torch.cuda.synchronize()
            assert all(map(torch.equal, found, expected))


def test_the_same_bits_on_every_run():
    module, x = LSTM(10, 50, 2, bidirectional=True).cuda(), torch.randn(100, 33, 10, device="cuda")

    def run():
        module.zero_grad()
        y, _ = module(x)
        y.square().sum().backward()
        return [y, *(parameter.grad.clone() for parameter in module.parameters())]

    first = run()
    assert all(all(map(torch.equal, run(), first)) for _ in range(5))


@pytest.mark.parametrize("scripted", [False, True])
def test_scripted_and_compiled_modules(scripted):
    module = LSTM(10, 50, 2, batch_first=True).cuda()
    other = torch.jit.script(module) if scripted else torch.compile(module, fullgraph=True, dynamic=True)
    for shape in ((4, 12, 10), (5, 7, 10)):
        x = torch.randn(*shape, device="cuda")
        torch.testing.assert_close(other(x)[0], module(x)[0], rtol=0, atol=2e-6)


def test_torchs_road_is_there_without_operators(monkeypatch):
    ours, theirs = _twins(torch.float32, 10, 50, 2)
    ours.use_ops = False
    x, x_64 = _pair(torch.float32, 12, 5, 10)
    _near(ours(x)[:1], theirs(x_64)[:1], torch.float32, 5)
