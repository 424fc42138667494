"""The training and test set of an experiment: a data set, or a part of it, with wrong labels or unequal classes."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastkd._seeding import mixed_generator
from fastkd.data import labels
from fastkd.data import registry as data_sets
from fastkd.data.images import ImageSet
from fastkd.data.label_files import read_labels
from fastkd.data.registry import Outline
from fastkd.data.weak_classifier import weak_classifier

__all__ = ["DataSettings", "check", "check_label_file", "clean", "others", "prepare", "rest", "wrong_labels"]

_KEPT = 4  # probabilities of weak classifiers: of the images of a teacher and of its student, with seeds of their own


@dataclass(frozen=True)
class DataSettings:
    """Which images, how many, and what is wrong with them."""

    data: str = "cifar10"
    """cifar10, cifar100, mnist, fashion-mnist, kmnist, quickdraw, digits or, with a class for each pixel, scenes."""
    classes: tuple[int, ...] = ()
    """Classes of the task, by their numbers in the set; images of the others are left out. By default all."""
    data_root: Path | None = None
    """The folder of the data sets; $FASTKD_DATA or ~/.cache/fastkd/data by default. Nothing is downloaded."""
    train_size: int = 0
    """Training images, the same number of each class, chosen by the seed; of scenes any number; 0: all."""
    test_size: int = 0
    """Test images, chosen at random, the same for every seed; 0: all."""
    shrink: int = 1
    """Images are averaged over squares of so many pixels: 2 is half the size, and a quarter of the time."""
    label_noise: float = 0.0
    """Share of the training labels that are wrong."""
    noise: Literal["symmetric", "asymmetric", "instance", "file"] = "symmetric"
    """Wrong labels: any other class; one that is mistaken for it; instance: on images that a weak classifier errs on, of the
    classes that it takes them for; file: those of a label file, without a label_noise."""
    label_file: Path | None = None
    """With the noise "file": the labels of all training images of the set, in its order, as .npy, .pt, .json, .csv or .txt,
    CIFAR-10_human.pt of CIFAR-10N for instance. Images are chosen by their true classes."""
    label_key: str = ""
    """Which labels of the file, where it has several: worst, aggre, random1, noisy, or a name as it has them."""
    imbalance: float = 0.0
    """gamma of the power law of the classes' sizes; the smaller, the more unequal they are. 0: as they are."""
    imbalance_ratio: float = 20.0
    """With imbalance: the largest class is so many times as large as the smallest."""

    def __post_init__(self) -> None:
        for name, good, allowed in (
            ("train_size", self.train_size >= 0, "0 (all) or more"),
            ("test_size", self.test_size >= 0, "0 (all) or more"),
            ("shrink", self.shrink >= 1, "1 or more"),
            ("label_noise", 0.0 <= self.label_noise < 1.0, "from 0 to below 1"),
            ("imbalance", self.imbalance == 0.0 or 0.01 <= self.imbalance <= 100.0, "0 (off) or from 0.01 to 100"),
            ("imbalance_ratio", 1.0 <= self.imbalance_ratio < math.inf, "1 or more, and finite"),
        ):
            if not good:
                raise ValueError(f"fastkd: {name} is {getattr(self, name)}, must be {allowed}")
        for name in ("label_file", "label_key"):
            if getattr(self, name) and self.noise != "file":
                raise ValueError(f"fastkd: noise is {self.noise!r}, must be 'file' with a {name}")
        if self.noise == "file" and self.label_file is None:
            raise ValueError("fastkd: label_file is None, must be given with the noise 'file'")
        if self.noise == "file" and self.label_noise:
            raise ValueError(
                f"fastkd: label_noise is {self.label_noise}, must be 0 with the noise 'file': its labels are as they are"
            )
        if self.classes and (
            len(set(self.classes)) != len(self.classes) or len(self.classes) < 2 or min(self.classes) < 0
        ):
            raise ValueError(f"fastkd: classes is {self.classes}, must be two or more different numbers, 0 or above")


