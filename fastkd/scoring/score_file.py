"""The scores of a collection in a file: ``scores.npy``, float64 ``[N]``, and ``scores.npy.json``, what they are of."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastkd.data.collection import Collection, Source, Unreadable
from fastkd.models.digests import weights_digest

__all__ = ["ABOUT", "ScoreFile", "open_scores"]

ABOUT = ".json"
_DIFFERENT = {
    "score": "another score",
    "collection": "another collection",
    "items": "another collection",
    "teacher": "another teacher",
}


@dataclass(frozen=True)
class ScoreFile:
    """Scores that are all there, and what they were made from."""

    path: Path
    about: dict[str, Any]
    """score, items, collection (its fingerprint), teacher (the digest of its weights), sources, the normalisation, ..."""

    @property
    def score(self) -> str:
        """Its name."""
        return str(self.about["score"])

    @property
    def sources(self) -> tuple[Source, ...]:
        """Of the collection."""
        return tuple(Source(*source) for source in self.about["sources"])

    @property
    def unreadable(self) -> tuple[Unreadable, ...]:
        """Images that could not be read: their score is -inf, so that they are never drawn."""
        return tuple(Unreadable(*item) for item in self.about["unreadable"])

    def array(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """float64 ``[N]``, memory-mapped, to be read only."""
        return np.load(self.path, mmap_mode="r")  # type: ignore[no-any-return]

    def tensor(self) -> Tensor:
        """The same as a tensor on the CPU, which shares the file's memory: to be read only."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(self.array())


def open_scores(
    path: str | Path, *, collection: Collection | None = None, teacher: nn.Module | None = None
) -> ScoreFile:
    """A file that :func:`fastkd.scoring.score_collection` has written.

    Args:
        path: of the ``.npy``.
        collection, teacher: whose scores they must be.

    Raises:
        FileNotFoundError: there is no such file, or what it is of is not beside it.
        ValueError: it is no file of scores, or not as long as it says, or of another collection or teacher.
    """
    path = Path(path)
    about = read_about(path)
    for file in (path, about_path(path)):
        if not file.is_file():
            begun = ": scoring was interrupted, the same command goes on" if about and not about.get("complete") else ""
            raise FileNotFoundError(f"fastkd: there is no {file}{begun}")
    assert about is not None
    wanted: dict[str, Any] = {}
    if collection is not None:
        wanted |= {"collection": collection.fingerprint(), "items": len(collection)}
    if teacher is not None:
        wanted["teacher"] = weights_digest(teacher)
    check_same(path, about, wanted)
    try:
        array = np.load(path, mmap_mode="r")
        fits = array.shape == (about["items"],) and array.dtype == np.float64
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"fastkd: {path} is damaged: {error}; delete it, and score again") from None
    if not fits:
        raise ValueError(
            f"fastkd: {path} holds {array.dtype} {array.shape}, must be float64 ({about['items']},); delete it, and score again"
        )
    return ScoreFile(path, about)


def about_path(path: Path) -> Path:
    return path.with_name(path.name + ABOUT)


def read_about(path: Path) -> dict[str, Any] | None:
    """What the file beside it says, or None where there is none.

    Raises:
        ValueError: it is another file.
    """
    file = about_path(path)
    if not file.is_file():
        return None
    try:
        about = json.loads(file.read_text())
        if not isinstance(about["items"], int) or not isinstance(about["score"], str):
            raise KeyError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"fastkd: {file} does not say what scores are of; choose another name, or delete it") from None
    return about  # type: ignore[no-any-return]


def check_same(path: Path, about: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Whether the scores are of what is wanted.

    Raises:
        ValueError: they are not.
    """
    for name, value in wanted.items():
        if about.get(name) != value:
            what = _DIFFERENT.get(name, f"another {name.replace('_', ' ')}")
            raise ValueError(
                f"fastkd: {path} is of {what}: its {name.replace('_', ' ')} is {_short(about.get(name))}, "
                f"must be {_short(value)}; choose another name, or delete it"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
