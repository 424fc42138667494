"""What a training came to, beside its last accuracy: figures by name."""

from __future__ import annotations

import statistics

from torch import Tensor, nn

from fastkd.methods import Mosaic, Procedure
from fastkd.models.modes import evaluating
from fastkd.studies.collected import Collected
from fastkd.studies.result import ACCURACY, MEAN_IOU
from fastkd.training import frechet_distance, latents
from fastkd.training.frechet import patches_enlarged
from fastkd.training.metrics import EpochMetrics
from fastkd.training.randomness import everything_seeded

__all__ = ["course", "distances", "stability"]

FRECHET_IMAGES = 2000  # at most
CONVERGING = 10  # epochs whose mean accuracy is that to which a training converges


def stability(history: list[EpochMetrics]) -> dict[str, float]:
    """The highest accuracy of the epochs that were evaluated, the mean of the last of them, and the difference."""
    accuracies = [line["test_accuracy"] for line in history if "test_accuracy" in line]
    peak, converging = max(accuracies), statistics.fmean(accuracies[-CONVERGING:])
    return {"peak_accuracy": peak, "converging_accuracy": converging, "instability": peak - converging}


def distances(
    procedure: Procedure, teacher: nn.Module, images: Tensor, collected: Collected | None
) -> dict[str, float]:
    """Frechet distances, in what the teacher sees: of what a procedure makes, and of what it learns on, to the test images; and
    of patches of these, where it has some."""
    images = images[:FRECHET_IMAGES]
    try:
        seen = latents(teacher, images)
    except ValueError:  # a teacher that does not end in a linear layer
        return {}
    pairs: dict[str, tuple[Tensor | None, Tensor]] = {}
    with everything_seeded(0, 0), evaluating(procedure):
        pairs["frechet_distance"] = procedure.samples(len(images)), seen
        if collected is not None:
            others = collected.some(FRECHET_IMAGES)
            pairs["collection_frechet_distance"] = others, seen
            if isinstance(procedure, Mosaic):
                size = procedure.patch_size
                pair = [patches_enlarged(whole, size) for whole in (others, images)]
                pairs["patch_frechet_distance"] = pair[0], latents(teacher, pair[1])
    return {
        name: float(frechet_distance(latents(teacher, ours), theirs))
        for name, (ours, theirs) in pairs.items()
        if ours is not None and ours.isfinite().all() and min(len(ours), len(theirs)) > 1
    }


def course(history: list[EpochMetrics], step: int = 1) -> dict[str, float]:
    """Test accuracies on the way, and mean IoUs, by the share of the training in %, at multiples of ``step``."""
    found = {}
    for line in history:
        done = 100 * line["epoch"] / len(history)
        for name in (ACCURACY.student, MEAN_IOU.student):
            if name in line and done % step == 0:
                found[f"{name}_at_{int(done)}"] = line[name]
    return found
