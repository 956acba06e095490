"""cellstep: one LSTM, everywhere it has to run.

The names below are loaded when they are first used, so that ``import cellstep.runtime`` imports neither torch nor
anything else that takes longer than the runtime itself.
"""

import os
from importlib import import_module

TYPE_CHECKING = False  # as type checkers know it, without the module typing
if TYPE_CHECKING:
    from cellstep import convert, nn, ops, runtime
    from cellstep.artifact import load
    from cellstep.exporters import export, load_model, save
    from cellstep.quantization import quantize
    from cellstep.verification import verify

    __version__: str

#: Give this to CMake as CMAKE_PREFIX_PATH, and ``find_package(cellstep)`` finds the headers and libraries.
cmake_prefix_path = os.path.dirname(os.path.abspath(__file__))

__all__ = [
    "cmake_prefix_path",
    "convert",
    "export",
    "load",
    "load_model",
    "nn",
    "ops",
    "quantize",
    "runtime",
    "save",
    "verify",
]

_FUNCTIONS = {
    "export": "cellstep.exporters",
    "load": "cellstep.artifact",
    "load_model": "cellstep.exporters",
    "quantize": "cellstep.quantization",
    "save": "cellstep.exporters",
    "verify": "cellstep.verification",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return import_module("importlib.metadata").version("cellstep")
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name]), name)
    if name in ("convert", "nn", "ops", "runtime"):
        return import_module(f"cellstep.{name}")
    raise AttributeError(f"module 'cellstep' has no attribute {name!r}")
