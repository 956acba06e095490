"""Start-up and memory: a process that loads a model and answers one window, beside torch with the same model.

    python benchmarks/startup.py [--runs N]

Each way runs in fresh processes, interleaved, and the least of all runs counts; time from the first import to the
answer, without the start of the interpreter itself, and the most memory that the process held.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS, INPUTS = 48, 10

_FRAME = """
import time
begin = time.perf_counter()
import sys
path = sys.argv[1]
{body}
end = time.perf_counter()
import json, resource
try:  # what getrusage says begins with what the parent held
    most = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
except OSError:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([(end - begin) * 1e3, most / 2**20]))
"""

#: Name of a way: suffix of its artifact, and what it runs.
WAYS = {
    "cellstep.runtime, buffers": (
        ".cellstep",
        f"""
import array
from cellstep.runtime import Session
x, y = memoryview(bytes({4 * STEPS * INPUTS})).cast("f", ({STEPS}, {INPUTS})), array.array("f", [0])
Session(path).forecast(x, out=y)
""",
    ),
    "cellstep.runtime, NumPy": (
        ".cellstep",
        f"""
import numpy
from cellstep.runtime import Session
Session(path).forecast(numpy.zeros(({STEPS}, {INPUTS}), numpy.float32))
""",
    ),
    "NumPy alone": (".cellstep", "import numpy"),
    "torch, .pt on its own operators": (
        ".pt",
        f"""
import torch
with torch.no_grad():
    torch.jit.load(path)(torch.zeros(1, {STEPS}, {INPUTS}))
""",
    ),
}


def run(way: str, path: Path) -> tuple[float, float]:
    """Milliseconds and MiB of one process."""
    code = _FRAME.format(body=WAYS[way][1])
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=True)
    time, memory = json.loads(done.stdout)
    return time, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10, help="processes of each way")
    runs = parser.parse_args().runs

    import torch

    import cellstep
    from cellstep.nn import Forecaster

    torch.manual_seed(0)
    model = Forecaster(INPUTS, 50, 2).eval()
    with tempfile.TemporaryDirectory() as directory:
        paths = {suffix: Path(directory) / f"model{suffix}" for suffix in (".cellstep", ".pt")}
        cellstep.export(model, paths[".cellstep"])
        cellstep.export(model, paths[".pt"], standalone=True)
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(runs):
            for way, measured in found.items():
                measured.append(run(way, paths[WAYS[way][0]]))
    least = {way: tuple(map(min, zip(*measured, strict=True))) for way, measured in found.items()}
    torch_time, torch_memory = least["torch, .pt on its own operators"]
    print("| first answer of a fresh process | ms | of torch's | MiB | of torch's |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for way, (time, memory) in least.items():
        print(f"| {way} | {time:.1f} | {time / torch_time:.3f} | {memory:.1f} | {memory / torch_memory:.3f} |")


if __name__ == "__main__":
    main()
