"""Every kernel on small problems, forwards and backwards, for compute-sanitizer to watch:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python tests/cuda/sanitize.py

Answers are compared too. Exit code 1: one is out of bounds. 2: there is no device.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from problems import KERNELS, Problem, find_target, forced, has, may_refuse, takes, wrong

SIZES = ((3, 5, 3, 20, 2, 1), (4, 2, 2, 33, 1, 2), (2, 17, 4, 64, 2, 1), (2, 9, 3, 128, 1, 1))
OPTIONS: tuple[dict[str, bool], ...] = ({}, {"lengths": True, "reset": True}, {"packed": True})


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
    for kernel in KERNELS[1:]:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for sizes in SIZES:
                for options in OPTIONS if sizes[3] < 40 else OPTIONS[:1]:
                    if not takes(kernel, dtype, sizes[3], sizes[5]):
                        continue
                    problem = Problem(sizes, dtype, target.device, **options)
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
