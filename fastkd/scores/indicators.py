"""Fifteen indicators of how little an image looks like the teacher's task. Higher = less alike.

Of the logits z, of the latent vector u and the row w of the head's weights that belongs to the largest logit, and of the
teacher's batch norms, which know the moments of the task's maps: "Sample-free white-box out-of-distribution detection for deep
learning" (Begon & Geurts, 2021), from whose definitions the names here are free.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastkd.functional import channel_moments
from fastkd.scores.logits import max_softmax, negative_entropy, t1000

__all__ = [
    "BATCH_NORM",
    "COMPONENTS",
    "LATENT",
    "RESPONSE",
    "ChannelIndicators",
    "latent_indicators",
    "response_indicators",
]

RESPONSE = ("uncertainty", "entropy", "t1000")
LATENT = (
    *("norm", "activation", "projection", "angle"),
    *("positive_norm", "positive_activation", "positive_angle", "mixed_angle"),
)
BATCH_NORM = ("channel_mean", "channel_square", "channel_spread", "channel_extremes")
COMPONENTS = (*RESPONSE, *LATENT, *BATCH_NORM)
TAIL = 0.05  # share of the variances of Gaussian maps on each side that counts as extreme


def response_indicators(logits: Tensor) -> Tensor:
    """``1 - max p``, the entropy, and ``-T1000``: float64 ``[B, 3]`` of logits ``[B, K]``."""
    return torch.stack([1.0 - max_softmax(logits), -negative_entropy(logits), -t1000(logits)], 1)


def latent_indicators(latent: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
    """With A = u w, u+ and w+ the parts where w > 0, and A+ = u+ w+: float64 ``[B, 8]``.

    ``-|u|``, ``-A``, ``-A / |w|``, ``1 - A / (|u| |w|)``; ``-|u+|``, ``-A+``, ``1 - A+ / (|u+| |w+|)``, ``1 - A+ / (|u| |w|)``.
    A quotient by 0 is 0.

    Args:
        latent: u, ``[B, p]``.
        logits: ``[B, K]``.
        weight: of the head, ``[K, p]``.
    """
    u, w = latent.double(), weight[logits.argmax(1)].double()
    positive = w > 0
    u_positive, w_positive = u * positive, w * positive
    activation, activation_positive = (u * w).sum(1), (u_positive * w_positive).sum(1)
    u_norm, w_norm, u_positive_norm, w_positive_norm = (t.norm(dim=1) for t in (u, w, u_positive, w_positive))
    found = (
        -u_norm,
        -activation,
        -_quotient(activation, w_norm),
        1.0 - _quotient(activation, u_norm * w_norm),
        -u_positive_norm,
        -activation_positive,
        1.0 - _quotient(activation_positive, u_positive_norm * w_positive_norm),
        1.0 - _quotient(activation_positive, u_norm * w_norm),
    )
    return torch.stack(found, 1)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0.0)


class ChannelIndicators:
    """Of the batch norms of a network, as it runs: means over all channels of all layers.

    t are the maps that a batch norm has made of its input before it scales and shifts them, of mean 0 and variance 1 on the
    task: ``mean(t)^2``, ``mean(t^2)``, ``(std(t) - 1)^2``, and the share of channels where ``(P - 1) var(t)`` lies in one of
    the tails of 5 % of chi^2 with P - 1 degrees of freedom, P pixels; all over the pixels of one image. They are computed from
    the input and the running statistics, so weights of 0 do no harm. Layers without running statistics are left out, and of
    maps of one pixel the last one is 0.
    """

    def __init__(self, network: nn.Module) -> None:
        self._layers = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self._sums: Tensor | None = None
        self._channels = 0

    @property
    def there_are_any(self) -> bool:
        """Whether the network has such layers."""
        return bool(self._layers)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the ``with`` block the network runs once."""
        self._sums, self._channels = None, 0
        hooks = [layer.register_forward_pre_hook(self._see) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def found(self) -> Tensor:
        """float64 ``[B, 4]``, of the run within the last :meth:`watching`.

        Raises:
            RuntimeError: none of the layers has run.
        """
        if self._sums is None:
            raise RuntimeError("fastkd: no batch norm of the teacher ran, must be one or more")
        return self._sums / self._channels

    def _see(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(layer, _BatchNorm)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        maps: Tensor = inputs[0]
        pixels = maps[0, 0].numel()
        moments = channel_moments(maps, per_sample=True)
        scale = (layer.running_var + layer.eps).rsqrt().to(moments.mean.dtype)
        mean, variance = (moments.mean - layer.running_mean) * scale, moments.var * scale.square()
        extreme = torch.zeros_like(variance)
        if pixels > 1:
            low, high = (bound / (pixels - 1) for bound in chi_square_tails(pixels - 1))
            extreme = ((variance < low) | (variance > high)).to(variance.dtype)
        found = (mean.square(), mean.square() + variance, (variance.sqrt() - 1.0).square(), extreme)
        sums = torch.stack([value.sum(1, dtype=torch.float64) for value in found], 1)
        self._sums = sums if self._sums is None else self._sums + sums
        self._channels += maps.shape[1]


@lru_cache(maxsize=256)
def chi_square_tails(degrees: int) -> tuple[float, float]:
    """The quantiles :data:`TAIL` and 1 - TAIL of chi^2 with so many degrees of freedom."""
    # of the cube root, which is nearly Gaussian (Wilson & Hilferty), both lie within 10 deviations of the mean
    deviation = (2.0 / (9.0 * degrees)) ** 0.5
    middle = 1.0 - deviation**2
    bounds = [[max(middle - 10.0 * deviation, 0.0), middle + 10.0 * deviation] for _ in range(2)]
    half = torch.tensor(degrees / 2.0, dtype=torch.float64, device="cpu")
    for _ in range(100):
        for bound, share in zip(bounds, (TAIL, 1.0 - TAIL), strict=True):
            root = sum(bound) / 2.0
            below = float(torch.special.gammainc(half, half * root**3)) < share
            bound[0 if below else 1] = root
    low, high = (degrees * (sum(bound) / 2.0) ** 3 for bound in bounds)
    return low, high
