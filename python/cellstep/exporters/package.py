"""The ``.pt2`` package: ``torch.export`` and AOTInductor, for a torch without TorchScript; batch and time are dynamic.

A package holds four programs. ``forward``: x (N, T, input_size) -> y, from the initial state. ``run``: x, h, c -> y
(N, T, output_size), h, c. ``step``: x (N, input_size), h, c -> y (N, output_size), h, c. Each of these is one call of
one operator on the packed weights, so that the numbers are those of every other artifact. ``reset``: h, c, mask (N)
bool -> h, c with the rows of the mask put to the initial state.
"""

import json
import logging
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cellstep
from cellstep.exporters.files import quiet, replacing
from cellstep.exporters.programs import Forward, Reset, Run, Step
from cellstep.exporters.torchscript import PackedChain, packed
from cellstep.nn import Chain

_KEY = "cellstep"
_NUMBERS = ["input_size", "output_size", "state_layers", "h_size", "c_size", "window", "horizon"]


def export_package(model: Chain, path: Path) -> None:
    """Compile a float32 or float64 model for the device that it is on; this calls the C++ compiler of the machine.

    The compiled code runs on any CPU of the machine's architecture from torch 2.13 on; an earlier torch compiles for
    the machine's own CPU.

    Raises:
        ValueError: another dtype, or a model on CUDA without cellstep's kernels for it.
        OSError: the file cannot be written.
    """
    from torch._inductor import aot_compile, config
    from torch._inductor.package import package_aoti

    chain = packed(model)
    device = chain.image.device
    if device.type != "cpu" and not torch.ops.cellstep.has_kernels(chain.image):
        reason = cellstep.ops.cuda_missing() or f"cellstep has none for {device.type}"
        raise ValueError(
            f"expected cellstep's kernels for a package on {device.type}; there are none here: {reason}; or export "
            "model.cpu()"
        )
    batch, time = torch.export.Dim("batch", min=1), torch.export.Dim("time", min=1)
    h, c = (part.expand(-1, 2, -1).contiguous() for part in (chain.initial_h, chain.initial_c))
    windows = h.new_zeros(2, 3, model.input_size)
    rows = {1: batch}
    programs = {
        "forward": (Forward(chain), (windows,), ({0: batch, 1: time},)),
        "run": (Run(chain), (windows, h, c), ({0: batch, 1: time}, rows, rows)),
        "step": (Step(chain), (windows[:, 0], h, c), ({0: batch}, rows, rows)),
        "reset": (Reset(chain), (h, c, torch.tensor([True, False], device=device)), (rows, rows, {0: batch})),
    }
    wanted = {
        "aot_inductor.package": True,
        "aot_inductor.metadata": _metadata(model, chain),
        # The compiled code only calls the operator: all that counts is that it is small and runs everywhere.
        "aot_inductor.compile_wrapper_opt_level": "O1",
        "aot_inductor.enable_line_tables": False,
        "cpp.march": "",
        "cpp.simdlen": 0,
    }
    known = config.get_config_copy()
    options = {name: value for name, value in wanted.items() if name in known}
    with tempfile.TemporaryDirectory() as directory, torch.no_grad(), quiet():
        files: dict[str, Any] = {}
        for name, (module, arguments, dynamic) in programs.items():
            program = torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=False)
            kept = options | {"aot_inductor.output_path": os.path.join(directory, name)}
            files[name] = aot_compile(program.module(), arguments, options=kept)
        # Named like the file, since the name becomes that of the folder inside.
        package = os.path.join(directory, path.name)
        package_aoti(package, files)
        with replacing(path) as temporary:
            shutil.copyfile(package, temporary)


def _metadata(model: Chain, chain: PackedChain) -> dict[str, str]:
    numbers = {name: str(getattr(model, name)) for name in _NUMBERS}
    state = {
        name: " ".join(repr(v) for v in getattr(chain, name).flatten().tolist()) for name in ("initial_h", "initial_c")
    }
    return {
        **numbers,
        **state,
        "answers": model.answers,
        "bidirectional": str(model.bidirectional),
        "device": chain.image.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "feature_names": json.dumps(model.feature_names),
        "output_names": json.dumps(model.output_names),
        _KEY: cellstep.__version__,
    }


