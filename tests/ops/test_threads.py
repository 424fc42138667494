"""Tables, samplers and generators that threads share: no draw comes twice, none is left out, none meets an update half done."""

from __future__ import annotations

import copy
import io
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fastkd
import fastkd.models
from fastkd import AliasTable, CollectionBatchSampler, CollectionSampler
from fastkd._seeding import seeded
from fastkd.data import LoaderBatches
from fastkd.methods.response import _draw

THREADS, CALLS, DRAWS = 4, 50, 2000


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def make_table(items: int = 5000) -> AliasTable:
    return AliasTable(torch.linspace(0, 2, items), 1.0, seed=9)


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """What the works return, all begun at once; an error of one is an error of the test."""
    barrier = threading.Barrier(len(works))
    results: list[Any] = [None] * len(works)
    errors: list[BaseException] = []

    def run(place: int) -> None:
        try:
            barrier.wait()
            results[place] = works[place]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def repeated(call: Callable[[], Tensor]) -> list[tuple[int, ...]]:
    """What ``CALLS`` calls in each of four threads return, in any order."""
    results = in_threads(*[lambda: [tuple(call().flatten().tolist()) for _ in range(CALLS)]] * THREADS)
    return sorted(draw for draws in results for draw in draws)


IMAGES = torch.zeros(5000, 1, 1, 1, dtype=torch.uint8)
OF_A_STREAM: dict[str, Callable[[AliasTable], Tensor]] = {
    "sample": lambda table: table.sample(DRAWS),
    "draw_batch": lambda table: fastkd.draw_batch(table, IMAGES, DRAWS, padding=0)[1],
}


@pytest.mark.parametrize("draw", OF_A_STREAM.values(), ids=OF_A_STREAM)
def test_the_stream_of_a_table(draw: Callable[[AliasTable], Tensor]) -> None:
    table = make_table()
    drawn = repeated(lambda: draw(table))
    whole = table.sample_at(9, 0, THREADS * CALLS * DRAWS)
    assert drawn == sorted(tuple(part.tolist()) for part in whole.split(DRAWS))
    assert table.state_dict()["next_index"] == len(whole)


TABLE = make_table()
OF_A_GENERATOR: dict[str, Callable[[torch.Generator | None], Tensor]] = {
    "sample": lambda generator: TABLE.sample(40, generator),
    "random_patches": lambda generator: fastkd.random_patches(torch.zeros(8, 1, 40, 40), 3, 4, generator)[1],
    "random_crop_flip": lambda generator: fastkd.random_crop_flip(
        torch.arange(1600.0).reshape(1, 1, 40, 40).expand(8, 1, 40, 40), 0, 1, generator=generator
    ),
}


@pytest.mark.parametrize("default", [False, True], ids=["of its own", "torch's"])
@pytest.mark.parametrize("draw", OF_A_GENERATOR.values(), ids=OF_A_GENERATOR)
def test_a_generator(draw: Callable[[torch.Generator | None], Tensor], default: bool) -> None:
    generator = torch.default_generator if default else torch.Generator()
    with torch.random.fork_rng(devices=[]):
        generator.manual_seed(3)
        drawn = repeated(lambda: draw(generator))
        generator.manual_seed(3)
        expected = sorted(tuple(draw(generator).flatten().tolist()) for _ in range(THREADS * CALLS))
    assert drawn == expected
    assert len(set(drawn)) == len(drawn)


def test_draw_batch_with_a_generator() -> None:
    """It takes two seeds, one after the other, which two calls can take in turns: but none takes one of another."""
    table, generator = make_table(), torch.Generator().manual_seed(3)
    drawn = repeated(lambda: fastkd.draw_batch(table, IMAGES, 40, padding=0, generator=generator)[1])
    assert len(set(drawn)) == THREADS * CALLS


# ---- samplers -----------------------------------------------------------------------------------------

SAMPLERS: dict[str, Callable[[AliasTable], Any]] = {
    "items": lambda table: CollectionSampler(table, 3000),
    "batches": lambda table: CollectionBatchSampler(table, 50, 60),
}


