"""Forecasts that cost nothing, which a trained model has to beat."""

import numpy as np

from cellstep.train.data import Float64Array, Task, Windows


def baseline_errors(task: Task) -> dict[str, float]:
    """Mean absolute error on the test windows, in the target's unit, of three plain forecasts.

    The last value; the value one day before the target; a linear regression (least squares) on one day of all
    features, or on the window where that is shorter. A forecast that would reach past a gap is left out.
    """
    values = task.target_values()
    truth = task.targets(task.test)
    day = task.series.steps_per_day
    errors = {"the last value": _mae(values[task.test.ends], truth)}
    before = task.test.ends + task.horizon - day
    segment = task.series.segment
    if day >= task.horizon and (before >= 0).all() and (segment[before] == segment[task.test.ends]).all():
        errors["the value a day before the target"] = _mae(values[before], truth)
    length = min(day, task.window)
    weights, *_ = np.linalg.lstsq(_design(task, task.train, length), task.targets(task.train), rcond=None)
    errors[f"linear regression on the last {length} steps"] = _mae(_design(task, task.test, length) @ weights, truth)
    return errors


def _design(task: Task, windows: Windows, length: int) -> Float64Array:
    flat = task.inputs(windows, length).reshape(len(windows), -1)
    return np.hstack([flat, np.ones((len(flat), 1))])


def _mae(forecast: Float64Array, truth: Float64Array) -> float:
    return float(np.abs(forecast - truth).mean())
