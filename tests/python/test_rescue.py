"""Old TorchScript files read as data: what is found in them, its numbers, and files that mean harm."""

import io
import itertools
import json
import math
import pickle
import struct
import sys
import warnings
import zipfile
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cellstep
from cellstep.cli import main
from cellstep.rescue import read
from cellstep.rescue.archive import read_archive
from cellstep.rescue.match import ask

# Both sides are float32 and sum in different orders over up to 20 steps; answers are compared by their largest value.
TOLERANCE = 2e-6


def save(tmp_path, scripted, name="old.pt"):
    torch.jit.save(scripted, str(tmp_path / name))
    return tmp_path / name


def run_import(monkeypatch, capsys, path, *options, formats="safetensors,cellstep"):
    """The command in this process: exit code, lines, errors."""
    arguments = ["cellstep", "import", path, "-o", path.parent / "new", "--formats", formats, *options]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    out, err = capsys.readouterr()
    return exit.value.code or 0, out.splitlines(), err


def assert_close(ours, theirs, tolerance=TOLERANCE):
    ours, theirs = torch.as_tensor(np.asarray(ours)).double(), theirs.detach().double()
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= tolerance * max(float(theirs.abs().max()), 1e-30)


def written(path, suffixes=(".safetensors", ".cellstep")):
    """What was written: the artifacts of cellstep, each with calls on tensors."""
    for suffix in suffixes:
        file = path.parent / "new" / f"{path.stem}{suffix}"
        yield cellstep.load(file)


@pytest.fixture
def rescued(tmp_path, monkeypatch, capsys):
    """Import a scripted module by the command and give the lines and the artifacts."""

    def call(scripted, *options, formats="safetensors,cellstep"):
        path = save(tmp_path, scripted)
        code, lines, err = run_import(monkeypatch, capsys, path, *options, formats=formats)
        assert code == 0, err
        return lines, list(written(path, [f".{name}" for name in formats.split(",")]))

    return call


# The common cases


class Actuator(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 8, 2, batch_first=True)
        self.fc = nn.Linear(8, 1)
        self.register_buffer("in_scale", torch.tensor([2.0, 0.1]))
        self.register_buffer("out_scale", torch.tensor(30.0))

    def forward(self, x, state: tuple[Tensor, Tensor]):
        y, state = self.lstm(x * self.in_scale, state)
        return self.fc(y[:, -1]) * self.out_scale, state


def test_actuator_network_in_every_format(rescued):
    torch.manual_seed(0)
    scripted = torch.jit.script(Actuator().eval())
    names = ("--input-names", "error,h_in,c_in", "--output-names", "torque,h_out,c_out")
    lines, artifacts = rescued(scripted, "--run-original", *names, formats="safetensors,cellstep,onnx,pt2")
    for text in (
        "found in_scale: scaling of shape (2,)",
        "found lstm: LSTM 2 -> 8, 2 layers",
        "found fc: dense 8 -> 1",
    ):
        assert text in lines
    assert any(line.startswith("the original as torch runs it: largest difference") for line in lines)
    assert not any("warning" in line or "not understood" in line for line in lines)
    x = torch.randn(3, 7, 2)
    state = (torch.randn(2, 3, 8).tanh(), torch.randn(2, 3, 8))
    theirs, (h, c) = scripted(x, state)
    for artifact in artifacts:
        ours, (h_n, c_n) = artifact(x.numpy(), tuple(part.numpy() for part in state))
        assert_close(ours, theirs)
        assert_close(h_n, h)
        assert_close(c_n, c)
    graph = onnx.load(artifacts[2].path).graph
    assert [value.name for value in graph.input][:3] == ["error", "h_in", "c_in"]
    assert [value.name for value in graph.output][:3] == ["torque", "h_out", "c_out"]


class Policy(nn.Module):
    """Memory in buffers, as exporters of reinforcement learning script it."""

    def __init__(self, given=False):
        super().__init__()
        self.given = given
        self.memory = nn.LSTM(6, 16)
        self.actor = nn.Sequential(nn.Linear(16, 12), nn.ELU(), nn.Linear(12, 3))
        self.register_buffer("hidden_state", torch.zeros(1, 1, 16))
        self.register_buffer("cell_state", torch.zeros(1, 1, 16))
        self.register_buffer("mean", torch.arange(6.0))

    def forward(self, x):
        out, (h, c) = self.memory((x - self.mean).unsqueeze(0), (self.hidden_state, self.cell_state))
        self.hidden_state[:] = h
        self.cell_state[:] = c
        return self.actor(out.squeeze(0))

    @torch.jit.export
    def reset_memory(self):
        self.hidden_state[:] = 0.0
        self.cell_state[:] = 0.0


class GivenPolicy(Policy):
    def forward(self, obs, h_in, c_in):  # type: ignore[override]
        out, (h, c) = self.memory((obs - self.mean).unsqueeze(0), (h_in, c_in))
        return self.actor(out.squeeze(0)), h, c


def test_policy_saved_in_the_middle_of_a_run(rescued):
    torch.manual_seed(1)
    policy = torch.jit.script(Policy().eval())
    policy(torch.randn(1, 6))
    lines, artifacts = rescued(policy)
    warned = [line for line in lines if line.startswith("warning: ")]
    assert len(warned) == 2 and "hidden_state is a saved state that is not zero" in warned[0]
    assert any("batches of 1 alone" in line for line in lines)
    policy.reset_memory()
    x = torch.randn(9, 1, 6)
    theirs = torch.cat([policy(row) for row in x])
    for artifact in artifacts:
        ours, _ = artifact.run(x.transpose(0, 1).numpy(), artifact.initial_state(1))
        assert_close(ours[0], theirs)


