"""TEMPORARY: fastkd.ops.linear in plain torch, until the fused one is there."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

try:
    import fastkd.ops.linear  # noqa: F401
except ModuleNotFoundError:
    from fastkd.ops.divergence import divergence

    class LinearHead(NamedTuple):
        weight: Tensor
        bias: Tensor | None = None
        scale: float = 1.0
        softcap: float | None = None

        @classmethod
        def of(cls, module: nn.Linear, *, scale: float = 1.0, softcap: float | None = None) -> LinearHead:
            return cls(module.weight, module.bias, scale, softcap)

        def logits(self, hidden: Tensor, classes: int | None) -> Tensor:
            weight, bias = self.weight.float()[:classes], None if self.bias is None else self.bias.float()[:classes]
            logits = nn.functional.linear(hidden.float(), weight, bias) * self.scale
            return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def linear_divergence(
        student_hidden: Tensor,
        student_head: LinearHead,
        teacher_hidden: Tensor,
        teacher_head: LinearHead,
        target: Tensor | None = None,
        *,
        teacher_logits: Tensor | None = None,
        kind: str = "forward",
        temperature: float = 1.0,
        beta: float = 0.5,
        weight: Tensor | None = None,
        kd_scale: float = 1.0,
        task_scale: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "batchmean",
        classes: int | None = None,
        logits_dtype: Any = None,
        memory_budget: Any = None,
        skip_ignored: Any = None,
        student_entropy: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        student = LinearHead.logits(student_head, student_hidden, classes)
        teacher = LinearHead.logits(teacher_head, teacher_hidden, classes) if teacher_logits is None else teacher_logits
        loss, terms = divergence(
            student,
            teacher,
            target,
            kind=kind,
            temperature=temperature,
            beta=beta,
            weight=weight,
            kd_scale=kd_scale,
            task_scale=task_scale,
            ignore_index=ignore_index,
            reduction=reduction,
        )
        entropy = None
        if student_entropy:
            entropy = torch.distributions.Categorical(logits=student.detach() / temperature).entropy()
        return loss, terms, entropy

    import fastkd.ops

    module = ModuleType("fastkd.ops.linear")
    module.LinearHead, module.linear_divergence = LinearHead, linear_divergence  # type: ignore[attr-defined]
    sys.modules["fastkd.ops.linear"] = module
    fastkd.ops.linear = module  # type: ignore[attr-defined]
