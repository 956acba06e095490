"""Weights in and out: other people's layouts to cellstep's modules and back.

Everything copies, but for :func:`replace_lstm`, which shares the parameters. What comes from Keras, ONNX or a file of
another program is in eval mode; what comes from torch keeps its mode.
"""

from cellstep.convert.audio import from_audio, from_guitarml, from_nam, from_rtneural
from cellstep.convert.gates import from_gates, to_gates
from cellstep.convert.keras import from_keras, from_keras_model, to_keras
from cellstep.convert.onnx_graph import Reversed, from_onnx
from cellstep.convert.scripted import from_scripted
from cellstep.convert.torch_modules import from_torch, replace_lstm, to_torch

__all__ = [
    "Reversed",
    "from_audio",
    "from_gates",
    "from_guitarml",
    "from_keras",
    "from_keras_model",
    "from_nam",
    "from_onnx",
    "from_rtneural",
    "from_scripted",
    "from_torch",
    "replace_lstm",
    "to_gates",
    "to_keras",
    "to_torch",
]
