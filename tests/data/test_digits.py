"""The demo's data: splits that share no digit, variations, patches, collections; all from the seed."""

from __future__ import annotations

import pytest
import torch

from fastkd.data import digits
from fastkd.data.splits import stratified_split


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("target", "share", "error", "message"),
    [
        (torch.zeros(4, 1, dtype=torch.int64), 0.5, ValueError, r"target has shape \(4, 1\), must be \[N\]"),
        (torch.zeros(4), 0.5, TypeError, "target has dtype torch.float32, must be torch.int64"),
        ([0, 1], 0.5, TypeError, "target is list"),
        (torch.zeros(4, dtype=torch.int64), "0.5", TypeError, "test_share is str"),
        (torch.zeros(4, dtype=torch.int64), 1.0, ValueError, "test_share is 1.0"),
    ],
)
def test_what_a_split_refuses(target: object, share: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="fastkd: " + message):
        stratified_split(target, share, 0)


def test_split_parts_are_disjoint_and_stratified() -> None:
    parts = digits.split(seeded())
    everything = torch.cat([part.images for part in parts]).flatten(1)
    assert everything.shape == (1797, 64)
    assert len(everything.unique(dim=0)) == 1797  # no digit twice, none missing
    assert float(everything.min()) == 0.0
    assert float(everything.max()) == 1.0
    counts = torch.stack([part.target.bincount(minlength=10) for part in parts])
    assert int((counts.amax(0) - counts.amin(0)).max()) <= 1
    assert not torch.equal(digits.split(seeded(1))[2].target, parts[2].target) or not torch.equal(
        digits.split(seeded(1))[2].images, parts[2].images
    )


def test_variations_stay_near_their_digit() -> None:
    labelled = digits.split(seeded())[0]
    varied = digits.vary(labelled, 1500, seeded())
    assert varied.images.shape == (1500, 1, 8, 8)
    assert torch.equal(varied.target, labelled.target[torch.arange(1500) % 599])
    assert bool(((varied.images >= 0) & (varied.images <= 1)).all())
    source = labelled.images[torch.arange(1500) % 599]
    other = labelled.images[(torch.arange(1500) + 7) % 599]
    to_source, to_other = ((varied.images - x).square().mean((1, 2, 3)) for x in (source, other))
    assert float(to_source.min()) > 0
    assert float((to_source < to_other).double().mean()) > 0.8


@pytest.mark.parametrize("count", [0, 1, 7, 8, 100])
def test_photo_patches_are_cut_from_the_photographs(count: int) -> None:
    from sklearn.datasets import load_sample_images

    patches = digits.photo_patches(count, seeded())
    assert patches.shape == (count, 1, 8, 8)
    if count:  # the first ones come from the first photograph at full size
        scene = torch.tensor(load_sample_images().images[0], dtype=torch.float32).mean(2) / 255.0
        windows = scene.unfold(0, 8, 1).unfold(1, 8, 1)
        assert bool(((windows - patches[0, 0]).abs().amax((2, 3)) < 1e-6).any())


def test_collection_mixes_and_repeats() -> None:
    unlabeled = digits.split(seeded())[1]
    collection = digits.collection(unlabeled, 1000, 0.16, seeded(5))
    assert collection.images.shape == (1000, 1, 8, 8)
    assert int(collection.relevant.sum()) == 160
    again = digits.collection(unlabeled, 1000, 0.16, seeded(5))
    assert torch.equal(collection.images, again.images)
    assert not torch.equal(collection.images, digits.collection(unlabeled, 1000, 0.16, seeded(6)).images)
