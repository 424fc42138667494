"""NLNL: learning what samples are not, then, of those that fit, what they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd import _checks
from fastkd.data.batch import Batches
from fastkd.methods.method import cross_entropy
from fastkd.methods.noisy import terms
from fastkd.methods.noisy.learner import NoisyLabels, chosen
from fastkd.methods.noisy.samples import UNSEEN
from fastkd.methods.procedure import Step
from fastkd.methods.registry import register

__all__ = ["NLNL", "complementary"]

EPOCHS = 10  # that samples are chosen by


def complementary(target: Tensor, num_classes: int, count: int = 1) -> Tensor:
    """For each label other classes, all alike: int64 ``[B, count]``, from torch's global generator of the device."""
    steps = torch.randint(1, num_classes, (len(target), count), device=target.device)
    return (target[:, None] + steps) % num_classes


@register("nlnl", family="noisy labels", needs=("labels",), trains="student", paper="Kim et al., ICCV 2019")
class NLNL(NoisyLabels):
    """NLNL: learns what samples are not, then the same of those whose label is likely, then what these are.

    Kim et al., "NLNL: Negative Learning for Noisy Labels" (ICCV 2019), Eq. 2: ``-log(1 - p)`` of a random other class, and the
    three steps NL, SelNL and SelPL, a third of the training each. Samples are chosen by the mean probability of their label in
    the last ten epochs, as in the authors' code.

    Other than there, classes weigh the same, where rarer ones weigh more, and the network that is then trained with labels of
    its own for the rest is left out.

    Args:
        complements: other classes that are drawn for each sample in each iteration; 110 in the authors' code for 100 classes.
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
        complements: int = 1,
        selective_share: float = 1 / 3,
        positive_share: float = 2 / 3,
        threshold: float = 0.5,
    ) -> None:
        options = chosen(locals())
        super().__init__(student, items, num_classes, options)
        self.complements = _checks.check_count("complements", complements, 1)
        self.selective_share, self.positive_share, self.threshold = (
            _checks.check_share(name, options[name]) for name in ("selective_share", "positive_share", "threshold")
        )
        if positive_share < selective_share:
            raise ValueError(
                f"fastkd: positive_share is {positive_share}, must be at least selective_share, {selective_share}"
            )
        self.known = self.keep(given=torch.full((EPOCHS,), UNSEEN))

    def iteration(self, batch: Batches, step: Step) -> dict[str, Tensor]:
        target, index, (images,) = self.checked(batch)
        logits = terms.class_logits(self.student, images)
        history = self.known["given"][index]
        history[:, step.epoch % EPOCHS] = terms.probabilities(logits.detach()).gather(1, target[:, None])[:, 0]
        self.known.write(index, given=history)
        seen = history >= 0.0
        given = torch.where(seen, history, 0.0).sum(1) / seen.sum(1)
        if step.progress >= self.positive_share:
            rows, counted = cross_entropy(logits, target, reduction="none"), given > self.threshold
        else:
            rows = self.negative_loss(logits, complementary(target, self.num_classes, self.complements))
            selective = step.progress >= self.selective_share
            counted = given > 1.0 / self.num_classes if selective else torch.ones_like(given, dtype=torch.bool)
        loss = terms.weighted_mean(rows, counted.to(rows.dtype))
        step.update(loss)
        return {"loss": loss, "kept": counted.float().mean(), "accuracy": terms.accuracy(logits, target)}

    @staticmethod
    def negative_loss(logits: Tensor, others: Tensor) -> Tensor:
        """``-log(1 - p)``, the mean over classes ``[B, n]`` that the samples are not of, ``[B]``."""
        p = terms.probabilities(logits).gather(1, others)
        return -torch.log((1.0 - p).clamp(min=1e-5)).mean(1)
