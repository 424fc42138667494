"""Alias tables by the CUDA kernels on the host: the CPU's bit for bit, and places beyond 2^31 items."""

from __future__ import annotations

import math
import mmap
import os

import emulated
import numpy as np
import pytest
import torch
from alias_cases import lambda_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastkd.ops import alias as ops
from fastkd.reference import alias as reference

SCHEDULES = range(int(os.environ.get("FASTKD_SCHEDULES", "5")))
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux; named from Python 3.13 on
BLOCK = ops.BLOCK_SIZE


def _equal(a: ops.Table, b: ops.Table) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _kinds(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    u = torch.randn(n, generator=generator)
    place = torch.arange(n)
    return {
        "normal": u,
        "constant": torch.zeros(n),
        "steep": u * 30,
        "masked": torch.where(place % 3 == 0, u, -math.inf),
        "one holds all": torch.where(place == n // 3, 0.0, -200.0),
        "first half heavy": torch.where(place < n // 2, 5.0, u),
        "two blocks": torch.where(place // BLOCK % 2 == 0, 8.0, u),
    }


@pytest.mark.parametrize("seed", SCHEDULES)
@pytest.mark.parametrize("n", [1, 41, 4097, 21_000])
def test_tables_weights_and_draws_are_the_cpus(n: int, seed: int, generator: torch.Generator) -> None:
    stream = torch.tensor([7, 2**40])
    for scores in _kinds(n, generator).values():
        table, slope = ops.build(scores, lambda_of(1.3)), ops.inverse_temperature(scores, 5.0)
        draws, weights = ops.sample(table, stream, 100, 5, 3), ops.weights(table)
        with emulated.emulated(seed):
            assert _equal(ops.build(scores, lambda_of(1.3)), table)
            assert torch.equal(ops.weights(table), weights)
            assert torch.equal(ops.sample(table, stream, 100, 5, 3), draws)
            assert torch.equal(ops.inverse_temperature(scores, 5.0), slope)


@pytest.mark.parametrize("seed", SCHEDULES)
@pytest.mark.parametrize("rise", [-30.0, 0.0, 3.0, 20.0, 43.0])
def test_updates_are_the_cpus(rise: float, seed: int, generator: torch.Generator) -> None:
    """One item, many of them, each of them several times; with the room that risen scores need."""
    for n in (1, 5, 4096, 12_300):
        scores = torch.randn(n, generator=generator, dtype=torch.float64)
        for count in (1, n // 3 + 1, 2 * n + 1, n):
            ours, expected = ops.build(scores, lambda_of(1.0)), ops.build(scores, lambda_of(1.0))
            indices = torch.arange(n) if count == n else torch.randint(n, (count,), generator=generator)
            fresh = scores[indices] + (max(rise, -3.0) if count == n else rise)  # something must be left
            fresh[: count // 2] = -math.inf
            ops.update(expected, indices, fresh)
            with emulated.emulated(seed):
                ops.update(ours, indices, fresh)
            assert _equal(ours, expected)


@pytest.mark.parametrize("seed", SCHEDULES)
@pytest.mark.parametrize("blocks", [1, 2, 7, 4096, 4097, 9001])
def test_the_table_over_many_blocks(blocks: int, seed: int, generator: torch.Generator) -> None:
    emulated.load()
    torch.ops.fastkd_emulated.configure(seed, 16)
    total = 2**51
    share = torch.rand(blocks, generator=generator).double() ** 8
    kinds = {
        "random": (share / share.sum() * total).long(),
        "equal": torch.full((blocks,), total // blocks),
        "mostly none": (torch.arange(blocks) % 100 == 0).long() * (total // blocks),
        "one holds all": torch.where(torch.arange(blocks) == blocks - 1, total, 0),
        "last bit": torch.full((blocks,), 1) + (torch.arange(blocks) == 0),
    }
    for weights in kinds.values():
        top, scale = torch.ops.fastkd_emulated.alias_top(weights)
        np.testing.assert_array_equal(top, np.array(reference.pack(weights.tolist()), dtype=np.int64))
        assert scale[3] == weights.sum()
    assert torch.ops.fastkd_emulated.alias_top(torch.zeros(blocks, dtype=torch.int64))[1][3].isnan()


ITEMS = 5 * 2**29 + 5000  # a fifth of them beyond 2^31


@pytest.fixture
def beyond() -> ops.Table:
    """A table of more than 2^31 items, in memory that nobody has touched: each block's first item has all its weight."""
    untouched = mmap.mmap(-1, 8 * ITEMS, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    bins = torch.frombuffer(untouched, dtype=torch.int64)
    blocks = -(-ITEMS // BLOCK)
    weight = torch.ones(blocks, dtype=torch.int64)
    top = torch.stack([torch.full_like(weight, blocks), torch.arange(blocks)], 1)
    return ops.Table(bins, weight, top, torch.tensor([0.0, math.log2(math.e), 20.0, blocks], dtype=torch.float64))


def test_draws_beyond_two_to_the_31(beyond: ops.Table) -> None:
    stream = torch.tensor([3, 2**33])
    expected = ops.sample(beyond, stream, 2000)
    assert (expected > 2**31).sum() > 300
    assert (expected % BLOCK == 0).all()
    with emulated.emulated(0):
        assert torch.equal(ops.sample(beyond, stream, 2000), expected)


def test_update_beyond_two_to_the_31(beyond: ops.Table) -> None:
    """The last, shorter block and one beyond 2^31 get new weights; nothing else changes but the table over blocks."""
    indices = torch.tensor([ITEMS - 1, ITEMS - 2, 2**31 + 7])
    with emulated.emulated(0):
        ops.update(beyond, indices, torch.tensor([1.0, 2.0, 3.0]))
        last = len(beyond.block_weight) - 1
        assert beyond.block_weight[last] == 1 + round(2**20 * math.e) + round(2**20 * math.e**2)
        assert beyond.block_weight[(2**31 + 7) // BLOCK] == 1 + round(2**20 * math.e**3)
        assert beyond.block_weight.sum() == beyond.scale[3]
        assert (beyond.block_weight > 1).sum() == 2
        drawn = ops.sample(beyond, torch.tensor([1, 0]), 3000)
    assert {ITEMS - 1, ITEMS - 2, 2**31 + 7} <= set(drawn.tolist())


@pytest.mark.parametrize("items", [1, 4096, 4097, 10**9, 2**31, 2**33 + 1, 10**12])
def test_blocks(items: int) -> None:
    emulated.load()
    blocks, last = torch.ops.fastkd_emulated.alias_blocks(torch.tensor([items, 0])).tolist()
    assert (blocks - 1) * BLOCK + last == items
    assert 1 <= last <= BLOCK


def test_memory_of_a_table_of_1e9_items() -> None:
    with FakeTensorMode():
        table = ops.build(torch.empty(10**9), torch.empty([], dtype=torch.float64))
        assert sum(t.numel() * t.element_size() for t in table) == 8 * 10**9 + 24 * 244_141 + 32 == 8_005_859_416
