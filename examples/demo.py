"""The whole road in one go: train on the sample series, export, run everywhere, compare, draw.

Usage: python examples/demo.py OUTPUT_DIRECTORY
"""

import subprocess
import sys
from pathlib import Path

from cellstep.train import sample_path

directory = Path(sys.argv[1])
directory.mkdir(parents=True, exist_ok=True)
model = directory / "forecaster.safetensors"
torchscript = directory / "forecaster.pt"
deploy = directory / "forecaster.cellstep"


def call(*command: object) -> None:
    print("\n$", *command, flush=True)
    program = Path(sys.executable).parent / str(command[0])
    subprocess.run([program, *map(str, command[1:])], check=True)


call("cellstep", "train", "--output", model, "--plot", directory / "forecast.png")
call("cellstep", "export", model, torchscript, deploy)
call("cellstep", "info", deploy)
call("cellstep", "run", torchscript, sample_path, "--output", directory / "python.csv", "--repeat", 1000)
call("cellstep-run", torchscript, sample_path, "--output", directory / "libtorch.csv", "--repeat", 1000)
call("cellstep-embed", deploy, sample_path, "--output", directory / "embedded.csv", "--repeat", 1000)
call("cellstep", "verify", model, torchscript, deploy)
print(f"\nForecasts and the plot are in {directory}/.")
