"""The targets: how each is built, what runs it, and which group of equal bits it belongs to."""

import functools
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[2]
BUILD = SOURCE / "build" / "embedded"
#: Whether a missing tool fails a test instead of skipping it.
REQUIRED = os.environ.get("CI") == "true" or os.environ.get("CELLSTEP_REQUIRE_TOOLS") == "1"

#: Gate sums of fused multiply-adds, which round once, and of multiplications and additions, which round twice.
FUSED, STRICT = "fused", "strict"


@dataclass(frozen=True)
class Target:
    name: str
    preset: str
    compiler: str
    group: str = FUSED
    emulator: tuple[str, ...] = ()  #: the command that runs the program; none: this machine runs it
    cpu: str = ""  #: CELLSTEP_CPU
    flags: tuple[str, ...] = ()  #: what the machine's processor must have
    run: bool = True
    semihosting: bool = False  #: bare metal: the emulator is given the program and its arguments by options
    note: str = ""

    @property
    def missing(self):
        """Programs that are not on this machine."""
        names = (self.compiler, *self.emulator[:1])
        return [name for name in names if not (zig() if name == "zig" else shutil.which(name))]

    @property
    def lacks(self):
        """Instructions that this machine's processor would have to have."""
        return [flag for flag in self.flags if flag not in processor_flags()]

    @property
    def emulated_by(self):
        if not self.run:
            return "-"
        if not self.emulator:
            return "this machine"
        shown = [word for word in self.emulator if not word.startswith(("/", "--")) and word != "-L"]
        return " ".join(Path(word).name for word in shown)


