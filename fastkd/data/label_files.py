"""Labels of a training set that are in a file: those that people gave, or noise that others have made.

CIFAR-10N and CIFAR-100N (Wei et al., "Learning with Noisy Labels Revisited: A Study Using Real-World Human Annotations", ICLR
2022) are ``CIFAR-10_human.pt`` and ``CIFAR-100_human.pt``, dicts of arrays in the order of the training images; also as
``.npy``, which may be in that of another copy of the set: their ``clean_label`` tells. The noise files of DivideMix (Li
et al., ICLR 2020) are ``.json``, a list of labels.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd._checks import INTEGERS, check_count, check_text
from fastkd._names import unknown_name
from fastkd.data.images import check_labels
from fastkd.data.pickles import ARRAY_STAND_INS, unpickled, with_arrays

__all__ = ["SHORT_KEYS", "SUFFIXES", "read_labels"]

CLEAN = "clean_label"
SHORT_KEYS: Mapping[str, str] = {
    "worst": "worse_label",
    "worse": "worse_label",
    "aggre": "aggre_label",
    "random1": "random_label1",
    "random2": "random_label2",
    "random3": "random_label3",
    "rand1": "random_label1",
    "rand2": "random_label2",
    "rand3": "random_label3",
    "noisy": "noisy_label",
    "clean": CLEAN,
}
_NAMED = re.compile(r"GLOBAL (\S+)")  # as torch calls a function that it refuses to run
SUFFIXES = (".npy", ".pt", ".json", ".csv", ".txt")


def read_labels(
    path: str | Path,
    key: str | None = None,
    *,
    num_classes: int | None = None,
    count: int | None = None,
    truth: Tensor | None = None,
) -> Tensor:
    """The labels of a file.

    Args:
        path: ``.npy`` (an array of integers, or a pickled dict of such), ``.pt`` (of torch.save: an array, a tensor, a list,
            or a dict of such), ``.json`` (a list, or a dict of such), ``.csv`` or ``.txt`` (a label a line, below a heading
            or not). What a pickle names is not run: only arrays, tensors, numbers, text, lists and dicts are read.
        key: which labels, where the file has several: ``worse_label``, ``random_label1``, ``noisy_label``, ...; or ``worst``,
            ``worse``, ``aggre``, ``random1`` or ``rand1``, ..., ``noisy``, ``clean`` for short. None: the only ones beside
            ``clean_label``.
        num_classes: labels are below, if given.
        count: of the labels, if known; that of ``truth`` if None.
        truth: int64 ``[N]``, the true labels. Where the file has ``clean_label``, these must be the same, or its order is
            another than that of the images.

    Returns:
        int64 ``[N]``, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: a damaged file, or of another kind; a key that it does not have; labels that are no integers, out
            of range, of another number or order.
    """
    path = Path(path)
    if key is not None:
        key = check_text("key", key)
    content = _content(path)
    read = _READERS[path.suffix.lower()]
    every = read(content, path)
    if truth is not None and count is None:
        count = len(truth)
    if isinstance(every, Mapping):
        name = _chosen(every, key, path)
        labels = _as_labels(every[name], f"{name} of {path}")
        clean = every.get(CLEAN)
        if truth is not None and clean is not None and name != CLEAN:
            _check_order(_as_labels(clean, f"{CLEAN} of {path}"), truth, path)
    elif key is not None:
        raise ValueError(f"fastkd: key is {key!r}, must be None for {path}, which has one list of labels")
    else:
        name, labels = "", _as_labels(every, str(path))
    whose = f"{name} of {path}" if name else str(path)
    if count is not None and len(labels) != check_count("count", count, 0):
        raise ValueError(f"fastkd: {whose} has {len(labels)} labels, must have {count}, one a training image")
    if num_classes is not None:
        check_labels(labels, check_count("num_classes", num_classes, 1), whose)
    elif len(labels) and int(labels.min()) < 0:
        raise ValueError(f"fastkd: {whose} has {int(labels.min())} as its least, must have labels of 0 or more")
    if truth is not None and name == CLEAN:
        _check_order(labels, truth, path)
    return labels


def _content(path: Path) -> bytes:
    if path.suffix.lower() not in _READERS:
        raise ValueError(f"fastkd: label file is {path}, must be a name that ends in {', '.join(SUFFIXES)}")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"fastkd: there is no label file {path}") from None
    except OSError as error:
        raise ValueError(f"fastkd: label file {path} cannot be read: {error.strerror}") from None


def _npy(content: bytes, path: Path) -> Any:
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if not dtype.hasobject:
            return np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # broken headers raise nearly anything
        raise ValueError(f"fastkd: {path} is broken: no whole .npy file ({_first_line(error)})") from None
    items = unpickled(content[file.tell() :], path, objects=True)
    return items[0] if shape == () and isinstance(items, list) and len(items) == 1 else items


def _pt(content: bytes, path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(ARRAY_STAND_INS):
            return with_arrays(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except Exception as error:  # whatever pickle and torch make of a damaged file
        if named := _NAMED.search(str(error)):
            raise ValueError(
                f"fastkd: {path} names {named[1]}, which was not run: only arrays, tensors, numbers, text, lists and dicts are "
                "read"
            ) from None
        raise ValueError(f"fastkd: {path} is broken: torch.load cannot read it ({_why(error)})") from None


def _json(content: bytes, path: Path) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"fastkd: {path} is broken: no JSON ({_first_line(error)})") from None


def _lines(content: bytes, path: Path) -> Any:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"fastkd: {path} is broken: it is no text") from None
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if lines and not _is_number(lines[0]):
        del lines[0]  # the heading
    labels = []
    for number, line in enumerate(lines, 1):  # an empty line between others may stand for a label that is not known
        label = _int_of(line)
        if label is None:
            raise ValueError(f"fastkd: {path} has {line[:40]!r} as its label {number}, must have one integer a line")
        labels.append(label)
    return labels


_READERS = {".npy": _npy, ".pt": _pt, ".json": _json, ".csv": _lines, ".txt": _lines}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _int_of(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _chosen(every: Mapping[Any, Any], key: str | None, path: Path) -> str:
    """The name of the labels that are meant."""
    names = [str(name) for name in every]
    if not names:
        raise ValueError(f"fastkd: {path} is empty, must have labels")
    if key is None:
        others = [name for name in names if name != CLEAN]
        if len(others) == 1:
            return others[0]
        raise ValueError(f"fastkd: key is None, must be one of {', '.join(names)} for {path}")
    for name in (key, SHORT_KEYS.get(key.lower())):
        if name in every:
            return str(name)
    short = [name for name, whole in SHORT_KEYS.items() if whole in names]
    raise unknown_name("key", key, [*names, *short], f"of {path}", listed=True)


def _as_labels(value: Any, whose: str) -> Tensor:
    """int64 ``[N]``, where integers are what it holds."""
    if isinstance(value, list):
        wrong = next((item for item in value if isinstance(item, bool) or not isinstance(item, int)), None)
        if wrong is not None:
            raise ValueError(f"fastkd: {whose} has {str(wrong)[:40]} of {type(wrong).__name__}, must have integers")
        try:
            return torch.tensor(value, dtype=torch.int64, device="cpu")
        except (OverflowError, ValueError, RuntimeError):
            raise ValueError(f"fastkd: {whose} has {max(value, key=abs)}, must have integers of 64 bits") from None
    if isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in INTEGERS and value.dim() == 1:
        return value.long()
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.ndim == 1:
        return torch.from_numpy(value.astype(np.int64))
    found = type(value).__name__
    if isinstance(value, (Tensor, np.ndarray)):
        found = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    raise ValueError(f"fastkd: {whose} has {found}, must have integers [N]")


def _check_order(clean: Tensor, truth: Tensor, path: Path) -> None:
    truth = truth.cpu()
    if len(clean) == len(truth):
        differ = int((clean != truth).sum())
        if not differ:
            return
        how = f"differs from the true labels at {differ} of {len(truth)} images"
    else:
        how = f"has {len(clean)} labels, and there are {len(truth)} images"
    raise ValueError(
        f"fastkd: {CLEAN} of {path} {how}, must be the same: its labels are of another set, or in another order"
    )


def _why(error: Exception) -> str:
    """The first sentence, without torch's advice to trust the file."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return text.split("\n")[0].split(". ")[0] or type(error).__name__


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
