"""PES: the latter part of a network stops early once more, and then MixMatch goes on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastkd import _checks
from fastkd.data.batch import Batches
from fastkd.methods.features import check_module
from fastkd.methods.method import cross_entropy
from fastkd.methods.noisy import terms
from fastkd.methods.noisy.learner import NoisyLabels, chosen, whole_epochs
from fastkd.methods.noisy.mixmatch import logits_of_views, mean_probabilities, mixmatch, ramp
from fastkd.methods.noisy.tail import renew, tail_of
from fastkd.methods.procedure import Part, Step
from fastkd.methods.registry import register

__all__ = ["PES"]

MOST_WEIGHT = 3.0  # of a class


@register("pes", family="noisy labels", needs=("labels",), paper="Bai et al., NeurIPS 2021")
class PES(NoisyLabels):
    """PES: stops early, draws the head anew and trains it alone, then learns by MixMatch from the labels that it predicts.

    Bai et al., "Understanding and Improving Early Stopping for Learning with Noisy Labels" (NeurIPS 2021), PES (semi), with the
    weights of the authors' code for CIFAR-10N. The last layers of a network are the first to learn wrong labels, so they get
    fewer epochs: after a warm-up by cross-entropy they are renewed and trained for a few epochs, the others fixed. From then on
    a sample is labelled where the prediction is its label; rarer classes among these weigh more. The others are guessed from
    two views of each image and sharpened. Both go into MixMatch.

    Other than in the authors' code: A batch is one of all samples, which a mask divides; theirs are drawn apart, in the shares
    that both kinds have, half of each at most. Refinement is by the optimizer and schedule of the training, where theirs is
    Adam with 1e-4, and its epochs are some of the training's, where theirs come on top. Predictions are those of the training,
    of both views before the step, and of the first view until then; theirs are of a pass over all images in evaluation mode
    at the beginning of an epoch, which is saved here. Running statistics of batch norm are not those of mixed images. As in
    their code, batch norm of fixed layers is in training mode. Renewed layers learn to the end; those of their code, which are
    made after the optimizer, learn in the refinement alone.

    Args:
        warmup_share: of the training, by cross-entropy alone, in whole epochs, T1; 35 / 300 in the authors' code for 100
            classes.
        refine_share: of the training, for the renewed layers alone, in whole epochs, T2. 0: nothing is renewed.
        renewed_stages: of the network that are renewed beside its head; 0 in the authors' code.
        temperature: of sharpening.
        alpha: of the Beta distribution by which images are mixed.
        late_alpha: the same in the second half of the training.
        lambda_u: weight of the unlabelled samples; 75 in the authors' code for 100 classes.
        ramp_share: of the training, in which this weight goes up.
    """

    rule = "disagreement"
    views = 2

    def __init__(
        self,
        student: nn.Module,
        images: Tensor,
        items: int,
        num_classes: int,
        make_student: Callable[[int], nn.Module],
        *,
        warmup_share: float = 20 / 300,
        refine_share: float = 5 / 300,
        renewed_stages: int = 0,
        temperature: float = 0.5,
        alpha: float = 4.0,
        late_alpha: float = 0.75,
        lambda_u: float = 5.0,
        ramp_share: float = 16 / 300,
    ) -> None:
        options = chosen(locals())
        super().__init__(student, items, num_classes, options)
        self.warmup_share = _checks.check_share("warmup_share", warmup_share)
        self.refine_share = _checks.check_share("refine_share", refine_share)
        self.temperature = _checks.check_positive("temperature", temperature)
        self.alphas = tuple(terms.check_mixing(name, options[name]) for name in ("alpha", "late_alpha"))
        self.lambda_u = _checks.check_not_negative("lambda_u", lambda_u)
        self.ramp_share = _checks.check_share("ramp_share", ramp_share)
        self.tail = tail_of(student, images, _checks.check_count("renewed_stages", renewed_stages, 0))
        self._make_student = make_student
        one, unseen = torch.ones(()), torch.tensor(float(num_classes))  # labels that were not seen yet are a class, too
        self.known = self.keep(agreed=one, labelled=one, target=unseen)
        self.register_buffer("class_weight", torch.ones(num_classes, device=images.device))

    class_weight: Tensor

    def parts(self) -> dict[str, Part]:
        tail = [p for name in self.tail for p in self.student.get_submodule(name).parameters(recurse=False)]
        theirs = {id(parameter) for parameter in tail}
        return {"body": Part([p for p in self.student.parameters() if id(p) not in theirs]), "tail": Part(tail)}

    def phases(self, step: Step) -> tuple[int, int]:
        """The epoch with which the refinement begins, and that with which MixMatch does."""
        start = whole_epochs(self.warmup_share, step.epochs)
        return start, start + whole_epochs(self.refine_share, step.epochs)

    def before_epoch(self, step: Step) -> None:
        start, refined = self.phases(step)
        if step.epoch == start < refined:
            renew(self.student, check_module("make_student(1)", self._make_student(1)), self.tail)
            step.restart("tail")

    def iteration(self, batch: Batches, step: Step) -> dict[str, Tensor]:
        target, index, views = self.checked(batch)
        start, refined = self.phases(step)
        if step.epoch < refined:
            return self._from_labels(
                target, index, views[0], step, ("body", "tail") if step.epoch < start else ("tail",)
            )
        guesses = mean_probabilities(logits_of_views(self.student, views))
        right = self._remember(target, index, guesses)
        labelled = self.known["labelled"][index].to(guesses.dtype)
        labels = torch.where(
            labelled[:, None] > 0, terms.one_hot(target, guesses), terms.sharpened(guesses, self.temperature)
        )
        alpha = self.alphas[2 * step.epoch >= step.epochs]
        mixed = mixmatch(self.student, views, labels, labelled, alpha, self.class_weight)
        unlabelled = self.lambda_u * ramp(step, refined, self.ramp_share) * mixed.unlabelled_loss
        loss = mixed.labelled_loss + unlabelled
        step.update(loss)
        found = {"loss": loss, "labelled_loss": mixed.labelled_loss, "unlabelled_loss": unlabelled}
        return {**found, "labelled": labelled.mean(), "accuracy": right}

    def _from_labels(
        self, target: Tensor, index: Tensor, images: Tensor, step: Step, parts: tuple[str, ...]
    ) -> dict[str, Tensor]:
        logits = terms.class_logits(self.student, images)
        loss = cross_entropy(logits, target)
        step.update(loss, *parts)
        return {"loss": loss, "accuracy": self._remember(target, index, logits)}

    def _remember(self, target: Tensor, index: Tensor, predictions: Tensor) -> Tensor:
        """Which labels are predicted, and their share."""
        agreed = (predictions.argmax(-1) == target).float()
        self.known.write(index, agreed=agreed, target=target)
        return agreed.mean()

    def after_epoch(self, step: Step) -> dict[str, Tensor | float]:
        super().after_epoch(step)
        self.divide()
        return {"agreed": self.known["labelled"].mean()}

    @torch.no_grad()
    def divide(self) -> None:
        """Labelled from now on are those samples whose label was predicted; and how much each class of them weighs."""
        seen = self.known["target"] < self.num_classes
        labelled = (self.known["agreed"] > 0.5).float() * seen  # of a sample that several processes have it is a mean
        self.known["labelled"].copy_(labelled)
        counts = labelled.new_zeros(self.num_classes + 1).index_add(0, self.known["target"].long(), labelled)[:-1]
        self.class_weight.copy_(class_weights(counts))


def class_weights(counts: Tensor) -> Tensor:
    """The mean number of labelled samples of a class over its own, 3 at most, ``[K]``; 0 for a class without any, which is
    left out of the mean, too."""
    there = counts > 0
    mean = counts.sum() / there.sum().clamp(min=1)
    return torch.where(there, mean / counts.clamp(min=1), 0.0).clamp(max=MOST_WEIGHT)
