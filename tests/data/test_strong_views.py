"""Strong views: beside loops over pixels; what is drawn; as views of ImageBatches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd.data import ImageBatches, ImageSet
from fastkd.data.strong import Changes, changed, draw_changes, most_degrees

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


def image_set(count: int = 40, channels: int = 3, side: int = 8, **changes: Any) -> ImageSet:
    generator = torch.Generator().manual_seed(count)
    values: dict[str, Any] = {
        "images": torch.randint(256, (count, channels, side, side), generator=generator, dtype=torch.uint8),
        "target": torch.arange(count) % 5,
        "class_names": tuple("abcde"),
        "mean": tuple(0.4 + 0.05 * i for i in range(channels)),
        "std": tuple(0.2 + 0.02 * i for i in range(channels)),
        "flip": True,
        "padding": 1,
    }
    return ImageSet(**{**values, **changes})


def one_by_loops(image: Tensor, of: Changes, i: int, mean: list[float], std: list[float]) -> list[list[list[float]]]:
    """``[C, H, W]``, as the documentation has it."""
    channels, height, width = image.shape

    def pixel(c: int, y: int, x: int) -> float:
        return float(image[c, y, x]) if 0 <= y < height and 0 <= x < width else 0.0

    moved = [[[0.0] * width for _ in range(height)] for _ in range(channels)]
    (a, b), (c, d) = of.matrix[i].tolist()
    for row in range(height):
        for column in range(width):
            x, y = column + 0.5 - width / 2, row + 0.5 - height / 2  # from the middle
            from_x = a * x + b * y + float(of.shift[i, 0]) * width + width / 2 - 0.5
            from_y = c * x + d * y + float(of.shift[i, 1]) * height + height / 2 - 0.5
            left, top = math.floor(from_x), math.floor(from_y)
            right, below = from_x - left, from_y - top
            for channel in range(channels):
                moved[channel][row][column] = (
                    pixel(channel, top, left) * (1 - right) * (1 - below)
                    + pixel(channel, top, left + 1) * right * (1 - below)
                    + pixel(channel, top + 1, left) * (1 - right) * below
                    + pixel(channel, top + 1, left + 1) * right * below
                )
    places = [(y, x) for y in range(height) for x in range(width)]
    parts = [0.299, 0.587, 0.114] if channels == 3 else [1 / channels] * channels
    grey = {(y, x): sum(p * moved[k][y][x] for k, p in enumerate(parts)) for y, x in places}
    middle = sum(grey.values()) / len(grey)
    brightness, contrast, saturation = (float(v[i]) for v in (of.brightness, of.contrast, of.saturation))
    for k in range(channels):
        for y, x in places:
            value = moved[k][y][x]
            if channels == 3:
                value = grey[y, x] + saturation * (value - grey[y, x])
            value = middle + contrast * (value - middle)
            moved[k][y][x] = (min(max(brightness * value, 0.0), 1.0) - mean[k]) / std[k]
            corner_x, corner_y = (
                math.floor(float(of.centre[i, axis]) * side) - side // 2 // 2
                for axis, side in ((0, width), (1, height))
            )
            if corner_x <= x < corner_x + width // 2 and corner_y <= y < corner_y + height // 2:
                moved[k][y][x] = 0.0
    return moved


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 8, 8), (3, 5, 7), (1, 6, 9), (2, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_pixel(channels: int, height: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, channels, height, width, generator=generator, dtype=dtype)
    changes = draw_changes(6, 30.0, 0, 1)
    mean, std = [0.5, 0.4, 0.3][:channels], [0.2, 0.25, 0.3][:channels]
    found = changed(images.clone(), changes, tuple(mean), tuple(std))
    expected = torch.tensor([one_by_loops(image, changes, i, mean, std) for i, image in enumerate(images)])
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-4, atol=2e-5)


def nothing(count: int) -> Changes:
    """A change that leaves images as they are, but for a square in the far corner."""
    one = torch.ones(count)
    return Changes(
        torch.eye(2).repeat(count, 1, 1), torch.zeros(count, 2), one, one, one, torch.full((count, 2), 0.999)
    )


def test_no_change_is_none_but_for_the_square() -> None:
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = changed(images, nothing(3), (0.5,) * 3, (0.25,) * 3)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[5:, 5:] = True  # of 4x4, from the fifth to beyond the last
    torch.testing.assert_close(found[..., ~inside], ((images - 0.5) / 0.25)[..., ~inside])
    assert bool((found[..., inside] == 0).all())


def test_it_leaves_its_argument() -> None:
    images = torch.rand(3, 3, 8, 8)
    before = images.clone()
    changed(images, draw_changes(3, 30.0, 0), (0.5,) * 3, (0.25,) * 3)
    assert torch.equal(images, before)


def test_what_is_drawn() -> None:
    changes = draw_changes(4000, 30.0, 3)
    determinant = torch.linalg.det(changes.matrix.double())
    torch.testing.assert_close(determinant, torch.ones_like(determinant), rtol=1e-5, atol=1e-5)
    # what becomes of the x axis is turned, and sheared along y before
    angle = torch.atan2(changes.matrix[:, 1, 0], changes.matrix[:, 0, 0])
    assert math.radians(35) < float(angle.abs().max()) < math.radians(30) + math.atan(0.2)
    for values, low, high in (
        (changes.shift, -0.1, 0.1),
        (changes.brightness, 0.6, 1.4),
        (changes.contrast, 0.6, 1.4),
        (changes.saturation, 0.2, 1.8),
        (changes.centre, 0.0, 1.0),
    ):
        assert low <= float(values.min()) < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < float(values.max()) <= high
        # five standard deviations of a uniform mean
        assert float(values.double().mean()) == pytest.approx(
            (low + high) / 2, abs=5 * (high - low) / (12 * 4000) ** 0.5
        )
    upright = draw_changes(4000, 0.0, 3).matrix
    assert float(upright[:, 0, 1].abs().max()) <= 0.2 + 1e-6
    assert torch.equal(draw_changes(7, 30.0, 3).matrix, draw_changes(7, 30.0, 3).matrix)
    assert not torch.equal(draw_changes(7, 30.0, 4).matrix, draw_changes(7, 30.0, 3).matrix)


def test_digits_are_turned_less() -> None:
    assert (most_degrees(image_set()), most_degrees(image_set(flip=False))) == (30.0, 15.0)
    assert most_degrees(image_set(channels=1, flip=False)) == 15.0


# ---- as views of batches -----------------------------------------------------------------------------


def views(batches: ImageBatches, epoch: int = 0, start: int = 0) -> list[tuple[Tensor, ...]]:
    return [(batch.images, *batch.views) for batch in batches.epoch(epoch, start)]


def test_the_last_views_are_strong() -> None:
    data = image_set()
    weak = views(ImageBatches(data, 10, seed=0, views=3))
    for number, (a, b) in enumerate(
        zip(weak, views(ImageBatches(data, 10, seed=0, views=3, strong_views=1)), strict=True)
    ):
        assert torch.equal(a[0], b[0])  # the weak ones stay as they are
        assert torch.equal(a[1], b[1])
        # the strong one is a change of the crops that there are without it
        black = -torch.tensor(data.mean)[:, None, None] / torch.tensor(data.std)[:, None, None]
        pixels = a[2] * torch.tensor(data.std)[:, None, None] + torch.tensor(data.mean)[:, None, None]
        expected = changed(pixels, draw_changes(10, 30.0, 0, 0, number, 0, 2), data.mean, data.std)
        torch.testing.assert_close(b[2], expected, rtol=1e-4, atol=1e-4)
        assert bool((b[2] >= black - 1e-5).all())
        cut = (b[2] == 0).all(1).flatten(1).sum(1)
        assert bool((cut >= 4).all())  # a quarter of 4x4 at least
        assert bool((cut <= 17).all())
    for a, b in zip(weak, views(ImageBatches(data, 10, seed=0, views=3, strong_views=3)), strict=True):
        assert not any(torch.equal(one, other) for one, other in zip(a, b, strict=True))
        assert not torch.equal(b[1], b[2])


@pytest.mark.parametrize("start", [0, 2, 5])
def test_resumption_gives_the_same_bits(start: int) -> None:
    data = image_set()
    whole, resumed = (views(ImageBatches(data, 7, seed=3, views=2, strong_views=1), 4, first) for first in (0, start))
    assert len(resumed) == 5 - start
    for a, b in zip(whole[start:], resumed, strict=True):
        assert all(map(torch.equal, a, b))


def test_seed_epoch_batch_and_rank_change_them() -> None:
    """The images are the same, uncropped: a view tells its change alone."""
    data = image_set(flip=False, padding=0).subset([7] * 40)
    runs = [
        views(ImageBatches(data, 10, seed=seed, rank=rank, world_size=2, views=2, strong_views=1), epoch)[batch][1]
        for seed, epoch, batch, rank in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))
    ]
    for i, one in enumerate(runs):
        assert not any(torch.equal(one, other) for other in runs[:i])
        assert len(one.flatten(1).unique(dim=0)) == 10  # each image by itself


def test_the_global_generator_is_left() -> None:
    state = torch.random.get_rng_state()
    views(ImageBatches(image_set(), 10, seed=0, views=2, strong_views=1))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("channels", [1, 3])
def test_layouts_and_dtypes(channels: int) -> None:
    data = image_set(channels=channels)
    options: dict[str, Any] = {"seed": 0, "views": 2, "strong_views": 1}
    plain = views(ImageBatches(data, 10, **options))
    for a, b in zip(plain, views(ImageBatches(data, 10, channels_last=True, **options)), strict=True):
        assert torch.equal(a[1], b[1])
        assert a[1].is_contiguous()
        assert b[1].is_contiguous(memory_format=torch.channels_last)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        for a, b in zip(plain, views(ImageBatches(data, 10, dtype=dtype, **options)), strict=True):
            assert b[1].dtype == dtype
            torch.testing.assert_close(a[1].to(dtype), b[1], rtol=0, atol=1e-5 if dtype == torch.float64 else 0)


def test_small_images() -> None:
    """Of one pixel, nothing is cut out."""
    for side in (1, 2, 3):
        data = image_set(side=side, padding=0)
        for _, strong in views(ImageBatches(data, 10, seed=0, views=2, strong_views=1)):
            assert strong.shape == (10, 3, side, side)
            assert bool(strong.isfinite().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strong_views": -1}, "strong_views is -1, must be at least 0"),
        ({"strong_views": 2}, "strong_views is 2, must be less than 2"),
        ({"views": 2, "strong_views": 3}, "strong_views is 3, must be less than 3"),
        ({"strong_views": True}, "strong_views is bool, must be an int"),
        ({"strong_views": 1.0}, "strong_views is float, must be an int"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match="fastkd: " + message):
        ImageBatches(image_set(), 10, seed=0, **options)


def test_dense_sets_have_none() -> None:
    data = image_set(flip=False, padding=0)
    data = ImageSet(data.images, torch.zeros(40, 8, 8, dtype=torch.int64), ("a",), data.mean, data.std, padding=0)
    with pytest.raises(
        ValueError, match="strong_views is 1, must be 0 where each pixel has a class: images would move"
    ):
        ImageBatches(data, 10, seed=0, strong_views=1)
