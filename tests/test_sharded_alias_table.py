"""Tables whose scores lie on several ranks: the table, the draws and the states of one that has them all."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sharded_processes as work
import torch
from sharded_processes import CASES, DRAWS, ITEMS, SEED, follow, normal
from torch import Tensor
from training_processes import start_ranks

from fastkd import AliasTable, ShardedAliasTable
from fastkd.ops import alias as ops
from fastkd.ops import alias_shard as parts
from fastkd.reference import alias as reference

pytestmark = pytest.mark.forks

RANKS = (1, 2, 4)


@pytest.fixture(scope="module", params=RANKS, ids=lambda ranks: f"{ranks} ranks")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """What so many processes wrote of all the cases."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    table = AliasTable(CASES["plain"][0], seed=SEED)
    table.sample(37)
    torch.save(table.state_dict(), folder / "state.pt")
    np.save(folder / "scores.npy", CASES["iqpr"][0].numpy())
    start_ranks(work.tables_in_ranks, folder, ranks=request.param)
    return request.param, folder


def load(ranks: tuple[int, Path], name: str) -> list[Any]:
    return [torch.load(ranks[1] / f"{name}{rank}.pt") for rank in range(ranks[0])]


def merged(parts_of_ranks: list[Tensor]) -> Tensor:
    """Draws in the order of their numbers, of which rank r has every w-th."""
    return torch.stack(parts_of_ranks, 1).flatten()


@cache
def truth(name: str) -> dict[str, Any]:
    """The same of an AliasTable that has all the scores."""
    scores, options, changes = CASES[name]
    return follow(AliasTable(scores, seed=SEED, **options), changes)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_table_of_all_scores(ranks: tuple[int, Path], name: str) -> None:
    """Lambda, weights, draws and states, before and after each change, and the changes that are refused."""
    said, expected = load(ranks, name), truth(name)
    assert [of_rank["lambda"] for of_rank in said] == [expected["lambda"]] * ranks[0]
    for step, (weights, drawn, refused) in enumerate(expected["steps"]):
        of_ranks = [of_rank["steps"][step] for of_rank in said]
        assert [r for _, _, r in of_ranks] == [refused] * ranks[0]
        assert torch.equal(torch.cat([w for w, _, _ in of_ranks]), weights)
        assert torch.equal(merged([d for _, d, _ in of_ranks]), drawn)
        for of_rank in said:
            state = dict(of_rank["states"][step])
            assert len(state.pop("block_weights")) == 32
            assert state == expected["states"][step]


def test_owners_know_their_draws_and_send_them(ranks: tuple[int, Path]) -> None:
    scores = CASES["plain"][0]
    expected = AliasTable(scores, seed=SEED).sample_at(-3, 7, 1001)
    owned = load(ranks, "owners")
    positions = torch.cat([p for p, _, _, _ in owned])
    assert torch.equal(positions.sort().values, torch.arange(1001))
    assert torch.equal(torch.cat([i for _, i, _, _ in owned])[positions.argsort()], expected)
    images = torch.stack([scores.float(), -scores.float()], 1)[:, None]
    for rank, (its_positions, _, loaded, sent) in enumerate(owned):
        assert torch.equal(loaded, images[expected[rank :: ranks[0]]])
        assert sent == int((its_positions % ranks[0] != rank).sum())


def test_it_goes_on_where_another_number_of_ranks_stopped(ranks: tuple[int, Path]) -> None:
    expected = AliasTable(CASES["plain"][0], seed=SEED).sample_at(SEED, 37, DRAWS)
    assert torch.equal(merged(load(ranks, "resumed")), expected)


def test_the_recipe_of_the_guide(ranks: tuple[int, Path]) -> None:
    expected = AliasTable(CASES["iqpr"][0], iqpr=5.0, seed=0).sample(3 * 256 * ranks[0])
    assert torch.equal(merged(load(ranks, "recipe")).flatten(), expected[-256 * ranks[0] :])


SAYS = {
    "nan": "scores holds NaN",
    "dtype": "scores has dtype torch.int64",
    "shape": "scores has shape",
    "lambda": "inverse_temperature is -1.0",
    "large": "inverse_temperature is 1.7e",
    "iqpr": "iqpr is 0.5",
    "both": "one at a time",
    "all": "all -inf",
    "none": "hold 0 items",
    "seed": "seed is 1 on rank 1, must be 0",
    "another lambda": "inverse_temperature is 2.0 on rank 1",
    "cut": "scores of rank 1 begin at item 4000",
    "update of another": "an item of this rank",
    "update nan": "scores holds NaN",
    "update shape": "must both be",
    "update dtype": "indices has dtype torch.int32",
    "update too far": "too far above",
    "update of all": "no item with a positive weight",
    "n": "n is -1",
    "n of no kind": "n is str",
    "rows": "rows, one for each",
    "no rows": "loaded is int",
    "state": "total_weight",
    "state of other blocks": "block_weights",
    "no state": "state has no",
    "owned": "start is",
    "another n": "4 draws of seed|8 draws of seed|16 draws of seed",
    "other rows": r"rows \(1,\)",
    "other draws": "from 0 on",
    "another state": "state is",
}


