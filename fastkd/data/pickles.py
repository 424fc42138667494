"""Pickles of arrays, read without running what they name: a pickle may call any function it likes."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.data.files import read_bytes

__all__ = ["load_pickle"]


def _encode(text: str, encoding: str) -> bytes:
    """The bytes of an array, which Python 3 writes as text where it keeps to protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode("latin1")


_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    # its module has moved, and warns at the old place, which old files name
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
}


class _ForbiddenError(Exception):
    """The pickle names something that no array needs."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _ForbiddenError(f"{module}.{name}") from None


def load_pickle(path: Path) -> Any:
    """What the file holds, of dicts, lists, numbers, text, bytes and numpy arrays. Text of Python 2 is read as latin-1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names anything else, or is no whole pickle.
    """
    content = read_bytes(path)
    try:
        return _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except _ForbiddenError as name:
        raise ValueError(
            f"fastkd: {path} names {name}, which was not run: only arrays, numbers, text, lists and dicts are read"
        ) from None
    except Exception as error:  # broken pickles raise nearly anything
        raise ValueError(f"fastkd: {path} is broken: no whole pickle ({error})") from None
