"""Patches of images at random or given places: independent for each image, differentiable, replayable.

Patches and image gradients keep the memory format of the images (NCHW or channels-last). Pixels outside the image are
zero. Where images require a gradient, a pixel sums those of the patches that cover it, in a fixed order. The places
are a function of one seed, drawn from the generator (torch's default one unless given): the same for any number of
threads and for every device that gets the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from fastkd import _checks
from fastkd._seeding import check_generator, draw_seed
from fastkd.ops import crop as _ops

Size = int | tuple[int, int]

__all__ = ["crop_patches", "random_crop_flip", "random_patches"]

LARGEST_SIDE = 2**30  # of a padded image, pixels

_FLOATS = _checks.FLOATS
_INTEGERS = (*_checks.INTEGERS, torch.bool)


def random_patches(
    images: Tensor,
    size: Size,
    patches_per_image: int = 1,
    generator: torch.Generator | None = None,
    *,
    padding: int = 0,
) -> tuple[Tensor, Tensor]:
    """``patches_per_image`` crops of each image at independent, uniformly random places.

    Args:
        images: ``[B, C, H, W]``; float32, float64, bfloat16 and float16 get gradients, integers and bool are copied.
        size: height and width of a patch in pixels, or one number for both.
        patches_per_image: k >= 1.
        generator: of the device of images.
        padding: pixels of zeros around the image that patches may reach into.

    Returns:
        patches: ``[B * k, C, h, w]``, patch ``j`` of image ``b`` at ``b * k + j``, the dtype of images.
        offsets: int64 ``[B, k, 2]``, (y, x) of each top left corner in the image (from ``-padding``); give them to
        :func:`crop_patches` to cut the same places from a mask or another view.

    Raises:
        TypeError, ValueError: a patch larger than the padded image, a padded image of more than 2^30 pixels on a side,
        k < 1, a negative padding, dtypes and shapes other than these, a generator of another device.

    The patch discriminator of Fang et al., "Mosaicking to Distill" (NeurIPS 2021, arXiv:2110.15094), Eq. 3, sees these.
    """
    check_images(images, _FLOATS + _INTEGERS)
    height, width = pair_of(size)
    patches_per_image = _checks.check_size("patches_per_image", patches_per_image, 1)
    padding = padding_of(padding)
    offsets, _ = _draw(images, height, width, patches_per_image, padding, 0.0, generator)
    return _ops.crop(images, offsets, (height, width)), offsets


def crop_patches(images: Tensor, offsets: Tensor, size: Size, flip: Tensor | None = None) -> Tensor:
    """Crops at given places, as :func:`random_patches` returns them.

    Args:
        images: ``[B, C, H, W]``; float32, float64, bfloat16 and float16 get gradients, integers and bool are copied.
        offsets: int64 ``[B, k, 2]``, or ``[B, 2]`` for one patch of each image: (y, x) of the top left corner. A patch
            may lie partly or wholly outside the image: pixels there are zero.
        size: height and width of a patch in pixels, or one number for both.
        flip: bool ``[B, k]`` or ``[B]``: mirror these patches left to right.

    Returns:
        ``[B * k, C, h, w]``, patch ``j`` of image ``b`` at ``b * k + j``, the dtype of images.

    Raises:
        TypeError, ValueError: dtypes, shapes and devices other than these.
    """
    check_images(images, _FLOATS + _INTEGERS)
    height, width = pair_of(size)
    _check_places("offsets", offsets, torch.int64, images)
    batch = images.shape[0]
    if offsets.dim() not in (2, 3) or offsets.shape[0] != batch or offsets.shape[-1] != 2:
        raise ValueError(
            f"fastkd: offsets has shape {tuple(offsets.shape)}, must be ({batch}, patches, 2) or ({batch}, 2): "
            f"(y, x) for each of the {batch} images"
        )
    if flip is not None:
        _check_places("flip", flip, torch.bool, images)
        if flip.shape != offsets.shape[:-1]:
            raise ValueError(
                f"fastkd: flip has shape {tuple(flip.shape)}, must be {tuple(offsets.shape[:-1])}, one for each patch"
            )
    if offsets.dim() == 2:
        offsets = offsets[:, None]
        flip = None if flip is None else flip[:, None]
    return _ops.crop(images, offsets, (height, width), flip)


def random_crop_flip(
    images: Tensor,
    padding: int = 4,
    size: Size | None = None,
    flip_probability: float = 0.5,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Pad with zeros, crop at a random place, mirror at random, normalise: one pass, each image by itself.

    What torchvision's ``RandomCrop(size, padding)``, ``RandomHorizontalFlip``, ``ToTensor`` and ``Normalize`` do to one
    image at a time, for a batch that is already where the model is.

    Args:
        images: ``[B, C, H, W]``, uint8 or a float dtype (differentiable).
        padding: pixels of zeros on each side before the crop (black, not the mean: padded before normalisation).
        size: height and width of the result in pixels, or one number for both; that of the image if None.
        flip_probability: of mirroring left to right, in [0, 1].
        mean, std: of each channel, C numbers or one for all, in units of the float image; uint8 counts as x / 255.
            The result is (x - mean) / std, computed in float64 and rounded once to dtype (twice, by way of float32, for
            16-bit floats). None leaves the step out.
        dtype: of the result, a float dtype: float32 for uint8 images and that of float images if None.
        generator: of the device of images.

    Returns:
        ``[B, C, h, w]``.

    Raises:
        TypeError, ValueError: a crop larger than the padded image, a padded image of more than 2^30 pixels on a side, a
        negative padding, a probability outside [0, 1], mean or std of another length than C, std not positive, dtypes and
        shapes other than these, a generator of another device.
    """
    return _crop_flip(images, padding, size, flip_probability, mean, std, dtype, generator, None)


