"""Distillation on an unlabeled collection: the teacher's latent space, and its linear head, which is not learnt again."""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastkd._checks import check_flag, check_tensor
from fastkd.data.batch import Batch, Batches
from fastkd.methods.features import check_module
from fastkd.methods.procedure import Part, Procedure, Step
from fastkd.methods.registry import register
from fastkd.models.heads import linear_head, with_head

__all__ = ["FixedLinear"]


@register(
    "fixed-linear",
    family="collections",
    needs=("images", "teacher"),
    trains="student, projection",
    paper="Begon & Geurts, 2021",
)
class FixedLinear(Procedure):
    """The student's latent vector, projected, is to be the teacher's: ``|P z_s - z_t|^2``. Its head then follows.

    Begon & Geurts, "Distillation from heterogeneous unlabeled collections", Eq. 2.17, without labels: the mean over the batch
    of the squared distance of ``P z_s`` and ``z_t``, the inputs of the networks' last linear layers. P, ``[p_t, p_s]``, is
    learnt; where the sizes agree it is the identity. The network that comes out is the student with ``W_s = W_t P`` and
    ``b_s = b_t`` (the paper writes ``P W_t``), so it is as large and as fast as without a projection.

    Args:
        student, teacher: classifiers that end with a linear layer, of as many classes. The student's weights are trained in
            place, but for its head's, which stay as they are: ``trainer.deployed`` is the network with the new head.
        images: one or more, ``[B, C, H, W]``, normalised, where the networks are: to look for these layers.
        project: learn P though the sizes agree, too.

    Raises:
        ValueError: a network whose logits come out of no linear layer, or another number of classes than the teacher's.
    """

    one_forward: ClassVar[bool] = True

    def __init__(self, student: nn.Module, teacher: nn.Module, images: Tensor, *, project: bool = False) -> None:
        super().__init__()
        check_module("student", student)
        check_module("teacher", teacher)
        own, theirs = (linear_head(network, check_tensor("images", images)) for network in (student, teacher))
        if own.layer.out_features != theirs.layer.out_features:
            raise ValueError(
                f"fastkd: student has {own.layer.out_features} classes, must have those of the teacher, "
                f"{theirs.layer.out_features}"
            )
        self.head_name = own.name
        projection: nn.Module = nn.Identity()
        if check_flag("project", project) or own.layer.in_features != theirs.layer.in_features:
            projection = nn.Linear(own.layer.in_features, theirs.layer.in_features, bias=False)
            projection.to(own.layer.weight.device, own.layer.weight.dtype)
        # in the head's place stands the projection
        self.student = with_head(student, own.name, projection)
        self.freeze("teacher", with_head(teacher, theirs.name, nn.Identity()))
        self._head = (copy.deepcopy(theirs.layer).requires_grad_(False),)  # in a tuple, nn.Module does not see it

    def forward(self, images: Tensor) -> Tensor:
        """The loss of a batch, a scalar."""
        with torch.no_grad():
            wanted = _latent_of(self.frozen["teacher"], images)
        found = _latent_of(self.student, images)
        exact = torch.promote_types(found.dtype, torch.float32)
        return (found.to(exact) - wanted.to(exact)).square().sum(1).mean()

    def parts(self) -> dict[str, Part]:
        return {"student": Part(self.student)}

    def network(self) -> nn.Module:
        return self.student

    @torch.no_grad()
    def deployed(self, network: nn.Module) -> nn.Module:
        """The student alone, with the teacher's head behind the projection, which is folded in."""
        head, projection = self._head[0], network.get_submodule(self.head_name)
        weight = head.weight
        if isinstance(projection, nn.Linear):
            weight = (weight.double() @ projection.weight.to(weight.device).double()).to(weight.dtype)
        like = next(network.parameters())
        folded = nn.Linear(
            weight.shape[1], weight.shape[0], bias=head.bias is not None, device=like.device, dtype=like.dtype
        )
        folded.weight.copy_(weight)
        if head.bias is not None:
            folded.bias.copy_(head.bias)
        made = copy.deepcopy(network)
        made.set_submodule(self.head_name, folded)
        return made

    def described(self) -> str:
        return f"FixedLinear({self.student.get_submodule(self.head_name)})"

    def iteration(self, batch: Batches, step: Step) -> dict[str, Tensor]:
        """One update."""
        images = _images_of(batch)
        loss = step.run(images)
        step.update(loss)
        return {"loss": loss}

    def validation(self, batch: Batches, step: Step) -> dict[str, Tensor]:
        return {"loss": self(_images_of(batch))}


def _latent_of(network: nn.Module, images: Tensor) -> Tensor:
    found = network(images)
    latent: Tensor = getattr(found, "logits", found)
    return latent.flatten(1)


def _images_of(batch: Batches) -> Tensor:
    if not isinstance(batch, Batch):
        raise TypeError(f"fastkd: batch is {type(batch).__name__}, must be a Batch for FixedLinear")
    return batch.images