def test_policy_that_is_given_its_state(rescued):
    torch.manual_seed(2)
    policy = torch.jit.script(GivenPolicy().eval())
    _, artifacts = rescued(policy)
    x, state = torch.randn(4, 6), (torch.randn(1, 4, 16).tanh(), torch.randn(1, 4, 16))
    theirs, h, c = policy(x, *state)
    for artifact in artifacts:
        ours, (h_n, c_n) = artifact.step(x.numpy(), tuple(part.numpy() for part in state))
        assert_close(ours, theirs)
        assert_close(h_n, h)
        assert_close(c_n, c)


class Forecast(nn.Module):
    def __init__(self, head: str, both: bool, batch_first: bool, dtype=torch.float32):
        super().__init__()
        self.head, self.batch_first = head, batch_first
        self.lstm = nn.LSTM(3, 7, 2, batch_first=batch_first, bidirectional=both, dtype=dtype)
        self.fc = nn.Linear(14 if both and head != "h_n" else 7, 2, dtype=dtype)

    def forward(self, x):
        y, (h, c) = self.lstm(x)
        if self.head == "last":
            return self.fc(y[:, -1] if self.batch_first else y[-1])
        if self.head == "h_n":
            return self.fc(h[-1])
        if self.head == "every":
            return self.fc(y)
        return self.fc(torch.cat([h[-2], h[-1]], 1))


