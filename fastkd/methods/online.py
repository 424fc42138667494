"""Online distillation: networks that learn together and teach each other, without a teacher before: branches of one
network, taught by their gated ensemble (ONE), or a cohort of networks (DML)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastkd import _checks, functional
from fastkd._seeding import seeded
from fastkd.methods.features import JointLogits, Outputs, check_module, logits_of, logits_of_one
from fastkd.methods.method import Loss, Method, check_logits, check_progress, cross_entropy
from fastkd.methods.registry import register
from fastkd.models.modes import evaluating

__all__ = ["DML", "ONE", "Cohort", "MultiBranch"]


@register("one", family="online", needs=("labels",), trains="branches, gate", paper="Lan et al., NeurIPS 2018")
class ONE(Method):
    """``sum CE(branches and ensemble) + w sum_branches T^2 KL(ensemble || branch)``, the ensemble taken as given.

    Lan et al., "Knowledge Distillation by On-the-Fly Native Ensemble" (NeurIPS 2018), Eq. 4 to 8, and the authors' ramp:
    ``w = exp(-5 (1 - r)^2)`` with r from 0 to 1 over the first ``ramp_share`` of the training (80 of 300 epochs there).

    Its student is a :class:`MultiBranch`; what is kept in the end is its first branch.

    Args:
        temperature: T > 0.
        branches: of the student that ``build_student`` makes, 2 or more.
        branch_at: the child module of the student at which the branches begin.
        ramp_share: in [0, 1].
    """

    needs_teacher: ClassVar[bool] = False

    def __init__(
        self, temperature: float = 3.0, *, branches: int = 3, branch_at: str = "layer3", ramp_share: float = 80 / 300
    ) -> None:
        super().__init__()
        self.branches = _checks.check_count("branches", branches, 2)
        if not isinstance(branch_at, str):
            raise TypeError(f"fastkd: branch_at is {branch_at!r}, must be the name of a child module")
        self.branch_at = branch_at
        self.temperature = _checks.check_positive("temperature", temperature)
        self.ramp_share = _checks.check_not_negative("ramp_share", ramp_share)
        if self.ramp_share > 1.0:
            raise ValueError(f"fastkd: ramp_share is {ramp_share}, must be a share of the training, in [0, 1]")

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor | None, progress: float = 0.0) -> Loss:
        weight = self.ramp(progress)
        *branches, ensemble = _logits_of_several(student.logits)
        task = torch.stack([cross_entropy(one, target) for one in (*branches, ensemble)]).sum()
        loss = Loss(task, {"task_loss": task.detach()})
        if weight == 0.0:  # a ramp of a subclass
            return loss
        given = ensemble.detach()
        kd = torch.stack([functional.kl_div(one, given, self.temperature) for one in branches]).sum()
        return loss.with_term("kd_loss", weight * kd)

    def ramp(self, progress: float) -> float:
        """w, of a progress in [0, 1]: from exp(-5) to 1."""
        check_progress(progress)
        left = 1.0 - progress / self.ramp_share if progress < self.ramp_share else 0.0
        return math.exp(-5.0 * left**2)

    def build_student(self, make: Callable[[int], nn.Module]) -> MultiBranch:
        """Branches of ``make(0)``, ``make(1)``, ...; the gate begins with the same weights, whatever ``make`` makes."""
        return MultiBranch.split([make(seed) for seed in range(self.branches)], self.branch_at)

    def deployed(self, student: nn.Module) -> nn.Module:
        if not isinstance(student, MultiBranch):
            raise TypeError(f"fastkd: student is {type(student).__name__}, must be a MultiBranch for ONE")
        return student.branch(0)

    def extra_repr(self) -> str:
        student = f"branches={self.branches}, branch_at={self.branch_at!r}"
        return f"temperature={self.temperature}, {student}, ramp_share={self.ramp_share}"


@register("dml", family="online", needs=("labels",), trains="cohort of networks", paper="Zhang et al., CVPR 2018")
class DML(Method):
    """``sum_i [CE_i + mean_{j != i} T^2 KL(p_j || p_i)]`` over the networks of a cohort, the other's p_j taken as given.

    Zhang et al., "Deep Mutual Learning" (CVPR 2018), Eq. 5 to 7 and 9, where T is 1. All networks take a step on the same batch
    from the same predictions. Its student is a :class:`Cohort`; what is kept in the end is the first network.

    Args:
        networks: of the cohort that ``build_student`` makes, 2 or more.
        temperature: T > 0.
    """

    needs_teacher: ClassVar[bool] = False

    def __init__(self, networks: int = 2, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.networks = _checks.check_count("networks", networks, 2)
        self.temperature = _checks.check_positive("temperature", temperature)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor | None, progress: float = 0.0) -> Loss:
        check_progress(progress)
        cohort = _logits_of_several(student.logits)
        given = [logits.detach() for logits in cohort]
        task = torch.stack([cross_entropy(logits, target) for logits in cohort]).sum()
        pairs = [
            functional.kl_div(ours, theirs, self.temperature)
            for i, ours in enumerate(cohort)
            for j, theirs in enumerate(given)
            if i != j
        ]
        mutual = torch.stack(pairs).sum() / (len(cohort) - 1)
        return Loss(task, {"task_loss": task.detach()}).with_term("mutual_loss", mutual)

    def build_student(self, make: Callable[[int], nn.Module]) -> Cohort:
        return Cohort([make(seed) for seed in range(self.networks)])

    def deployed(self, student: nn.Module) -> nn.Module:
        if not isinstance(student, Cohort):
            raise TypeError(f"fastkd: student is {type(student).__name__}, must be a Cohort for DML")
        return student.networks[0]

    def extra_repr(self) -> str:
        return f"networks={self.networks}, temperature={self.temperature}"


class MultiBranch(nn.Module):
    """One trunk, several branches, and a gate that weighs their logits for each image.

    Args:
        trunk: images to maps ``[B, C, H, W]``.
        branches: modules of their own, maps to logits ``[B, K]``.
        channels: C, 1 or more.
        seed: of the gate's initial weights, which are on the device and of the dtype of the trunk's; torch's global generator
            stays as it is.

    Shape: images ``[B, ...]`` -> :class:`fastkd.methods.JointLogits` of the branches and, last, of the ensemble, ``[B, K]``
    each: ``sum_i g_i z_i`` with ``g = softmax(ReLU(BN(Linear(mean_hw map))))``.
    """

    def __init__(self, trunk: nn.Module, branches: Sequence[nn.Module], channels: int, *, seed: int = 0) -> None:
        super().__init__()
        self.trunk = check_module("trunk", trunk)
        self.branches = _several("branches", branches)
        channels, seed = _checks.check_count("channels", channels, 1), _checks.check_count("seed", seed, -(2**63))
        self._frame: _Frame | None = None
        many = len(self.branches)
        with seeded(seed), torch.device("cpu"):  # where the seed counts, whatever torch's default device is
            linear, norm = nn.Linear(channels, many), nn.BatchNorm1d(many)
        gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear, norm, nn.ReLU(), nn.Softmax(1))
        like = _some_weight(self)
        self.gate = gate.to(like.device, like.dtype)

    def forward(self, images: Tensor) -> JointLogits:
        maps = self.trunk(images)
        logits = torch.stack([branch(maps) for branch in self.branches])
        ensemble = torch.einsum("bm,mb...k->b...k", self.gate(maps).to(logits.dtype), logits)
        return JointLogits((*logits, ensemble))

    def branch(self, i: int) -> nn.Module:
        """One network, images to logits; it shares the weights. After :meth:`split`, of the class that was split."""
        if self._frame is None:
            return nn.Sequential(self.trunk, self.branches[i])
        parts = [part for half in (self.trunk, self.branches[i]) for part in half.children()]
        network = self._frame.around([part for part in parts if not isinstance(part, _Flatten)])
        network.training = self.training
        return network

    @staticmethod
    def split(networks: Sequence[nn.Module], at: str) -> MultiBranch:
        """The trunk of the first of these like networks, and of each what begins with its child module ``at``.

        For networks that run their children in the order of ``named_children()`` (with a flatten before the first linear
        layer) and take images of 32 x 32 pixels, as fastkd's and torchvision's residual networks do.

        Raises:
            ValueError: no such child, none before it, or a network that works otherwise, which is tried (on the meta device,
                which has no values, the shapes must do).
        """
        parts = [_split(network, at) for network in networks]
        trunk = parts[0][0]
        channels = next((module.in_channels for module in trunk.modules() if isinstance(module, nn.Conv2d)), 1)
        example = torch.linspace(-1, 1, 2 * channels * 32 * 32, device="cpu").reshape(2, channels, 32, 32)
        example = example.to(_some_weight(networks[0]))
        whole, in_parts = (_in_evaluation(network, example) for network in (networks[0], nn.Sequential(*parts[0])))
        if whole is None or in_parts is None or not _same(whole, in_parts):
            raise ValueError(
                f"fastkd: {type(networks[0]).__name__} does not run its children in order, so it cannot be split at {at!r}: "
                "make trunk and branches by hand, MultiBranch(trunk, branches, channels)"
            )
        maps = _in_evaluation(trunk, example)
        student = MultiBranch(trunk, [branch for _, branch in parts], 1 if maps is None else maps.shape[1])
        student._frame = _Frame(networks[0])
        return student


class _Frame:
    """A network without its children, to put others in their places: no module, so that its state is nobody's."""

    def __init__(self, network: nn.Module) -> None:
        children = list(network.children())
        self.places = [nn.Identity() for _ in children]
        self.network = copy.deepcopy(network, _instead(children, self.places))

    def around(self, children: list[nn.Module]) -> nn.Module:
        """A network of these very children, in the order of ``named_children()``."""
        return copy.deepcopy(self.network, _instead(self.places, children))


