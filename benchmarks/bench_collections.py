"""Collections: their scores, and their data path against torch's DataLoader and WeightedRandomSampler."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

import fastkd
from benchmarks import floors
from benchmarks.bench_alias import OF_SINGLE_SUMS, error_of_draws
from benchmarks.bench_crop import MEAN, STD, OneByOne, augmentation_error
from benchmarks.case import Case, Contest, Run, Settings, Work, short_count
from fastkd.data import ArrayCollection, DrawnBatches
from fastkd.models.resnet import resnet
from fastkd.scores import OneClassSum

SIDE, PADDING, BATCH, BATCHES, WORKERS = 32, 4, 256, 20, 2
IQPR = 5.0
# images of the collection
QUICK = (10**5,)
FULL = (10**6,)
GPU = (10**6,)
# images that are scored at once, and the depth of their teacher
SCORED, SCORED_GPU = ((256, 20),), ((4096, 56),)
# items and draws of a sampler
ITERATIONS_QUICK = ((10**6, 10**6),)
ITERATIONS_FULL = ((2**24, 10**5), (2**24, 2**24))
RESIDENT = "of a tensor on the device"
_WRITTEN_AT_ONCE = 1 << 14

Drawn = tuple[Tensor, Tensor]  # augmented images, their indices in the collection


def cases(settings: Settings) -> Iterator[Case]:
    """Scores, epochs of batches, and iterations of the sampler that stands in the place of torch's."""
    few = settings.rows(3 * SIDE * SIDE, torch.uint8) if settings.sizes == "gpu" else max(FULL)
    for images, depth in settings.pick(SCORED, (), SCORED_GPU):
        yield _scored(settings, min(images, few), depth)
    for items in settings.pick(QUICK, FULL, GPU):
        yield _epoch(settings, min(items, few))
    for items, draws in settings.pick(ITERATIONS_QUICK, ITERATIONS_FULL):
        for change in (False, True):
            yield _iteration(items, draws, change=change)


class Augmented(Dataset[Drawn]):
    """Items as a Dataset with transforms gives them: each one cropped, mirrored and normalised by itself."""

    def __init__(self, images: np.ndarray) -> None:
        self.images, self.transform = images, OneByOne(PADDING)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Drawn:
        return self.transform(torch.from_numpy(np.array(self.images[i]))), torch.tensor(i)


def last_of(batches: Iterable[Drawn], device: torch.device) -> Drawn:
    """Has all of them made, on the device."""
    for views, index in batches:
        made = views.to(device), index
    return made


def _epoch(settings: Settings, items: int) -> Case:
    batch = min(BATCH, items)

    def build() -> Work:
        mapped = _mapped(items)
        scores = torch.randn(items, generator=torch.Generator().manual_seed(0))
        table = fastkd.AliasTable(scores, iqpr=IQPR, seed=0).to(settings.device)
        images = torch.from_numpy(np.array(mapped))

        def drawn(source: Tensor | ArrayCollection) -> Run:
            batches = DrawnBatches(source, table, batch, BATCHES, seed=0, padding=PADDING, mean=MEAN, std=STD)
            return lambda: last_of(((b.images, b.index) for b in batches.epoch(0)), settings.device)  # type: ignore[misc]

        def loaded(workers: int) -> Drawn:
            sampler = WeightedRandomSampler(weights, batch * BATCHES, replacement=True)
            loader = DataLoader(Augmented(mapped), batch, sampler=sampler, num_workers=workers)
            return last_of(loader, settings.device)

        def error(made: Drawn) -> float:
            views, index = made
            return augmentation_error(views, images[index.cpu()], PADDING)

        weights = table.probabilities().cpu()
        offsets = torch.randint(-PADDING, PADDING + 1, (batch * BATCHES, 1, 2))
        covered = floors.covered_pixels(offsets, (SIDE, SIDE), (SIDE, SIDE))
        return Work(
            drawn(ArrayCollection(mapped)),
            {
                RESIDENT: drawn(images.to(settings.device)),
                "DataLoader, WeightedRandomSampler, crops per item": partial(loaded, 0),
                f"the same with {WORKERS} workers": partial(loaded, WORKERS),
            },
            error,
            1e-6,
            1e-6,
            floor_bytes=floors.draw_batch(batch * BATCHES, covered, 3, (SIDE, SIDE), 4),
            own=(RESIDENT,),
        )

    name = f"collection, {BATCHES} batches of {batch}x3x{SIDE}x{SIDE} of a memory map of {short_count(items)}"
    return Case(name, build, 3 * items * 3 * SIDE * SIDE + 40 * BATCH * 3 * SIDE * SIDE)


