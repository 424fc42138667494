"""Experiments on unlabeled collections: what they are put together from, their scores, and what is drawn from them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastkd import statistics
from fastkd._seeding import mixed_generator
from fastkd.alias_table import AliasTable
from fastkd.data import ArrayCollection, Batch, Collection, DrawnBatches, ImageSet
from fastkd.data.collection import evenly_spaced
from fastkd.data.opening import open_collection, places_of
from fastkd.data.source import check_start
from fastkd.functional import logit_stats
from fastkd.models.digests import weights_digest
from fastkd.patches import random_crop_flip
from fastkd.scores import LogitScore, ScoreName, make_scorer
from fastkd.scoring import open_scores, score_collection
from fastkd.scoring.score_file import about_path
from fastkd.studies import data as images
from fastkd.studies.data import DataSettings

__all__ = ["Collected", "CollectionSettings", "make_collection", "scores_of"]

TASK, REST, OTHERS = "task", "rest", "others"
PREDICTION = "prediction"  # a score that is the class that the teacher predicts
MOST_IN_MEMORY = 8e9  # bytes of images, of the CPU
LONG_RUN = 15  # draws for each image, about as many as of rel + irrel in Begon & Geurts: 6.75 million of 486,000
DRAWS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class CollectionSettings:
    """On which images a student learns, where they are not those of its teacher, and how they are drawn."""

    collection: str = ""
    """An unlabeled collection to learn on, in the place of the training images, without their labels: a folder, an .npy, the
    name of a data set; "task", the teacher's training images, "rest", those of its data set that it has not seen, or "others",
    those of classes that are not the task's. Several with commas between; name=place calls one by a name, place:N takes N
    images of it."""
    score: ScoreName = "1c-sum"
    """How much an image looks like the teacher's task, as of `fastkd score`."""
    scores: Path | None = None
    """The .npy of `fastkd score`, if the collection was scored before."""
    iqpr: float = 1.0
    """Inter-quartile sampling probability ratio: how many times as often an image at the third quartile of the scores is drawn
    as one at the first. 1: all are drawn equally often, and nothing is scored."""
    lowest_share: float = 1.0
    """Share of the collection that is drawn from: its images of the lowest scores. With the score "entropy", those of which the
    teacher is least sure, as MosaicKD takes them out of ImageNet and Places365."""
    balanced: bool = False
    """Draw all classes that the teacher predicts equally often."""
    draws: int = 5000
    """Images of an epoch, drawn with replacement."""
    unreadable: Literal["error", "skip"] = "error"
    """Files that cannot be read: an error that names the first, or left out."""
    held_out: float = 0.1
    """Share of the collection that is not drawn from: the loss on it is what the schedule "plateau" follows."""

    def __post_init__(self) -> None:
        for name, good, allowed in (
            ("iqpr", 1.0 <= self.iqpr < float("inf"), "1 (all alike) or more, and finite"),
            ("lowest_share", 0.0 < self.lowest_share <= 1.0, "above 0, and at most 1"),
            ("draws", self.draws >= 1, "1 or more"),
            ("held_out", 0.0 <= self.held_out < 1.0, "from 0 to below 1"),
        ):
            if not good:
                raise ValueError(f"fastkd: {name} is {getattr(self, name)}, must be {allowed}")
        if self.collection:
            places_of(self.collection)
        elif self.scores is not None or self.looked_at:
            raise ValueError(
                "fastkd: collection is empty, must be given where there are scores, an iqpr, a lowest share or balanced "
                "draws"
            )
        if self.balanced and self.iqpr != 1.0:
            raise ValueError(
                f"fastkd: balanced is True, must be False with an iqpr, {self.iqpr}: draws follow from one"
            )

    @property
    def looked_at(self) -> tuple[str, ...]:
        """By which scores of the teacher the images are drawn."""
        by_score = self.iqpr != 1.0 or self.lowest_share != 1.0
        return (*([self.score] if by_score else []), *([PREDICTION] if self.balanced else []))

    def most_drawn_from(self, images: int) -> int:
        """How many of so many images are drawn from, at most: some may be unreadable."""
        return max(1, round(self.lowest_share * (images - int(self.held_out * images))))

    @property
    def relevant(self) -> tuple[str, ...]:
        """Names of the parts whose images are of the task."""
        return tuple(part.name for part in places_of(self.collection) if part.place in (TASK, REST))


