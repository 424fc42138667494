"""Methods x out-of-domain images: distillation by images that are not of the teacher's task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from fastkd.methods import registry as methods
from fastkd.studies.collected import OTHERS, TASK, CollectionSettings
from fastkd.studies.data import DataSettings
from fastkd.studies.method_options import check_options, iterations_of, options_of
from fastkd.studies.mosaic import published
from fastkd.studies.settings import Distillation
from fastkd.studies.study import Figure, Published, Study, register
from fastkd.training import TrainingSettings

__all__ = ["DOMAINS", "PATCHES", "ROWS", "Domain", "MosaicStudy", "Row"]


class Row(NamedTuple):
    """How a student learns."""

    method: str
    options: Mapping[str, Any] = MappingProxyType({})
    balanced: bool = False


class Domain(NamedTuple):
    """On which images."""

    place: str
    """As of :attr:`fastkd.studies.collected.CollectionSettings.collection`."""
    published: str = ""
    """The nearest of the paper's."""
    uncertain: bool = False
    """Whether only those are taken of which the teacher is least sure."""


_DATA_FREE = ("dafl", "zskt", "deep-inversion", "dfq")
PATCHES = {f"patches-{size}": size for size in published.SIZES}
"""Rows of the ablation: MosaicKD by the size of its patches, in pixels of images of 32 x 32."""
FULL_SIDE = 32
ROWS: dict[str, Row] = {
    **{name: Row(name) for name in _DATA_FREE},
    "kd": Row("ood-kd"),
    "balanced": Row("ood-kd", balanced=True),
    **{name: Row(f"ood-{name}") for name in ("fitnet", "rkd", "crd", "sskd")},
    "mosaic": Row("mosaic"),
    "no-patches": Row("mosaic", {"local": 0.0}),
    **{name: Row("mosaic") for name in PATCHES},
}
DOMAINS: dict[str, Domain] = {
    "task": Domain(TASK, "cifar-100"),
    "others": Domain(OTHERS, "cifar-10"),
    "uncertain": Domain(OTHERS, "imagenet", uncertain=True),
    "cifar10": Domain("cifar10", "places365"),
    "fashion-mnist": Domain("fashion-mnist", "svhn"),
    "mnist": Domain("mnist", "svhn"),
    "quickdraw": Domain("quickdraw", "svhn"),
}
USUAL = tuple(row for row in ROWS if row not in (*_DATA_FREE, "no-patches", *PATCHES))


