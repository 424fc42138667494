"""Methods x out-of-domain images: distillation by images that are not of the teacher's task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from fastkd.methods import registry as methods
from fastkd.studies import data as data_sets
from fastkd.studies.collected import OTHERS, TASK, CollectionSettings
from fastkd.studies.data import DataSettings
from fastkd.studies.method_options import check_known, check_options, iterations_of, options_of
from fastkd.studies.mosaic import published
from fastkd.studies.result import MEAN_IOU
from fastkd.studies.settings import Distillation
from fastkd.studies.study import Accuracies, Figure, Published, Run, Study, register
from fastkd.training import TrainingSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

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
FULL_SIDE, PATCH = 32, 10  # pixels of the paper's images, and of its patches
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
    "cifar10": Domain("cifar10", "cifar-10"),
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
    where the images are from. All rows make the same number of updates of the student; those without data do not depend on the
    column. Writes tables of the accuracy and of Frechet distances beside the paper's, and the course of the accuracy. The same
    command goes on where it was interrupted.
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
    """How many images are drawn in an epoch; a batch of them is for one update of the student."""
    batch_size: int = 256
    """Images of a batch, in each process."""
    training: TrainingSettings = field(
        default_factory=lambda: TrainingSettings(learning_rate=0.1, weight_decay=1e-4, nesterov=False)
    )
    """The training of the student, and, but for what teacher_... says, of the teacher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.collection
        for name in ("collection", "score", "iqpr", "lowest_share", "balanced", "scores"):
            if (value := getattr(given, name)) != getattr(CollectionSettings, name):
                raise ValueError(f"fastkd: {name} is {value!r}, must not be given: domains says which images")
        if self.iterations:
            raise ValueError(f"fastkd: iterations is {self.iterations}, must not be given: draws says how many")
        if self.images < 0:
            raise ValueError(f"fastkd: images is {self.images}, must be 0 (all) or more")
        if not 0.0 < self.uncertain_share < 1.0:
            raise ValueError(f"fastkd: uncertain_share is {self.uncertain_share}, must be above 0 and below 1")
        check_options(self.method_options)

    def pictures(self, accuracies: Accuracies, figures: Mapping[str, Accuracies]) -> Mapping[str, Picture]:
        """Of the ablation, where two sizes or more were run, by the accuracy."""
        if self.measure == MEAN_IOU or len({row for rows in accuracies.values() for row in rows} & set(PATCHES)) < 2:
            return {}
        from fastkd.studies.mosaic.figure import patch_sizes  # matplotlib takes a second to import

        names = {column: domain.published for column, domain in DOMAINS.items()}
        theirs = {
            c: (name.upper(), published.ABLATION[name]) for c, name in names.items() if name in published.ABLATION
        }
        return {"patches": patch_sizes(PATCHES, accuracies, figures.get("patch_frechet_distance", {}), theirs)}

    def row_names(self) -> tuple[str, ...]:
        there = methods.names()
        ours = [name for name, row in ROWS.items() if row.method in there and self._fixed(name).get("patch_size", 1)]
        known = {row.method for row in ROWS.values()}
        return (*ours, *(name for name in there if _may_be(name) and name not in known))

    def column_names(self) -> tuple[str, ...]:
        return tuple(name for name in DOMAINS if not self._why_not(name))

    def grid(self, rows: Iterable[str], columns: Iterable[str], seeds: int) -> list[Run]:
        """As of all studies; what is said of a row must be of one that there is, and a domain must suit the task."""
        ways = {name: (ROWS.get(name, Row(name)).method, self._fixed(name)) for name in self.row_names()}
        check_known(self.method_options, ways)
        columns = list(columns)
        for name in columns:
            if name in DOMAINS and (why := self._why_not(name)):
                raise ValueError(f"fastkd: domains has {name!r}, must be others: {why}")
        return super().grid(rows, columns, seeds)

    def _why_not(self, domain: str) -> str:
        """Why a domain does not suit the task, if so."""
        place = DOMAINS[domain].place
        if place == self.data.data.lower():
            return "it is the task's own data set"
        if place == OTHERS and not self.data.classes:
            return "the task has all classes of its data set, as --classes says none"
        return ""

    def _fixed(self, row: str) -> dict[str, Any]:
        """Options by which a row is what it is."""
        sizes = {"patch_size": self._pixels(PATCHES[row])} if row in PATCHES else {}
        return {**ROWS.get(row, Row(row)).options, **sizes}

    def _pixels(self, size: int) -> int:
        """Of a patch, for images of this task, where it has so many of images of the paper's."""
        return round(size * min(data_sets.check(self.data).shape[1:]) / FULL_SIDE)

    def distillation(self, row: str, column: str, seed: int) -> Distillation:
        way, domain = ROWS.get(row, Row(row)), DOMAINS[column]
        options = options_of(self.method_options, row, way.method, self._fixed(row))
        if way.method == "mosaic":
            options.setdefault("patch_size", self._pixels(PATCH))
        common: dict[str, Any] = {**self.common(), "training": replace(self.training, seed=seed)}
        if methods.find(way.method).needs_images:
            few = self.images and domain.place != TASK
            common["collection"] = replace(
                self.collection,
                collection=f"{domain.place}:{self.images}" if few else domain.place,
                score="entropy",
                lowest_share=self.uncertain_share if domain.uncertain else 1.0,
                balanced=way.balanced,
            )
        else:
            updates = max(1, self.collection.draws // self.batch_size)
            common["iterations"] = iterations_of(way.method, options, updates)
            common["collection"] = CollectionSettings()
        return Distillation(**common, method=way.method, options=options)

    def published(self, column: str) -> tuple[str, Mapping[str, Published]]:
        if self.measure == MEAN_IOU:
            return "NYUv2, images of ImageNet", published.SEGMENTATION
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
            Figure("test_accuracy", "accuracy of the pixels, %", {})
            if self.measure == MEAN_IOU
            else Figure("peak_accuracy", "peak accuracy, %", {}),
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


def _may_be(name: str) -> bool:
    """Whether a method needs a teacher and no labels."""
    needs = set(methods.find(name).needs)
    return "teacher" in needs and needs <= {"teacher", "out-of-domain images"}
