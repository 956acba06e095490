"""Write the two headers of the firmware: the model as a C array, and steps of the sample series to run it on.

    python make_headers.py MODEL DIRECTORY [STEPS]

MODEL is a .cellstep file, or what cellstep.export takes, such as the .safetensors of `cellstep train`.
"""

import csv
import sys
from pathlib import Path

import cellstep
from cellstep.exporters import load_model
from cellstep.exporters.header import header_text
from cellstep.train import sample_path


def sample_series(steps):
    """The first steps of the sample series, as texts: columns behind the time."""
    with open(sample_path, newline="") as file:
        rows = list(csv.reader(file))
    return [row[1:] for row in rows[1 : 1 + steps]]


def series_header(rows):
    lines = [f"    {{{', '.join(f'{float(value)!r}f' for value in row)}}}," for row in rows]
    return "\n".join(
        [
            "/* Steps of the sample series. Made by make_headers.py. */",
            f"enum {{ SERIES_STEPS = {len(rows)}, SERIES_SIZE = {len(rows[0])} }};",
            "static const float series[SERIES_STEPS][SERIES_SIZE] = {",
            *lines,
            "};\n",
        ]
    )


def main():
    if len(sys.argv) not in (3, 4):
        sys.exit(f"usage: {Path(sys.argv[0]).name} MODEL DIRECTORY [STEPS]")
    model, directory = Path(sys.argv[1]), Path(sys.argv[2])
    directory.mkdir(parents=True, exist_ok=True)
    header = directory / "forecaster.h"
    if model.suffix == ".cellstep":
        header.write_text(header_text(model.read_bytes(), header.stem))
    else:
        cellstep.export(load_model(model), header)
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 48
    (directory / "series.h").write_text(series_header(sample_series(steps)))


if __name__ == "__main__":
    main()
