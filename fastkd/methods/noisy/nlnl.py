"""NLNL: learning what samples are not, then, of those that fit, what they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd import _checks
from fastkd.data.batch import Batches
from fastkd.methods.method import cross_entropy
from fastkd.methods.noisy import terms
from fastkd.methods.noisy.learner import NoisyLabels, chosen
from fastkd.methods.procedure import Step
from fastkd.methods.registry import register

__all__ = ["NLNL", "complementary"]


def complementary(target: Tensor, num_classes: int) -> Tensor:
    """For each label another class, all alike: int64 ``[B]``, from torch's global generator of the device."""
    return (target + torch.randint(1, num_classes, target.shape, device=target.device)) % num_classes


@register("nlnl", family="noisy labels", needs=("labels",), trains="student", paper="Kim et al., ICCV 2019")
class NLNL(NoisyLabels):
    """NLNL: ``-log(1 - p)`` of a random other class; then the same of samples whose label is likelier than by chance; then
    cross-entropy of those whose label is likely.

    Kim et al., "NLNL: Negative Learning for Noisy Labels" (ICCV 2019), Eq. 2 and the three steps NL, SelNL and SelPL, a third
    of the training each. The network that is then trained with labels of its own for the rest is left out.

    Args:
        selective_share: of the training, after which samples are chosen (SelNL).
        positive_share: of the training, after which labels are learnt (SelPL).
        threshold: probability of the label above which one is, gamma.
    """

    def __init__(
        self,
        student: nn.Module,
        items: int,
        num_classes: int,
        *,
        selective_share: float = 1 / 3,
        positive_share: float = 2 / 3,
        threshold: float = 0.5,
    ) -> None:
        options = chosen(locals())
        super().__init__(student, items, num_classes, options)
        self.selective_share, self.positive_share, self.threshold = (
            _checks.check_share(name, options[name]) for name in ("selective_share", "positive_share", "threshold")
        )
        if positive_share < selective_share:
            raise ValueError(
                f"fastkd: positive_share is {positive_share}, must be at least selective_share, {selective_share}"
            )

    def iteration(self, batch: Batches, step: Step) -> dict[str, Tensor]:
        target, _, (images,) = self.checked(batch)
        logits = terms.class_logits(self.student, images)
        given = terms.probabilities(logits.detach()).gather(1, target[:, None])[:, 0]
        if step.progress >= self.positive_share:
            rows, counted = cross_entropy(logits, target, reduction="none"), given > self.threshold
        else:
            rows = self.negative_loss(logits, complementary(target, self.num_classes))
            selective = step.progress >= self.selective_share
            counted = given > 1.0 / self.num_classes if selective else torch.ones_like(given, dtype=torch.bool)
        loss = terms.weighted_mean(rows, counted.to(rows.dtype))
        step.update(loss)
        return {"loss": loss, "kept": counted.float().mean(), "accuracy": terms.accuracy(logits, target)}

    @staticmethod
    def negative_loss(logits: Tensor, others: Tensor) -> Tensor:
        """``-log(1 - p)``, ``[B]``, of classes ``[B]`` that the samples are not of."""
        p = terms.probabilities(logits).gather(1, others[:, None])[:, 0]
        return -torch.log((1.0 - p).clamp(min=1e-7))
