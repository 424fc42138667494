"""What of a distillation cannot be, as its settings alone say."""

from __future__ import annotations

from fastkd.methods import NoisyLabels
from fastkd.methods.registry import Entry
from fastkd.studies.collected import CollectionSettings
from fastkd.studies.settings import Distillation

__all__ = ["check_batches", "check_collection", "check_dense", "check_needs"]

OUT_OF_DOMAIN = "out-of-domain images"  # of the needs of a method
GIVEN = ("labels", "images", "teacher", OUT_OF_DOMAIN)  # by options
BY_SCORES = ("iqpr", "lowest_share", "balanced", "scores")  # options for which a teacher looks at the collection


def check_needs(settings: Distillation, entry: Entry) -> None:
    """Whether options give what the method needs."""
    if OUT_OF_DOMAIN in entry.needs and not settings.collection.collection:
        raise ValueError(
            f"fastkd: collection is empty, must be the out-of-domain images that {entry.name!r} needs: a folder, an .npy or "
            "the name of a data set"
        )
    missing = [need for need in entry.needs if need not in GIVEN]
    if missing:
        raise ValueError(
            f"fastkd: method {entry.name!r} needs {' and '.join(missing)}, which no option gives yet: train it in Python, "
            "fastkd.training.Trainer(procedure, batches, settings)"
        )


def check_dense(settings: Distillation, entry: Entry) -> None:
    """Whether what is said of images that have a class is said of none."""
    name = settings.data.data
    if issubclass(entry.kind, NoisyLabels):
        raise ValueError(
            f"fastkd: method {entry.name!r} is for classifiers, must be another where each pixel has a class, as in {name}"
        )
    if settings.padding:
        raise ValueError(
            f"fastkd: padding is {settings.padding}, must be 0 for {name}, where each pixel has a class: crops would move the "
            "images, and not their classes"
        )
    _check_unscored(
        settings, f"for {name}: its teacher has a class for each pixel, and images are scored by classifiers"
    )


def check_batches(settings: Distillation, entry: Entry, train_size: int | None, world_size: int) -> None:
    """Whether the training images fill one, of the student and of the teacher."""
    sizes = {}
    if entry.needs_images or not settings.iterations:  # else they are made, as many as one likes
        sizes["batch_size"] = settings.batch_size
    if entry.needs_teacher and settings.teacher_weights is None:
        name = "teacher_batch_size" if settings.teacher_batch_size else "batch_size"
        sizes[name] = settings.of_teacher().batch_size
    for name, size in sizes.items():
        if train_size is not None and size * world_size > train_size:
            ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
            raise ValueError(f"fastkd: {name} is {size}{ranks}, must be at most the {train_size} images")


def check_collection(settings: Distillation, entry: Entry) -> None:
    """Whether the method learns on one, and somebody scores it."""
    if "labels" in entry.needs or not entry.needs_images:
        what = "learns from labels" if "labels" in entry.needs else "makes its own images"
        raise ValueError(
            f"fastkd: method {settings.method!r} {what}, must be another with a collection, as fixed-linear"
        )
    if not entry.needs_teacher:
        _check_unscored(settings, "without a teacher to score by")


def _check_unscored(settings: Distillation, why: str) -> None:
    for name in BY_SCORES:
        value, usual = (getattr(of, name) for of in (settings.collection, CollectionSettings))
        if value != usual:
            raise ValueError(f"fastkd: {name} is {value}, must be {usual} {why}")