def seeded_crop_flip(
    images: Tensor,
    seed: int,
    padding: int,
    flip_probability: float,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """:func:`random_crop_flip` of a seed in [-2^63, 2^63): every device crops the same places, as no generator does."""
    at_device = torch.full((1,), seed, dtype=torch.int64, device=images.device)
    return _crop_flip(images, padding, None, flip_probability, mean, std, dtype, None, at_device)


def _crop_flip(
    images: Tensor,
    padding: int,
    size: Size | None,
    flip_probability: float,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    dtype: torch.dtype | None,
    generator: torch.Generator | None,
    seed: Tensor | None,
) -> Tensor:
    check_images(images, (*_FLOATS, torch.uint8))
    channels = images.shape[1]
    height, width = (images.shape[2], images.shape[3]) if size is None else pair_of(size)
    padding = padding_of(padding)
    byte = images.dtype == torch.uint8
    dtype = dtype if dtype is not None else torch.float32 if byte else images.dtype
    flip_probability = check_augmentation(flip_probability, dtype)
    center, scale = normalisation(mean, std, channels, byte=byte)
    offsets, flip = _draw(images, height, width, 1, padding, flip_probability, generator, seed)
    out = _ops.crop(
        images, offsets, (height, width), flip, center=center, scale=scale, dtype=dtype if byte else images.dtype
    )
    return out.to(dtype)


def check_augmentation(flip_probability: float, dtype: torch.dtype) -> float:
    """The probability, as a number of Python's."""
    if dtype not in _FLOATS:
        raise TypeError(f"fastkd: dtype is {dtype}, must be {_checks.names(_FLOATS)}")
    return _checks.check_between("flip_probability", flip_probability, 0.0, 1.0)


def normalisation(
    mean: float | Sequence[float] | None, std: float | Sequence[float] | None, channels: int, *, byte: bool
) -> tuple[list[float], list[float]]:
    """``center`` and ``scale`` of the operators, or empty lists: ``(pixel - center) * scale = (x - mean) / std``."""
    unit = 255.0 if byte else 1.0
    center = [] if mean is None else [unit * m for m in channel_values("mean", mean, channels)]
    spread = [] if std is None else channel_values("std", std, channels)
    if not all(
        _checks.in_range(s, _checks.LEAST_NUMBER, _checks.LARGEST_NUMBER)
        and _checks.in_range(1.0 / (unit * s), 0.0, _checks.LARGEST_NUMBER)
        for s in spread
    ):
        raise ValueError(f"fastkd: std is {std}, must be positive, and 1 / std finite")
    return center, [1.0 / (unit * s) for s in spread] if spread or not byte else [1.0 / unit] * channels


def _draw(
    images: Tensor,
    height: int,
    width: int,
    patches: int,
    padding: int,
    flip_probability: float,
    generator: torch.Generator | None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_window(images, height, width, padding, generator)
    return _ops.crop_offsets(
        crop_seed(images.device, generator) if seed is None else seed,
        images.shape[0],
        patches,
        (-padding, images.shape[2] + 2 * padding - height + 1),
        (-padding, images.shape[3] + 2 * padding - width + 1),
        flip_probability,
    )


def check_window(images: Tensor, height: int, width: int, padding: int, generator: torch.Generator | None) -> None:
    padded_height, padded_width = images.shape[2] + 2 * padding, images.shape[3] + 2 * padding
    if padding and (padded_height > LARGEST_SIDE or padded_width > LARGEST_SIDE):
        raise ValueError(
            f"fastkd: padding is {padding}, must leave images of ({images.shape[2]}, {images.shape[3]}) "
            f"at most {LARGEST_SIDE} pixels high and wide"
        )
    if height > padded_height or width > padded_width:
        raise ValueError(
            f"fastkd: size is ({height}, {width}), must be at most that of the image"
            + (
                f" and its padding, ({padded_height}, {padded_width})"
                if padding
                else f", ({padded_height}, {padded_width})"
            )
        )
    check_generator(generator)
    if generator is not None and not _same_device(generator.device, images.device):
        raise ValueError(
            f"fastkd: generator is on {generator.device}, must be on the device of images, {images.device}"
        )


def crop_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    limits = torch.iinfo(torch.int64)
    return draw_seed(limits.min, limits.max, device, generator)


def _same_device(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index or 0) == (b.index or 0)


def check_images(images: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    _checks.check_tensor("images", images)
    if images.dim() != 4:
        hint = "; give a mask [B, H, W] a channel: mask[:, None]" if images.dim() == 3 else ""
        raise ValueError(f"fastkd: images has shape {tuple(images.shape)}, must be [B, C, H, W]{hint}")
    _checks.check_dtype("images", images, dtypes)


def _check_places(name: str, value: Tensor, dtype: torch.dtype, images: Tensor) -> None:
    _checks.check_dtype(name, value, (dtype,))
    if value.device != images.device:
        raise ValueError(f"fastkd: {name} is on {value.device}, must be on the device of images, {images.device}")


def padding_of(padding: int) -> int:
    """A padding that the operators can count with; of what images, :func:`check_window` sees."""
    return _checks.check_count("padding", padding, 0, LARGEST_SIDE)


def pair_of(size: Size) -> tuple[int, int]:
    pair = size if isinstance(size, Sequence) and len(size) == 2 else (size, size)
    height, width = map(_checks.index_of, pair)
    if height is None or width is None:
        raise TypeError(f"fastkd: size is {size!r}, must be an int or a pair of them, (height, width)")
    if height < 1 or width < 1:
        raise ValueError(f"fastkd: size is {size!r}, must be positive")
    if height >= _checks.LARGEST_SIZE or width >= _checks.LARGEST_SIZE:
        raise ValueError(f"fastkd: size is {size!r}, must be less than {_checks.LARGEST_SIZE}")
    return height, width


def channel_values(name: str, value: float | Sequence[float], channels: int) -> list[float]:
    if isinstance(value, Tensor):
        raise TypeError(
            f"fastkd: {name} is a tensor, must be numbers, so that nothing waits for a device: {name}.tolist()"
        )
    try:
        alone = isinstance(value, Real) or (isinstance(value, np.ndarray) and value.ndim == 0)
        given: list[object] = [value] * channels if alone else list(value)  # type: ignore[arg-type]
        values = [_checks.check_number(name, v) for v in given]
    except TypeError:
        raise TypeError(
            f"fastkd: {name} is {value!r}, must be a number, or a sequence of one for each channel"
        ) from None
    if len(values) != channels:
        raise ValueError(
            f"fastkd: {name} has {len(values)} values, must have one, or one for each of the {channels} channels"
        )
    if not all(_checks.in_range(v, -_checks.LARGEST_NUMBER, _checks.LARGEST_NUMBER) for v in values):
        raise ValueError(f"fastkd: {name} is {value}, must be finite")
    return values
