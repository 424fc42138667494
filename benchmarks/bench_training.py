"""Whole training steps with fastkd and without: what a loop gains, its networks included.

Each is there twice: as it is, and as "data and loss only", where what networks return is given. The difference is the
networks' time, the same for all contenders; where it dominates, the ratio of the whole step is near 1.

Images and networks are channels-last, in which convolutions are faster and in which plain indexing returns images
anyway; fastkd's functions keep the format that they are given. With other images, a peer's networks would win by it.

Every contender trains its own copy of the same model. Before it is timed, its first step from the first weights is
taken with crops and draws that all share, and the gradient compared with the same step's in plain torch.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, TensorDataset, WeightedRandomSampler

import fastkd
from benchmarks import bench_crop, bench_gmm
from benchmarks.bench_crop import MEAN, STD, eager_augmentation
from benchmarks.bench_divergence import eager_kl
from benchmarks.case import Case, Contest, Settings, Work, relative_error, short_count
from benchmarks.measure import OURS
from benchmarks.trainer import Done, Given, Losses, Source, Trainer
from fastkd.models.convnet import ConvNet
from fastkd.models.resnet import resnet
from fastkd.ops import crop as ops
from fastkd.patches import crop_seed
from fastkd.reference import gmm as reference

CLASSES, SIDE, PADDING = 10, 32, 4
TEMPERATURE, ALPHA = 4.0, 0.9
COLLECTION_TEMPERATURE = 2.0  # of the paper on collections
IQPR = 5.0
SMALL = (8, 16)  # widths of the demo's student
LATENT = 100  # of the generator of images
NOISY = 0.3  # share of labels that are wrong
SELECTION_BATCH = 1024
# slower than the others of their row
NOT_QUICK = ("unfold and gather", "DataLoader, by item")
ROUNDS = 11  # networks vary by more than what is gained in a step
BYTES_OF_AN_IMAGE = 8 << 20  # activations of a ResNet-20 in training, and as much again

# depths of student and teacher, batch
DISTILLATION_QUICK = ((20, 26, 128),)
DISTILLATION_FULL = ((20, 56, 128),)
DISTILLATION_GPU = ((20, 56, 128), (20, 56, 1024))
# images, patches of each, their side; widths of generator and discriminator
PATCHES_QUICK = ((64, 8, 8, 8, 16),)
PATCHES_FULL = ((256, 8, 8, 64, 128),)  # MosaicKD's own
PATCHES_GPU = ((256, 8, 8, 64, 128), (1024, 8, 8, 64, 128))
# losses of one fit (a batch of TA-DFKD, an epoch of DivideMix); the depth of the network, or the demo's student on 8x8 images
SELECTION_QUICK = ((1024, None),)
SELECTION_FULL = ((50_000, None),)
SELECTION_GPU = ((1024, 20), (50_000, 20))
# items, draws of an epoch, batch; the depth of the student, or a small plain network
COLLECTION_QUICK = ((50_000, 1000, 250, None),)
COLLECTION_FULL = ((486_463, 5000, 250, None),)  # collection and pseudo-epoch of the paper
COLLECTION_GPU = ((50_000, 5000, 250, 8), (486_463, 5000, 250, 20))


def work(
    settings: Settings, first: nn.Module, contenders: dict[str, Losses], truth: Losses, peer_tolerance: float = 0.0
) -> Work:
    """fastkd and its peers in training the same model, compared with the steps of ``truth``."""
    expected = Trainer(first, truth, settings.device).first_gradient()
    # networks enlarge differences of one bit: at the kinks of ReLU, and where convolutions on a GPU round to TF32
    tolerance = 1e-5 if isinstance(first, Given) else 1e-2

    def error(done: Done) -> float:
        return relative_error(done.first_gradient(), expected) if done.loss.isfinite().all() else float("nan")

    trainers = {
        name: Trainer(first, losses, settings.device)
        for name, losses in contenders.items()
        if settings.sizes != "quick" or name not in NOT_QUICK
    }
    return Work(
        trainers.pop(OURS),
        dict(trainers),
        error,
        tolerance,
        max(tolerance, peer_tolerance),
        least_rounds=ROUNDS if settings.sizes == "quick" else 0,
        latency=True,
    )


def cases(settings: Settings) -> Iterator[Case]:
    """The four loops, each with networks and without."""
    makers: dict[Callable[..., Case], list[tuple[int | None, ...]]] = {
        _distillation: settings.pick(DISTILLATION_QUICK, DISTILLATION_FULL, DISTILLATION_GPU),
        _patches: settings.pick(PATCHES_QUICK, PATCHES_FULL, PATCHES_GPU),
        _selection: settings.pick(SELECTION_QUICK, SELECTION_FULL, SELECTION_GPU),
        _collection: settings.pick(COLLECTION_QUICK, COLLECTION_FULL, COLLECTION_GPU),
    }
    every = (
        make(settings, *size, networks=networks)
        for make, sizes in makers.items()
        for size in sizes
        for networks in (True, False)
    )
    yield from {case.name: case for case in every}.values()  # sizes that only test the benchmark coincide


def step_name(step: str, networks: bool) -> str:
    """Of a case, by whether its networks are in it."""
    return step if networks else f"{step}, data and loss only"


def at_most(settings: Settings, n: int) -> int:
    """``n``, or fewer where the sizes of a GPU are only to test the benchmark."""
    return min(n, max(settings.nbytes >> 12, 4)) if settings.sizes == "gpu" else n


def _bytes(settings: Settings, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, device=settings.device).to(memory_format=torch.channels_last)


def _student(depth: int | None, images: Sequence[int]) -> nn.Module:
    """The ResNet of a depth, or a small plain network; for images ``[N, C, H, H]``."""
    if depth is None:
        return ConvNet(SMALL, in_channels=images[1], image_size=images[2], classes=CLASSES)
    return resnet(depth, in_channels=images[1], num_classes=CLASSES)


def _student_name(depth: int | None) -> str:
    return "a small network" if depth is None else f"ResNet-{depth}"


def _labels(n: int, settings: Settings) -> Tensor:
    return torch.randint(CLASSES, (n,), device=settings.device)


def _logits(n: int, settings: Settings) -> Tensor:
    return torch.randn(n, CLASSES, device=settings.device)


# Distillation of labelled images: augment, teacher, student, cross-entropy and KL.


def crop_flip(images: Tensor, source: Source) -> Tensor:
    """uint8 to normalised floats, cropped and mirrored at random."""
    return fastkd.random_crop_flip(images, PADDING, mean=MEAN, std=STD, generator=source)


def fastkd_places(n: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Where :func:`crop_flip` crops n images, ``[n, 2]``, and which of them it mirrors."""
    places = (-PADDING, 2 * PADDING + 1)
    offsets, flip = ops.crop_offsets(crop_seed(source.device, source), n, 1, places, places, 0.5)
    return offsets[:, 0], flip[:, 0]


