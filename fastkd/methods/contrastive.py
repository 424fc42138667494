"""Contrastive distillation: both networks' embeddings of an image are alike, and unlike those of other images (CRD); how
alike the student finds turned images and upright ones is as the teacher finds it (SSKD)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastkd import _checks, functional
from fastkd._seeding import drawing
from fastkd.methods.channels import ChannelMethod, in_dtype_of
from fastkd.methods.features import FeatureTap, Outputs
from fastkd.methods.given import Given
from fastkd.methods.method import (
    Loss,
    check_logits,
    check_progress,
    check_target,
    check_teacher_logits,
    features_of,
    main_logits,
    response,
)
from fastkd.methods.registry import register
from fastkd.methods.standardize import standardized
from fastkd.models.layers import FeatureLayers

__all__ = ["CRD", "SSKD"]


@register("crd", family="contrastive", trains="student, two embeddings", paper="Tian et al., ICLR 2020")
class CRD(ChannelMethod):
    """``b [NCE(v_s, memory of v_t) + NCE(v_t, memory of v_s)]``, v the linear embeddings of pooled features, of norm 1.

    Tian et al., "Contrastive Representation Distillation" (ICLR 2020), Eq. 18, with the memories of the authors' code:
    of each item of the data set, N in all, what the embeddings of it were, ``memory <- normalised(m memory + (1 - m) v)``. An
    image's score with an item is ``e = exp(v . memory / tau) / Z``, Z being N times the mean of the first batch's. NCE is the
    mean over the images of ``-log e+ / (e+ + k/N) - sum log (k/N) / (e- + k/N)``, with e+ of the image's own item and k drawn
    ones (each of the N alike, with repeats, its own among them). Their 1e-7 in the denominators is left out.

    ``step`` needs to know which items the images are. All scores of a batch are one product ``[B, N]``, of which those drawn
    are taken: no copy of k rows of the memory for each image. What is known of the items, Z included, is a process's own:
    where several train together, a memory is as old as the last time that this process had the item.

    Args:
        items: N, images of the training set, 2 or more.
        negatives: k. By name, at most N - 1.
        embedding: length of v.
        nce_temperature: tau > 0.
        memory_momentum: m in [0, 1).
        layers, teacher_layers: one of each, ``[B, C, ...]``, averaged over places.
    """

    term: ClassVar[str] = "contrastive_loss"
    reads_index: ClassVar[bool] = True

    @staticmethod
    def layers_of(layers: FeatureLayers) -> tuple[str, ...]:
        return (layers.embedding,)

    @classmethod
    def build(cls, given: Given, **options: Any) -> CRD:
        if given.items is not None and given.items > 1:
            options = {"negatives": min(16384, given.items - 1), **options}
        return super().build(given, **options)

    def __init__(
        self,
        items: int,
        student_channels: int,
        teacher_channels: int,
        layers: Sequence[str] = ("avgpool",),
        teacher_layers: Sequence[str] | None = None,
        *,
        task_weight: float = 1.0,
        kd_weight: float = 0.0,
        feature_weight: float = 0.8,
        temperature: float = 4.0,
        negatives: int = 16384,
        embedding: int = 128,
        nce_temperature: float = 0.07,
        memory_momentum: float = 0.5,
        standardize: bool = False,
    ) -> None:
        weights = task_weight, kd_weight, feature_weight, temperature
        super().__init__(student_channels, teacher_channels, *weights, layers, teacher_layers, standardize=standardize)
        self.items = _checks.check_count("items", items, 2)
        self.negatives = _checks.check_count("negatives", negatives, 1)
        self.embedding = _checks.check_count("embedding", embedding, 1)
        self.nce_temperature = _checks.check_positive("nce_temperature", nce_temperature)
        self.memory_momentum = _checks.check_between("memory_momentum", memory_momentum, 0.0, math.nextafter(1.0, 0.0))
        self.student_embedding = nn.Linear(self.student_channels, self.embedding)
        self.teacher_embedding = nn.Linear(self.teacher_channels, self.embedding)
        bound = math.sqrt(3.0 / self.embedding)  # rows of norm 1, about
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.empty(self.items, self.embedding).uniform_(-bound, bound))
        # log Z of the student's scores and of the teacher's, and whether they are found
        self.register_buffer("log_scales", torch.zeros(2))
        self.register_buffer("scaled", torch.tensor(False))

    student_memory: Tensor
    teacher_memory: Tensor
    log_scales: Tensor
    scaled: Tensor

    def step(
        self,
        student: FeatureTap,
        teacher: FeatureTap | None,
        images: Tensor,
        target: Tensor | None,
        progress: float = 0.0,
        index: Tensor | None = None,
    ) -> tuple[Loss, Tensor]:
        """Also takes ``index``, int64 ``[B]``: which items, from 0 to N - 1, the images are."""
        outputs = student(images)
        loss = self(outputs, self.teacher_outputs(teacher, images), target, progress, index)
        return loss, main_logits(outputs.logits)

    def forward(
        self,
        student: Outputs,
        teacher: Outputs | None,
        target: Tensor | None,
        progress: float = 0.0,
        index: Tensor | None = None,
    ) -> Loss:
        return self.loss_of(student, teacher, target, progress, lambda ours, theirs: self.contrast(ours, theirs, index))

    def contrast(self, student: list[Tensor], teacher: list[Tensor], index: Tensor | None) -> Tensor:
        """X, of features ``[B, C, ...]`` of these items; in training mode the memories learn them."""
        ours, theirs = (
            F.normalize(embed(in_dtype_of(embed, f)).to(f.dtype))
            for embed, f in zip(
                (self.student_embedding, self.teacher_embedding), self.pooled_pair(student, teacher), strict=True
            )
        )
        index = self._check_index(index, len(ours))
        with drawing(index.device):
            drawn = torch.randint(self.items, (len(ours), self.negatives), device=index.device)
        drawn = torch.cat([index[:, None], drawn], 1)
        learns = self.training  # then the backward pass needs the memories as they are now
        scores = [
            (v @ memory.to(v.dtype, copy=learns).T / self.nce_temperature).gather(1, drawn)
            for v, memory in ((ours, self.teacher_memory), (theirs, self.student_memory))
        ]
        log_scales = self._scaled([s.detach() for s in scores])
        # e / (e + k/N) is a sigmoid: the loss is a logistic one, whatever the size of e
        odds = [
            s - (log_z + math.log(self.negatives / self.items)) for s, log_z in zip(scores, log_scales, strict=True)
        ]
        if learns:
            self._remember(index, ours.detach(), theirs.detach())
        return torch.stack([(F.softplus(-x[:, 0]) + F.softplus(x[:, 1:]).sum(1)).mean() for x in odds]).sum()

    @torch.no_grad()
    def _scaled(self, scores: list[Tensor]) -> Tensor:
        """log Z, found if it is not yet known; never read on the host, which would wait for the device."""
        found = torch.stack([s.flatten().logsumexp(0) - math.log(s.numel() / self.items) for s in scores])
        known = torch.where(self.scaled, self.log_scales, found.to(self.log_scales.dtype))
        if self.training:
            self.log_scales.copy_(known)
            self.scaled.fill_(True)
        return known.to(found.dtype)

    @torch.no_grad()
    def _remember(self, index: Tensor, ours: Tensor, theirs: Tensor) -> None:
        # an item that is there twice is written twice, in any order: both times by its last embedding
        place = torch.arange(len(index), device=index.device)
        last = torch.where(index[:, None] == index, place, -1).amax(1)
        for memory, v in ((self.student_memory, ours), (self.teacher_memory, theirs)):
            mixed = torch.lerp(v[last], memory[index].to(v.dtype), self.memory_momentum)
            memory.index_copy_(0, index, F.normalize(mixed).to(memory.dtype))

    def _check_index(self, index: Tensor | None, images: int) -> Tensor:
        if index is None:
            raise ValueError(
                f"fastkd: index is None, must be int64 [{images}], which items of the data set the images are, for CRD"
            )
        _checks.check_dtype("index", index, (torch.int64,))
        if index.shape != (images,):
            raise ValueError(
                f"fastkd: index has shape {tuple(index.shape)}, must be {(images,)}, an item for each image"
            )
        if _checks.readable(index):
            low, high = (int(i) for i in index.aminmax())
            if low < 0 or high >= self.items:
                raise ValueError(
                    f"fastkd: index holds {low if low < 0 else high}, must be items from 0 to {self.items - 1}"
                )
        return index

    def extra_repr(self) -> str:
        size = f"items={self.items}, negatives={self.negatives}, embedding={self.embedding}"
        size += f", nce_temperature={self.nce_temperature}, memory_momentum={self.memory_momentum}"
        return f"{super().extra_repr()}, {size}"


@register("sskd", family="contrastive", trains="student, head of each network", paper="Xu et al., ECCV 2020")
class SSKD(ChannelMethod):
    """``r CE + a T^2 KL`` of the images, ``c T^2 KL`` of the images turned, ``b tau^2 KL`` of which are alike.

    Xu et al., "Knowledge Distillation Meets Self-Supervision" (ECCV 2020), with the weights, ratios and temperatures of the
    authors' code. Each image is also seen turned by 90, 180 and 270 degrees. A head ``Linear, ReLU, Linear`` on the pooled
    features of each network gives the cosines of each turned image with all upright ones, ``[3 B, B]``; the student's are
    to be like the teacher's, as softmaxes at tau. A teacher may err, so not all rows count: of the turned images those
    whose class it finds, and of the others the share ``turned_ratio`` where the class has the best ranks; of the cosines, in
    the same way, those of images that it finds most like themselves, and the share ``alike_ratio`` of the others.

    There, the teacher's head is trained beforehand, for 60 epochs, to find the upright image of a turned one (cross-entropy
    of the cosines). Here it is trained meanwhile, by the same loss with ``head_weight``, of which the student learns nothing:
    its first targets are those of a head that is still random. And there, each turned image is cropped anew; here the
    crop is turned.

    ``step`` turns the images. In a loop of your own: both networks on ``method.views(images)``, labels of the images. Without
    labels (r = 0) the class of a turned image is the one that the teacher finds in the upright one.

    Args:
        turned_weight: c >= 0.
        feature_weight: b >= 0.
        head_weight: of the loss that trains the teacher's head, where b is not 0.
        alike_temperature: tau > 0.
        turned_ratio, alike_ratio: in [0, 1].
        layers, teacher_layers: one of each, ``[B, C, ...]``, averaged over places.
    """

    term: ClassVar[str] = "alike_loss"

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
        task_weight: float = 0.1,
        kd_weight: float = 0.9,
        turned_weight: float = 2.7,
        feature_weight: float = 10.0,
        head_weight: float = 1.0,
        temperature: float = 4.0,
        alike_temperature: float = 0.5,
        turned_ratio: float = 1.0,
        alike_ratio: float = 0.75,
        standardize: bool = False,
    ) -> None:
        weights = task_weight, kd_weight, feature_weight, temperature
        super().__init__(student_channels, teacher_channels, *weights, layers, teacher_layers, standardize=standardize)
        self.turned_weight = _checks.check_not_negative("turned_weight", turned_weight)
        self.head_weight = _checks.check_not_negative("head_weight", head_weight)
        self.alike_temperature = _checks.check_positive("alike_temperature", alike_temperature)
        self.turned_ratio = _checks.check_share("turned_ratio", turned_ratio)
        self.alike_ratio = _checks.check_share("alike_ratio", alike_ratio)
        self.student_head, self.teacher_head = (
            nn.Sequential(nn.Linear(n, n), nn.ReLU(), nn.Linear(n, n))
            for n in (self.student_channels, self.teacher_channels)
        )

    @property
    def reads_teacher(self) -> bool:
        return super().reads_teacher or self.turned_weight != 0.0

    def views(self, images: Tensor) -> Tensor:
        """``[B, C, N, N]`` -> ``[4 B, C, N, N]``: the images, then all of them turned by 90, by 180 and by 270 degrees."""
        _checks.check_tensor("images", images)
        if images.dim() != 4 or images.shape[2] != images.shape[3]:
            raise ValueError(
                f"fastkd: images has shape {tuple(images.shape)}, must be [B, C, N, N] for SSKD, which turns them"
            )
        return torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])

    def step(
        self,
        student: FeatureTap,
        teacher: FeatureTap | None,
        images: Tensor,
        target: Tensor | None,
        progress: float = 0.0,
    ) -> tuple[Loss, Tensor]:
        loss, logits = super().step(student, teacher, self.views(images), target, progress)
        return loss, logits[: len(images)]

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor | None, progress: float = 0.0) -> Loss:
        """As of other methods, but that the outputs are of ``views(images)``, the labels of the images."""
        check_progress(progress)
        if teacher is None and self.reads_teacher:
            raise ValueError("fastkd: teacher is None, must be its outputs for SSKD")
        logits = check_logits("student.logits", student.logits)
        images = len(logits) // 4
        if logits.dim() != 2 or len(logits) != 4 * images:
            raise ValueError(
                f"fastkd: student.logits has shape {tuple(logits.shape)}, must be [4 B, K], of views(images)"
            )
        given = logits[:0]
        if teacher is not None and (self.kd_weight != 0.0 or self.turned_weight != 0.0):
            given = check_teacher_logits(logits, teacher.logits)
        of_images = logits[:images], given[:images], target
        loss = response(*of_images, self.task_weight, self.kd_weight, self.temperature, self.standardize)
        if self.turned_weight != 0.0:
            label = check_target(of_images[0], target) if target is not None else given[:images].argmax(1)
            kl = self.kl_of_turned(logits[images:], given[images:], label.repeat(3))
            loss = loss.with_term("turned_loss", self.turned_weight * kl)
        if not self.reads_features or teacher is None:
            return self.without_features(loss)
        pair = (features_of("student", student, self.layers), features_of("teacher", teacher, self.teacher_layers))
        with torch.autocast(logits.device.type, enabled=False):
            ours, theirs = self.alikeness(*pair)
            own = torch.arange(images, device=logits.device).repeat(3)
            rows = chosen(theirs.detach(), own, self.alike_ratio)
            alike = _mean_kl(ours, theirs.detach(), rows, self.alike_temperature)
            head = F.cross_entropy(theirs, own)
        loss = loss.with_term(self.term, self.feature_weight * alike)
        return loss.with_term("head_loss", self.head_weight * head)

    def kl_of_turned(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """``T^2 KL``, a mean over the turned images of which the teacher's word counts."""
        if self.standardize:
            student, teacher = standardized(student), standardized(teacher)
        return _mean_kl(student, teacher, chosen(teacher.detach(), target, self.turned_ratio), self.temperature)

    def alikeness(self, student: list[Tensor], teacher: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Cosines of the turned images with the upright ones, ``[3 B, B]`` of each network."""
        heads = (self.student_head, self.teacher_head)
        ours, theirs = (
            F.normalize(head(in_dtype_of(head, f)).to(f.dtype))
            for head, f in zip(heads, self.pooled_pair(student, teacher), strict=True)
        )
        images = len(ours) // 4
        return ours[images:] @ ours[:images].T, theirs[images:] @ theirs[:images].T

    def extra_repr(self) -> str:
        weights = f"turned_weight={self.turned_weight}, head_weight={self.head_weight}"
        ratios = f"turned_ratio={self.turned_ratio}, alike_ratio={self.alike_ratio}"
        return f"{super().extra_repr()}, {weights}, alike_temperature={self.alike_temperature}, {ratios}"


def chosen(scores: Tensor, right: Tensor, ratio: float) -> Tensor:
    """Rows to learn from, float ``[n]`` of 1 and 0: those whose best score, of ``[n, m]``, is the right one's, and of the
    others the share in which that one has the best ranks (of equal ranks, the first rows)."""
    above = (scores > scores.gather(1, right[:, None])).sum(1)
    wrong = (above > 0).sum()
    keep = len(scores) - wrong + (wrong.double() * ratio).floor()
    place = above.argsort(stable=True).argsort()
    return (place < keep).to(torch.float32)


def _mean_kl(student: Tensor, teacher: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """``T^2 KL``, a mean over these rows; 0 of none."""
    total = functional.kl_div(student, teacher, temperature, weight=rows, reduction="sum")
    return total / rows.sum().clamp(min=1.0)
