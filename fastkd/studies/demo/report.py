"""What the demo tells: a summary of plain numbers (the JSON), and the same as text and a table for the terminal."""

from __future__ import annotations

from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

import torch
from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastkd import statistics
from fastkd.studies.demo.experiment import Arm, Results, Settings
from fastkd.studies.demo.timing import LossTiming

EARLY = 0.1  # share of the steps at which the accuracy is also told, as in Table 5 of the paper


def introduction(settings: Settings, device: torch.device) -> Panel:
    """What is about to happen."""
    relevant = round(settings.collection_size * settings.relevant_share)
    return Panel(
        "A teacher learns 599 labelled digits. Small students then learn from its logits on "
        f"{settings.collection_size:,} unlabeled images: {relevant:,} digits, the others patches of photographs. "
        "Does it pay to draw more often what looks familiar to the teacher?",
        title=f"fastkd demo, seed {settings.seed}, {device.type}",
        title_align="left",
        width=80,
        border_style="cyan",
    )


def summary(results: Results) -> dict[str, Any]:
    """All numbers but the times; shares are in [0, 1], lists hold one entry a repeat."""
    return {
        "settings": asdict(results.settings),
        "teacher": {"parameters": results.teacher_parameters, "test_accuracy": results.teacher_accuracy},
        "student_parameters": results.student_parameters,
        "test_images": results.test_size,
        "relevant_images": int(results.collection.relevant.sum()),
        "curve_steps": results.curve_steps,
        "students": [_summary_of(arm, results) for arm in results.arms],
    }


def _summary_of(arm: Arm, results: Results) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "name": arm.name,
        "test_accuracy": results.accuracy(arm),
        "test_accuracy_early": results.accuracy(arm, EARLY),
        "agreement_with_teacher": arm.agreement,
        "curves": arm.curves,
    }
    if arm.probabilities is not None:
        relevant = results.collection.relevant
        draws = results.settings.steps * results.settings.batch_size
        numbers |= {
            "iqpr": arm.iqpr,
            "inverse_temperature": arm.inverse_temperature,
            "relevant_draws": [statistics.relevant_draws(counts, relevant).item() for counts in arm.counts],
            "skip_ratio": [statistics.skip_ratio(counts).item() for counts in arm.counts],
            "expected_skip_ratio": statistics.expected_skip_ratio(arm.probabilities, draws).item(),
            "uniformity": [statistics.uniformity(counts).item() for counts in arm.counts],
            "irrelevant_proportion": [
                statistics.irrelevant_proportion(counts, relevant).item() for counts in arm.counts
            ],
        }
    return numbers


def table(summary: dict[str, Any]) -> Table:
    """One column a kind of student; means over the repeats, accuracies with their standard deviation."""
    teacher, students = summary["teacher"], summary["students"]
    result = Table(
        box=box.SIMPLE_HEAD,
        title=f"Teacher: {_percent([teacher['test_accuracy']])} of {summary['test_images']} test digits right, "
        f"{teacher['parameters']:,} parameters. Students: {summary['student_parameters']:,}.",
        title_justify="left",
        title_style="bold",
    )
    repeats = summary["settings"]["repeats"]
    result.add_column(f"means of {repeats} ± deviation" if repeats > 1 else "one student each", no_wrap=True)
    for student in students:
        first = student["name"].partition(" ")[0]
        second = f"IQPR {student['iqpr']:g}" if "iqpr" in student else "digits"
        result.add_column(f"{first}\n{second}", justify="right", no_wrap=True)
    for name, key, style in (
        (f"right after {EARLY:.0%} of the steps", "test_accuracy_early", "bold"),
        ("right at the end", "test_accuracy", "bold"),
        ("same answer as teacher", "agreement_with_teacher", ""),
        ("digits among all draws", "relevant_draws", ""),
        ("skip ratio (never drawn)", "skip_ratio", ""),
        ("uniformity of images drawn", "uniformity", ""),
        ("irrelevant of images drawn", "irrelevant_proportion", ""),
    ):
        with_deviation = key.startswith("test_accuracy")
        result.add_row(
            name,
            *(_percent(student[key], with_deviation) if key in student else "" for student in students),
            style=style,
        )
    return result


def conclusion(summary: dict[str, Any], loss_time: LossTiming) -> Text:
    """What the numbers say, in words that follow them, and the time of the loss."""
    _, biased, uniform = summary["students"]
    early, final = (
        100 * (fmean(biased[key]) - fmean(uniform[key])) for key in ("test_accuracy_early", "test_accuracy")
    )
    return Text.assemble(
        f"Biased against uniform: {early:+.1f} points after {EARLY:.0%} of the steps, {final:+.1f} at the end.\n",
        f"Loss and gradient, {loss_time.rows} x {loss_time.classes}, measured now: "
        f"{1e6 * loss_time.fused:.0f} us, torch {1e6 * loss_time.eager:.0f} us: ",
        (f"{loss_time.eager / loss_time.fused:.1f} times as fast", "bold"),
    )


def _percent(shares: list[float], with_deviation: bool = False) -> str:
    deviation = f" ± {100 * stdev(shares):.1f}" if with_deviation and len(shares) > 1 else ""
    return f"{100 * fmean(shares):.1f}{deviation} %"
