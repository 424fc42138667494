"""What ``fastkd detect-noise`` writes and shows of wrong labels, whoever found them."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastkd import FitStatus
from fastkd._build_info import build_info
from fastkd._files import write_whole
from fastkd.cli._errors import UsageError
from fastkd.noise import Detection, Findings, Sweep, measure, sweep

LABELS, NOISY, REPORT, HISTOGRAM, SWEEP = "labels.csv", "noisy.npy", "report.json", "histogram.png", "sweep.png"
WORST = 10  # samples that are shown
MOST_CLASSES = 20  # of which the counts are shown
POINTS = 201  # of the curves
SHARES = {"precision": "precision", "recall": "recall", "f1": "F1"}
AREAS = {"roc_auc": "ROC AUC", "average_precision": "average precision"}


def files(folder: Path) -> list[Path]:
    """All that :func:`report` may write."""
    return [folder / name for name in (LABELS, NOISY, REPORT, HISTOGRAM, SWEEP)]


def check_folder(folder: Path, overwrite: bool) -> None:
    """
    Raises:
        UsageError: it holds results, which are not to be replaced.
    """
    there = [path.name for path in files(folder) if path.exists()]
    if there and not overwrite:
        raise UsageError(f"--output {folder} holds {there[0]} already: --overwrite replaces it, or take another folder")


def report(found: Findings, labels: Tensor, truth: Tensor | None, folder: Path, console: Console) -> None:
    """Writes the files into the folder, in the place of those that are there, and shows a summary.

    Args:
        found: of N samples.
        labels: the given ones, int64 ``[N]``.
        truth: bool ``[N]``, which of them are wrong, where that is known.
    """
    from fastkd.noise_figures import score_histogram, sweep_curves  # matplotlib takes a second to import

    measured = None if truth is None else (measure(found.noisy, truth), sweep(found.score, truth))
    classes = _classes(found, labels)
    folder.mkdir(parents=True, exist_ok=True)
    for path in files(folder):
        path.unlink(missing_ok=True)  # sweep.png of a run that knew the truth says nothing of one that does not
    document = _document(found, classes, measured)
    write_whole(folder / LABELS, partial(_write_labels, found, labels))
    write_whole(folder / NOISY, lambda file: np.save(file, found.noisy.cpu().numpy()))
    write_whole(folder / REPORT, lambda file: file.write((json.dumps(document, indent=2) + "\n").encode()))
    histogram = score_histogram(found.score, truth, found.threshold, found.noisy)
    write_whole(folder / HISTOGRAM, lambda file: histogram.savefig(file, format="png"))
    if measured is not None and truth is not None:
        curves = sweep(found.score, truth, torch.linspace(0, 1, POINTS))
        figure = sweep_curves(curves._replace(best_threshold=measured[1].best_threshold), found.threshold)
        write_whole(folder / SWEEP, lambda file: figure.savefig(file, format="png"))
    _show(found, labels, truth, classes, measured, console)
    console.print(f"\nresults  {folder}", highlight=False, soft_wrap=True)


def _classes(found: Findings, labels: Tensor) -> list[tuple[int, int, int]]:
    """Of each class that there are labels of: the class, its labels, how many of these are noisy."""
    classes, which, counts = labels.cpu().unique(return_inverse=True, return_counts=True)
    noisy = torch.bincount(which[found.noisy.cpu()], minlength=len(classes))
    return list(zip(classes.tolist(), counts.tolist(), noisy.tolist(), strict=True))


def _write_labels(found: Findings, labels: Tensor, file: BinaryIO) -> None:
    suggested = [""] * len(labels)
    if found.suggested is not None:
        suggested = ["" if label < 0 else str(label) for label in found.suggested.tolist()]
    columns = zip(labels.tolist(), suggested, found.score.tolist(), found.noisy.tolist(), strict=True)
    file.write(b"index,label,suggested,score,noisy\n")
    lines = (f"{i},{label},{better},{score:.6g},{noisy:d}\n" for i, (label, better, score, noisy) in enumerate(columns))
    file.write("".join(lines).encode())


def _document(
    found: Findings, classes: list[tuple[int, int, int]], measured: tuple[Detection, Sweep] | None
) -> dict[str, Any]:
    document: dict[str, Any] = {
        "fastkd": build_info()["version"],
        "rule": found.rule,
        "threshold": found.threshold,
        "samples": len(found.noisy),
        "noisy": found.count,
        "classes": [{"class": name, "labels": labels, "noisy": noisy} for name, labels, noisy in classes],
    }
    if found.class_thresholds is not None:
        document["class_thresholds"] = [_number(value) for value in found.class_thresholds.tolist()]
    if found.status is not None:
        document["status"] = [FitStatus(status).name for status in found.status.tolist()]
    if measured is not None:
        detection, over = measured
        document["truth"] = {
            **{name: _number(value.item()) for name, value in detection._asdict().items()},
            **{name: _number(getattr(over, name).item()) for name in (*AREAS, "best_threshold")},
        }
    return document


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _show(
    found: Findings,
    labels: Tensor,
    truth: Tensor | None,
    classes: list[tuple[int, int, int]],
    measured: tuple[Detection, Sweep] | None,
    console: Console,
) -> None:
    count, samples = found.count, len(labels)
    by = f"rule {found.rule}" + ("" if found.threshold is None else f", threshold {found.threshold:g}")
    console.print(f"{_of(count, samples)} labels are probably wrong ({by})\n", highlight=False, soft_wrap=True)
    for title in _unfit(found.status):
        console.print(f"{title}\n", highlight=False, soft_wrap=True)
    if count:
        console.print(_worst(found, labels, truth))
    shown = _most_suspicious(classes)
    if shown:
        table = _table("class", "labels", "probably wrong", "share")
        for name, there, noisy in shown:
            table.add_row(str(name), f"{there:,}", f"{noisy:,}", _percent(noisy / there))
        console.print()
        console.print(table)
    if len(shown) < len(classes):
        console.print(f"the {len(shown)} of {len(classes)} classes with the largest shares", highlight=False)
    if measured is not None:
        console.print()
        console.print(_measures(*measured, samples))


def _worst(found: Findings, labels: Tensor, truth: Tensor | None) -> Table:
    worst = found.ranked()[:WORST]
    rows = zip(worst.tolist(), labels[worst].tolist(), found.score[worst].tolist(), strict=True)
    lines = [[str(index), str(label), f"{score:.4g}"] for index, label, score in rows]
    heads = ["sample", "label", "score"]
    if found.suggested is not None:
        heads.append("suggested")
        for row, better in zip(lines, found.suggested[worst].tolist(), strict=True):
            row.append("-" if better < 0 else str(better))
    if truth is not None:
        heads.append("truth")
        for row, wrong in zip(lines, truth[worst].tolist(), strict=True):
            row.append("wrong" if wrong else "right")
    table = _table(*heads)
    for row in lines:
        table.add_row(*row)
    return table


def _most_suspicious(classes: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """All classes, or those with the largest shares of noisy labels; in their order."""
    return sorted(sorted(classes, key=lambda of: (-of[2] / of[1], of[0]))[:MOST_CLASSES])


def _measures(detection: Detection, over: Sweep, samples: int) -> Table:
    all_wrong = int(detection.true_positives + detection.false_negatives)
    best = float(over.best_threshold)
    table = _table("with the truth", "")
    table.add_row("wrong labels", _of(all_wrong, samples))
    for names, of in ((SHARES, detection), (AREAS, over)):
        for name, title in names.items():
            table.add_row(title, _percent(float(getattr(of, name))))
    table.add_row("threshold of the best F1", "-" if math.isnan(best) else f"{best:.4g}")
    return table


def _unfit(status: Tensor | None) -> list[str]:
    """Why mixtures say nothing."""
    reasons = {
        FitStatus.CONSTANT: "all losses are equal, which says nothing of the labels",
        FitStatus.TOO_FEW: "fewer than two finite losses, which say nothing of the labels",
    }
    if status is None:
        return []
    every = status.tolist()
    counts = {why: every.count(kind) for kind, why in reasons.items()}
    where = f"of {len(every)} mixtures"
    return [(f"{n} {where}: {why}" if len(every) > 1 else why) for why, n in counts.items() if n]


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="right")
    return table


def _of(count: int, samples: int) -> str:
    share = f" ({_percent(count / samples)})" if samples else ""
    return f"{count:,} of {samples:,}{share}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.2f} %"
