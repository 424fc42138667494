"""What a training gets at each iteration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastkd._checks import check_tensor

__all__ = ["Batch", "Batches", "as_batches", "images_of", "on_device"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Images, and what is known of them.

    Args:
        images: ``[B, C, H, W]``, B >= 1.
        target: int64 ``[B, ...]``, classes; None where there are no labels.
        index: int64 ``[B]``, which items of the data set these are; None where the source does not say.
        views: further views of the same images, ``[B, C, H, W]`` each.

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: other numbers of items than of images.
    """

    images: Tensor
    target: Tensor | None = None
    index: Tensor | None = None
    views: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", tuple(self.views))
        check_tensor("images", self.images)
        others = {"target": self.target, "index": self.index, **{f"views[{i}]": v for i, v in enumerate(self.views)}}
        for name, value in others.items():
            if value is not None and check_tensor(name, value).shape[:1] != self.images.shape[:1]:
                raise ValueError(
                    f"fastkd: {name} has shape {tuple(value.shape)}, must be [{len(self)}, ...], as there are images"
                )

    def __len__(self) -> int:
        """Images."""
        return self.images.shape[0]

    def to(self, device: torch.device) -> Batch:
        """All of it on a device; of pinned memory without waiting."""
        every = (self.images, self.target, self.index, *self.views)
        if all(value is None or value.device == device for value in every):
            return self

        def moved(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=True)

        target, index = (None if value is None else moved(value) for value in (self.target, self.index))
        return Batch(moved(self.images), target, index, tuple(map(moved, self.views)))


Batches = Batch | Mapping[str, Batch] | None
"""One batch, several by name, as of :class:`fastkd.data.ParallelBatches`, or none."""

_NAMES = tuple(field.name for field in fields(Batch))


def as_batches(given: Any) -> Batches:
    """What a source gave: batches as they are; images alone; a tuple (images, target, index), as most data sets give it,
    or the first of these, where several views may stand for the images; a mapping of the fields of :class:`Batch`.

    Raises:
        TypeError: it is none of these.
    """
    if given is None or isinstance(given, Batch):
        return given
    if isinstance(given, Tensor):
        return Batch(given)
    if isinstance(given, Mapping):
        if given and all(isinstance(part, Batch) for part in given.values()):
            return given
        if "images" in given and set(given) <= set(_NAMES):
            return Batch(**given)
    elif isinstance(given, (tuple, list)) and 1 <= len(given) <= 3:
        images, target, index = (*given, None, None)[:3]
        if isinstance(images, (tuple, list)) and images:  # views, as a collated tuple of them is
            return Batch(images[0], target, index, tuple(images[1:]))
        return Batch(images, target, index)
    names = f"a mapping of {', '.join(map(repr, given))}" if isinstance(given, Mapping) else type(given).__name__
    raise TypeError(
        f"fastkd: a source gave {names}, must be a Batch, a mapping of several by name, images, a tuple "
        f"(images, target, index) or its beginning, or a mapping of {', '.join(_NAMES)}"
    )


def on_device(batches: Batches, device: torch.device) -> Batches:
    """The batches where the training is."""
    if isinstance(batches, Mapping):
        return {name: batch.to(device) for name, batch in batches.items()}
    return None if batches is None else batches.to(device)


def images_of(batches: Batches) -> int:
    """How many images an iteration counts for: those of the first of several batches, 1 without any."""
    if isinstance(batches, Mapping):
        return len(next(iter(batches.values())))
    return 1 if batches is None else len(batches)
