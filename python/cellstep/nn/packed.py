"""Inference on packed weights: what eager modules do by themselves where no gradient is asked for."""

from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cellstep import _runtime
from cellstep.nn.dispatch import has_kernel


class _Packed:
    """The image of a module for weights of one digest: None where they cannot be packed."""

    def __init__(self, digest: int) -> None:
        self.digest = digest
        self.met_again = False
        self.image: Tensor | None = None


_packed: "WeakKeyDictionary[nn.Module, _Packed]" = WeakKeyDictionary()


def aligned_bytes(data: bytes) -> Tensor:
    """A uint8 tensor of ``data`` in memory of torch's own, where vectors do not lie across cache lines."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).clone()


def inference_only(x: Tensor) -> bool:
    """Whether a call on ``x`` is one for numbers alone: nothing records, traces or transforms it."""
    return (
        type(x) is Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and x.is_cpu
        and has_kernel(x)
    )


def packed_image(
    module: nn.Module, dtype: torch.dtype, weights: Iterable[Tensor | None], pack: Callable[[], bytes]
) -> Tensor | None:
    """The packed weights of a module as a tensor, for as long as no byte of them changes; None if they are not packed.

    The bytes themselves are looked at in every call, which takes less time than a step with them: torch's version
    counters do not see a write through ``.data``. Weights are packed when they are met for the second time, so that a
    loop that changes them between any two calls packs none.
    """
    places: list[int] = []
    for weight in weights:
        if weight is None:  # a bias that is not there
            continue
        if not weight.is_cpu or weight.dtype != dtype or not weight.is_contiguous():
            return None
        places += (weight.data_ptr(), weight.nbytes)
    digest = _runtime.digest(places)
    entry = _packed.get(module)
    if entry is None or entry.digest != digest:
        _packed[module] = _Packed(digest)
        return None
    if not entry.met_again:
        entry.met_again = True
        try:
            entry.image = aligned_bytes(pack())
        except ValueError:  # weights that are not finite: the other road answers with what they give
            entry.image = None
    return entry.image