def traced(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of torch.nn.LSTM's own checks of sizes
        return torch.jit.trace(module, torch.randn(2, 5, 3))


WAYS = {
    "script": torch.jit.script,
    "freeze": lambda module: torch.jit.freeze(torch.jit.script(module)),
    "optimize": lambda module: torch.jit.optimize_for_inference(torch.jit.script(module)),
    "trace": traced,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head", ["last", "h_n", "every", "both"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_forecasters(rescued, way, head, batch_first, both):
    if (head == "h_n" and both) or (head == "both" and not both):
        pytest.skip("one direction has one last state; a head on the backward direction alone is no chain")
    torch.manual_seed(3)
    model = WAYS[way](Forecast(head, both, batch_first).eval())
    lines, artifacts = rescued(model)
    assert any(f"LSTM 3 -> 7, 2 layers{', both directions' if both else ''}" in line for line in lines)
    assert not any("not understood" in line for line in lines)
    x = torch.randn(4, 9, 3)
    theirs = model(x if batch_first else x.transpose(0, 1).contiguous())
    if head == "every" and not batch_first:
        theirs = theirs.transpose(0, 1)
    for artifact in artifacts:
        assert_close(artifact(x.numpy()), theirs)


class GateCell(nn.Module):
    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        for gate in "ifgo":
            setattr(self, f"W_i{gate}", nn.Parameter(torch.randn(hidden, inputs) * 0.3))
            setattr(self, f"W_h{gate}", nn.Parameter(torch.randn(hidden, hidden) * 0.3))
            setattr(self, f"b_{gate}", nn.Parameter(torch.randn(hidden) * 0.3))

    def forward(self, x: Tensor, h: Tensor, c: Tensor):
        i = torch.sigmoid(x @ self.W_ii.t() + h @ self.W_hi.t() + self.b_i)
        f = torch.sigmoid(x @ self.W_if.t() + h @ self.W_hf.t() + self.b_f)
        g = torch.tanh(x @ self.W_ig.t() + h @ self.W_hg.t() + self.b_g)
        o = torch.sigmoid(x @ self.W_io.t() + h @ self.W_ho.t() + self.b_o)
        c = f * c + i * g
        return o * torch.tanh(c), c


class FusedCell(nn.Module):
    """Gates in another order, cut out of one product; ``joined``: of input and state side by side."""

    def __init__(self, inputs: int, hidden: int, joined: bool = False):
        super().__init__()
        self.joined, self.hidden = joined, hidden
        self.x2h = nn.Linear(inputs + hidden if joined else inputs, 4 * hidden)
        self.h2h = nn.Linear(hidden, 4 * hidden)

    def forward(self, x: Tensor, h: Tensor, c: Tensor):
        gates = self.x2h(torch.cat([x, h], 1)) if self.joined else self.x2h(x) + self.h2h(h)
        o, i, f = (
            gates[:, : self.hidden],
            gates[:, self.hidden : 2 * self.hidden],
            gates[:, 2 * self.hidden : -self.hidden],
        )
        g = gates.chunk(4, 1)[3]
        c = c * f.sigmoid() + g.tanh() * i.sigmoid_()
        return torch.tanh(c) * torch.sigmoid(o), c


class JoinedCell(FusedCell):
    def __init__(self, inputs: int, hidden: int):
        super().__init__(inputs, hidden, True)


class TorchCell(nn.LSTMCell):
    def forward(self, x: Tensor, h: Tensor, c: Tensor):  # type: ignore[override]
        return torch._VF.lstm_cell(x, (h, c), self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class ByHand(nn.Module):
    """A loop over steps and cells; every step is kept in a list or written into a tensor, or the last is taken."""

    def __init__(self, cell, keep: str):
        super().__init__()
        self.keep = keep
        self.cells = nn.ModuleList([cell(3, 5), cell(5, 5)])
        self.fc = nn.Linear(5, 2)

    def forward(self, x):
        h = [torch.zeros(x.size(0), 5, dtype=x.dtype) for _ in range(2)]
        c = [torch.zeros(x.size(0), 5, dtype=x.dtype) for _ in range(2)]
        outputs: list[Tensor] = []
        filled = torch.zeros(x.size(0), x.size(1), 5)
        for t in range(x.size(1)):
            value = x[:, t]
            for k, cell in enumerate(self.cells):
                h[k], c[k] = cell(value, h[k], c[k])
                value = h[k]
            outputs.append(value)
            filled[:, t] = value
        if self.keep == "stack":
            return self.fc(torch.stack(outputs, 1))
        return self.fc(filled if self.keep == "fill" else h[-1])


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("keep", ["last", "stack", "fill"])
@pytest.mark.parametrize("cell", [GateCell, FusedCell, JoinedCell, TorchCell])
def test_cells_in_a_loop(rescued, cell, keep, freeze):
    torch.manual_seed(4)
    model = torch.jit.script(ByHand(cell, keep).eval())
    lines, artifacts = rescued(torch.jit.freeze(model) if freeze else model)
    if not freeze:
        assert (
            "found cells.1: LSTMCell 5 -> 5" in lines
            or "found cells.1.h2h: LSTMCell 5 -> 5" in lines
            or cell is JoinedCell
        )
    x = torch.randn(4, 9, 3)
    for artifact in artifacts:
        assert_close(artifact(x.numpy()), model(x))


class Answer(NamedTuple):
    y: Tensor
    c: Tensor


class Nested(nn.Module):
    """An LSTM two modules deep with a learned first state, an encoder, normalised input and a skip."""

    def __init__(self):
        super().__init__()
        self.body = nn.Module()
        self.norm = nn.BatchNorm1d(4)
        self.norm.running_mean.copy_(torch.randn(4))
        self.norm.running_var.copy_(torch.rand(4) + 0.5)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.core = nn.ModuleDict({"rnn": nn.LSTM(6, 5, 2, batch_first=True)})
        self.h0, self.c0 = nn.Parameter(torch.randn(2, 1, 5) * 0.5), nn.Parameter(torch.randn(2, 1, 5))
        self.out = nn.Linear(5, 1)
        del self.body

    def forward(self, x) -> Answer:
        z = self.net(self.norm(x.transpose(1, 2)).transpose(1, 2))
        count = x.size(0)
        y, (_, c) = self.core["rnn"](z, (self.h0.expand(-1, count, -1).contiguous(), self.c0.repeat(1, count, 1)))
        return Answer(torch.sigmoid(self.out(y)) * 3.0 - 1.0 + x[:, :, 2:3], c)


def test_learned_state_normalisation_skip_and_named_answer(rescued):
    torch.manual_seed(5)
    model = torch.jit.script(Nested().eval())
    lines, artifacts = rescued(model)
    assert any("from a learned state" in line and "plus columns of the input" in line for line in lines)
    x = torch.randn(3, 8, 4)
    for artifact in artifacts:
        assert_close(artifact(x.numpy()), model(x).y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(rescued, dtype):
    torch.manual_seed(6)
    model = torch.jit.script(Forecast("last", False, True).to(dtype).eval())
    lines, artifacts = rescued(model, formats="safetensors,cellstep")
    x = torch.randn(3, 6, 3).to(dtype)
    for artifact in artifacts:
        rounded = dtype == torch.float16 or artifact.path.endswith(".cellstep")
        assert artifact.dtype == (np.float32 if rounded else np.float64)
        # float64: sums of another order. float16: the written model keeps the weights and computes in float32, so the
        # original, run in float32, is the one to compare with.
        theirs = model(x) if dtype == torch.float64 else model.float()(x.float())
        assert_close(artifact(x.numpy().astype(artifact.dtype)), theirs, TOLERANCE if rounded else 1e-12)
    assert any(line.endswith("answer") and "rounded to float32" in line for line in lines) == (dtype == torch.float64)
    assert any("weights are float16" in line for line in lines) == (dtype == torch.float16)


def test_bare_lstm_and_training_mode(rescued):
    torch.manual_seed(7)
    lstm = nn.LSTM(3, 4, 2, dropout=0.5)
    lines, artifacts = rescued(torch.jit.script(lstm.train()))
    assert any("saved in training mode" in line for line in lines)
    x = torch.randn(5, 2, 3)
    for artifact in artifacts:
        assert_close(artifact(x.transpose(0, 1).numpy()), lstm.eval()(x)[0].transpose(0, 1))


def test_layers_by_name_and_what_is_not_known(tmp_path, monkeypatch, capsys):
    torch.manual_seed(8)
    policy = Policy().eval()
    policy.actor[1] = nn.CELU()
    path = save(tmp_path, torch.jit.script(policy))
    code, lines, err = run_import(monkeypatch, capsys, path)
    assert code == 2 and err.count("\n") == 1 and "'celu' on the way to the answer" in err and "--layers" in err
    assert "found memory: LSTM 6 -> 16" in lines and not (tmp_path / "new").exists()
    code, lines, err = run_import(monkeypatch, capsys, path, "--layers", "memory,actor.0:relu,actor.2")
    assert code == 0 and any(line.startswith("warning: these layers were not seen to give") for line in lines)
    code, lines, err = run_import(monkeypatch, capsys, path, "--layers", "memory,nothing")
    assert code == 2 and "got 'nothing'" in err

    path = save(tmp_path, torch.jit.script(Actuator().eval()), "b.pt")
    code, lines, _ = run_import(monkeypatch, capsys, path, "--layers", "lstm,fc")  # without its scaling
    assert code == 0 and any("were not seen to give" in line for line in lines)
    path = save(tmp_path, torch.jit.script(Forecast("last", False, False).eval()), "c.pt")
    code, lines, _ = run_import(monkeypatch, capsys, path, "--layers", "lstm,fc")
    assert code == 0 and any(line.startswith("the same numbers as the file's code") for line in lines)


def test_what_cellstep_exported_is_recognised(tmp_path, monkeypatch, capsys):
    cellstep.export(cellstep.nn.LSTM(2, 3).eval(), tmp_path / "ours.pt")
    code, _, err = run_import(monkeypatch, capsys, tmp_path / "ours.pt")
    assert code == 2 and "got one on cellstep's" in err and ".safetensors" in err


# Code that computes something else: the numbers agree, or there is a reason and no chain


class Odd(nn.Module):
    """An LSTM and a head with one of many things in the way."""

    def __init__(self, odd: str):
        super().__init__()
        self.odd = odd
        self.one, self.two = nn.LSTM(3, 4, batch_first=True), nn.LSTM(4, 4, batch_first=True)
        self.fc, self.attention = nn.Linear(4, 4), nn.Linear(4, 1)
        self.h0 = nn.Parameter(torch.randn(1, 1, 4))
        self.register_buffer("seen", torch.ones(1))

    def forward(self, x):
        odd = self.odd
        if odd == "reversed input":
            x = x.flip(1)
        if odd == "last step of the input":
            x = x[:, -1:]
        if odd == "clamped input":
            x = x.clamp(-2.5, 2.5)
        if odd == "integer input":
            x = x.to(torch.int32).to(torch.float32)
        if odd == "state not zero":
            y, (h, c) = self.one(x, (self.h0.repeat(1, x.size(0), 1), torch.ones(1, x.size(0), 4)))
        else:
            y, (h, c) = self.one(x)
        if odd == "relu between":
            y = torch.relu(y)
        if odd == "scale between":
            y = y * 2.0
        if odd == "state handed on":
            y, (h, c) = self.two(y, (h, c))
        elif odd == "residual":
            y = self.two(y)[0] + y
        else:
            y, (h, c) = self.two(y)
        if odd == "first step":
            return self.fc(y[:, 0])
        if odd == "last but one":
            return self.fc(y[:, -2:][:, 0])
        if odd == "mean":
            return self.fc(y.mean(1))
        if odd == "attention":
            return self.fc((torch.softmax(self.attention(y), 1) * y).sum(1))
        if odd == "cell state":
            return self.fc(c[-1])
        if odd == "softmax over steps":
            return torch.softmax(self.fc(y), 1)
        if odd == "softmax over batch":
            return torch.softmax(self.fc(y[:, -1]), 0)
        if odd == "branch":
            return self.fc(y[:, -1]) if bool(x.sum() > 0) else -self.fc(y[:, -1])
        if odd == "in place":
            y = self.fc(y)
            y[:, :, 1] *= 3.0
            return y
        if odd == "running count":
            self.seen += 1.0
            return self.fc(y[:, -1]) * self.seen
        if odd == "last row of the batch":
            return self.fc(y[-1])
        if odd == "product":
            return self.fc(y) * torch.sigmoid(self.attention(y))
        if odd == "twice":
            return self.fc(torch.relu(self.fc(y[:, -1]) / 3.0) - 0.5)
        return self.fc(y[:, -1])


FINE = {"nothing", "state not zero", "twice"}
ODDITIES = [
    *FINE, "reversed input", "last step of the input", "clamped input", "integer input", "relu between",
    "scale between", "state handed on", "residual", "first step", "last but one", "mean", "attention", "cell state",
    "softmax over steps", "softmax over batch", "branch", "in place", "running count", "last row of the batch",
    "product",
]  # fmt: skip


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("odd", sorted(ODDITIES))
def test_what_a_chain_cannot_say_is_refused(tmp_path, odd, freeze):
    torch.manual_seed(9)
    model = torch.jit.script(Odd(odd).eval())
    finding = read(save(tmp_path, torch.jit.freeze(model) if freeze else model))
    assert (finding.chain is not None) == (odd in FINE), finding.reason
    assert bool(finding.reason) != (odd in FINE)
    if finding.chain is not None:
        x = torch.randn(3, 6, 3)
        assert_close(finding.chain(x).detach(), model(x))


HEADS = ["{0}", "torch.relu({0})", "torch.tanh({0})", "{0} * 1.5", "2.0 - {0}", "{0} / self.scale", "self.fc({0})",
         "torch.softmax({0}, -1)", "torch.softmax({0}, 0)", "{0} + {0}", "torch.sin({0})", "torch.sigmoid({0}) + 1.0",
         "{0}.clamp(-0.3, 0.3)"]  # fmt: skip
TAKES = [
    "y",
    "y[:, -1]",
    "y[-1]",
    "y[:, 0]",
    "h[-1]",
    "c[-1]",
    "torch.cat([y, y], 2)[:, :, 4:]",
    "y.mean(1)",
    "y.flip(1)",
]
BEFORE = ["x", "(x - self.shift) / 0.5", "x * self.shift", "self.enc(x)", "torch.tanh(self.enc(x))", "x.flip(0)",
          "x[:, 1:]", "1.0 / x", "x.transpose(0, 1)", "x.abs()"]  # fmt: skip


@given(
    before=st.lists(st.sampled_from(BEFORE), max_size=2),
    layers=st.integers(1, 2),
    batch_first=st.booleans(),
    take=st.sampled_from(TAKES),
    heads=st.lists(st.sampled_from(HEADS), max_size=3),
    freeze=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_random_modules_give_their_numbers_or_a_reason(
    tmp_path_factory, before, layers, batch_first, take, heads, freeze, seed
):
    torch.manual_seed(seed)
    module = type("Random", (nn.Module,), {})()  # a class of its own: torch shares code among modules of one
    module.lstm = nn.LSTM(4, 4, layers, batch_first=batch_first)
    module.fc, module.enc = nn.Linear(4, 4), nn.Linear(4, 4)
    module.register_buffer("shift", torch.randn(4))
    module.register_buffer("scale", torch.rand(4) + 0.5)
    lines = [f"x = {text}" for text in before] + ["y, (h, c) = self.lstm(x)", f"z = {take}"]
    lines += [f"z = {text.format('z')}" for text in heads] + ["return z"]
    scripted = torch.jit.script(module.eval())
    scripted.define("def forward(self, x: Tensor):\n    " + "\n    ".join(lines) + "\n")
    if freeze:
        scripted = torch.jit.freeze(scripted.eval())
    finding = read(save(tmp_path_factory.mktemp("random"), scripted))
    assert (finding.chain is None) == bool(finding.reason)
    if finding.match is not None:
        match = finding.match
        rows = 1 if match.layout.one_row else 3
        x = torch.randn(rows, 6, 4)
        ours = finding.chain.run(x, finding.chain.initial_state(rows))[0] if match.layout.stepwise else finding.chain(x)
        assert match.layout.stepwise is False  # an nn.LSTM takes whole sequences, however it is called
        assert_close(ours.detach(), ask(match, scripted, x), 1e-5)  # up to three softmaxes and quotients more
    plain = not set(before) - set(BEFORE[:5]) and take in ("y", "h[-1]") and not set(heads) - set(HEADS[:7])
    assert finding.chain is not None or not plain, finding.reason


# The layouts of torch 1.0 to 1.3, by a small writer after torch's own sources of then


def zipped(entries, compression=zipfile.ZIP_STORED, folder="old"):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(f"{folder}/{name}", data)
    return stream.getvalue()


def table_archive(tmp_path, version, module, tensors, attributes=None, compression=zipfile.ZIP_STORED, **more):
    """model.json with 64-bit integers as text, as protobuf writes JSON, and one entry a tensor."""
    table = []
    entries = dict(more)
    for k, tensor in enumerate(tensors):
        entries[f"tensors/{k}"] = tensor.contiguous().numpy().tobytes()
        kind = {torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.int64: "INT64"}[tensor.dtype]
        table.append({"dims": [str(n) for n in tensor.shape], "offset": "0", "dataType": kind, "device": "cpu",
                      "strides": [str(n) for n in tensor.contiguous().stride()], "requiresGrad": False,
                      "data": {"key": f"tensors/{k}"}})  # fmt: skip
    if attributes is not None:
        entries["attributes.pkl"] = attributes
    model = {"protoVersion": str(version), "mainModule": module, "producerName": "pytorch", "producerVersion": "1.0",
             "tensors": table}  # fmt: skip
    entries["model.json"] = json.dumps(model)
    path = tmp_path / "old.pt"
    path.write_bytes(zipped(entries, compression))
    return path


# As torch 1.0 and 1.1 printed it: parameters of submodules in the code of the one that uses them.
OLD_CODE = """op_version_set = 0
def forward(self,
    x: Tensor) -> Tensor:
  _0 = torch.mul(x, self.in_scale)
  h = torch.zeros([1, ops.prim.NumToTensor(torch.size(_0, 0)), 4], dtype=6, layout=0, device=[0, -1])
  _1 = [self.lstm.weight_ih_l0, self.lstm.weight_hh_l0, self.lstm.bias_ih_l0, self.lstm.bias_hh_l0]
  _2, _3, _4 = torch.lstm(_0, [h, h], _1, True, 1, 0., False, False, True)
  _5 = torch.select(torch.slice(_2, 0, 0, 9223372036854775807, 1), 1, -1)
  return torch.add(torch.addmm(self.fc.bias, _5, torch.t(self.fc.weight), beta=1, alpha=1), CONSTANTS.c7, alpha=1)
""".replace("ops.prim.NumToTensor(torch.size(_0, 0))", "int(torch.size(_0, 0))")
# As torch 1.2 and 1.3 did: a file of methods a module, and calls of them.
NEWER_CODE = {
    "code/old.py": """op_version_set = 1
def forward(self,
    x: Tensor) -> Tensor:
  _0 = (self.lstm).forward(torch.mul(x, self.in_scale), )
  _1 = torch.select(_0, 1, -1)
  return torch.add((self.fc).forward(_1, ), CONSTANTS.c7, alpha=1)
""",
    "code/old_lstm.py": """op_version_set = 1
def forward(self,
    input: Tensor) -> Tensor:
  if self.batch_first:
    n = torch.size(input, 0)
  else:
    n = torch.size(input, 1)
  h = torch.zeros([1, n, 4], dtype=ops.prim.dtype(input), layout=0, device=ops.prim.device(input))
  _0 = [self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0]
  y, _1, _2 = torch.lstm(input, [h, h], _0, True, 1, 0., self.training, False, self.batch_first)
  return y
""",
    "code/old_fc.py": """op_version_set = 1
def forward(self,
    input: Tensor) -> Tensor:
  _0 = torch.addmm(self.bias, input, torch.t(self.weight), beta=1, alpha=1)
  return _0
""",
}


def old_parts():
    torch.manual_seed(10)
    lstm, fc = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)
    scale, shift = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 2.0, 3.0])
    names = [f"{kind}_l0" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    tensors = [*(getattr(lstm, name).detach() for name in names), fc.weight.detach(), fc.bias.detach(), scale, shift]
    children = [
        {"name": "lstm", "optimize": True, "parameters": [
            {"isBuffer": False, "tensorId": str(k), "name": name} for k, name in enumerate(names)]},
        {"name": "fc", "optimize": True, "parameters": [
            {"isBuffer": False, "tensorId": "4", "name": "weight"},
            {"isBuffer": False, "tensorId": "5", "name": "bias"}]},
    ]  # fmt: skip
    module = {"submodules": children, "name": "old", "optimize": True,
              "torchscriptArena": {"key": "code/old.py"},
              "parameters": [{"isBuffer": True, "tensorId": "6", "name": "in_scale"}]}  # fmt: skip
    return module, tensors, lambda x: fc(lstm(x * scale)[0][:, -1]) + shift


def old_archive(tmp_path, version=2, **options):
    module, tensors, original = old_parts()
    attributes = None
    if version > 2:
        for child in module["submodules"]:
            child["torchscriptArena"] = {"key": f"code/old_{child['name']}.py"}
        module["submodules"][0]["attributes"] = [
            {"type": "bool", "name": "training", "id": "0"}, {"type": "bool", "name": "batch_first", "id": "1"},
            {"type": "List[int]", "name": "sizes", "id": "2"}, {"type": "Optional[Tensor]", "name": "none", "id": "-1"},
            {"type": "Tensor", "name": "table", "id": "3"}]  # fmt: skip
        calls = b"ctorch.jit._pickle\nbuild_intlist\n(](K\x02K\x04etRctorch.jit._pickle\nbuild_tensor_from_id\n(K\x06tR"
        attributes = b"\x80\x02(\x89\x88" + calls + b"t."
        options |= NEWER_CODE
    elif version == 2:
        attributes = b"\x80\x02]."
    code = {"code/old.py": OLD_CODE} if version <= 2 else {}
    return table_archive(tmp_path, version, module, tensors, attributes, **code, **options), original


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("version", [1, 2, 3, 5])
def test_archives_of_torch_1_0_to_1_3(tmp_path, monkeypatch, capsys, version, compression):
    path, original = old_archive(tmp_path, version, compression=compression)
    code, lines, err = run_import(monkeypatch, capsys, path)
    assert code == 0, err
    assert {"found lstm: LSTM 2 -> 4", "found fc: dense 4 -> 3", "found in_scale: scaling of shape (2,)"} < set(lines)
    x = torch.randn(3, 6, 2)
    for artifact in written(path):
        assert_close(artifact(x.numpy()), original(x))


# Archives that are damaged, or mean harm


def data_archive(tmp_path, data, constants=b"\x80\x02).", storages=None, code="", **more):
    entries = {"data.pkl": data, "constants.pkl": constants, "code/__torch__.py": code, **more}
    entries |= {f"data/{k}": value for k, value in (storages or {}).items()}
    path = tmp_path / "file.pt"
    path.write_bytes(zipped(entries))
    return path


def assert_refused(path):
    with pytest.raises(ValueError) as caught:
        read(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("expected ")


def tensor_opcodes(
    key="0", numel=4, offset=0, sizes=(2, 2), strides=(2, 1), kind="FloatStorage", builder="_rebuild_tensor_v2"
):
    """A tensor as torch's pickler writes it, with numbers of our choice."""

    def number(n):
        return b"\x8a\x08" + struct.pack("<q", n)

    def text(s):
        return b"X" + struct.pack("<I", len(s)) + s.encode()

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(numel) + b"tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return (
        f"ctorch._utils\n{builder}\n(".encode()
        + storage
        + number(offset)
        + numbers(sizes)
        + numbers(strides)
        + hooks
        + b"tR"
    )


def module_opcodes(**attributes):
    body = b"".join(b"X" + struct.pack("<I", len(name)) + name.encode() + value for name, value in attributes.items())
    return b"\x80\x02c__torch__\nModel\n)\x81}(" + body + b"ub."


class Harm:
    def __reduce__(self):
        return __import__("os").system, ("touch harmed",)


PICKLES = {
    "a call of os.system": pickle.dumps(Harm(), 2),
    "a newer protocol": pickle.dumps(Harm(), 4),
    "eval": b"\x80\x02cbuiltins\neval\nX\x04\x00\x00\x001+1\x85R.",
    "getattr in torch": b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00a\x85R.",
    "a class of torch._utils": b"\x80\x02ctorch._utils\n_rebuild_qtensor\n)R.",
    "sparse": b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n)R.",
    "dots into a module": b"\x80\x02c__torch__os\nsystem\n)\x81.",
    "a call of a class of its own": b"\x80\x02c__torch__\nModel\nX\x01\x00\x00\x00a\x85R.",
    "a call of a list": b"\x80\x02])R.",
    "a call without arguments": b"\x80\x02ccollections\nOrderedDict\n]R.",
    "hostile arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03K\x04tR.",
    "a filled OrderedDict": b"\x80\x02ccollections\nOrderedDict\n]\x85R.",
    "a state for a name": b"\x80\x02ccollections\nOrderedDict\n}b.",
    "a state for a list": b"\x80\x02]}b.",
    "two states": b"\x80\x02c__torch__\nModel\n)\x81}X\x01\x00\x00\x00aK\x01sb}X\x01\x00\x00\x00bK\x01sb.",
    "an object of torch": b"\x80\x02ctorch\ndevice\n)\x81.",
    "extensions": b"\x80\x02\x82\x01.",
    "INST": b"\x80\x02(ios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\no.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "a memo of nothing": b"\x80\x02h\x07.",
    "a huge memo": b"\x80\x02]r\xff\xff\xff\x7f" + b"j\xff\xff\xff\x7e.",
    "an empty stack": b"\x80\x02a.",
    "appended to a dict": b"\x80\x02}K\x01a.",
    "an item of a list": b"\x80\x02]K\x01K\x02s.",
    "a list as a key": b"\x80\x02}](K\x01K\x02us.",
    "a tuple as a key": b"\x80\x02})K\x01s.",
    "no end": b"\x80\x02]",
    "nothing": b"",
    "two values": b"\x80\x02]].",
    "a list for a module": b"\x80\x02].",
    "a text longer than the file": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "a storage of anything": b"\x80\x02K\x01Q.",
    "marks alone": b"\x80\x02" + b"(" * 200_000 + b".",
    "millions of opcodes": b"\x80\x02" + b"N0" * 10 + b"N" * 1_100_000 + b".",
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_mean_harm(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert_refused(data_archive(tmp_path, PICKLES[name]))
    assert_refused(data_archive(tmp_path, module_opcodes(), constants=PICKLES[name]) if "list" not in name else
                   data_archive(tmp_path, PICKLES[name]))  # fmt: skip
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "numbers",
    [
        {"numel": 5}, {"numel": -1}, {"offset": 1}, {"offset": -1}, {"sizes": (3, 2)}, {"sizes": (-1, 2)},
        {"strides": (-2, 1)}, {"strides": (1 << 40, 1)}, {"sizes": (1 << 40, 1 << 40), "strides": (0, 0)},
        {"sizes": (2,)}, {"sizes": (1,) * 9, "strides": (1,) * 9}, {"kind": "QInt8Storage"}, {"kind": "UntypedStorage"},
        {"key": "1"}, {"key": "../data.pkl"}, {"kind": "DoubleStorage"}, {"builder": "_rebuild_meta_tensor_no_storage"},
        {"sizes": (100_000,), "strides": (0,)}, {"sizes": (1 << 62, 1 << 62, 0), "strides": (1, 1, 1)},
    ],
)  # fmt: skip
def test_tensors_that_do_not_lie_in_their_storage(tmp_path, numbers):
    storage = {"0": np.arange(4, dtype=np.float32).tobytes()}
    fine = read_archive(data_archive(tmp_path, module_opcodes(w=tensor_opcodes()), storages=storage))
    assert torch.equal(fine.root.state["w"], torch.arange(4.0).reshape(2, 2))
    assert_refused(data_archive(tmp_path, module_opcodes(w=tensor_opcodes(**numbers)), storages=storage))


def test_lists_within_lists_cost_no_more_than_their_text(tmp_path):
    # x = [x, x] of itself a hundred times over: 2 to the 100 values for whoever walks through them.
    bomb = b"]q\x00" + b"".join(b"h%c\x86q%c" % (k, k + 1) for k in range(100))
    code = """class Model(Module):
  def forward(self, x: Tensor) -> Tensor:
    return {}
"""
    uses = ["self.a", "torch.eq(self.a, self.b)", "torch.tensor(self.a)", "torch.cat(self.a)", "torch.format(self.a)",
            "torch.relu(self.a)", "{}[(self.a, 1)]"]  # fmt: skip
    for use in uses:
        path = data_archive(tmp_path, module_opcodes(a=bomb, b=bomb), code=code.format(use))
        assert read(path).chain is None
    deep = b"]" * 5000 + b"a" * 4999
    assert read(data_archive(tmp_path, module_opcodes(a=deep), code=code.format("self.a"))).chain is None


@pytest.mark.parametrize(
    "body",
    [
        "    while True:\n      x = x\n    return x",
        "    return (self).forward(x, )",
        "    return torch.zeros([1099511627776, 4])",
        "    return torch.add(torch.expand(x, [1048576, 1048576, 2, 1, 1]), 1)",
        "    y = torch.repeat(x, [4096, 4096, 4])\n    return y",
        "    y = torch.expand(torch.zeros([1, 1]), [60000, 60000])\n    return torch.matmul(y, y)",
        "    y = [x]\n    for i in range(100):\n      y = torch.add(y, y)\n    return torch.cat(y)",
        "    for i in range(9223372036854775807):\n      pass\n    return x",
        "    n = 7\n    for i in range(100):\n      n = torch.mul(n, n)\n    return x",
        "    return " + "(" * 150 + "x" + ")" * 150,
        "    return " + "torch.relu(" * 3000 + "x" + ")" * 3000,
        "    return " + "-" * 50_000 + "x",
        "    return x" + ".a" * 50_000,
        "    return torch.ops.load_library('x')",
        "    return torch.load('x')",
        "    return ops.aten.save(x, 'x')",
        "    return torch.from_file('x')",
        "    return torch.__class__(x)",
        "    return x.__class__",
        "    import os\n    return x",
        "    return [x for x in x]",
        "    return (lambda: x)()",
        "    return __import__('os')",
        "    return CONSTANTS.c99",
        "    return torch.set_(x, x)",
        "    return torch.resize_(x, [1])",
        "    return torch.as_strided(x, [99999], [1], 5)",
        "    return torch.index_select(x, 0, torch.tensor([99999]))",
        "    y = x\n    for i in range(3000):\n      y = torch.squeeze(torch.unsqueeze(y, 0), 0)\n    return y",
        "    y = x\n    for i in range(60):\n      y = torch.add(y, y)\n    return y * 1",
        "    y = x\n    for i in range(60):\n      y = torch.add(y, y)\n    return torch.mul(torch.sigmoid(y), y)",
        "    y = x\n    for i in range(40):\n      y = torch.narrow(torch.cat([y, y]), 0, 0, 1)\n    return y",
        "  return",
    ],
)
def test_code_that_means_harm(tmp_path, body):
    code = f"class Model(Module):\n  def forward(self, x: Tensor) -> Tensor:\n{body}\n"
    storage = {"0": np.ones(16, np.float32).tobytes()}
    data = module_opcodes(weight=tensor_opcodes(numel=16, sizes=(8, 2)))
    finding = read(data_archive(tmp_path, data, storages=storage, code=code))
    assert finding.chain is None and finding.reason


def entry_names(*names):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"\x80\x02).")
    return stream.getvalue()


def test_zips_that_mean_harm(tmp_path, monkeypatch):
    path = tmp_path / "file.pt"
    pickles = ["a/data.pkl", "a/constants.pkl"]
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = entry_names(*pickles, "a/data.pkl")
    encrypted = bytearray(entry_names(*pickles))
    encrypted[encrypted.rfind(b"PK\x01\x02") + 8] |= 1
    cases = [
        twice,
        bytes(encrypted),
        *(entry_names(*pickles, name) for name in ("a/../b", "/a/b", "a\\b", "a//b", "b/data.pkl", "a/./b")),
        zipped({"data.pkl": b"\x80\x02).", "data/0": bytes(1 << 26)}, zipfile.ZIP_DEFLATED),
        zipped({"data.pkl": b"\x80\x02]" + b"0" * (17 << 20), "constants.pkl": b"\x80\x02)."}),
        zipped({"data.pkl": b"\x80\x02).", "constants.pkl": b"\x80\x02)."}, zipfile.ZIP_BZIP2),
        b"", b"PK", b"PYTORCH1" + bytes(100), bytes(100),
    ]  # fmt: skip
    # One entry's bytes under two names, the trick of the densest bombs.
    plain = entry_names("a/data.pkl", "a/constants.pkl")
    place = plain.rfind(b"PK\x01\x02") + 42
    cases.append(plain[:place] + struct.pack("<I", 0) + plain[place + 4 :])
    # A size that lies.
    place = plain.find(b"PK\x01\x02") + 24
    cases.append(plain[:place] + struct.pack("<I", 1 << 31) + plain[place + 4 :])
    for data in cases:
        path.write_bytes(data)
        assert_refused(path)
    with pytest.raises(OSError):
        read(tmp_path / "none.pt")


def same(one, other):
    """Whether two archives hold the same weights, constants and code."""
    tensors = [
        [v for v in (*archive.root.state.values(), *archive.constants) if isinstance(v, Tensor)]
        for archive in (one, other)
    ]
    children = [[v.state for v in archive.root.state.values() if hasattr(v, "state")] for archive in (one, other)]
    flat = [[v for state in states for v in state.values() if isinstance(v, Tensor)] for states in children]
    return len(tensors[0]) == len(tensors[1]) and all(
        torch.equal(a, b) for a, b in itertools.chain(zip(*tensors, strict=True), zip(*flat, strict=True))
    )


def small_archives(tmp_path):
    code = "class Model(Module):\n  def forward(self, x: Tensor) -> Tensor:\n    return torch.relu(x)\n"
    storage = {"0": np.arange(4, dtype=np.float32).tobytes()}
    yield data_archive(tmp_path, module_opcodes(w=tensor_opcodes()), storages=storage, code=code)
    yield old_archive(tmp_path)[0]


def test_every_truncation_and_every_flipped_byte(tmp_path):
    target = tmp_path / "damaged.pt"
    for path in small_archives(tmp_path):
        whole, data = read_archive(path), path.read_bytes()
        for length in range(len(data)):
            target.write_bytes(data[:length])
            with pytest.raises(ValueError, match="^expected [^\n]*$"):
                read_archive(target)
        for place in range(len(data)):
            target.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
            try:
                found = read_archive(target)
            except ValueError as error:
                assert str(error).startswith("expected ") and "\n" not in str(error)
            else:
                assert same(found, whole), place


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_changed_entries_with_right_checksums(tmp_path_factory, data):
    """What a checksum cannot tell: bytes changed before the file was packed. Any finding, or one clean error."""
    tmp_path = tmp_path_factory.mktemp("changed")
    path = data.draw(st.sampled_from(list(small_archives(tmp_path))))
    with zipfile.ZipFile(path) as archive:
        entries = {name.partition("/")[2]: bytearray(archive.read(name)) for name in archive.namelist()}
    names = [name for name in sorted(entries) if entries[name]]
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(names))
        place = data.draw(st.integers(0, len(entries[name]) - 1))
        entries[name][place] = data.draw(st.integers(0, 255))
    path.write_bytes(zipped(entries))
    try:
        finding = read(path)
    except ValueError as error:
        assert str(error).startswith("expected ") and "\n" not in str(error)
    else:
        assert finding.chain is not None or finding.reason
        assert all(math.isfinite(value.numel()) for value in finding.scaling.values())
