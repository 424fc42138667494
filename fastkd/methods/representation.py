"""Distillation of representations: the student's feature maps become like the teacher's, in themselves (FitNet, SRD), in how
one layer turns into the next (FSP), or in where they are active (AT)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastkd import _checks
from fastkd.methods.channels import ChannelMethod, in_dtype_of
from fastkd.methods.given import Given, feature_of
from fastkd.methods.method import WeightedMethod
from fastkd.methods.registry import register
from fastkd.models.layers import FeatureLayers

__all__ = ["AT", "FSP", "SRD", "FitNet"]

_CIFAR_PLACES = 32 * 32  # of the first maps that AT's weight was chosen for


@register("fitnet", family="representation", trains="student, regressor", paper="Romero et al., ICLR 2015")
class FitNet(ChannelMethod):
    """``b MSE(ReLU(BN(Conv1x1(f_s))), f_t)`` of one layer, beside Hinton's loss.

    Romero et al., "FitNets: Hints for Thin Deep Nets" (ICLR 2015), Eq. 3. There the hint is a first stage and Hinton's loss
    the second; here, as in later comparisons, both are minimised at once. ``kd_weight=0, task_weight=1`` is the hint with
    labels alone.

    Args:
        layers, teacher_layers: one of each, maps ``[B, C, H, W]``; of two sizes the larger is averaged down.
    """

    term: ClassVar[str] = "hint_loss"

    @staticmethod
    def layers_of(layers: FeatureLayers) -> tuple[str, ...]:
        return (layers.stages[len(layers.stages) // 2],)

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        layers: Sequence[str] = ("layer2",),
        teacher_layers: Sequence[str] | None = None,
        *,
        task_weight: float = 0.1,
        kd_weight: float = 0.9,
        feature_weight: float = 100.0,
        temperature: float = 4.0,
        standardize: bool = False,
    ) -> None:
        weights = task_weight, kd_weight, feature_weight, temperature
        super().__init__(student_channels, teacher_channels, *weights, layers, teacher_layers, standardize=standardize)
        self.regressor = nn.Sequential(
            nn.Conv2d(self.student_channels, self.teacher_channels, 1, bias=False),
            nn.BatchNorm2d(self.teacher_channels),
            nn.ReLU(),
        )

    def distance(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        maps = self.maps(0, student, teacher)
        self.check_channels(student, teacher)
        student_map, teacher_map = _same_size(*maps)
        guided = self.regressor(in_dtype_of(self.regressor, student_map))
        # not mse_loss, which keeps the teacher's map for the backward pass: one made in inference mode it cannot keep
        difference: Tensor = guided.to(teacher_map.dtype) - teacher_map
        return difference.square().mean()


@register("srd", family="representation", trains="student, projector", paper="Miles & Mikolajczyk, AAAI 2024")
class SRD(ChannelMethod):
    """``b log sum |BN(W f_s) - BN(f_t)|^alpha`` over samples and channels, of pooled features.

    Miles & Mikolajczyk, "Understanding the Role of the Projector in Knowledge Distillation" (AAAI 2024): W is a linear
    projector, BN a batch norm without weights, alpha 4. Weights and temperature are those of the authors' code for
    ImageNet, and so is the 1e-4 in the batch norms; the sum of no difference at all is taken as 1e-5.

    Args:
        layers, teacher_layers: one of each, ``[B, C, ...]``, averaged over places. B >= 2 while it is trained.
        exponent: alpha >= 1.
    """

    term: ClassVar[str] = "projection_loss"

    @staticmethod
    def layers_of(layers: FeatureLayers) -> tuple[str, ...]:
        return (layers.embedding,)

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        layers: Sequence[str] = ("avgpool",),
        teacher_layers: Sequence[str] | None = None,
        *,
        task_weight: float = 1.0,
        kd_weight: float = 1.0,
        feature_weight: float = 2.0,
        temperature: float = 1.0,
        exponent: float = 4.0,
        standardize: bool = False,
    ) -> None:
        weights = task_weight, kd_weight, feature_weight, temperature
        super().__init__(student_channels, teacher_channels, *weights, layers, teacher_layers, standardize=standardize)
        self.exponent = _checks.check_between("exponent", exponent, 1.0, 100.0)
        self.projector = nn.Linear(self.student_channels, self.teacher_channels)
        self.student_norm, self.teacher_norm = (
            nn.BatchNorm1d(self.teacher_channels, eps=1e-4, affine=False) for _ in range(2)
        )

    def distance(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        ours, theirs = (in_dtype_of(self.projector, f) for f in self.pooled_pair(student, teacher))
        difference = self.student_norm(self.projector(ours)) - self.teacher_norm(theirs)
        exact = torch.promote_types(difference.dtype, torch.float32)
        total: Tensor = difference.to(exact).abs().pow(self.exponent).sum()
        return (total + 1e-5).log()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, exponent={self.exponent}"


@register("fsp", family="representation", paper="Yim et al., CVPR 2017")
class FSP(WeightedMethod):
    """``b sum_i mean (G_s - G_t)^2`` over consecutive layers, ``G = mean_hw F_i (x) F_{i+1}``, ``[B, C_i, C_{i+1}]``.

    Yim et al., "A Gift from Knowledge Distillation" (CVPR 2017), Eq. 1 and 2. There it initialises the student; here it is
    minimised beside Hinton's loss. One matrix product a pair: the ``B x C_i x C_{i+1} x H x W`` products are never there.

    Args:
        layers, teacher_layers: two or more of each, maps ``[B, C, H, W]``, student and teacher of equal channels; of two
            consecutive layers the larger map is averaged down to the smaller.
    """

    term: ClassVar[str] = "flow_loss"

    @staticmethod
    def layers_of(layers: FeatureLayers) -> tuple[str, ...]:
        return (layers.stem, *layers.stages)

    def __init__(
        self,
        layers: Sequence[str] = ("relu", "layer1", "layer2", "layer3"),
        teacher_layers: Sequence[str] | None = None,
        *,
        task_weight: float = 0.1,
        kd_weight: float = 0.9,
        feature_weight: float = 50.0,
        temperature: float = 4.0,
        standardize: bool = False,
    ) -> None:
        super().__init__(
            task_weight, kd_weight, feature_weight, temperature, layers, teacher_layers, standardize=standardize
        )
        self.check_layers(2)

    def distance(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        for i in range(len(self.layers)):
            student_map, teacher_map = self.maps(i, student, teacher)
            if student_map.shape[1] != teacher_map.shape[1]:
                raise ValueError(f"fastkd: {self.described(i, student, teacher)}: FSP needs equal numbers of channels")
        flows = zip(_flows(student), _flows(teacher), strict=True)
        return torch.stack([F.mse_loss(ours, theirs) for ours, theirs in flows]).sum()


@register("at", family="representation", paper="Zagoruyko & Komodakis, ICLR 2017")
class AT(WeightedMethod):
    """``b sum_i mean (A_s - A_t)^2`` with ``A = L2norm(vec(mean_c F^2))``, ``[B, H W]``: where a layer is active.

    Zagoruyko & Komodakis, "Paying More Attention to Attention" (ICLR 2017), Eq. 2, activation-based, p = 2. The weight is of
    a mean over places, as their code has it, and was chosen for maps of 32 x 32 and more: of a map of H W places the squared
    distance weighs b / (H W), so smaller images want a smaller b (:meth:`build`, and so
    :func:`fastkd.methods.registry.create`, sees to it).

    Args:
        layers, teacher_layers: maps ``[B, C, H, W]``, compared in pairs; of two sizes the larger is averaged down.
    """

    term: ClassVar[str] = "attention_loss"

    @staticmethod
    def layers_of(layers: FeatureLayers) -> tuple[str, ...]:
        return layers.stages

    @classmethod
    def build(cls, given: Given, **options: Any) -> AT:
        """With a smaller weight for maps of fewer places than those that the published one was chosen for."""
        method = super().build(given, **options)
        if "feature_weight" not in options and given.images is not None:
            pairs = ((given.student, method.layers), (given.teacher, method.teacher_layers))
            places = [
                feature_of(network, layers[0], given.images).shape[2:].numel()
                for network, layers in pairs
                if network is not None
            ]
            if len(places) == len(pairs):
                method.feature_weight *= min(1.0, min(places) / _CIFAR_PLACES)
        return method

    def __init__(
        self,
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        teacher_layers: Sequence[str] | None = None,
        *,
        task_weight: float = 1.0,
        kd_weight: float = 0.0,
        feature_weight: float = 1000.0,
        temperature: float = 4.0,
        standardize: bool = False,
    ) -> None:
        super().__init__(
            task_weight, kd_weight, feature_weight, temperature, layers, teacher_layers, standardize=standardize
        )
        self.check_layers(1)

    def distance(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        pairs = (_same_size(*self.maps(i, student, teacher)) for i in range(len(self.layers)))
        return torch.stack([F.mse_loss(attention(ours), attention(theirs)) for ours, theirs in pairs]).sum()


def attention(feature_map: Tensor) -> Tensor:
    """``[B, C, H, W]`` -> ``[B, H W]``: the energy of each place, of norm 1 over the image."""
    forward_mode = forward_ad._current_level >= 0  # of a Function torch.compile does not take it
    energy: Tensor = (feature_map * feature_map).mean(1) if forward_mode else _Energy.apply(feature_map)  # type: ignore[no-untyped-call]
    return F.normalize(energy.flatten(1))


class _Energy(torch.autograd.Function):
    """``mean_c F^2``, whose gradient is one pass over F (of ``F * F`` it is three). Differentiable any number of times."""

    generate_vmap_rule = True

    @staticmethod
    def forward(feature_map: Tensor) -> Tensor:
        return (feature_map * feature_map).mean(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (feature_map,) = ctx.saved_tensors
        return feature_map * (grad * (2.0 / feature_map.shape[1]))[:, None]  # type: ignore[no-any-return]


def _flows(maps: list[Tensor]) -> list[Tensor]:
    flows = []
    for before, after in pairwise(maps):
        before, after = _same_size(before, after)
        places = before.shape[2] * before.shape[3]
        flows.append(before.flatten(2) @ after.flatten(2).transpose(1, 2) / places)
    return flows


def _same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and the smaller width."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    a, b = (f if f.shape[2:] == size else F.adaptive_avg_pool2d(f, size) for f in (a, b))
    return a, b