def test_what_is_wrong_on_one_rank_is_the_same_error_on_all(ranks: tuple[int, Path]) -> None:
    """And none of them waits; ``start_ranks`` would say so."""
    said = load(ranks, "refused")
    for name, (kind, text) in said[0].items():
        assert kind in ("TypeError", "ValueError", "RuntimeError"), f"{name}: {text}"
        assert text.startswith("fastkd: "), f"{name}: {text}"
        if name not in ("owned",):
            assert [of_rank[name] for of_rank in said] == [(kind, text)] * ranks[0]
        with pytest.raises(ValueError, match=SAYS[name]):
            raise ValueError(text)
    assert ranks[0] == 1 or said[0].keys() == SAYS.keys()


def test_probabilities_are_weights_over_their_sum() -> None:
    """Exactly, read off the bins in integers; and they are the softmax."""
    scores = normal(0, 6000)
    table = ShardedAliasTable(scores, 2.0, seed=0)
    weights = table.weights().tolist()
    total = sum(weights)
    assert total == table.total_weight
    chance = [Fraction(0)] * 6000
    top, blocks = table._top.tolist(), table._block_weight.tolist()
    of_block = [Fraction(0)] * len(blocks)
    for b, (threshold, alias) in enumerate(top):
        of_block[b] += Fraction(threshold, total * len(blocks))
        of_block[alias] += Fraction(total - threshold, total * len(blocks))
    for i, word in enumerate(table._bins.tolist()):
        b = i // 4096
        size = min(4096, 6000 - 4096 * b)
        own = Fraction(word >> 12, blocks[b])
        chance[i] += of_block[b] * own / size
        chance[4096 * b + (word & 4095)] += of_block[b] * (1 - own) / size
    assert chance == [Fraction(w, total) for w in weights]
    assert torch.equal(table.probabilities(), AliasTable(scores, 2.0).probabilities())
    assert (table.probabilities() - (2 * scores).softmax(0)).abs().sum() < 1e-9


@pytest.mark.parametrize(("items", "ranks"), [(0, 3), (1, 3), (4096, 2), (4097, 2), (10**9, 1000), (5 * 4096, 4)])
def test_shards_are_whole_blocks(items: int, ranks: int) -> None:
    shards = [ShardedAliasTable.shard(items, rank, ranks) for rank in range(ranks)]
    assert shards[0][0] == 0
    assert shards[-1][1] == items
    assert all(stop == start for (_, stop), (start, _) in pairwise(shards))
    sizes = [stop - start for start, stop in shards]
    assert max(sizes) - min(sizes) <= 2 * 4096
    assert all(start % 4096 == 0 for start, stop in shards if stop > start)


@pytest.mark.parametrize("rank", [-1, 3, 1.0])
def test_shard_refuses_ranks_that_are_none(rank: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="fastkd: rank"):
        ShardedAliasTable.shard(10, rank, 3)


def test_without_a_process_group_there_is_one_rank() -> None:
    scores = normal(0, 5000)
    table, plain = ShardedAliasTable(scores, seed=4), AliasTable(scores, seed=4)
    assert torch.equal(table.sample(100), plain.sample(100))
    assert "rank 0 of 1" in repr(table)
    assert table.offset == 0
    plain.load_state_dict(table.state_dict())  # the states are of one kind
    table.load_state_dict(plain.state_dict())
    assert torch.equal(table.sample(9), plain.sample(9))


def test_the_default_seed_is_drawn_from_the_default_generator() -> None:
    torch.manual_seed(3)
    first = ShardedAliasTable(normal(0, 10)).sample(50)
    torch.manual_seed(3)
    again = ShardedAliasTable(normal(0, 10)).sample(50)
    assert torch.equal(first, again)
    assert not torch.equal(first, ShardedAliasTable(normal(0, 10)).sample(50))


def test_a_group_must_be_one() -> None:
    with pytest.raises(TypeError, match="fastkd: group is str"):
        ShardedAliasTable(normal(0, 10), group="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fastkd: scores is on meta"):
        ShardedAliasTable(torch.empty(10, device="meta"))


