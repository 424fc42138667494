"""Files that a command will write: whether it can is known before the work."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

from fastkd.cli._errors import UsageError


def check_writable(option: str, given: Path, *files: Path) -> None:
    """Makes the folder of the files, which are in one, and tries to write there; ``given`` is what the option said.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        folder = files[0].parent
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
        for file in files:
            if file.exists():
                with file.open("a"):
                    pass
    except OSError as error:
        raise UsageError(f"{option} {given} cannot be written: {error.strerror}") from None
