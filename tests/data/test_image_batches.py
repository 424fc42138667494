"""ImageBatches of a set: which images, which crops; the same after a resumption, for ranks, layouts, and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.data import Batch, ImageBatches, ImageSet
from fastkd.patches import crop_seed, seeded_crop_flip

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


def image_set(count: int = 50, channels: int = 3, **changes: Any) -> ImageSet:
    """Image i has 1 + i at its left half and 101 + i at its right one: a view tells where it is from."""
    images = torch.arange(1, count + 1).reshape(-1, 1, 1, 1).repeat(1, channels, 8, 8)
    images[..., 4:] += 100
    values: dict[str, Any] = {
        "images": images.to(torch.uint8),
        "target": torch.arange(count) % 5,
        "class_names": tuple("abcde"),
        "mean": (0.5,) * channels,
        "std": (0.25,) * channels,
    }
    return ImageSet(**{**values, **changes})


def pixels(views: Tensor) -> Tensor:
    return ((views.double() * 0.25 + 0.5) * 255).round().long()


def epoch(batches: ImageBatches, number: int = 0, start: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [parts(batch) for batch in batches.epoch(number, start)]


def parts(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    assert batch.target is not None
    assert batch.index is not None
    return batch.images, batch.target, batch.index


def same(a: list[tuple[Tensor, Tensor, Tensor]], b: list[tuple[Tensor, Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)
    )


def test_an_epoch_has_every_image_once() -> None:
    data = image_set()
    for drop_last, sizes in ((True, [16, 16, 16]), (False, [16, 16, 16, 2])):
        batches = ImageBatches(data, 16, seed=0, drop_last=drop_last)
        every = epoch(batches)
        assert len(batches) == len(every) == len(sizes)
        assert [len(target) for _, target, _ in every] == sizes
        indices = torch.cat([part[2] for part in every])
        assert len(indices.unique()) == sum(sizes)
        assert torch.equal(torch.cat([part[1] for part in every]), data.target[indices])
        assert not torch.equal(indices, indices.sort().values)
    assert len(ImageBatches(data, 25, seed=0, drop_last=False)) == 2
    assert len(ImageBatches(data, 100, seed=0, drop_last=False)) == 1


def test_views_are_crops_of_their_images() -> None:
    for views, _, indices in epoch(ImageBatches(image_set(), 10, seed=0, padding=2, flip=True), 0):
        assert views.shape == (10, 3, 8, 8)
        assert views.dtype == torch.float32
        seen = pixels(views)
        left = (1 + indices).reshape(-1, 1, 1, 1)
        assert bool(((seen == 0) | (seen == left) | (seen == left + 100)).all())  # black where it reached outside
        assert bool((seen == left).flatten(1).any(1).all())


def test_places_and_mirrors_are_uniform() -> None:
    """Of 4000 crops each of 5 places in a row, mirrored or not, has 400; five standard deviations are 95."""
    row = torch.arange(1, 9, dtype=torch.uint8)
    data = image_set(4000, images=row.expand(4000, 3, 8, 8))
    padded = [0, 0, *row.tolist(), 0, 0]
    crops = [tuple(padded[place : place + 8]) for place in range(5)]
    counts = dict.fromkeys([*crops, *(crop[::-1] for crop in crops)], 0)
    for views, _, _ in epoch(ImageBatches(data, 500, seed=1, padding=2, flip=True), 0):
        for seen in pixels(views)[:, 0, 4].tolist():  # a row that is inside the image at any place
            counts[tuple(seen)] += 1
    assert all(abs(count - 400) < 95 for count in counts.values())


def test_plain_batches_are_the_normalised_images() -> None:
    data = image_set(channels=1)
    for views, _, indices in epoch(ImageBatches(data, 25, seed=0, padding=0, flip=False), 3):
        assert torch.equal(views, data.normalised(indices))
        assert torch.equal(views, data.normalised()[indices])


def test_the_set_recommends_flip_and_padding() -> None:
    data = image_set(flip=True, padding=1)
    assert same(epoch(ImageBatches(data, 25, seed=0)), epoch(ImageBatches(data, 25, seed=0, padding=1, flip=True)))
    assert not same(epoch(ImageBatches(data, 25, seed=0)), epoch(ImageBatches(data, 25, seed=0, padding=1, flip=False)))
    assert not same(epoch(ImageBatches(data, 25, seed=0)), epoch(ImageBatches(data, 25, seed=0, padding=2, flip=True)))
    upright = ImageBatches(image_set(padding=0), 25, seed=0)
    assert all(torch.equal(views, upright.image_set.normalised(i)) for views, _, i in epoch(upright, 0))


@pytest.mark.parametrize("start", [0, 1, 3, 6, 7])
def test_resumption_gives_the_same_bits(start: int) -> None:
    data = image_set(flip=True)
    whole = epoch(ImageBatches(data, 7, seed=3), 5)
    resumed = epoch(ImageBatches(data, 7, seed=3), 5, start)
    assert len(resumed) == 7 - start
    assert same(whole[start:], resumed)


def test_batches_leave_the_global_generator() -> None:
    """And do not depend on it."""
    data, state = image_set(), torch.random.get_rng_state()
    a = epoch(ImageBatches(data, 10, seed=0))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    try:
        assert same(a, epoch(ImageBatches(data, 10, seed=0)))
    finally:
        torch.random.set_rng_state(state)


def test_epochs_of_one_object_are_independent() -> None:
    """Two iterators in turns are as one after the other."""
    batches = ImageBatches(image_set(), 10, seed=0)
    in_turns = list(zip(batches.epoch(0), batches.epoch(1), strict=True))
    for number in range(2):
        assert same([parts(pair[number]) for pair in in_turns], epoch(batches, number))


def test_seed_and_epoch_change_order_and_crops() -> None:
    """By chance a crop is at the same one of 81 places. The images are the same: a view tells its place alone."""
    data = image_set().subset([7] * 50)
    runs = [
        epoch(ImageBatches(data, 50, seed=seed), number)[0] for seed, number in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2))
    ]
    for i, (views, _, indices) in enumerate(runs):
        for other_views, _, other_indices in runs[:i]:
            assert not torch.equal(indices, other_indices)
            assert float((views == other_views).flatten(1).all(1).double().mean()) < 0.3


def test_batches_of_an_epoch_have_different_crops() -> None:
    data = image_set().subset([7] * 50)
    parts = epoch(ImageBatches(data, 10, seed=0))
    assert not any(torch.equal(parts[0][0], part[0]) for part in parts[1:])


def test_ranks_share_the_permutation() -> None:
    data = image_set(count=100)
    alone = ImageBatches(data, 24, seed=2)
    ranks = [ImageBatches(data, 8, seed=2, rank=rank, world_size=3) for rank in range(3)]
    assert [len(rank) for rank in ranks] == [4, 4, 4]
    parts = [epoch(rank, 1) for rank in ranks]
    for number, (_, _, indices) in enumerate(epoch(alone, 1)):
        assert torch.equal(torch.cat([part[number][2] for part in parts]), indices)
    single = image_set().subset([7] * 50)
    views = [epoch(ImageBatches(single, 10, seed=0, rank=rank, world_size=2))[0][0] for rank in range(2)]
    assert not torch.equal(*views)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last(channels: int) -> None:
    data = image_set(channels=channels, flip=True)
    plain = ImageBatches(data, 10, seed=0)
    last = ImageBatches(data, 10, seed=0, channels_last=True)
    back = ImageBatches(
        data.__class__(**{**vars(data), "images": data.images.contiguous(memory_format=torch.channels_last)}),
        10,
        seed=0,
    )
    for (a, _, _), (b, _, _), (c, _, _) in zip(epoch(plain), epoch(last), epoch(back), strict=True):
        assert a.is_contiguous()
        assert b.is_contiguous(memory_format=torch.channels_last)
        assert c.is_contiguous()
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype: torch.dtype) -> None:
    data = image_set(flip=True)
    for (a, _, _), (b, _, _) in zip(
        epoch(ImageBatches(data, 10, seed=0)), epoch(ImageBatches(data, 10, seed=0, dtype=dtype)), strict=True
    ):
        assert b.dtype == dtype
        torch.testing.assert_close(a.to(dtype), b, rtol=0, atol=1e-6 if dtype == torch.float64 else 0)


def test_seeded_crops_are_those_of_a_generator_with_this_seed() -> None:
    images = image_set().images
    seed = int(crop_seed(images.device, torch.Generator().manual_seed(9)))
    expected = fastkd.random_crop_flip(images, 4, None, 0.5, 0.5, 0.25, torch.float32, torch.Generator().manual_seed(9))
    assert torch.equal(seeded_crop_flip(images, seed, 4, 0.5, 0.5, 0.25, torch.float32), expected)
    assert not torch.equal(seeded_crop_flip(images, seed + 1, 4, 0.5, 0.5, 0.25, torch.float32), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, must be at least 1"),
        ({"batch_size": 51}, "batch_size is 51, must be at most the 50 images of image_set in all, or drop_last=False"),
        (
            {"batch_size": 26, "world_size": 2},
            "batch_size is 26 on each of 2 ranks, must be at most the 50 images of image_set in all",
        ),
        ({"rank": 2, "world_size": 2}, r"rank is 2, must be in \[0, world_size\), world_size is 2"),
        ({"rank": -1}, r"rank is -1, must be in \[0, world_size\), world_size is 1"),
        ({"world_size": 0}, r"rank is 0, must be in \[0, world_size\), world_size is 0"),
        ({"world_size": 2, "drop_last": False}, "drop_last is False, must be True with world_size 2"),
        ({"padding": -1}, "padding is -1, must be at least 0"),
        ({"padding": 2**30 - 1}, "padding is 1073741823, must leave images of .* at most 1073741824 pixels"),
        ({"flip": "no"}, "flip is str, must be True or False"),
        ({"flip": 0.3}, "flip is float, must be True or False"),
        ({"drop_last": "no"}, "drop_last is str, must be True or False"),
        ({"channels_last": "no"}, "channels_last is str, must be True or False"),
        ({"dtype": torch.int64}, "dtype is torch.int64, must be float32, float64, bfloat16 or float16"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match="fastkd: " + message):
        next(ImageBatches(image_set(), **{"batch_size": 10, "seed": 0, **arguments}).epoch(0))


@pytest.mark.parametrize("start", [-1, 6])
def test_start_outside(start: int) -> None:
    """At the call, not at the first batch."""
    with pytest.raises(ValueError, match=rf"start is {start}, must be in \[0, 5\], the batches of an epoch"):
        ImageBatches(image_set(), 10, seed=0).epoch(0, start)


def test_further_views_are_other_crops_of_the_same_images() -> None:
    data = image_set(padding=2)
    for one, three in zip(
        ImageBatches(data, 10, seed=0).epoch(1), ImageBatches(data, 10, seed=0, views=3).epoch(1), strict=True
    ):
        assert torch.equal(one.images, three.images)  # the first one is that which there is without further ones
        assert torch.equal(three.index, one.index)  # type: ignore[arg-type]
        assert one.views == ()
        assert len(three.views) == 2
        for view in three.views:
            assert view.shape == three.images.shape
            assert not torch.equal(view, three.images)
        assert not torch.equal(*three.views)
    with pytest.raises(ValueError, match="views is 0, must be at least 1"):
        ImageBatches(data, 10, seed=0, views=0)
