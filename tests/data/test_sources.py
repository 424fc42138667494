"""Sources of batches: typed batches of whatever is given, drawn, side by side, of any data set, or none; all resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refuses
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from training_cases import CLASSES, Batches, InterruptionError, assert_same_end, make_objective, make_settings, small

import fastkd
from fastkd import AliasTable
from fastkd.data import (
    Batch,
    DatasetCollection,
    DrawnBatches,
    ImageBatches,
    ImageSet,
    LoaderBatches,
    NoBatches,
    ParallelBatches,
)
from fastkd.data.batch import as_batches, images_of, on_device
from fastkd.methods import Hinton, Objective, Part, Procedure, Step
from fastkd.training import Trainer, checkpoint

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]

IMAGES = torch.rand(5, 1, 8, 8)
TARGET, INDEX = torch.arange(5) % CLASSES, torch.arange(5) + 10
PIXELS = torch.randint(256, (60, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def same(a: Batch, b: Batch) -> bool:
    pairs = [(a.images, b.images), (a.target, b.target), (a.index, b.index), *zip(a.views, b.views, strict=True)]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)  # type: ignore[arg-type]


# ---- batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (IMAGES, Batch(IMAGES)),
        ((IMAGES,), Batch(IMAGES)),
        ([IMAGES, TARGET], Batch(IMAGES, TARGET)),
        ((IMAGES, TARGET, INDEX), Batch(IMAGES, TARGET, INDEX)),
        (([IMAGES, 2 * IMAGES], TARGET), Batch(IMAGES, TARGET, views=(2 * IMAGES,))),
        ({"images": IMAGES, "index": INDEX}, Batch(IMAGES, index=INDEX)),
        (Batch(IMAGES), Batch(IMAGES)),
    ],
)
def test_what_a_source_may_give(given: Any, expected: Batch) -> None:
    batch = as_batches(given)
    assert isinstance(batch, Batch)
    assert same(batch, expected)
    assert images_of(batch) == len(batch) == 5
    assert same(on_device(batch, torch.device("cpu")), batch)  # type: ignore[arg-type]


def test_several_and_none() -> None:
    pair = {"task": Batch(IMAGES, TARGET), "other": Batch(IMAGES[:2])}
    assert as_batches(pair) is pair
    moved = on_device(pair, torch.device("meta"))
    assert isinstance(moved, dict)
    assert moved["task"].target.is_meta  # type: ignore[union-attr]
    assert images_of(pair) == 5
    assert as_batches(None) is None
    assert on_device(None, torch.device("cpu")) is None
    assert images_of(None) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_batches(3), "a source gave int, must be a Batch"),
        (lambda: as_batches({"image": IMAGES}), "a source gave a mapping of 'image', must be"),
        (lambda: as_batches((IMAGES, TARGET, INDEX, INDEX)), "a source gave tuple, must be"),
        (lambda: Batch(3), "images is int, must be a tensor"),  # type: ignore[arg-type]
        (lambda: Batch(IMAGES, TARGET[:4]), r"target has shape \(4,\), must be \[5, ...\]"),
        (lambda: Batch(IMAGES, views=(IMAGES, IMAGES[:1])), r"views\[1\] has shape"),
        (lambda: Batch(IMAGES, index=[1]), "index is list, must be a tensor"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_batch(make: Any, message: str) -> None:
    refuses(message, make)


# ---- sources ------------------------------------------------------------------------------------------


def drawn(rank: int = 0) -> DrawnBatches:
    table = AliasTable(torch.linspace(0, 3, 60), 1.0, seed=0)
    return DrawnBatches(PIXELS, table, 8, 5, seed=4, padding=1, mean=0.5, std=0.25, rank=rank)


def gathered(rank: int = 0) -> DrawnBatches:
    """As :func:`drawn`, from images that are read, by another lambda each epoch."""
    table = AliasTable(torch.linspace(0, 3, 60), 1.0, seed=0, keep_scores=True)
    collection = DatasetCollection(TensorDataset(PIXELS))
    return DrawnBatches(collection, table, 8, 5, seed=4, padding=1, rank=rank, iqpr_schedule=lambda epoch: 1.0 + epoch)


class Noisy(Dataset[tuple[Tensor, int]]):
    """Drawn from the global generator, as transforms do."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.full((1, 8, 8), i / 22) + 0.1 * torch.rand(1, 8, 8), i % CLASSES