@functools.cache
def processor_flags():
    """Instruction sets of this machine's processor, as Linux names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


@functools.cache
def zig():
    """The compiler in the PyPI package ziglang, or None."""
    try:
        import ziglang
    except ImportError:
        return None
    return str(Path(ziglang.__file__).parent / "zig")


@functools.cache
def version(compiler):
    """A compiler's name and version."""
    if compiler == "zig":
        return "zig " + subprocess.run([zig(), "version"], capture_output=True, text=True).stdout.strip()
    number = subprocess.run([compiler, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True).stdout
    return f"{compiler} {number.strip()}"


AVX2 = ("avx2", "fma", "f16c")
AVX512 = (*AVX2, "avx512f", "avx512dq", "avx512vl")
X86 = platform.machine() in ("x86_64", "AMD64")

TARGETS = []


def target(name, preset, compiler, group=FUSED, *emulator, **options):
    TARGETS.append(Target(name, preset, compiler, group, emulator, **options))


for compiler, preset, strict in (("g++", "linux-gcc", "strict"), ("clang++", "linux-clang", "strict-clang")):
    short = preset.removeprefix("linux-")
    target(f"x86-64 {short}, baseline", preset, compiler, STRICT, cpu="baseline")
    target(f"x86-64 {short}, avx2", preset, compiler, cpu="avx2", flags=AVX2)
    target(f"x86-64 {short}, avx2 with VNNI", preset, compiler, cpu="avx2vnni", flags=(*AVX2, "avx_vnni"))
    target(f"x86-64 {short}, avx512", preset, compiler, cpu="avx512", flags=AVX512)
    target(f"x86-64 {short}, avx512 with VNNI", preset, compiler, cpu="avx512vnni", flags=(*AVX512, "avx512_vnni"))
    target(f"x86-64 {short}, no AVX", preset, compiler, STRICT, "qemu-x86_64-static", "-cpu", "qemu64")
    target(f"x86-64 {short}, strict", strict, compiler, STRICT)
target("x86, 32 bits", "x86-32", "g++", STRICT)

ARM64, ARMHF, ARM = "aarch64-linux-gnu-g++", "arm-linux-gnueabihf-g++", "arm-none-eabi-g++"
qemu_arm64 = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu")
target("aarch64", "aarch64", ARM64, FUSED, *qemu_arm64, "cortex-a53")
target("aarch64, dot products", "aarch64-dotprod", ARM64, FUSED, *qemu_arm64, "max")
target("aarch64, strict", "aarch64-strict", ARM64, STRICT, *qemu_arm64, "cortex-a53")
qemu_armhf = ("qemu-arm", "-L", "/usr/arm-linux-gnueabihf", "-cpu", "cortex-a7")
target("armhf", "armhf", ARMHF, FUSED, *qemu_armhf)
target("armhf, strict", "armhf-strict", ARMHF, STRICT, *qemu_armhf)
target("riscv64", "riscv64", "zig", FUSED, "qemu-riscv64")
target("riscv64, strict", "riscv64-strict", "zig", STRICT, "qemu-riscv64")
# Node.js 18, as Debian 12 has it, asks for the option; later ones take it and do nothing.
node = (
    "node",
    "--no-warnings",
    "--experimental-wasi-unstable-preview1",
    str(SOURCE / "tests" / "embedded" / "wasi.mjs"),
)
target("WebAssembly", "wasm", "zig", STRICT, *node)
target("x86-64, small engine", "compact", "g++", STRICT)
target("x86-64 with FMA, small engine", "compact-fma", "g++", flags=AVX2)
target("aarch64, small engine", "aarch64-compact", ARM64, FUSED, *qemu_arm64, "cortex-a53")
target("WebAssembly, small engine", "wasm-compact", "zig", STRICT, *node)
for core, board, group in (
    # qemu's boards with a Cortex-M0 have too little memory; the M3 runs the same code.
    ("M0plus", "mps2-an385", STRICT),
    ("M4F", "mps2-an386", FUSED),
    ("M7", "mps2-an500", FUSED),
    ("M55", "mps3-an547", FUSED),
):
    emulator = ("qemu-system-arm", "-M", board)
    name, preset = f"Cortex-{core.replace('plus', '+')}", f"cortex-{core.lower()}"
    target(f"{name}, small engine", preset, ARM, group, *emulator, semihosting=True)
    target(name, f"{preset}-full", ARM, group, *emulator, semihosting=True)
    if group == FUSED:
        target(f"{name}, small engine, strict", f"{preset}-strict", ARM, STRICT, *emulator, semihosting=True)
target("Windows, x86-64", "windows", "zig", run=False, note="built, not run: no Windows here")
target("macOS, arm64", "macos", "zig", run=False, note="built, not run: no macOS here")


def build(preset):
    """Configures and builds the driver of a preset with one job; the program's path."""
    directory = BUILD / preset
    configure = ["cmake", "--preset", preset, "-B", str(directory), "-DCELLSTEP_BUILD_DRIVER=ON"]
    for command in (configure, ["cmake", "--build", str(directory), "--target", "cellstep_driver", "-j1"]):
        done = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{preset} does not build:\n{(done.stdout + done.stderr)[-4000:]}")
    programs = [path for path in (directory / "tests" / "embedded").glob("cellstep_driver*") if path.is_file()]
    (program,) = [path for path in programs if path.suffix in ("", ".exe", ".wasm", ".elf")]
    return program


def run(target, program, directory, stems):
    """Runs the driver over the jobs in a directory; the folder in it that the answers are in."""
    out = directory / target.name.replace(" ", "-").replace(",", "")
    out.mkdir(exist_ok=True)
    jobs = [argument for stem in stems for argument in (f"{stem}.cellstep", f"{stem}.x", f"{out.name}/{stem}.y")]
    environment = {name: value for name, value in os.environ.items() if name != "CELLSTEP_CPU"}
    if target.cpu:
        environment["CELLSTEP_CPU"] = target.cpu
    command = [*target.emulator, str(program), *jobs]
    if target.semihosting:
        options = ",".join(["enable=on,target=native", *(f"arg={argument}" for argument in ("driver", *jobs))])
        command = [*target.emulator, "-nographic", "-monitor", "none", "-serial", "none"]
        command += ["-semihosting-config", options, "-kernel", str(program)]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600, env=environment)
    # An emulator that is stopped from outside ends well as well; the driver's last word is its instruction set.
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"{target.name}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}")
    return out


def session_answers(directory, cpu=None):
    """Has Python's Session answer the jobs in a process of its own; the name of the instruction set it used."""
    environment = {name: value for name, value in os.environ.items() if name != "CELLSTEP_CPU"}
    if cpu:
        environment["CELLSTEP_CPU"] = cpu
    command = [sys.executable, str(Path(__file__).with_name("models.py")), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout.strip()
