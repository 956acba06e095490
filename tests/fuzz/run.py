"""Builds the fuzzers and runs both, beginning with the kept inputs; prints what they saw.

    python tests/fuzz/run.py [--seconds N] [--keep]

Needs clang with libFuzzer. New inputs and findings lie in build/fuzz; a finding is an input that ends the program, to
be copied to tests/fuzz/findings once what it found is fixed. ``--keep`` makes the kept inputs anew: the smallest that
reach what all inputs so far reach.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: The longest input; the loader's own seeds are shorter.
LONGEST = {"load": 16384, "session": 2048}
#: Kept inputs are no longer than this, so that the repository stays small.
LONGEST_KEPT = {"load": 2048, "session": 1024}


def compiler() -> list[str] | None:
    """CMake's options for a clang that has libFuzzer, or None where there is none."""
    if sys.platform != "linux" or not (shutil.which("clang") and shutil.which("clang++")):
        return None
    program = '#include <cstddef>\nextern "C" int LLVMFuzzerTestOneInput(const char*, std::size_t) { return 0; }\n'
    command = ["clang++", "-fsanitize=fuzzer,address,undefined", "-x", "c++", "-", "-o", os.devnull]
    if subprocess.run(command, input=program, capture_output=True, text=True).returncode != 0:
        return None
    return ["-DCMAKE_C_COMPILER=clang", "-DCMAKE_CXX_COMPILER=clang++"]


def build(folder: Path) -> None:
    """Both programs in ``folder``; a subprocess.CalledProcessError if they do not compile."""
    options = compiler()
    if options is None:
        raise SystemExit(
            "error: expected clang with libFuzzer; found none; install clang (Debian: clang, libclang-rt-dev)"
        )
    parts = [f"-DCELLSTEP_BUILD_{part}=OFF" for part in ("OPS", "TOOLS", "PYTHON")]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", ROOT, "-B", folder, *generator, "-DCMAKE_BUILD_TYPE=Release"]
    run([*configure, "-DCELLSTEP_BUILD_FUZZERS=ON", *options, *parts])
    run(["cmake", "--build", folder, "--target", "fuzz_load", "fuzz_session", "--parallel", str(os.cpu_count() or 1)])


def run(command) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(map(str, command[:3]))} failed:\n{(done.stdout + done.stderr)[-4000:]}")


def inputs(name: str) -> list[Path]:
    """Folders of what is kept: inputs that reach much, findings, and for the loader the models."""
    folders = [HERE / "corpus" / name, HERE / "findings" / name]
    folders += [HERE / "models"] if name == "load" else []
    return [folder for folder in folders if folder.is_dir()]


def fuzz(folder: Path, name: str, seconds: float) -> dict:
    """One fuzzer for so many seconds; for none it runs the kept inputs alone."""
    found, new = folder / "findings" / name, folder / "corpus" / name
    for path in (found, new):
        path.mkdir(parents=True, exist_ok=True)
    command = [folder / "tests" / "fuzz" / f"fuzz_{name}", f"-artifact_prefix={found}/", "-print_final_stats=1"]
    if seconds > 0:
        command += [f"-max_total_time={seconds:g}", f"-max_len={LONGEST[name]}", "-len_control=0", "-timeout=60"]
        command += [f"-dict={HERE / 'deploy.dict'}"] if name == "load" else []
    else:
        command += [f"-max_len={1 << 20}", "-runs=0"]
    command += [new, *inputs(name)]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
    log = done.stderr
    (folder / f"fuzz_{name}.log").write_text(log)
    numbers = {key: int(value) for key, value in re.findall(r"stat::(\w+):\s+(\d+)", log)}
    covered = re.findall(r"cov: (\d+)", log)
    total = re.search(r"\((\d+) inline 8-bit counters\)", log)
    return {
        "executions": numbers.get("number_of_executed_units", 0),
        "coverage": int(covered[-1]) if covered else 0,
        "edges": int(total[1]) if total else 0,
        "seconds": numbers.get("number_of_executed_units", 0) / max(numbers.get("average_exec_per_sec", 0), 1),
        "finding": "" if done.returncode == 0 else summary(log),
    }


def summary(log: str) -> str:
    """The line that says what was found."""
    for pattern in (r"ERROR: (.*)", r"(.*runtime error: .*)", r"(.*: not so: .*)"):
        found = re.search(pattern, log)
        if found:
            return found[1]
    return log.strip().splitlines()[-1] if log.strip() else "ended without a word"


def keep(folder: Path, name: str) -> None:
    """The smallest inputs that together reach every edge that all so far reach, of a few kilobytes each."""
    target, old = HERE / "corpus" / name, folder / "kept" / name
    shutil.rmtree(old, ignore_errors=True)
    old.mkdir(parents=True)
    target.mkdir(parents=True, exist_ok=True)
    program = folder / "tests" / "fuzz" / f"fuzz_{name}"
    sources = [folder / "corpus" / name, target]
    run([program, "-merge=1", "-use_counters=0", f"-max_len={LONGEST_KEPT[name]}", "-timeout=60", old, *sources])
    shutil.rmtree(target)
    shutil.copytree(old, target)
    paths = list(target.iterdir())
    print(f"{name}: {len(paths)} inputs of {sum(path.stat().st_size for path in paths):,} bytes kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="of each fuzzer; 0 runs the kept inputs alone")
    parser.add_argument("--keep", action="store_true", help="make the kept inputs anew")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "fuzz", help="to build and to run in")
    arguments = parser.parse_args()
    build(arguments.folder)
    findings = 0
    for name in LONGEST:
        seen = fuzz(arguments.folder, name, arguments.seconds)
        findings += bool(seen["finding"])
        print(
            f"fuzz_{name}: {seen['executions']:,} executions in {seen['seconds']:.0f} s, "
            f"{seen['coverage']:,} of {seen['edges']:,} edges (each instruction set has its own), "
            f"{seen['finding'] or 'nothing found'}"
        )
        if arguments.keep:
            keep(arguments.folder, name)
    if findings:
        sys.exit(f"error: see {arguments.folder / 'findings'}; run a program of {arguments.folder} on a file of it")


if __name__ == "__main__":
    main()
