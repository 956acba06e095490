"""TorchScript: every module at the top level, in a fresh process, with gradients, nested in a user's own module."""

import subprocess
import sys

import pytest
import torch
from conftest import make_forecaster, random_steps

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
    assert done.returncode != 0 and "Unknown builtin op: cellstep::lstm_layer" in done.stderr


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


def test_scripted_errors_are_the_eager_ones():
    scripted = torch.jit.script(LSTM(3, 5))
    with pytest.raises(torch.jit.Error, match="must be equal to input_size. Expected 3, got 4"):
        scripted(torch.randn(6, 2, 4))
