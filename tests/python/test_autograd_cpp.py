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


def variant_arguments(seed=0, rows=3):
    """Arguments of lstm_variant by name, none that is optional, and for each option those that it changes."""
    import torch

    def tensor(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).mul(0.5).requires_grad_()

    def mask(*sizes):
        return (torch.rand(*sizes, generator=generator) < 0.6).double()

    generator = torch.Generator().manual_seed(seed)
    steps, inputs, units, out = 4, 2, 3, 2
    sizes = {"x": (steps, rows, inputs), "h": (rows, units), "c": (rows, units)}
    sizes |= {"weight_ih": (4 * units, inputs), "weight_hh": (4 * units, units), "bias_ih": (12,), "bias_hh": (12,)}
    tensors = {name: tensor(*size) for name, size in sizes.items()}
    optional = ["weight_hr", "weight_peephole", "norm_ih", "norm_hh", "norm_c", "norm_c_bias", "reset", "initial_h"]
    tensors |= dict.fromkeys([*optional, "initial_c", "mask_h", "mask_g", "keep_h", "keep_c"])
    numbers = {"coupled": False, "cell_clip": 0.0, "zoneout_h": 0.0, "zoneout_c": 0.0}
    numbers |= {"gate_activation": 2, "activation": 3, "output_activation": 3}
    norm = {"norm_ih": tensor(12), "norm_hh": tensor(12), "norm_c": tensor(units), "norm_c_bias": tensor(units)}
    reset = {"reset": torch.rand(steps, rows, generator=generator) < 0.4}
    initial = {"initial_h": tensor(units), "initial_c": tensor(units)}
    projected = {"weight_hr": tensor(out, units), "weight_hh": tensor(12, out), "h": tensor(rows, out)}
    coupled = {name: tensors[name][:9].detach().requires_grad_() for name in ("weight_ih", "weight_hh", "bias_ih")}
    coupled |= {"bias_hh": tensor(9), "coupled": True}
    options = {
        "none": {},
        "no bias": {"bias_ih": None, "bias_hh": None},
        "one bias": {"bias_ih": None},
        "proj_size": projected,
        "peephole": {"weight_peephole": tensor(3 * units)},
        "layer_norm": norm,
        "layer_norm, no bias": {**norm, "bias_ih": None, "bias_hh": None},
        "coupled": coupled,
        "coupled, peephole": {**coupled, "weight_peephole": tensor(2 * units)},
        "cell_clip": {"cell_clip": 0.5},
        "zoneout": {"zoneout_h": 0.1, "zoneout_c": 0.3},
        "zoneout in training": {"zoneout_h": 0.4, "keep_h": mask(4, rows, 3), "keep_c": mask(4, rows, 3)},
        "recurrent_dropout": {"mask_h": mask(rows, units) / 0.6},
        "recurrent_dropout of g": {"mask_g": mask(rows, units) / 0.6},
        "reset": reset,
        "reset to learned": {**reset, **initial},
        "relu": {"activation": 1, "output_activation": 0},
        "hard": {"gate_activation": 4, "output_activation": 5},
        "other": {"gate_activation": 5, "activation": 2, "output_activation": 4},
    }
    everything = {**projected, **norm, **reset, "initial_h": tensor(out), "initial_c": tensor(units), "cell_clip": 0.5}
    everything |= {"weight_peephole": tensor(9), "mask_h": mask(rows, out), "mask_g": mask(rows, units)}
    everything |= {"keep_h": mask(4, rows, out), "keep_c": mask(4, rows, units), "gate_activation": 4}
    options["everything"] = everything
    return {**tensors, **numbers}, options


def differentiate(results, wanted):
    """Gradients of the results, of each alone too, and gradients of those gradients."""
    import torch

    y, h, c, cells = results
    total = y.square().sum() + h.sum() * c.sum() + cells.square().sum()
    found = [torch.autograd.grad(result.sum(), wanted, retain_graph=True, allow_unused=True) for result in (y, h, c)]
    found.append(torch.autograd.grad(total, wanted, retain_graph=True))
    found.append(torch.autograd.grad(total, wanted, create_graph=True))
    second = sum(gradient.square().sum() for gradient in found[-1])
    found.append(torch.autograd.grad(second, wanted, allow_unused=True))
    return [gradient for gradients in found for gradient in gradients]


def gradients_by_formula():
    """What rests on torch's operators, by case: options, activations, and gradients of gradients."""
    import torch

    ops, found = torch.ops.cellstep, {}
    arguments, options = variant_arguments()
    for name, changed in options.items():
        values = list({**arguments, **changed}.values())
        wanted = [value for value in values if isinstance(value, torch.Tensor) and value.requires_grad]
        for save in (True, False) if name in ("none", "everything") else (True,):
            y, h, c, cells = ops.lstm_variant(*values, save)
            with torch.no_grad():
                bits = ops.lstm_variant(*values, save)
            assert all(map(torch.equal, (y, h, c, cells), bits))
            found[f"{name}, save {save}"] = differentiate((y, h, c, cells if save else y), wanted)
    plain = list(arguments.values())[:7]
    for which in range(4):
        values = [*plain[:5], *(bias if which & bit else None for bias, bit in zip(plain[5:], (1, 2), strict=True))]
        wanted = [value for value in values if value is not None]
        for save in (True, False):
            y, h, c, _, cells = ops.lstm_layer(*values, save)
            found[f"layer, biases {which}, save {save}"] = differentiate((y, h, c, cells if save else y), wanted)
            h, c, _ = ops.lstm_cell(plain[0][0], *values[1:], save)
            found[f"cell, biases {which}, save {save}"] = differentiate((h, h, c, c), wanted)
    projection = {**arguments, **options["proj_size"]}
    weight = projection["weight_hr"]
    values = [v.detach() if isinstance(v, torch.Tensor) and v is not weight else v for v in projection.values()]
    y, _, c, _ = ops.lstm_variant(values[0][:1], *values[1:], False)
    total = y.square().sum() + c.sum()
    found["c without gradient"] = torch.autograd.grad(total, weight, create_graph=True)
    x = arguments["x"]
    for activation in range(8):
        (first,) = torch.autograd.grad(ops.activate(x, activation).square().sum(), x, create_graph=True)
        found[f"activate {activation}"] = [first, *torch.autograd.grad(first.square().sum(), x)]
    return found


