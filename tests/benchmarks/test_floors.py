"""The bytes that each kernel must move, as the benchmarks count them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks/ is of the source tree, not of the package

from benchmarks import floors

pytestmark = pytest.mark.no_kernels


def test_floors_of_divergence() -> None:
    n = 8192 * 128256
    assert floors.divergence(8192, 128256, 2) == 6 * n
    assert floors.divergence(8192, 128256, 4) == 12 * n
    assert floors.divergence(8192, 128256, 2, teacher_gradient=True) == 8 * n
    assert floors.divergence(8192, 128256, 2, sweeps=2) == 10 * n
    assert floors.divergence(8192, 128256, 2, sweeps=3) == 14 * n
    assert floors.divergence(8192, 128256, 2, 4, student_gradient=False) == 6 * n
    assert floors.divergence(10, 5, 2, row_bytes=20) == 300 + 200
    assert floors.divergence_backward(10, 5, 2) == 200
    assert floors.logit_stats(10, 5, 2) == 100 + 240
    assert floors.gmm_fit(10, 5, 4) == 200 + 720
    assert floors.gmm_select(10, 5, 2) == 50 * 7
    assert floors.lessons(20, 10, 7, 5, 4) == 20 * 5 * 4 + 10 * 2 * (7 + 5) * 4
    assert floors.sparse_divergence(10, 100, 5, 2) == 4600
    assert floors.sparse_divergence(10, 100, 5, 2, student_gradient=False) == 2600
    assert floors.relation(10, 5, 2) == 300
    assert floors.relation(10, 5, 2, 7) == 340
    assert floors.channel_moments(10, 5, 2) == 100
    assert floors.channel_moments(10, 5, 2, gradient=True) == 300
    assert floors.logit_stats_backward(10, 5, 2) == 200 + 10 * 32


def test_floors_of_crop() -> None:
    assert floors.crop(100, 3, 8, (4, 4), 1, 4) == 100 * 3 + 8 * 3 * 16 * 4 + 8 * 16
    assert floors.crop_backward(2, 3, (8, 8), 8, (4, 4), 4) == 3 * (8 * 16 + 2 * 64) * 4 + 8 * 16
    assert floors.crop_offsets(100) == 1700
    assert floors.draw_batch(8, 100, 3, (4, 4), 2) == 100 * 3 + 8 * 3 * 16 * 2 + 8 * 40
    assert floors.alias_sample(10) == 400
    assert floors.alias_sample(10, top_in_cache=False) == 720


def test_covered_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randint(-9, 12, (7, 5, 2), generator=generator)
    covered = torch.zeros(7, 10, 11, dtype=torch.bool)
    for b in range(7):
        for y, x in offsets[b].tolist():
            covered[b, max(y, 0) : max(y + 4, 0), max(x, 0) : max(x + 6, 0)] = True
    assert floors.covered_pixels(offsets, (4, 6), (10, 11)) == int(covered.sum())
