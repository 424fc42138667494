"""Numbers, seeds, dtypes, default devices: what samplers, tables, batches and data take, and what they say of the rest."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd import AliasTable, CollectionBatchSampler, CollectionSampler, statistics
from fastkd._seeding import mixed_seed, seeded
from fastkd.data import LoaderBatches, digits, labels
from fastkd.data.image_batches import ImageBatches
from fastkd.data.images import ImageSet, channel_statistics
from fastkd.data.splits import stratified_split
from fastkd.data.weak_classifier import weak_classifier
from fastkd.models.convnet import ConvNet

SCORES = torch.linspace(0, 2, 50)
TARGET = torch.arange(60) % 3
IMAGES = torch.randint(256, (60, 1, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SET = ImageSet(IMAGES, TARGET, ("a", "b", "c"), (0.5,), (0.25,), padding=2)
TABLE = AliasTable(SCORES, seed=3)
PROBABILITIES = torch.full((len(TARGET), 3), 1 / 3, dtype=torch.float64)


def make_loader_batches(seed: Any) -> LoaderBatches:
    sampler = CollectionBatchSampler(AliasTable(SCORES, seed=2), 6, 3)
    return LoaderBatches(DataLoader(TensorDataset(IMAGES, TARGET), batch_sampler=sampler), seed=seed)


def global_draw(seed: Any) -> Tensor:
    with seeded(seed):
        return torch.rand(3)


# ---- seeds --------------------------------------------------------------------------------------------

SEEDED: dict[str, Callable[[Any], Any]] = {
    "AliasTable": lambda seed: AliasTable(SCORES, seed=seed).sample(20),
    "from_weights": lambda seed: AliasTable.from_weights(SCORES, seed=seed).sample(20),
    "sample_at": lambda seed: TABLE.sample_at(seed, 0, 20),
    "CollectionSampler": lambda seed: list(CollectionSampler(TABLE, 20, seed=seed)),
    "CollectionBatchSampler": lambda seed: list(CollectionBatchSampler(TABLE, 5, 4, seed=seed)),
    "ImageBatches": lambda seed: next(ImageBatches(SET, 7, seed=seed).epoch(0)).images,
    "LoaderBatches": lambda seed: make_loader_batches(seed),
    "seeded": global_draw,
    "ConvNet": lambda seed: next(ConvNet((4, 4), seed=seed).parameters()).detach(),
    "mixed_seed": lambda seed: mixed_seed("test", seed),
    "stratified_split": lambda seed: stratified_split(TARGET, 0.5, seed),
    "symmetric_noise": lambda seed: labels.symmetric_noise(TARGET, 0.5, 3, seed),
    "asymmetric_noise": lambda seed: labels.asymmetric_noise(TARGET, 0.5, 3, seed),
    "instance_noise": lambda seed: labels.instance_noise(TARGET, PROBABILITIES, 0.5, seed),
    "weak_classifier": lambda seed: weak_classifier(IMAGES, TARGET, 3, seed),
    "strong views": lambda seed: next(ImageBatches(SET, 7, seed=seed, strong_views=1).epoch(0)).images,
    "imbalanced": lambda seed: labels.imbalanced(TARGET, [5, 6, 7], seed),
}
INTS: dict[str, Callable[[int], Any]] = {
    "int64": np.int64,
    "int32": np.int32,
    "numpy 0-d": np.array,
    "tensor": torch.tensor,
    "int32 tensor": lambda value: torch.tensor(value, dtype=torch.int32),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, LoaderBatches):
        return a._seed == b._seed
    return bool(a == b)


@pytest.mark.parametrize("kind", INTS.values(), ids=INTS)
@pytest.mark.parametrize("call", SEEDED.values(), ids=SEEDED)
def test_any_int_is_a_seed(call: Callable[[Any], Any], kind: Callable[[int], Any]) -> None:
    for seed in (3, -2):
        assert same(call(kind(seed)), call(seed))


@pytest.mark.parametrize(
    "seed", [-1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**70 + 3, -(2**63), -(2**70), np.uint64(2**64 - 1)]
)
@pytest.mark.parametrize("call", SEEDED.values(), ids=SEEDED)
def test_seeds_of_any_size(call: Callable[[Any], Any], seed: Any) -> None:
    assert same(call(seed), call(int(seed)))
    assert not same(call(seed), call(12345))


@pytest.mark.parametrize(
    "seed", [1.0, 1.5, True, np.True_, "1", [1], torch.tensor(1.0), torch.tensor(True), torch.tensor([1])]
)
@pytest.mark.parametrize("call", SEEDED.values(), ids=SEEDED)
def test_what_is_no_seed(call: Callable[[Any], Any], seed: Any) -> None:
    with pytest.raises(TypeError, match=f"fastkd: seed is {type(seed).__name__}, must be an int"):
        call(seed)


def test_seeds_modulo_two_to_the_64() -> None:
    for name in ("AliasTable", "sample_at", "CollectionSampler", "seeded"):
        assert same(SEEDED[name](2**64 + 3), SEEDED[name](3))
        assert same(SEEDED[name](-1), SEEDED[name](2**64 - 1))


# ---- numbers ------------------------------------------------------------------------------------------

EPOCH = ImageBatches(SET, 7, seed=1)
COUNTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "sample": ("n", lambda n: AliasTable(SCORES, seed=3).sample(n)),
    "draw_batch": ("n", lambda n: fastkd.draw_batch(AliasTable(TARGET.float(), seed=3), IMAGES, n, padding=0)[1]),
    "sample_at n": ("n", lambda n: TABLE.sample_at(1, 0, n)),
    "sample_at start": ("start", lambda start: TABLE.sample_at(1, start, 5)),
    "sample_at stride": ("stride", lambda stride: TABLE.sample_at(1, 0, 5, stride)),
    "num_samples": ("num_samples", lambda n: list(CollectionSampler(TABLE, n, seed=1))),
    "batch_size": ("batch_size", lambda n: list(CollectionBatchSampler(TABLE, n, 4, seed=1))),
    "num_batches": ("num_batches", lambda n: list(CollectionBatchSampler(TABLE, 4, n, seed=1))),
    "rank": ("rank", lambda rank: list(CollectionSampler(TABLE, 9, seed=1, rank=rank, world_size=4))),
    "world_size": ("world_size", lambda n: list(CollectionBatchSampler(TABLE, 2, 2, seed=1, rank=0, world_size=n))),
    "set_epoch": ("epoch", lambda epoch: [s := CollectionSampler(TABLE, 9, seed=1), s.set_epoch(epoch), list(s)][2]),
    "done": ("done", lambda done: CollectionSampler(TABLE, 9, seed=1).state_dict(done)),
    "draw_counts": ("items", lambda items: statistics.draw_counts(TARGET, items)),
    "ImageBatches batch_size": ("batch_size", lambda n: next(ImageBatches(SET, n, seed=1).epoch(0)).images),
    "ImageBatches padding": ("padding", lambda n: next(ImageBatches(SET, 7, seed=1, padding=n).epoch(0)).images),
    "ImageBatches rank": ("rank", lambda n: next(ImageBatches(SET, 7, seed=1, rank=n, world_size=4).epoch(0)).images),
    "ImageBatches world_size": (
        "world_size",
        lambda n: next(ImageBatches(SET, 7, seed=1, world_size=n).epoch(0)).images,
    ),
    "ImageBatches strong_views": (
        "strong_views",
        lambda n: next(ImageBatches(SET, 7, seed=1, views=4, strong_views=n).epoch(0)).images,
    ),
    "ImageBatches epoch": ("epoch", lambda epoch: next(EPOCH.epoch(epoch)).images),
    "ImageBatches start": ("start", lambda start: next(EPOCH.epoch(0, start)).images),
    "ImageSet padding": (
        "padding",
        lambda n: ImageSet(IMAGES, TARGET, ("a", "b", "c"), (0.5,), (0.25,), padding=n).padding,
    ),
    "random_patches k": ("patches_per_image", lambda n: patches(IMAGES, 3, n)),
    "random_patches padding": ("padding", lambda n: patches(IMAGES, 3, 1, padding=n)),
    "random_patches size": ("size", lambda n: patches(IMAGES, n)),
    "random_crop_flip": ("padding", lambda n: fastkd.random_crop_flip(IMAGES, n, generator=fixed())),
    "draw_batch padding": ("padding", lambda n: draw_batch(padding=n)),
    "draw_batch size": ("size", lambda n: draw_batch(size=n)),
}


def fixed() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def patches(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return fastkd.random_patches(*arguments, generator=fixed(), **options)


def draw_batch(**options: Any) -> tuple[Tensor, Tensor]:
    return fastkd.draw_batch(AliasTable(TARGET.float(), seed=3), IMAGES, 5, generator=fixed(), **options)


@pytest.mark.parametrize("kind", [*INTS.values(), np.uint8], ids=[*INTS, "uint8"])
@pytest.mark.parametrize(("name", "call"), COUNTS.values(), ids=COUNTS)
def test_any_int_is_a_number(name: str, call: Callable[[Any], Any], kind: Callable[[int], Any]) -> None:
    assert same(call(kind(2)), call(2))


@pytest.mark.parametrize(
    "value", [2.0, 1.5, True, np.True_, "2", [2], torch.tensor(2.0), torch.tensor(True), None], ids=repr
)
@pytest.mark.parametrize(("name", "call"), COUNTS.values(), ids=COUNTS)
def test_what_is_no_number(name: str, call: Callable[[Any], Any], value: Any) -> None:
    optional = {"rank", "world_size", "done", "items", "padding", "size"}
    if value is None and name in optional:
        return  # means something there
    with pytest.raises(TypeError, match=f"fastkd: {name} is "):
        call(value)


@pytest.mark.parametrize("value", [-1, -(2**70)])
@pytest.mark.parametrize(
    ("name", "call"),
    [case for key, case in COUNTS.items() if key != "ImageBatches world_size"],  # it speaks of the rank
)
def test_negative_numbers(name: str, call: Callable[[Any], Any], value: int) -> None:
    with pytest.raises(ValueError, match=f"fastkd: {name} is -"):
        call(value)


UNBOUNDED = ("ImageBatches epoch", "ImageBatches world_size")  # an epoch is hashed, like a seed


@pytest.mark.parametrize("value", [2**62, 2**63, 2**64, 2**70, 10**30])
@pytest.mark.parametrize("name", [name for name in COUNTS if name not in UNBOUNDED])
def test_numbers_beyond_all_bounds(name: str, value: int) -> None:
    argument, call = COUNTS[name]
    countable = ("start", "stride", "epoch", "num_samples", "num_batches")
    if value == 2**62 and argument in countable and name != "ImageBatches start":
        return  # one that can be counted to
    with pytest.raises(ValueError, match=f"fastkd: {argument} is {value}"):
        call(value)


@pytest.mark.parametrize("name", list(COUNTS))
def test_numbers_without_a_value(name: str) -> None:
    argument, call = COUNTS[name]
    with pytest.raises(TypeError, match=f"fastkd: {argument} is "):
        call(torch.tensor(2, device="meta"))


WITH_NUMBERS: tuple[tuple[str, Callable[[AliasTable], object]], ...] = (
    ("saved or loaded", AliasTable.state_dict),
    ("saved or loaded", lambda table: table.load_state_dict(AliasTable(SCORES).state_dict())),
    ("copied or pickled", copy.deepcopy),
    ("copied or pickled", pickle.dumps),
    ("moved to another device", lambda table: table.to("cpu")),
    ("drawn from by a sampler", lambda table: CollectionSampler(table, 8, seed=1)),
    ("drawn from by a sampler", lambda table: CollectionBatchSampler(table, 8, 2)),
)


def test_tables_without_values() -> None:
    """On the meta device there is nothing to look at, as in a program that is traced."""
    for table in (AliasTable(SCORES.to("meta"), seed=1), AliasTable.from_weights(SCORES.to("meta"))):
        assert repr(table) == "AliasTable(50 items, inverse_temperature=unknown, meta)"
        assert table.sample(3).shape == (3,)
        for what, call in WITH_NUMBERS:
            with pytest.raises(ValueError, match=f"fastkd: this AliasTable is on meta, must be .* to be {what}"):
                call(table)
        assert table.to("meta").device.type == "meta"
    with pytest.raises(TypeError, match="fastkd: seed is Tensor, must be an int"):
        AliasTable(SCORES, seed=torch.tensor(3, device="meta"))


# ---- dtypes and kinds ---------------------------------------------------------------------------------

OTHERS = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("scores", lambda x: AliasTable(x)),
        ("scores", lambda x: AliasTable(x, iqpr=5.0)),
        ("weights", lambda x: AliasTable.from_weights(x)),
        ("inverse_temperature", lambda x: AliasTable(SCORES, x[0])),
        ("scores", lambda x: copy.deepcopy(TABLE).update(torch.arange(50), x)),
    ],
)
def test_dtypes_of_numbers(name: str, call: Callable[[Tensor], Any], dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"fastkd: {name} has dtype {dtype}, must be float32, float64, "):
        call(SCORES.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float32, torch.float64, torch.complex64])
def test_dtypes_of_indices(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"fastkd: indices has dtype {dtype}, must be torch.int64"):
        copy.deepcopy(TABLE).update(torch.ones(1).to(dtype), torch.zeros(1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AliasTable(SCORES.numpy()), TypeError, "scores is ndarray, must be a tensor"),
        (lambda: AliasTable(SCORES, "1"), TypeError, "inverse_temperature is str, must be a number"),
        (lambda: AliasTable(SCORES, True), TypeError, "inverse_temperature is bool, must be a number"),
        (lambda: AliasTable(SCORES, 1j), TypeError, "inverse_temperature is complex, must be a number"),
        (lambda: AliasTable(SCORES, iqpr="5"), TypeError, "iqpr is str, must be a number"),
        (lambda: AliasTable(SCORES, iqpr=torch.tensor(5.0)), TypeError, "iqpr is Tensor, must be a number"),
        (lambda: AliasTable.from_weights(SCORES[None]), ValueError, "weights has shape \\(1, 50\\), must be \\[N\\]"),
        (lambda: TABLE.update([1], torch.zeros(1)), TypeError, "indices is list, must be a tensor"),
        (lambda: TABLE.update(torch.tensor([1]), [0.0]), TypeError, "scores is list, must be a tensor"),
        (lambda: TABLE.sample(3, 5), TypeError, "generator is int, must be a torch.Generator or None"),
        (
            lambda: patches_with(np.random.default_rng(0)),
            TypeError,
            "generator is Generator, must be a torch.Generator",
        ),
        (
            lambda: fastkd.random_crop_flip(IMAGES, generator=1),
            TypeError,
            "generator is int, must be a torch.Generator",
        ),
        (lambda: fastkd.draw_batch(AliasTable(TARGET.float()), IMAGES, 2, generator=1), TypeError, "generator is int"),
        (lambda: CollectionSampler(SCORES, 5), TypeError, "table is Tensor, must be an AliasTable"),
        (lambda: CollectionBatchSampler(None, 5, 1), TypeError, "table is NoneType, must be an AliasTable"),
        (
            lambda: CollectionSampler(TABLE, 5, world_size=2),
            ValueError,
            "rank is not given and world_size is 2, must be",
        ),
        (lambda: CollectionSampler(TABLE, 5, world_size=0), ValueError, "world_size is 0, must be at least 1"),
        (lambda: ImageBatches(IMAGES, 5, seed=1), TypeError, "image_set is Tensor, must be an ImageSet"),
        (lambda: TABLE.load_state_dict(None), TypeError, "state is NoneType, must be a dict"),
        (lambda: CollectionSampler(TABLE, 5).load_state_dict(None), TypeError, "state is NoneType, must be a dict"),
        (
            lambda: TABLE.load_state_dict({}),
            ValueError,
            "state has no inverse_temperature, items, next_index, seed, total",
        ),
        (lambda: TABLE.load_state_dict({**TABLE.state_dict(), "seed": 0.5}), TypeError, "state\\['seed'\\] is float"),
        (lambda: load_sampler(epoch=-1), ValueError, "state\\['epoch'\\] is -1, must be at least 0"),
        (lambda: load_sampler(draws_done=0.5), TypeError, "state\\['draws_done'\\] is float, must be an int"),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"fastkd: {message}"):
        call()


def patches_with(generator: Any) -> Any:
    return fastkd.random_patches(IMAGES, 3, generator=generator)


def load_sampler(**changes: Any) -> None:
    sampler = CollectionSampler(TABLE, 5)
    sampler.load_state_dict({**sampler.state_dict(), **changes})


@pytest.mark.parametrize(
    "value", [2, 2.0, np.float32(2), np.float64(2), np.int64(2), torch.tensor(2.0), torch.tensor(2.0).half()]
)
def test_numbers_of_lambda(value: Any) -> None:
    assert torch.equal(AliasTable(SCORES, value).weights(), AliasTable(SCORES, 2.0).weights())
    if not isinstance(value, Tensor):
        assert torch.equal(AliasTable(SCORES, iqpr=value).weights(), AliasTable(SCORES, iqpr=2.0).weights())


# ---- default device, default dtype, inference mode ----------------------------------------------------


def _table() -> list[Any]:
    made = AliasTable(SCORES, iqpr=5.0, seed=1)
    AliasTable(SCORES)  # its seed is drawn
    other = AliasTable(SCORES, iqpr=5.0)
    made.sample(5)
    other.load_state_dict(made.state_dict())
    made.update(torch.tensor([1], device="cpu"), torch.tensor([0.5], device="cpu", dtype=torch.float32))
    moved = [copy.deepcopy(made), made.to("cpu")]
    weights = AliasTable.from_weights(SCORES, seed=2).probabilities()
    return [t.sample(20) for t in (made, other, *moved)] + [
        weights,
        made.effective_sample_size(),
        made.underflowed(SCORES),
    ]


def _samplers() -> list[Any]:
    table = AliasTable(SCORES, seed=1)
    item, batch = CollectionSampler(table, 20), CollectionBatchSampler(table, 5, 4)
    drawn = [list(item), list(batch), list(batch.tensors())]
    item.load_state_dict(item.state_dict())
    return [*drawn, list(item)]


def _statistics() -> list[Any]:
    drawn = TABLE.sample_at(1, 0, 100)
    counts = statistics.draw_counts(drawn, 50)
    p = TABLE.probabilities()
    relevant = counts > 2
    return [
        counts,
        statistics.draw_counts(drawn, out=counts.clone()),
        statistics.skip_ratio(counts),
        statistics.uniformity(counts),
        statistics.expected_skip_ratio(p, 100),
        statistics.irrelevant_proportion(counts, relevant),
        statistics.relevant_draws(counts, relevant),
        statistics.effective_sample_size(p),
        statistics.underflow_ratio(SCORES, TABLE.weights()),
    ]


def _selection() -> list[Any]:
    losses = SCORES.numpy() ** 2
    mixture = fastkd.TwoGaussianMixture().fit(losses)
    return [*fastkd.select_clean(losses), *fastkd.select_clean(SCORES), mixture.predict_proba(losses), mixture.means_]


def _data() -> list[Any]:
    split = digits.split(torch.Generator().manual_seed(1))
    return [
        *(part for pair in split for part in pair),
        *digits.vary(split[0], 30, torch.Generator().manual_seed(2)),
        *digits.collection(split[1], 40, 0.2, torch.Generator().manual_seed(3)),
        *((part.images, part.target, part.mean, part.std) for part in digits.image_sets(seed=4)),
        stratified_split(TARGET, 0.5, 1),
        labels.symmetric_noise(TARGET, 0.5, 3, 1),
        labels.asymmetric_noise(TARGET, 0.5, 3, 1),
        labels.instance_noise(TARGET, PROBABILITIES, 0.5, 1),
        weak_classifier(IMAGES, TARGET, 3, 1),
        labels.imbalanced(TARGET, [5, 6, 7], 1),
        channel_statistics(IMAGES),
        ImageSet.from_dataset(list(zip(IMAGES, TARGET.tolist(), strict=True))).images,
        SET.subset([1, 2]).images,
        SET.normalised(),
    ]


def _batches() -> list[Any]:
    table = AliasTable(TARGET.to(torch.float32), seed=1)
    of_table = fastkd.draw_batch(table, IMAGES, 6, mean=0.5, std=0.25, generator=fixed())
    return [
        *map(astuple, ImageBatches(SET, 7, seed=1, views=2).epoch(2)),
        *map(astuple, ImageBatches(SET, 7, seed=1, views=2, strong_views=1).epoch(2)),
        *map(astuple, ImageBatches(SET, 7, seed=1, channels_last=True, dtype=torch.float16).epoch(2)),
        of_table,
        patches(IMAGES, 3, 2, padding=1),
        fastkd.random_crop_flip(IMAGES, generator=fixed()),
        fastkd.crop_patches(IMAGES, patches(IMAGES, 3, 2)[1], 3),
        *make_loader_batches(3).epoch(1),
    ]


EVERYTHING = {f.__name__[1:]: f for f in (_table, _samplers, _statistics, _selection, _data, _batches)}


@contextmanager
def _default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def _default_dtype(dtype: torch.dtype = torch.float64) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default device": _default_device,
    "device": lambda: torch.device("meta"),
    "float64": _default_dtype,
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
@pytest.mark.parametrize("call", EVERYTHING.values(), ids=EVERYTHING)
def test_nothing_depends_on_the_defaults(
    call: Callable[[], list[Any]], surroundings: Callable[[], AbstractContextManager[Any]]
) -> None:
    expected = call()
    with surroundings():
        ours = call()
    assert len(ours) == len(expected)
    for place, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert same(a, b), place


def test_a_table_and_a_sampler_from_inference_mode_go_on_outside() -> None:
    with torch.inference_mode():
        table = AliasTable(SCORES, seed=3)
        copies = [table, copy.deepcopy(table), table.to("cpu")]
    expected = AliasTable(SCORES, seed=3)
    expected.update(torch.tensor([49]), torch.tensor([-1.0]))
    for made in copies[:2]:
        made.update(torch.tensor([49]), torch.tensor([-1.0]))
        assert torch.equal(made.weights(), expected.weights())
    for made in copies:
        assert torch.equal(made.sample(20), expected.sample_at(3, 0, 20))
        with torch.inference_mode():
            made.load_state_dict(made.state_dict())
            assert torch.equal(made.sample(20), expected.sample_at(3, 20, 20))


def test_models_in_training_follow_the_default_dtype() -> None:
    """Where parameters are made, the defaults are the caller's own choice."""
    with _default_dtype():
        assert next(ConvNet((4, 4), seed=1).parameters()).dtype == torch.float64


