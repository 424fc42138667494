"""Batches drawn from collections: the same bits wherever the images lie; counts, resumption, updates, schedules, sources."""

from __future__ import annotations

import math
import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from collection_cases import FORKS, ITEMS, KINDS, PIXELS, SHAPE, Images
from refusals import refuses
from torch import Tensor

from fastkd import AliasTable
from fastkd.data import ArrayCollection, Batch, Collection, ConcatCollection, DatasetCollection, DrawnBatches
from fastkd.data.collection import Gathered

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

SCORES = torch.linspace(0, 3, ITEMS)
EVERY = [pytest.param(kind, marks=pytest.mark.forks if kind in FORKS else []) for kind in KINDS]
ITERATION = {"batch_size": 8, "batches": 6, "seed": 4, "padding": 2, "mean": 0.5, "std": 0.25}


def drawn(images: Tensor | Collection, keep_scores: bool = True, **options: Any) -> DrawnBatches:
    table = AliasTable(SCORES, 1.0, seed=0, keep_scores=keep_scores)
    return DrawnBatches(images, table, **{**ITERATION, **options})


def same(ours: Batch, theirs: Batch) -> bool:
    assert ours.index is not None
    assert theirs.index is not None
    return torch.equal(ours.images, theirs.images) and torch.equal(ours.index, theirs.index)


def background() -> tuple[int, int]:
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("fastkd")]
    return len(threads), len(multiprocessing.active_children())


@pytest.mark.parametrize("kind", EVERY)
def test_the_same_bits_wherever_the_images_lie(kind: str, tmp_path: Path) -> None:
    collection = KINDS[kind](tmp_path)
    for options in (
        {},
        {"prefetch": 0, "dtype": torch.bfloat16, "rank": 1},
        {"prefetch": 5, "padding": 0, "flip": False},
    ):
        expected, ours = drawn(PIXELS, **options), drawn(collection, **options)  # type: ignore[arg-type]
        for epoch, start in ((0, 0), (3, 4)):
            state = torch.random.get_rng_state()
            pairs = list(zip(expected.epoch(epoch, start), ours.epoch(epoch, start), strict=True))
            assert torch.equal(torch.random.get_rng_state(), state)
            assert len(pairs) == 6 - start
            assert all(same(theirs, batch) for theirs, batch in pairs)
            assert torch.equal(ours.counts, expected.counts)
            assert background() == (0, 0)
        assert ours.table.state_dict() == expected.table.state_dict()


@pytest.mark.parametrize("kind", EVERY)
def test_what_is_read_ahead_does_not_count(kind: str, tmp_path: Path) -> None:
    source = drawn(KINDS[kind](tmp_path), prefetch=4)
    epoch = source.epoch(1)
    assert background() == (0, 0)  # nothing before it is asked for
    first = [next(epoch), next(epoch)]
    assert int(source.counts.sum()) == 16
    state = source.state_dict()
    del epoch
    assert background() == (0, 0)
    resumed = drawn(KINDS[kind](tmp_path))
    resumed.load_state_dict(state)
    rest = list(resumed.epoch(1, start=2))
    whole = drawn(PIXELS)
    assert all(same(a, b) for a, b in zip(whole.epoch(1), first + rest, strict=True))
    assert torch.equal(resumed.counts, whole.counts)


class Failing(Collection):
    """The fourth batch cannot be read."""

    shape, device, sources = SHAPE, torch.device("cpu"), ()

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return ITEMS

    def _load(self, index: Tensor) -> Gathered:
        self.reads += 1
        if self.reads == 4:
            raise OSError("the disk is gone")
        return Gathered(PIXELS[index])

    def fingerprint(self) -> str:
        return ""


def test_errors_come_where_the_batch_is_asked_for() -> None:
    epoch = drawn(Failing(), prefetch=3).epoch(0)
    for _ in range(3):
        next(epoch)
    with pytest.raises(OSError, match="the disk is gone"):
        next(epoch)
    assert background() == (0, 0)


class Broken(Images):
    def __getitem__(self, i: int) -> Any:
        if i == 50:
            raise OSError("half a file")
        return super().__getitem__(i)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.forks)])
def test_what_cannot_be_read_is_not_to_be_drawn(workers: int) -> None:
    collection = DatasetCollection(Broken(PIXELS), workers=workers, unreadable="skip")
    message = r"image 50 of the collection, dataset\[50\], cannot be read: half a file"
    for images in (collection, collection.to("cpu")):
        with pytest.raises(ValueError, match=message):
            list(drawn(images, batches=40).epoch(0))
        assert background() == (0, 0)
        without = drawn(images, batches=40)
        without.update(torch.tensor([50]), torch.tensor([-math.inf]))
        expected = drawn(PIXELS, batches=40)
        expected.update(torch.tensor([50]), torch.tensor([-math.inf]))
        assert all(same(a, b) for a, b in zip(without.epoch(0), expected.epoch(0), strict=True))
        assert without.counts[50] == 0


Change = Callable[[DrawnBatches, int], None]


def rescore(source: DrawnBatches, step: int) -> None:
    """As a training might, by what it has seen; it takes an item out, too."""
    index = (torch.arange(5) * 7 + step) % ITEMS
    scores = SCORES[index] + torch.sin(index + step)
    scores[2] = -math.inf
    source.update(index, scores)


