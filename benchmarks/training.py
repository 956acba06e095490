"""Training steps: forward, backward and Adam, ours and torch.nn.LSTM's."""

from collections.abc import Callable
from typing import Any

import ours
import torch
from cases import GRADIENT_TOLERANCE, Case, Way, Wrong, quiet
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Builder = Callable[[Case], Way]


def _step(case: Case, module: nn.Module, target: Tensor, outputs: Callable[[], Tensor]) -> Way:
    """A step whose gradients are checked here; ``outputs`` gives values to compare with ``target``."""
    tokens = int(case.lengths.sum())

    def backward() -> None:
        loss = (outputs() - target).square().sum() / tokens
        loss.backward()

    with quiet():
        backward()
    check_gradients(case, module)
    # The fused one on both sides, the fastest that torch has. At a rate of 0 it does the same arithmetic, and the
    # answer can be checked behind it.
    optimizer = torch.optim.Adam(module.parameters(), lr=0.0, fused=True)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        backward()
        optimizer.step()

    def answer(_: object) -> Any:
        with torch.no_grad():
            y = outputs()
        full = torch.zeros(case.truth.shape, dtype=torch.float64)
        if y.dim() == 2:
            y = torch.nn.utils.rnn.pad_packed_sequence(_like(case.packed(full), y), batch_first=True)[0]
        return y.double().numpy()

    return Way(call, answer, case.row.dtype)


def _like(packed: PackedSequence, data: Tensor) -> PackedSequence:
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def check_gradients(case: Case, module: nn.Module) -> None:
    """Against torch's in float64. Wrong if one is past the tolerance."""
    reference = case.copy(torch.float64).train()
    x, target = case.x.double(), case.target.double()
    if case.row.packed:
        y, target = reference(case.packed(x))[0].data, case.packed(target).data
    else:
        with quiet():
            y = reference(x)[0]
    ((y - target).square().sum() / int(case.lengths.sum())).backward()
    most = GRADIENT_TOLERANCE[case.row.dtype]
    for name, parameter in reference.named_parameters():
        found = module.get_parameter(name).grad
        if found is None:
            raise Wrong(f"wrong gradient: {name} has none")
        error = float((found.double() - parameter.grad).abs().max() / parameter.grad.abs().max())
        if not error <= most:
            raise Wrong(f"wrong gradient: expected an error of at most {most:g} in {name}; got {error:.3g}")


def _prepared(case: Case, module: nn.Module) -> Way:
    dtype = getattr(torch, case.row.dtype)
    x, target = case.x.to(dtype), case.target.to(dtype)
    if case.row.packed:
        sequence = case.packed(x)
        return _step(case, module, case.packed(target).data, lambda: module(sequence)[0].data)
    return _step(case, module, target, lambda: module(x)[0])


def torch_step(case: Case) -> Way:
    return _prepared(case, case.copy(getattr(torch, case.row.dtype)).train())


def cellstep_step(case: Case) -> Way:
    return _prepared(case, ours.layer(case, getattr(torch, case.row.dtype)).train())


def cellstep_lengths(case: Case) -> Way:
    """Padded input and lengths in place of a PackedSequence; outputs and targets past the end of a row are zero."""
    module = ours.layer(case).train()
    inside = torch.arange(case.row.time).unsqueeze(0) < case.lengths.unsqueeze(1)
    target = case.target * inside.unsqueeze(2)
    return _step(case, module, target, lambda: module(case.x, None, case.lengths)[0])


def training_ways(case: Case) -> dict[str, Builder]:
    return (
        {"cellstep packed": cellstep_step, "cellstep lengths": cellstep_lengths}
        if case.row.packed
        else {"cellstep eager": cellstep_step}
    )


def training_peers(case: Case) -> dict[str, Builder]:
    return {"torch.nn.LSTM": torch_step}
