"""The training loop: Adam on the mean absolute error, early stopping on the validation windows."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cellstep.nn import Chain
from cellstep.train.data import Float64Array, Task, Windows


@dataclass
class Result:
    """What training came to; errors are mean absolute, in the target's unit."""

    epochs: int
    best_epoch: int
    validation_error: float


def mean_absolute_error(model: Chain, task: Task, windows: Windows) -> float:
    """Of a model on the given windows, in the target's unit."""
    x, y = _tensors(task, windows)
    model.eval()
    with torch.no_grad():
        forecast = torch.cat([model(part) for part in x.split(1024)])
    return float((forecast.squeeze(1) - y).abs().mean())


def fit(
    model: Chain,
    task: Task,
    *,
    epochs: int = 30,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    patience: int = 6,
    seed: int = 0,
    on_batch: Callable[[int, float], None] | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> Result:
    """Train in place, and leave the weights of the epoch with the smallest validation error.

    Sets the model's scaling from the training windows, and its names, window and horizon from the task.

    Args:
        epochs: at most so many; training stops after ``patience`` of them without a better validation error.
        learning_rate: at first; it falls to a twentieth along a cosine over ``epochs``.
        seed: decides the order of the windows.
        on_batch: called with the epoch and the loss of the batch, in standard deviations of the target.
        on_epoch: called with the epoch and its validation error.

    Raises:
        ValueError: the loss is no longer finite.
    """
    x, y = _tensors(task, task.train)
    rows = torch.from_numpy(_training_rows(task))
    model.set_scaling(rows.mean(0), rows.std(0), y.mean().reshape(1), y.std().clamp_min(1e-12).reshape(1))
    model.feature_names, model.output_names = list(task.features), [task.target]
    model.window, model.horizon = task.window, task.horizon

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=learning_rate / 20)
    best_error, best_epoch, best_weights = float("inf"), 0, copy.deepcopy(model.state_dict())
    epoch = 0
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in torch.randperm(len(x), generator=generator).split(batch_size):
            loss = ((model(x[batch]).squeeze(1) - y[batch]) / model.output_scale).abs().mean()
            if not torch.isfinite(loss):
                raise ValueError(f"expected a finite loss; got {loss.item()} in epoch {epoch}; look for outliers")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if on_batch:
                on_batch(epoch, loss.item())
        schedule.step()
        error = mean_absolute_error(model, task, task.validation)
        if on_epoch:
            on_epoch(epoch, error)
        if error < best_error:
            best_error, best_epoch, best_weights = error, epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= patience:
            break
    model.load_state_dict(best_weights)
    model.eval()
    return Result(epoch, best_epoch, best_error)


def _tensors(task: Task, windows: Windows) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(task.inputs(windows)).float()
    return x, torch.from_numpy(task.targets(windows)).float()


def _training_rows(task: Task) -> Float64Array:
    """Every row that some training window sees, once, so that no statistic looks at validation or test alone."""
    steps = torch.arange(1 - task.window, 1)
    ends = torch.from_numpy(task.train.ends)
    seen = torch.unique(ends[:, None] + steps)
    columns = [task.series.names.index(name) for name in task.features]
    rows: Float64Array = task.series.values[seen.numpy()][:, columns]
    return rows
