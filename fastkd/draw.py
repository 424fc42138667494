"""Training batches straight from an alias table: drawn, cropped, mirrored and normalised in one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd._checks import check_size
from fastkd.alias_table import AliasTable, check_one_for_each_item, check_table
from fastkd.ops import batch as _ops
from fastkd.patches import (
    Size,
    check_augmentation,
    check_images,
    check_window,
    crop_seed,
    normalisation,
    padding_of,
    pair_of,
)

__all__ = ["draw_batch"]


def draw_batch(
    table: AliasTable,
    images: Tensor,
    n: int,
    *,
    size: Size | None = None,
    padding: int = 4,
    flip_probability: float = 0.5,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws ``n`` images of a collection, with replacement, and augments each: a batch in one launch on a GPU.

    The bits, and the state of table and generators afterwards, of::

        indices = table.sample(n, generator)
        batch = fastkd.random_crop_flip(images[indices], padding, size, flip_probability, mean, std, dtype, generator)

    without the copy of the images drawn. So the places come from a seed of the generator, or of the default one of the
    device, which is drawn after that of the items. Nothing waits for the device.

    Args:
        table: over the N images, on their device.
        images: the collection, uint8 ``[N, C, H, W]``, NCHW or channels-last; of other strides, a copy is made each time.
        n: images of the batch, >= 0.
        size: height and width of the result in pixels, or one number for both; that of the images if None.
        padding: pixels of zeros on each side before the crop.
        flip_probability: of mirroring left to right, in [0, 1].
        mean, std: of each channel, C numbers or one for all, in units of x / 255. The result is (x - mean) / std,
            computed in float64 and rounded once to dtype (twice, by way of float32, for 16-bit floats).
        dtype: of the result: float32, float64, bfloat16 or float16.
        generator: of the device of images. The draws are then the first n of a seed from it, as in
            :meth:`AliasTable.sample`, and the table's own stream stays where it is; without it, the next n of that stream.

    Returns:
        batch: ``[n, C, h, w]``, in the memory format of images.
        indices: int64 ``[n]``, which item each image is. A table without any weight, as NaN scores make it on a GPU,
        gives -2^63, and such images are NaN.

    Raises:
        TypeError, ValueError: images other than one uint8 image for each item, on another device than the table; a crop
        larger than the padded image, a padded image of more than 2^30 pixels on a side, a negative n or padding, a
        probability outside [0, 1], mean or std of another length than C, std not positive, a dtype that is no float, a
        generator of another device.
        RuntimeError: images without channels.

    The batches of "Distillation from heterogeneous unlabeled collections" (Begon & Geurts, section 2.1), augmented.
    """
    check_table("table", table)
    check_images(images, (torch.uint8,))
    check_one_for_each_item("images", images, table, "images")
    if images.device != table.device:
        raise ValueError(f"fastkd: images is on {images.device}, must be on the device of the table, {table.device}")
    window = (images.shape[2], images.shape[3]) if size is None else pair_of(size)
    flip_probability = check_augmentation(flip_probability, dtype)
    center, scale = normalisation(mean, std, images.shape[1], byte=True)
    padding = padding_of(padding)
    check_window(images, *window, padding, generator)
    n = check_size("n", n)
    other, places = table._stream_from(generator), crop_seed(images.device, generator)
    return table._draw(
        n,
        other,
        lambda stream: _ops.draw_batch(
            table._table,
            stream,
            places,
            images,
            n,
            window,
            padding,
            flip_probability,
            center=center,
            scale=scale,
            dtype=dtype,
        ),
    )