def plain_crop_flip(images: Tensor, source: Source) -> Tensor:
    """The same in plain torch."""
    n = len(images)
    if source is None:
        offsets = torch.randint(-PADDING, PADDING + 1, (n, 2), device=images.device)
        flip = torch.rand(n, device=images.device) < 0.5
    else:
        offsets, flip = fastkd_places(n, source)
    return eager_augmentation(images, offsets, flip, PADDING, torch.float32)


def settle(model: nn.Module, images: Tensor) -> None:
    """Gives batch norms the statistics of these images: without, the outputs of a deep network in evaluation are huge."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(images)


def plain_kd_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """``(1 - alpha) CE + alpha T^2 KL`` as most distillation loops write it."""
    kl = eager_kl(student_logits, teacher_logits, TEMPERATURE)
    return (1 - ALPHA) * F.cross_entropy(student_logits, target) + ALPHA * kl


Augment = Callable[[Tensor, Source], Tensor]
DISTILLATION: dict[str, tuple[Augment, Callable[..., Tensor]]] = {
    OURS: (crop_flip, fastkd.KDLoss(TEMPERATURE, ALPHA)),
    "plain torch": (plain_crop_flip, plain_kd_loss),
}


def _distillation(settings: Settings, depth: int, teacher_depth: int, most: int, *, networks: bool) -> Case:
    batch = at_most(settings, most)

    def build() -> Work:
        images, target = _bytes(settings, (batch, 3, SIDE, SIDE)), _labels(batch, settings)
        if networks:
            student, teacher = (resnet(d, seed=d).to(settings.device) for d in (depth, teacher_depth))
            settle(teacher.to(memory_format=torch.channels_last), plain_crop_flip(images, None))
        else:
            student, teacher = (Given(_logits(batch, settings)) for _ in range(2))
        teacher.eval().requires_grad_(False)

        def step(augment: Augment, criterion: Callable[..., Tensor]) -> Losses:
            def losses(model: nn.Module, source: Source) -> Iterator[Tensor]:
                views = augment(images, source)
                with torch.no_grad():
                    teacher_logits = teacher(views)
                yield criterion(model(views), teacher_logits, target)

            return losses

        contenders = {name: step(*pieces) for name, pieces in DISTILLATION.items()}
        return work(settings, student, contenders, contenders["plain torch"])

    name = f"KD step ResNet-{depth} from ResNet-{teacher_depth}, batch {batch}"
    return Case(step_name(name, networks), build, batch * BYTES_OF_AN_IMAGE)


# A patch discriminator: generate images, crop patches, discriminate, gradient back into the generator.


def images_from(width: int) -> nn.Module:
    """MosaicKD's generator; its width is 64."""

    def upsampled(before: int, after: int) -> list[nn.Module]:
        return [
            nn.Upsample(scale_factor=2),
            nn.Conv2d(before, after, 3, padding=1),
            nn.BatchNorm2d(after),
            nn.LeakyReLU(0.2),
        ]

    smallest = SIDE // 4
    return nn.Sequential(
        nn.Linear(LATENT, 4 * width * smallest**2),
        nn.Unflatten(1, (4 * width, smallest, smallest)),
        nn.BatchNorm2d(4 * width),
        *upsampled(4 * width, 2 * width),
        *upsampled(2 * width, width),
        nn.Conv2d(width, 3, 3, padding=1),
        nn.Sigmoid(),
    )


