"""Every option through every road out of Python, as one table; README prints it.

A cell is "=" where the numbers are those of the eager model to the bit, as cellstep's own kernels give them, and "≈"
where other kernels agree to rounding. ``python tests/python/test_roads.py`` writes the table into README.
"""

import copy
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import cellstep
from cellstep.exporters.torchscript import packed
from cellstep.nn import LSTM, Chain, Dense, Scale, Skip, Unscale

README = Path(__file__).parents[2] / "README.md"
INPUTS, UNITS = 4, 6

#: An option of the table -> the arguments of its LSTM.
OPTIONS = {
    "plain": {},
    "num_layers, dropout": {"num_layers": 2, "dropout": 0.3},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
    "proj_size": {"proj_size": 3},
    "peephole": {"peephole": True},
    "layer_norm": {"layer_norm": True},
    "coupled": {"coupled": True},
    "zoneout": {"zoneout": (0.1, 0.2)},
    "cell_clip": {"cell_clip": 0.1},
    "residual": {"num_layers": 3, "residual": True},
    "hard_sigmoid, relu, elu": {"gate_activation": "hard_sigmoid", "activation": "relu", "output_activation": "elu"},
    "learn_initial_state": {"learn_initial_state": True},
    "recurrent_dropout": {"recurrent_dropout": 0.3},
    "weight_drop": {"weight_drop": 0.3},
    "forget_bias": {"forget_bias": 1.0},
    "memory_efficient": {"memory_efficient": True},
    "return_cell_states": {"return_cell_states": True},
}
EVERYTHING = {
    "num_layers": 2,
    "bidirectional": True,
    "proj_size": 3,
    "peephole": True,
    "layer_norm": True,
    "coupled": True,
    "residual": True,
    "zoneout": 0.1,
    "cell_clip": 0.5,
    "activation": "hardsigmoid",
    "learn_initial_state": True,
    "return_cell_states": True,
}
#: Rows of the table: the options, and what a call or a chain may have beyond them.
ROWS = [*OPTIONS, "all of them at once", "a chain with all stages", "lengths", "reset"]
TARGETS = [
    "gradients",
    "scripted",
    ".pt",
    ".pt standalone",
    "torch.compile",
    "torch.export",
    ".pt2",
    ".onnx",
    ".pte",
    ".cellstep",
]


def make(row):
    torch.manual_seed(0)
    if row == "a chain with all stages":
        stages = (
            Scale([1.0, 2.0, 3.0, 4.0], [0.5, 1.0, 2.0, 0.1]),
            Dense(INPUTS, 5, "relu"),
            LSTM(5, UNITS, 2, peephole=True),
            LSTM(UNITS, 4, layer_norm=True),
            Dense(4, 3, "tanh"),
            Dense(3, 2, "softmax"),
            Unscale([1.0, -1.0], [2.0, 3.0]),
            Skip([3, 0]),
        )
        chain = Chain(*stages, answers="every")
    else:
        options = EVERYTHING if row == "all of them at once" else OPTIONS.get(row, {})
        chain = Chain(LSTM(INPUTS, UNITS, **options), answers="every")
    with torch.no_grad():
        for name, parameter in chain.named_parameters():
            if "initial" in name or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return chain.eval()


def inputs(steps=9):
    x = torch.randn(3, steps, INPUTS, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([steps, 0, 2])
    reset = torch.rand(3, steps, generator=torch.Generator().manual_seed(2)) < 0.3
    return x, lengths, reset


def arguments(row, steps):
    """What a row calls: the method, and what it takes beside x."""
    _, lengths, reset = inputs(steps)
    return {"lengths": {"lengths": lengths}, "reset": {"reset": reset}}.get(row, {})


class Holder(torch.nn.Module):
    """A user's own module around a layer or a chain, one method for all rows."""

    def __init__(self, chain):
        super().__init__()
        self.chain = chain

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None, reset: torch.Tensor | None = None):
        state = self.chain.initial_state(x.size(0))
        if reset is not None:
            return self.chain.run(x, state, reset)[0]
        return self.chain.answer(x, state, lengths)[0]


def module_of(row):
    return Holder(make(row))


def eager(row, steps):
    with torch.no_grad():
        return module_of(row)(inputs(steps)[0], **arguments(row, steps)).numpy()


def by_artifact(suffix, **options):
    def run(row, directory):
        path = directory / f"model{suffix}"
        cellstep.export(make(row), path, **options)
        artifact = cellstep.load(path)

        def call(steps):
            x, lengths, reset = inputs(steps)
            if row == "reset":
                return artifact.run(x, artifact.initial_state(3), reset)[0]
            return artifact(x, lengths=lengths.numpy()) if row == "lengths" else artifact(x)

        return call

    return run


def by_script(row, directory):
    path = directory / "scripted.pt"
    torch.jit.save(torch.jit.script(module_of(row)), path)
    module = torch.jit.load(path)
    return lambda steps: module(inputs(steps)[0], **arguments(row, steps)).detach().numpy()


def by_compile(row, directory):
    torch._dynamo.reset()
    compiled = torch.compile(module_of(row), fullgraph=True, dynamic=True)
    seen = []

    def call(steps):
        # Time may change without a recompilation once the first call is compiled.
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile" if seen else "default"):
            seen.append(steps)
            return compiled(inputs(steps)[0], **arguments(row, steps)).numpy()

    return call


