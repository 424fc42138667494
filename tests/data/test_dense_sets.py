"""Sets with a class for each pixel: what they take and refuse, batches of them, and the one that has a name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refusals import refuses

from fastkd.data import ImageBatches, ImageSet, load
from fastkd.data.images import channel_statistics
from fastkd.data.registry import outline
from fastkd.data.segmentation import BACKGROUND, CLASSES, scenes

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


def dense_set(**changes: Any) -> ImageSet:
    """Of each pixel the class is its value modulo 4."""
    images = torch.randint(256, (12, 1, 6, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values = {"images": images, "target": images[:, 0].long() % 4, "class_names": ("a", "b", "c", "d"), "padding": 0}
    return ImageSet(**{**values, "mean": 0.5, "std": 0.25, **changes})


def test_a_class_for_each_pixel() -> None:
    data = dense_set()
    assert data.dense
    assert (data.num_classes, data.padding, data.flip) == (4, 0, False)
    assert data.to("cpu").target.shape == (12, 6, 8)
    for chosen in ([3, 0], torch.arange(12) % 5 == 0):
        part = data.subset(chosen)
        assert torch.equal(part.target, data.target[chosen])
        assert torch.equal(part.images, data.images[chosen])
    assert torch.equal(data.with_target(3 - data.target).target, 3 - data.target)
    whole = dense_set(target=torch.arange(12) % 4, padding=2, flip=True)
    assert not whole.dense


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"padding": 4}, r"padding is 4, must be 0 where each pixel has a class: images would move"),
        ({"flip": True}, r"flip is True, must be False where each pixel has a class"),
        (
            {"target": torch.zeros(12, 8, 6, dtype=torch.int64)},
            r"target has shape \(12, 8, 6\), must be \(12,\), one label an image, or \(12, 6, 8\), one a pixel",
        ),
        ({"target": torch.zeros(12, 6, dtype=torch.int64)}, r"target has shape \(12, 6\), must be"),
        ({"target": torch.zeros(12, 1, 6, 8, dtype=torch.int64)}, r"target has shape \(12, 1, 6, 8\), must be"),
        ({"class_names": ("a", "b", "c")}, r"target\[0, \d, \d\] is 3, must be in \[0, 3\): there are 3 classes"),
    ],
)
def test_what_a_dense_set_refuses(changes: dict[str, Any], message: str) -> None:
    refuses(message, lambda: dense_set(**changes))


def test_the_first_wrong_pixel_is_named() -> None:
    target = dense_set().target.clone()
    target[7, 2, 5], target[7, 3, 1], target[9] = 4, -1, 8
    refuses(r"target\[7, 2, 5\] is 4, must be in \[0, 4\)", lambda: dense_set(target=target))


def test_a_mask_of_a_dense_set_is_of_images() -> None:
    data = dense_set()
    refuses(
        r"indices is torch.bool \(12, 6, 8\), must be ints \[n\] or a mask \(12,\)",
        lambda: data.subset(data.target > 1),
    )


def test_batches_of_a_dense_set() -> None:
    """Each image comes with its own classes, wherever the shuffling puts it."""
    data = dense_set()
    for batches in (ImageBatches(data, 5, seed=3), ImageBatches(data, 5, seed=3, padding=0, flip=False)):
        seen = list(batches.epoch(1))
        assert len(seen) == 2
        for batch in seen:
            assert batch.target.shape == (5, 6, 8)
            assert torch.equal(batch.target, data.target[batch.index])
            assert torch.equal(batch.images, data.normalised(batch.index))
    for name, value in (("padding", 1), ("flip", True)):
        message = f"{name} is {value}, must be .* where each pixel has a class"
        refuses(message, lambda n=name, v=value: ImageBatches(data, 5, seed=3, **{n: v}))


def test_the_named_scenes() -> None:
    about = outline("scenes")
    train, test = load("Scenes")
    assert about.dense
    assert train.dense
    assert (len(train), len(test)) == (about.train_size, about.test_size)
    assert train.images.shape[1:] == test.images.shape[1:] == about.shape
    assert train.num_classes == about.num_classes == CLASSES
    assert train.class_names[BACKGROUND] == "background"
    assert (train.mean, train.std) == (test.mean, test.std) == channel_statistics(train.images)
    expected = scenes(len(train), len(test))
    for ours, theirs in zip((train, test), expected, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.target, theirs.target)
    assert torch.bincount(train.target.flatten(), minlength=CLASSES).min() > 0.005 * train.target.numel()
    assert not any(outline(name).dense for name in ("cifar10", "digits"))
