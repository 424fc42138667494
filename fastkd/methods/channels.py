"""Methods with modules of their own that are made for the channels of the features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastkd import _checks
from fastkd.methods.features import layer_names
from fastkd.methods.given import Given, feature_of
from fastkd.methods.method import WeightedMethod

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ChannelMethod", "in_dtype_of", "pooled"]


class ChannelMethod(WeightedMethod):
    """Knows the channels of one layer of each network.

    Args:
        student_channels, teacher_channels: of the two layers.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *weights_and_layers: Any, **more: Any) -> None:
        super().__init__(*weights_and_layers, **more)
        self.check_layers(1, 1)
        self.student_channels = _checks.check_count("student_channels", student_channels, 1)
        self.teacher_channels = _checks.check_count("teacher_channels", teacher_channels, 1)

    @classmethod
    def build(cls, given: Given, **options: Any) -> Self:
        """With the channels that the layers have for the images."""
        if "student_channels" not in options or "teacher_channels" not in options:
            student, teacher, images = given.student, given.teacher, given.images
            if student is None or teacher is None or images is None:
                raise ValueError(
                    f"fastkd: {cls.__name__.lower()} needs student, teacher and images, or student_channels and "
                    "teacher_channels"
                )
            options = cls.with_layers(given, options)
            ours = layer_names("layers", options["layers"])
            theirs = options.get("teacher_layers")
            theirs = ours if theirs is None else layer_names("teacher_layers", theirs)
            found = {}
            for name, network, layers in (("student_channels", student, ours), ("teacher_channels", teacher, theirs)):
                # of no layers at all the class itself complains
                found[name] = feature_of(network, layers[0], images).shape[1] if layers else 1
            options = {**found, **options, "layers": ours, "teacher_layers": theirs}
        return super().build(given, **options)

    def check_channels(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        """Whether the features have them."""
        if (student[0].shape[1], teacher[0].shape[1]) != (self.student_channels, self.teacher_channels):
            raise ValueError(
                f"fastkd: {self.described(0, student, teacher)}: channels must be student_channels, "
                f"{self.student_channels}, and teacher_channels, {self.teacher_channels}"
            )

    def pooled_pair(self, student: list[Tensor], teacher: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The features of the pair of layers, ``[B, C]`` each."""
        pair = self.embeddings(0, student, teacher)
        self.check_channels(student, teacher)
        return pooled(pair[0]), pooled(pair[1])

    def extra_repr(self) -> str:
        channels = f"student_channels={self.student_channels}, teacher_channels={self.teacher_channels}"
        return f"{channels}, {super().extra_repr()}"


def pooled(feature: Tensor) -> Tensor:
    """``[B, C, ...]`` -> ``[B, C]``: the mean over places."""
    return feature.flatten(2).mean(2) if feature.dim() > 2 else feature


def in_dtype_of(module: nn.Module, feature: Tensor) -> Tensor:
    """Features come in float32 or better, but a module of the method may have been cast with the networks."""
    return feature.to(next(module.parameters()).dtype)
