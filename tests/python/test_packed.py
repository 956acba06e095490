"""Eager inference on packed weights: the same bits as without, and never those of weights that have changed."""

import copy
import gc
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import cellstep.nn.packed
from cellstep.nn import LSTM, Chain, Dense, Forecaster, Scale, Unscale


def plain_answer(model: nn.Module, *arguments: object) -> object:
    """What the model answers without packed weights: with gradients on, no call takes them."""
    with torch.enable_grad():
        return model(*arguments)


def equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return all(equal(x, y) for x, y in zip(a, b, strict=True))


def packed_calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """What every later look for packed weights gives."""
    found: list[Tensor | None] = []
    look = cellstep.nn.packed.packed_image

    def spy(*arguments: object) -> Tensor | None:
        found.append(look(*arguments))
        return found[-1]

    monkeypatch.setattr("cellstep.nn.lstm.packed_image", spy)
    monkeypatch.setattr("cellstep.nn.chain.packed_image", spy)
    return found


def chain() -> Chain:
    scales = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.5, 1.0])
    return Chain(Scale(*scales), Dense(3, 6, "tanh"), LSTM(6, 9, 2), LSTM(9, 5), Dense(5, 2), Unscale([3.0, 4.0]))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM": (lambda: LSTM(3, 20, 2), (7, 4, 3)),
    "batch_first": (lambda: LSTM(3, 20, batch_first=True), (4, 7, 3)),
    "bidirectional, proj_size": (lambda: LSTM(3, 20, 2, bidirectional=True, proj_size=8), (7, 4, 3)),
    "options": (lambda: LSTM(3, 20, peephole=True, layer_norm=True, coupled=True, learn_initial_state=True), (7, 4, 3)),
    "float64": (lambda: LSTM(3, 20, dtype=torch.float64), (7, 4, 3)),
    "Forecaster": (lambda: Forecaster(3, 20, 2), (4, 7, 3)),
    "Chain": (chain, (4, 7, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_second_call_runs_on_packed_weights_with_the_same_bits(name, monkeypatch):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().eval()
    x = torch.randn(shape, dtype=next(model.parameters()).dtype)
    expected = plain_answer(model, x)
    found = packed_calls(monkeypatch)
    with torch.no_grad():
        answers = [model(x)]
        assert found and all(image is None for image in found)
        found.clear()
        answers += [model(x), model(x)]
    assert [image is None for image in found] == [False, False]
    assert all(equal(answer, expected) for answer in answers)
    with torch.inference_mode():
        assert equal(model(x), expected)


def test_a_given_state_is_carried():
    torch.manual_seed(0)
    model = LSTM(3, 20, 2).eval()
    x = torch.randn(9, 4, 3)
    with torch.no_grad():
        whole, end = model(x)
        first, state = model(x[:4])
        kept = [part.clone() for part in state]
        second, last = model(x[4:], state)
    assert equal(torch.cat([first, second]), whole) and equal(last, end)
    assert equal(state, kept), "the state that was given is left as it was"


def write_through_data(model: LSTM) -> None:
    model.weight_hh_l0.data[3, 5] += 0.5  # torch's version counter does not see it


def swap_rows(model: LSTM) -> None:
    rows = model.weight_ih_l0.data
    rows[[0, 20]] = rows[[20, 0]]


def optimiser_step(model: LSTM) -> None:
    with torch.enable_grad():
        model(torch.ones(2, 1, 3))[0].sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def other_parameter(model: LSTM) -> None:
    model.bias_hh_l0 = nn.Parameter(model.bias_hh_l0.detach() + 1)


def no_longer_finite(model: LSTM) -> None:
    model.weight_ih_l0.data[0, 0] = torch.nan


CHANGES = [
    write_through_data,
    swap_rows,
    optimiser_step,
    other_parameter,
    no_longer_finite,
    lambda model: model.load_state_dict(LSTM(3, 20).state_dict()),
    lambda model: model.reset_parameters(),
    lambda model: prune.l1_unstructured(model, "weight_hh_l0", 0.5),
    lambda model: parametrizations.weight_norm(model, "weight_hh_l0"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(change):
    torch.manual_seed(0)
    model = LSTM(3, 20).eval()
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        before = [model(x)[0] for _ in range(3)][-1]
        change(model)
        after = [model(x)[0] for _ in range(3)]
    expected = plain_answer(model, x)[0].detach()
    assert not torch.equal(before, expected)
    for answer in after:
        assert torch.equal(answer.isnan(), expected.isnan())
        assert torch.equal(answer.nan_to_num(), expected.nan_to_num())


def test_a_changed_scaling_head_or_layer_of_a_chain_is_noticed():
    torch.manual_seed(0)
    model = chain().eval()
    x = torch.randn(4, 7, 3)

    def agrees() -> bool:
        with torch.no_grad():
            return all(torch.equal(model(x), plain_answer(model, x)) for _ in range(3))

    assert agrees()
    model.input_scale.mul_(2)
    assert agrees()
    model.heads[0].weight.data.add_(1)
    assert agrees()
    model.lstms[1] = LSTM(9, 5, activation="relu")
    assert agrees()
    model.heads[0] = Dense(5, 2, "relu")
    assert agrees()


def test_what_is_not_the_plain_case_takes_the_other_road(monkeypatch):
    found = packed_calls(monkeypatch)
    model = LSTM(3, 8, 2, dropout=0.5, batch_first=True).eval()
    x = torch.randn(2, 5, 3)
    model(x)  # gradients are on
    with torch.no_grad():
        model.train()(x)  # dropout
        model.eval()(x, None, torch.tensor([5, 2]))
        torch.func.vmap(model)(x.unsqueeze(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what tracing makes constant
            torch.jit.trace(model, x, check_trace=False)
        for wrong in (torch.randn(2, 5, 4), torch.randn(2, 0, 3), torch.randn(2, 5, 3, dtype=torch.float64)):
            with pytest.raises((RuntimeError, ValueError)):
                model(wrong)
    assert all(image is None for image in found)
    hooked = Forecaster(3, 8).eval()
    seen = []
    hooked.lstm.register_forward_hook(lambda *arguments: seen.append(1))
    with torch.no_grad():
        hooked(x), hooked(x), hooked(x)
    assert len(seen) == 3


def test_modules_are_copied_and_freed_without_their_packed_weights():
    model = LSTM(3, 8).eval()
    x = torch.randn(2, 1, 3)
    gc.collect()
    before = len(cellstep.nn.packed._packed)
    with torch.no_grad():
        expected = [model(x) for _ in range(2)][-1]
        twin = copy.deepcopy(model)
        assert equal([twin(x) for _ in range(2)][-1], expected)
    assert len(cellstep.nn.packed._packed) == before + 2
    del model, twin
    gc.collect()
    assert len(cellstep.nn.packed._packed) == before


def test_threads_share_a_module():
    torch.manual_seed(0)
    model = LSTM(3, 20).eval()
    x = torch.randn(5, 2, 3)
    expected = plain_answer(model, x)[0].detach()
    wrong = []

    def call() -> None:
        with torch.no_grad():
            wrong.extend(1 for _ in range(200) if not torch.equal(model(x)[0], expected))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
