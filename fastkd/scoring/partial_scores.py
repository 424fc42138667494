"""Scores that are being made: by several processes, which may be killed, and by any number of them afterwards."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from fastkd._files import remove_partial, write_whole
from fastkd.data.collection import Unreadable
from fastkd.scoring.score_file import about_path, check_same, read_about

__all__ = ["PartialScores"]

_CAN_DIFFER = ("complete", "unreadable", "calibration", "fastkd", "torch")


class PartialScores:
    """Beside ``scores.npy`` and its description: ``scores.npy.partial``, as long as the whole, with a byte for each chunk in
    ``scores.npy.chunks``, 1 where it is done, and a line for each image that could not be read in ``scores.npy.unreadable``.

    Processes write different chunks; a chunk is marked when its scores are on the disk. They need a file system that all see.

    Args:
        path: of the ``.npy``.
        items: N.
        chunk: items of a chunk; the last one may have fewer.
    """

    def __init__(self, path: Path, items: int, chunk: int) -> None:
        self.path, self.items, self.chunk = path, items, chunk
        self._scores, self._done, self._unreadable = (
            path.with_name(path.name + suffix) for suffix in (".partial", ".chunks", ".unreadable")
        )

    @property
    def chunks(self) -> int:
        return -(-self.items // self.chunk)

    def begin(self, about: dict[str, Any]) -> dict[str, Any]:
        """Makes the files, or takes those that are there. By one process.

        Returns:
            The description: that of before, where there was one.

        Raises:
            ValueError, FileExistsError: scores of something else are there.
        """
        before = read_about(self.path)
        if before is not None:
            check_same(self.path, before, {name: about[name] for name in about if name not in _CAN_DIFFER})
            if before.get("complete") or self._there():
                return before
        elif self.path.exists():
            raise FileExistsError(
                f"fastkd: {self.path} is there, but not {about_path(self.path).name}, which says what it is of; "
                "choose another name, or delete it"
            )
        header = {"descr": "<f8", "fortran_order": False, "shape": (self.items,)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for file in (self._scores, self._done, self._unreadable):
            remove_partial(file)
            file.unlink(missing_ok=True)
        with self._scores.open("wb") as scores:
            npy.write_array_header_1_0(scores, header)
            scores.truncate(scores.tell() + 8 * self.items)
        # chunks last: where they are there, all is
        self._unreadable.touch()
        write_about(self.path, about)
        write_whole(self._done, lambda file: file.write(bytes(self.chunks)))
        return about

    def pending(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Chunks that are not done, ascending."""
        return np.flatnonzero(np.fromfile(self._done, dtype=np.uint8) == 0)

    def done_items(self) -> int:
        """Items whose chunk is done, by any process."""
        done = np.fromfile(self._done, dtype=np.uint8) != 0
        last = self.items - (self.chunks - 1) * self.chunk
        return int(done[:-1].sum()) * self.chunk + int(done[-1]) * last

    def write(self, chunk: int, scores: np.ndarray[Any, np.dtype[np.float64]], unreadable: list[Unreadable]) -> None:
        """A chunk, as a whole."""
        if unreadable:
            with self._unreadable.open("a") as file:  # one write, which others do not come between
                file.write("".join(json.dumps([item.index, item.name, item.why]) + "\n" for item in unreadable))
                file.flush()
                os.fsync(file.fileno())
        with self._scores.open("r+b") as file:
            npy.read_magic(file)
            npy.read_array_header_1_0(file)
            file.seek(file.tell() + 8 * self.chunk * chunk)
            file.write(scores.astype("<f8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        with self._done.open("r+b") as file:
            file.seek(chunk)
            file.write(b"\1")

    def finish(self, about: dict[str, Any]) -> dict[str, Any]:
        """The whole file takes its name. By one process, when all chunks are done.

        Returns:
            The description, with the images that could not be read.
        """
        if about.get("complete") and self.path.exists():
            return about
        left = self.pending()
        if len(left):
            raise RuntimeError(
                f"fastkd: {len(left)} of {self.chunks} chunks of {self.path} are not scored, as a process ended before; "
                "the same command goes on"
            )
        lines = self._unreadable.read_text().splitlines() if self._unreadable.exists() else []
        # a process that was killed between its two writes has made the chunk again
        found = {item[0]: item for item in map(json.loads, lines)}
        about = {**about, "unreadable": [found[index] for index in sorted(found)], "complete": True}
        if self._scores.exists():
            os.replace(self._scores, self.path)
        write_about(self.path, about)
        for file in (self._done, self._unreadable):
            file.unlink(missing_ok=True)
        return about

    def _there(self) -> bool:
        return self._done.exists() and (self._scores.exists() or self.path.exists())


def write_about(path: Path, about: dict[str, Any]) -> None:
    text = json.dumps(about, indent=1) + "\n"
    write_whole(about_path(path), lambda file: file.write(text.encode()))
