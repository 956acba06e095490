"""Writing files: whoever reads one sees the old one or the new one, never half of it."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; it takes the place of ``path`` if nothing was raised."""
    if path.is_dir():
        raise IsADirectoryError(f"cannot write '{path}': it is a directory; name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write '{path}': there is no directory '{path.parent}'; make it first")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner reads
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Without a compiler's warnings of its own ways, which no caller can mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
