"""Arrays in one file, in the format of safetensors: the length of a header, the header in JSON, the bytes of one array after
the other. Other programs read it, too; here it takes nothing but numpy."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastkd._files import write_whole

__all__ = ["Header", "map_arrays", "payload_digest", "read_header", "write_arrays"]

Array = np.ndarray[Any, Any]

_DTYPES = {"I64": "<i8", "I32": "<i4", "F32": "<f4", "F16": "<f2"}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 1 << 20
_READ_AT_ONCE = 1 << 22


class Section(NamedTuple):
    """Of one array."""

    dtype: str
    """As numpy has it."""
    shape: tuple[int, ...]
    start: int
    """Bytes from the beginning of the file."""


class Header(NamedTuple):
    """What a file says of itself."""

    sections: dict[str, Section]
    payload: int
    """Where it begins: bytes from the beginning of the file."""
    size: int
    """Of the whole file, in bytes."""
    sha256: str
    """Of all after the header."""

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of each array."""
        return {name: (section.dtype, section.shape) for name, section in self.sections.items()}


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """All of them or none. Those with larger elements first, so that each lies where its elements want to."""
    made = hashlib.sha256()
    header: dict[str, Any] = {}
    end = 0
    for name, array in arrays.items():
        assert array.flags.c_contiguous
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
        made.update(_bytes_of(array))
    text = json.dumps({"__metadata__": {"sha256": made.hexdigest()}, **header}).encode()
    text += b" " * (-len(text) % 8)

    def write(file: Any) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(_bytes_of(array))

    write_whole(path, write)


def read_header(path: Path) -> Header:
    """
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or not as long as it says.
    """
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if not 2 <= length <= _LONGEST_HEADER:
                raise ValueError("it has no header")
            said = json.loads(file.read(length))
            size = file.seek(0, 2)
        payload = 8 + length
        sha256 = said.pop("__metadata__")["sha256"]
        sections, end = {}, payload
        for name, section in said.items():
            dtype, shape = _DTYPES[section["dtype"]], tuple(map(int, section["shape"]))
            low, high = section["data_offsets"]
            nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            if (low + payload, high - low) != (end, nbytes):
                raise ValueError("its header is not right")
            sections[name] = Section(dtype, shape, end)
            end += nbytes
        if size != end:
            raise ValueError(f"it has {size} bytes, must have {end}")
    except FileNotFoundError:
        raise FileNotFoundError(f"fastkd: there is no {path}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        why = str(error) if isinstance(error, (OSError, ValueError)) else "it has no header"
        raise ValueError(f"fastkd: {path} is damaged: {why}") from None
    return Header(sections, payload, size, sha256)


def map_arrays(path: Path) -> dict[str, Array]:
    """Those of a file, memory-mapped, to be read only."""
    header = read_header(path)
    whole = np.memmap(path, np.uint8, "r")
    arrays = {}
    for name, (dtype, shape, start) in header.sections.items():
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        arrays[name] = whole[start : start + nbytes].view(dtype).reshape(shape)
    return arrays


def payload_digest(path: Path) -> str:
    """sha256 of all after the header, as it is on the disk now."""
    header = read_header(path)
    made = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(header.payload)
        while part := file.read(_READ_AT_ONCE):
            made.update(part)
    return made.hexdigest()


def _bytes_of(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
