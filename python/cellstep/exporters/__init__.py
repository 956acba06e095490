"""Models out of Python and back: one file of this package for each kind of artifact."""

import os
from collections.abc import Callable
from pathlib import Path

from cellstep.exporters.deploy import export_deploy
from cellstep.exporters.interchange import load_model, save
from cellstep.exporters.torchscript import export_torchscript
from cellstep.nn import Forecaster

__all__ = ["SUFFIXES", "export", "load_model", "save"]

_WRITERS: dict[str, Callable[[Forecaster, Path], None]] = {
    ".cellstep": export_deploy,
    ".pt": export_torchscript,
    ".safetensors": save,
}

#: What :func:`export` can write.
SUFFIXES = tuple(_WRITERS)


def export(model: Forecaster, path: str | os.PathLike[str]) -> None:
    """Write a model as the artifact that the suffix of ``path`` names.

    ``.pt``: TorchScript, frozen, weights packed; ``.cellstep``: the deploy file of the torch-free runtime;
    ``.safetensors``: weights and configuration for interchange, as :func:`save` writes them. Scaling, names, window
    and horizon are in all of them. A file that exists is replaced once the new one is whole.

    Raises:
        ValueError: the suffix is unknown, or the artifact cannot hold the model's dtype.
        TypeError: ``model`` is no :class:`cellstep.nn.Forecaster`.
        OSError: the file cannot be written.
    """
    target = Path(path)
    writer = _WRITERS.get(target.suffix)
    if writer is None:
        raise ValueError(f"expected a path that ends in {', '.join(SUFFIXES)}; got '{target}'; rename the output")
    if not isinstance(model, Forecaster):
        raise TypeError(f"expected a cellstep.nn.Forecaster; got {type(model).__name__}; put its layers into one")
    writer(model, target)