@pytest.mark.parametrize("kind", EVERY)
def test_updates_count_from_the_next_batch_on(kind: str, tmp_path: Path) -> None:
    """Whatever was read ahead."""
    expected, ours = drawn(PIXELS, batches=12), drawn(KINDS[kind](tmp_path), batches=12, prefetch=3)
    steps = zip(expected.epoch(0), ours.epoch(0), strict=True)
    for step, (theirs, batch) in enumerate(steps):
        assert same(theirs, batch)
        if step % 3:
            for source in (expected, ours):
                rescore(source, step)
    assert torch.equal(expected.counts, ours.counts)
    assert torch.equal(expected.table.weights(), ours.table.weights())
    plain = drawn(PIXELS, batches=12)
    assert not torch.equal(torch.cat([b.index for b in plain.epoch(0)])[24:], torch.arange(1))  # type: ignore[misc]


def run(source: DrawnBatches, done: int, stop: int, updates: bool) -> list[Batch]:
    """Batches ``done`` to ``stop`` of a training, counted over its epochs, with an update after each."""
    got: list[Batch] = []
    while done < stop:
        epoch, start = divmod(done, len(source))
        for batch in source.epoch(epoch, start=start):
            got.append(batch)
            if updates:
                rescore(source, done)
            done += 1
            if done == stop:
                return got
    return got


@pytest.mark.parametrize("where", ["tensor", "mapped"])
@pytest.mark.parametrize("updates", [False, True], ids=["plain", "updated"])
@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "scheduled"])
def test_killed_and_resumed(scheduled: bool, updates: bool, where: str, tmp_path: Path) -> None:
    """At any batch, in the first and in the middle of an epoch, and at its end; two ranks agree on the weights."""
    options: dict[str, Any] = {"iqpr_schedule": (lambda epoch: (1.0, 5.0, 25.0)[epoch])} if scheduled else {}

    def source(rank: int = 0) -> DrawnBatches:
        return drawn(KINDS[where](tmp_path), keep_scores=scheduled, rank=rank, **options)

    whole = source()
    every = run(whole, 0, 18, updates)
    other = source(1)
    assert not any(same(a, b) for a, b in zip(every, run(other, 0, 18, updates), strict=True))
    assert torch.equal(whole.table.weights(), other.table.weights())
    assert float(whole.table.inverse_temperature) == float(other.table.inverse_temperature)
    for stop in (1, 6, 9, 12, 17):
        killed = source()
        run(killed, 0, stop, updates)
        torch.save(killed.state_dict(), tmp_path / "state.pt")
        resumed = source()
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert ("table" in state["table"]) == updates
        assert ("scores" in state["table"]) == (updates and scheduled)
        resumed.load_state_dict(state)
        assert all(same(a, b) for a, b in zip(run(resumed, stop, 18, updates), every[stop:], strict=True))
        assert torch.equal(resumed.counts, whole.counts)
        assert torch.equal(resumed.table.weights(), whole.table.weights())
        assert resumed.table.state_dict() == whole.table.state_dict()


def test_a_schedule_is_that_of_new_tables() -> None:
    source = drawn(PIXELS, iqpr_schedule=lambda epoch: 1.0 + epoch)
    for epoch in (0, 2, 1):
        epochs = source.epoch(epoch)
        before = float(source.table.inverse_temperature)
        next(epochs)
        fresh = AliasTable(SCORES, iqpr=1.0 + epoch, seed=0)
        assert torch.equal(source.table.weights(), fresh.weights())
        assert float(source.table.inverse_temperature) == float(fresh.inverse_temperature) != before


def test_by_source(tmp_path: Path) -> None:
    source = drawn(KINDS["concatenated"](tmp_path))
    made = source.statistics_by_source()
    assert math.isnan(made["first"].share)
    assert made["first"].skip_ratio == 1.0
    for epoch in range(5):
        list(source.epoch(epoch))
    parts = source.counts_by_source()
    assert torch.equal(torch.cat(list(parts.values())), source.counts)
    made = source.statistics_by_source()
    assert list(made) == ["first", "second"]
    assert [one.items for one in made.values()] == [25, 35]
    assert sum(one.draws for one in made.values()) == 240
    assert math.isclose(sum(one.share for one in made.values()), 1.0)
    second = made["second"]
    assert second.draws == int(source.counts[25:].sum())
    assert second.distinct == int((source.counts[25:] > 0).sum())
    assert math.isclose(second.skip_ratio, 1 - second.distinct / 35)
    assert drawn(PIXELS).sources == (("images", 0, ITEMS),)


def test_what_is_refused() -> None:
    plain = AliasTable(SCORES, 1.0, seed=0)
    refuses(
        "images has 59 items, must have one for each of the table's 60",
        lambda: drawn(ArrayCollection(PIXELS[1:])),
    )
    refuses("prefetch is -1", lambda: drawn(PIXELS, prefetch=-1))
    refuses("iqpr_schedule is float, must be a function", lambda: drawn(PIXELS, iqpr_schedule=5.0))
    refuses(
        r"table was built with keep_scores=False, must be AliasTable\(scores, keep_scores=True\)",
        lambda: drawn(PIXELS, keep_scores=False, iqpr_schedule=lambda epoch: 5.0),
    )
    refuses("iqpr is str, must be a number", lambda: next(drawn(PIXELS, iqpr_schedule=lambda epoch: "5").epoch(0)))
    source = drawn(ConcatCollection(one=ArrayCollection(PIXELS)))
    refuses(r"start is 7, must be in \[0, 6\]", lambda: source.epoch(0, 7))
    refuses("state has no counts, table", lambda: source.load_state_dict({}))
    state = drawn(PIXELS).state_dict()
    state["table"]["scores"] = SCORES
    refuses(
        "state has scores, but this table was built without keep_scores=True",
        lambda: DrawnBatches(PIXELS, plain, **ITERATION).load_state_dict(state),  # type: ignore[arg-type]
    )
