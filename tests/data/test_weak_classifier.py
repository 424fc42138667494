"""The weak classifier: beside loops and a plain ridge regression; that it judges what it has not seen; odd sizes; errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastkd._seeding import mixed_generator
from fastkd.data import load
from fastkd.data import weak_classifier as module
from fastkd.data.weak_classifier import weak_classifier

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


def some(count: int, channels: int = 3, height: int = 8, width: int = 8, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, channels, height, width), generator=generator, dtype=torch.uint8)
    return images, torch.arange(count) % classes


def features_by_loops(images: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """Of images of at most 16 pixels on a side, in float64."""
    _, _, height, width = images.shape
    threshold = round(15.0 * np.sqrt((filters[0] ** 2).sum()))
    padded = np.pad(images.astype(float), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    maps = np.zeros((len(images), len(filters), height, width))
    for y in range(height):
        for x in range(width):
            maps[:, :, y, x] = np.einsum("ncij,fcij->nf", padded[:, :, y : y + 3, x : x + 3], filters)
    halves = [(slice(0, -(-side // 2)), slice(-(-side // 2), side)) for side in (height, width)]
    found = []
    for sign in (1, -1):
        above = np.maximum(sign * maps - threshold, 0)
        quarters = [above[:, :, rows, columns].mean((2, 3)) for rows in halves[0] for columns in halves[1]]
        found.append(np.stack(quarters, 2).reshape(len(images), -1))
    return np.rint(np.concatenate(found, 1))


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 8, 8), (1, 7, 5)])
def test_it_is_a_ridge_regression_on_such_features(channels: int, height: int, width: int) -> None:
    images, target = some(60, channels, height, width)
    generator = mixed_generator("weak classifier", 5)
    filters = module._filters(channels, generator)
    fold = module._folds(target, 2, generator).numpy()
    assert filters.shape == (128, channels, 3, 3)
    assert bool((filters.sum((1, 2, 3)) == 0).all())
    assert len(filters.flatten(1).unique(dim=0)) > 100
    features = features_by_loops(images.numpy(), filters.numpy().astype(float))
    scores = np.zeros((60, 3))
    for k in (0, 1):
        own, rest = fold == k, fold != k
        center, spread = features[rest].mean(0), features[rest].std(0)
        spread[spread == 0] = np.inf
        x, y = (features - center) / spread, np.eye(3)[target.numpy()]
        # ridge regression as least squares of more rows
        root = np.sqrt(0.01 * rest.sum() + 50.0)
        rows = np.concatenate([x[rest], root * np.eye(x.shape[1])])
        right = np.concatenate([y[rest] - y[rest].mean(0), np.zeros((x.shape[1], 3))])
        scores[own] = x[own] @ np.linalg.lstsq(rows, right, rcond=None)[0] + y[rest].mean(0)
    found = weak_classifier(images, target, 3, 5)
    assert found.dtype == torch.float64
    expected = torch.from_numpy(scores / 0.1).softmax(1)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_folds_have_their_share_of_each_class() -> None:
    target = torch.tensor([0] * 20 + [1] * 10 + [2])
    fold = module._folds(target, 2, mixed_generator("test", 0))
    assert [int(fold[target == label].sum()) for label in (0, 1)] == [10, 5]
    assert fold.bincount().tolist() == [16, 15]


def test_labels_are_not_known_by_heart() -> None:
    """Of labels by chance, a tenth; there are more features than images, so it knew those that it has seen."""
    train, _ = load("digits")
    target = torch.randint(10, (400,), generator=torch.Generator().manual_seed(0))
    found = weak_classifier(train.images[:400], target, 10, 0)
    assert float((found.argmax(1) == target).double().mean()) < 0.2


def test_digits() -> None:
    train, _ = load("digits")
    found = weak_classifier(train.images, train.target, 10, 0)
    assert float((found.argmax(1) == train.target).double().mean()) > 0.96
    assert float((weak_classifier(train.images, train.target, 10, 0, folds=4) - found).abs().max()) > 0.01


def test_the_seed_and_nothing_else() -> None:
    images, target = some(1100, 1)  # more than one part
    before = torch.random.get_rng_state()
    a, b = weak_classifier(images, target, 3, 0), weak_classifier(images, target, 3, 1)
    assert not torch.allclose(a, b)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.set_num_threads(2)
    torch.testing.assert_close(weak_classifier(images, target, 3, 0), a, rtol=1e-9, atol=0)
    last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(weak_classifier(last, target, 3, 0), a, rtol=1e-9, atol=0)


def test_features_do_not_depend_on_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are exact: to the last bit."""
    images, _ = some(70, 3, 32, 32)
    filters = module._filters(3, mixed_generator("test", 0))
    whole = module._features(images, filters)
    monkeypatch.setattr(module, "PART", 9)
    assert torch.equal(module._features(images, filters), whole)


@pytest.mark.parametrize(
    ("count", "channels", "height", "width", "classes"),
    [(2, 1, 1, 1, 2), (3, 3, 1, 9, 3), (5, 3, 2, 2, 2), (9, 20, 6, 6, 4), (12, 4, 33, 20, 100), (8, 3, 64, 64, 2)],
)
def test_odd_sizes(count: int, channels: int, height: int, width: int, classes: int) -> None:
    """Fewer images than features, classes with one image or none."""
    images, target = some(count, channels, height, width, min(classes, 4))
    found = weak_classifier(images, target, classes, 0)
    assert found.shape == (count, classes)
    torch.testing.assert_close(found.sum(1), torch.ones(count, dtype=torch.float64))
    assert bool((found >= 0).all())


def test_images_that_are_all_alike() -> None:
    """Nothing is known but how frequent the classes are."""
    target = torch.tensor([0, 0, 0, 0, 1, 1])
    found = weak_classifier(torch.full((6, 1, 8, 8), 7, dtype=torch.uint8), target, 2, 0)
    torch.testing.assert_close(found, torch.tensor([[2 / 3, 1 / 3]] * 6, dtype=torch.float64).div(0.1).softmax(1))


IMAGES, TARGET = some(20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": IMAGES.float()}, "images has dtype torch.float32, must be torch.uint8"),
        ({"images": IMAGES[0]}, r"images has shape \(3, 8, 8\), must be \[N, C, H, W\] with at least two images"),
        ({"images": IMAGES[:1], "target": TARGET[:1]}, r"images has shape \(1, 3, 8, 8\), must be"),
        ({"target": TARGET[:5]}, r"target has shape \(5,\), must be \(20,\), one label an image"),
        ({"target": TARGET.int()}, "target has dtype torch.int32, must be torch.int64"),
        ({"num_classes": 2}, r"target\[2\] is 2, must be in \[0, 2\)"),
        ({"num_classes": 1}, "num_classes is 1, must be at least 2"),
        ({"folds": 1}, "folds is 1, must be at least 2"),
        ({"folds": 17}, "folds is 17, must be less than 17"),
        ({"seed": 0.5}, "seed is float, must be an int"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    arguments = {"images": IMAGES, "target": TARGET, "num_classes": 3, "seed": 0, **changes}
    with pytest.raises((TypeError, ValueError), match="fastkd: " + message):
        weak_classifier(**arguments)
