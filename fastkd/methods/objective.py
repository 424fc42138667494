"""A method together with its networks, as one module: what an optimizer trains, and DDP wraps."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from fastkd.data.batch import Batch, Batches
from fastkd.methods.features import FeatureTap, check_module
from fastkd.methods.method import Loss, Method
from fastkd.methods.procedure import Part, Procedure, Step

__all__ = ["Objective"]


class Objective(Procedure):
    """Images and labels in, the loss and the student's logits out; its parameters are the student's and the method's.

    >>> objective = Objective(method, student, teacher)
    >>> optimizer = torch.optim.SGD(objective.parameters(), 0.1)
    >>> loss, logits = objective(images, target, progress=epoch / epochs)
    >>> loss.total.backward()

    As all that needs a gradient is in one forward pass, ``DistributedDataParallel(objective)`` works for every method, also
    where the student runs twice (BSS) or the method has weights of its own (FitNet).

    Args:
        method: any. Layers are tapped and the teacher runs only while their terms have weights above 0.
        student: what ``method.build_student`` made.
        teacher: images to logits; it is put into evaluation mode, is never trained, and is no part of this module's state, but
            moves with it (``to``).
        class_dim: of the networks' logits; 1 for maps ``[B, K, H, W]`` of dense networks, with targets ``[B, H, W]``.

    Raises:
        ValueError: no teacher for a method that reads one, one that shares parameters with the student, or a network without
            a layer that is read.
    """

    one_forward: ClassVar[bool] = True

    def __init__(
        self, method: Method, student: nn.Module, teacher: nn.Module | None = None, *, class_dim: int = -1
    ) -> None:
        super().__init__()
        if not isinstance(method, Method):
            raise TypeError(f"fastkd: method is {method!r}, must be a Method (registry.create makes one by name)")
        check_module("student", student)
        self.method = method
        self.student = FeatureTap(student, class_dim=class_dim)
        if teacher is None and method.reads_teacher:
            raise ValueError(f"fastkd: teacher is None, must be a network for {type(method).__name__}")
        tap = None
        if teacher is not None and method.needs_teacher:
            tap = FeatureTap(self.freeze("teacher", teacher), class_dim=class_dim)
        self._teacher = (tap,)  # in a tuple, nn.Module does not see it
        self._tap_what_is_read()

    def forward(
        self, images: Tensor, target: Tensor | None = None, progress: float = 0.0, index: Tensor | None = None
    ) -> tuple[Loss, Tensor]:
        """``Loss`` and logits ``[B, ..., K]`` of a batch."""
        self._tap_what_is_read()
        more = {"index": index} if self.method.reads_index else {}
        return self.method.step(self.student, self._teacher[0], images, target, progress, **more)

    def _tap_what_is_read(self) -> None:
        """The method's weights may be changed in the course of a training, to 0 and from there."""
        layers, teacher_layers = self.method.layers, self.method.teacher_layers
        if not self.method.reads_features:
            layers = teacher_layers = ()
        for tap, wanted in ((self.student, layers), (self._teacher[0], teacher_layers)):
            if tap is not None and tap.layers != tuple(dict.fromkeys(wanted)):
                tap.retap(wanted)

    def parts(self) -> dict[str, Part]:
        return {"student": Part(self)}

    def network(self) -> nn.Module:
        return self.student.model

    def deployed(self, network: nn.Module) -> nn.Module:
        return self.method.deployed(network)

    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student.model, "method": self.method}

    def described(self) -> str:
        return repr(self.method)

    def iteration(self, batch: Batches, step: Step) -> dict[str, Tensor]:
        """One update. The terms are the loss, its own, and, where there are labels, the accuracy on the images."""
        batch = self._one(batch)
        loss, logits = step.run(batch.images, batch.target, step.progress, batch.index)
        step.update(loss.total)
        return self._terms(batch, loss, logits)

    def validation(self, batch: Batches, step: Step) -> dict[str, Tensor]:
        batch = self._one(batch)
        return self._terms(batch, *self(batch.images, batch.target, step.progress, batch.index))

    def _one(self, batch: Batches) -> Batch:
        if not isinstance(batch, Batch):
            raise TypeError(
                f"fastkd: batch is {type(batch).__name__}, must be a Batch for {type(self.method).__name__}"
            )
        return batch

    def _terms(self, batch: Batch, loss: Loss, logits: Tensor) -> dict[str, Tensor]:
        terms: dict[str, Any] = {"loss": loss.total, **loss.terms}
        if batch.target is not None:
            terms["accuracy"] = (logits.detach().argmax(-1) == batch.target).float().mean()
        return terms
