"""Files that a command will write: whether it can is known before the work, and nothing is written to know it."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile

from fastkd.cli._errors import UsageError


def check_writable(option: str, given: Path, *files: Path) -> None:
    """Tries to write into the folder of the files, which are in one, or, where it is not there yet, into the one that it will
    be made in; ``given`` is what the option said.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        folder = files[0].absolute().parent
        while not os.path.lexists(folder):
            folder = folder.parent
        with TemporaryFile(dir=folder):
            pass
        for file in files:
            if os.path.lexists(file):
                with file.open("a"):
                    pass
    except OSError as error:
        raise UsageError(f"{option} {given} cannot be written: {error.strerror}") from None
