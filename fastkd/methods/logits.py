"""Distillation of responses in parts: the target class apart from the others (DKD), samples apart from classes (DIST)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastkd import _checks, functional
from fastkd.methods.method import check_progress, check_target
from fastkd.methods.registry import register
from fastkd.methods.response import LogitMethod
from fastkd.methods.standardize import standardized

__all__ = ["DIST", "DKD"]


@register("dkd", family="response", paper="Zhao et al., CVPR 2022")
class DKD(LogitMethod):
    """``r CE + w T^2 [alpha KL(b_t || b_s) + beta KL(q_t || q_s)]``: the KL's two parts, each with a weight of its own.

    Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022), Eq. 7: b are the probabilities of the target class and
    of all others together (TCKD), q those of the other classes among themselves (NCKD). Both are means over the rows, as
    the authors' code has them, whose w rises over the first 20 of 240 epochs, from 1/20 to 1: so it does here, over the first
    ``warmup_share`` of the training. In a loop of your own, say the ``progress``, or set that share to 0.

    Args:
        target_weight, others_weight: alpha and beta. The authors choose beta by pair of networks: 6 from VGG-13 to VGG-8.
        warmup_share: in [0, 1].
        standardize: whether both parts are of standardised logits (:func:`fastkd.methods.standardize.standardized`).
    """

    weights: ClassVar[tuple[str, ...]] = ("target_weight", "others_weight")

    def __init__(
        self,
        temperature: float = 4.0,
        *,
        task_weight: float = 1.0,
        target_weight: float = 1.0,
        others_weight: float = 8.0,
        warmup_share: float = 19 / 240,
        standardize: bool = False,
    ) -> None:
        super().__init__(temperature, task_weight)
        self.target_weight = _checks.check_not_negative("target_weight", target_weight)
        self.others_weight = _checks.check_not_negative("others_weight", others_weight)
        self.warmup_share = _checks.check_share("warmup_share", warmup_share)
        self.standardize = _checks.check_flag("standardize", standardize)

    def warmup(self, progress: float) -> float:
        """w, of a progress in [0, 1]."""
        check_progress(progress)
        return 0.05 + 0.95 * progress / self.warmup_share if progress < self.warmup_share else 1.0

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None, progress: float) -> dict[str, Tensor]:
        target = check_target(student, target)
        if student.shape[-1] < 2:
            raise ValueError(
                f"fastkd: student.logits has shape {tuple(student.shape)}, must have 2 classes or more for DKD"
            )
        if self.standardize:
            student, teacher = standardized(student), standardized(teacher)
        others = _without(student, target), _without(teacher, target)
        terms: dict[str, Tensor] = {}
        weight = self.warmup(progress)
        if self.target_weight != 0.0:
            ours, theirs = (self._of_two(*pair, target) for pair in zip((student, teacher), others, strict=True))
            terms["target_loss"] = weight * self.target_weight * functional.kl_div(ours, theirs, self.temperature)
        if self.others_weight != 0.0:
            kl = functional.kl_div(others[0], others[1], self.temperature)
            terms["others_loss"] = weight * self.others_weight * kl
        return terms

    def _of_two(self, logits: Tensor, others: Tensor, target: Tensor) -> Tensor:
        """Logits of the target class and of all others as one class, ``[..., 2]``."""
        rest = functional.logit_stats(others, self.temperature).logsumexp * self.temperature
        return torch.stack([logits.gather(-1, target[..., None])[..., 0].to(rest.dtype), rest], -1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, warmup_share={self.warmup_share}, standardize={self.standardize}"


@register("dist", family="response", paper="Huang et al., NeurIPS 2022")
class DIST(LogitMethod):
    """``r CE + T^2 [beta (1 - mean corr of rows) + gamma (1 - mean corr of columns)]`` of softmax(z / T), Pearson's corr.

    Huang et al., "Knowledge Distillation from A Stronger Teacher" (NeurIPS 2022), section 4; a row is a sample, a column
    what all samples of the batch have of a class. The authors multiply by T^2 and add 1e-8 to the product of the two norms,
    and have T 4 on CIFAR-100, 1 on ImageNet. A constant row, or a column of a batch of one, correlates with nothing: 0.

    Args:
        inter_weight, intra_weight: beta, of the rows, and gamma, of the columns.
    """

    weights: ClassVar[tuple[str, ...]] = ("inter_weight", "intra_weight")

    def __init__(
        self,
        temperature: float = 4.0,
        *,
        task_weight: float = 1.0,
        inter_weight: float = 2.0,
        intra_weight: float = 2.0,
    ) -> None:
        super().__init__(temperature, task_weight)
        self.inter_weight = _checks.check_not_negative("inter_weight", inter_weight)
        self.intra_weight = _checks.check_not_negative("intra_weight", intra_weight)

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None, progress: float) -> dict[str, Tensor]:
        exact = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        p, q = ((z.flatten(0, -2).to(exact) / self.temperature).softmax(1) for z in (teacher, student))
        terms = {}
        for name, weight, dim in (("inter_loss", self.inter_weight, 1), ("intra_loss", self.intra_weight, 0)):
            if weight != 0.0:
                terms[name] = weight * self.temperature**2 * (1.0 - _correlation(q, p, dim).mean())
        return terms


def _without(logits: Tensor, target: Tensor) -> Tensor:
    """The logits without the target's, whose probability becomes 0."""
    return logits.scatter(-1, target[..., None], -torch.inf)


def _correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Pearson's, along a dimension."""
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    norms: Tensor = a.norm(dim=dim) * b.norm(dim=dim)
    return (a * b).sum(dim) / (norms + 1e-8)
