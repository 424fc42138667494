"""What all methods have in common: outputs of networks and labels in, a loss with named terms out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastkd import _checks, functional
from fastkd.methods.features import FeatureTap, JointLogits, Outputs, layer_names, logits_of_one
from fastkd.methods.given import Given
from fastkd.methods.standardize import standardized
from fastkd.models.layers import FeatureLayers, feature_layers

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Loss",
    "Method",
    "WeightedMethod",
    "check_logits",
    "check_progress",
    "check_target",
    "check_teacher_logits",
    "cross_entropy",
    "features_of",
    "main_logits",
    "nothing_of",
    "response",
]


_NO_LABEL = torch.iinfo(torch.int64).min  # as ignore_index: no row is left out, -100 is out of range like any other


class Loss(NamedTuple):
    """The loss of a batch."""

    total: Tensor
    """Scalar, to call ``backward`` on."""
    terms: dict[str, Tensor]
    """Its terms by name, with their weights, detached, for logging; their sum is the total. One of weight 0 is not there."""

    def with_term(self, name: str, term: Tensor) -> Loss:
        """With one term more."""
        return Loss(self.total + term, {**self.terms, name: term.detach()})


class Method(nn.Module):
    """A distillation method. In a loop of your own, either give it what your networks put out,

    >>> loss = method(student(images), teacher(images), target)   # networks in FeatureTap(..., method.layers)
    >>> loss.total.backward()

    or let it run the networks (BSS needs that), ``loss, logits = method.step(student, teacher, images, target)``. Where it
    has parameters of its own (FitNet's regressor), give ``method.parameters()`` to the optimizer, too.
    """

    needs_teacher: ClassVar[bool] = True
    """Whether methods of this class learn from a teacher that is there before."""
    reads_index: ClassVar[bool] = False
    """Whether ``step`` also takes ``index``, int64 ``[B]``: which items of the data set the images are."""
    layers: tuple[str, ...] = ()
    """The student's features that it reads: those to tap."""
    teacher_layers: tuple[str, ...] = ()
    """The teacher's, in the same order."""

    @property
    def reads_features(self) -> bool:
        """Whether it reads those layers, as it is: not where all that is made of them has weight 0."""
        return bool(self.layers)

    @property
    def reads_teacher(self) -> bool:
        """Whether the teacher has to run, as the method is: not where all that is made of it has weight 0."""
        return self.needs_teacher

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor | None, progress: float = 0.0) -> Loss:
        """The loss: a mean over the rows, of which logits ``[B, ..., K]`` have ``B * ...`` (each token is one).

        A term of weight 0 is not computed, and nothing is looked at for its sake: its inputs may be missing, not finite, or
        of any shape, and get gradients of 0. It is not among ``terms``.

        Args:
            student: logits ``[B, ..., K]``, float32, float64, bfloat16 or float16, and the features named by ``layers``, of
                those dtypes, too. For ONE and DML :class:`fastkd.methods.JointLogits`.
            teacher: logits of the same shape and the features named by ``teacher_layers``; None where there is no teacher, or
                not :attr:`reads_teacher`. Taken as given: wrap the teacher in ``torch.no_grad()``.
            target: int64 ``[B, ...]``, classes: no row is left out, -100 is refused (on the CPU; a GPU is not waited for to
                look). None where no term reads labels.
            progress: share of the training that is done, a number in [0, 1]; for methods that change over time.

        Raises:
            TypeError, ValueError: dtypes, shapes and numbers other than these, no teacher where one is needed.
        """
        raise NotImplementedError

    def step(
        self,
        student: FeatureTap,
        teacher: FeatureTap | None,
        images: Tensor,
        target: Tensor | None,
        progress: float = 0.0,
    ) -> tuple[Loss, Tensor]:
        """Runs the networks on a batch: the loss, and the student's logits ``[B, ..., K]``, of several those of the first."""
        student_outputs = student(images)
        loss = self(student_outputs, self.teacher_outputs(teacher, images), target, progress)
        return loss, main_logits(student_outputs.logits)

    def teacher_outputs(self, teacher: FeatureTap | None, images: Tensor) -> Outputs | None:
        """The teacher's outputs, without a graph; None where nothing of them is read."""
        if not self.reads_teacher:
            return None
        if teacher is None:
            raise ValueError(f"fastkd: teacher is None, must be a network for {type(self).__name__}")
        with torch.no_grad():
            outputs: Outputs = teacher(images)
        return outputs

    def build_student(self, make: Callable[[int], nn.Module]) -> nn.Module:
        """What is trained, of networks that ``make(seed)`` makes: one of them, but for online methods."""
        return make(0)

    @classmethod
    def build(cls, given: Given, **options: Any) -> Self:
        """The method for given networks and data; ``options`` are arguments of the class. Overridden where some of these
        follow from what is given."""
        return cls(**{**given.wanted(cls), **options})

    def deployed(self, student: nn.Module) -> nn.Module:
        """The network, images to logits, that the training of ``student`` was for."""
        return student


