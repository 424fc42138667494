"""Figures of what a training makes, drawn after some of its epochs: PNG files in its folder, and for TensorBoard."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch

from fastkd._checks import check_count
from fastkd._files import write_whole
from fastkd.methods import Procedure, Step
from fastkd.models.modes import evaluating
from fastkd.training import randomness

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Pictures", "check_folder", "check_pictures_every", "clear", "clear_partial"]

_FOLDER = "pictures"  # in that of the training
_NAME = re.compile(r"\w[\w.-]*")  # in a file's name
_FILE = re.compile(r"\w[\w.-]*-\d{4,}\.png")
_PARTIAL = re.compile(rf"\.{_FILE.pattern}\.\d+\.[0-9a-f]+\.partial")
_SOFTWARE = "fastkd"
_MARK, _MARKED_WITHIN = f"tEXtSoftware\0{_SOFTWARE}".encode("latin-1"), 1024  # bytes from the beginning of a PNG


class Pictures:
    """Draws what a procedure has to show after every so many epochs, and after the last one.

    Args:
        folder: of the training, in which one for pictures is made when the first of them is drawn.
        every: epochs, 1 or more.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self._folder, self._every = folder / _FOLDER, every

    def due(self, done: int, epochs: int) -> bool:
        """After so many epochs of all."""
        return done % self._every == 0 or done == epochs

    def draw(self, procedure: Procedure, step: Step, seed: int) -> dict[str, Figure]:
        """Writes the figures, and returns them by name. The training does not notice: modes and random generators are as
        before; they are seeded, so that what is drawn of noise is of the same noise after each epoch.

        Raises:
            TypeError: the procedure returned no figures by name.
            ValueError: a name that is none of a file.
        """
        with torch.no_grad(), evaluating(procedure), randomness.everything_seeded(seed, step.rank):
            figures = _checked(procedure, procedure.pictures(step))
            for name, figure in figures.items():
                self._folder.mkdir(exist_ok=True)
                write_whole(self._folder / f"{name}-{step.epoch + 1:04}.png", partial(_save, figure))
        return figures


def check_pictures_every(value: object) -> int:
    """Epochs after which pictures are drawn; 0: none are.

    Raises:
        TypeError, ValueError: no int, or a negative one.
        ModuleNotFoundError: pictures are asked for, and matplotlib is not installed.
    """
    every = check_count("pictures_every", value, 0)
    if every and importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            f'fastkd: pictures_every is {every}, which needs matplotlib: pip install "fastkd[cli]"'
        )
    return every


def check_folder(folder: Path) -> None:
    """Whether pictures can be drawn into the folder of a training.

    Raises:
        NotADirectoryError: a file is where theirs would be.
    """
    path = folder / _FOLDER
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"fastkd: {path} is a file, must be a folder for pictures, or not there")


def clear(folder: Path) -> None:
    """Takes the pictures of a training away from its folder. Files of others stay, whatever they are called: a picture says
    of itself whose it is."""
    ours = [path for path in _files(folder, _FILE) if _is_ours(path)]
    for path in ours:
        path.unlink(missing_ok=True)
    if ours:
        with contextlib.suppress(OSError):  # there is more in it, or it is a link
            (folder / _FOLDER).rmdir()


def clear_partial(folder: Path) -> None:
    """Takes away what a killed training was writing."""
    for path in _files(folder, _PARTIAL):
        path.unlink(missing_ok=True)


def _files(folder: Path, name: re.Pattern[str]) -> list[Path]:
    pictures = folder / _FOLDER
    if not pictures.is_dir():
        return []
    return [path for path in pictures.iterdir() if name.fullmatch(path.name) and path.is_file()]


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return _MARK in file.read(_MARKED_WITHIN)


def _save(figure: Figure, file: BinaryIO) -> None:
    figure.savefig(file, format="png", metadata={"Software": _SOFTWARE})


def _checked(procedure: Procedure, figures: object) -> dict[str, Figure]:
    from matplotlib.figure import Figure  # takes a second to import

    whose = f"{type(procedure).__name__}.pictures"
    if not isinstance(figures, Mapping):
        raise TypeError(f"fastkd: {whose} returned {type(figures).__name__}, must be a dict of figures by name")
    for name, figure in figures.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"fastkd: {whose} returned the name {name!r}, must be of letters, digits, '_', '.' and '-', and begin with "
                "one of the first three, as files are called by it"
            )
        if not isinstance(figure, Figure):
            raise TypeError(
                f"fastkd: {whose} returned {name} of type {type(figure).__name__}, must be a matplotlib.figure.Figure"
            )
    return dict(figures)