@register("mosaic")
@dataclass(frozen=True)
class MosaicStudy(Study):
    """Distillation from out-of-domain images: "Mosaicking to Distill: Knowledge Distillation from Out-of-Domain Data"
    (MosaicKD, NeurIPS 2021).

    The teacher learns some classes of a data set; students learn from it on images of others, without labels. A row is a
    method: kd, balanced, fitnet, rkd, crd, sskd and mosaic; those without data, as dafl; and, for the ablation, patches-1 to
    patches-32, MosaicKD by the size of its patches, in pixels of images of 32 x 32, or no-patches, without them. A column is
    where the images are from. Students of a row make as many updates. Writes tables of the accuracy and of Frechet distances
    beside the paper's, and the course of the accuracy. The same command goes on where it was interrupted.
    """

    all_rows: ClassVar[tuple[str, ...]] = tuple(ROWS)
    all_columns: ClassVar[tuple[str, ...]] = tuple(DOMAINS)
    baseline: ClassVar[str] = "kd"
    row_option: ClassVar[str] = "methods"
    column_option: ClassVar[str] = "domains"
    of_the_grid: ClassVar[Mapping[str, str]] = {}

    methods: tuple[str, ...] = USUAL
    """Those of the paper, or any that `fastkd methods` lists and that needs out-of-domain images, or nothing, and a teacher."""
    domains: tuple[str, ...] = ("others", "uncertain", "fashion-mnist", "quickdraw")
    """task (the teacher's training images), others (of its data set, of other classes), uncertain (those of them of which the
    teacher is least sure), cifar10, fashion-mnist, mnist or quickdraw."""
    images: int = 20000
    """Images of each domain, evenly spaced; 0: all. Of task all are taken."""
    uncertain_share: float = 0.5
    """Of others, those with the highest entropy of the teacher's prediction."""
    method_options: tuple[str, ...] = ()
    """Options of all methods that have them, as width=16, or of one row, as mosaic.patch_size=8."""
    data: DataSettings = field(default_factory=lambda: DataSettings(classes=(2, 3, 4, 5, 6, 7)))
    """The teacher's task: by default the animals of CIFAR-10; its vehicles are the others."""
    collection: CollectionSettings = field(default_factory=lambda: CollectionSettings(draws=50000, held_out=0.0))
    """How many images are drawn in an epoch, each for one update of the student."""
    training: TrainingSettings = field(default_factory=lambda: TrainingSettings(learning_rate=0.1, nesterov=False))
    """The training of the student, and, but for what teacher_... says, of the teacher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.collection
        for name in ("collection", "iqpr", "least_alike", "balanced", "scores"):
            if (value := getattr(given, name)) != getattr(CollectionSettings, name):
                raise ValueError(f"fastkd: {name} is {value!r}, must not be given: domains says which images")
        if self.images < 0:
            raise ValueError(f"fastkd: images is {self.images}, must be 0 (all) or more")
        if not 0.0 < self.uncertain_share < 1.0:
            raise ValueError(f"fastkd: uncertain_share is {self.uncertain_share}, must be above 0 and below 1")
        check_options(self.method_options)

    def row_names(self) -> tuple[str, ...]:
        there = methods.names()
        ours = [name for name, row in ROWS.items() if row.method in there]
        known = {row.method for row in ROWS.values()}
        return (*ours, *(name for name in there if _may_be(name) and name not in known))

    def column_names(self) -> tuple[str, ...]:
        """Not the task's own set; and others, where the task has not all classes of it."""
        own = (self.data.data.lower(), *(() if self.data.classes else (OTHERS,)))
        return tuple(name for name, domain in DOMAINS.items() if domain.place not in own)

    def distillation(self, row: str, column: str, seed: int) -> Distillation:
        way, domain = ROWS.get(row, Row(row)), DOMAINS[column]
        fixed = dict(way.options)
        if row in PATCHES:
            fixed["patch_size"] = max(1, round(PATCHES[row] / self.data.shrink))
        options = options_of(self.method_options, row, way.method, fixed)
        common: dict[str, Any] = {**self.common(), "training": replace(self.training, seed=seed)}
        if methods.find(way.method).needs_images:
            few = self.images and domain.place != TASK
            common["collection"] = replace(
                self.collection,
                collection=f"{domain.place}:{self.images}" if few else domain.place,
                score="entropy",
                least_alike=self.uncertain_share if domain.uncertain else 1.0,
                balanced=way.balanced,
            )
        else:
            updates = max(1, self.collection.draws // self.batch_size)
            common["iterations"] = iterations_of(way.method, options, updates)
            common["collection"] = CollectionSettings()
        return Distillation(**common, method=way.method, options=options)

    def published(self, column: str) -> tuple[str, Mapping[str, Published]]:
        name = DOMAINS[column].published
        rows = dict(published.ACCURACY[name])
        sizes = published.ABLATION.get(name, {})
        rows |= {row: Published(sizes[size], 0.0) for row, size in PATCHES.items() if size in sizes}
        return f"CIFAR-100, WRN-40-2 to WRN-16-1, images of {name.upper()}", rows

    def figures_shown(self) -> tuple[Figure, ...]:
        """With the published distances of the patches."""
        patches = {
            column: {row: Published(sizes[size], 0.0) for row, size in PATCHES.items()}
            for column, domain in DOMAINS.items()
            if (sizes := published.FRECHET_DISTANCE.get(domain.published))
        }
        seen = "in the inputs of the teacher's last layer"
        return (
            Figure("peak_accuracy", "peak accuracy, %", {}),
            Figure(
                "test_mean_iou", "mean IoU, %; published: NYUv2, images of ImageNet", _for_all(published.SEGMENTATION)
            ),
            Figure(
                "frechet_distance", f"Frechet distance of the images made to the test images, {seen}", {}, scale=1.0
            ),
            Figure(
                "collection_frechet_distance",
                f"Frechet distance of the out-of-domain images to the test images, {seen}",
                {},
                scale=1.0,
            ),
            Figure(
                "patch_frechet_distance",
                f"Frechet distance of patches of out-of-domain images to those of test images, {seen}; published: in "
                "Inception's features",
                patches,
                scale=1.0,
            ),
        )


def _for_all(rows: Mapping[str, Published]) -> dict[str, Mapping[str, Published]]:
    return dict.fromkeys(DOMAINS, rows)


def _may_be(name: str) -> bool:
    """Whether a method needs a teacher and no labels."""
    needs = set(methods.find(name).needs)
    return "teacher" in needs and needs <= {"teacher", "out-of-domain images"}
