"""TorchScript: every module at the top level, in a fresh process, with gradients, nested in a user's own module."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import make_forecaster, random_steps

import cellstep
from cellstep.nn import LSTM, LSTMCell

CASES = {
    "cell": lambda: (LSTMCell(3, 5), torch.randn(4, 3)),
    "lstm": lambda: (LSTM(3, 5, 2), torch.randn(6, 4, 3)),
    "lstm-no-bias": lambda: (LSTM(3, 5, 2, bias=False, batch_first=True), torch.randn(6, 4, 3)),
    "lstm-unbatched": lambda: (LSTM(3, 5), torch.randn(6, 3)),
    "forecaster": lambda: (make_forecaster(3, 5), random_steps(make_forecaster(3, 5), 4, 6)),
}


def first(answer):
    return answer if isinstance(answer, torch.Tensor) else first(answer[0])


@pytest.mark.parametrize("name", CASES)
def test_scripted_equals_eager_to_the_bit(name):
    module, x = CASES[name]()
    scripted = torch.jit.script(module)
    for _ in range(3):  # the executor optimises after the first calls
        assert torch.equal(first(scripted(x)), first(module(x)))
    assert list(scripted.state_dict()) == list(module.state_dict())


@pytest.mark.parametrize("name", CASES)
def test_saved_module_answers_in_a_process_that_knows_the_operators_alone(name, tmp_path):
    module, x = CASES[name]()
    module.eval()
    torch.jit.save(torch.jit.script(module), tmp_path / "module.pt")
    torch.save((x, first(module(x)).detach()), tmp_path / "data.pt")
    program = """
import sys, torch, warnings
warnings.simplefilter("ignore")
import cellstep.ops
assert "cellstep.nn" not in sys.modules
module = torch.jit.load(sys.argv[1] + "/module.pt")
x, expected = torch.load(sys.argv[1] + "/data.pt")
answer = module(x)
while not torch.is_tensor(answer):
    answer = answer[0]
assert torch.equal(answer, expected)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_process_without_the_operators_names_what_is_missing(tmp_path):
    torch.jit.save(torch.jit.script(LSTM(3, 5)), tmp_path / "module.pt")
    program = "import sys, torch; torch.jit.load(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "module.pt"], capture_output=True, text=True)
    assert done.returncode != 0 and "Unknown builtin op: cellstep::" in done.stderr


def test_gradients_through_a_scripted_model_equal_torch():
    ours = LSTM(3, 5, 2)
    theirs = torch.nn.LSTM(3, 5, 2)
    theirs.load_state_dict(ours.state_dict())
    scripted = torch.jit.script(ours)
    x = torch.randn(6, 4, 3)
    for _ in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        scripted(x)[0].square().sum().backward()
        theirs(x)[0].square().sum().backward()
        for a, b in zip(scripted.parameters(), theirs.parameters(), strict=True):
            assert a.grad is not None
            torch.testing.assert_close(a.grad, b.grad, rtol=2e-5, atol=2e-5)


def test_scripted_weights_move_and_change_with_the_parameters(tmp_path):
    scripted = torch.jit.script(LSTM(3, 5, 2))
    torch.jit.save(scripted, tmp_path / "module.pt")
    x = torch.randn(6, 4, 3)
    for module in (scripted, torch.jit.load(tmp_path / "module.pt")):
        before = module(x)[0]
        with torch.no_grad():
            module.weight_ih_l0.zero_()
        assert not torch.equal(module(x)[0], before)
        module.double()
        assert module(x.double())[0].dtype == torch.float64


class Wrapped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = LSTM(3, 5, batch_first=True)
        self.cell = LSTMCell(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, (h, _) = self.lstm(x)
        return self.cell(y[:, -1] + h[0])[0]


def test_inside_a_users_own_scripted_module():
    module = Wrapped().eval()
    x = torch.randn(4, 6, 3)
    scripted = torch.jit.script(module)
    assert torch.equal(scripted(x), module(x))
    assert torch.equal(torch.jit.freeze(scripted)(x), module(x))


@pytest.mark.parametrize("name", CASES)
def test_optimised_for_inference(name):
    module, x = CASES[name]()
    optimised = torch.jit.optimize_for_inference(torch.jit.script(module.eval()))
    for _ in range(3):
        assert torch.equal(first(optimised(x)), first(module(x)))


@pytest.mark.parametrize("standalone", [False, True])
def test_no_device_is_baked_into_an_artifact(tmp_path, standalone):
    """A device in the code of a file would pin the answers to it, wherever the module is moved after loading."""
    cellstep.export(make_forecaster(3, 5), tmp_path / "model.pt", standalone=standalone)
    module = torch.jit.load(tmp_path / "model.pt")
    code = "".join(str(part.inlined_graph) for part in (module.forward, module.run, module.step, module.initial_state))
    assert not re.findall(r"Device = prim::Constant", code)
    assert not [value for value in re.findall(r"prim::Constant\[value=(\S+)", code) if "Tensor" in value]
    moved = torch.jit.load(tmp_path / "model.pt", map_location="meta")
    assert {buffer.device.type for buffer in (*moved.buffers(), *moved.parameters())} == {"meta"}
    if standalone:  # computes there; shapes are all that this device has
        y, (h, c) = moved.run(torch.empty(2, 6, 3, device="meta"), moved.initial_state(2))
        assert y.shape == (2, 6, 1) and {y.device.type, h.device.type, c.device.type} == {"meta"}


def test_a_standalone_file_needs_no_operators(tmp_path):
    model = make_forecaster(3, 5)
    cellstep.export(model, tmp_path / "model.pt", standalone=True)
    x = random_steps(model, 2, 6)
    torch.save((x, model(x).detach()), tmp_path / "data.pt")
    program = """
import sys, torch, warnings
warnings.simplefilter("ignore")
module = torch.jit.load(sys.argv[1] + "/model.pt")
assert "cellstep" not in sys.modules and not torch._C._dispatch_has_kernel("cellstep::lstm_layer")
x, expected = torch.load(sys.argv[1] + "/data.pt")
# Outputs span hundreds, and other kernels sum in another order.
torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-3)
y, state = module.step(x[:, 0], module.initial_state(2))
assert y.shape == (2, 1) and module.double()(x.double()).dtype == torch.float64
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_saved_model_holds_no_state(tmp_path):
    """A policy that is saved in the middle of a run begins anew when it is loaded."""
    model = make_forecaster(3, 5)
    x = random_steps(model, 2, 6)
    scripted = torch.jit.script(model)
    fresh = scripted(x)
    scripted.run(x, scripted.initial_state(2))
    torch.jit.save(scripted, tmp_path / "model.pt")
    assert torch.equal(torch.jit.load(tmp_path / "model.pt")(x), fresh)
    assert set(scripted.state_dict()) == set(model.state_dict())


def test_scripted_errors_are_the_eager_ones():
    scripted = torch.jit.script(LSTM(3, 5))
    with pytest.raises(torch.jit.Error, match="must be equal to input_size. Expected 3, got 4"):
        scripted(torch.randn(6, 2, 4))
