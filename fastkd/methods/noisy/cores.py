"""CORES*: a regularizer that makes predictions sure, a sieve of samples by their loss, then consistency."""

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

__all__ = ["CORES", "class_losses"]


def class_losses(logits: Tensor) -> Tensor:
    """``-log(p_k + 1e-8)``, ``[B, K]``: the loss of each class as the label. The small number keeps the regularizer, which
    raises them, from going on for ever."""
    return -(terms.probabilities(logits) + 1e-8).log()


@register("cores", family="noisy labels", needs=("labels",), trains="student", paper="Cheng et al., ICLR 2021")
class CORES(NoisyLabels):
    """CORES*: a regularizer makes predictions sure, a sieve leaves unlikely labels out, then two views are to agree.

    Cheng et al., "Learning with Instance-Dependent Label Noise: A Sample Sieve Approach" (ICLR 2021), Eq. 3 to 5, with the
    schedule of the authors' code, as shares: cross-entropy minus ``beta`` times the expected loss of a label drawn from the
    labels that were kept in the last epoch, of the samples whose loss is not above the mean loss of all classes. As their
    learning rate, this is divided by ``1 + beta``. There the second part is a training of its own, here the same one goes on.
    They train by SGD without momentum: with momentum 0.9 a tenth of their learning rate makes steps as large.

    Args:
        beta: of the regularizer, in the end.
        plain_share: of the training, by plain cross-entropy.
        ramp_share: of the training, over which beta then grows.
        sieve_share: of the training, after which samples are sieved.
        threshold: a sample stays where its loss less the mean of all classes' is at most this; -8 in the authors' code for
            CIFAR-10N and CIFAR-100.
        second_share: of the training, after which the sieve is left as it is and views are to agree; 1: never (CORES).
        consistency: weight of the divergence between two views, in the second part.
    """

    views = 2
    strong_views = 1

    def __init__(
        self,
        student: nn.Module,
        items: int,
        num_classes: int,
        *,
        beta: float = 2.0,
        plain_share: float = 0.1,
        ramp_share: float = 0.3,
        sieve_share: float = 0.3,
        threshold: float = 0.0,
        second_share: float = 0.5,
        consistency: float = 1.0,
    ) -> None:
        options = chosen(locals())
        super().__init__(student, items, num_classes, options)
        self.beta, self.consistency = (
            _checks.check_not_negative(name, options[name]) for name in ("beta", "consistency")
        )
        self.plain_share, self.ramp_share, self.sieve_share, self.second_share = (
            _checks.check_share(f"{name}_share", options[f"{name}_share"])
            for name in ("plain", "ramp", "sieve", "second")
        )
        self.threshold = _checks.check_between("threshold", threshold, -1e9, 1e9)
        if second_share < sieve_share:
            raise ValueError(
                f"fastkd: second_share is {second_share}, must be at least sieve_share, {sieve_share}, as it keeps the sieve"
            )
        # labels of samples that were not seen yet are a class of their own
        self.known = self.keep(kept=torch.ones(()), target=torch.tensor(float(num_classes)))
        prior = torch.full((num_classes,), 1.0 / num_classes, device=next(student.parameters()).device)
        self.register_buffer("prior", prior)
        if not consistency or second_share == 1.0:
            self.views, self.strong_views = 1, 0

    prior: Tensor
    """Of the classes, among the labels that were kept: ``[K]``. Uniform in the first epoch."""

    def iteration(self, batch: Batches, step: Step) -> dict[str, Tensor]:
        target, index, views = self.checked(batch)
        second = step.progress >= self.second_share
        views = views if second else views[:1]
        logits, *others = terms.class_logits(self.student, torch.cat(views)).chunk(len(views))
        task, losses = cross_entropy(logits, target, reduction="none"), class_losses(logits)
        kept = self.known["kept"][index]
        if not second:
            kept = torch.ones_like(task)
            if step.progress >= self.sieve_share:
                kept = (task - losses.mean(-1) <= self.threshold).to(task.dtype)
            self.known.write(index, kept=kept, target=target)
        beta = self.beta * self.ramp(step.progress)
        loss = terms.weighted_mean(task - beta * (self.prior * losses).sum(-1), kept.detach()) / (1.0 + beta)
        found = {"task_loss": loss}
        if others:
            found["consistency_loss"] = self.consistency * terms.consistency(logits, others[0])
            loss = loss + found["consistency_loss"]
        step.update(loss)
        return {"loss": loss, **found, "kept": kept.mean(), "accuracy": terms.accuracy(logits, target)}

    @torch.no_grad()
    def after_epoch(self, step: Step) -> dict[str, Tensor | float]:
        super().after_epoch(step)
        kept, target = self.known["kept"], self.known["target"].long()
        counts = kept.new_zeros(self.num_classes + 1).index_add_(0, target, kept)[:-1]
        total = counts.sum()
        self.prior.copy_(torch.where(total > 0, counts / total.clamp(min=1), self.prior))
        return {}

    def ramp(self, progress: float) -> float:
        """From 0 to 1."""
        over = progress - self.plain_share
        return min(1.0, max(0.0, over / self.ramp_share)) if self.ramp_share else float(over >= 0.0)
