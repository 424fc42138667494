"""Losses of hidden states and heads, whose logits never exist as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import functional
from fastkd._checks import check_choice, check_count, check_flag, check_row_reduction, check_share
from fastkd.functional.divergence import DIRECTIONS, Direction, Group, Reduction, RowReduction
from fastkd.losses.loss import Loss


class LinearLoss(Loss):
    """Beside what every loss is told, how the chunks of logits are made: as in :func:`fastkd.functional.linear_kl_div`."""

    def __init__(
        self,
        temperature: float | Tensor,
        reduction: Reduction,
        ignore_index: int,
        classes: int | None,
        logits_dtype: torch.dtype | None,
        memory_budget: int | None,
        skip_ignored: bool | None,
    ) -> None:
        super().__init__(temperature, reduction, ignore_index)
        self.classes = None if classes is None else check_count("classes", classes, 1)
        self.logits_dtype = logits_dtype
        self.memory_budget = None if memory_budget is None else check_count("memory_budget", memory_budget, 1)
        self.skip_ignored = None if skip_ignored is None else check_flag("skip_ignored", skip_ignored)

    def _options(self) -> dict[str, Any]:
        return {
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "classes": self.classes,
            "logits_dtype": self.logits_dtype,
            "memory_budget": self.memory_budget,
            "skip_ignored": self.skip_ignored,
        }


class LinearKLDivLoss(LinearLoss):
    """``T^2 KL`` of two heads from hidden states. Arguments as in :func:`fastkd.functional.linear_kl_div`.

    >>> criterion = fastkd.LinearKLDivLoss()
    >>> loss = criterion(student_hidden, student.lm_head, teacher_hidden, teacher.lm_head, labels)
    """

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        reduction: Reduction = "batchmean",
        direction: Direction = "forward",
        ignore_index: int = -100,
        *,
        classes: int | None = None,
        logits_dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
        skip_ignored: bool | None = None,
    ) -> None:
        super().__init__(temperature, reduction, ignore_index, classes, logits_dtype, memory_budget, skip_ignored)
        check_choice("direction", direction, DIRECTIONS)
        self.direction: Direction = direction

    def forward(
        self,
        student_hidden: Tensor,
        student_head: object,
        teacher_hidden: Tensor | None = None,
        teacher_head: object = None,
        target: Tensor | None = None,
        weight: Tensor | None = None,
        *,
        teacher_logits: Tensor | None = None,
        group: Group | None = None,
    ) -> Tensor:
        """The loss of hidden states ``[..., H]`` and their heads; ``target``, which says what is ignored, is ``[...]``."""
        return functional.linear_kl_div(
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            self.temperature,
            teacher_logits=teacher_logits,
            direction=self.direction,
            target=target,
            weight=weight,
            group=group,
            **self._options(),
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, direction={self.direction!r}"


class LinearJSDivLoss(LinearLoss):
    """``T^2`` times the Jensen-Shannon divergence of two heads. Arguments as in :func:`fastkd.functional.linear_js_div`."""

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        beta: float = 0.5,
        reduction: Reduction = "batchmean",
        ignore_index: int = -100,
        *,
        classes: int | None = None,
        logits_dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
        skip_ignored: bool | None = None,
    ) -> None:
        super().__init__(temperature, reduction, ignore_index, classes, logits_dtype, memory_budget, skip_ignored)
        self.beta = check_share("beta", beta)

    def forward(
        self,
        student_hidden: Tensor,
        student_head: object,
        teacher_hidden: Tensor | None = None,
        teacher_head: object = None,
        target: Tensor | None = None,
        weight: Tensor | None = None,
        *,
        teacher_logits: Tensor | None = None,
        group: Group | None = None,
    ) -> Tensor:
        """The loss of hidden states ``[..., H]`` and their heads; ``target``, which says what is ignored, is ``[...]``."""
        return functional.linear_js_div(
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            self.temperature,
            teacher_logits=teacher_logits,
            beta=self.beta,
            target=target,
            weight=weight,
            group=group,
            **self._options(),
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta={self.beta}"


class LinearKDLoss(LinearLoss):
    """``(1 - alpha) CE + alpha T^2 KL`` of two heads. Arguments as in :func:`fastkd.functional.linear_kd_loss`."""

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        alpha: float = 0.5,
        reduction: RowReduction = "batchmean",
        direction: Direction = "forward",
        ignore_index: int = -100,
        *,
        classes: int | None = None,
        logits_dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
        skip_ignored: bool | None = None,
    ) -> None:
        super().__init__(temperature, reduction, ignore_index, classes, logits_dtype, memory_budget, skip_ignored)
        check_row_reduction(reduction)
        check_choice("direction", direction, DIRECTIONS)
        self.alpha = check_share("alpha", alpha)
        self.direction: Direction = direction

    def forward(
        self,
        student_hidden: Tensor,
        student_head: object,
        teacher_hidden: Tensor | None,
        teacher_head: object,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        teacher_logits: Tensor | None = None,
        group: Group | None = None,
    ) -> Tensor:
        """The loss of hidden states ``[..., H]`` and their heads, and of classes ``[...]``."""
        loss: Tensor = functional.linear_kd_loss(
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            target,
            self.temperature,
            self.alpha,
            teacher_logits=teacher_logits,
            direction=self.direction,
            weight=weight,
            group=group,
            **self._options(),
        )
        return loss

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}, direction={self.direction!r}"
