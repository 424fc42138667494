"""Where data sets are, and what is said of one that is not there or not whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["data_root", "find_folder", "read_bytes"]


def data_root(root: str | Path | None = None) -> Path:
    """The folder with the data sets: root, else ``$FASTKD_DATA``, else ``~/.cache/fastkd/data``."""
    if root is not None and not isinstance(root, (str, os.PathLike)):
        raise TypeError(f"fastkd: root is {type(root).__name__}, must be a path or None")
    return Path(root or os.environ.get("FASTKD_DATA") or "~/.cache/fastkd/data").expanduser()


def find_folder(root: Path, folders: Sequence[str], title: str, how: str) -> Path:
    """The first of the folders in root that exists.

    Raises:
        FileNotFoundError: none does; it names all of them, and ``how`` to get the set.
    """
    for folder in folders:
        if (root / folder).is_dir():
            return root / folder
    looked = ", ".join(str(root / folder) for folder in folders)
    raise FileNotFoundError(
        f"fastkd: {title} is not there, looked for {looked}; {how}; the variable FASTKD_DATA or root= names another "
        "folder"
    )


def torchvision_downloads(name: str) -> str:
    """How to get a data set that torchvision has."""
    return f"torchvision.datasets.{name}(root, download=True) brings it"


def read_bytes(path: Path) -> bytes:
    """The content of one file of a set.

    Raises:
        FileNotFoundError: it is not there, though the folder of the set is.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"fastkd: {path} is not there, must be with the other files of its set") from None