def _scored(settings: Settings, count: int, depth: int) -> Case:
    """What 1C-Sum asks of a batch, most of it of the maps that go into the batch norms."""

    def build() -> Work:
        teacher = resnet(depth, seed=0).to(settings.device).eval()
        images = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(settings.device)
        score = OneClassSum(teacher)

        def error(found: Tensor) -> float:
            return float((found.cpu() - exact).abs().max() / exact.abs().max())

        exact = _on_the_host(teacher, images)
        return Work(
            lambda: score.components(images)[:, -4:-1],
            {"maps copied to the host": partial(_on_the_host, teacher, images)},
            error,
            1e-4,
            1e-4,
        )

    return Case(f"1C-Sum of {count}x3x{SIDE}x{SIDE}, ResNet-{depth}", build, 400 * count * SIDE * SIDE * depth)


@torch.no_grad()
def _on_the_host(teacher: nn.Module, images: Tensor) -> Tensor:
    """The moments of the batch norms' maps by numpy, as the authors of 1C-Sum take them."""
    sums, channels = np.zeros((len(images), 3)), 0
    hooks = []

    def see(layer: nn.BatchNorm2d, _: object, maps: Tensor) -> None:
        nonlocal channels
        t = (maps.permute(0, 2, 3, 1) - layer.bias) / layer.weight
        t = t.flatten(1, 2).cpu().numpy()
        mean, std = t.mean(1), t.std(1)
        for i, value in enumerate((mean**2, (t**2).mean(1), (std - 1) ** 2)):
            sums[:, i] += value.sum(1)
        channels += t.shape[2]

    for layer in teacher.modules():
        if isinstance(layer, nn.BatchNorm2d):
            hooks.append(layer.register_forward_hook(see))
    teacher(images)
    for hook in hooks:
        hook.remove()
    return torch.from_numpy(sums / channels)


def _mapped(items: int) -> np.ndarray:
    """A memory map of random pixels, whose file ends with it."""
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, np.uint8, "w+", shape=(items, 3, SIDE, SIDE))
    random = np.random.default_rng(0)
    for start in range(0, items, _WRITTEN_AT_ONCE):
        part = mapped[start : start + _WRITTEN_AT_ONCE]
        part[:] = random.integers(0, 256, part.shape, np.uint8)
    return mapped


def _iteration(items: int, draws: int, *, change: bool) -> Case:
    def build() -> Work:
        scores = torch.randn(items, generator=torch.Generator().manual_seed(0))
        weights = scores.double().exp()

        def iteration(kind: type[WeightedRandomSampler]) -> Run:
            sampler = kind(weights.clone(), draws)  # type: ignore[arg-type]

            def run() -> list[int]:
                if change:
                    sampler.weights.mul_(1.0000001)
                return list(sampler)

            return run

        return Work(
            iteration(fastkd.WeightedRandomSampler),
            {"torch's": iteration(WeightedRandomSampler)},
            error_of_draws(scores, weights / weights.sum(), draws),
            0.0,
            OF_SINGLE_SUMS,
        )

    state = "new weights" if change else "the same weights"
    name = f"WeightedRandomSampler, {short_count(draws)} draws of N={short_count(items)}, {state}"
    return Case(name, build, 60 * items + 80 * draws)


def test_collections(case: Case, contest: Contest) -> None:
    """Each case."""
    contest(case)
