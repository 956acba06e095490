"""Old TorchScript files as data: weights out of them, without running them."""

from cellstep.rescue.command import import_archive
from cellstep.rescue.find import Finding, read, report

__all__ = ["Finding", "import_archive", "read", "report"]
