"""Models out of Python and back: one file of this package for each kind of artifact."""

import os
from pathlib import Path
from typing import Any

from torch import nn

from cellstep.exporters.deploy import export_deploy
from cellstep.exporters.executorch_program import export_executorch
from cellstep.exporters.header import export_header
from cellstep.exporters.interchange import load_model, save
from cellstep.exporters.onnx_graph import export_onnx
from cellstep.exporters.package import export_package
from cellstep.exporters.torchscript import PackedChain, export_torchscript
from cellstep.nn import LSTM, Chain

__all__ = ["SUFFIXES", "export", "load_model", "save"]

_WRITERS: dict[str, Any] = {
    ".cellstep": export_deploy,
    ".h": export_header,
    ".onnx": export_onnx,
    ".pt": export_torchscript,
    ".pt2": export_package,
    ".pte": export_executorch,
    ".safetensors": save,
}

#: What :func:`export` can write.
SUFFIXES = tuple(_WRITERS)


def export(model: nn.Module, path: str | os.PathLike[str], **options: Any) -> None:
    """Write a model as the artifact that the suffix of ``path`` names.

    ``.cellstep``: the deploy file of the torch-free runtime; ``.h``: its bytes as a C array; ``.pt``: TorchScript,
    frozen, weights packed; ``.pt2``: a compiled package for torch without TorchScript; ``.onnx``; ``.pte``: ExecuTorch;
    ``.safetensors``: weights and configuration for interchange, as :func:`save` writes them. Scaling, names, window and
    horizon are in all of them.
    A file that exists is replaced once the new one is whole.

    Args:
        model: a :class:`cellstep.nn.Chain`, such as a ``Forecaster``; an :class:`cellstep.nn.LSTM` is exported as
            ``Chain(lstm, answers="every")``. What :func:`cellstep.quantize` gave goes to ``.cellstep``, ``.h`` and
            ``.pt``.
        options: of the exporter: ``fast_activations`` and ``settle`` (T, input_size), the steps behind which a stream
            begins, for ``.cellstep``, ``.h`` and ``.pt``; ``standalone`` for ``.pt``; ``input_names``,
            ``output_names``, ``lengths`` and ``reset`` for ``.onnx``; ``batch_size``, ``steps`` and ``partitioner`` for
            ``.pte``.

    Raises:
        ValueError: the suffix is unknown, or the artifact cannot hold the model's dtype.
        TypeError: ``model`` is neither, or the artifact has no such option.
        ImportError: a package that writes this kind of file is not installed.
        OSError: the file cannot be written.
    """
    target = Path(path)
    writer = _WRITERS.get(target.suffix)
    if writer is None:
        raise ValueError(f"expected a path that ends in {', '.join(SUFFIXES)}; got '{target}'; rename the output")
    if isinstance(model, PackedChain):
        if target.suffix not in (".cellstep", ".h", ".pt"):
            raise ValueError(
                f"expected a path that ends in .cellstep, .h or .pt for a quantized model; got '{target}'; export the "
                "model that it was made from"
            )
        writer(model, target, **options)
        return
    if isinstance(model, LSTM):
        model = Chain(model, answers="every").train(model.training)
    if not isinstance(model, Chain):
        raise TypeError(
            f"expected a cellstep.nn.Chain or LSTM; got {type(model).__name__}; put its layers into a Chain"
        )
    writer(model, target, **options)
