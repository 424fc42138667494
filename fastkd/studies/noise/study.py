"""Methods x kinds of wrong labels: what is learnt in spite of them, and how well they are found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from fastkd._names import unknown_name
from fastkd.methods import registry as methods
from fastkd.studies.method_options import check_known, check_options, options_of
from fastkd.studies.noise import published
from fastkd.studies.settings import Distillation
from fastkd.studies.study import Figure, Published, Run, Study, register

__all__ = ["METHODS", "SETTINGS", "Noise", "Setting"]

METHODS = ("baseline", "cores", "pes", "elr+", "dividemix", "sop", "bldr", "nlnl", "cross-validation")


class Setting(NamedTuple):
    """One column of the study."""

    noise: Literal["symmetric", "asymmetric", "instance", "file"] = "symmetric"
    rate: float = 0.0
    key: str = ""
    """Of a label file."""
    published: str = ""
    """The labels of CIFAR-N that the paper has and that are the most alike."""

    @property
    def name(self) -> str:
        """As the command line has it: clean, symmetric-0.4, file-worse."""
        if self.noise == "file":
            return f"file-{self.key}"
        return f"{self.noise}-{self.rate:g}" if self.rate else "clean"


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(),
        Setting("symmetric", 0.2),
        Setting("symmetric", 0.4),
        Setting("symmetric", 0.6),
        Setting("asymmetric", 0.4),
        Setting("instance", 0.2, published="random1"),
        Setting("instance", 0.4, published="worse"),
        *(Setting("file", key=key, published=key) for key in published.ACCURACY),
    )
}
WRONG_PERCENT = {"aggre": 9, "random1": 17, "worse": 40, "noisy": 40}  # of the labels of CIFAR-N


@register("noise")
@dataclass(frozen=True)
class Noise(Study):
    """Learning with wrong labels, of all kinds: "Noise-Robust Bidirectional Learning with Dynamic Sample Reweighting" (BLDR)
    and what it is compared with.

    Wrong labels are drawn (symmetric: any other class; asymmetric: one that is mistaken for it; instance: errors of a weak
    classifier), or those of people, of CIFAR-10N and CIFAR-100N (file-worse, ..., with --noise file --label-file). Writes
    tables of the last, the best and the course of the accuracy, and of how well wrong labels are found (precision, recall,
    F1), beside the paper's. The same command goes on where it was interrupted.
    """

    all_rows: ClassVar[tuple[str, ...]] = METHODS
    all_columns: ClassVar[tuple[str, ...]] = tuple(SETTINGS)
    baseline: ClassVar[str] = "baseline"
    row_option: ClassVar[str] = "methods"
    column_option: ClassVar[str] = "settings"
    of_the_grid: ClassVar[Mapping[str, str]] = {
        "label_noise": "--settings symmetric-{:g}",
        "label_key": "--settings file-{}",
    }

    methods: tuple[str, ...] = METHODS
    """Those of the paper, with nlnl and cross-validation (whose probabilities cleanlab wants), or any that `fastkd methods`
    lists and that learns from labels without a teacher."""
    settings: tuple[str, ...] = ("symmetric-0.4", "instance-0.4")
    """clean, symmetric-0.2, -0.4 or -0.6, asymmetric-0.4, instance-0.2 or -0.4; file-aggre, file-random1 or file-worse of
    CIFAR-10N, file-noisy of CIFAR-100N."""
    method_options: tuple[str, ...] = ()
    """Options of all methods that have them, as warmup_share=0.3, or of one row, as bldr.balance=1."""
    learning_rates: tuple[str, ...] = ()
    """Of rows whose learning rate is not --learning-rate, as cores=0.01."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.method_options)

    def row_names(self) -> tuple[str, ...]:
        return tuple(name for name in methods.names() if methods.find(name).needs == ("labels",))

    def column_names(self) -> tuple[str, ...]:
        """Those of people's labels where their file is given."""
        return tuple(name for name, setting in SETTINGS.items() if setting.noise != "file" or self.data.label_file)

    def grid(self, rows: Iterable[str], columns: Iterable[str], seeds: int) -> list[Run]:
        """As of all studies; what is said of a row must be of one that there is, and people's labels need their file."""
        check_known(self.method_options, {name: (name, {}) for name in self.row_names()})
        self._rates()
        columns = list(columns)
        missing = [name for name in columns if name in SETTINGS and name not in self.column_names()]
        if missing:
            raise ValueError(
                f"fastkd: label_file is None, must be the file of the labels, with the noise 'file', for {', '.join(missing)}"
            )
        return super().grid(rows, columns, seeds)

    def distillation(self, row: str, column: str, seed: int) -> Distillation:
        setting = SETTINGS[column]
        rate = self._rates().get(row, self.training.learning_rate)
        common: dict[str, Any] = {
            **self.common(),
            "training": replace(self.training, seed=seed, learning_rate=rate),
        }
        file: Path | None = self.data.label_file if setting.noise == "file" else None
        common["data"] = replace(
            self.data, noise=setting.noise, label_noise=setting.rate, label_file=file, label_key=setting.key
        )
        return Distillation(**common, method=row, options=options_of(self.method_options, row, row, {}))

    def _rates(self) -> dict[str, float]:
        """Learning rates of single rows."""
        found = {}
        for text in self.learning_rates:
            row, _, rate = text.partition("=")
            if row not in self.row_names():
                raise unknown_name("row", row, self.row_names())
            try:
                found[row] = float(rate)
            except ValueError:
                raise ValueError(f"fastkd: learning_rates has {text!r}, must be ROW=NUMBER") from None
        return found

    def published(self, column: str) -> tuple[str, Mapping[str, Published]]:
        """Of people's labels; beside those of a weak classifier, of people's of about as many wrong ones."""
        name = SETTINGS[column].published
        if not name:
            return "", {}
        of = "CIFAR-100N" if name == "noisy" else "CIFAR-10N"
        return f"{of} {name}, {WRONG_PERCENT[name]} % wrong, ResNet-34", published.ACCURACY[name]

    def figures_shown(self) -> tuple[Figure, ...]:
        """With what the paper says of BLDR."""
        found = {
            measure: {
                column: {"bldr": published.DETECTION[setting.published][measure]}
                for column, setting in SETTINGS.items()
                if setting.published in published.DETECTION
            }
            for measure in ("precision", "recall", "f1")
        }
        return (
            Figure("peak_accuracy", "best accuracy, %", {}),
            Figure("instability", "best less the last 10 epochs' mean accuracy, %", {}),
            Figure("noise_f1", "wrong labels found by the method's own rule: F1, %", found["f1"]),
            Figure("noise_precision", "precision, %", found["precision"]),
            Figure("noise_recall", "recall, %", found["recall"]),
            Figure("mixture_f1", "wrong labels found by a mixture of the losses: F1, %", {}),
            Figure("probability_f1", "wrong labels found by a probability below 0.05: F1, %", {}),
            Figure("confident_f1", "wrong labels found by confident learning: F1, %", {}),
            Figure("disagreement_f1", "labels that are not the most probable class taken for wrong: F1, %", {}),
            Figure("noise_auc", "area under the ROC curve of the score, %", {}),
            Figure("cleanlab_f1", "wrong labels found by cleanlab of the same probabilities: F1, %", {}),
        )
