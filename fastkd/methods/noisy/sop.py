"""SOP: a sparse correction of each label that is learnt along with the network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd import _checks
from fastkd.data.batch import Batches
from fastkd.methods.noisy import terms
from fastkd.methods.noisy.learner import NoisyLabels, chosen
from fastkd.methods.noisy.over_parameters import OverParameters, corrected_losses
from fastkd.methods.procedure import Step
from fastkd.methods.registry import register

__all__ = ["SOP"]


@register(
    "sop",
    family="noisy labels",
    needs=("labels",),
    trains="student, a correction of each label",
    paper="Liu et al., ICML 2022",
)
class SOP(NoisyLabels):
    """SOP: cross-entropy with labels that are corrected by u and v of each sample, learnt along with the network.

    Liu et al., "Robust Training under Label Noise by Over-parameterization" (ICML 2022), with the regularisers of its SOP+: two
    views of an image agree, and all classes are predicted alike. As in the paper, u learns from the cross-entropy alone and v
    from the squared error alone; the authors' code has versions where u learns from both.

    Args:
        learning_rate_u: of the correction at the given label; 1 in the authors' code for CIFAR-100.
        learning_rate_v: of the correction at other classes; 10 for symmetric, 100 for asymmetric noise in the paper.
        squared: weight of the squared error that v learns from; 1 in the paper, 10 and 100 in versions of the authors' code.
        balance: weight of the term that all classes are predicted alike; 0: SOP without it.
        consistency: weight of the divergence between two views; 0: SOP without it.
    """

    views = 2
    strong_views = 1

    def __init__(
        self,
        student: nn.Module,
        items: int,
        num_classes: int,
        *,
        learning_rate_u: float = 10.0,
        learning_rate_v: float = 10.0,
        squared: float = 1.0,
        balance: float = 0.1,
        consistency: float = 0.9,
    ) -> None:
        options = chosen(locals())
        super().__init__(student, items, num_classes, options)
        self.weights = {
            name: _checks.check_not_negative(name, options[name]) for name in ("squared", "balance", "consistency")
        }
        self.known = self.keep(u=torch.zeros(1), v=torch.zeros(num_classes))
        self.correction = OverParameters(self.known, learning_rate_u, learning_rate_v)
        if not consistency:
            self.views, self.strong_views = 1, 0

    def iteration(self, batch: Batches, step: Step) -> dict[str, Tensor]:
        target, index, views = self.checked(batch)
        rows = self.correction.rows(index)
        logits, *others = terms.class_logits(self.student, torch.cat(views)).chunk(len(views))
        cross_entropy, squared, balance = corrected_losses(logits, target, *rows)
        loss = cross_entropy + self.weights["squared"] * squared + self.weights["balance"] * balance
        if others:
            loss = loss + self.weights["consistency"] * terms.consistency(logits, others[0])
        self.correction.step(index, rows, loss, step.batches_per_step)
        step.update(loss)
        return {"loss": loss, "task_loss": cross_entropy, "accuracy": terms.accuracy(logits, target)}