class Package:
    """A loaded package. Attributes are those of the chain; programs are loaded at their first call."""

    def __init__(self, path: str, device: str | torch.device | None = None) -> None:
        self._path = path
        self._programs: dict[str, Any] = {}
        # Before a program is loaded, which needs the device that it was compiled for.
        loader: Any = torch._C._aoti.AOTIModelPackageLoader
        metadata = loader.load_metadata_from_package(path, "forward")
        if _KEY not in metadata:
            raise ValueError(f"expected a package that cellstep exported; '{path}' is another; export it again")
        self.input_size = int(metadata["input_size"])
        self.output_size = int(metadata["output_size"])
        self.state_layers = int(metadata["state_layers"])
        self.h_size = int(metadata["h_size"])
        self.c_size = int(metadata["c_size"])
        self.window = int(metadata["window"])
        self.horizon = int(metadata["horizon"])
        self.answers = metadata["answers"]
        self.bidirectional = metadata["bidirectional"] == "True"
        self.feature_names: list[str] = json.loads(metadata["feature_names"])
        self.output_names: list[str] = json.loads(metadata["output_names"])
        self.dtype: torch.dtype = getattr(torch, metadata["dtype"])
        self.device = self._placed(metadata.get("device", "cpu"), device)
        self._initial = [
            torch.tensor([float(v) for v in metadata[f"initial_{part}"].split()], dtype=self.dtype, device=self.device)
            for part in ("h", "c")
        ]

    def _placed(self, compiled: str, device: str | torch.device | None) -> torch.device:
        """Where the programs run."""
        wanted = torch.device(compiled if device is None else device)
        if wanted.type != compiled:
            raise ValueError(
                f"expected device={compiled!r} for '{self._path}', which is compiled for that; got {str(wanted)!r}; "
                f"export the model from {wanted.type}"
            )
        if compiled == "cuda":
            reason = cellstep.ops.cuda_missing()
            if reason is not None:
                raise ValueError(
                    f"expected cellstep's CUDA kernels for '{self._path}', which is compiled for CUDA; there are none "
                    f"here: {reason}; or export model.cpu()"
                )
        return wanted

    def initial_state(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """The state of ``batch_size`` fresh streams."""
        h, c = (part.view(self.state_layers, 1, -1).repeat(1, batch_size, 1) for part in self._initial)
        return h, c

    def run(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As :meth:`cellstep.nn.Chain.run`."""
        y, h, c = self._program("run")(x, *state)
        return y, (h, c)

    def answer(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As :meth:`cellstep.nn.Chain.answer`. ValueError: the model answers from its last hidden state."""
        if self.answers == "hidden":
            raise ValueError(f"'{self._path}' answers from the last hidden state, and only windows that begin anew")
        y, state = self.run(x, state)
        return (y if self.answers == "every" else y[:, -1]), state

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`cellstep.nn.Chain.forward`."""
        y: Tensor = self._program("forward")(x)
        return y

    def _program(self, name: str) -> Any:
        from torch._inductor.package import load_package as load_program

        if name not in self._programs:
            # Torch compares the instruction sets of the compiler and of this machine; the code was made for any.
            logger = logging.getLogger("torch.export.pt2_archive._package")
            level = logger.level
            logger.setLevel(logging.ERROR)
            try:
                place = self.device.index if self.device.index is not None else -1
                self._programs[name] = load_program(self._path, name, device_index=place)
            finally:
                logger.setLevel(level)
        return self._programs[name]


def load_package(path: str | os.PathLike[str], device: str | torch.device | None = None) -> Package:
    """Load what :func:`export_package` wrote. It runs on the kind of device that it was compiled for alone, which
    ``device`` may number: "cuda:1".

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no package, or not one that cellstep exported, or compiled for a device that is not here or
            not the one that is asked for.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"expected a package at '{name}'; there is none; check the path")
    if not zipfile.is_zipfile(name):
        raise ValueError(
            f"expected a .pt2 package that cellstep exported; '{name}' is none or is damaged; export it again"
        )
    try:
        return Package(name, device)
    except (RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"expected a .pt2 package that cellstep exported; '{name}' is none or is damaged: {reason}"
        ) from None