def labelled(seed: int = 0, **options: Any) -> ImageBatches:
    image_set = ImageSet(PIXELS, torch.arange(60) % CLASSES, tuple("abcd"), (0.5,), (0.25,), padding=1)
    return ImageBatches(image_set, 12, seed=seed, **options)


SOURCES = {
    "drawn": drawn,
    "gathered": gathered,
    "labelled": lambda: labelled(views=2),
    "none": lambda: NoBatches(4),
    "parallel": lambda: ParallelBatches(task=labelled(), other=drawn()),
    "loaded": lambda: ParallelBatches(
        task=labelled(), other=LoaderBatches.of(TensorDataset(PIXELS.float()), 9, seed=1)
    ),
    "longer": lambda: ParallelBatches(task=drawn(), other=NoBatches(3)),
    "data set": lambda: LoaderBatches.of(TensorDataset(IMAGES, TARGET), 2, seed=3),
}


def flat(batch: Any) -> list[Batch | None]:
    return list(batch.values()) if isinstance(batch, dict) else [as_batches(batch)]  # type: ignore[list-item]


@pytest.mark.parametrize("name", SOURCES)
def test_an_epoch_from_any_batch_on(name: str) -> None:
    whole = [[flat(batch) for batch in SOURCES[name]().epoch(epoch)] for epoch in range(3)]
    for epoch, batches in enumerate(whole):
        assert len(batches) == len(SOURCES[name]())
        for start in range(len(batches) + 1):
            again = [flat(batch) for batch in SOURCES[name]().epoch(epoch, start=start)]
            assert len(again) == len(batches) - start
            for ours, theirs in zip(again, batches[start:], strict=True):
                assert all((a is b) or same(a, b) for a, b in zip(ours, theirs, strict=True))  # type: ignore[arg-type]
    if name not in ("none",):
        first, second = (batches[0][0] for batches in whole[:2])
        assert not torch.equal(first.images, second.images)  # type: ignore[union-attr]
    for wrong in (-1, len(whole[0]) + 1):
        if name != "data set":
            with pytest.raises(ValueError, match="start is"):
                SOURCES[name]().epoch(0, start=wrong)


def test_the_other_source_goes_on_through_its_own_epochs() -> None:
    """Five batches of the task, four of the other an epoch."""
    other = LoaderBatches.of(TensorDataset(PIXELS[:12].float()), 3, seed=1)
    pairs = ParallelBatches(task=labelled(), other=other)
    assert (len(pairs), len(other)) == (5, 4)
    got = [batch["other"] for epoch in range(3) for batch in pairs.epoch(epoch)]
    expected = [batch for epoch in range(4) for batch in other.epoch(epoch)][:15]
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours.images, theirs[0])


def test_draws_are_the_tables() -> None:
    """As drawn and augmented by hand, another on each rank, counted, and by the weights of the table."""
    first = [next(drawn(rank).epoch(2, start=1)) for rank in range(2)]
    assert not torch.equal(first[0].index, first[1].index)  # type: ignore[arg-type]
    source = drawn()
    batches = [batch for epoch in range(40) for batch in source.epoch(epoch)]
    index = torch.cat([batch.index for batch in batches])  # type: ignore[misc]
    assert torch.equal(source.counts, torch.bincount(index, minlength=60))
    share = source.counts[30:].sum() / source.counts.sum()
    assert abs(share - source.table.probabilities()[30:].sum()) < 0.03
    assert batches[0].target is None
    plain = DrawnBatches(PIXELS, source.table, 8, 5, seed=4, padding=0, flip=False, mean=0.5, std=0.25)
    batch = next(plain.epoch(0))
    assert torch.equal(batch.images, fastkd.random_crop_flip(PIXELS[batch.index], 0, None, 0.0, 0.5, 0.25))  # type: ignore[index]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.forks)])
