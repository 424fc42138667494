"""Random places: reproducible, exactly those of the integer reference, uniform, independent."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

import fastkd
from fastkd.ops import crop as ops
from fastkd.reference import crop as reference

pytestmark = pytest.mark.cuda_kernels


def test_same_seed_same_crops(device: torch.device, generator: torch.Generator) -> None:
    images = torch.randint(0, 256, (20, 3, 12, 12), dtype=torch.uint8, generator=generator).to(device)
    runs = []
    for seed in (5, 5, 6):
        random = torch.Generator(device).manual_seed(seed)
        patches, offsets = fastkd.random_patches(images, 4, 2, random)
        runs.append((patches, offsets, fastkd.random_crop_flip(images, generator=random)))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


def test_philox_reference_known_answer() -> None:
    assert reference.philox(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # Random123's kat_vectors


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_offsets_are_those_of_the_reference(device: torch.device, seed: int) -> None:
    for args in [
        (3, 5, (0, 1), (0, 1), 0.0),
        (1, 37, (-4, 9), (0, 25), 0.5),
        (7, 3, (-(2**62), 2**62), (5, 2**33), 1.0),
        (2, 2, (0, 3), (2**62, 2**62), 1 / 3),
    ]:
        offsets, flip = ops.crop_offsets(torch.tensor([seed], device=device), *args)
        expected_offsets, expected_flip = reference.crop_offsets(seed, *args)
        assert torch.equal(offsets.cpu(), expected_offsets)
        assert torch.equal(flip.cpu(), expected_flip)


def test_offsets_are_uniform_and_independent(device: torch.device) -> None:
    images = torch.empty(400, 1, 12, 9, device=device)
    generator = torch.Generator(device).manual_seed(0)
    _, offsets = fastkd.random_patches(images, (5, 4), 100, generator, padding=1)
    y, x = offsets.cpu().reshape(-1, 2).T
    assert (y.min(), y.max(), x.min(), x.max()) == (-1, 8, -1, 6)
    joint = torch.bincount((y + 1) * 8 + x + 1, minlength=80)
    assert stats.chisquare(joint.numpy()).pvalue > 1e-4
    successive = torch.bincount((y[:-1] + 1) * 10 + y[1:] + 1, minlength=100)
    assert stats.chisquare(successive.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1.0])
def test_flip_probability(device: torch.device, probability: float) -> None:
    seed = torch.tensor([11], device=device)
    offsets, flip = (t.cpu() for t in ops.crop_offsets(seed, 100, 200, (0, 2), (0, 1), probability))
    count = int(flip.sum())
    assert stats.binomtest(count, 20000, probability).pvalue > 1e-4
    if 0 < probability < 1:  # independent of the offset
        table = torch.bincount(2 * flip.flatten() + offsets[..., 0].flatten(), minlength=4).reshape(2, 2)
        assert stats.chi2_contingency(table.numpy()).pvalue > 1e-4
