"""Series, the windows cut from them, and how these are split into training, validation and test."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellstep.table import parse_number, read_cells

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]

#: The series that comes with the package; its README says where it is from.
sample_path = Path(__file__).parent.parent / "data" / "sand_point_tmy3.csv"


@dataclass
class Series:
    """Columns over time. ``segment`` numbers the stretches between gaps; ``times`` is None without a time column."""

    path: str
    names: list[str]
    values: Float64Array  # (rows, columns)
    segment: IntArray  # (rows)
    times: NDArray[np.datetime64] | None

    @property
    def steps_per_day(self) -> int:
        """Steps of a day by the time column; 24 without one, as if hourly."""
        if self.times is None:
            return 24
        return max(1, round(np.timedelta64(1, "D") / _usual_step(self.times)))


@dataclass
class Windows:
    """Windows by the row that each ends on."""

    ends: IntArray  # (windows)

    def __len__(self) -> int:
        return len(self.ends)


@dataclass
class Task:
    """Forecast ``target`` ``horizon`` steps ahead from the last ``window`` steps of ``features``."""

    series: Series
    features: list[str]
    target: str
    window: int
    horizon: int
    train: Windows
    validation: Windows
    test: Windows

    def inputs(self, windows: Windows, length: int | None = None) -> Float64Array:
        """(windows, length, features); length is the task's window unless given."""
        steps = np.arange(1 - (length or self.window), 1)
        columns = [self.series.names.index(name) for name in self.features]
        inputs: Float64Array = self.series.values[windows.ends[:, None] + steps][:, :, columns]
        return inputs

    def targets(self, windows: Windows) -> Float64Array:
        """(windows): the value to forecast."""
        return self.target_values()[windows.ends + self.horizon]

    def target_values(self) -> Float64Array:
        """(rows): the target's column."""
        return self.series.values[:, self.series.names.index(self.target)]


def load_series(path: str | os.PathLike[str]) -> Series:
    """Read a CSV file: a first column of ISO 8601 times, if there is one, and every column of numbers.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no column of numbers, or a number column with a cell that is none.
    """
    cells = read_cells(path)
    if not cells.rows:
        raise ValueError(f"expected data rows; '{cells.path}' has none; check the file")
    times = _times([row[0] for row in cells.rows])
    # A column counts as numbers if its first cell is one, so that a single bad cell is an error and not a lost column.
    names = [
        name
        for place, name in enumerate(cells.header)
        if (place or times is None) and parse_number(cells.rows[0][place]) is not None
    ]
    if not names:
        raise ValueError(f"expected at least one column of numbers; '{cells.path}' has none; check the file")
    segment = np.zeros(len(cells.rows), np.int64)
    if times is not None and len(times) > 1:
        segment[1:] = np.cumsum(np.diff(times) != _usual_step(times))
    return Series(cells.path, names, cells.numbers(names), segment, times)


def load_task(
    series: Series, target: str, features: Sequence[str] | None = None, window: int = 48, horizon: int = 3
) -> Task:
    """Cut a series into windows that cross no gap, and split them.

    With a time column over two months or more, the day of the month of the target decides: 1 to 20 train, 21 to 24
    validate, 25 and later test. Otherwise the first 70% train, the next 15% validate and the rest test, with windows
    left out where two parts would share a row.

    Raises:
        ValueError: a column is unknown, or there are too few rows.
    """
    columns = list(features) if features else list(series.names)
    for name in [target, *columns]:
        if name not in series.names:
            raise ValueError(
                f"expected columns of numbers out of {', '.join(series.names)}; '{name}' is not among those of "
                f"'{series.path}'; name one of them"
            )
    for label, value in (("window", window), ("horizon", horizon)):
        if value < 1:
            raise ValueError(f"expected a {label} of at least 1; got {value}")
    ends = np.arange(window - 1, len(series.values) - horizon)
    ends = ends[series.segment[ends - window + 1] == series.segment[ends + horizon]]
    if len(ends) == 0:
        raise ValueError(
            f"expected at least {window + horizon} rows without a gap for a window of {window} and a horizon of "
            f"{horizon}; '{series.path}' has no such stretch; take a shorter window"
        )
    parts = _split(series, ends, window, horizon)
    for name, part in zip(("training", "validation", "test"), parts, strict=True):
        if len(part) == 0:
            raise ValueError(f"expected windows for {name}; '{series.path}' leaves none; give more rows")
    return Task(series, columns, target, window, horizon, *(Windows(part) for part in parts))


def _split(series: Series, ends: IntArray, window: int, horizon: int) -> tuple[IntArray, IntArray, IntArray]:
    if series.times is not None:
        months = len(np.unique(series.times.astype("datetime64[M]")))
        if months >= 2:
            at = series.times[ends + horizon]
            day = (at.astype("datetime64[D]") - at.astype("datetime64[M]")).astype(np.int64) + 1
            return ends[day <= 20], ends[(day > 20) & (day < 25)], ends[day >= 25]
    first, second = (int(len(series.values) * share) for share in (0.70, 0.85))
    begins, targets = ends - window + 1, ends + horizon
    return (
        ends[targets < first],
        ends[(begins >= first) & (targets < second)],
        ends[begins >= second],
    )


def _times(cells: list[str]) -> NDArray[np.datetime64] | None:
    if parse_number(cells[0]) is not None:
        return None
    try:
        return np.array([np.datetime64(cell.strip().replace(" ", "T"), "s") for cell in cells])
    except ValueError:
        return None


def _usual_step(times: NDArray[np.datetime64]) -> np.timedelta64:
    steps, counts = np.unique(np.diff(times), return_counts=True)
    step: np.timedelta64 = steps[counts.argmax()]
    return step