# ---- streams of samplers, and of tables that moved -------------------------------------------------------


def test_each_sampler_of_a_table_has_a_stream_of_its_own() -> None:
    def made() -> list[Any]:
        table = AliasTable(SCORES, seed=3)
        makers = (lambda: CollectionSampler(table, 40), lambda: CollectionBatchSampler(table, 10, 4))
        return [makers[i % 2]() for i in range(6)]

    epochs = [
        [index for part in sampler for index in (part if isinstance(part, list) else [part])] for sampler in made()
    ]
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert epochs[0] == TABLE.sample_at(3, 0, 40).tolist()  # the first takes the table's own seed
    assert [sampler.state_dict() for sampler in made()] == [sampler.state_dict() for sampler in made()]  # on any rank
    resumed = made()[0]
    resumed.load_state_dict(made()[3].state_dict())
    assert list(resumed) == epochs[3]


def test_ranks_that_make_their_samplers_in_the_same_order_share_streams() -> None:
    """In a process each, with ranks given or not, or all in one process."""
    in_one = AliasTable(SCORES, seed=3)
    together = [[CollectionSampler(in_one, 40, rank=r, world_size=2) for r in range(2)] for _ in range(3)]
    for rank in range(2):
        alone = AliasTable(SCORES, seed=3)
        seeds = [CollectionSampler(alone, 40, rank=rank, world_size=2)._draws.seed for _ in range(3)]
        plain = AliasTable(SCORES, seed=3)
        assert seeds == [CollectionSampler(plain, 40)._draws.seed for _ in range(3)]
        assert seeds == [pair[rank]._draws.seed for pair in together]
        assert len(set(seeds)) == 3
    after = CollectionSampler(in_one, 40)  # without a rank: after all of them
    assert after._draws.seed not in {pair[0]._draws.seed for pair in together}
    assert CollectionSampler(in_one, 40, rank=0, world_size=1)._draws.seed != after._draws.seed


def test_streams_go_with_the_table() -> None:
    table = AliasTable(SCORES, seed=3)
    first = CollectionSampler(table, 40)
    for other in (table.to("cpu"), copy.deepcopy(table)):
        assert CollectionSampler(other, 40)._draws.seed != first._draws.seed
    table.load_state_dict({**table.state_dict(), "seed": 8})
    assert CollectionSampler(AliasTable(SCORES, seed=8), 40)._draws.seed == 8


def test_a_table_that_moved_shares_its_weights_and_not_its_stream() -> None:
    table = AliasTable(SCORES, seed=3)
    moved, copied = table.to("cpu"), copy.deepcopy(table)
    table.sample(30)
    assert [t.state_dict()["next_index"] for t in (table, moved, copied)] == [30, 0, 0]
    moved.load_state_dict({**moved.state_dict(), "seed": 8, "next_index": 5})
    assert table.state_dict()["seed"] == 3
    table.update(torch.arange(49), torch.full((49,), -torch.inf))
    assert (moved.sample(20) == 49).all()
    assert torch.equal(copied.weights(), TABLE.weights())
