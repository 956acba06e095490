"""Whether a call takes as long on a sequence length that was never seen as on one that was."""

import random
import time
from functools import partial
from pathlib import Path

import numpy as np
import ours
import torch
from cases import Case, quiet
from rows import Result, Row
from timing import Samples, no_collection, time_calls


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * 4096


def measure_flat(row: Row, quick: bool) -> Result:
    """Every length once, and then the same lengths again: the second time they are known. One side after the other.

    ``timings`` are those of the new lengths. ``extra`` has, by side, the median when the lengths are known, how many
    times as long a new one takes, and the megabytes by which the process grew while the new ones came.
    """
    case = Case(row)
    least = row.time // 2
    lengths = [length for length in range(least, least + (50 if quick else 400)) if length != row.time]
    random.Random(0).shuffle(lengths)
    # Warmed up on the longest, so that memory which grows with the length is there before it is counted.
    longest = torch.randn(1, max(lengths) + 1, row.inputs, generator=torch.Generator().manual_seed(1))
    sides = {"cellstep eager": ours.layer(case), "torch.nn.LSTM": case.copy()}
    result = Result(row.name, way="cellstep eager")
    with torch.inference_mode(), quiet():
        for name, module in sides.items():
            begin = time.perf_counter_ns()
            y, _ = module(case.x)
            first = time.perf_counter_ns() - begin
            case.check(y.double().numpy(), "float32")
            module(longest)
            before = resident_bytes()
            new = _pass(module, longest, lengths)
            grown = resident_bytes() - before
            known = _pass(module, longest, lengths)
            result.timings[name] = Samples(first, new).timing()
            result.extra[f"{name}: us at known lengths"] = float(np.median(known)) * 1e-3
            result.extra[f"{name}: times as long at a new length"] = float(np.median(np.divide(new, known)))
            result.extra[f"{name}: MB grown over {len(lengths)} lengths"] = grown / 1e6
    medians = [timing.median for timing in result.timings.values()]
    result.ratios["torch.nn.LSTM"] = medians[1] / medians[0]
    return result


def _pass(module: torch.nn.Module, longest: torch.Tensor, lengths: list[int]) -> list[int]:
    """Nanoseconds of one call for each length."""
    times = []
    with no_collection():
        for length in lengths:
            times += time_calls(partial(module, longest[:, :length]), 1)
    return times