def flat(handed_out: list[Any]) -> list[int]:
    return [index for part in handed_out for index in (part if isinstance(part, list) else [part])]


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_an_epoch_for_each_thread(make: Callable[[AliasTable], Any]) -> None:
    table = make_table()
    sampler = make(table)
    epochs = in_threads(*[lambda: flat(list(sampler))] * THREADS)
    expected = table.sample_at(9, 0, 3000 * THREADS).split(3000)
    assert sorted(epochs) == sorted(part.tolist() for part in expected)
    assert flat(list(sampler)) == table.sample_at(9, 3000 * THREADS, 3000).tolist()


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_one_iteration_for_all_threads(make: Callable[[AliasTable], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.collection_samplers._CHUNK", 7)  # many ends of chunks
    table = make_table()
    iterator = iter(make(table))
    shares = in_threads(*[lambda: flat(list(iterator))] * THREADS)
    assert sorted(index for share in shares for index in share) == sorted(table.sample_at(9, 0, 3000).tolist())


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_iterations_that_overlap(make: Callable[[AliasTable], Any]) -> None:
    table = make_table()
    sampler = make(table)
    first, second = iter(sampler), iter(sampler)
    begun = [next(first)], [next(second)]
    state = sampler.state_dict()
    assert (state["epoch"], state["draws_done"]) == (1, len(flat(begun[1])))  # of the one that began last
    drawn = flat(begun[0] + list(first)), flat(begun[1] + list(second))
    assert drawn == tuple(part.tolist() for part in table.sample_at(9, 0, 6000).split(3000))
    resumed = make(table)
    resumed.load_state_dict(state)
    assert flat(list(resumed)) == drawn[1][state["draws_done"] :]


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_states_while_another_thread_draws(make: Callable[[AliasTable], Any]) -> None:
    table = make_table()
    sampler = make(table)
    states: list[dict[str, int]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            states.append(sampler.state_dict())

    def draw() -> None:
        for _ in range(20):
            list(sampler)
        done.set()

    in_threads(watch, draw)
    places = [(state["epoch"], state["draws_done"]) for state in states]
    assert places == sorted(places)
    assert all(0 <= position <= 3000 for _, position in places)


def test_states_of_a_table_while_threads_draw() -> None:
    table = make_table()
    states: list[dict[str, Any]] = []

    def watch() -> None:
        states.extend(table.state_dict() for _ in range(CALLS))

    def go_back() -> None:
        for _ in range(CALLS):
            table.load_state_dict(states[0] if states else table.state_dict())

    def draw() -> list[tuple[int, ...]]:
        return [tuple(table.sample(100).tolist()) for _ in range(CALLS)]

    *_, a, b = in_threads(watch, go_back, draw, draw)
    possible = {tuple(part.tolist()) for part in table.sample_at(9, 0, 100 * 2 * CALLS).split(100)}
    assert {*a, *b} <= possible  # all begin where a draw may begin
    assert {state["seed"] for state in states} == {9}
    assert all(state["next_index"] % 100 == 0 for state in states)


# ---- updates ------------------------------------------------------------------------------------------

ITEMS = 3 * 4096
HALVES = torch.stack([torch.where(torch.arange(ITEMS) < ITEMS // 2, *pair) for pair in ((0.0, -30.0), (-30.0, 0.0))])
READS: dict[str, Callable[[AliasTable], Tensor]] = {
    "sample": lambda table: table.sample(300),
    "sample_at": lambda table: table.sample_at(1, 0, 300),
    "draw_batch": lambda table: fastkd.draw_batch(table, torch.zeros(ITEMS, 1, 1, 1, dtype=torch.uint8), 300)[1],
    "sampler": lambda table: torch.tensor(list(CollectionSampler(table, 300, seed=1))),
    "weights": lambda table: table.weights().topk(ITEMS // 2).indices,
    "to": lambda table: table.to("cpu").sample(300),
    "deepcopy": lambda table: copy.deepcopy(table).sample(300),
    "pickle": lambda table: pickle.loads(pickle.dumps(table)).sample(300),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.filterwarnings("ignore:fastkd. after this update")
def test_none_meets_an_update_half_done(read: Callable[[AliasTable], Tensor]) -> None:
    table = AliasTable(HALVES[0], 1.0, seed=9)
    every = torch.arange(ITEMS)
    done = threading.Event()

    def change() -> None:
        for turn in range(60):
            table.update(every, HALVES[(turn + 1) % 2])
        done.set()

    def look() -> None:
        while not done.is_set():
            lower = read(table) < ITEMS // 2
            assert lower.all() or not lower.any()

    in_threads(change, look, look)


# ---- what holds a lock goes through copies, pickles and processes ---------------------------------------


def saved(table: AliasTable) -> AliasTable:
    file = io.BytesIO()
    torch.save(table, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda it: pickle.loads(pickle.dumps(it)),
    "torch.save": saved,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_go_on_by_themselves(copied: Callable[[Any], Any]) -> None:
    table = make_table()
    table.sample(7)
    other = copied(table)
    assert torch.equal(other.sample(20), table.sample(20))
    other.update(torch.arange(4999), torch.full((4999,), -torch.inf))
    assert (other.sample(20) == 4999).all()
    assert not (table.sample(20) == 4999).all()
    for make in SAMPLERS.values():
        sampler = make(make_table())
        iterator = iter(sampler)
        for _ in range(5):
            next(iterator)
        again = copied(sampler)
        assert again.state_dict() == sampler.state_dict()
        assert flat(list(again))[0] == table.sample_at(9, 3000, 1).item()  # this epoch was left; the next one begins
        assert repeated(lambda again=again: again.table.sample(20))[0]


ITERATIONS: dict[str, Callable[[AliasTable], tuple[Any, Any]]] = {
    "items": lambda table: (sampler := CollectionSampler(table, 30), iter(sampler)),
    "batches": lambda table: (sampler := CollectionBatchSampler(table, 2, 15), iter(sampler)),
    "tensors": lambda table: (sampler := CollectionBatchSampler(table, 2, 15), sampler.tensors()),
}


def state_after(sampler: Any, iterator: Any, steps: int) -> dict[str, int]:
    for _ in range(steps):
        next(iterator)
    return sampler.state_dict()  # type: ignore[no-any-return]


@pytest.mark.parametrize("iterator_first", [False, True])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("make", ITERATIONS.values(), ids=ITERATIONS)
def test_a_sampler_copied_with_its_iterator(make: Any, copied: Callable[[Any], Any], iterator_first: bool) -> None:
    sampler, iterator = make(make_table())
    before = state_after(sampler, iterator, 3)
    if iterator_first:
        iterator_, sampler_ = copied((iterator, sampler))
    else:
        sampler_, iterator_ = copied((sampler, iterator))
    assert sampler_.state_dict() == before
    after = state_after(sampler_, iterator_, 4)
    assert sampler.state_dict() == before  # the original has not moved
    assert after == state_after(sampler, iterator, 4) != before
    again = make(make_table())[0]
    again.load_state_dict(after)
    assert list(again) == [each.tolist() if isinstance(each, Tensor) else each for each in iterator_]
    left = copied((sampler_, iterator_))  # at its end
    assert left[0].state_dict() == sampler_.state_dict() == {**before, "draws_done": 30}


@pytest.mark.parametrize("copied", [copy.copy, *COPIES.values()], ids=["copy", *COPIES])
@pytest.mark.parametrize("make", ITERATIONS.values(), ids=ITERATIONS)
def test_a_copied_iterator_does_not_count(make: Any, copied: Callable[[Any], Any]) -> None:
    table = make_table()
    sampler, iterator = make(table)
    before = state_after(sampler, iterator, 3)
    other = copied(iterator)
    assert state_after(sampler, other, 2) == before
    assert torch.as_tensor(next(iterator)).flatten()[0] == table.sample_at(9, before["draws_done"], 1)


class Drawing(Dataset[Tensor]):
    """Draws from its table wherever it is asked."""

    def __init__(self, table: AliasTable) -> None:
        self.table = table

    def __getitem__(self, index: int) -> Tensor:
        return self.table.sample(3)

    def __len__(self) -> int:
        return 4


@pytest.mark.forks
@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_workers_of_a_loader(how: str) -> None:
    table = make_table()
    table.sample(1)  # it has its lock
    loader = DataLoader(Drawing(table), None, num_workers=1, multiprocessing_context=how)
    assert torch.equal(torch.cat(list(loader)), table.sample_at(9, 1, 12))


@pytest.mark.forks
@pytest.mark.usefixtures("one_thread")  # a child has none of its parent's pool
def test_a_fork_while_threads_draw_and_update() -> None:
    table = AliasTable(HALVES[0], 1.0, seed=9)
    done = threading.Event()

    def change() -> None:
        turn = 0
        while not done.is_set():
            turn += 1
            table.update(torch.arange(ITEMS), HALVES[turn % 2])

    def draw() -> None:
        while not done.is_set():
            table.sample(9)

    threads = [threading.Thread(target=work) for work in (change, draw)]
    for thread in threads:
        thread.start()
    codes = []
    for _ in range(20):
        child = os.fork()
        if child == 0:
            lower = table.sample(300) < ITEMS // 2
            os._exit(0 if lower.all() or not lower.any() else 1)
        deadline = time.monotonic() + 60
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.001)
        if ended[0] == 0:
            os.kill(child, 9)
            os.waitpid(child, 0)
        codes.append(ended[1] if ended[0] else "hangs")
    done.set()
    for thread in threads:
        thread.join()
    assert codes == [0] * 20


def test_networks_of_a_seed() -> None:
    """Their weights come from the generator of the process, which one thread at a time may set."""
    before = torch.get_rng_state()
    expected = [p.detach() for p in fastkd.models.create("resnet8", seed=0).parameters()]

    def make() -> list[bool]:
        made = (fastkd.models.create("resnet8", seed=0).parameters() for _ in range(8))
        return [all(torch.equal(a, b) for a, b in zip(network, expected, strict=True)) for network in made]

    assert all(all(same) for same in in_threads(*[make] * THREADS))
    assert torch.equal(torch.get_rng_state(), before)


DEFAULT_DRAWS: dict[str, Callable[[], Tensor]] = {
    "AliasTable": lambda: AliasTable(torch.zeros(5000)).sample(9),
    "sample": lambda: TABLE.sample(9, torch.default_generator),
    "random_patches": lambda: fastkd.random_patches(torch.zeros(8, 1, 40, 40), 3, 4)[1],
    "draw_batch": lambda: fastkd.draw_batch(TABLE, torch.arange(5000 * 64).to(torch.uint8).view(5000, 1, 8, 8), 9)[0],
    "bss": lambda: _draw(torch.ones(40, 40)),
}


@pytest.mark.parametrize("draw", DEFAULT_DRAWS.values(), ids=DEFAULT_DRAWS)
def test_default_draws_while_networks_are_made(draw: Callable[[], Tensor]) -> None:
    """Theirs begin at a seed, and what the generator was at is put back."""
    done = threading.Event()

    def draws() -> list[tuple[Any, ...]]:
        try:
            return [tuple(draw().flatten().tolist()) for _ in range(4 * CALLS)]
        finally:
            done.set()

    def make() -> None:
        while not done.is_set():
            fastkd.models.create("resnet8", seed=0)

    before = TABLE.state_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        drawn, _ = in_threads(draws, make)
        torch.manual_seed(3)
        TABLE.load_state_dict(before)
        assert drawn == [tuple(draw().flatten().tolist()) for _ in drawn]


@pytest.mark.forks
def test_a_child_of_a_seeded_block_has_threads_that_draw() -> None:
    with seeded(3):
        child = os.fork()
        if child == 0:
            thread = threading.Thread(target=AliasTable, args=(torch.zeros(3),), daemon=True)
            thread.start()
            thread.join(30)
            os._exit(thread.is_alive())
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.forks
def test_loaders_leave_the_default_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their workers' seeds are their own, so nothing of the process is set, or held, while they are forked."""
    states: list[Tensor] = []
    real = DataLoader.__iter__

    def watched(loader: DataLoader[Any]) -> Any:
        made = real(loader)
        states.append(torch.get_rng_state())
        return made

    monkeypatch.setattr(DataLoader, "__iter__", watched)
    loader = DataLoader(Drawing(make_table()), 2, num_workers=1)
    with torch.random.fork_rng(devices=[]):
        states.append(torch.get_rng_state())
        LoaderBatches(loader).epoch(0)
    assert torch.equal(*states)
    assert loader.generator is None
