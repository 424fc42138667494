"""The folder of a training: of one at a time, and of no other's files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fastkd._files import remove_partial
from fastkd.training import checkpoint, pictures

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment,unused-ignore]

__all__ = ["CURVES", "METRICS", "MODEL", "find", "locked"]

METRICS, MODEL, CURVES = "metrics.jsonl", "model.pt", "curves.png"
_FILES = (checkpoint.CHECKPOINT, METRICS, MODEL, CURVES)
_held: set[int] = set()


def find(
    folder: Path, ours: dict[str, Any], *, resume: bool | Literal["auto"], overwrite: bool, draws: bool = False
) -> dict[str, Any] | None:
    """The checkpoint to go on from, looked through, if any; else whether a training may begin in this folder.

    Args:
        ours: what must be the same there: of :func:`fastkd.training.checkpoint.check_same`.
        draws: whether the training is to draw pictures.
    """
    for path in (folder / name for name in _FILES):
        if path.is_dir():
            raise IsADirectoryError(f"fastkd: {path} is a folder, must be a file of a training, or not there")
    if draws:
        pictures.check_folder(folder)
    path = folder / checkpoint.CHECKPOINT
    if resume is True or (resume and path.exists()):
        found = checkpoint.read(path)
        checkpoint.check_same(path, found, ours)
        return found
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"fastkd: the folder {folder} holds a checkpoint: fit(resume=True) goes on from it, "
            "fit(overwrite=True) begins anew"
        )
    # a training that was killed before its first checkpoint has left an empty file of metrics
    foreign = [name for name in (MODEL, METRICS) if (folder / name).exists() and (folder / name).stat().st_size]
    if foreign and not overwrite:
        raise FileExistsError(
            f"fastkd: the folder {folder} holds {' and '.join(foreign)} but no checkpoint to resume from: "
            "take another folder, or fit(overwrite=True) removes them"
        )
    return None


def clear(folder: Path) -> None:
    """Removes what is no more when a training begins anew."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    pictures.clear(folder)


def clear_partial(folder: Path) -> None:
    """Removes what a killed training was writing."""
    for name in _FILES:
        remove_partial(folder / name)
    pictures.clear_partial(folder)


@contextmanager
def locked(folder: Path, *, make: bool, what: str = "training") -> Iterator[None]:
    """Nobody else trains in the folder inside the ``with`` block. Released by the system where the process is killed; no
    lock where the system or the file system, some of a network, has none.

    Args:
        make: make the folder where it is not there.
        what: runs in it, for the message.

    Raises:
        NotADirectoryError: it, or what it would be in, is a file.
        RuntimeError: another training holds it.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"fastkd: folder is {folder}, which is a file or in one, must be a folder") from None
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"fastkd: folder is {folder}, which is a file, must be a folder")
    if fcntl is None or not folder.exists():
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)  # the folder itself: no file of a lock to be left behind
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"fastkd: folder is {folder}, in which another {what} runs, must be a folder of its own"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _let_go() -> None:
    """In a forked process, a loader's worker for instance: the lock shall not outlive the training that was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
