"""DivideMix: two networks divide the samples for each other, and learn from the unlabelled ones, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastkd import _checks
from fastkd.data.batch import Batches
from fastkd.methods.features import check_module
from fastkd.methods.method import cross_entropy
from fastkd.methods.noisy import terms
from fastkd.methods.noisy.ensemble import Ensemble
from fastkd.methods.noisy.learner import NoisyLabels, chosen, whole_epochs
from fastkd.methods.noisy.mixmatch import (
    logits_of_views,
    mean_probabilities,
    mixmatch,
    prior_loss,
    ramp,
)
from fastkd.methods.procedure import Part, Step
from fastkd.methods.registry import register
from fastkd.selection import TwoGaussianMixture, select_clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DivideMix"]


@register(
    "dividemix",
    family="noisy labels",
    needs=("labels",),
    trains="student, a second network like it",
    paper="Li et al., ICLR 2020",
)
class DivideMix(NoisyLabels):
    """DivideMix: two networks, each learns by MixMatch from the samples that the other one takes for clean, and from the rest.

    Li, Socher and Hoi, "DivideMix: Learning with Noisy Labels as Semi-Supervised Learning" (ICLR 2020), with the weights of the
    authors' code. After a warm-up by cross-entropy a mixture of two Gaussians of the losses says how likely each label is
    right, w. Labels with w above ``threshold`` are refined, ``w y + (1 - w) p`` of the network's own prediction (Eq. 3), the
    others guessed by both networks (Eq. 5); both are sharpened, and go into MixMatch (Eq. 8 to 12). What is kept is the mean of
    both networks' logits.

    Other than in the authors' code: A batch is one of all samples, where theirs are as many labelled as unlabelled ones, drawn
    apart; each term is a mean over the samples of its kind, so that it weighs the same. Both networks make a step in each
    iteration, where theirs take turns by epochs. Losses are those of the training, of both views before the step, in the
    warm-up of the first view; theirs are of a pass over all images in evaluation mode at the end of an epoch, which is saved
    here. Networks guess in training mode, also for each other, where the other one's is in evaluation mode there: each runs
    once for both. Running statistics of batch norm are those of these plain images alone; in their code mixed ones are a
    quarter of them. Losses are those of the last epoch always; theirs are means over five for 90 % of wrong labels.

    Args:
        warmup_share: of the training, by cross-entropy alone, in whole epochs; 30 / 300 in the authors' code for 100 classes.
        penalty: weight of the negative entropy of predictions in the warm-up; 1 in their code for asymmetric noise.
        threshold: of w, above which a sample is labelled.
        by_class: whether each class has mixtures of its own, which is no part of the paper.
        temperature: of sharpening.
        alpha: of the Beta distribution by which images are mixed.
        lambda_u: weight of the unlabelled samples; in the paper, of 10 classes, 0 for 20 % of wrong labels, 25 for 50 %, 50 for
            90 %; of 100 classes 25, 150 and 150.
        ramp_share: of the training, in which this weight goes up.
        prior: weight of the divergence of the mean prediction from a uniform one.
    """

    views = 2

    def __init__(
        self,
        student: nn.Module,
        items: int,
        num_classes: int,
        make_student: Callable[[int], nn.Module],
        *,
        warmup_share: float = 10 / 300,
        penalty: float = 0.0,
        threshold: float = 0.5,
        by_class: bool = False,
        temperature: float = 0.5,
        alpha: float = 4.0,
        lambda_u: float = 25.0,
        ramp_share: float = 16 / 300,
        prior: float = 1.0,
    ) -> None:
        options = chosen(locals())
        super().__init__(student, items, num_classes, options)
        self.warmup_share = _checks.check_share("warmup_share", warmup_share)
        self.penalty = _checks.check_not_negative("penalty", penalty)
        self.threshold = _checks.check_share("threshold", threshold)
        self.by_class = _checks.check_flag("by_class", by_class)
        self.temperature = _checks.check_positive("temperature", temperature)
        self.alpha = terms.check_mixing("alpha", alpha)
        self.lambda_u = _checks.check_not_negative("lambda_u", lambda_u)
        self.ramp_share = _checks.check_share("ramp_share", ramp_share)
        self.prior = _checks.check_not_negative("prior", prior)
        device = next(student.parameters()).device
        self.peer = check_module("make_student(1)", make_student(1)).to(device)
        # of both networks; labels of samples that were not seen yet are a class of their own, their losses are left out
        both, unseen = torch.ones(2), torch.tensor(float(num_classes))
        self.known = self.keep(loss=both * torch.inf, clean=both, target=unseen)

    def parts(self) -> dict[str, Part]:
        return {"student": Part(self.student), "peer": Part(self.peer)}

    def network(self) -> nn.Module:
        """Both, as one: the mean of their logits."""
        both = Ensemble(self.student, self.peer)
        both.training = self.student.training
        return both

    def iteration(self, batch: Batches, step: Step) -> dict[str, Tensor]:
        target, index, views = self.checked(batch)
        start = whole_epochs(self.warmup_share, step.epochs)
        if step.epoch < start:
            return self._warm_up(target, index, views[0], step)
        networks = {"student": self.student, "peer": self.peer}
        logits = [logits_of_views(network, views) for network in networks.values()]
        guesses = torch.stack([mean_probabilities(own) for own in logits])
        losses = [torch.stack([_losses(view, target) for view in own]).mean(0) for own in logits]
        self.known.write(index, loss=torch.stack(losses, -1), target=target)
        clean = self.known["clean"][index].flip(-1)  # each is told by the other
        weight = self.lambda_u * ramp(step, start, self.ramp_share)
        found = []
        for i, (name, network) in enumerate(networks.items()):
            labels, labelled = self.labels(target, clean[:, i], guesses[i], guesses.mean(0))
            mixed = mixmatch(network, views, labels, labelled, self.alpha)
            parts = (mixed.labelled_loss, weight * mixed.unlabelled_loss, self.prior * prior_loss(mixed.logits))
            loss = torch.stack(parts).sum()
            step.update(loss, name)
            found.append(torch.stack((loss, *parts, labelled.mean())).detach())
        names = ("loss", "labelled_loss", "unlabelled_loss", "prior_loss", "labelled")
        means = dict(zip(names, torch.stack(found).mean(0), strict=True))
        return {**means, "accuracy": terms.accuracy(guesses.mean(0), target)}

    def labels(self, target: Tensor, clean: Tensor, own: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
        """What one network learns, ``[B, K]``, and which of it is labelled, ``[B]``, 1 or 0.

        Args:
            target: int64 ``[B]``, the given labels.
            clean: ``[B]``, how likely each is right, by the other network.
            own, both: ``[B, K]``, what this network predicts, and both together.
        """
        labelled = (clean > self.threshold).to(own.dtype)
        weight = clean[:, None].to(own.dtype)
        refined = weight * terms.one_hot(target, own) + (1.0 - weight) * own
        return terms.sharpened(torch.where(labelled[:, None] > 0, refined, both), self.temperature), labelled

    def _warm_up(self, target: Tensor, index: Tensor, images: Tensor, step: Step) -> dict[str, Tensor]:
        found, rows, right = [], [], []
        for name, network in (("student", self.student), ("peer", self.peer)):
            logits = terms.class_logits(network, images)
            losses = _losses(logits, target)
            parts = [losses.mean()]
            if self.penalty:
                parts.append(self.penalty * negative_entropy(logits))
            loss = torch.stack(parts).sum()
            step.update(loss, name)
            found.append(loss.detach())
            rows.append(losses.detach())
            right.append(terms.accuracy(logits, target))
        self.known.write(index, loss=torch.stack(rows, -1), target=target)
        return {"loss": torch.stack(found).mean(), "accuracy": torch.stack(right).mean()}

    def after_epoch(self, step: Step) -> dict[str, Tensor | float]:
        super().after_epoch(step)
        self.divide()
        return {"clean": (self.known["clean"] > self.threshold).float().mean()}

    def pictures(self, step: Step) -> Mapping[str, Figure]:
        """The student's losses, the mixture of them, and which samples the second network learns as labelled."""
        from fastkd.methods import pictures  # matplotlib takes a second to import

        losses = self.known["loss"][:, 0]
        chosen = self.known["clean"][:, 0] > self.threshold
        mixture = None if self.by_class else TwoGaussianMixture(normalize=True).fit(losses)
        return {"losses": pictures.loss_histogram(losses.cpu(), mixture, chosen.cpu())}

    @torch.no_grad()
    def divide(self) -> None:
        """How likely each label is right, by each network's losses of the epoch: one call for all mixtures."""
        losses = self.known["loss"].T.contiguous()
        if not self.by_class:
            _, clean = select_clean(losses)
            self.known["clean"].copy_(clean.T)
            return
        target, order = self.known["target"].sort(stable=True)
        starts = torch.searchsorted(target, torch.arange(self.num_classes + 1, device=target.device).to(target.dtype))
        end = starts.new_full((1,), losses.numel())
        offsets = torch.cat((starts, starts + self.items, end))  # those that were not seen are a class, too
        _, clean = select_clean(losses[:, order].flatten(), offsets=offsets)
        self.known["clean"][order] = clean.view(2, -1).T


def negative_entropy(logits: Tensor) -> Tensor:
    """``mean_i sum_k p_ik log p_ik``: high where predictions are confident."""
    log_p = terms.log_probabilities(logits)
    return (log_p.exp() * log_p).sum(-1).mean()


def _losses(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target, reduction="none")