def make_collection(settings: CollectionSettings, data: DataSettings, task: ImageSet, seed: int) -> Collection:
    """The collection, of images of the task's shape; on the CPU.

    Args:
        task: the teacher's training images.
        seed: of their choice.

    Raises:
        ValueError, FileNotFoundError: places where there is nothing, more images than there are.
    """
    return open_collection(
        settings.collection,
        task.images.shape[1:],
        root=data.data_root,
        unreadable=settings.unreadable,
        known={
            TASK: lambda name: ArrayCollection(task.images.cpu(), name=name),
            REST: lambda name: ArrayCollection(images.rest(data, seed), name=name),
            OTHERS: lambda name: ArrayCollection(images.others(data), name=name),
        },
    )


def scores_of(
    settings: CollectionSettings,
    collection: Collection,
    task: ImageSet,
    teacher: nn.Module,
    folder: Path,
    names: Iterable[str],
) -> dict[str, Tensor]:
    """By name, float64 ``[N]``: those that are given, or those of the folder, made where they are not there yet.

    Raises:
        ValueError, FileNotFoundError: scores of another collection or teacher, or none.
    """
    found: dict[str, Tensor] = {}
    if settings.scores is not None:
        found[settings.score] = open_scores(settings.scores, collection=collection, teacher=teacher).tensor()
    for score in names:
        if score not in found:
            name = f"{score}-{collection.fingerprint()[:10]}-{weights_digest(teacher)[:10]}.npy"
            scorer = LogitScore(teacher, _prediction) if score == PREDICTION else make_scorer(score, teacher)
            made = score_collection(scorer, collection, folder / name, name=score, mean=task.mean, std=task.std)
            found[score] = made.tensor()
    return found


def _prediction(logits: Tensor) -> Tensor:
    return logit_stats(logits).argmax


