"""CPU and CUDA give the same bits: places, flips, crops of every dtype, draws from alias tables."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import ALIAS, Case, assert_identical, needs_cuda, parametrized_determined

import fastkd
from fastkd.ops import alias as alias_ops
from fastkd.ops import crop as ops

pytestmark = needs_cuda

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
SEEDS = [0, 1, -1, 2**62 + 12345, -(2**63), 2**63 - 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_places(seed: int) -> None:
    key = torch.tensor([seed])
    for ranges in (((0, 25), (0, 25)), ((-4, 9), (-4, 1)), ((-(2**40), 2**41), (0, 2**31))):
        for probability in (0.0, 0.5, 1.0):
            arguments = (1001, 7, *ranges, probability)
            assert_identical(ops.crop_offsets(key.cuda(), *arguments), ops.crop_offsets(key, *arguments))


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def memory_format(request: pytest.FixtureRequest) -> torch.memory_format:
    """Of the images."""
    return request.param


def _places(batch: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    offsets = torch.randint(-10, side + 3, (batch, 6, 2), generator=generator)
    return offsets, torch.rand(batch, 6, generator=generator) < 0.5


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_crops(dtype: torch.dtype, channels: int, memory_format: torch.memory_format) -> None:
    images = (
        torch.randn(5, channels, 23, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 40
    ).to(dtype)
    images = images.contiguous(memory_format=memory_format)
    offsets, flip = _places(5, 23)
    for size in ((8, 8), (1, 17), (30, 3)):
        ours = ops.crop(images.cuda(), offsets.cuda(), size, flip.cuda())
        expected = ops.crop(images, offsets, size, flip)
        assert ours.stride() == expected.stride()
        assert_identical((ours,), (expected,))


@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_to_normalised_floats(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(6, 3, 1, 1)
    images = every_byte.contiguous(memory_format=memory_format)
    offsets, flip = _places(6, 16)
    center, scale = [255 * m for m in (0.4914, 0.4822, 0.4465)], [1 / (255 * s) for s in (0.247, 0.2435, 0.2616)]
    options = {"center": center, "scale": scale, "dtype": dtype}
    ours = ops.crop(images.cuda(), offsets.cuda(), (16, 16), flip.cuda(), **options)
    assert_identical((ours,), (ops.crop(images, offsets, (16, 16), flip, **options),))


@pytest.mark.parametrize("dtype", FLOATS)
def test_normalised_floats(dtype: torch.dtype) -> None:
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    offsets, flip = _places(6, 16)
    options = {"center": [0.1, 0.2, 0.3], "scale": [3.7, 0.3, 1.1]}
    ours = ops.crop(images.cuda(), offsets.cuda(), (9, 9), flip.cuda(), **options)
    assert_identical((ours,), (ops.crop(images, offsets, (9, 9), flip, **options),))


@pytest.mark.parametrize("items", [1, 4096, 100_003])
def test_alias_draws(items: int) -> None:
    scores = torch.randn(items, generator=torch.Generator().manual_seed(3))
    table = fastkd.AliasTable(scores, 3.0, seed=11)
    on_gpu = table.to("cuda")
    for seed in SEEDS:
        for start, stride in ((0, 1), (12345678901, 7)):
            ours = on_gpu.sample_at(seed, start, 10_001, stride)
            assert_identical((ours,), (table.sample_at(seed, start, 10_001, stride),))
    assert_identical((on_gpu.sample(1000), on_gpu.sample(10)), (table.sample(1000), table.sample(10)))


@pytest.mark.parametrize("case", ALIAS, ids=lambda case: case.name)
def test_alias_tables(case: Case) -> None:
    assert_identical(case(*case.inputs("cuda")), case(*case.inputs("cpu")))


def test_alias_table_of_many_blocks() -> None:
    scores = torch.randn(40_000_000, generator=torch.Generator().manual_seed(3))  # three tiles of the table over blocks
    slope = torch.tensor(1.3, dtype=torch.float64)
    assert_identical(alias_ops.build(scores.cuda(), slope.cuda()), alias_ops.build(scores, slope))


@parametrized_determined
def test_values_agree(case: Case) -> None:
    """Not bit for bit where sums have another order; the truth tests of the operators hold both to float64."""
    for ours, expected in zip(case(*case.inputs("cuda")), case(*case.inputs("cpu")), strict=True):
        rtol = 1e-4 if expected.dtype == torch.float32 else 2e-2 if expected.is_floating_point() else 0
        torch.testing.assert_close(ours.cpu(), expected, rtol=rtol, atol=1e-6 * (rtol > 0), equal_nan=True)
