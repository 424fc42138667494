"""Tables that keep their scores: another lambda in place, schedules of it, updates; all of it resumes."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from refusals import refuses
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fastkd import AliasTable, CollectionBatchSampler, CollectionSampler

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

ITEMS = 9000  # in three blocks
SCORES = torch.randn(ITEMS, generator=torch.Generator().manual_seed(0))


def kept(scores: Tensor = SCORES, **options: Any) -> AliasTable:
    return AliasTable(scores, **{"iqpr": 5.0, "seed": 9, "keep_scores": True, **options})


def same(table: AliasTable, other: AliasTable) -> bool:
    equal = all(torch.equal(a, b) for a, b in zip(table._table, other._table, strict=True))
    return equal and torch.equal(table.inverse_temperature, other.inverse_temperature)


def rescored(step: int = 0, count: int = 500) -> tuple[Tensor, Tensor]:
    """Items, of which some come twice, and scores for them."""
    generator = torch.Generator().manual_seed(step)
    index = torch.randint(ITEMS, (count,), generator=generator)
    index[-20:] = index[:20]
    scores = torch.randn(count, generator=generator)
    scores[3] = -math.inf
    return index, scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_another_lambda_is_another_table(dtype: torch.dtype) -> None:
    scores = SCORES.to(dtype)
    table = kept(scores)
    table.sample(3)
    for set_it, options in (
        (lambda: table.set_iqpr(25.0), {"iqpr": 25.0}),
        (lambda: table.set_inverse_temperature(0.5), {"inverse_temperature": 0.5}),
        (lambda: table.set_inverse_temperature(torch.tensor(2.0)), {"inverse_temperature": 2.0}),
        (lambda: table.set_iqpr(1), {"iqpr": 1.0}),
    ):
        set_it()
        assert same(table, AliasTable(scores, **options))  # type: ignore[arg-type]
    assert table.state_dict()["next_index"] == 3
    before = table.version
    index, new = rescored()
    table.update(index, new)
    assert table.version == before + 1
    expected = scores.clone()
    for i, score in zip(index.tolist(), new.to(dtype), strict=True):
        expected[i] = score
    table.set_iqpr(5.0)
    assert same(table, AliasTable(expected, iqpr=5.0))
    assert torch.equal(scores, SCORES.to(dtype))  # what was given is left as it is


def test_who_shares_the_weights() -> None:
    number = torch.tensor(1.0, dtype=torch.float64)
    table = kept(iqpr=None, inverse_temperature=number)
    shared, sampler = table.to("cpu"), CollectionSampler(table, 100)
    apart = [copy.deepcopy(table), pickle.loads(pickle.dumps(table))]
    table.set_iqpr(25.0)
    assert same(shared, table)
    assert sampler.table is table
    assert float(number) == 1.0
    for other in apart:
        assert same(other, AliasTable(SCORES, 1.0))
        other.set_iqpr(25.0)
        assert same(other, table)
    shared.update(*rescored())
    shared.set_inverse_temperature(1.0)
    assert same(table, shared)
    assert not same(apart[0], table)
    assert (table.changed, shared.changed, apart[0].changed) == (True, True, False)


def test_made_in_inference_mode() -> None:
    with torch.inference_mode():
        table = kept()
    table.update(*rescored())
    table.set_iqpr(2.0)
    expected = kept()
    expected.update(*rescored())
    expected.set_iqpr(2.0)
    assert same(table, expected)


def test_states() -> None:
    """Of a table with another lambda, updated, or both, in one that was made anew."""
    updated, both = kept(), kept()
    for table in (updated, both):
        table.sample(7)
        table.update(*rescored())
    both.set_iqpr(2.0)
    moved = kept()
    moved.set_inverse_temperature(0.3)
    plain = AliasTable(SCORES, iqpr=5.0, seed=9)
    plain.update(*rescored())
    for table, entries in ((moved, set()), (updated, {"table", "scores"}), (both, {"scores"}), (plain, {"table"})):
        file = io.BytesIO()
        torch.save(table.state_dict(weights=True), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        assert set(state) & {"table", "scores"} == entries
        restored = AliasTable(SCORES, iqpr=5.0, seed=1, keep_scores=table.keeps_scores)
        version = restored.version
        restored.load_state_dict(state)
        assert same(restored, table)
        assert restored.version > version
        assert torch.equal(restored.sample(50), table.sample(50))
        assert set(restored.state_dict(weights=True)) == set(state)
        for each in (table, restored):
            each.update(*rescored(1))
            if each.keeps_scores:
                each.set_iqpr(3.0)
        assert same(restored, table)
    assert "table" not in updated.state_dict()
    alone = kept(seed=4)
    alone.load_state_dict(both.state_dict(weights=True), stream=False)
    assert alone.state_dict()["seed"] == 4


def test_states_of_others_change_nothing() -> None:
    state = kept(SCORES + 1e-3 * SCORES.sin()).state_dict()
    other = kept(iqpr=7.0).state_dict()
    updated = kept()
    updated.update(*rescored())
    full = updated.state_dict(weights=True)
    table, plain = kept(), AliasTable(SCORES, iqpr=5.0, seed=9)
    before = table.state_dict(weights=True)
    for bad, message in (
        (state, "rebuild the table from the scores it was saved with"),
        ({**other, "total_weight": 3}, r"state\['total_weight'\] is 3, but this table has"),
        ({**other, "items": 3}, r"state\['items'\] is 3, but this table has 9000"),
        ({**other, "inverse_temperature": "1"}, r"inverse_temperature'\] is str, must be a number"),
        ({**full, "scores": SCORES[1:]}, r"state's scores has shape \(8999,\), must be \(9000,\)"),
        ({**full, "scores": SCORES.double()}, "state's scores has dtype torch.float64, must be torch.float32"),
        ({**full, "table": {}}, "state has no bins, block_weight, scale, top; it is not that of an AliasTable"),
        ({**full, "table": {**full["table"], "top": SCORES}}, "state's top has dtype torch.float32"),
        ({**full, "epoch": -1}, r"state\['epoch'\] is -1, must be at least 0"),
    ):
        refuses(message, lambda bad=bad: table.load_state_dict(bad), also=RuntimeError)
        assert table.state_dict(weights=True) == before
    refuses("state has scores, but this table was built without keep_scores=True", lambda: plain.load_state_dict(full))
    refuses(r"state\['total_weight'\] is .*, but this table has", lambda: plain.load_state_dict(other))


def test_what_is_refused() -> None:
    plain, table = AliasTable(SCORES), kept()
    message = r"keep_scores is False, must be True for another lambda: AliasTable\(scores, keep_scores=True\)"
    refuses(message, lambda: plain.set_iqpr(5.0))
    refuses(message, lambda: plain.set_inverse_temperature(5.0))
    refuses("keep_scores is str, must be True or False", lambda: AliasTable(SCORES, keep_scores="yes"))  # type: ignore[arg-type]
    before = kept()
    refuses("iqpr is 0.5", lambda: table.set_iqpr(0.5), also=RuntimeError)
    refuses("iqpr is str, must be a number", lambda: table.set_iqpr("5"))  # type: ignore[arg-type]
    refuses("inverse_temperature is -1", lambda: table.set_inverse_temperature(-1.0), also=RuntimeError)
    refuses(
        r"indices\[0\] is 9000, must be in",
        lambda: table.update(torch.tensor([ITEMS]), torch.zeros(1)),
        also=RuntimeError,
    )
    refuses("scores", lambda: table.update(torch.tensor([0]), torch.tensor([math.nan])), also=RuntimeError)
    assert same(table, before)
    table.set_iqpr(5.0)  # of scores that are as they were
    assert same(table, before)
    refuses("iqpr_schedule is float, must be a function", lambda: CollectionSampler(table, 5, iqpr_schedule=3.0))  # type: ignore[arg-type]
    refuses(
        "table was built with keep_scores=False, must be",
        lambda: CollectionBatchSampler(plain, 5, 5, iqpr_schedule=lambda epoch: 5.0),
    )


def by_epoch(epoch: int) -> float:
    return (1.0, 5.0, 25.0)[epoch % 3]


def test_a_sampler_follows_its_schedule() -> None:
    table = kept()
    one_by_one = CollectionSampler(table, 640, iqpr_schedule=by_epoch)
    for sampler in (one_by_one, CollectionBatchSampler(table, 64, 10, iqpr_schedule=by_epoch)):
        flat = [torch.tensor(list(sampler)).flatten() for _ in range(4)]
        for epoch, drawn in enumerate(flat):
            fresh = AliasTable(SCORES, iqpr=by_epoch(epoch))
            seed = sampler.state_dict()["seed"]
            assert torch.equal(drawn, fresh.sample_at(seed, 640 * epoch, 640))
        sampler.set_epoch(1)
        next(iter(sampler))
        assert same(table, AliasTable(SCORES, iqpr=5.0))
        assert "table" not in sampler.state_dict()
    data = TensorDataset(torch.arange(ITEMS))
    loader = DataLoader(data, batch_sampler=CollectionBatchSampler(table, 64, 10, seed=2, iqpr_schedule=by_epoch))
    for epoch in range(2):
        fresh = AliasTable(SCORES, iqpr=by_epoch(epoch))
        assert torch.equal(torch.cat([x for (x,) in loader]), fresh.sample_at(2, 640 * epoch, 640))


def run(sampler: CollectionBatchSampler, done: int, stop: int) -> list[Tensor]:
    """Batches up to number ``stop`` of a training, counted over the epochs, with an update after each."""
    got: list[Tensor] = []
    while done < stop:
        for batch in sampler.tensors():
            got.append(batch)
            sampler.update(*rescored(done, 60))
            done += 1
            if done == stop:
                break
    return got


@pytest.mark.parametrize("scheduled", [False, True])
def test_killed_and_resumed(scheduled: bool) -> None:
    """In the first and other epochs, at their ends; ranks agree."""

    def sampler(rank: int = 0) -> CollectionBatchSampler:
        schedule = by_epoch if scheduled else None
        return CollectionBatchSampler(kept(), 16, 6, rank=rank, world_size=2, iqpr_schedule=schedule)

    whole, other = sampler(), sampler(1)
    every, others = run(whole, 0, 18), run(other, 0, 18)
    assert same(whole.table, other.table)
    assert not any(torch.equal(a, b) for a, b in zip(every, others, strict=True))
    for stop in (1, 6, 8, 12, 17):
        killed = sampler()
        run(killed, 0, stop)
        state = copy.deepcopy(killed.state_dict())
        resumed = sampler()
        resumed.load_state_dict(state)
        rest = run(resumed, stop, 18)
        assert all(torch.equal(a, b) for a, b in zip(rest, every[stop:], strict=True))
        assert same(resumed.table, whole.table)
