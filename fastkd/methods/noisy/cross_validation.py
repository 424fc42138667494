"""Networks that each leave a part of the samples out: what they say of it, they have not learnt there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastkd import _checks
from fastkd.data.batch import Batches
from fastkd.methods.method import cross_entropy
from fastkd.methods.noisy import terms
from fastkd.methods.noisy.ensemble import Ensemble
from fastkd.methods.noisy.learner import NoisyLabels, chosen
from fastkd.methods.procedure import Step
from fastkd.methods.registry import register

__all__ = ["CrossValidation"]


@register(
    "cross-validation",
    family="noisy labels",
    needs=("labels",),
    trains="a network for each fold",
    paper="Northcutt et al., JAIR 2021",
)
class CrossValidation(NoisyLabels):
    """Cross-entropy of several networks, each of which leaves its part of the samples out.

    Wrong labels are told by confident learning of what each network says of the part that it has not learnt: the probabilities
    that Northcutt et al., "Confident Learning: Estimating Uncertainty in Dataset Labels" (JAIR 2021), and its package cleanlab
    ask for, in one training. What is kept is all networks together.

    Args:
        folds: parts and networks, 2 or more.
    """

    rule = "confident"

    def __init__(
        self,
        student: nn.Module,
        items: int,
        num_classes: int,
        make_student: Callable[[int], nn.Module],
        *,
        folds: int = 3,
    ) -> None:
        options = chosen(locals())
        super().__init__(student, items, num_classes, options)
        folds = _checks.check_count("folds", folds, 2)
        device = next(student.parameters()).device
        self.student = Ensemble(student, *(make_student(seed).to(device) for seed in range(1, folds)))
        fold = torch.empty(items, dtype=torch.int64)
        fold[torch.randperm(items)] = torch.arange(items) % folds
        self.register_buffer("fold", fold.to(device))

    fold: Tensor

    def networks(self) -> dict[str, nn.Module]:
        assert isinstance(self.student, Ensemble)
        return {f"fold{i}": network for i, network in enumerate(self.student.networks)}

    def iteration(self, batch: Batches, step: Step) -> dict[str, Tensor]:
        target, index, (images,) = self.checked(batch)
        fold = self.fold[index]
        losses = []
        assert isinstance(self.student, Ensemble)
        for number, network in enumerate(self.student.networks):
            rows = cross_entropy(terms.class_logits(network, images), target, reduction="none")
            losses.append(terms.weighted_mean(rows, (fold != number).to(rows.dtype)))
        loss = torch.stack(losses).sum()
        step.update(loss)
        return {"loss": loss / len(losses)}

    def probabilities(self, network: nn.Module, images: Tensor, index: Tensor) -> Tensor:
        """Of each sample, those of the network that has not learnt it."""
        assert isinstance(network, Ensemble)
        every = torch.stack([terms.probabilities(terms.class_logits(one, images)) for one in network.networks])
        return every[self.fold[index], torch.arange(len(index), device=index.device)]
