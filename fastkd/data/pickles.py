"""Pickles of arrays, read without running what they name: a pickle may call any function it likes.

numpy's own functions are not called either: the states of arrays and dtypes in a pickle are taken as they are there, so
that a changed flag reaches freed memory.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.data.files import read_bytes

__all__ = ["ARRAY_STAND_INS", "load_pickle", "unpickled", "with_arrays"]


class _Dtype:
    """Stands for ``numpy.dtype(code, align, copy)`` and the state that is set on it."""

    kinds = "biuf"

    def __init__(self, code: str, align: object, copy: object) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in self.kinds:
            raise pickle.UnpicklingError(f"an array of {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _AnyDtype(_Dtype):
    """That of objects, too."""

    kinds = "biufO"


class _Array:
    """Stands for an array, of which the pickle gives shape, dtype, order and bytes as a state."""

    def __init__(self, *arguments: object) -> None:
        self.array: np.ndarray[Any, Any] | list[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, content = state
        if kind.dtype.kind == "O":
            self.array = list(content)
            return
        content = content.encode("latin1") if isinstance(content, str) else content  # that of Python 2
        self.array = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if fortran else "C").copy()


def _encode(text: str, encoding: str) -> bytes:
    """The bytes of an array, which Python 3 writes as text where it keeps to protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # since numpy 2
    ("_codecs", "encode"): _encode,
}
ARRAY_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (value, ".".join(name)) for name, value in _ALLOWED.items() if name[0] != "_codecs"
]
"""What :func:`torch.serialization.safe_globals` takes, so that ``torch.load(weights_only=True)`` reads arrays of numbers, too;
give what it read to :func:`with_arrays`."""


class _ForbiddenError(Exception):
    """The pickle names something that no array needs."""


class _Unpickler(pickle._Unpickler):  # the one in C reserves as much memory as a broken file says
    objects = False

    def find_class(self, module: str, name: str) -> Any:
        if self.objects and (module, name) == ("numpy", "dtype"):
            return _AnyDtype
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _ForbiddenError(f"{module}.{name}") from None


def load_pickle(path: Path) -> Any:
    """What the file holds, of dicts, lists, numbers, text, bytes and arrays of numbers (of pickle's protocols 0 to 4).

    Text of Python 2 is read as latin-1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names anything else, or is no whole pickle.
    """
    return unpickled(read_bytes(path), path)


def unpickled(content: bytes, path: Path, *, objects: bool = False) -> Any:
    """What the bytes of a pickle hold, as :func:`load_pickle`; ``path`` is what messages name.

    Args:
        objects: arrays of objects, too, as lists of their items, in a row.
    """
    try:
        unpickler = _Unpickler(io.BytesIO(content), encoding="latin1")
        unpickler.objects = objects
        return with_arrays(unpickler.load())
    except _ForbiddenError as name:
        raise ValueError(
            f"fastkd: {path} names {name}, which was not run: only arrays, numbers, text, lists and dicts are read"
        ) from None
    except Exception as error:  # broken pickles raise nearly anything
        raise ValueError(f"fastkd: {path} is broken: no whole pickle ({error})") from None


def with_arrays(value: Any) -> Any:
    """The arrays in the place of what stands for them."""
    if isinstance(value, _Array):
        return with_arrays(value.array) if isinstance(value.array, list) else value.array
    if isinstance(value, dict):
        return {key: with_arrays(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(with_arrays, value))
    return value
