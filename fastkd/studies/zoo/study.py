"""Methods x settings: clean data, symmetric label noise, and unequal classes. The teacher learns the same labels and images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from fastkd.methods import registry as methods
from fastkd.studies.data import DataSettings
from fastkd.studies.settings import Distillation
from fastkd.studies.study import Published, Study, register
from fastkd.studies.zoo import published

__all__ = ["METHODS", "SETTINGS", "Setting", "Zoo"]

METHODS = ("baseline", "hinton", "bss", "fitnet", "fsp", "at", "sp", "rkd-d", "rkd-a", "rkd-da", "one", "dml")


class Setting(NamedTuple):
    """One column of the study."""

    label_noise: float = 0.0
    imbalance: float = 0.0

    @property
    def name(self) -> str:
        """As the command line has it: clean, noise-0.4, imbalance-0.2."""
        if self.label_noise:
            return f"noise-{self.label_noise:g}"
        return f"imbalance-{self.imbalance:g}" if self.imbalance else "clean"


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(),
        *(Setting(label_noise=rate) for rate in published.LABEL_NOISE),
        *(Setting(imbalance=gamma) for gamma in published.CLASS_IMBALANCE),
    )
}


@register("zoo")
@dataclass(frozen=True)
class Zoo(Study):
    """All methods of the zoo under clean data, label noise and unequal classes: "Knowledge Distillation Beyond Model
    Compression" (Sarfraz et al., ICPR 2020).

    Writes a table with mean and standard deviation beside the paper's figures, and a plot. The same command goes on where
    it was interrupted, and adds what more is asked for.
    """

    all_rows: ClassVar[tuple[str, ...]] = METHODS
    all_columns: ClassVar[tuple[str, ...]] = tuple(SETTINGS)
    baseline: ClassVar[str] = "baseline"
    row_option: ClassVar[str] = "methods"
    column_option: ClassVar[str] = "settings"
    of_the_grid: ClassVar[Mapping[str, str]] = {
        "label_noise": "--settings noise-{:g}",
        "imbalance": "--settings imbalance-{:g}",
        "label_file": "columns are noise of some rates; fastkd distill takes {}",
    }

    methods: tuple[str, ...] = METHODS
    """Names of methods: those of the paper, or any that `fastkd methods` lists and that learn from labels."""
    settings: tuple[str, ...] = tuple(SETTINGS)
    """clean, noise-<share of wrong labels> or imbalance-<gamma>, as in the paper."""

    def row_names(self) -> tuple[str, ...]:
        return tuple(name for name in methods.names() if "labels" in methods.find(name).needs)

    def distillation(self, row: str, column: str, seed: int) -> Distillation:
        setting = SETTINGS[column]
        common: dict[str, Any] = self.common()
        # which needs a rate, and the other columns have none
        noise = self.data.noise if setting.label_noise or self.data.noise != "instance" else DataSettings.noise
        rate, imbalance = setting.label_noise, setting.imbalance
        common["data"] = replace(self.data, noise=noise, label_noise=rate, imbalance=imbalance)
        common["training"] = replace(self.training, seed=seed)
        return Distillation(**common, method=row)

    def published(self, column: str) -> tuple[str, Mapping[str, Published]]:
        """Of this student on clean data, else of WRN-16-2; on CIFAR-10 but for clean CIFAR-100."""
        setting = SETTINGS[column]
        if setting.label_noise:
            return "CIFAR-10, wrn-16-2", published.LABEL_NOISE.get(setting.label_noise, {})
        if setting.imbalance:
            return "CIFAR-10, wrn-16-2", published.CLASS_IMBALANCE.get(setting.imbalance, {})
        if self.data.data.lower() == "cifar100":
            return f"CIFAR-100, {self.student}", published.CLEAN_CIFAR100.get(self.student, {})
        return f"CIFAR-10, {self.student}", published.CLEAN.get(self.student, {})
