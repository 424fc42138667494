"""A labelled set of small images that is in memory as a whole, on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastkd._checks import INTEGERS, check_count, check_flag, check_tensor, index_of
from fastkd.data.stacking import stacked
from fastkd.patches import channel_values, normalisation, padding_of, random_crop_flip

__all__ = ["ImageSet", "channel_statistics"]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and classes, what they are called, and how they are normalised and augmented.

    Attributes:
        images: uint8 ``[N, C, H, W]``, N >= 1, NCHW or channels-last.
        target: int64 ``[N]``, in [0, num_classes), on the device of the images; of a dense set, as for segmentation,
            ``[N, H, W]``, a class for each pixel.
        class_names: one a class; their number is ``num_classes``.
        mean, std: of each channel, in units of x / 255: those of the training images, for a test set, too. Given as C
            numbers, or one for all.
        flip: whether a mirrored image is still one of its class: not so for digits and letters.
        padding: pixels of zeros that random crops may reach into; 4 is usual for sides of 28 and 32.

    Raises:
        TypeError, ValueError: other dtypes, shapes and devices, no images, a label that is no class, mean or std of another
        length than C, std not positive, crops or flips of a dense set, whose classes would stay where they are. To look at the
        labels waits for their device, at construction only.
    """

    images: Tensor
    target: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = False
    padding: int = 4

    def __post_init__(self) -> None:
        for name, value, dtype in (("images", self.images, torch.uint8), ("target", self.target, torch.int64)):
            if not isinstance(value, Tensor) or value.dtype != dtype:
                given = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"fastkd: {name} is {given}, must be a tensor of {dtype}")
        if self.images.dim() != 4 or 0 in self.images.shape:
            raise ValueError(
                f"fastkd: images has shape {tuple(self.images.shape)}, must be [N, C, H, W] with at least one image"
            )
        count, _, *sides = self.images.shape
        if tuple(self.target.shape) not in ((count,), (count, *sides)):
            raise ValueError(
                f"fastkd: target has shape {tuple(self.target.shape)}, must be ({count},), one label an image, or "
                f"{(count, *sides)}, one a pixel"
            )
        if self.target.device != self.images.device:
            raise ValueError(f"fastkd: target is on {self.target.device}, must be with images on {self.images.device}")
        if isinstance(self.class_names, str) or not isinstance(self.class_names, Sequence):
            raise TypeError(
                f"fastkd: class_names is {type(self.class_names).__name__}, must be a sequence of names, one a class"
            )
        channels = self.images.shape[1]
        for field, plain in (
            ("class_names", tuple(self.class_names)),
            ("mean", tuple(channel_values("mean", self.mean, channels))),
            ("std", tuple(channel_values("std", self.std, channels))),
            ("flip", check_flag("flip", self.flip)),
            ("padding", padding_of(self.padding)),
        ):
            object.__setattr__(self, field, plain)
        self.check_moves(self.padding, self.flip)
        normalisation(self.mean, self.std, channels, byte=True)
        check_labels(self.target, self.num_classes)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def dense(self) -> bool:
        """Whether each pixel has a class, and not each image."""
        return self.target.dim() > 1

    def check_moves(self, padding: int, flip: bool) -> None:
        """Whether images may be cropped and mirrored so.

        Raises:
            ValueError: those of a dense set, which are not moved.
        """
        for name, value, still in (("padding", padding, 0), ("flip", flip, False)):
            if self.dense and value != still:
                raise ValueError(
                    f"fastkd: {name} is {value}, must be {still} where each pixel has a class: images would move, and not "
                    "their classes"
                )

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device: torch.device | str) -> ImageSet:
        """The set on another device."""
        return replace(self, images=self.images.to(device), target=self.target.to(device))

    def subset(self, indices: Tensor | Sequence[int]) -> ImageSet:
        """Some of the images, in this order: indices ``[n]``, a list or a tensor of ints in [0, N), or a bool mask ``[N]``."""
        chosen = self._chosen("indices", indices)
        return replace(self, images=self.images[chosen], target=self.target[chosen])

    def _chosen(self, name: str, indices: Tensor | Sequence[int]) -> Tensor:
        try:
            chosen = torch.as_tensor(indices, device=self.device)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"fastkd: {name} is {type(indices).__name__}, must be ints [n] or a mask") from None
        if chosen.dtype == torch.bool and chosen.shape == (len(self),):
            chosen = chosen.nonzero().flatten()
        elif chosen.dim() != 1 or (chosen.numel() and chosen.dtype not in (*INTEGERS, torch.uint16, torch.uint32)):
            raise ValueError(
                f"fastkd: {name} is {chosen.dtype} {tuple(chosen.shape)}, must be ints [n] or a mask ({len(self)},)"
            )
        chosen = chosen.long()
        if chosen.numel() and not (int(chosen.min()) >= 0 and int(chosen.max()) < len(self)):
            raise ValueError(
                f"fastkd: {name} holds {int(chosen.min())} to {int(chosen.max())}, must be in [0, {len(self)})"
            )
        return chosen

    def with_target(self, target: Tensor) -> ImageSet:
        """The same images with other labels, as :mod:`fastkd.data.labels` makes them."""
        return replace(self, target=check_tensor("target", target).to(self.device))

    def normalised(
        self, part: slice | Tensor | Sequence[int] = slice(None), dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``(x / 255 - mean) / std`` of all images, or of a slice of them, or of indices as of :meth:`subset`: to evaluate on.

        Returns:
            ``[n, C, H, W]`` of dtype, as :func:`fastkd.random_crop_flip` rounds it: what :class:`fastkd.data.ImageBatches`
            gives without crop and flip.
        """
        chosen = _check_slice("part", part) if isinstance(part, slice) else self._chosen("part", part)
        return random_crop_flip(self.images[chosen], 0, None, 0.0, self.mean, self.std, dtype)

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        class_names: Sequence[str] | None = None,
        *,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        flip: bool = False,
        padding: int = 4,
    ) -> ImageSet:
        """Any torch Dataset of (image, label) pairs, torchvision's without transforms for instance, read once.

        Args:
            dataset: pairs of a uint8 image (PIL, an array ``[H, W(, C)]`` or a tensor ``[(C, )H, W]``) and an int.
            class_names: those of ``dataset.classes`` if None, else the numbers up to the largest label.
            mean, std: give those of the training set for a test set; of these images if None.
            flip, padding: as in the attributes.

        Raises:
            TypeError, ValueError: as in :func:`fastkd.data.stacking.stacked`, and as at construction.
        """
        images, target = stacked(dataset)
        if class_names is None:
            class_names = getattr(dataset, "classes", None) or [str(i) for i in range(int(target.max()) + 1)]
        own_mean, own_std = channel_statistics(images)
        return cls(
            images,
            target,
            class_names,  # type: ignore[arg-type]
            own_mean if mean is None else mean,  # type: ignore[arg-type]
            own_std if std is None else std,  # type: ignore[arg-type]
            flip,
            padding,
        )


def _check_slice(name: str, part: slice) -> slice:
    for bound in (part.start, part.stop):
        if bound is not None and index_of(bound) is None:
            raise TypeError(f"fastkd: {name} is {part}, must be a slice of ints")
    if part.step is not None:
        check_count(f"{name}.step", part.step, 1)
    return part


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images ``[N, C, H, W]``, in units of x / 255.

    Exact, from counts of the 256 values, then rounded to 4 digits as they are published. A channel of one value has the
    standard deviation 1, so that it can be divided by.
    """
    levels = torch.arange(256, dtype=torch.float64, device="cpu") / 255
    mean, std = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].reshape(-1), minlength=256).cpu().double()
        share = counts / counts.sum()
        center = (share * levels).sum()
        mean.append(round(float(center), 4))
        std.append(round(float((share * (levels - center).square()).sum().sqrt()), 4) or 1.0)
    return tuple(mean), tuple(std)


def check_labels(target: Tensor, num_classes: int, source: str = "") -> None:
    """Raises a ValueError that names the first label outside [0, num_classes), its index, and the source."""
    outside = (target < 0) | (target >= num_classes)
    if bool(outside.any()):
        first = tuple(outside.nonzero()[0].tolist())
        where = f" of {source}" if source else ""
        raise ValueError(
            f"fastkd: target[{', '.join(map(str, first))}]{where} is {int(target[first])}, must be in [0, {num_classes}): "
            f"there are {num_classes} classes"
        )
