"""The notebook this project grew from, as plainly as possible, is the reference."""

import itertools

import pytest
import torch
from conftest import make_forecaster, random_steps
from torch import nn

from cellstep.convert import from_gates, to_gates
from cellstep.nn import Forecaster


class NotebookCell(nn.Module):
    def __init__(self, input_size, hidden_size):
        super().__init__()
        for gate in "ifgo":
            setattr(self, f"W_i{gate}", nn.Parameter(torch.empty(hidden_size, input_size).uniform_(-0.1, 0.1)))
            setattr(self, f"W_h{gate}", nn.Parameter(torch.empty(hidden_size, hidden_size).uniform_(-0.1, 0.1)))
            setattr(self, f"b_{gate}", nn.Parameter(torch.empty(hidden_size).uniform_(-0.1, 0.1)))

    def forward(self, x, h, c):
        i = torch.sigmoid(x @ self.W_ii.T + h @ self.W_hi.T + self.b_i)
        f = torch.sigmoid(x @ self.W_if.T + h @ self.W_hf.T + self.b_f)
        g = torch.tanh(x @ self.W_ig.T + h @ self.W_hg.T + self.b_g)
        o = torch.sigmoid(x @ self.W_io.T + h @ self.W_ho.T + self.b_o)
        c = f * c + i * g
        h = o * torch.tanh(c)
        return h, c


class NotebookModel(nn.Module):
    def __init__(self, input_size, hidden_size, num_layers):
        super().__init__()
        sizes = [input_size] + [hidden_size] * num_layers
        self.hidden_size = hidden_size
        self.cells = nn.ModuleList([NotebookCell(a, b) for a, b in itertools.pairwise(sizes)])
        self.fc = nn.Linear(hidden_size, 1)
        nn.init.uniform_(self.fc.weight, -0.1, 0.1)
        nn.init.uniform_(self.fc.bias, -0.1, 0.1)

    def forward(self, x):
        states = [(torch.zeros(len(x), self.hidden_size), torch.zeros(len(x), self.hidden_size)) for _ in self.cells]
        for step in range(x.shape[1]):
            value = x[:, step]
            for layer, cell in enumerate(self.cells):
                states[layer] = cell(value, *states[layer])
                value = states[layer][0]
        return self.fc(value)


@pytest.mark.parametrize(("inputs", "hidden", "layers"), [(10, 50, 2), (1, 4, 1), (3, 17, 12)])
def test_from_gates_gives_the_notebooks_outputs(inputs, hidden, layers):
    notebook = NotebookModel(inputs, hidden, layers)
    model = from_gates(notebook.state_dict())
    x = torch.randn(7, 5, inputs)
    assert (model(x) - notebook(x)).abs().max() <= 1e-6


def test_to_gates_goes_back_to_the_same_weights():
    notebook = NotebookModel(10, 50, 2)
    gates = to_gates(from_gates(notebook.state_dict()))
    assert set(gates) == set(notebook.state_dict())
    for name, value in notebook.state_dict().items():
        assert torch.equal(gates[name], value)


def test_to_gates_multiplies_the_scaling_in():
    model = make_forecaster()
    notebook = NotebookModel(10, 50, 2)
    notebook.load_state_dict(to_gates(model))
    x = random_steps(model, 7, 5)
    # The offsets are hundreds of deviations, so the notebook's unscaled sums lose digits; outputs span some 100.
    torch.testing.assert_close(notebook(x), model(x), rtol=0, atol=0.05)


def test_init_range_starts_as_the_notebook_does():
    torch.manual_seed(0)
    model = Forecaster(10, 50, 2, init_range=0.1)
    assert all(p.abs().max() <= 0.1 for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("cells.1.W_ho"), "missing cells.1.W_ho"),
        (lambda d: d.pop("fc.bias"), "missing fc.bias"),
        (lambda d: d.update({"cells.0.extra": torch.zeros(1)}), "unknown cells.0.extra"),
        (lambda d: d.clear(), "missing"),
        (
            lambda d: d.update({"cells.1.W_ii": torch.zeros(50, 10)}),
            r"cells.1.W_ii of shape \(50, 50\); got \(50, 10\)",
        ),
        (lambda d: d.update({"cells.0.W_ii": torch.zeros(50)}), "cells.0.W_ii with two dimensions"),
        (lambda d: d.update({"cells.0.b_f": torch.zeros(49)}), r"cells.0.b_f of shape \(50,\); got \(49,\)"),
    ],
)
def test_wrong_keys_and_shapes(change, message):
    state = dict(NotebookModel(10, 50, 2).state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        from_gates(state)
