"""A checkpoint's file: whole or not there, and what it says when it does not fit.

It holds tensors and plain Python types only, so that reading one runs no code of whoever wrote it:
``torch.load(path, weights_only=True)["networks"]["student"]`` are the student's weights.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd._files import write_whole

__all__ = ["CHECKPOINT", "check_same", "read", "write"]

CHECKPOINT = "checkpoint.pt"
_FORMAT, _VERSION = "fastkd training", 2


def write(path: Path, state: dict[str, Any]) -> None:
    """Writes a state of tensors and plain types, whole or not at all."""
    write_whole(path, lambda file: torch.save({"format": _FORMAT, "version": _VERSION, **state}, file))


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` wrote, on the CPU.

    Raises:
        FileNotFoundError: there is none.
        IsADirectoryError: it is a folder.
        ValueError: it is damaged, of something else, or of another version.
    """
    if path.is_dir():
        raise IsADirectoryError(f"fastkd: {path} is a folder, must be the file of a checkpoint")
    if not path.is_file():
        raise FileNotFoundError(f"fastkd: there is no checkpoint {path} to resume from")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not look at the checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever zipfile, pickle and torch make of it
        raise ValueError(
            f"fastkd: the checkpoint {path} is damaged ({_in_one_line(error)}): "
            "begin again with overwrite=True, or put an older copy there"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"fastkd: {path} is no checkpoint of a training with fastkd")
    if state["version"] != _VERSION:
        raise ValueError(
            f"fastkd: the checkpoint {path} is of format version {state['version']}, this fastkd reads version {_VERSION}"
        )
    return state


def check_same(path: Path, state: dict[str, Any], ours: dict[str, Any]) -> None:
    """Whether a training goes on with this state: each ``ours[key]``, numbers, strings, mappings of them, or of tensors
    (whose shapes and dtypes count), is as in the state.

    Raises:
        ValueError: what differs.
    """
    different = [line for key, value in ours.items() for line in _differences(key, state.get(key), value)]
    if different:
        more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
        raise ValueError(
            f"fastkd: the checkpoint {path} is of another training: {'; '.join(different[:5])}{more}. "
            "Train as there, or begin again with overwrite=True"
        )


def _in_one_line(error: Exception) -> str:
    """Torch's own words are of many lines, in bold, and advise to run the code in the file; why comes last."""
    said = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).rpartition("WeightsUnpickler error: ")[2]
    return next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__)


def _differences(name: str, there: Any, here: Any) -> list[str]:
    if isinstance(here, dict) and isinstance(there, dict):
        # extra state of modules is theirs: it changes as it likes
        keys = [*here, *(key for key in there if key not in here and not str(key).endswith("_extra_state"))]
        parts = (_differences(f"{name}.{key}", there.get(key), here.get(key)) for key in keys)
        return [line for part in parts for line in part]
    if isinstance(there, int | float) and isinstance(here, int | float) and there == here:
        return []  # 1 and 1.0
    there, here = _described(there), _described(here)
    return [] if there == here else [f"{name} is {there} there, {here} here"]


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "missing" if value is None else repr(value)
