"""CSV in and out, with errors that name the file, the line and the column."""

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class Cells:
    """The text of a CSV file: RFC 4180, a header line first, blank lines passed over."""

    path: str
    header: list[str]
    rows: list[list[str]]
    lines: list[int]

    def column(self, name: str) -> int:
        """Where a column stands. ValueError if it is not there or there twice."""
        if self.header.count(name) > 1:
            raise ValueError(f"expected column '{name}' once; '{self.path}' has it twice; rename one")
        return self.header.index(name)

    def numbers(self, names: Sequence[str]) -> NDArray[np.float64]:
        """(rows, columns) of finite numbers. ValueError for a column that is missing or a cell that is no number."""
        missing = [name for name in names if name not in self.header]
        if missing:
            raise ValueError(
                f"expected columns {', '.join(names)}; '{self.path}' lacks {', '.join(missing)}; "
                "add them or rename the columns"
            )
        places = [self.column(name) for name in names]
        values = np.empty((len(self.rows), len(places)))
        for row, (cells, line) in enumerate(zip(self.rows, self.lines, strict=True)):
            for column, place in enumerate(places):
                value = parse_number(cells[place])
                if value is None:
                    raise ValueError(
                        f"expected a finite number in column '{self.header[place]}'; '{self.path}' line {line} has "
                        f"'{cells[place]}'; repair or remove the row"
                    )
                values[row, column] = value
        return values


def parse_number(cell: str) -> float | None:
    """The number in a cell, or None where there is none that float32 can hold."""
    try:
        value = float(cell)
    except ValueError:
        return None
    # Python also takes 1_000, which no other CSV reader does.
    if "_" in cell or not math.isfinite(value) or abs(value) > float(np.finfo(np.float32).max):
        return None
    return value


def read_cells(path: str | os.PathLike[str]) -> Cells:
    """Read a CSV file. OSError if it cannot be read; ValueError if it is empty, ragged or no text."""
    name = os.fspath(path)
    try:
        with open(name, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header: list[str] = []
            rows: list[list[str]] = []
            lines: list[int] = []
            last_line = 0
            for cells in reader:
                line, last_line = last_line + 1, reader.line_num
                if not cells or cells == [""]:
                    continue
                if not header:
                    header = cells
                    continue
                if len(cells) != len(header):
                    raise ValueError(
                        f"expected {len(header)} cells as in the header; '{name}' line {line} has {len(cells)}; "
                        "repair the line"
                    )
                rows.append(cells)
                lines.append(line)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"expected a CSV file in UTF-8; '{name}' is none: {error}; check the file") from None
    if not header:
        raise ValueError(f"expected a header line; '{name}' is empty; check the file")
    return Cells(name, header, rows, lines)


def read_features(path: str | os.PathLike[str], names: Sequence[str], count: int) -> NDArray[np.float32]:
    """The columns that a model needs, (rows, count): by name, or all of them if the model names none."""
    cells = read_cells(path)
    if not names:
        if len(cells.header) != count:
            raise ValueError(
                f"expected {count} columns, as the model names none; '{cells.path}' has {len(cells.header)}; "
                "leave the others out"
            )
        # By place, since nameless columns may share a name.
        cells.header = [f"{place + 1}" for place in range(count)]
        names = cells.header
    return cells.numbers(names).astype(np.float32)


def write_forecasts(
    path: str | os.PathLike[str] | None, rows: Sequence[int], y: NDArray[Any], names: Sequence[str]
) -> None:
    """Write ``row,<names>`` lines to a file, or to standard output if ``path`` is None."""
    columns = list(names) or [f"y{k}" for k in range(y.shape[1])]
    text = ",".join(["row", *(_quoted(name) for name in columns)]) + "\n"
    for row, values in zip(rows, y.tolist(), strict=True):
        text += ",".join([str(row), *("%.9g" % value for value in values)]) + "\n"  # noqa: UP031 (as C prints it)
    if path is None:
        print(text, end="", flush=True)
    else:
        Path(path).write_text(text, encoding="utf-8", newline="")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if any(c in name for c in ',"\r\n') else name
