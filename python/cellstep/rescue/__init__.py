"""Old TorchScript files as data: weights out of them, without running them."""

from cellstep.rescue.find import Finding, assemble, chain, read, report

__all__ = ["Finding", "assemble", "chain", "read", "report"]