def test_any_data_set(workers: int) -> None:
    ranks = [LoaderBatches.of(Noisy(), 4, seed=0, rank=r, world_size=2, num_workers=workers) for r in range(2)]
    assert [len(rank) for rank in ranks] == [2, 2]
    seen = [as_batches(batch) for rank in ranks for batch in rank.epoch(1)]
    assert all(batch.images.shape == (4, 1, 8, 8) and batch.target is not None for batch in seen)  # type: ignore[union-attr]
    which = (torch.cat([batch.images.mean((1, 2, 3)) for batch in seen]) * 22 - 1.1).round()  # type: ignore[union-attr]
    assert len(which.unique()) == 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoBatches(0), "iterations is 0, must be at least 1"),
        (ParallelBatches, "sources is empty, must be one source or more"),
        (lambda: ParallelBatches(task=[1, 2]), r"task is list, must be a BatchSource, with len\(\) and epoch\(\)"),
        (lambda: LoaderBatches.of(iter([]), 2, seed=0), "dataset is list_iterator, must be map-style"),  # type: ignore[arg-type]
        (lambda: LoaderBatches.of(Noisy(), 23, seed=0), "batch_size is 23, must be at most the 22 items"),
        (
            lambda: LoaderBatches.of(Noisy(), 2, seed=0, rank=2, world_size=2),
            r"rank is 2, must be in \[0, world_size\)",
        ),
        (lambda: DrawnBatches(PIXELS, 3, 8, 5, seed=0), "table is int, must be an AliasTable"),  # type: ignore[arg-type]
        (lambda: DrawnBatches([1], drawn().table, 8, 5, seed=0), "images is list, must be a tensor"),  # type: ignore[arg-type]
        (lambda: DrawnBatches(PIXELS, drawn().table, 0, 5, seed=0), "batch_size is 0"),
        (lambda: next(DrawnBatches(PIXELS[1:], drawn().table, 8, 5, seed=0).epoch(0)), "images has shape"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    refuses(message, make)


# ---- in a training ------------------------------------------------------------------------------------


class Agreeing(Procedure):
    """A student that agrees with a teacher on whatever comes: with labels where there are any."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.student = small(seed)
        self.freeze("teacher", small(77, (8, 8)))

    def parts(self) -> dict[str, Part]:
        return {"student": Part(self.student)}

    def network(self) -> nn.Module:
        return self.student

    def iteration(self, batch: Any, step: Step) -> dict[str, Tensor]:
        batches = list(batch.values()) if isinstance(batch, dict) else [batch]
        images = torch.cat([view for one in batches for view in (one.images, *one.views)])
        loss = fastkd.functional.kl_div(self.student(images), self.frozen["teacher"](images))
        step.update(loss)
        return {"loss": loss}


@pytest.mark.parametrize("name", ["drawn", "gathered", "labelled", "parallel", "loaded"])
def test_a_training_goes_on(name: str, tmp_path: Path) -> None:
    settings = make_settings(epochs=2, checkpoint_every=1)

    def fit(folder: Path, seed: int = 0, stop_at: int | None = None) -> None:
        def on_step(step: int) -> None:
            if step == stop_at:
                raise InterruptionError

        Trainer(Agreeing(seed), SOURCES[name](), settings, folder=folder, show="off", on_step=on_step).fit(
            resume="auto"
        )

    fit(tmp_path / "whole")
    for seed, stop in enumerate((3, 7)):
        with pytest.raises(InterruptionError):
            fit(tmp_path / "parts", seed, stop)
    fit(tmp_path / "parts", 2)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    if name == "drawn":
        source = checkpoint.read(tmp_path / "parts" / "checkpoint.pt")["of_ranks"][0]["source"]
        assert source["counts"].sum() == 2 * 5 * 8
        other = DrawnBatches(PIXELS, AliasTable(torch.zeros(60), 1.0, seed=0), 8, 5, seed=4)
        with pytest.raises(ValueError, match="rebuild the table from the scores"):
            Trainer(Agreeing(0), other, settings, folder=tmp_path / "parts", show="off").fit(resume=True)


def test_labels_are_optional() -> None:
    """A method without a term that reads them; where one does, it says so."""
    unlabeled = LoaderBatches.of(TensorDataset(torch.rand(24, 1, 8, 8)), 12, seed=0)
    objective = Objective(Hinton(task_weight=0.0, kd_weight=1.0), small(0), small(77))
    (line,) = Trainer(objective, unlabeled, make_settings(epochs=1), show="off").fit()
    assert "accuracy" not in line
    assert line["loss"] == line["kd_loss"]
    with pytest.raises(ValueError, match=r"target is None, must be classes, int64 \(12,\)"):
        Trainer(make_objective("hinton"), unlabeled, make_settings(epochs=1), show="off").fit()
    with pytest.raises(TypeError, match="batch is NoneType, must be a Batch for Hinton"):
        Trainer(make_objective("hinton"), NoBatches(3), make_settings(epochs=1), show="off").fit()
    assert len(Batches()) == 6
