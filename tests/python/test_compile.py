"""``torch.compile``: one graph, any number of steps without compiling again, for training and for inference."""

import copy

import pytest
import torch

from cellstep.nn import LSTM, LSTMCell

LAYERS = {
    "plain": lambda: LSTM(5, 7, 2, dropout=0.2),
    "both directions": lambda: LSTM(5, 7, bidirectional=True),
    "options": lambda: LSTM(5, 7, peephole=True, layer_norm=True, coupled=True, learn_initial_state=True),
    "training masks": lambda: LSTM(5, 7, recurrent_dropout=0.3, weight_drop=0.2, zoneout=0.1),
    "memory_efficient": lambda: LSTM(5, 7, memory_efficient=True),
    "return_cell_states": lambda: LSTM(5, 7, return_cell_states=True),
}


def loss_of(module, x):
    answer = module(x)
    output, (h, c) = answer[:2]
    total = output.square().sum() + h.sum() + c.square().sum()
    return total + answer[2].sum() if len(answer) == 3 else total


@pytest.mark.parametrize("name", LAYERS)
def test_training_is_one_graph_and_compiles_once_for_all_lengths(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    lstm = LAYERS[name]()
    if name in ("plain", "training masks"):
        lstm.eval()  # a compiled graph draws other random numbers; its masks are tested where they are drawn
    twin = copy.deepcopy(lstm)
    compiled = torch.compile(lstm, fullgraph=True, dynamic=True)
    for place, steps in enumerate((4, 9, 2, 100)):
        x = torch.randn(steps, 3, 5, requires_grad=True)
        with torch.compiler.set_stance("fail_on_recompile" if place else "default"):
            loss = loss_of(compiled, x)
        lstm.zero_grad()
        loss.backward()
        found = [x.grad.clone(), *(parameter.grad.clone() for parameter in lstm.parameters())]
        x.grad = None
        twin.zero_grad()
        expected = loss_of(twin, x)
        expected.backward()
        wanted = [x.grad, *(parameter.grad for parameter in twin.parameters())]
        # One kernel behind both; what surrounds it is summed in another order.
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "training masks"])
def test_training_masks_are_part_of_the_graph(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    lstm = LAYERS[name]()
    compiled = torch.compile(lstm, fullgraph=True, dynamic=True)
    x = torch.randn(20, 3, 5)
    one, other = (compiled(x)[0] for _ in range(2))
    assert not torch.equal(one, other)
    other.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in lstm.parameters())


def test_a_cell_in_a_loop_is_one_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    cell = LSTMCell(5, 7)

    def steps(x):
        h = c = x.new_zeros(3, 7)
        for step in range(4):
            h, c = cell(x[step], (h, c))
        return h

    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(torch.compile(steps, fullgraph=True)(x), steps(x), rtol=0, atol=1e-6)
