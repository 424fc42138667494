"""BLDR: bidirectional learning with dynamic sample reweighting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastkd import _checks, functional
from fastkd.data.batch import Batches
from fastkd.methods.noisy import terms
from fastkd.methods.noisy.learner import NoisyLabels, chosen, whole_epochs
from fastkd.methods.noisy.over_parameters import OverParameters, corrected_losses
from fastkd.methods.noisy.samples import UNSEEN
from fastkd.methods.noisy.two_heads import Heads, SelfDistilled, TwoHeads
from fastkd.methods.procedure import Step
from fastkd.methods.registry import register

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BLDR"]


@register(
    "bldr",
    family="noisy labels",
    needs=("labels",),
    trains="student with two heads, middle classifiers, a correction of each label",
    paper="Zong et al., 2022",
)
class BLDR(NoisyLabels):
    """BLDR: a head learns what a sample is, another what it is not; the second one says how much each sample counts.

    Zong et al., "Noise-Robust Bidirectional Learning with Dynamic Sample Reweighting" (arXiv:2209.01334), with the weights of
    the authors' code. The negative head learns that a sample is of no class but the given and the predicted one (Eq. 2). After
    each epoch the probability that it gives to each sample's label, from the lowest to the highest, becomes the sample's weight
    in both heads. The positive head corrects labels as SOP does. Both agree on two views of an image and predict all
    classes alike; classifiers in the middle of the network learn from the labels, from both heads together, and from the last
    features (self-distillation). What is kept predicts by both heads.

    Args:
        warmup_share: of the training, in which all samples have a weight of 1, in whole epochs; 41 / 340 in the authors' code
            for 100 classes.
        correction_share: of the training, in which the negative head learns that a sample is none of the classes but the given
            one; after it, but the predicted one, too. 0: at once, as in the authors' code, where the negative head may
            predict one class for all images at first, and take a thousand updates or more to leave that.
        learning_rate_u: of the correction at the given label.
        learning_rate_v: of the correction at other classes.
        squared: weight of the squared error that v learns from, times ratio^2.
        ratio: share of the samples that are taken for wrong in the warm-up, 1 in the authors' code for 100 classes; then it is
            of those whose label has a probability below ``doubt`` by the negative head.
        doubt: that probability.
        balance: weight of the term that all classes are predicted alike.
        consistency: weight of the divergence between two views.
        middle: whether there are classifiers in the middle.
        response: weight of what these learn from both heads, alpha.
        temperature: of that.
        hint: weight of what they learn from the last features, lambda, a sum over the batch.
        agreement: weight of KL(positive || negative) of the heads; 0.1 in the authors' code for 100 classes, 0 for 10.
    """

    rule = "probability"
    views = 2
    strong_views = 1

    def __init__(
        self,
        student: nn.Module,
        images: Tensor,
        items: int,
        num_classes: int,
        *,
        warmup_share: float = 21 / 320,
        correction_share: float = 0.0,
        learning_rate_u: float = 10.0,
        learning_rate_v: float = 10.0,
        squared: float = 50.0,
        ratio: float = 0.1,
        doubt: float = 0.3,
        balance: float = 0.1,
        consistency: float = 0.9,
        middle: bool = True,
        response: float = 0.1,
        temperature: float = 3.0,
        hint: float = 1e-6,
        agreement: float = 0.0,
    ) -> None:
        options = chosen(locals())
        super().__init__(student, items, num_classes, options)
        self.warmup_share, self.correction_share, self.first_ratio, self.doubt = (
            _checks.check_share(name, options[name]) for name in ("warmup_share", "correction_share", "ratio", "doubt")
        )
        names = ("squared", "balance", "consistency", "response", "hint", "agreement")
        self.weights = {name: _checks.check_not_negative(name, options[name]) for name in names}
        self.temperature = _checks.check_positive("temperature", temperature)
        self.student = SelfDistilled(student, images, middle=_checks.check_flag("middle", middle))
        one = torch.ones(())
        self.known = self.keep(u=torch.zeros(1), v=torch.zeros(num_classes), probability=UNSEEN * one, weight=one)
        self.correction = OverParameters(self.known, learning_rate_u, learning_rate_v)
        self.register_buffer("ratio", torch.tensor(self.first_ratio, device=images.device))

    ratio: Tensor

    def deployed(self, network: nn.Module) -> nn.Module:
        """Both heads without the middle."""
        heads: TwoHeads = network.heads  # type: ignore[assignment]
        return heads

    def probabilities(self, network: nn.Module, images: Tensor, index: Tensor) -> Tensor:
        heads: TwoHeads = network.heads  # type: ignore[assignment]
        return terms.probabilities(heads.negative_logits(images))

    def iteration(self, batch: Batches, step: Step) -> dict[str, Tensor]:
        target, index, views = self.checked(batch)
        rows = self.correction.rows(index)
        weight = self.known["weight"][index]
        first, second = self.student(torch.cat(views)).halves()
        pairs = zip((first.positive, *first.middle), (second.positive, *second.middle), strict=True)
        positive, *middle = (self.positive_loss(ours, other, target, rows, weight) for ours, other in pairs)
        correct = step.epoch >= whole_epochs(self.correction_share, step.epochs)
        negative = self.negative_loss(first, second, target, weight, correct=correct)
        losses = {"positive_loss": positive, "negative_loss": negative}
        if middle:
            losses |= {"middle_loss": torch.stack(middle).sum(), "distilled_loss": self.distilled_loss(first)}
        if self.weights["agreement"]:
            agreement = functional.kl_div(first.negative, first.positive)
            losses["agreement_loss"] = self.weights["agreement"] * agreement
        loss = torch.stack(list(losses.values())).sum()
        self.correction.step(index, rows, loss, step.batches_per_step)
        step.update(loss)
        given = terms.probabilities(first.negative.detach()).gather(1, target[:, None])[:, 0]
        self.known.write(index, probability=given)
        right = {"accuracy": first.positive, "negative_accuracy": first.negative}
        shares = {name: terms.accuracy(logits, target) for name, logits in right.items()}
        return {"loss": loss, **losses, "weight": weight.mean(), **shares}

    def positive_loss(
        self, logits: Tensor, other: Tensor, target: Tensor, rows: tuple[Tensor, Tensor], weight: Tensor
    ) -> Tensor:
        """Of a head that learns what samples are, L_pl of the paper: logits ``[B, K]`` for the two views."""
        cross_entropy, squared, balance = corrected_losses(logits, target, *rows, weight)
        loss = cross_entropy + self.weights["squared"] * self.ratio.square() * squared
        return loss + self._of_views(logits, other, balance)

    def negative_loss(
        self, first: Heads, second: Heads, target: Tensor, weight: Tensor, *, correct: bool = True
    ) -> Tensor:
        """Of the head that learns what they are not, L_nl."""
        loss = terms.negative_learning(first.negative, target, weight, correct=correct)
        balance = terms.balance(terms.probabilities(first.negative))
        return loss + self._of_views(first.negative, second.negative, balance)

    def distilled_loss(self, heads: Heads) -> Tensor:
        """What the middle learns from the end, of L_sd: the response of both heads together, and the last features where
        either is above 0."""
        teacher = ((heads.positive + heads.negative) / 2).detach()
        latents = heads.latents.detach()
        response = [functional.soft_cross_entropy(logits, teacher, self.temperature) for logits in heads.middle]
        hints = [
            ((vectors - latents).square() * ((vectors > 0) | (latents > 0))).sum() for vectors in heads.middle_latents
        ]
        return self.weights["response"] * torch.stack(response).sum() + self.weights["hint"] * torch.stack(hints).sum()

    def _of_views(self, logits: Tensor, other: Tensor, balance: Tensor) -> Tensor:
        return self.weights["balance"] * balance + self.weights["consistency"] * terms.consistency(logits, other)

    def after_epoch(self, step: Step) -> dict[str, Tensor | float]:
        super().after_epoch(step)
        if step.epoch + 1 >= whole_epochs(self.warmup_share, step.epochs):
            self.reweight()
        return {"ratio": self.ratio}

    def pictures(self, step: Step) -> Mapping[str, Figure]:
        """What the negative head has last said of the labels, from which the weights come (Figure 2 of the paper)."""
        from fastkd.noise_figures import score_histogram  # matplotlib takes a second to import

        return {"probabilities": score_histogram(self.known["probability"].cpu())}

    @torch.no_grad()
    def reweight(self) -> None:
        """Weights of all samples, and the ratio, by what the negative head has last said of their labels."""
        found = self.known["probability"]
        seen = found >= 0.0
        low, high = torch.where(seen, found, 1.0).min(), found.max()
        # where all are alike, all count, and so does what was not seen yet
        share = (found - low) / (high - low).clamp(min=torch.finfo(found.dtype).tiny)
        self.known["weight"].copy_(torch.where(seen & (high > low), share, 1.0))
        self.ratio.copy_(terms.weighted_mean((found < self.doubt).float(), seen.float()))
