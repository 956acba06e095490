"""How much code and memory the runtime takes on each target: a table on paper, and benchmarks/results/sizes.json.

    python scripts/sizes.py [RESULTS]

Code is counted on linked images, of which nothing that is not called is part. For the Cortex-M it is the firmware of
examples/firmware without its output: vector table, start-up, main, loader, engine, and what of the compiler's and C
libraries they call, less the arrays that hold the model and the series. For the others it is the same program
without start-up and C library. All is compiled for size (-Os). Two builds: "small" has float32 weights and plain layers
alone and no texts of errors (CELLSTEP_FLOAT32_ONLY, CELLSTEP_PLAIN_ONLY, CELLSTEP_NO_TEXTS); "full" leaves nothing out.
Memory is a session's, as cellstep_memory_required says on the target; a model's handle of 64 bytes and the stack are
beside it. Instructions per step are counted by the emulator (-icount shift=0).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import cellstep
from cellstep.nn import Forecaster

ROOT = Path(__file__).parents[1]
FIRMWARE = ROOT / "examples/firmware"
SMALL = ["-DCELLSTEP_FLOAT32_ONLY", "-DCELLSTEP_PLAIN_ONLY", "-DCELLSTEP_NO_TEXTS"]
BUILDS = {"small": SMALL, "full": []}
#: inputs, units, layers
MODELS = {"10-50-50": (10, 50, 2), "1-16": (1, 16, 1)}
CORTEX_M = {
    "Cortex-M0+": "m0plus",
    "Cortex-M4F": "m4f",
    "Cortex-M7": "m7",
    "Cortex-M33": "m33",
    "Cortex-M55 (Helium)": "m55",
}
ZIG = [sys.executable, "-m", "ziglang"]
WASI = ["-target", "wasm32-wasi", "-mcpu=generic+simd128+bulk_memory", "-fno-sanitize=undefined"]
#: C++ and C compilers, their options, size, and what runs a program.
HOSTED = {
    "Cortex-A53": (
        ["aarch64-linux-gnu-g++"],
        ["aarch64-linux-gnu-gcc"],
        ["-mcpu=cortex-a53"],
        "aarch64-linux-gnu-size",
        ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"],
    ),
    "x86-64": (["g++"], ["gcc"], [], "size", []),
    "WebAssembly (SIMD)": ([*ZIG, "c++"], [*ZIG, "cc"], WASI, None, None),
}
COMMON = ["-Os", "-ffunction-sections", "-fdata-sections", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables"]
CXX = ["-std=c++17", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics", "-fno-math-errno", "-fno-trapping-math"]
MEMORY = """\
#include <stdio.h>
#include "cellstep.h"
#include "forecaster.h"
static uint64_t handle[CELLSTEP_MODEL_BYTES / 8];
int main(void) {
    cellstep_model* model;
    if (cellstep_model_init(handle, sizeof(handle), forecaster_model, forecaster_model_size, 0, &model)) return 1;
    printf("memory %u\\n", (unsigned)cellstep_memory_required(model));
    return 0;
}
"""
NODE = """\
const { WASI } = require('node:wasi');
const wasi = new WASI({ version: 'preview1' });
const file = require('node:fs').readFileSync(process.argv[1]);
WebAssembly.instantiate(file, { wasi_snapshot_preview1: wasi.wasiImport }).then(({ instance }) => wasi.start(instance));
"""
KNOWN = """\
Beside it, of others: Plumerai publishes, for the Cortex-M4, 3 to 5.5 times the speed of TFLite Micro with CMSIS-NN and
2.5 KiB of RAM for its bidirectional LSTM; the chain of functions of CMSIS-NN's int8 LSTM is some 3 KB of code."""


def call(*command, directory=None):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=directory, env=environment())
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return done.stdout


def environment():
    package = str(Path(cellstep.__file__).parents[1])
    return os.environ | {"PYTHONPATH": package}


def sections(text):
    """Bytes of each section in what `size -A` prints."""
    return {name: int(size) for name, size in re.findall(r"^(\.\S+)\s+(\d+)\s+\d+$", text, re.M)}


def arrays(directory):
    """Bytes of the model and of the series, which are no code."""
    words = int(re.search(r"forecaster_model\[(\d+)\]", (directory / "forecaster.h").read_text())[1])
    series = re.search(r"SERIES_STEPS = (\d+), SERIES_SIZE = (\d+)", (directory / "series.h").read_text())
    return 4 * (words + int(series[1]) * int(series[2]))