def _instead(olds: Sequence[nn.Module], news: Sequence[nn.Module]) -> dict[int, object]:
    """A memo, by which ``copy.deepcopy`` takes the new ones wherever it meets the old ones."""
    return {id(old): new for old, new in zip(olds, news, strict=True)}


class _Flatten(nn.Flatten):
    """One that the network does in its ``forward``, so that it is none of its children."""


class Cohort(nn.Module):
    """Networks side by side on the same images.

    Shape: images ``[B, ...]`` -> :class:`fastkd.methods.JointLogits` of the networks, ``[B, ..., K]`` each.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = _several("networks", networks)

    def forward(self, images: Tensor) -> JointLogits:
        results = [logits_of(network(images)) for network in self.networks]  # no generator, for torch.compile's sake
        return JointLogits([logits_of_one("the logits of a network of the cohort", result) for result in results])


def _split(network: nn.Module, at: str) -> tuple[nn.Module, nn.Module]:
    children = dict(network.named_children())
    names = list(children)
    if at not in names[1:]:
        raise ValueError(
            f"fastkd: branch_at is {at!r}, must be a child of {type(network).__name__}: {', '.join(names[1:])}"
        )
    tail: list[nn.Module] = []
    flat = False
    for name in names[names.index(at) :]:
        if isinstance(children[name], nn.Linear) and not flat:
            tail.append(_Flatten())
            flat = True
        tail.append(children[name])
    return nn.Sequential(*(children[name] for name in names[: names.index(at)])), nn.Sequential(*tail)


@torch.no_grad()
def _in_evaluation(network: nn.Module, images: Tensor) -> Tensor | None:
    """What it returns, or None where it cannot take these."""
    with evaluating(network):
        try:
            result: Tensor = network(images)
        except RuntimeError:
            return None
    return result


def _some_weight(network: nn.Module) -> Tensor:
    """One of its floats, which says on what device and of what dtype it works; of a network without, torch's defaults."""
    return next((p.detach() for p in network.parameters() if p.is_floating_point()), torch.empty(0))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape if a.is_meta else torch.equal(a, b)


