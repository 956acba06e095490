"""Every kernel on small problems, forwards and backwards, for compute-sanitizer to watch:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python tests/cuda/sanitize.py

Kernels whose weights lie over several blocks run at sizes of both their forms too, clusters and the whole grid. Answers
are compared. Further arguments name the kernels to run; without them all do. Exit code 1: an answer is out of bounds.
2: there is no device.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from problems import KERNELS, Problem, find_target, forced, has, may_refuse, small, takes, wrong

Call = tuple[tuple[int, ...], dict[str, Any]]
SIZES = ((3, 5, 3, 20, 2, 1), (4, 2, 2, 33, 1, 2), (2, 17, 4, 64, 2, 1), (2, 9, 3, 128, 1, 1))
OPTIONS: tuple[dict[str, bool], ...] = ({}, {"lengths": True, "reset": True}, {"packed": True})
#: Past 880 units no cluster holds a layer.
SHARED: tuple[Call, ...] = (
    ((4, 1, 3, 256, 1, 1), {}),
    ((4, 9, 3, 384, 1, 2), {"lengths": True, "reset": True}),
    ((3, 40, 3, 512, 1, 1), {"packed": True}),
    ((4, 3, 3, 1000, 1, 1), {"lengths": True, "reset": True}),
    ((3, 40, 3, 1024, 1, 1), {}),
)


def calls(kernel: str, emulated: bool) -> list[Call]:
    found: list[Call] = [(sizes, options) for sizes in SIZES for options in (OPTIONS if sizes[3] < 40 else OPTIONS[:1])]
    for sizes, options in SHARED if kernel.startswith("cluster") else ():
        found.append(((*sizes[:3], small(sizes[3]), *sizes[4:]) if emulated else sizes, options))
    return found


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    target = find_target(name)
    if isinstance(target, str):
        print(f"error: expected the target {name!r} of cuda and emulated; {target}", file=sys.stderr)
        return 2
    if not has(target, "lstm_layers"):
        print("error: expected a library with the operator lstm_layers; this one was built without it", file=sys.stderr)
        return 2
    failures, ran = 0, 0
    for kernel in sys.argv[2:] or KERNELS[1:]:
        print(kernel, flush=True)  # so that one that does not end is known
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for sizes, options in calls(kernel, target.emulated):
                if not takes(kernel, dtype, sizes[3], sizes[5]):
                    continue
                problem = Problem(sizes, dtype, target.device, **options)  # type: ignore[arg-type]
                try:
                    with forced(kernel):
                        lines = wrong(target, problem, True)
                except RuntimeError as error:
                    if not may_refuse(problem, error):
                        raise
                    print(f"{kernel}, {dtype}, {sizes}: refused")
                    continue
                ran += 1
                failures += bool(lines)
                for line in lines:
                    print(f"{kernel}, {dtype}, {sizes}, {options}: {line}")
    print(f"{ran} problems, {failures} wrong")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
