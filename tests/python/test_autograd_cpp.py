"""cellstep::autograd: gradients of the operators without Python, and one registration of them in a process."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_command

import cellstep

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="linker flags and library names are those of ELF")


def build(source, directory, *options):
    configure = ["-S", source, "-B", directory, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *options]
    for arguments in (configure, ["--build", directory, "-j1"]):
        done = run_command("cmake", *arguments)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """cellstep with its gradients, built and installed."""
    directory = tmp_path_factory.mktemp("autograd")
    options = ["-DCELLSTEP_BUILD_AUTOGRAD=ON", "-DCELLSTEP_BUILD_TOOLS=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    build(ROOT, directory / "build", *options)
    done = run_command("cmake", "--install", directory / "build", "--prefix", directory / "prefix")
    assert done.returncode == 0, done.stderr
    return directory / "prefix"


@pytest.fixture(scope="module")
def library(prefix):
    (path,) = prefix.glob("lib*/libcellstep_autograd.so")
    return path


def build_program(source, directory, prefix):
    paths = f"-DCMAKE_PREFIX_PATH={prefix};{torch.utils.cmake_prefix_path}"
    build(source, directory, paths, "-DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed")


def run_python(script, *arguments):
    """A script in a process of its own, where `import cellstep.ops` has not happened."""
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def python_losses():
    """The training of examples/libtorch_training/main.cpp."""
    torch.manual_seed(0)
    steps = 20
    windows = torch.sin(0.3 * torch.arange(120)).unfold(0, steps + 1, 1)
    x, target = windows[:, :steps].t().unsqueeze(2), windows[:, steps:]
    lstm = cellstep.nn.LSTM(1, 16)
    head = torch.nn.Linear(16, 1)
    parameters = [*lstm.parameters(), *head.parameters()]
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in parameters:
            parameter.uniform_(-0.25, 0.25)
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        _, (h, _) = lstm(x)
        loss = torch.nn.functional.mse_loss(torch.ops.cellstep.dense(h[0], head.weight, head.bias), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses, np.float32)


def test_training_without_python(prefix, tmp_path):
    build_program(ROOT / "examples/libtorch_training", tmp_path, prefix)
    done = subprocess.run([tmp_path / "training"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = np.array([line.split(",")[1] for line in done.stdout.splitlines()], np.float64).astype(np.float32)
    assert losses[-1] < 0.1 * losses[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = python_losses()
    finally:
        torch.set_num_threads(threads)
    # To the bit: both call the same kernels of cellstep and of one libtorch, in the same order and on one thread.
    assert np.array_equal(losses, expected)


def test_library_stays_linked(prefix, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(linked LANGUAGES C CXX)\n"
        "find_package(Torch REQUIRED)\nfind_package(cellstep REQUIRED)\n"
        "add_executable(linked main.c)\n"
        "target_link_libraries(linked PRIVATE cellstep::autograd ${TORCH_LIBRARIES} ${CMAKE_DL_LIBS})\n"
    )
    (tmp_path / "main.c").write_text(
        "#define _GNU_SOURCE\n#include <dlfcn.h>\n#include <stdint.h>\n"
        "int32_t aoti_torch_device_type_cpu(void);\n"
        "int main(void) { return aoti_torch_device_type_cpu() ||"
        '                 !dlsym(RTLD_DEFAULT, "cellstep_register_autograd"); }\n'
    )
    build_program(tmp_path, tmp_path / "build", prefix)
    assert subprocess.run([tmp_path / "build" / "linked"]).returncode == 0


def gradients():
    """Gradients of every operator, with and without what is optional, by case."""
    import torch

    def tensor(*sizes):
        return torch.randn(*sizes, generator=generator, requires_grad=True)

    ops = torch.ops.cellstep
    generator = torch.Generator().manual_seed(0)
    rows, inputs, units = 3, 4, 5
    state = [tensor(rows, units), tensor(rows, units)]
    weights = [tensor(4 * units, inputs), tensor(4 * units, units)]
    biases = [tensor(4 * units), tensor(4 * units)]
    x, weight, bias = tensor(6, rows, inputs), tensor(2, units), tensor(2)
    found = {}
    for which in range(4):
        for save in (True, False):
            arguments = [*state, *weights, *(b if which & bit else None for b, bit in zip(biases, (1, 2), strict=True))]
            y, h, c, gates, cells = ops.lstm_layer(x, *arguments, save)
            assert not gates.requires_grad
            sums = {"all": y.square().sum() + (h * c).sum(), "y": y.sum(), "h": h.sum(), "c": c.sum()}
            sums |= {"cells": (cells * y.detach()).sum()} if save else {"cells": y.sum() + cells.sum()}
            h, c, gates = ops.lstm_cell(x[0], *arguments, save)
            assert not gates.requires_grad
            sums |= {"cell": h.square().sum() + c.sum(), "cell h": h.sum(), "cell c": c.sum()}
            wanted = [t for t in (x, *arguments) if t is not None]
            for name, total in sums.items():
                found[f"{name}, biases {which}, save {save}"] = torch.autograd.grad(
                    total, wanted, retain_graph=True, allow_unused=True
                )
        y = ops.dense(x.new_tensor([1.0]) * weights[1].view(2, 10, units), weight, bias if which & 1 else None)
        wanted = [weights[1], weight, *([bias] if which & 1 else [])]
        to_all = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        found[f"dense {which}"] = to_all
        found[f"dense twice {which}"] = torch.autograd.grad(to_all[0].square().sum(), weight)
    with torch.no_grad():
        assert not ops.lstm_layer(x, *state, *weights, None, None, True)[0].requires_grad
    return found


def test_gradients_are_those_of_python(library, tmp_path):
    script = inspect.getsource(gradients) + (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "torch.save(gradients(), sys.argv[2])\n"
        "assert 'cellstep' not in sys.modules\n"
    )
    done = run_python(script, library, tmp_path / "gradients.pt")
    assert done.returncode == 0, done.stderr
    found, expected = torch.load(tmp_path / "gradients.pt"), gradients()
    assert found.keys() == expected.keys()
    for case, tensors in expected.items():
        for ours, theirs in zip(found[case], tensors, strict=True):
            assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs)), case


def check_numerically(ops):
    """Gradients of the operators against differences of their values; missing and second ones are errors."""
    import torch

    def tensor(*sizes):
        return torch.randn(*sizes, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(0)
    inputs = [tensor(3, 2, 4), tensor(2, 5), tensor(2, 5), tensor(20, 4), tensor(20, 5), tensor(20), tensor(20)]
    for save in (True, False):
        kept = [0, 1, 2, 4] if save else [0, 1, 2]

        def layer(*tensors, save=save, kept=kept):
            results = ops.lstm_layer(*tensors, save)
            return tuple(results[k] for k in kept)

        def cell(x, *tensors, save=save):
            return ops.lstm_cell(x[0], *tensors, save)[:2]

        torch.autograd.gradcheck(layer, inputs)
        torch.autograd.gradcheck(cell, inputs)
    torch.autograd.gradgradcheck(ops.dense, [tensor(2, 3, 4), tensor(5, 4), tensor(5)])

    def second(total):
        (to_weight,) = torch.autograd.grad(total, inputs[3], create_graph=True)
        to_weight.square().sum().backward()

    cases = {
        "leave out create_graph": lambda: second(ops.lstm_layer(*inputs, True)[0].square().sum()),
        "use torch's own activations": lambda: ops.activate(inputs[0], 1).sum().backward(),
        "train such a layer in Python": lambda: (
            ops.lstm_variant(*inputs, *[None] * 13, False, 0.0, 0.0, 0.0, 2, 3, 3, False)[0].sum().backward()
        ),
        "where cellstep.ops has them": lambda: second(ops.lstm_cell(inputs[0][0], *inputs[1:], False)[1].sum()),
    }
    for remedy, call in cases.items():
        try:
            call()
        except RuntimeError as error:
            assert remedy in str(error) and "\n" not in str(error).strip(), error
        else:
            raise AssertionError(f"expected an error that says {remedy}")


def test_gradients_numerically(library):
    script = inspect.getsource(check_numerically) + (
        "import sys, torch\ntorch.ops.load_library(sys.argv[1])\ncheck_numerically(torch.ops.cellstep)\n"
    )
    done = run_python(script, library)
    assert done.returncode == 0, done.stderr


def test_exported_model_has_no_gradient(library, artifacts):
    script = """