def test_gradients_are_those_of_python(library, tmp_path):
    functions = (gradients, variant_arguments, differentiate, gradients_by_formula)
    script = "".join(map(inspect.getsource, functions)) + (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "torch.save((gradients(), gradients_by_formula()), sys.argv[2])\n"
        "assert 'cellstep' not in sys.modules\n"
    )
    done = run_python(script, library, tmp_path / "gradients.pt")
    assert done.returncode == 0, done.stderr
    kernels, formula = torch.load(tmp_path / "gradients.pt")
    for found, expected, tolerance in (
        (kernels, gradients(), 0.0),
        # Sums in another order than in lstm_steps_backward, some units in the last place each; second derivatives of
        # the normalisation of three values, which divides by their deviation, raise that to 1e-13.
        (formula, gradients_by_formula(), 1e-12),
    ):
        assert found.keys() == expected.keys()
        for case, tensors in expected.items():
            assert any(tensor is not None and tensor.count_nonzero() for tensor in tensors)
            for ours, theirs in zip(found[case], tensors, strict=True):
                assert (ours is None) == (theirs is None), case
                assert ours is None or torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance), case


def train(model):
    """Three steps of training; the gradients of each."""
    import torch

    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(3):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 30).sin().view(3, 5, 2) + step).square().sum().backward()
        found += [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
    return found


def test_scripted_model_trains(library, tmp_path):
    torch.manual_seed(0)
    lstm = cellstep.nn.LSTM(2, 4, peephole=True, layer_norm=True)
    model = cellstep.nn.Chain(lstm, cellstep.nn.Dense(4, 2, "sigmoid"))
    torch.jit.script(model).save(tmp_path / "model.pt")
    script = inspect.getsource(train) + (
        "import sys, warnings, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "warnings.simplefilter('ignore')  # torch.jit is deprecated upstream\n"
        "torch.save(train(torch.jit.load(sys.argv[2])), sys.argv[3])\n"
    )
    done = run_python(script, library, tmp_path / "model.pt", tmp_path / "gradients.pt")
    assert done.returncode == 0, done.stderr
    found, expected = torch.load(tmp_path / "gradients.pt"), train(model)
    assert len(found) == 3 * len(list(model.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        # float32, with sums in another order than in lstm_steps_backward: some units in the last place.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def check_numerically(ops):
    """Gradients of the operators, and gradients of these, against differences of their values."""
    import torch

    arguments, options = variant_arguments(rows=2)
    inputs = list(arguments.values())[:7]
    x = inputs[0]
    for save in (True, False):
        kept = [0, 1, 2, 4] if save else [0, 1, 2]

        def layer(*tensors, save=save, kept=kept):
            results = ops.lstm_layer(*tensors, save)
            return tuple(results[k] for k in kept)

        def cell(x, *tensors, save=save):
            return ops.lstm_cell(x[0], *tensors, save)[:2]

        for call in (layer, cell):
            torch.autograd.gradcheck(call, inputs)
            torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
    torch.autograd.gradgradcheck(ops.dense, [x, torch.ones(3, 2, dtype=x.dtype, requires_grad=True), inputs[5][:3]])
    for activation in range(8):
        torch.autograd.gradcheck(ops.activate, [x, activation])
        torch.autograd.gradgradcheck(ops.activate, [x, activation])
    for name, changed in options.items():
        values = {**arguments, **changed}

        def variant(*tensors, values=values):
            return ops.lstm_variant(*tensors, *list(values.values())[20:], True)

        tensors = list(values.values())[:20]
        torch.autograd.gradcheck(variant, tensors, fast_mode=True)
        if name in ("everything", "coupled, peephole"):
            torch.autograd.gradgradcheck(variant, tensors, fast_mode=True)

    y, h, c, *saved = ops.lstm_layer(*inputs, True)
    layer_backward = ops.lstm_layer_backward(y, h, c, None, *inputs[:5], y, *saved, True, True)
    try:
        layer_backward[0].sum().backward()
    except RuntimeError as error:
        assert "let autograd differentiate it twice" in str(error) and "\n" not in str(error).strip(), error
    else:
        raise AssertionError("expected an error")


def test_gradients_numerically(library):
    script = (
        inspect.getsource(variant_arguments)
        + inspect.getsource(check_numerically)
        + ("import sys, torch\ntorch.ops.load_library(sys.argv[1])\ncheck_numerically(torch.ops.cellstep)\n")
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
    assert done.returncode == 1 and "train the float model" in done.stderr


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
