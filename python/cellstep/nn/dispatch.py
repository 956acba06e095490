"""Which of two roads a call takes: cellstep's operators or torch's own."""

import os
from typing import Optional

import torch
from torch import Tensor

import cellstep

USE_OPS: bool = os.environ.get("CELLSTEP_DISABLE_OPS", "0") != "1"
if USE_OPS:
    import cellstep.ops  # registers torch.ops.cellstep


def transforms_active() -> bool:
    """Inside ``vmap``, ``grad``, ``jvp`` or forward-mode AD, whose rules torch's own operators have and ours not."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def autocasting(x: Tensor) -> bool:
    """Autocast casts the arguments of torch's operators alone."""
    if torch.jit.is_scripting() or x.is_meta:  # of the meta device torch does not know whether it casts
        return False
    return torch.is_autocast_enabled(x.device.type)


def has_kernel(x: Tensor) -> bool:
    """Whether cellstep's operators can run on ``x`` here."""
    if x.device.type != "cpu" or (x.dtype != torch.float32 and x.dtype != torch.float64):
        if torch.jit.is_scripting():
            return on_device(x)
        return on_device(x) and not autocasting(x) and not transforms_active()
    if torch.jit.is_scripting():
        return True
    # A module may be unpickled in a process that has no operators.
    return USE_OPS and not autocasting(x) and not transforms_active()


def on_device(x: Tensor) -> bool:
    """Whether cellstep's kernels for CUDA take ``x``."""
    if not x.is_cuda:
        return False
    if x.dtype != torch.float32 and x.dtype != torch.float64 and x.dtype != torch.float16 and x.dtype != torch.bfloat16:
        return False
    if torch.jit.is_scripting():
        here: bool = torch.ops.cellstep.has_kernels(x)  # the file may meet a process without them
        return here
    return USE_OPS and cellstep.ops.cuda_missing() is None


def cast_to(x: Tensor) -> Optional[torch.dtype]:
    """What autocast makes of ``x`` (any device but the CPU) where cellstep's kernels then take it: our operators are
    none of those whose arguments autocast casts, and float64 is nothing that it casts."""
    if torch.jit.is_scripting() or not on_device(x) or not autocasting(x) or x.dtype == torch.float64:
        return None
    return None if transforms_active() else torch.get_autocast_dtype(x.device.type)


def widens(x: Tensor) -> bool:
    """Whether a call in half precision runs on cellstep's operators in float32, and its answers are narrowed: the CPUs
    that compute in half precision are few, and elsewhere torch's own operators take several times as long."""
    if x.device.type != "cpu" or (x.dtype != torch.bfloat16 and x.dtype != torch.float16):
        return False
    if torch.jit.is_scripting():
        return False
    return USE_OPS and not (autocasting(x) or transforms_active() or torch.compiler.is_compiling())