def discriminator(width: int) -> nn.Module:
    """MosaicKD's discriminator of patches; its width is 128. It is not trained in the step of the generator."""
    layers = nn.Sequential(
        nn.Conv2d(3, width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 1, 1),
    )
    return layers.requires_grad_(False).to(memory_format=torch.channels_last)


def realness(patches: Tensor) -> Tensor:
    """Stands for a discriminator: the mean of each patch."""
    return patches.mean((1, 2, 3))


Cut = Callable[[Tensor, int, int, Source], Tensor]  # (images, size, patches of each, source) -> patches


def random_patches(images: Tensor, size: int, k: int, source: Source) -> Tensor:
    """By fastkd."""
    return fastkd.random_patches(images, size, k, source)[0]


def cut_by(crop: bench_crop.Crop, images: Tensor, size: int, k: int, source: Source) -> Tensor:
    """By a function that crops at given places."""
    if source is None:
        offsets = torch.randint(0, images.shape[-1] - size + 1, (len(images), k, 2), device=images.device)
    else:
        offsets = fastkd.random_patches(images.detach(), size, k, source)[1]
    return crop(images, offsets, size)


PATCHES: dict[str, Cut] = {
    OURS: random_patches,
    **{
        name: partial(cut_by, bench_crop.PEERS[name])
        for name in ("advanced-index gather", "grid_sample, nearest", "unfold and gather")
    },
}


