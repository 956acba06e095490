"""Training a forecaster on a time series: windows, scaling, the loop, and forecasts to beat."""

from cellstep.train.baselines import baseline_errors
from cellstep.train.data import Series, Task, Windows, load_series, load_task, sample_path
from cellstep.train.loop import Result, fit, mean_absolute_error

__all__ = [
    "Result",
    "Series",
    "Task",
    "Windows",
    "baseline_errors",
    "fit",
    "load_series",
    "load_task",
    "mean_absolute_error",
    "sample_path",
]
