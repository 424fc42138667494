"""The head of a language model, as the fused linear losses take it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd._checks import LARGEST_NUMBER, check_dtype, check_number, check_positive, in_range
from fastkd.ops._rank_group import local_part

__all__ = ["LinearHead", "compute_dtype"]


class LinearHead(NamedTuple):
    """``logits = softcap * tanh(z / softcap)``, ``z = scale * (hidden @ weight.T + bias)``; without ``softcap``, ``z`` itself.

    Where a loss takes a head it takes its weight alone and an ``nn.Linear``, too.

    Args:
        weight: ``[V, H]``, of the dtype of the hidden states. A sharded one (``DTensor``, FSDP2) is gathered once in a call,
            and its gradient is averaged over the ranks, as FSDP has it.
        bias: ``[V]``.
        scale: factor of the logits (Cohere's ``logit_scale``; 1 / ``logits_scaling`` of Granite).
        softcap: limit of the logits (Gemma's ``final_logit_softcapping``).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, name: str, value: object, hidden: Tensor, group: Any = None) -> LinearHead:
        """The head that somebody gave for these hidden states, checked; its tensors whole, or this rank's part of them."""
        if isinstance(value, nn.Linear):
            value = cls(value.weight, value.bias)
        elif isinstance(value, Tensor):
            value = cls(value)
        if not isinstance(value, cls):
            raise TypeError(
                f"fastkd: {name} is {type(value).__name__}, must be a weight [V, H], an nn.Linear or a fastkd.LinearHead"
            )
        weight, bias, scale, softcap = value
        weight = _present(f"{name}.weight", check_dtype(f"{name}.weight", weight), group)
        if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"fastkd: {name}.weight has shape {tuple(weight.shape)}, must be [V, {hidden.shape[-1]}], as the hidden "
                f"states have shape {tuple(hidden.shape)}"
            )
        _check_like(f"{name}.weight", weight, hidden)
        if bias is not None:
            bias = _present(f"{name}.bias", check_dtype(f"{name}.bias", bias), group)
            if bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"fastkd: {name}.bias has shape {tuple(bias.shape)}, must be ({weight.shape[0]},), one for each class"
                )
            _check_like(f"{name}.bias", bias, hidden)
        scale = check_number(f"{name}.scale", scale)
        if not in_range(scale, -LARGEST_NUMBER, LARGEST_NUMBER):
            raise ValueError(f"fastkd: {name}.scale is {scale}, must be finite")
        if softcap is not None:
            softcap = check_positive(f"{name}.softcap", softcap)
        return cls(weight, bias, scale, softcap)

    def to(self, dtype: torch.dtype) -> LinearHead:
        """The same in another dtype, as autocast has it."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._replace(weight=self.weight.to(dtype), bias=bias)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Of the product with a head: what autocast makes of it, or the dtype of the hidden states."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _check_like(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.device != hidden.device:
        raise ValueError(
            f"fastkd: {name} is on {value.device}, must be where the hidden states are, on {hidden.device}"
        )
    if value.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(f"fastkd: {name} has dtype {value.dtype}, must be that of the hidden states, {hidden.dtype}")


def _present(name: str, value: Tensor, group: Any) -> Tensor:
    """All of a tensor that is sharded over ranks; with a group over whose ranks the classes lie, what this one has."""
    if type(value) in (Tensor, nn.Parameter):
        return value
    from torch.distributed.tensor import DTensor, Partial

    if group is not None:
        return local_part(name, value, group, 0)
    if not isinstance(value, DTensor):  # torch.compile does not see a DTensor by its attributes
        return value
    gradient = [Partial("avg")] * value.device_mesh.ndim
    return value.full_tensor(grad_placements=gradient)