def firmware(core, options, model, directory):
    """Code, session memory and instructions per step of one of the Cortex-M."""
    settings = [f"CORE={core}", f"MODEL={model}", f"BUILD={directory}", f"OPTIONS={' '.join(options)}"]
    settings.append(f"PYTHON={sys.executable}")
    call("make", "-s", "all", *settings, directory=FIRMWARE)
    found = sections(call("arm-none-eabi-size", "-A", directory / "firmware.elf"))
    output = call("make", "-s", "run", *settings, directory=FIRMWARE)
    return {
        "code": found[".text"] + found.get(".data", 0) + found.get(".ARM.exidx", 0) - arrays(directory),
        "memory": int(re.search(r"memory (\d+)", output)[1]),
        "instructions": int(re.search(r"instructions per step (\d+)", output)[1]),
    }


def wasm_sections(data):
    """Bytes of the code and data sections of a WebAssembly module."""
    sizes, at = {}, 8
    while at < len(data):
        kind, length, shift = data[at], 0, 0
        at += 1
        while True:
            byte = data[at]
            at += 1
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        sizes[kind] = sizes.get(kind, 0) + length
        at += length
    return sizes.get(10, 0), sizes.get(11, 0)


def hosted(name, options, model, directory):
    """Code and session memory of a target with an operating system."""
    cxx, c, machine, size, runner = HOSTED[name]
    directory.mkdir()
    call(sys.executable, FIRMWARE / "make_headers.py", model, directory)
    call(sys.executable, ROOT / "scripts/amalgamate.py", directory)
    (directory / "memory.c").write_text(MEMORY)
    flags = [*machine, *COMMON, *options, "-I", directory]
    library, program, image = (directory / file for file in ("cellstep.o", "main.o", "image"))
    call(*cxx, *CXX, *flags, "-c", directory / "cellstep.cpp", "-o", library)
    call(*c, *flags, "-Dmain=entry", "-fvisibility=default", "-c", FIRMWARE / "main.c", "-o", program)
    link = ["-nostartfiles", "-Wl,--gc-sections", program, library, "-o", image]
    if size:
        call(*c, *machine, "-no-pie", "-Wl,-e,entry", *link)
        found = sections(call(size, "-A", image))
        code = sum(found.get(part, 0) for part in (".text", ".rodata", ".data", ".data.rel.ro")) - arrays(directory)
    else:
        call(*c, *machine, "-Os", "-Wl,--no-entry", "-Wl,--export=entry", "-Wl,-s", *link)
        code = sum(wasm_sections(image.read_bytes())) - arrays(directory)
    call(*c, *flags, directory / "memory.c", library, "-o", directory / "memory")
    if runner is None:
        output = call("node", "--no-warnings", "-e", NODE, directory / "memory")
    else:
        output = call(*runner, directory / "memory")
    return {"code": code, "memory": int(re.search(r"memory (\d+)", output)[1])}


def measure(directory):
    models = {}
    for name, (inputs, units, layers) in MODELS.items():
        torch.manual_seed(0)
        models[name] = directory / f"{name}.cellstep"
        cellstep.export(Forecaster(inputs, units, layers, 1).eval(), models[name])
    results = {}
    for target in [*CORTEX_M, *HOSTED]:
        tool = "arm-none-eabi-g++" if target in CORTEX_M else HOSTED[target][0][0]
        if not shutil.which(tool):
            print(f"{target}: no {tool} on this machine, left out", file=sys.stderr)
            continue
        results[target] = {}
        for build, options in BUILDS.items():
            for name, model in models.items():
                place = directory / f"{target}-{build}-{name}".replace(" ", "-").replace("(", "").replace(")", "")
                if target in CORTEX_M:
                    found = firmware(CORTEX_M[target], options, model, place)
                else:
                    found = hosted(target, options, model, place)
                results[target].setdefault(build, {"code": found["code"]})[name] = {
                    key: value for key, value in found.items() if key != "code"
                }
    return results


def table(results):
    lines = [
        "| target | code, small | code, full | session 10→50→50 | session 1→16 | instructions/step 10→50→50 | 1→16 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for target, of in results.items():
        small = of["small"]
        cells = [f"{small['code']:,}", f"{of['full']['code']:,}"]
        cells += [f"{small[name]['memory']:,}" for name in MODELS]
        cells += [f"{small[name]['instructions']:,}" if "instructions" in small[name] else "" for name in MODELS]
        lines.append(f"| {target} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    results_path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks/results/sizes.json"
    with tempfile.TemporaryDirectory() as directory:
        results = measure(Path(directory))
    results_path.parent.mkdir(parents=True, exist_ok=True)
    results_path.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(f"\nBytes. {KNOWN}")


if __name__ == "__main__":
    main()