def by_export(row, directory):
    dynamic = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("time", min=1)}
    x, extra = inputs(5)[0], arguments(row, 5)
    shapes = {"x": dynamic, **{name: dynamic if name == "reset" else {0: dynamic[0]} for name in extra}}
    program = torch.export.export(module_of(row), (x,), extra, dynamic_shapes=shapes).module()
    return lambda steps: program(inputs(steps)[0], **arguments(row, steps)).detach().numpy()


class AllRows(torch.nn.Module):
    """Every row in one program: a package compiles each program for seconds, and they differ in constants alone."""

    def __init__(self):
        super().__init__()
        self.chains = torch.nn.ModuleList(packed(make(row)) for row in ROWS)

    def forward(self, x, lengths, reset):
        answers = []
        for row, chain in zip(ROWS, self.chains, strict=True):
            state = chain.initial_state(x.size(0))
            if row == "reset":
                answers.append(chain.run(x, state, reset)[0])
            else:
                answers.append(chain.answer(x, state, lengths if row == "lengths" else None)[0])
        return answers


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own, on its way
        dynamic = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("time", min=1)}
        program = torch.export.export(
            AllRows(), inputs(5), dynamic_shapes=(dynamic, {0: dynamic[0]}, dynamic), strict=False
        )
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path_factory.mktemp("package") / "rows.pt2")
        )
    return torch._inductor.aoti_load_package(path)


#: What runs on other kernels than cellstep's: the operators of torch, onnxruntime or ExecuTorch.
OTHER_KERNELS = ["gradients", ".pt standalone", ".onnx", ".pte"]
BY = {
    "scripted": by_script,
    ".pt": by_artifact(".pt"),
    ".pt standalone": by_artifact(".pt", standalone=True),
    "torch.compile": by_compile,
    "torch.export": by_export,
    ".onnx": by_artifact(".onnx"),
    ".pte": by_artifact(".pte", batch_size=2, steps=5),
    ".cellstep": by_artifact(".cellstep"),
}
#: Relative to the largest output: float32 rounds to 6e-8, some ten times over on the way through nine steps, and
#: layer normalisation over few units divides by small deviations.
TOLERANCE = 2e-5
results = {}


def compare(y, truth, tolerance):
    assert y.shape == truth.shape and y.dtype == truth.dtype
    assert np.abs(y - truth).max() <= tolerance * np.abs(truth).max()


def check_gradients(row):
    """Of training in float64, beside torch's own operators, whose gradients torch knows."""
    module = module_of(row).double().train()
    x, extra = inputs(9)[0].double().requires_grad_(), arguments(row, 9)
    found = []
    for kernels in (True, False):
        for part in module.modules():
            if isinstance(part, (LSTM, Dense)):
                part.use_ops = kernels
        torch.manual_seed(3)  # of the masks
        weights = torch.randn(9, 1, dtype=torch.float64)
        wanted = [x, *module.parameters()]
        loss = (module(x, **extra).square() * weights).sum()
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        assert all(gradient.any() for gradient in gradients)
        found.append(gradients)
    for ours, theirs in zip(*found, strict=True):
        # float64 rounds to 1e-16, and layer normalisation over few units divides by small deviations.
        compare(ours.numpy(), theirs.numpy(), 1e-10)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("row", ROWS)
def test_road(row, target, request, tmp_path):
    if target == "gradients":
        check_gradients(row)
        results[row, target] = "≈"
        return
    if target == ".pt2":
        program = request.getfixturevalue("package")

        def call(steps):
            return program(*inputs(steps))[ROWS.index(row)].numpy()
    else:
        call = BY[target](row, tmp_path)
    # A .pte takes windows of its own size in one call, and others step by step, which needs a model that looks back.
    sizes = (5,) if target == ".pte" and row in ("bidirectional", "all of them at once") else (5, 9, 2, 40)
    for steps in sizes:
        compare(call(steps), eager(row, steps), TOLERANCE if target in OTHER_KERNELS else 0)
    results[row, target] = "≈" if target in OTHER_KERNELS else "="


@pytest.mark.parametrize("row", ROWS)
def test_eager_agrees_with_torchs_own_operators(row):
    module = module_of(row)
    reference = copy.deepcopy(module).double()
    for part in reference.modules():
        if isinstance(part, (LSTM, Dense)):
            part.use_ops = False
    x, extra = inputs(9)[0], arguments(row, 9)
    with torch.no_grad():
        truth = reference(x.double(), **extra)
        compare(module(x, **extra).numpy(), truth.float().numpy(), TOLERANCE)


def table():
    """The table in Markdown."""
    lines = ["| | " + " | ".join(f"`{name}`" if "." in name else name for name in TARGETS) + " |"]
    lines.append("| --- |" + " :-: |" * len(TARGETS))
    lines += [f"| {row} | " + " | ".join(results[row, target] for target in TARGETS) + " |" for row in ROWS]
    return "\n".join(lines)


BLOCK = re.compile(r"(?<=<!-- table of roads -->\n).*?(?=\n<!-- end -->)", re.DOTALL)


def test_readme_prints_this_table():
    if len(results) < len(ROWS) * len(TARGETS):
        pytest.skip("the whole table was not run")
    if "--write" in sys.argv:
        README.write_text(BLOCK.sub(lambda _: table(), README.read_text()))
    assert BLOCK.search(README.read_text())[0] == table(), "python tests/python/test_roads.py writes it"


if __name__ == "__main__":
    sys.argv.append("--write")
    sys.exit(pytest.main([__file__, "-q"]))
