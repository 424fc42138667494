"""Epochs of training batches from a set that is on one device: shuffled, cropped, mirrored and normalised there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd._checks import check_count, check_flag
from fastkd._seeding import mixed_generator, mixed_seed
from fastkd.data.batch import Batch
from fastkd.data.images import ImageSet
from fastkd.data.source import check_start
from fastkd.data.strong import changed, draw_changes, most_degrees
from fastkd.patches import check_augmentation, padding_of, seeded_crop_flip

__all__ = ["ImageBatches"]


class ImageBatches:
    """Batches whose every bit follows from the seed, the epoch, the number of the batch and the rank.

    The order of an epoch is a permutation of (seed, epoch), which the ranks share out; the crops of a batch follow from
    (seed, epoch, batch, rank). So a run that stopped goes on with ``epoch(e, start=k)`` as if it had not, on any device.

    Args:
        image_set: on the device where the batches are to be.
        batch_size: images of a batch, on each rank.
        seed: any int.
        padding: pixels of zeros that crops may reach into; ``image_set.padding`` if None. 0 leaves the images where they are.
        flip: whether half of the images are mirrored; ``image_set.flip`` if None.
        rank, world_size: which of how many processes this is: batch k is the rank-th part of ``world_size * batch_size``
            successive images of the permutation.
        drop_last: leaves out the images that fill no batch (of all ranks); else the last batch is smaller, on one rank.
        dtype: of the views: float32, float64, bfloat16 or float16.
        channels_last: memory format of the views; the set is copied to it once.
        views: of each image, 1 or more: the same images, cropped and mirrored independently.
        strong_views: how many of the views, the last ones, are then changed strongly: turned, shifted and sheared, other in
            colour, with a square cut out (:mod:`fastkd.data.strong`). ``views=2, strong_views=1`` is a weak and a strong one.
            The crops and flips are those without it.

    Raises:
        TypeError, ValueError: a batch_size below 1, or more than the images with drop_last; a negative padding; crops, flips or
        strong views of a dense set; more strong views than views; a rank outside [0, world_size); several ranks without
        drop_last, as their last batches would differ; another dtype; flags that are neither True nor False.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        *,
        seed: int,
        padding: int | None = None,
        flip: bool | None = None,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        views: int = 1,
        strong_views: int = 0,
    ) -> None:
        if not isinstance(image_set, ImageSet):
            raise TypeError(f"fastkd: image_set is {type(image_set).__name__}, must be an ImageSet")
        batch_size, seed = check_count("batch_size", batch_size, 1), check_count("seed", seed)
        rank, world_size = check_count("rank", rank), check_count("world_size", world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"fastkd: rank is {rank}, must be in [0, world_size), world_size is {world_size}")
        drop_last = check_flag("drop_last", drop_last)
        if world_size > 1 and not drop_last:
            raise ValueError(f"fastkd: drop_last is False, must be True with world_size {world_size}")
        if drop_last and batch_size * world_size > len(image_set):
            ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
            raise ValueError(
                f"fastkd: batch_size is {batch_size}{ranks}, must be at most the {len(image_set)} images "
                "of image_set in all, or drop_last=False"
            )
        padding = image_set.padding if padding is None else padding_of(padding)
        flip = image_set.flip if flip is None else check_flag("flip", flip)
        image_set.check_moves(padding, flip)
        channels_last = check_flag("channels_last", channels_last)
        check_augmentation(0.0, dtype)
        self.views = check_count("views", views, 1)
        self.strong_views = check_count("strong_views", strong_views, 0, self.views + 1)
        if image_set.dense and self.strong_views:
            raise ValueError(
                f"fastkd: strong_views is {strong_views}, must be 0 where each pixel has a class: images would move, and not "
                "their classes"
            )
        self.image_set = image_set
        self.batch_size = batch_size
        self.seed = seed
        self.padding = padding
        self.flip = flip
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.dtype = dtype
        self._channels_last = channels_last
        images = image_set.images.permute(0, 2, 3, 1) if channels_last else image_set.images
        self._images = (
            images.contiguous()
        )  # index_select keeps no strides; indexing, which does, takes 14 times as long

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank."""
        whole, rest = divmod(len(self.image_set), self.batch_size * self.world_size)
        return whole if self.drop_last else whole + bool(rest)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on.

        Yields:
            :class:`fastkd.data.Batch`: images ``[B, C, H, W]`` of dtype, normalised, and further views of them; target;
            index, which images of the set these are.

        Raises:
            TypeError, ValueError: at once, numbers that are no ints, a negative epoch, a start outside [0, len(self)].
        """
        return self._iterate(*check_start(self, epoch, start))

    def _iterate(self, epoch: int, start: int) -> Iterator[Batch]:
        data = self.image_set
        generator = mixed_generator("order", self.seed, epoch)
        order = torch.randperm(len(data), generator=generator, device="cpu").to(data.device)
        for number in range(start, len(self)):
            first = (number * self.world_size + self.rank) * self.batch_size
            index = order[first : first + self.batch_size]
            chosen = self._images.index_select(0, index)
            chosen = chosen.permute(0, 3, 1, 2) if self._channels_last else chosen
            place = (self.seed, epoch, number, self.rank)
            images, *views = (self._view(chosen, place, view) for view in range(self.views))
            yield Batch(images, data.target[index], index, tuple(views))

    def _view(self, images: Tensor, place: tuple[int, int, int, int], view: int) -> Tensor:
        # the number of the first view is left out: its crops are those that there are without further ones
        seed = mixed_seed("crops", *place, *([view] if view else []))
        data, flips = self.image_set, 0.5 if self.flip else 0.0
        if view < self.views - self.strong_views:
            return seeded_crop_flip(images, seed, self.padding, flips, data.mean, data.std, self.dtype)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        cropped = seeded_crop_flip(images, seed, self.padding, flips, None, None, dtype)
        changes = draw_changes(len(images), most_degrees(data), *place, view)
        layout = torch.channels_last if self._channels_last else torch.contiguous_format
        return changed(cropped, changes, data.mean, data.std).to(self.dtype).contiguous(memory_format=layout)