# ---- the integers of fastkd.ops.alias_shard --------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse_temperature", [0.0, 1.0, 3.7, 900.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_parts_are_those_of_the_operators(dtype: torch.dtype, inverse_temperature: float) -> None:
    scores = normal(21, 9001).to(dtype)
    scores[[5, 8999]] = -math.inf
    built = ops.build(scores, torch.tensor(inverse_temperature, dtype=torch.float64))
    reference, kappa, exponent, total = built.scale.tolist()
    assert parts.exponent_of(parts.partition(scores, reference, kappa)) == exponent
    scale = parts.Scale(reference, kappa, int(exponent))
    bins, block_weight = parts.build(scores, scale)
    assert torch.equal(bins, built.bins)
    assert torch.equal(block_weight, built.block_weight)
    assert torch.equal(parts.top_of(block_weight), built.top)
    assert parts.sum_of_weights(scores, scale, 0) == total


@pytest.mark.parametrize("shift", [1, 3, 20, 51, 62, 80])
def test_weights_are_divided_and_rounded(shift: int) -> None:
    scores = normal(22, 5000)
    scale = parts.Scale(float(scores.max()), 1.0, 40)
    bins, block_weight = parts.build(scores, scale)
    before = ops.weights(ops.Table(bins, block_weight, torch.empty(0), torch.empty(0)))
    none = torch.empty(0, dtype=torch.int64), torch.empty(0)
    ((blocks, bins, block_weight),) = parts.rebuilt(bins, block_weight, scale, shift, *none)
    assert blocks == [0, 1]
    after = ops.weights(ops.Table(bins, block_weight, torch.empty(0), torch.empty(0)))
    assert after.tolist() == [(w + (1 << shift - 1)) >> shift for w in before.tolist()]


def test_random_words_are_philox() -> None:
    index = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**63 - 1])
    for seed in (0, -1, 2**63 - 1, 123456789123456789):
        words = torch.stack(parts._philox(seed, index.clone()), 1)
        expected = [reference.philox(seed & 2**64 - 1, reference.STREAM, i) for i in index.tolist()]
        assert words.tolist() == [list(of_index) for of_index in expected]


def test_products_of_128_bits() -> None:
    random = torch.Generator().manual_seed(0)
    high, low = (torch.randint(2**32, (1000,), generator=random) for _ in range(2))
    high[:3], low[:3] = 2**32 - 1, 2**32 - 1
    value = torch.randint(2**52, (1000,), generator=random)
    value[0] = 2**52 - 1
    words = [h << 32 | x for h, x in zip(high.tolist(), low.tolist(), strict=True)]
    expected = [w * v >> 64 for w, v in zip(words, value.tolist(), strict=True)]
    assert parts._multiply_high(high, low, value).tolist() == expected
    bound = 2**31 - 1
    at, left_high, left_low = parts._bin(high, low, bound)
    assert at.tolist() == [w * bound >> 64 for w in words]
    left = [h << 32 | x for h, x in zip(left_high.tolist(), left_low.tolist(), strict=True)]
    assert left == [w * bound & 2**64 - 1 for w in words]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("items", [1, 2, 3, 4, 5, 41, 1271])
def test_quartiles_are_those_of_the_operator(items: int, dtype: torch.dtype) -> None:
    scores = normal(23, items).to(dtype)
    scores[1::7] = -math.inf
    scores[2::5] = scores[0]
    found = parts.quartiles(scores, lambda counts: counts)
    finite = scores[scores > -math.inf].double()
    expected = torch.quantile(finite, torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert found == pytest.approx(expected.tolist(), rel=1e-15)
    lower, upper = found
    lambda_ = math.log(5) / (upper - lower) if upper > lower else 0.0
    assert lambda_ == float(ops.inverse_temperature(scores, 5.0))


def test_quartiles_of_numbers_of_both_signs_and_none() -> None:
    scores = torch.tensor([-0.0, 0.0, -1.5, 5e-324, -1e308, 1e308, -math.inf], dtype=torch.float64)
    lower, upper = parts.quartiles(scores, lambda counts: counts)
    ordered = sorted(scores[:-1].tolist())
    assert lower == ordered[1] + 0.25 * (ordered[2] - ordered[1])
    assert upper == 5e-324


def test_the_cases_are_what_they_say() -> None:
    """Of shifts and refusals."""
    assert [refused for _, _, refused in truth("one end")["steps"]] == [False, True, False]
    weights = [w.sum() for w, _, _ in truth("far above")["steps"]]
    assert weights[2] < 1e-6 * weights[0]
    assert ITEMS % 4096