def _logits_of_several(logits: object) -> list[Tensor]:
    """Of two networks or more, ``[B, ..., K]`` each."""
    if not isinstance(logits, (tuple, list)) or len(logits) < 2:
        given = (
            f"has shape {tuple(logits.shape)}"
            if isinstance(logits, Tensor)
            else f"holds {len(logits)} networks"
            if isinstance(logits, (tuple, list))
            else f"is {type(logits).__name__}"
        )
        raise ValueError(
            f"fastkd: student.logits {given}, must be JointLogits, [B, ..., K] of each of 2 networks or more: the student is "
            "what build_student makes; of a stack [networks, B, ..., K] they are JointLogits(stack)"
        )
    each = [check_logits(f"student.logits[{i}]", one) for i, one in enumerate(logits)]
    for i, one in enumerate(each):
        if one.shape != each[0].shape:
            raise ValueError(
                f"fastkd: student.logits[{i}] has shape {tuple(one.shape)}, must be that of student.logits[0], "
                f"{tuple(each[0].shape)}"
            )
    return each


def _several(name: str, modules: Iterable[nn.Module]) -> nn.ModuleList:
    """Two modules or more."""
    if isinstance(modules, str) or not isinstance(modules, Iterable):
        raise TypeError(f"fastkd: {name} is {modules!r}, must be a sequence of modules")
    every = [check_module(f"{name}[{i}]", module) for i, module in enumerate(modules)]
    _checks.check_count(f"the number of {name}", len(every), 2)
    return nn.ModuleList(every)