def _patches(settings: Settings, most: int, k: int, size: int, width: int, judge_width: int, *, networks: bool) -> Case:
    batch = at_most(settings, most)

    def build() -> Work:
        latent = torch.randn(batch, LATENT, device=settings.device)
        if networks:
            model, judge = images_from(width).to(settings.device), discriminator(judge_width).to(settings.device)
        else:
            model, judge = Given(torch.rand(batch, 3, SIDE, SIDE, device=settings.device)), realness

        def step(cut: Cut) -> Losses:
            def losses(model: nn.Module, source: Source) -> Iterator[Tensor]:
                verdict = judge(cut(model(latent), size, k, source))
                real = torch.ones_like(verdict)
                yield F.binary_cross_entropy_with_logits(verdict, real, reduction="sum") / batch

            return losses

        contenders = {name: step(cut) for name, cut in PATCHES.items()}
        return work(settings, model, contenders, contenders["advanced-index gather"])

    name = f"patch discriminator, {batch}x3x{SIDE}x{SIDE} k={k} L={size}"
    return Case(step_name(name, networks), build, batch * BYTES_OF_AN_IMAGE)


# Samples with clean labels: a loss of each, a mixture of two, the loss of those of the lower component.

Select = Callable[[Tensor], Tensor]  # losses [n] -> mask [n]


def select_clean(losses: Tensor) -> Tensor:
    """By fastkd."""
    return fastkd.select_clean(losses)[0]


def sklearn_select(losses: Tensor) -> Tensor:
    """As the public code of TA-DFKD and DivideMix does it."""
    from sklearn.mixture import GaussianMixture

    x = losses.cpu().numpy()[:, None]
    x = (x - x.min()) / (x.max() - x.min())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged after so few iterations
        mixture = GaussianMixture(2, random_state=0, **bench_gmm.SETTINGS).fit(x)
    clean = mixture.predict_proba(x)[:, mixture.means_.argmin()] > 0.5
    return torch.from_numpy(clean).to(losses.device)


def reference_select(losses: Tensor) -> Tensor:
    """By the reference of the mixture, in float64."""
    values = losses.double().cpu().numpy()
    fit = reference.fit(values, normalize=True, **bench_gmm.SETTINGS)
    return torch.from_numpy(reference.posterior(values, fit.mixture) > 0.5).to(losses.device)


SELECTION: dict[str, Select] = {OURS: select_clean, "scikit-learn": sklearn_select}
OTHER_MASK = 0.3  # scikit-learn starts elsewhere: some samples at the border, and their part of the gradient


def _selection(settings: Settings, most: int, depth: int | None, *, networks: bool) -> Case:
    n = at_most(settings, most)
    batch = SELECTION_BATCH if networks else n

    def build() -> Work:
        shape = (n, 1, 8, 8) if depth is None else (n, 3, SIDE, SIDE)
        images = torch.rand(shape, device=settings.device)
        model = _student(depth, shape) if networks else Given(_logits(n, settings))
        model = model.to(settings.device)
        with torch.no_grad():
            first = torch.cat([copy.deepcopy(model)(part) for part in images.split(batch)])
        # two kinds of losses, as a network has that is past its first epochs: it is sure of the clean labels
        noisy = torch.rand(n, device=settings.device) < NOISY
        target = torch.where(noisy, first.argmin(1), first.argmax(1))

        def round_of(select: Select) -> Losses:
            def losses(model: nn.Module, _source: Source) -> Iterator[Tensor]:
                parts = list(zip(images.split(batch), target.split(batch), strict=True))
                with torch.no_grad():
                    every = [F.cross_entropy(model(x), y, reduction="none") for x, y in parts]
                clean = select(torch.cat(every)).split(batch)
                for (x, y), mask in zip(parts, clean, strict=True):
                    loss = F.cross_entropy(model(x), y, reduction="none")
                    yield (loss * mask).sum() / mask.sum().clamp(min=1)

            return losses

        contenders = {name: round_of(select) for name, select in SELECTION.items()}
        return work(settings, model, contenders, round_of(reference_select), OTHER_MASK)

    what = "step" if n <= SELECTION_BATCH else f"epoch in batches of {SELECTION_BATCH}"
    nbytes = min(n, SELECTION_BATCH) * BYTES_OF_AN_IMAGE + 4 * n * (64 if depth is None else 3 * SIDE**2)
    return Case(step_name(f"select clean {n}, {what} of {_student_name(depth)}", networks), build, nbytes)


# An epoch on a collection: draw by score, augment, student, KL to the teacher's logits.