def check(settings: DataSettings) -> Outline:
    """What the images of these settings will be, without a look at the files.

    Raises:
        ValueError: an unknown name; more images than the set has, or smaller ones than of a pixel; what a set with a class for
            each pixel cannot be.
    """
    try:
        outline = data_sets.outline(settings.data)
    except ValueError as error:
        raise ValueError(str(error).replace("fastkd: name", "fastkd: data name", 1)) from None
    _check_noise(settings, outline)
    outline = _of_classes(settings, outline)
    classes, train_size, smallest = (
        outline.num_classes,
        settings.train_size or outline.train_size,
        outline.smallest_class,
    )
    if outline.dense:
        _check_size("train_size", settings.train_size, outline.train_size, "training")
    elif classes is not None and settings.train_size:
        _check_train_size(settings.train_size, classes, None if smallest is None else smallest * classes)
        smallest = settings.train_size // classes
    if classes is not None and smallest is not None and settings.imbalance:
        train_size = sum(_class_sizes(settings, classes, smallest))
    _check_size("test_size", settings.test_size, outline.test_size, "test")
    channels, height, width = outline.shape
    _check_shrink(settings.shrink, height, width)
    return Outline(
        shape=(channels, height // settings.shrink, width // settings.shrink),
        num_classes=classes,
        train_size=train_size,
        smallest_class=None if settings.imbalance else smallest,
        test_size=settings.test_size or outline.test_size,
        dense=outline.dense,
    )


def _check_noise(settings: DataSettings, outline: Outline) -> None:
    """Whether there is as much noise as its kind needs, and of dense sets nothing that is said of the classes of images."""
    if outline.dense:
        _check_dense(settings)
    if settings.noise == "instance" and not settings.label_noise:
        raise ValueError(f"fastkd: label_noise is {settings.label_noise}, must be above 0 with the noise 'instance'")


def _check_dense(settings: DataSettings) -> None:
    """Whether what is said of the classes of images is said of none."""
    names = ["classes", "shrink", "label_noise", "imbalance", "label_file", "label_key"]
    if settings.noise in ("instance", "file"):
        names.append("noise")
    for name in names:
        value, usual = (getattr(of, name) for of in (settings, DataSettings))
        if value != usual:
            raise ValueError(
                f"fastkd: {name} is {value}, must be {usual} for {settings.data}, where each pixel has a class"
            )


def check_label_file(settings: DataSettings) -> None:
    """The label file, where there is one: whether it is there, and as many labels in it as the set has training images, as far
    as that is known without these.

    Raises:
        ValueError, FileNotFoundError: it is not there, damaged, or of another set.
    """
    if settings.label_file is not None:
        outline = data_sets.outline(settings.data)
        read_labels(
            settings.label_file,
            settings.label_key or None,
            num_classes=outline.num_classes,
            count=outline.train_size,
        )


def _of_classes(settings: DataSettings, outline: Outline) -> Outline:
    """Of the task's classes alone."""
    if not settings.classes:
        return outline
    if outline.num_classes is not None:
        _check_classes(settings.classes, outline.num_classes)
    of_files = {"train_size": None, "smallest_class": None, "test_size": None}
    return Outline(**{**outline._asdict(), **of_files, "num_classes": len(settings.classes)})


def _check_classes(classes: tuple[int, ...], there: int) -> None:
    if max(classes) >= there:
        raise ValueError(f"fastkd: classes is {classes}, must be below {there}, the number of classes of the set")


def _check_train_size(size: int, num_classes: int, most: int | None) -> None:
    if size % num_classes or (most is not None and size > most):
        at_most = "" if most is None else f" and at most {most}"
        raise ValueError(f"fastkd: train_size is {size}, must be a multiple of the {num_classes} classes{at_most}")


def _check_size(name: str, size: int, there: int | None, part: str) -> None:
    if there is not None and size > there:
        raise ValueError(f"fastkd: {name} is {size}, must be at most the {there} {part} images")


def _check_shrink(factor: int, height: int, width: int) -> None:
    if factor > min(height, width):
        raise ValueError(
            f"fastkd: shrink is {factor}, must be at most the side of the images, {min(height, width)} pixels"
        )


def prepare(settings: DataSettings, seed: int) -> tuple[ImageSet, ImageSet]:
    """Training and test set on the CPU; the seed says which images are taken and which labels are wrong.

    Raises:
        ValueError, FileNotFoundError: as :func:`fastkd.data.registry.load`, and of a label file as
            :func:`fastkd.data.label_files.read_labels`; more images than there are; what a set with a class for each pixel
            cannot be; a label of the file that is none of the task's classes.
    """
    train, given, test = _prepared(settings, seed)
    return train.with_target(given), test


def clean(settings: DataSettings) -> bool:
    """Whether all training images have the labels of the set."""
    return not settings.label_noise and settings.label_file is None


def wrong_labels(settings: DataSettings, seed: int) -> Tensor:
    """Which labels of the training set of :func:`prepare` are not the true ones: bool ``[N]``, on the CPU.

    Raises:
        ValueError, FileNotFoundError: as :func:`prepare`.
    """
    train, given, _ = _prepared(settings, seed)
    return (given != train.target).flatten(1).any(1) if train.dense else given != train.target


def _prepared(settings: DataSettings, seed: int) -> tuple[ImageSet, Tensor, ImageSet]:
    """The training set with its true labels, the labels that it is to have, and the test set."""
    _check_noise(settings, data_sets.outline(settings.data))
    whole, test = data_sets.load(settings.data, settings.data_root)
    train, test = (_only(part, settings.classes) for part in (whole, test))
    kept = torch.arange(len(whole), device="cpu")  # of the whole set, those in the training set
    if settings.classes:
        kept = kept[_of_task(whole, settings.classes)]
    if settings.train_size:
        part = _part(train, settings.train_size, seed)
        train, kept = train.subset(part), kept[part]
    if settings.test_size:
        _check_size("test_size", settings.test_size, len(test), "test")
        # the same ones for every seed
        order = torch.randperm(len(test), generator=mixed_generator("test part", settings.test_size), device="cpu")
        test = test.subset(order[: settings.test_size].sort().values)
    if settings.imbalance:
        part = _unequal(train, settings, seed)
        train, kept = train.subset(part), kept[part]
    train, test = _shrunk(train, settings.shrink), _shrunk(test, settings.shrink)
    given = train.target
    if settings.label_file is not None:
        given = _of_file(settings, whole, kept)
    elif settings.label_noise:
        given = _mislabelled(train, settings, seed)
    return train, given, test


def _only(images: ImageSet, classes: tuple[int, ...]) -> ImageSet:
    """Images of these classes, which are numbered anew, in this order."""
    if not classes:
        return images
    _check_classes(classes, images.num_classes)
    kept = images.subset(_of_task(images, classes))
    names = tuple(images.class_names[label] for label in classes)
    return replace(kept, target=_numbers(images, classes)[kept.target], class_names=names)


def _of_task(images: ImageSet, classes: tuple[int, ...]) -> Tensor:
    """Which images are of these classes, bool ``[N]``."""
    return _numbers(images, classes)[images.target] >= 0


def _numbers(images: ImageSet, classes: tuple[int, ...]) -> Tensor:
    """Of each class of the set, its number in the task, -1 where it is left out."""
    number = torch.full((images.num_classes,), -1, device="cpu")
    number[list(classes)] = torch.arange(len(classes), device="cpu")
    return number


def others(settings: DataSettings) -> Tensor:
    """The training images of the data set that are of none of the task's classes: uint8 ``[N, C, H, W]``, on the CPU.

    Raises:
        ValueError: there are none.
    """
    train, _ = data_sets.load(settings.data, settings.data_root)
    left = torch.ones(train.num_classes, dtype=torch.bool, device="cpu")
    left[list(settings.classes)] = False
    if not settings.classes or not left.any():
        raise ValueError(
            f"fastkd: classes is {settings.classes}, must be some of the {train.num_classes}, for images of the others"
        )
    return _shrunk(train.subset(left[train.target]), settings.shrink).images


def rest(settings: DataSettings, seed: int) -> Tensor:
    """The training images of the task that are not in the training set: uint8 ``[N, C, H, W]``, on the CPU.

    Raises:
        ValueError: all of them are.
    """
    train = _only(data_sets.load(settings.data, settings.data_root)[0], settings.classes)
    if not settings.train_size or settings.train_size == len(train):
        raise ValueError(
            f"fastkd: train_size is {settings.train_size}, must be less than the {len(train)} training images, for a rest"
        )
    left = torch.ones(len(train), dtype=torch.bool, device="cpu")
    left[_part(train, settings.train_size, seed)] = False
    return _shrunk(train.subset(left), settings.shrink).images


def _part(images: ImageSet, size: int, seed: int) -> Tensor:
    """Which training images are taken, int64 ``[size]``, ascending: as many of each class, of a dense set any."""
    if images.dense:
        _check_size("train_size", size, len(images), "training")
        order = torch.randperm(len(images), generator=mixed_generator("training part", seed), device="cpu")
        return order[:size].sort().values
    classes = images.num_classes
    smallest = int(torch.bincount(images.target, minlength=classes).min())
    _check_train_size(size, classes, smallest * classes)
    return labels.imbalanced(images.target, [size // classes] * classes, seed)


def _unequal(images: ImageSet, settings: DataSettings, seed: int) -> Tensor:
    """Which training images are taken, int64, ascending."""
    largest = int(torch.bincount(images.target, minlength=images.num_classes).min())
    counts = _class_sizes(settings, images.num_classes, largest)
    # which classes are the small ones is chosen by the seed
    places = torch.randperm(len(counts), generator=mixed_generator("class sizes", seed), device="cpu").tolist()
    return labels.imbalanced(images.target, [counts[place] for place in places], seed)


def _class_sizes(settings: DataSettings, num_classes: int, largest: int) -> list[int]:
    smallest = max(1, round(largest / settings.imbalance_ratio))
    return labels.power_law_counts(num_classes, settings.imbalance, largest, smallest)


def _mislabelled(images: ImageSet, settings: DataSettings, seed: int) -> Tensor:
    rate, classes = settings.label_noise, images.num_classes
    if settings.noise == "instance":
        return labels.instance_noise(images.target, _weak_probabilities(images, seed), rate, seed)[0]
    if settings.noise == "symmetric":
        return labels.symmetric_noise(images.target, rate, classes, seed)[0]
    mapping = _confusions(settings) if settings.data.lower() == "cifar10" else None
    return labels.asymmetric_noise(images.target, rate, classes, seed, mapping)[0]


_weak: dict[str, Tensor] = {}


def _weak_probabilities(images: ImageSet, seed: int) -> Tensor:
    """Of the weak classifier, float64 ``[N, K]``; kept, as a run prepares its images more than once."""
    of = hashlib.blake2b(f"{tuple(images.images.shape)} {images.num_classes} {seed}".encode())
    for part in (images.images, images.target):
        of.update(part.contiguous().numpy().data)
    found = _weak.pop(of.hexdigest(), None)
    if found is None:
        found = weak_classifier(images.images, images.target, images.num_classes, seed)
    _weak[of.hexdigest()] = found  # the last one used stands last
    while len(_weak) > _KEPT:
        del _weak[next(iter(_weak))]
    return found


def _of_file(settings: DataSettings, whole: ImageSet, kept: Tensor) -> Tensor:
    """The labels that the file has for those that are kept, by their numbers in the task."""
    assert settings.label_file is not None
    key = settings.label_key or None
    given = read_labels(settings.label_file, key, num_classes=whole.num_classes, truth=whole.target)[kept]
    if not settings.classes:
        return given
    given = _numbers(whole, settings.classes)[given]
    if others := int((given < 0).sum()):
        raise ValueError(
            f"fastkd: label_file is {settings.label_file}, which gives {others} of the {len(given)} training images a class "
            f"that is not in classes, {settings.classes}, must have these alone for them"
        )
    return given


def _confusions(settings: DataSettings) -> dict[int, int]:
    """Of CIFAR-10's classes, by the numbers that they have in the task; of those alone whose both are in it."""
    classes = settings.classes or tuple(range(10))
    number = {label: i for i, label in enumerate(classes)}
    pairs = labels.CIFAR10_CONFUSIONS.items()
    return {number[a]: number[b] for a, b in pairs if a in number and b in number}


def _shrunk(images: ImageSet, factor: int) -> ImageSet:
    if factor == 1:
        return images
    _check_shrink(factor, *images.images.shape[2:])
    pixels = torch.cat([F.avg_pool2d(part.float(), factor) for part in images.images.split(4096)])
    return replace(images, images=pixels.round().to(torch.uint8), padding=-(-images.padding // factor))
