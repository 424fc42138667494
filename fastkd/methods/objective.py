"""A method together with its networks, as one module: what an optimizer trains, and DDP wraps."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastkd.methods.features import FeatureTap, check_module
from fastkd.methods.method import Loss, Method

__all__ = ["Objective"]


class Objective(nn.Module):
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

    Raises:
        ValueError: no teacher for a method that reads one, one that shares parameters with the student, or a network without
            a layer that is read.
    """

    def __init__(self, method: Method, student: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__()
        if not isinstance(method, Method):
            raise TypeError(f"fastkd: method is {method!r}, must be a Method (registry.create makes one by name)")
        check_module("student", student)
        self.method = method
        self.student = FeatureTap(student)
        tap = None
        if teacher is None:
            if method.reads_teacher:
                raise ValueError(f"fastkd: teacher is None, must be a network for {type(method).__name__}")
        elif method.needs_teacher:
            check_module("teacher", teacher)
            _check_apart(student, teacher)
            tap = FeatureTap(teacher.eval().requires_grad_(False))
        self._teacher = (tap,)  # in a tuple, nn.Module does not see it
        self._tap_what_is_read()

    def forward(self, images: Tensor, target: Tensor, progress: float = 0.0) -> tuple[Loss, Tensor]:
        """``Loss`` and logits ``[B, ..., K]`` of a batch."""
        self._tap_what_is_read()
        return self.method.step(self.student, self._teacher[0], images, target, progress)

    def _tap_what_is_read(self) -> None:
        """The method's weights may be changed in the course of a training, to 0 and from there."""
        layers, teacher_layers = self.method.layers, self.method.teacher_layers
        if not self.method.reads_features:
            layers = teacher_layers = ()
        for tap, wanted in ((self.student, layers), (self._teacher[0], teacher_layers)):
            if tap is not None and tap.layers != tuple(dict.fromkeys(wanted)):
                tap.retap(wanted)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Objective:
        """``to``, ``cuda``, ``double`` and their like move the teacher, too."""
        for module in self._teacher:
            if module is not None:
                module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Freezing the teacher would freeze what the student shares with it."""
    frozen = {id(parameter) for parameter in teacher.parameters()}
    shared = [name for name, parameter in student.named_parameters() if id(parameter) in frozen]
    if shared:
        raise ValueError(
            f"fastkd: teacher shares {len(shared)} parameters with student ({shared[0]}, ...), must be a network of its "
            "own, as it is frozen: copy.deepcopy(teacher)"
        )
