"""LSTM modules that drop in for torch's, and models made of them.

Every module here goes through ``torch.jit.script`` at the top level. On a CPU in float32 and float64 they run on
cellstep's operators, elsewhere on torch's own. With the environment variable ``CELLSTEP_DISABLE_OPS=1``, read at
import, everything runs on torch's own: a reference to compare with.
"""

from cellstep.nn.cell import LSTMCell
from cellstep.nn.chain import Chain, Dense, Forecaster, Scale, Skip, Unscale
from cellstep.nn.lstm import LSTM
from cellstep.nn.sequence import reset_state, truncated_bptt

__all__ = [
    "LSTM",
    "Chain",
    "Dense",
    "Forecaster",
    "LSTMCell",
    "Scale",
    "Skip",
    "Unscale",
    "reset_state",
    "truncated_bptt",
]
