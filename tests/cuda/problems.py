"""Problems for the CUDA operators, on a device or its emulation, and the answers in float64 from the formula.

This module needs torch alone, so that it runs on a machine with a GPU and little else.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
#: As CELLSTEP_CUDA_KERNEL names them; "" leaves the choice to the table.
KERNELS = ("", "plain", "rows", "block", "tensor", "cluster", "cluster_float")
#: Greatest error beside the greatest value of what is compared. float32: that of sums of a few hundred terms and two
#: approximations of 1e-7 each. 16 bits: h is rounded in every step and gates and cells are kept so for the backward
#: pass, by half a unit in the last place each (2^-11 and 2^-8 of a value), through a few steps that forget.
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
#: A gradient goes through gates and cells that are rounded, and back through every step.
GRADIENT_BOUNDS = {torch.float64: 1e-11, torch.float32: 4e-6, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@dataclass
class Target:
    """Where operators run: ``namespace`` of torch.ops, on ``device``."""

    namespace: str
    device: torch.device

    @property
    def ops(self) -> Any:
        return getattr(torch.ops, self.namespace)

    @property
    def emulated(self) -> bool:
        return self.device.type == "cpu"


def emulated_library() -> Path | None:
    """The newest emulation that was built in this tree, or the one that CELLSTEP_EMULATED_LIBRARY names."""
    if named := os.environ.get("CELLSTEP_EMULATED_LIBRARY"):
        return Path(named)
    built = ROOT.glob("build/*/tests/cuda/libcellstep_ops_emulated.so")
    return max(built, key=lambda path: path.stat().st_mtime, default=None)


def find_target(name: str) -> Target | str:
    """A target by name, "emulated" or "cuda", or why there is none."""
    if name == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device"
        import cellstep.ops  # noqa: F401  loads the operators

        return Target("cellstep", torch.device("cuda"))
    library = emulated_library()
    if library is None:
        return "the emulation is not built: configure with -DCELLSTEP_BUILD_CUDA_EMULATED=ON"
    if not torch._C._dispatch_has_kernel("cellstep_emulated::has_kernels"):
        torch.ops.load_library(library)
    return Target("cellstep_emulated", torch.device("cpu"))


def has(target: Target, name: str) -> bool:
    """Whether an operator has a kernel there."""
    key = "CPU" if target.emulated else "CUDA"
    full = f"{target.namespace}::{name}"
    return torch._C._dispatch_has_kernel(full) and torch._C._dispatch_has_kernel_for_dispatch_key(full, key)


@contextlib.contextmanager
def forced(kernel: str) -> Iterator[None]:
    before = os.environ.pop("CELLSTEP_CUDA_KERNEL", None)
    if kernel:
        os.environ["CELLSTEP_CUDA_KERNEL"] = kernel
    try:
        yield
    finally:
        os.environ.pop("CELLSTEP_CUDA_KERNEL", None)
        if before is not None:
            os.environ["CELLSTEP_CUDA_KERNEL"] = before


def poison(target: Target) -> None:
    """Fills memory that is free with NaN, so that a value that nobody writes is none."""
    sizes = [2**k for k in range(6, 23, 2)] + ([2**26] if not target.emulated else [])
    blocks = [torch.full((size,), float("nan"), device=target.device) for size in sizes for _ in range(4)]
    del blocks


@dataclass
class Problem:
    """Arguments of lstm_layers, fresh and random, and gradients of what it answers.

    ``sizes``: T, N, I, H, L, D. ``lengths``, ``reset`` and ``packed`` choose a ragged batch. ``made_on``: where the
    random numbers come from and the answer in float64 is found, which the device does faster where it has much to do.
    """

    sizes: tuple[int, int, int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    biased: bool = True
    lengths: bool = False
    reset: bool = False
    packed: bool = False
    seed: int = 0
    made_on: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        steps, rows, inputs, units, layers, directions = self.sizes
        here = {"device": self.made_on}
        random = torch.Generator(**here).manual_seed(self.seed + 1000 * units + steps)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, **here).to(self.dtype)

        self.counts = torch.full((rows,), steps, **here)
        if self.lengths or self.packed:
            self.counts = torch.randint(1 if self.packed else 0, steps + 1, (rows,), generator=random, **here)
            if rows:
                self.counts[0] = steps
            self.counts = self.counts.sort(descending=True).values if self.packed else self.counts
        present = torch.arange(steps, **here)[:, None] < self.counts
        self.batch_sizes = present.sum(1).cpu() if self.packed else None
        self.flags = None
        if self.reset:
            self.flags = torch.rand(steps, rows, generator=random, **here) < 0.3
            self.flags[0] = False  # parts no pair of steps
        self.x = normal(steps, rows, inputs)
        self.h, self.c = normal(layers * directions, rows, units), normal(layers * directions, rows, units)
        bound = units**-0.5
        self.weights: list[Tensor] = []
        for layer in range(layers):
            columns = inputs if layer == 0 else directions * units
            for _ in range(directions):
                shapes = [(4 * units, columns), (4 * units, units)] + [(4 * units,)] * (2 if self.biased else 0)
                made = [(2 * torch.rand(*shape, generator=random, **here) - 1) * bound for shape in shapes]
                self.weights += [weight.to(self.dtype) for weight in made]
        self.grad_y = normal(steps, rows, directions * units)
        self.grad_h, self.grad_c = torch.randn_like(self.h), torch.randn_like(self.c)
        self.present = present

    def pack(self, padded: Tensor) -> Tensor:
        """Tokens of a padded tensor in packed order, if the problem is packed."""
        return padded[self.present.to(padded.device)] if self.packed else padded

    def arguments(self, save: bool) -> tuple[Any, ...]:
        """What lstm_layers takes. What lies past a row's length is not to be read: NaN."""
        to = self.device
        x = self.x.masked_fill(~self.present[..., None], float("nan")) if self.lengths else self.x
        return (
            self.pack(x).to(to),
            self.batch_sizes,
            self.counts.to(to) if self.lengths else None,
            None if self.flags is None else self.flags.to(to),
            self.h.to(to),
            self.c.to(to),
            None,
            None,
            [weight.to(to) for weight in self.weights],
            self.biased,
            self.sizes[5] == 2,
            save,
        )

    def exact(self, gradients: bool) -> tuple[list[Tensor], list[Tensor]]:
        """y, h_n and c_n in float64, and gradients of x, h, c and every weight."""
        given = (self.x, self.h, self.c, *self.weights)
        leaves = [tensor.double().clone().requires_grad_(gradients) for tensor in given]
        with torch.set_grad_enabled(gradients):
            y, h_n, c_n = self._steps(*leaves[:3], leaves[3:])
        found = []
        if gradients:
            arriving = [grad.double() for grad in (self.grad_y, self.grad_h, self.grad_c)]
            found = list(torch.autograd.grad((y, h_n, c_n), leaves, arriving))
            found[0] = self.pack(found[0])
        return [self.pack(y).detach(), h_n.detach(), c_n.detach()], found

    def _steps(self, x: Tensor, h_0: Tensor, c_0: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        steps, rows, _, units, layers, directions = self.sizes
        per = 4 if self.biased else 2
        last_h, last_c = [], []
        for layer in range(layers):
            sides = []
            for direction in range(directions):
                at = layer * directions + direction
                weight_ih, weight_hh, *biases = weights[at * per : (at + 1) * per]
                sums = x @ weight_ih.T + sum(biases)
                h, c = h_0[at], c_0[at]
                outputs: list[Any] = [None] * steps
                for t in range(steps) if direction == 0 else reversed(range(steps)):
                    flags = None if self.flags is None else self._parted(t, direction)
                    if flags is not None:
                        h, c = torch.where(flags, 0.0, h), torch.where(flags, 0.0, c)
                    i, f, g, o = (sums[t] + h @ weight_hh.T).chunk(4, 1)
                    new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    new_h = o.sigmoid() * new_c.tanh()
                    here = self.present[t][:, None]
                    outputs[t] = torch.where(here, new_h, 0.0)
                    h, c = torch.where(here, new_h, h), torch.where(here, new_c, c)
                sides.append(torch.stack(outputs))
                last_h.append(h)
                last_c.append(c)
            x = torch.cat(sides, 2)
        return x, torch.stack(last_h), torch.stack(last_c)

    def _parted(self, t: int, direction: int) -> Tensor | None:
        """Rows whose state begins anew with step t: going backwards, those that have the flag at the step before. Past
        a row's own last step no flag counts."""
        assert self.flags is not None
        at = t + direction
        return None if at == self.sizes[0] else (self.flags[at] & self.present[at])[:, None]


def small(units: int) -> int:
    """A size for the emulation in place of one for the device."""
    return 8 + units // 50


def forward(target: Target, problem: Problem, save: bool) -> tuple[Tensor, ...]:
    return target.ops.lstm_layers(*problem.arguments(save))


def backward(target: Target, problem: Problem, outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of x, h, c and every weight."""
    x, batch_sizes, lengths, reset, h, c, _, _, weights, biased, bidirectional, _ = problem.arguments(True)
    y, _, _, between, gates, cells = outputs
    grads = [grad.to(target.device) for grad in (problem.pack(problem.grad_y), problem.grad_h, problem.grad_c)]
    grad_x, grad_h, grad_c, grad_weights = target.ops.lstm_layers_backward(
        *(*grads, None, x, batch_sizes, lengths, reset, h, c, weights, biased, bidirectional),
        *(y, between, gates, cells, True),
    )
    return [grad_x, grad_h, grad_c, *grad_weights]


def error(found: Tensor, exact: Tensor, least: float = 0.0) -> float:
    """Greatest difference beside the greatest value, or beside ``least`` if that is more; infinite where something is
    no number."""
    assert found.shape == exact.shape, (found.shape, exact.shape)
    if exact.numel() == 0:
        return 0.0
    if not bool(found.isfinite().all()):
        return float("inf")
    difference = (found.to(exact.device).double() - exact).abs().max()
    return float(difference / exact.abs().max().clamp_min(max(least, 1e-30)))


def may_refuse(problem: Problem, error: Exception) -> bool:
    return REFUSED in str(error) and problem.sizes[3] > 100


def wrong(target: Target, problem: Problem, gradients: bool) -> list[str]:
    """Runs a problem, memory poisoned before each call; a line for each answer out of bounds."""
    poison(target)
    outputs = forward(target, problem, gradients)
    exact, exact_gradients = problem.exact(gradients)
    lines = []
    names = ["y", "h_n", "c_n"]
    for name, found, right in zip(names, outputs[:3], exact, strict=True):
        if (e := error(found, right)) > BOUNDS[problem.dtype]:
            lines.append(f"{name}: {e:.1e} over {BOUNDS[problem.dtype]:.0e}")
    if gradients:
        poison(target)
        found_gradients = backward(target, problem, outputs)
        # One value alone may be what is left of terms that cancel, as large as those of its neighbours.
        largest = max((float(right.abs().max()) for right in exact_gradients if right.numel()), default=0.0)
        names = ["grad_x", "grad_h", "grad_c", *(f"grad_weights[{k}]" for k in range(len(problem.weights)))]
        for name, found, right in zip(names, found_gradients, exact_gradients, strict=True):
            least = largest if right.numel() == 1 else 0.0
            if (e := error(found, right, least)) > GRADIENT_BOUNDS[problem.dtype]:
                lines.append(f"{name}: {e:.1e} over {GRADIENT_BOUNDS[problem.dtype]:.0e}")
    return lines


REFUSED = "the kernel in CELLSTEP_CUDA_KERNEL can do"


def takes(kernel: str, dtype: torch.dtype, units: int, directions: int = 1) -> bool:
    """Whether a kernel is for such a layer, as csrc/ops/cuda/kernels.h says. Up to H = 100 it must take the call; near
    the end of what a block holds it may say no, as the two passes and the types have limits of their own."""
    narrow = dtype in (torch.float16, torch.bfloat16)
    if kernel == "rows":
        return units <= 64 and directions == 1
    if kernel == "block":
        return dtype != torch.float64 and units <= (220 if narrow else 150)
    if kernel == "cluster":
        return narrow
    if kernel == "cluster_float":
        return dtype != torch.float64 and units <= 1580
    return narrow and units <= 220 if kernel == "tensor" else True
