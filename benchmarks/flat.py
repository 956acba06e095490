"""Whether a call takes as long on a sequence length that was never seen as on one that was."""

import random
import time
from pathlib import Path

import numpy as np
import ours
import torch
from cases import Case, quiet
from rows import Result, Row, Timing


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * 4096


def measure_flat(row: Row, quick: bool) -> Result:
    """Every length once, each side in turn, and then the same lengths again: the second time they are known.

    ``timings`` are those of the new lengths. ``extra`` has, by side, the median when the lengths are known, how many
    times as long a new one takes, and the megabytes by which the process grew while the new ones came.
    """
    case = Case(row)
    lengths = list(range(row.time // 2, row.time // 2 + (50 if quick else 400)))
    random.Random(0).shuffle(lengths)
    longest = torch.randn(1, max(lengths), row.inputs, generator=torch.Generator().manual_seed(1))
    sides = {"cellstep eager": ours.layer(case), "torch.nn.LSTM": case.copy()}
    result = Result(row.name, way="cellstep eager")
    times: dict[str, list[list[float]]] = {name: [] for name in sides}
    grown = dict.fromkeys(sides, 0)
    firsts = {}
    with torch.inference_mode(), quiet():
        for name, module in sides.items():
            begin = time.perf_counter_ns()
            module(case.x)
            firsts[name] = (time.perf_counter_ns() - begin) * 1e-3
            case.check(module(case.x)[0].double().numpy(), "float32")
        # Memory first, one side after the other; what is timed after that has lengths that are new again.
        for name, module in sides.items():
            module(longest)
            before = resident_bytes()
            for length in lengths:
                module(longest[:, :length])
            grown[name] = resident_bytes() - before
        fresh = [length + max(lengths) for length in lengths]
        longest = torch.randn(1, max(fresh), row.inputs, generator=torch.Generator().manual_seed(1))
        for _ in range(2):
            passed: dict[str, list[float]] = {name: [] for name in sides}
            for length in fresh:
                x = longest[:, :length]
                for name, module in sides.items():
                    begin = time.perf_counter_ns()
                    module(x)
                    passed[name].append((time.perf_counter_ns() - begin) * 1e-3)
            for name in sides:
                times[name].append(passed[name])
    for name, (new, known) in times.items():
        median, p99, p999 = np.percentile(new, [50, 99, 99.9])
        result.timings[name] = Timing(float(median), float(p99), float(p999), firsts[name], len(new))
        result.extra[f"{name}: us at known lengths"] = float(np.median(known))
        result.extra[f"{name}: times as long at a new length"] = float(np.median(np.divide(new, known)))
        result.extra[f"{name}: MB grown over {len(lengths)} lengths"] = grown[name] / 1e6
    new = {name: times[name][0] for name in sides}
    result.ratios["torch.nn.LSTM"] = float(np.median(np.divide(new["torch.nn.LSTM"], new["cellstep eager"])))
    return result
