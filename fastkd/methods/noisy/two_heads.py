"""A classifier with two heads on one body, and with classifiers in the middle of it that learn from both."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastkd.methods.features import FeatureTap
from fastkd.methods.given import feature_of
from fastkd.methods.noisy.terms import log_probabilities
from fastkd.models.heads import linear_head, with_head
from fastkd.models.layers import feature_layers

__all__ = ["Heads", "SelfDistilled", "TwoHeads"]


class TwoHeads(nn.Module):
    """A positive and a negative linear head in the place of the network's own.

    Shape: images -> ``log((p + p') / 2)`` ``[B, K]`` of the heads' probabilities, whose softmax is what both predict.

    Args:
        network: ends with a linear layer, which becomes the positive head; the negative one is drawn anew.
        images: a few, where the network is.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        super().__init__()
        head = linear_head(network, images)
        self.body = with_head(network, head.name, nn.Identity())
        self.positive = head.layer
        self.negative = copy.deepcopy(head.layer)
        self.negative.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        latents = self.body(images)
        both = (log_probabilities(head(latents)) for head in (self.positive, self.negative))
        return torch.logaddexp(*both) - math.log(2.0)

    def negative_logits(self, images: Tensor) -> Tensor:
        """``[B, K]``, of the negative head alone."""
        logits: Tensor = self.negative(self.body(images))
        return logits


class Heads(NamedTuple):
    """What a :class:`SelfDistilled` puts out: logits ``[B, K]`` and latent vectors ``[B, p]``, those of the middle a list."""

    positive: Tensor
    negative: Tensor
    middle: list[Tensor]
    latents: Tensor
    middle_latents: list[Tensor]

    def halves(self) -> tuple[Heads, Heads]:
        """Those of the first half of the images, and of the second."""
        whole = (self.positive, self.negative, self.latents, *self.middle, *self.middle_latents)
        several = len(self.middle)

        def made(parts: tuple[Tensor, ...]) -> Heads:
            positive, negative, latents, *others = parts
            return Heads(positive, negative, others[:several], latents, others[several:])

        first, second = zip(*(tensor.chunk(2) for tensor in whole), strict=True)
        return made(first), made(second)


class SelfDistilled(nn.Module):
    """:class:`TwoHeads` with a bottleneck and a classifier after each stage but the last (Zhang et al., "Be Your Own Teacher",
    ICCV 2019, whose picture is Figure 2 of Zong et al.). In the end they are left out.

    Args:
        network: with :func:`fastkd.models.layers.feature_layers`, where there is to be a middle.
        images: a few, where the network is.
        middle: whether there is one.
    """

    def __init__(self, network: nn.Module, images: Tensor, *, middle: bool = True) -> None:
        super().__init__()
        self.heads = TwoHeads(network, images)
        stages = feature_layers(network).stages[:-1] if middle else ()
        self.middle = nn.ModuleList()
        if stages:
            places = [
                feature_of(self.heads.body, stage, images).shape
                for stage in (*stages, feature_layers(network).stages[-1])
            ]
            latents, classes = self.heads.positive.in_features, self.heads.positive.out_features
            for shape in places[:-1]:
                scale = max(1, min(shape[2] // places[-1][2], shape[3] // places[-1][3]))
                self.middle.append(_Middle(shape[1], latents, classes, scale))
            self.middle.to(images.device)
        self.tap = FeatureTap(self.heads.body, stages)

    def forward(self, images: Tensor) -> Heads:
        outputs = self.tap(images)
        latents = outputs.logits
        assert isinstance(latents, Tensor)
        found = [part(outputs.features[name]) for part, name in zip(self.middle, self.tap.layers, strict=True)]
        return Heads(
            self.heads.positive(latents),
            self.heads.negative(latents),
            [logits for logits, _ in found],
            latents,
            [vectors for _, vectors in found],
        )


class _Middle(nn.Module):
    """Maps ``[B, C, H, W]`` to logits ``[B, K]`` and latent vectors ``[B, p]``."""

    def __init__(self, channels: int, latents: int, classes: int, scale: int) -> None:
        super().__init__()
        narrow = max(1, latents // 4)
        layers: list[nn.Module] = []
        for before, after, size in ((channels, narrow, 1), (narrow, narrow, scale), (narrow, latents, 1)):
            layers += [nn.Conv2d(before, after, size, stride=size), nn.BatchNorm2d(after), nn.ReLU()]
        self.bottleneck = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(latents, classes)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        vectors = self.bottleneck(maps)
        return self.classifier(vectors), vectors
