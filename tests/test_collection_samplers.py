"""The samplers: torch.utils.data protocol, ranks, epochs, resume."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, get_worker_info

import fastkd
from fastkd import AliasTable, CollectionBatchSampler, CollectionSampler

WORKERS = [0, pytest.param(2, marks=pytest.mark.forks)]


@pytest.fixture
def table(generator: torch.Generator) -> AliasTable:
    """A table over 5,000 items."""
    return AliasTable(torch.randn(5000, generator=generator), iqpr=5.0, seed=9)


def test_epochs_are_consecutive_draws(table: AliasTable) -> None:
    sampler = CollectionSampler(table, 1000)
    draws = [*sampler, *sampler]
    assert len(sampler) == 1000
    assert draws == table.sample_at(9, 0, 2000).tolist()
    sampler.set_epoch(1)
    assert list(sampler) == draws[1000:]


def test_chunks_do_not_show(table: AliasTable) -> None:
    n = (1 << 16) * 2 + 3
    assert list(CollectionSampler(table, n)) == table.sample_at(9, 0, n).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_union_of_ranks_does_not_depend_on_their_number(table: AliasTable, world_size: int) -> None:
    ranks = [list(CollectionSampler(table, 1200, rank=r, world_size=world_size)) for r in range(world_size)]
    merged = [index for row in zip(*ranks, strict=True) for index in row]
    assert merged == table.sample_at(9, 0, 1200).tolist()


def test_every_rank_draws_the_same_number(table: AliasTable) -> None:
    assert {len(list(CollectionSampler(table, 1000, rank=r, world_size=3))) for r in range(3)} == {334}


@pytest.mark.parametrize("stop", [0, 1, 499, 999])
def test_resume_in_the_middle_of_an_epoch(table: AliasTable, stop: int) -> None:
    sampler = CollectionSampler(table, 1000)
    list(sampler)  # epoch 0
    iterator = iter(sampler)
    for _ in range(stop):
        next(iterator)
    resumed = CollectionSampler(table, 1000)
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == list(iterator)
    assert list(resumed) == table.sample_at(9, 2000, 1000).tolist()


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("batched", [False, True])
def test_a_loop_that_stops_after_the_last_batch_ends_the_epoch(table: AliasTable, batched: bool, workers: int) -> None:
    data = TensorDataset(torch.arange(5000))
    loader = (
        DataLoader(data, batch_sampler=CollectionBatchSampler(table, 64, 10), num_workers=workers)
        if batched
        else DataLoader(data, sampler=CollectionSampler(table, 640), batch_size=64, num_workers=workers)
    )
    seen = [x for _ in range(3) for _, (x,) in zip(range(len(loader)), loader, strict=False)]
    assert torch.equal(torch.cat(seen), table.sample_at(9, 0, 1920))


@pytest.mark.parametrize("workers", WORKERS)
def test_an_epoch_left_early_is_over(table: AliasTable, workers: int) -> None:
    data = TensorDataset(torch.arange(5000))
    loader = DataLoader(data, batch_sampler=CollectionBatchSampler(table, 64, 10), num_workers=workers)
    for _, _ in zip(range(3), loader, strict=False):
        pass
    assert torch.equal(torch.cat([x for (x,) in loader]), table.sample_at(9, 640, 640))
    loader.batch_sampler.set_epoch(0)
    assert torch.equal(torch.cat([x for (x,) in loader]), table.sample_at(9, 0, 640))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("done", [0, 7, 10])
def test_resume_what_the_loop_has_done_whatever_was_prefetched(table: AliasTable, done: int, workers: int) -> None:
    data = TensorDataset(torch.arange(5000))
    sampler = CollectionBatchSampler(table, 64, 10)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
    for _ in loader:  # epoch 0
        pass
    iterator = iter(loader)
    for _ in range(done):
        next(iterator)
    if workers == 0 and done == 0:
        sampler.set_epoch(1)  # nothing was asked for yet, so nothing is under way
    state = sampler.state_dict(done=done)
    resumed = CollectionBatchSampler(table, 64, 10)
    resumed.load_state_dict(state)
    if done < 10:
        resumed.set_epoch(state["epoch"])  # as a training loop does, which does not rewind it
    rest = table.sample_at(9, 640 + 64 * done, 640 - 64 * done if done < 10 else 640)
    assert torch.equal(torch.cat(list(resumed.tensors())), rest)


def test_resume_on_another_number_of_ranks(table: AliasTable) -> None:
    ranks = [CollectionSampler(table, 1200, rank=r, world_size=2) for r in range(2)]
    for rank in ranks:
        iterator = iter(rank)
        for _ in range(150):
            next(iterator)
    resumed = [CollectionSampler(table, 1200, rank=r, world_size=3) for r in range(3)]
    for rank in resumed:
        rank.load_state_dict(ranks[0].state_dict())
    merged = [index for row in zip(*resumed, strict=True) for index in row]
    assert merged == table.sample_at(9, 300, 900).tolist()


def test_states_that_do_not_fit(table: AliasTable) -> None:
    sampler = CollectionBatchSampler(table, 64, 10)
    for given in (None, [], 3, "seed"):
        for holder in (sampler, sampler.sampler, iter(sampler), table):
            with pytest.raises(
                TypeError, match=f"fastkd: state is {type(given).__name__}, must be a dict, the state_dict"
            ):
                holder.load_state_dict(given)
    with pytest.raises(ValueError, match=r"state has no draws_done, epoch, num_samples; it is not that of"):
        sampler.load_state_dict({"seed": 1})
    with pytest.raises(ValueError, match=r"state\['num_samples'\] is 300, but this sampler draws 640 an epoch"):
        sampler.load_state_dict(CollectionSampler(table, 300).state_dict())
    with pytest.raises(ValueError, match=r"done is 704 draws, must be from 0 to the epoch's 640"):
        sampler.state_dict(done=11)
    three = CollectionSampler(table, 640, rank=0, world_size=3)
    with pytest.raises(ValueError, match=r"which 3 ranks cannot share equally"):
        three.load_state_dict(sampler.state_dict(done=1))


def test_batches(table: AliasTable) -> None:
    sampler = CollectionBatchSampler(table, 64, 10, rank=1, world_size=2)
    batches = list(sampler.tensors())
    assert len(batches) == len(sampler) == 10
    assert all(b.dtype == torch.int64 and b.shape == (64,) for b in batches)
    assert torch.equal(torch.cat(batches), table.sample_at(9, 1, 640, 2))
    iterator = iter(sampler)
    next(iterator)
    resumed = CollectionBatchSampler(table, 64, 10, rank=1, world_size=2)
    resumed.load_state_dict(sampler.state_dict())
    rest = list(iterator)
    assert list(resumed) == rest
    assert [index for batch in rest for index in batch] == table.sample_at(9, 1281 + 128, 640 - 64, 2).tolist()


@pytest.mark.parametrize("workers", WORKERS)
def test_data_loader(table: AliasTable, workers: int) -> None:
    data = TensorDataset(torch.arange(5000))
    expected = table.sample_at(9, 0, 640)
    by_item = DataLoader(data, sampler=CollectionSampler(table, 640), batch_size=64, num_workers=workers)
    assert torch.equal(torch.cat([x for (x,) in by_item]), expected)
    by_batch = DataLoader(data, batch_sampler=CollectionBatchSampler(table, 64, 10, seed=9), num_workers=workers)
    assert torch.equal(torch.cat([x for (x,) in by_batch]), expected)


class Keyed(Dataset[int]):
    """Items by Python's ints: neither a tensor nor a number of numpy is a key, as its hash or type is another."""

    def __init__(self, keep: bool) -> None:
        self.items: dict[int, int] = {} if keep else {i: i for i in range(5000)}
        self.keep = keep

    def __getitem__(self, index: int) -> int:
        assert type(index) is int
        return self.items.setdefault(index, index) if self.keep else self.items[index]

    def __len__(self) -> int:
        return 5000


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("keep", [False, True], ids=["filled", "kept"])
@pytest.mark.parametrize("by", ["items", "batches", "items of the batches"])
def test_a_dataset_that_is_keyed_by_index(table: AliasTable, by: str, keep: bool, workers: int) -> None:
    data, batch_sampler = Keyed(keep), CollectionBatchSampler(table, 64, 10, seed=9)
    options: dict[str, Any] = {
        "items": {"sampler": CollectionSampler(table, 640, seed=9), "batch_size": 64},
        "batches": {"batch_sampler": batch_sampler},
        "items of the batches": {"sampler": batch_sampler.sampler, "batch_size": 64},
    }[by]
    drawn = torch.cat(list(DataLoader(data, num_workers=workers, **options)))
    assert torch.equal(drawn, table.sample_at(9, 0, 640))
    if keep and workers == 0:
        assert len(data.items) == len(drawn.unique())


