"""ELR+: early-learning regularization with two networks, their averages, and mixup."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastkd import _checks
from fastkd.data.batch import Batches
from fastkd.methods.noisy import terms
from fastkd.methods.noisy.ensemble import Ensemble
from fastkd.methods.noisy.learner import NoisyLabels, chosen
from fastkd.methods.procedure import Part, Step
from fastkd.methods.registry import register
from fastkd.models.average import Average

__all__ = ["ELR", "early_learning"]

LEAST = 1e-4  # of probabilities, as in the authors' code


def early_learning(logits: Tensor, remembered: Tensor) -> Tensor:
    """``mean_i log(1 - <p_i, t_i>)``: lowest where predictions are as they were remembered (Liu et al., Eq. 6).

    Args:
        remembered: ``[B, K]``, t.
    """
    p = terms.probabilities(logits).clamp(LEAST, 1.0 - LEAST)
    return (1.0 - (remembered * p).sum(-1)).log().mean()


@register(
    "elr+",
    family="noisy labels",
    needs=("labels",),
    trains="two networks, their averages",
    paper="Liu et al., NeurIPS 2020",
)
class ELR(NoisyLabels):
    """ELR+: what a network said of a sample early on, before it learnt wrong labels by heart, is held against it later.

    Liu et al., "Early-Learning Regularization Prevents Memorization of Noisy Labels" (NeurIPS 2020), with the weights of the
    authors' code for CIFAR-10. Two networks learn from mixed images and labels; the average of the weights of each says what
    the other one is to remember.

    Other than in the authors' code: Both networks see the same batch and make a step in each iteration, where theirs take turns
    by epochs, with batches of their own. What is kept is both averages; on one GPU theirs are the networks themselves.

    Args:
        regularization: weight of the term, lambda; 3 for CIFAR-10, 7 for CIFAR-100.
        regularization_share: of the training, over which it grows to that: 0, at once, for CIFAR-10, 0.4 for CIFAR-100.
        memory: share of what was remembered that stays, beta; 0.7 for CIFAR-10, 0.9 for CIFAR-100.
        mixup_alpha: of the Beta distribution of the shares that images are mixed by; 0: none are.
        average: decay of the averages of weights, in the end.
        average_share: of the training, over which it grows to that.
        refine: whether labels are multiplied with what is remembered, as the authors' code does for 100 classes.
    """

    def __init__(
        self,
        student: nn.Module,
        items: int,
        num_classes: int,
        make_student: Callable[[int], nn.Module],
        *,
        regularization: float = 3.0,
        regularization_share: float = 0.0,
        memory: float = 0.7,
        mixup_alpha: float = 1.0,
        average: float = 0.997,
        average_share: float = 0.5,
        refine: bool = False,
    ) -> None:
        options = chosen(locals())
        super().__init__(student, items, num_classes, options)
        self.regularization = _checks.check_not_negative("regularization", regularization)
        self.memory, self.average_decay, self.regularization_share, self.average_share = (
            _checks.check_share(name, options[name])
            for name in ("memory", "average", "regularization_share", "average_share")
        )
        self.mixup_alpha = terms.check_mixing("mixup_alpha", mixup_alpha)
        self.refine = _checks.check_flag("refine", refine)
        self.peer = make_student(1).to(next(student.parameters()).device)
        self.averages = Ensemble(*(Average(network, buffers=False) for network in (self.student, self.peer)))
        nothing = torch.zeros(num_classes)
        self.known = self.keep(student=nothing, peer=nothing)

    def parts(self) -> dict[str, Part]:
        return {"student": Part(self.student), "peer": Part(self.peer)}

    def network(self) -> nn.Module:
        return self.averages

    def networks(self) -> dict[str, nn.Module]:
        first, second = self.averages.networks
        return {**super().networks(), "averages": first, "averages_of_peer": second}

    def iteration(self, batch: Batches, step: Step) -> dict[str, Tensor]:
        target, index, (images,) = self.checked(batch)
        losses = []
        weight = self.regularization * _ramp(step, self.regularization_share)
        first, second = self.averages.networks
        assert isinstance(first, Average)
        assert isinstance(second, Average)
        for name, network, average_of_other in (("student", self.student, second), ("peer", self.peer, first)):
            with torch.no_grad():  # its running statistics are those of plain images, as the network's are not
                said = terms.probabilities(terms.class_logits(average_of_other, images))
            remembered = self.memory * self.known[name][index] + (1.0 - self.memory) * said
            self.known.write(index, **{name: remembered})
            labels = terms.one_hot(target, said)
            mixed = terms.mixup(images, labels, self.mixup_alpha)
            logits = terms.class_logits(network, mixed.images)
            losses.append(self.loss(logits, mixed.labels, mixed.mix(remembered), weight))
            step.update(losses[-1], name)
        decay = self.average_decay * _ramp(step, self.average_share)
        decay **= step.world_size / step.batches_per_step  # of a step, which may take several iterations
        first.update(self.student, decay)
        second.update(self.peer, decay)
        loss = torch.stack([one.detach() for one in losses]).mean()
        return {"loss": loss}

    def loss(self, logits: Tensor, labels: Tensor, remembered: Tensor, weight: float) -> Tensor:
        """Of one network: logits of mixed images, their labels ``[B, K]``, what is remembered of them, and how much that
        counts."""
        if self.refine:
            both = labels * remembered
            total = both.sum(-1, keepdim=True)
            labels = torch.where(total > 0, both / total.clamp(min=torch.finfo(total.dtype).tiny), labels)
        task = terms.soft_label_loss(logits, labels).mean()
        return task + weight * early_learning(logits, remembered)


def _ramp(step: Step, share: float) -> float:
    """From exp(-5) to 1, over this share of the training."""
    done = (step.epoch + (step.iteration + 1) / step.iterations) / step.epochs
    left = max(0.0, 1.0 - done / share) if share else 0.0
    return math.exp(-5.0 * left**2)