import sys, warnings, torch
torch.ops.load_library(sys.argv[1])
warnings.simplefilter("ignore")  # torch.jit is deprecated upstream
model = torch.jit.load(sys.argv[2])
model(torch.zeros(1, 3, model.input_size, requires_grad=True)).sum().backward()
"""
    done = run_python(script, library, artifacts[".pt"])
    assert done.returncode == 1 and "train the module that was exported" in done.stderr


CELLSTEP_TRAINS = """
import torch, cellstep.nn
lstm = cellstep.nn.LSTM(2, 3)
lstm(torch.ones(4, 1, 2))[0].sum().backward()
assert lstm.weight_ih_l0.grad.abs().sum() > 0
"""


def test_library_after_cellstep_ops(library):
    script = """
import ctypes, sys, torch, cellstep.ops
try:
    torch.ops.load_library(sys.argv[1])
except OSError as error:
    print(error.__cause__)
library = ctypes.CDLL(sys.argv[1])
library.cellstep_autograd_error.restype = ctypes.c_char_p
print(library.cellstep_autograd_error().decode())
assert library.cellstep_register_autograd() == 0
"""
    done = run_python(script + CELLSTEP_TRAINS, library)
    assert done.returncode == 0, done.stderr
    raised, kept = done.stdout.splitlines()
    assert raised == kept and raised.endswith("only where cellstep.ops is not imported")


def test_cellstep_ops_after_library(library):
    done = run_python("import sys, torch\ntorch.ops.load_library(sys.argv[1])\nimport cellstep.ops\n", library)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: expected cellstep's operators without gradients; got ")


def test_library_twice(library, tmp_path):
    copy = tmp_path / library.name
    copy.write_bytes(library.read_bytes())
    script = "import sys, torch\nfor path in sys.argv[1:]: torch.ops.load_library(path)\n"
    assert run_python(script, library, library).returncode == 0
    done = run_python(script, library, copy)
    assert done.returncode == 1 and "load libcellstep_autograd once" in done.stderr


def test_gradients_need_the_operators(tmp_path):
    done = run_command("cmake", "-S", ROOT, "-B", tmp_path, "-DCELLSTEP_BUILD_AUTOGRAD=ON", "-DCELLSTEP_BUILD_OPS=OFF")
    assert done.returncode == 1 and "The gradients need the operators" in done.stderr
