"""Files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["remove_partial", "write_whole"]


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes beside the old file and puts the new one in its place when all of it is on the disk: a process that is killed, or
    a machine that stops, leaves the old one or the new one (and the part beside it: :func:`remove_partial`)."""
    # a name of its own, as several processes may write the same file; not tempfile's, which only the owner may read
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_partial(path: Path) -> None:
    """Takes away what killed processes have left beside the file; for when nobody writes it."""
    for partial in path.parent.glob(f".{path.name}.*partial"):
        partial.unlink(missing_ok=True)