class Collected:
    """A collection on its device, with what is drawn and what is held out.

    Args:
        scores: float64 ``[N]`` each, by name; empty: all images are drawn equally often.
        batch_size: images of a batch.
    """

    def __init__(
        self,
        settings: CollectionSettings,
        collection: Collection,
        scores: Mapping[str, Tensor],
        task: ImageSet,
        *,
        batch_size: int,
        padding: int | None,
        flip: bool | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.settings, self._seed, self._task = settings, seed, task
        device = task.device
        # where a batch is one launch; a larger one is read ahead
        if len(collection) * math.prod(collection.shape) <= _room(device):
            collection = ArrayCollection.loaded(collection, device)
        self.collection = collection
        of_none = torch.zeros(len(collection), dtype=torch.float64)
        found = scores.get(settings.score, of_none).to(device, copy=True)
        for item in collection.missing:
            found[item.index] = -torch.inf
        order = torch.randperm(len(collection), generator=mixed_generator("held out", seed), device="cpu")
        held_out, kept = order.split([n := int(settings.held_out * len(collection)), len(order) - n])
        held_out = held_out[found[held_out.to(device)].isfinite().cpu()]  # what can be read
        self.drawn_from = torch.zeros(len(collection), dtype=torch.bool, device=device)
        self.drawn_from[kept.to(device)] = True
        self.drawn_from &= found.isfinite()
        if settings.lowest_share != 1.0:
            self.drawn_from &= _lowest(found, self.drawn_from, settings.lowest_share)
        # lambda follows from the quartiles of what is drawn from alone
        found = found.masked_fill(~self.drawn_from, -torch.inf)
        if settings.balanced:
            found = _balancing(scores[PREDICTION].to(device), self.drawn_from)
        iqpr = None if settings.balanced else settings.iqpr
        table = AliasTable(found, iqpr=iqpr, seed=seed)
        self.batches = DrawnBatches(
            collection,
            table,
            batch_size,
            max(1, settings.draws // (batch_size * world_size)),
            seed=seed,
            padding=task.padding if padding is None else padding,
            flip=task.flip if flip is None else flip,
            mean=task.mean,
            std=task.std,
            rank=rank,
        )
        self.held_out = _HeldOut(collection, held_out.sort().values, batch_size, task) if len(held_out) else None

    def some(self, count: int) -> Tensor:
        """At most so many of the images that are drawn from, evenly spaced, normalised, on the device of the task."""
        there = self.drawn_from.nonzero().flatten()
        index = there[evenly_spaced(len(there), count).to(there.device)]
        pixels = self.collection.read(index).to(self._task.device)
        return random_crop_flip(pixels, 0, None, 0.0, self._task.mean, self._task.std)

    def figures(self, counts: Tensor) -> dict[str, float]:
        """What the draws came to: skip ratio and uniformity of what is drawn from, and, where parts are of the task and others
        are not, the irrelevant proportion and the share of relevant draws. ``long_run_...``: the same of LONG_RUN draws for
        each image, so that collections and trainings of any size compare.

        Args:
            counts: int64 ``[N]``, the draws of each image.
        """
        table, often = self.batches.table, torch.zeros(len(counts), dtype=torch.int64, device=self.drawn_from.device)
        draws = LONG_RUN * int(self.drawn_from.sum())
        for start in range(0, draws, DRAWS_AT_ONCE):
            drawn = table.sample_at(self._seed, start, min(DRAWS_AT_ONCE, draws - start))
            statistics.draw_counts(drawn, out=often)
        long_run = self._figures_of(often.to(counts.device))
        return self._figures_of(counts) | {f"long_run_{name}": value for name, value in long_run.items()}

    def _figures_of(self, counts: Tensor) -> dict[str, float]:
        drawn = counts[self.drawn_from]
        found = {"skip_ratio": statistics.skip_ratio(drawn), "uniformity": statistics.uniformity(drawn)}
        relevant = torch.zeros(len(counts), dtype=torch.bool, device=counts.device)
        for source in self.collection.sources:
            if source.name in self.settings.relevant:
                relevant[source.start : source.stop] = True
        if relevant.any() and not relevant.all():
            found["irrelevant_proportion"] = statistics.irrelevant_proportion(drawn, relevant[self.drawn_from])
            found["relevant_draws"] = statistics.relevant_draws(drawn, relevant[self.drawn_from])
        return {name: float(value) for name, value in found.items()}


def _lowest(scores: Tensor, counted: Tensor, share: float) -> Tensor:
    """The lowest scores of those that count, a share of their number, one at least: bool ``[N]``; of equal ones the first."""
    kept = max(1, round(share * int(counted.sum())))
    order = scores.masked_fill(~counted, torch.inf).argsort(stable=True)
    chosen = torch.zeros_like(counted)
    chosen[order[:kept]] = True
    return chosen


def _balancing(predictions: Tensor, counted: Tensor) -> Tensor:
    """Scores whose softmax gives each class that is predicted the same probability, and its images equal parts of it."""
    classes = predictions.masked_fill(~counted, 0.0).long()  # images that cannot be read have none
    often = torch.bincount(classes[counted], minlength=int(classes.max()) + 1)
    return (-often[classes].double().log()).masked_fill(~counted, -torch.inf)


def _room(device: torch.device) -> float:
    """Bytes that a collection may take there: a half of what is free on a GPU."""
    return torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else MOST_IN_MEMORY


class _HeldOut:
    """Images of a collection, as they are, in their order."""

    def __init__(self, collection: Collection, index: Tensor, batch_size: int, task: ImageSet) -> None:
        self._collection, self._parts = collection, index.split(batch_size)
        self._task = task

    def __len__(self) -> int:
        return len(self._parts)

    def epoch(self, epoch: int, /, start: int = 0) -> Iterator[Batch]:
        _, start = check_start(self, epoch, start)
        task = self._task
        for index in self._parts[start:]:
            pixels = self._collection.read(index).to(task.device)
            yield Batch(random_crop_flip(pixels, 0, None, 0.0, task.mean, task.std), index=index.to(task.device))


def described(settings: CollectionSettings) -> dict[str, Any]:
    """What a result depends on."""
    found = {name: getattr(settings, name) for name in ("collection", "score", "iqpr", "draws", "held_out")}
    if settings.scores is not None:
        about = about_path(settings.scores)
        found["score"] = hashlib.sha256(about.read_bytes()).hexdigest() if about.is_file() else str(settings.scores)
    elif settings.score not in settings.looked_at:
        del found["score"]
    for name in ("lowest_share", "balanced"):  # descriptions are those of the time before there was this option
        if (value := getattr(settings, name)) != getattr(CollectionSettings, name):
            found[name] = value
    return found
