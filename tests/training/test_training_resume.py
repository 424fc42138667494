"""A training that was interrupted, and goes on, comes to the bits of one that was not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)
from training_cases import (
    BATCHES,
    CLASSES,
    METHODS,
    Batches,
    InterruptionError,
    assert_same_end,
    make_settings,
    metrics,
    train,
)

from fastkd.data import LoaderBatches
from fastkd.training import checkpoint

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "hinton": ("hinton", {}),
    "hinton-adamw": (
        "hinton",
        {"optimizer": "adamw", "learning_rate": 0.01, "schedule": "step", "milestones": (0.4, 0.8)},
    ),
    "fitnet": ("fitnet", {"ema": 0.9, "warmup_epochs": 1.0, "gradient_clip": 1.0}),
    "bss": ("bss", {"epochs": 4, "schedule": "step", "warmup_epochs": 0.5}),  # no attacks in the last epoch
    "bss-ema": ("bss", {"ema": 0.5, "optimizer": "adamw", "learning_rate": 0.01}),
    "dkd": ("dkd", {"epochs": 2}),
    "srd": ("srd", {"epochs": 2, "ema": 0.9}),
    "crd": ("crd", {"gradient_clip": 1.0}),
    "crd-bf16": ("crd", {"epochs": 2, "amp": "bf16"}),
    "sskd": ("sskd", {"epochs": 2, "ema": 0.5, "optimizer": "adamw", "learning_rate": 0.01}),
    "dml": ("dml", {"ema": 0.9, "schedule": "constant", "nesterov": False, "evaluate_every": 2}),
    "bf16": ("hinton", {"amp": "bf16", "ema": 0.9}),
    "fp16": ("hinton", {"amp": "fp16", "gradient_clip": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_as_if_it_had_not_been_interrupted(case: str, tmp_path: Path) -> None:
    method, changes = CASES[case]
    settings = make_settings(**changes)
    train(method, tmp_path / "whole", settings)
    steps = settings.epochs * BATCHES
    draw = random.Random(case)
    for i in range(3):
        folder = tmp_path / str(i)
        stops = sorted(draw.sample(range(1, steps + 1), 2))
        for j, stop in enumerate([*stops, None]):  # the weights of seed j are not those of the checkpoint
            found = (folder / "checkpoint.pt").exists()
            train(method, folder, settings, seed=j if found else 0, resume="auto", stop_at=stop)
        assert_same_end(tmp_path / "whole", folder)
    assert len(metrics(tmp_path / "whole")) == settings.epochs


def test_other_than_the_seed_of_the_training_changes_the_draws(tmp_path: Path) -> None:
    ends = [train("bss", tmp_path / str(i), make_settings(seed=seed)) for i, seed in enumerate((0, 0, 1))]
    weights = [next(trainer.deployed.parameters()) for trainer in ends]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert_same_end(tmp_path / "0", tmp_path / "1")


def test_global_generators_are_left_as_they_were() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    train("bss", None, make_settings(epochs=1))
    assert torch.equal(expected[0], torch.rand(3))
    assert expected[1:] == (random.random(), np.random.rand())  # noqa: NPY002


def test_a_finished_training_stays_as_it_is(tmp_path: Path) -> None:
    first = train("hinton", tmp_path, make_settings())
    before = checkpoint.read(tmp_path / "checkpoint.pt")
    (tmp_path / "curves.png").unlink()
    second = train("hinton", tmp_path, make_settings(), seed=1, resume=True)
    assert (tmp_path / "curves.png").exists()
    assert checkpoint.read(tmp_path / "checkpoint.pt")["history"] == before["history"] == metrics(tmp_path)
    for ours, theirs in zip(first.deployed.parameters(), second.deployed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_metrics_after_the_checkpoint_go(tmp_path: Path) -> None:
    """Killed between the line of an epoch and its checkpoint."""

    def fail(_: object) -> None:
        if len(metrics(tmp_path / "b")) == 2:
            raise InterruptionError

    train("hinton", tmp_path / "a", make_settings())
    with pytest.raises(AssertionError):  # as no step was said
        train("hinton", tmp_path / "b", make_settings(checkpoint_every=0), on_epoch=fail)
    assert len(metrics(tmp_path / "b")) == 2
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "los')
    train("hinton", tmp_path / "b", make_settings(checkpoint_every=0), resume=True)
    assert [{**line, "seconds": 0} for line in metrics(tmp_path / "a")] == [
        {**line, "seconds": 0} for line in metrics(tmp_path / "b")
    ]


def test_checkpoint_every_may_change(tmp_path: Path) -> None:
    train("hinton", tmp_path / "a", make_settings())
    train("hinton", tmp_path / "b", make_settings(checkpoint_every=1), stop_at=9)
    train("hinton", tmp_path / "b", make_settings(checkpoint_every=0), resume=True)
    ours, theirs = (checkpoint.read(tmp_path / name / "checkpoint.pt")["networks"]["student"] for name in "ab")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


class Noisy(Dataset[tuple[torch.Tensor, int]]):
    """Images of a user's data set whose transforms draw from all three global generators."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image = torch.full((1, 8, 8), i / 60) + 0.1 * torch.rand(1, 8, 8)
        return image + 0.1 * random.random() + 0.1 * float(np.random.rand()), i % CLASSES  # noqa: NPY002


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.forks)])
def test_data_loader(workers: int, tmp_path: Path) -> None:
    def batches() -> LoaderBatches:
        sampler = DistributedSampler(Noisy(), num_replicas=1, rank=0, seed=3)
        return LoaderBatches(DataLoader(Noisy(), 12, sampler=sampler, num_workers=workers))

    settings = make_settings(epochs=2, checkpoint_every=2)
    assert len(batches()) == 5
    train("bss", tmp_path / "whole", settings, batches=batches())
    for stop in (3, 8):
        folder = tmp_path / str(stop)
        train("bss", folder, settings, batches=batches(), stop_at=stop)
        train("bss", folder, settings, batches=batches(), resume=True)
        assert_same_end(tmp_path / "whole", folder)