def test_tensors_and_lists_are_the_same_epochs(table: AliasTable) -> None:
    sampler = CollectionBatchSampler(table, 64, 10)
    first = list(sampler)
    assert all(type(batch) is list and {type(index) for index in batch} == {int} for batch in first)
    iterator = sampler.tensors()
    for _ in range(3):
        next(iterator)
    assert sampler.state_dict() == {"seed": 9, "epoch": 1, "draws_done": 192, "num_samples": 640}
    sampler.set_epoch(0)
    assert [batch.tolist() for batch in sampler.tensors()] == first


def test_updates_take_effect(table: AliasTable) -> None:
    sampler = CollectionBatchSampler(table, 256, 3)
    iterator = iter(sampler)
    next(iterator)
    table.update(torch.arange(4999), torch.full((4999,), -torch.inf))
    assert next(iterator) == [4999] * 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0, must be at least 1"),
        ({"num_samples": 5, "rank": 2, "world_size": 2}, "rank is 2, must be in \\[0, 2\\)"),
        ({"num_samples": 5, "rank": -1}, "rank is -1"),
        ({"num_samples": 2**63}, f"num_samples is {2**63}, must be less than {2**63}"),
    ],
)
def test_errors(table: AliasTable, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CollectionSampler(table, **arguments)


def test_draws_whose_numbers_are_too_large(table: AliasTable) -> None:
    last = 2**63 // 1000 - 1
    for sampler in (CollectionSampler(table, 1000, seed=9), CollectionBatchSampler(table, 10, 100, seed=9)):
        sampler.set_epoch(last)
        assert torch.as_tensor(next(iter(sampler))).flatten()[0] == table.sample_at(9, last * 1000, 1)
        state = sampler.state_dict()
        with pytest.raises(ValueError, match=f"epoch is {last + 1}, must be less than {last + 1}"):
            next(iter(sampler))
        for epoch in (last + 1, 2**60, 2**64):
            with pytest.raises(ValueError, match=rf"fastkd: epoch is {epoch}, must be less than {last + 1}"):
                sampler.set_epoch(epoch)
            for holder in (sampler, iter(sampler)):
                with pytest.raises(ValueError, match=rf"state\['epoch'\] is {epoch}, must be less than {last + 1}"):
                    holder.load_state_dict({**state, "epoch": epoch})
        assert sampler.state_dict() == state
    first = CollectionSampler(table, 2**63 - 1, seed=9)
    assert next(iter(first)) == table.sample_at(9, 0, 1)
    with pytest.raises(ValueError, match=f"num_samples is {2**64}, must be less than {2**63}"):
        CollectionBatchSampler(table, 2**32, 2**32)


def test_samplers_of_a_copied_table_draw_as_those_of_the_table(table: AliasTable) -> None:
    for made in (table.to("cpu"), copy.deepcopy(table)):
        assert list(CollectionSampler(made, 100)) == table.sample_at(9, 0, 100).tolist()
    assert list(CollectionSampler(table, 100)) == table.sample_at(9, 0, 100).tolist()


def test_batch_errors(table: AliasTable) -> None:
    with pytest.raises(ValueError, match="batch_size is 0, must be at least 1"):
        CollectionBatchSampler(table, 0, 3)
    with pytest.raises(ValueError, match="num_batches is 0, must be at least 1"):
        CollectionBatchSampler(table, 4, 0)


class InWorkers(IterableDataset[int]):
    """The draws of a sampler that each worker makes for its part."""

    def __init__(self, table: AliasTable) -> None:
        self.table = table

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(CollectionSampler(self.table, 12, seed=0, rank=info.id, world_size=info.num_workers))


@pytest.mark.forks
def test_parts_of_workers(table: AliasTable) -> None:
    """As docs/samplers.md has it."""
    assert sorted(DataLoader(InWorkers(table), None, num_workers=2)) == sorted(table.sample_at(0, 0, 12).tolist())


class ByInt(Dataset[int]):
    """Items by Python's ints."""

    def __init__(self) -> None:
        self.items = {i: i for i in range(1000)}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> int:
        return self.items[i]


def test_a_dataset_that_is_keyed_by_ints() -> None:
    """As docs/samplers.md has it."""
    table = AliasTable(torch.zeros(1000), seed=3)
    draws = table.sample_at(3, 0, 10)
    assert torch.equal(torch.cat(list(DataLoader(ByInt(), sampler=table.sample(10).tolist()))), draws)
    batches = DataLoader(ByInt(), batch_sampler=CollectionBatchSampler(table, 5, 2, seed=3))
    assert torch.equal(torch.cat(list(batches)), draws)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_draws_of_a_checkpointed_function(use_reentrant: bool) -> None:
    """As docs/samplers.md has it: those of the default generator, and of given places of a stream, come again."""
    table, generator = AliasTable(torch.zeros(1000), seed=3), torch.Generator().manual_seed(3)
    images = torch.zeros(2, 1, 40, 40, requires_grad=True)
    seen: dict[str, list[Tensor]] = {"default": [], "sample_at": [], "generator": [], "sample": []}

    def run(x: Tensor) -> Tensor:
        seen["default"].append(fastkd.random_patches(x, 4)[1])
        seen["sample_at"].append(table.sample_at(3, 0, 9))
        seen["generator"].append(fastkd.random_patches(x, 4, generator=generator)[1])
        seen["sample"].append(table.sample(9))
        return x.sin()

    checkpoint(run, images, use_reentrant=use_reentrant).sum().backward()
    again = {name: torch.equal(*draws) for name, draws in seen.items()}
    assert again == {"default": True, "sample_at": True, "generator": False, "sample": False}
