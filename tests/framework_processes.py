"""What the tests of trainers from elsewhere run in processes of their own: an epoch or more, and the indices drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastkd
from fastkd import AliasTable, CollectionBatchSampler, CollectionSampler

ITEMS, BATCH, BATCHES, RANKS = 500, 4, 6, 2  # batches of an epoch on each rank
EPOCH = BATCH * BATCHES * RANKS
KINDS = ("items", "batches")


def make_table() -> AliasTable:
    """The same on every rank."""
    return AliasTable(torch.linspace(0, 3, ITEMS), 1.0, seed=5)


class Keyed(Dataset[int]):
    """Items by Python ints alone."""

    def __init__(self) -> None:
        self.items = {i: i for i in range(ITEMS)}

    def __getitem__(self, index: int) -> int:
        assert type(index) is int
        return self.items[index]

    def __len__(self) -> int:
        return ITEMS


def make_loader(
    kind: str, workers: int = 0, loader: Callable[..., Any] = DataLoader, **options: int
) -> DataLoader[int]:
    """With the item or the batch sampler; options are those of the sampler."""
    # from the server that these processes come from, workers would take seconds to import all
    how: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    if kind == "items":
        return loader(Keyed(), BATCH, sampler=CollectionSampler(make_table(), EPOCH, **options), **how)
    return loader(Keyed(), batch_sampler=CollectionBatchSampler(make_table(), BATCH, BATCHES, **options), **how)


def sampler_of(loader: DataLoader[int]) -> Any:
    return loader.sampler if isinstance(loader.sampler, CollectionSampler) else loader.batch_sampler


def indices(loader: Any) -> list[int]:
    return [index for batch in loader for index in batch.tolist()]


def run(rank: int, folder: Path, calls: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
    """What each call returns, one after the other, for the test to read. To import a trainer takes seconds."""
    (folder / f"rank{rank}.json").write_text(json.dumps([call(rank, *arguments) for call, arguments in calls]))
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- plain torchrun -----------------------------------------------------------------------------------


def plain(rank: int, kind: str) -> list[list[list[int]]]:
    """Two epochs of four loaders: two that are made before there is a process group and two after, with workers or not."""
    loaders = [make_loader(kind, workers) for workers in (0, 2)]
    dist.init_process_group("gloo")
    loaders += [make_loader(kind, workers) for workers in (0, 2)]
    return [[indices(loader), indices(loader)] for loader in loaders]


# ---- Accelerate ---------------------------------------------------------------------------------------


def prepared(loader: DataLoader[int], **options: Any) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options)).prepare(loader)


def accelerated(
    rank: int, kind: str, options: dict[str, Any], workers: int = 0, ranks: dict[str, int] | None = None
) -> dict[str, Any]:
    """Two epochs and the length of one."""
    loader = prepared(make_loader(kind, workers, **(ranks or {})), **options)
    return {"length": len(loader), "epochs": [indices(loader), indices(loader)]}


def divided_twice(rank: int, kind: str) -> list[str]:
    """What is said of a sampler that was given the rank, too."""
    loader = prepared(make_loader(kind, rank=rank, world_size=2))
    said = []
    for call in (len, indices):
        try:
            call(loader)
        except RuntimeError as error:
            said.append(str(error))
    return said


def accelerated_resume(rank: int, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """An epoch and three batches, then from the state on to the end of the next epoch."""
    loader = make_loader(kind)
    ready = prepared(loader, **options)
    first, begun = indices(ready), []
    for _, batch in zip(range(3), ready, strict=False):
        begun += batch.tolist()
    state = sampler_of(loader).state_dict(done=len(begun) if kind == "items" else 3)

    again = make_loader(kind)
    sampler_of(again).load_state_dict(state)
    ready = prepared(again, **options)
    ready.set_epoch(state["epoch"])
    return {"epochs": [first, begun + indices(ready), indices(ready)]}


def beside(rank: int, kind: str) -> dict[str, Any]:
    """A loader that is not prepared, read in turns with one that is."""
    loader, other = make_loader(kind), prepared(make_loader(kind))
    epochs = []
    for _ in range(2):
        epochs.append([index for batch, _ in zip(loader, other, strict=True) for index in batch.tolist()])
    return {"epochs": epochs}


# ---- Lightning ----------------------------------------------------------------------------------------


QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
IN_TWO = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 2, **QUIET}


def fitted(
    rank: int, kind: str, options: dict[str, Any], hook: bool, trainer: Any = None, loader: Any = None
) -> dict[str, Any]:
    """Two epochs of a fit; ``hook``: the loader comes from train_dataloader. Or what Lightning says."""
    import lightning

    class Reader(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))
            self.epochs: list[list[int]] = []

        def on_train_epoch_start(self) -> None:
            self.epochs.append([])

        def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
            self.epochs[-1] += batch.tolist()
            return self.weight * batch.float().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-3)

        if hook:

            def train_dataloader(self) -> DataLoader[int]:
                return make_loader(kind)

    trainer = trainer or lightning.Trainer(**IN_TWO, **options)
    module = Reader()
    try:
        trainer.fit(module, *([] if hook else [loader or make_loader(kind)]))
    except TypeError as error:
        return {"said": str(error)}
    return {"epochs": module.epochs, "length": trainer.num_training_batches}


# ---- torchdata ----------------------------------------------------------------------------------------


def stateful(rank: int, kind: str, workers: int, done: int, every: int) -> list[list[int]]:
    """Stops in the second epoch after so many batches; another loader goes on from the state to the end of the third."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    make = partial(make_loader, kind, workers, partial(StatefulDataLoader, snapshot_every_n_steps=every))
    loader: Any = make()
    first, second = indices(loader), []
    iterator = iter(loader)
    for _ in range(done):
        second += next(iterator).tolist()
    state = loader.state_dict()
    del iterator
    again: Any = make()
    again.load_state_dict(state)
    second += indices(again)
    return [first, second, indices(again)]


# ---- the recipes of docs/samplers.md --------------------------------------------------------------------


def followed(rank: int, recipe: str) -> list[list[int]]:
    """Two epochs of the loader that the recipe makes."""
    names: dict[str, Any] = {"fastkd": fastkd, "dist": dist, "DataLoader": DataLoader}
    names |= {"table": make_table(), "collection": Keyed()}
    if "Accelerator" in recipe:
        from accelerate import Accelerator

        names["Accelerator"] = partial(Accelerator, cpu=True)
    if "lightning" in recipe:
        import lightning

        names["lightning"] = SimpleNamespace(Trainer=partial(lightning.Trainer, **IN_TWO))
    if "StatefulDataLoader" in recipe:
        from torchdata.stateful_dataloader import StatefulDataLoader

        names["StatefulDataLoader"] = partial(StatefulDataLoader, multiprocessing_context="fork")
        dist.init_process_group("gloo")
    for shown, here in {"512000": EPOCH, "256": BATCH, "1000": BATCHES}.items():
        recipe = recipe.replace(shown, str(here))
    exec(recipe, names)
    if "trainer" in names:
        epochs: list[list[int]] = fitted(rank, "", {}, False, names["trainer"], names["loader"])["epochs"]
        return epochs
    return [indices(names["loader"]), indices(names["loader"])]