class Collection(NamedTuple):
    """Images and what an epoch needs to draw them; ``stored`` is where a DataLoader finds them, in host memory."""

    images: Tensor
    teacher_logits: Tensor
    table: fastkd.AliasTable
    weights: Tensor
    stored: TensorDataset
    draws: int
    batch: int


Batches = Callable[[Collection, Source], Iterator[tuple[Tensor, Tensor]]]  # augmented images, teacher's logits


def drawn_batches(of: Collection, source: Source) -> Iterator[tuple[Tensor, Tensor]]:
    """By fastkd."""
    for _ in range(of.draws // of.batch):
        views, drawn = fastkd.draw_batch(
            of.table, of.images, of.batch, padding=PADDING, mean=MEAN, std=STD, generator=source
        )
        yield views, of.teacher_logits[drawn]


def multinomial_batches(of: Collection, source: Source) -> Iterator[tuple[Tensor, Tensor]]:
    """All draws of the epoch at once, on the device, then a batch after the other."""
    once = partial(torch.multinomial, of.weights, of.draws, replacement=True)
    draws = once() if source is None else of.table.sample(of.batch, source)
    for drawn in draws.split(of.batch):
        yield plain_crop_flip(of.images[drawn], source), of.teacher_logits[drawn]


def loaded_batches(by_item: bool, of: Collection, source: Source) -> Iterator[tuple[Tensor, Tensor]]:
    """By a DataLoader in this process, which indexes item by item or with the list of a batch."""
    sampler = (
        WeightedRandomSampler(of.weights, of.draws) if source is None else of.table.sample(of.batch, source).tolist()
    )
    if by_item:
        loader = DataLoader(of.stored, of.batch, sampler=sampler)
    else:
        loader = DataLoader(of.stored, None, sampler=BatchSampler(sampler, of.batch, drop_last=False))
    for images, logits in loader:
        yield plain_crop_flip(images.to(of.images.device), source), logits.to(of.images.device)


COLLECTION: dict[str, tuple[Batches, Callable[..., Tensor]]] = {
    OURS: (drawn_batches, fastkd.KLDivLoss(COLLECTION_TEMPERATURE)),
    **{
        name: (batches, partial(eager_kl, temperature=COLLECTION_TEMPERATURE))
        for name, batches in {
            "multinomial, index, augment": multinomial_batches,
            "DataLoader, by batch": partial(loaded_batches, False),
            "DataLoader, by item": partial(loaded_batches, True),
        }.items()
    },
}


def _collection(
    settings: Settings, most_items: int, most_draws: int, most: int, depth: int | None, *, networks: bool
) -> Case:
    items, batch = at_most(settings, most_items), at_most(settings, most)
    draws = batch * max(1, min(most_draws, items) // batch)

    def build() -> Work:
        images, logits = _bytes(settings, (items, 3, SIDE, SIDE)), _logits(items, settings)
        table = fastkd.AliasTable(fastkd.scores.t1000(logits), iqpr=IQPR, seed=0)
        stored = TensorDataset(images.cpu(), logits.cpu())
        collection = Collection(images, logits, table, table.probabilities().float(), stored, draws, batch)
        student = _student(depth, images.shape) if networks else Given(_logits(batch, settings))

        def epoch(batches: Batches, criterion: Callable[..., Tensor]) -> Losses:
            def losses(model: nn.Module, source: Source) -> Iterator[Tensor]:
                for views, teacher_logits in batches(collection, source):
                    yield criterion(model(views), teacher_logits)

            return losses

        contenders = {name: epoch(*pieces) for name, pieces in COLLECTION.items()}
        truth = contenders["multinomial, index, augment"]
        return work(settings, student.to(settings.device), contenders, truth)

    name = f"collection of {short_count(items)}, {draws} draws in batches of {batch}, {_student_name(depth)}"
    return Case(step_name(name, networks), build, items * 3 * SIDE**2 + batch * BYTES_OF_AN_IMAGE)


def test_training(case: Case, contest: Contest) -> None:
    """Each case."""
    contest(case)
