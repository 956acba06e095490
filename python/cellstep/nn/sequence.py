"""Long sequences: state carried, cut off from its history, and cleared."""

from collections.abc import Iterator

import torch
from torch import Tensor

from cellstep.nn.chain import Chain
from cellstep.nn.lstm import LSTM

State = tuple[Tensor, Tensor]


def reset_state(state: State, mask: Tensor, initial: State | None = None) -> State:
    """A state (h, c), (layers, N, size) each, with the rows of ``mask`` (N, bool) put to ``initial``, or to zero."""
    rows = mask.to(torch.bool).view(1, -1, 1)
    h, c = initial if initial is not None else (torch.zeros_like(part) for part in state)
    return torch.where(rows, h, state[0]), torch.where(rows, c, state[1])


def truncated_bptt(
    model: LSTM | Chain, sequence: Tensor, chunk: int, state: State | None = None
) -> Iterator[tuple[Tensor, State]]:
    """Run a long sequence in chunks, the state carried from one to the next but no gradient (Williams and Peng 1990).

    >>> for output, _ in truncated_bptt(model, sequence, 100):
    ...     loss(output).backward()

    Args:
        model: an LSTM, or a chain, which answers every step.
        sequence: as the model takes it; a chain takes (N, T, input_size).
        chunk: steps at a time; the last chunk has what is left.
        state: to begin with; the initial one if not given.

    Yields:
        The output of each chunk, and the detached state behind it.

    Raises:
        ValueError: ``chunk`` is no positive number of steps.
    """
    if chunk < 1:
        raise ValueError(f"expected a chunk of at least one step; got {chunk}; choose the steps to go back")
    time = 1 if isinstance(model, Chain) or (model.batch_first and sequence.dim() == 3) else 0
    for part in sequence.split(chunk, time):
        if isinstance(model, Chain):
            output, state = model.run(part, model.initial_state(part.size(0)) if state is None else state)
        else:
            output, state = model(part, state)[:2]
        state = state[0].detach(), state[1].detach()
        yield output, state