class WeightedMethod(Method):
    """``r CE + a T^2 KL + b X``: labels, the teacher's response, and a distance X of features.

    Args:
        task_weight: r >= 0, of the cross-entropy with the labels.
        kd_weight: a >= 0, of ``T^2 KL(teacher || student)``.
        feature_weight: b >= 0.
        temperature: T > 0.
        layers: the student's features.
        teacher_layers: the teacher's; the same names if None.
        standardize: whether the KL is of standardised logits (:func:`fastkd.methods.standardize.standardized`).

    Weights and T are numbers, no tensors. Weights may be changed in the course of a training; with a = b = 0 no teacher is
    needed, and with b = 0 no features.
    """

    term: ClassVar[str] = "feature_loss"

    @staticmethod
    def layers_of(layers: FeatureLayers) -> tuple[str, ...]:
        """Which of a network's layers it reads, where none are named."""
        return ()

    @classmethod
    def build(cls, given: Given, **options: Any) -> Self:
        """Reads, of the networks that are given, those layers that it has for them."""
        return super().build(given, **cls.with_layers(given, options))

    @classmethod
    def with_layers(cls, given: Given, options: dict[str, Any]) -> dict[str, Any]:
        """The options, with those layers where none are named."""
        if "layers" in options or given.student is None or given.teacher is None:
            return options
        if cls.layers_of is WeightedMethod.layers_of:  # it reads none: the network may be any
            return options
        pair = [cls.layers_of(feature_layers(network)) for network in (given.student, given.teacher)]
        return {"layers": pair[0], "teacher_layers": pair[1], **options}

    def __init__(
        self,
        task_weight: float,
        kd_weight: float,
        feature_weight: float,
        temperature: float,
        layers: Iterable[str] = (),
        teacher_layers: Iterable[str] | None = None,
        *,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        self.standardize = _checks.check_flag("standardize", standardize)
        self.task_weight = _checks.check_not_negative("task_weight", task_weight)
        self.kd_weight = _checks.check_not_negative("kd_weight", kd_weight)
        self.feature_weight = _checks.check_not_negative("feature_weight", feature_weight)
        self.temperature = _checks.check_positive("temperature", temperature)
        self.layers = layer_names("layers", layers)
        self.teacher_layers = self.layers if teacher_layers is None else layer_names("teacher_layers", teacher_layers)
        if len(self.layers) != len(self.teacher_layers):
            raise ValueError(
                f"fastkd: teacher_layers is {self.teacher_layers}, must be as many as layers, {self.layers}: "
                "they are compared in pairs"
            )

    @property
    def reads_features(self) -> bool:
        return super().reads_features and self.feature_weight != 0.0

    @property
    def reads_teacher(self) -> bool:
        return self.needs_teacher and (self.kd_weight != 0.0 or self.reads_features)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor | None, progress: float = 0.0) -> Loss:
        return self.loss_of(student, teacher, target, progress, self.distance)

    def loss_of(
        self,
        student: Outputs,
        teacher: Outputs | None,
        target: Tensor | None,
        progress: float,
        distance_of: Callable[[list[Tensor], list[Tensor]], Tensor],
    ) -> Loss:
        """The loss, with X of both networks' features by this function."""
        check_progress(progress)
        if teacher is None and self.reads_teacher:
            raise ValueError(f"fastkd: teacher is None, must be its outputs for {type(self).__name__}")
        kd_weight = self.kd_weight if self.reads_teacher else 0.0
        teacher_logits = None if teacher is None else teacher.logits
        weights = self.task_weight, kd_weight
        loss = response(student.logits, teacher_logits, target, *weights, self.temperature, self.standardize)
        if not self.reads_features or teacher is None:
            return self.without_features(loss)
        pair = (features_of("student", student, self.layers), features_of("teacher", teacher, self.teacher_layers))
        with torch.autocast(loss.total.device.type, enabled=False):  # whose products would be rounded to 16 bits
            distance = distance_of(*pair)
        return loss.with_term(self.term, self.feature_weight * distance)

    def without_features(self, loss: Loss) -> Loss:
        """With gradients of 0 for the method's parameters, as DistributedDataParallel wants one for each."""
        unused = [nothing_of(p) for p in self.parameters() if p.requires_grad]
        return loss._replace(total=sum(unused, loss.total)) if unused else loss

    def distance(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """X, a scalar, of the features of ``layers`` and ``teacher_layers``."""
        raise NotImplementedError

    def check_layers(self, least: int, most: int | None = None) -> None:
        """Whether there are so many."""
        if len(self.layers) < least or (most is not None and len(self.layers) > most):
            allowed = "one name" if least == 1 else f"{least} names"
            if most is None:
                allowed += " or more"
            raise ValueError(f"fastkd: layers is {self.layers}, must be {allowed}")

    def maps(self, i: int, student: list[Tensor], teacher: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The features of the i-th pair of layers, both ``[B, C, H, W]`` with the same B."""
        pair = student[i], teacher[i]
        if any(f.dim() != 4 for f in pair) or pair[0].shape[0] != pair[1].shape[0]:
            raise ValueError(
                f"fastkd: {self.described(i, student, teacher)}: both must be maps [B, C, H, W] of the same batch"
            )
        return pair

    def embeddings(self, i: int, student: list[Tensor], teacher: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The features of the i-th pair of layers, of any shapes with the same B."""
        pair = student[i], teacher[i]
        if any(f.dim() < 2 for f in pair) or pair[0].shape[0] != pair[1].shape[0]:
            raise ValueError(f"fastkd: {self.described(i, student, teacher)}: both must be [B, ...] of the same batch")
        return pair

    def described(self, i: int, student: list[Tensor], teacher: list[Tensor]) -> str:
        """The i-th pair of layers, for the message of an error."""
        return (
            f"the student's layer {self.layers[i]!r} is {tuple(student[i].shape)}, "
            f"the teacher's layer {self.teacher_layers[i]!r} {tuple(teacher[i].shape)}"
        )

    def extra_repr(self) -> str:
        weights = f"task_weight={self.task_weight}, kd_weight={self.kd_weight}, temperature={self.temperature}"
        if self.standardize:  # else the text is that of checkpoints from before there was the option
            weights += ", standardize=True"
        if not self.layers:
            return weights
        layers = f"layers={self.layers}, teacher_layers={self.teacher_layers}"
        return f"{weights}, feature_weight={self.feature_weight}, {layers}"


def response(
    student_logits: Tensor | JointLogits,
    teacher_logits: Tensor | JointLogits | None,
    target: Tensor | None,
    task_weight: float,
    kd_weight: float,
    temperature: float,
    standardize: bool = False,
) -> Loss:
    """``r CE + a T^2 KL``, in one pass over logits that are not standardised; what has weight 0 is not looked at."""
    student_logits = check_logits("student.logits", student_logits)
    if kd_weight == 0.0:
        if task_weight == 0.0:
            return Loss(nothing_of(student_logits), {})
        loss = task_weight * cross_entropy(student_logits, target)
        return Loss(loss, {"task_loss": loss.detach()})
    teacher_logits = check_teacher_logits(student_logits, teacher_logits)
    if standardize:  # the labels are for the logits as they are: two passes
        kd = functional.kl_div(standardized(student_logits), standardized(teacher_logits), temperature)
        return response(student_logits, None, target, task_weight, 0.0, 1.0).with_term("kd_loss", kd_weight * kd)
    if task_weight == 0.0:
        loss = kd_weight * functional.kl_div(student_logits, teacher_logits, temperature)
        return Loss(loss, {"kd_loss": loss.detach()})
    target = check_target(student_logits, target)
    whole = task_weight + kd_weight
    alpha = kd_weight / whole
    loss, terms = functional.kd_loss(
        student_logits, teacher_logits, target, temperature, alpha, ignore_index=_NO_LABEL, return_terms=True
    )
    return Loss(
        loss if whole == 1.0 else whole * loss,
        {"task_loss": task_weight * terms["cross_entropy"], "kd_loss": kd_weight * terms["kl_div"]},
    )


def cross_entropy(
    logits: Tensor, target: Tensor | None, *, ignore_index: int = _NO_LABEL, reduction: str = "mean"
) -> Tensor:
    """``torch.nn.functional.cross_entropy`` of logits ``[B, ..., K]`` and classes ``[B, ...]``, no row left out unless told.

    In float32 or better. With a clear error for classes out of range where that costs no waiting.
    """
    if target is not None and ignore_index != _NO_LABEL:
        check_target(logits, target.where(target != ignore_index, 0))
    else:
        target = check_target(logits, target)
    exact = logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(exact, target.reshape(-1), ignore_index=ignore_index, reduction=reduction)


def check_target(logits: Tensor, target: Tensor | None) -> Tensor:
    if target is None:
        raise ValueError(
            f"fastkd: target is None, must be classes, int64 {tuple(logits.shape[:-1])}: a term that reads labels has a "
            "weight above 0"
        )
    _checks.check_dtype("target", target, (torch.int64,))
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"fastkd: target has shape {tuple(target.shape)}, must be {tuple(logits.shape[:-1])}, a class for each row of "
            f"student.logits, {tuple(logits.shape)}" + _class_dim_hint(logits, target)
        )
    if _checks.readable(target):
        low, high = (int(t) for t in target.aminmax())
        if low < 0 or high >= logits.shape[-1]:
            raise ValueError(
                f"fastkd: target holds {low if low < 0 else high}, must be classes from 0 to {logits.shape[-1] - 1}"
            )
    return target


def _class_dim_hint(logits: Tensor, target: Tensor) -> str:
    if logits.dim() > 2 and target.shape == logits.select(1, 0).shape:
        return "; of maps [B, K, H, W], FeatureTap(model, class_dim=1) puts the classes last"
    return ""


def check_logits(name: str, logits: object) -> Tensor:
    """Logits ``[B, ..., K]`` of one network."""
    one = _checks.check_dtype(name, logits_of_one(name, logits))
    if one.dim() < 2 or one.shape[-1] == 0:
        raise ValueError(f"fastkd: {name} has shape {tuple(one.shape)}, must be [B, ..., K], K classes, 1 or more")
    return one


def check_teacher_logits(student_logits: Tensor, teacher_logits: object) -> Tensor:
    """The teacher's logits, for those of the student."""
    one = check_logits("teacher.logits", teacher_logits)
    if one.shape != student_logits.shape:
        raise ValueError(
            f"fastkd: teacher.logits has shape {tuple(one.shape)}, must be that of student.logits, "
            f"{tuple(student_logits.shape)}"
        )
    return one


def main_logits(logits: Tensor | JointLogits) -> Tensor:
    """Those of the network that is kept: of several that learn together, the first."""
    return logits[0] if isinstance(logits, JointLogits) else logits


def nothing_of(tensor: Tensor) -> Tensor:
    """0, float32 or better, whose gradient is 0 whatever the tensor holds."""
    exact = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.flatten()[:0].sum(dtype=exact)


def features_of(whose: str, outputs: Outputs, layers: Sequence[str]) -> list[Tensor]:
    """Those features, in this order, in float32 or float64."""
    missing = [name for name in layers if name not in outputs.features]
    if missing:
        raise ValueError(
            f"fastkd: the {whose}'s features lack {', '.join(map(repr, missing))}; "
            f"there are {', '.join(outputs.features) or 'none'}: FeatureTap(model, {list(layers)}) takes them"
        )
    chosen = [_checks.check_dtype(f"the {whose}'s layer {name!r}", outputs.features[name]) for name in layers]
    return [f.float() if f.dtype in (torch.bfloat16, torch.float16) else f for f in chosen]


def check_progress(progress: float) -> float:
    """A share of the training."""
    return _checks.check_between("progress", progress, 0.0, 1.0)
