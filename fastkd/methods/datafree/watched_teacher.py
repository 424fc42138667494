"""A teacher, and what of its inside is asked of generated images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastkd.functional import ChannelMoments, channel_moments
from fastkd.methods.features import FeatureTap
from fastkd.models.heads import linear_head

__all__ = ["Seen", "WatchedTeacher"]


class Seen(NamedTuple):
    """Of one run of the teacher; what was not asked for is empty."""

    logits: Tensor
    features: dict[str, Tensor]
    """Of the layers that are tapped."""
    moments: list[ChannelMoments]
    """Of what went into each batch norm, in the order in which they ran, which need not be that of ``modules()``."""
    running: list[tuple[Tensor, Tensor]]
    """Mean and variance that each of these batch norms keeps."""
    latents: Tensor | None
    """What went into the last linear layer, ``[B, d]``."""
    instance_means: Tensor | None
    """What went into the batch norms, averaged over the pixels and side by side, ``[B, sum of channels]``."""

    @property
    def description(self) -> Tensor:
        """Of each image, ``[B, d]``: the instance means, or, of a teacher without batch norms, the latents."""
        found = self.latents if self.instance_means is None else self.instance_means
        assert found is not None
        return found.float()


class WatchedTeacher:
    """Runs a teacher. Hooks stay on it; they do nothing but inside of :meth:`look`.

    Args:
        teacher: in evaluation mode.
        images: a few.
        layers: to tap.
        statistics: whether its batch norms are asked for their moments.
        latents: whether what goes into the last linear layer is asked for.
        instances: whether images are to be described by the means of what goes into the batch norms; of a teacher without
            batch norms by its latents.
        class_dim: of its logits; they are handed on with the classes last.

    Raises:
        ValueError: no batch norm keeps running statistics; the logits come out of no linear layer.
    """

    def __init__(
        self,
        teacher: nn.Module,
        images: Tensor,
        *,
        layers: Iterable[str] = (),
        statistics: bool = False,
        latents: bool = False,
        instances: bool = False,
        class_dim: int = -1,
    ) -> None:
        self._tap = FeatureTap(teacher, layers, class_dim)
        self._norms = [m for m in teacher.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        if statistics and not self._norms:
            raise ValueError(
                f"fastkd: bn_statistics is asked of a {type(teacher).__name__} without batch norms that keep running "
                "statistics, must be 0 for it"
            )
        self._statistics, self._instances = statistics, instances and bool(self._norms)
        self._looking = False
        self._forget()
        if statistics or self._instances:
            for norm in self._norms:
                norm.register_forward_pre_hook(self._measure)
        if latents or (instances and not self._norms):
            try:
                head = linear_head(teacher, images)
            except ValueError as error:
                asked = "activation" if latents else "contrast"
                raise ValueError(
                    f"fastkd: {asked} is asked of a {type(teacher).__name__} whose logits come out of no linear layer, must be "
                    "0 for it"
                ) from error
            head.layer.register_forward_pre_hook(self._keep_latents)

    def __call__(self, images: Tensor) -> Tensor:
        """The logits alone."""
        return self._tap(images).logits  # type: ignore[no-any-return]

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Of the layers that are tapped."""
        return self._tap(images).features  # type: ignore[no-any-return]

    def look(self, images: Tensor) -> Seen:
        """All that is asked for, with a graph where the images have one."""
        self._forget()  # what a teacher left that failed
        self._looking = True
        try:
            outputs = self._tap(images)
        finally:
            self._looking = False
        latents = self._latents[0].flatten(1) if self._latents else None
        means = torch.cat(self._means, 1) if self._means else None
        seen = Seen(outputs.logits, outputs.features, self._moments, self._running, latents, means)
        self._forget()  # no activation outlives the step
        return seen

    def _forget(self) -> None:
        self._moments: list[ChannelMoments] = []
        self._running: list[tuple[Tensor, Tensor]] = []
        self._means: list[Tensor] = []
        self._latents: list[Tensor] = []

    def _measure(self, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        """As the batch norms run: their order is another than that of the modules, in ResNets for one, and what goes into
        them may be changed in place by what comes after."""
        if self._looking and self._statistics:
            self._moments.append(channel_moments(inputs[0]))
            self._running.append((norm.running_mean, norm.running_var))  # type: ignore[arg-type]
        if self._looking and self._instances:
            self._means.append(inputs[0][:, :, None].flatten(2).mean(2))

    def _keep_latents(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._looking:
            self._latents.append(inputs[0])