def test_loader_whose_order_is_lost_is_refused() -> None:
    data = TensorDataset(torch.zeros(20, 1), torch.zeros(20))
    with pytest.raises(ValueError, match="fastkd: loader has a RandomSampler, whose order cannot be had again"):
        LoaderBatches(DataLoader(data, 4, shuffle=True))
    with pytest.raises(TypeError, match=r"fastkd: loader is list, must be a torch.utils.data.DataLoader"):
        LoaderBatches([1, 2])
    with pytest.raises(ValueError, match="must have a sampler with set_epoch"):
        LoaderBatches(DataLoader(data, 4, sampler=RandomSampler(data)))
    assert [len(batch[0]) for batch in LoaderBatches(DataLoader(data, 8)).epoch(1, start=1)] == [8, 4]


class Shuffled(BatchSampler):
    """Batches whose order torch's loader knows nothing of."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(batch) for batch in torch.randperm(20).view(5, 4).tolist()])


class ShuffledByEpoch(Shuffled):
    """Those of an epoch are always the same."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_batch_samplers_of_ones_own() -> None:
    data = TensorDataset(torch.arange(20), torch.zeros(20))
    in_order = SequentialSampler(data)
    with pytest.raises(ValueError, match="fastkd: loader has a Shuffled, whose order cannot be had again"):
        LoaderBatches(DataLoader(data, batch_sampler=Shuffled(in_order, 4, drop_last=False)))
    random_ones = BatchSampler(RandomSampler(data), 4, drop_last=False)
    with pytest.raises(ValueError, match="fastkd: loader has a RandomSampler, whose order"):
        LoaderBatches(DataLoader(data, batch_sampler=random_ones))
    with pytest.raises(ValueError, match="fastkd: loader has a RandomSampler, whose order"):
        LoaderBatches(DataLoader(data, batch_size=None, shuffle=True))
    mine = ShuffledByEpoch(in_order, 4, drop_last=False)
    LoaderBatches(DataLoader(data, batch_sampler=mine)).epoch(3)
    assert mine.epoch == 3
    distributed = DistributedSampler(data, num_replicas=1, rank=0)
    LoaderBatches(DataLoader(data, batch_sampler=BatchSampler(distributed, 4, drop_last=False))).epoch(3)
    assert distributed.epoch == 3
    plain = LoaderBatches(DataLoader(data, batch_sampler=BatchSampler(in_order, 4, drop_last=False)))
    assert next(plain.epoch(0))[0].tolist() == [0, 1, 2, 3]


def test_all_methods_train_without_a_folder() -> None:
    for method in set(METHODS) - {"one"}:  # which splits residual networks: among the tests of several processes
        trainer = train(method, None, make_settings(epochs=1))
        assert trainer.deployed(Batches().of(0)[0]).shape == (12, CLASSES)
