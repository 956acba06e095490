"""cellstep's ways of running a row."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import Case, Way
from peers import inference

import cellstep
from cellstep.nn import LSTM, Chain
from cellstep.runtime import Session

Builder = Callable[[Case], Way]


def layer(case: Case, dtype: torch.dtype = torch.float32) -> LSTM:
    return case.fill(LSTM(**case.sizes, batch_first=True, dtype=dtype)).eval()


def eager(case: Case) -> Way:
    if case.row.dtype != "float32":
        return inference(low_precision(case), case.x, case.row.dtype)
    return inference(layer(case), case.x)


def packed(case: Case) -> Way:
    return inference(layer(case), case.packed(case.x))


def lengths(case: Case) -> Way:
    module = layer(case)
    return inference(lambda x: module(x, None, case.lengths), case.x)


def low_precision(case: Case) -> Any:
    """The stack in the row's type, its activations calibrated on the input."""
    if not hasattr(cellstep, "quantize"):
        raise NotImplementedError("cellstep.quantize does not exist yet")
    return cellstep.quantize(chain(case), case.row.dtype, calibration=case.x)


def chain(case: Case, answers: str = "every") -> Chain:
    return Chain(layer(case), answers=answers).eval()


def session(case: Case) -> Way:
    """The torch-free runtime, from the initial state in every call."""
    model = chain(case) if case.row.dtype == "float32" else low_precision(case)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.cellstep"
        cellstep.export(model, path)
        runner = Session(path)
    x = case.x[0].numpy()
    run, first = (runner.step, x[0]) if case.row.time == 1 else (runner.run, x)

    def call() -> Any:
        runner.reset()
        return run(first)

    return Way(call, lambda y: np.asarray(y, np.float64).reshape(case.truth.shape), case.row.dtype)


def ways(case: Case) -> dict[str, Builder]:
    """By name."""
    if case.row.packed:
        return {"cellstep packed": packed, "cellstep lengths": lengths}
    if case.row.batch == 1:
        return {"cellstep Session": session, "cellstep eager": eager}
    return {"cellstep eager": eager}
