"""What methods for noisy labels keep of every sample: weights, corrections, mixtures of an epoch, and which labels are wrong;
against the authors' way, scikit-learn and cleanlab. And a step of BLDR, with its network and without.

The peer of the step has the same network, which it runs once on both views (the authors': on the first one twice).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import fastkd
from benchmarks.bench_training import BYTES_OF_AN_IMAGE, at_most, step_name, work
from benchmarks.case import Case, Contest, Settings, Work, short_count
from benchmarks.iterations import AUTHORS, Updates
from benchmarks.measure import OURS
from benchmarks.trainer import Given, Losses, Source
from fastkd.data import Batch
from fastkd.methods import BLDR
from fastkd.methods.noisy.over_parameters import OverParameters, corrected_losses
from fastkd.methods.noisy.samples import Samples
from fastkd.methods.noisy.two_heads import Heads
from fastkd.models.resnet import resnet

ITEMS, BATCH = 50_000, 256  # CIFAR-10, and a batch of BLDR
SIDE = 32
CLASSES = {"quick": (10,), "full": (10, 100), "gpu": (10, 100)}
CONFIDENT = {
    "quick": ((50_000, 10),),
    "full": ((1_000_000, 10), (50_000, 100)),
    "gpu": ((1_000_000, 10), (1_000_000, 100)),
}
# of a step: depth of the network, classes, batch
STEPS_QUICK = ((20, 10, 128), (20, 100, 128))
STEPS_FULL = ((20, 100, 256),)
STEPS_GPU = ((20, 10, 256), (20, 100, 256))


def cases(settings: Settings) -> Iterator[Case]:
    """Weights, corrections, mixtures, wrong labels, steps."""
    yield Case(f"weights of {short_count(ITEMS)} samples", partial(_weights, settings), 40 * ITEMS)
    for classes in CLASSES[settings.sizes]:
        name = f"step of u and v, {short_count(ITEMS)} samples of {classes} classes"
        yield Case(name, partial(_corrections, settings, classes), 40 * ITEMS * classes)
    yield Case(f"mixtures of two networks, {short_count(ITEMS)} losses", partial(_mixtures, settings, 1), 200 * ITEMS)
    yield Case(f"the same by class, {2 * CLASSES['quick'][0]} mixtures", partial(_mixtures, settings, 10), 200 * ITEMS)
    for items, classes in CONFIDENT[settings.sizes]:
        name = f"wrong labels of {short_count(items)} samples of {classes} classes"
        yield Case(name, partial(_confident, settings, items, classes), 40 * items * classes)
    sizes = settings.pick(STEPS_QUICK, STEPS_FULL, STEPS_GPU)
    steps = [_step(settings, *size, networks=networks) for size in sizes for networks in (True, False)]
    yield from {case.name: case for case in steps}.values()  # sizes that only test the benchmark coincide


def _weights(settings: Settings) -> Work:
    """An epoch of BLDR's: batches are written as they come, weights and the ratio made in the end."""
    device = settings.device
    network = resnet(8, num_classes=10, seed=0).to(device)
    ours = BLDR(network, torch.zeros(2, 3, 8, 8, device=device), ITEMS, 10, middle=False)
    order = torch.randperm(ITEMS, device=device).split(BATCH)
    given = torch.rand(ITEMS, device=device)
    rows = [given[index] for index in order]

    def on_the_device() -> Tensor:
        for index, probability in zip(order, rows, strict=True):
            ours.known.write(index, probability=probability)
        ours.reweight()
        return ours.known["weight"]

    def as_lists() -> Tensor:
        """As the authors' code has it."""
        probabilities: list[float] = []
        indices: list[int] = []
        for index, probability in zip(order, rows, strict=True):
            probabilities.extend(probability.cpu().numpy().tolist())
            indices.extend(index.cpu().numpy().tolist())
        found = np.asarray(probabilities)[np.argsort(indices)]
        weight = (found - found.min()) / (found.max() - found.min())
        assert len(found[found < 0.3]) / len(found) < 1
        return torch.tensor(weight).to(device)

    truth = (given.double() - given.min()) / (given.max() - given.min())
    return Work(on_the_device, {"lists": as_lists}, _off(truth), 1e-5, 1e-5)


def _corrections(settings: Settings, classes: int) -> Work:
    """A step of SOP's u and v, without the network's; the authors' SGD goes over the rows of all samples."""
    device = settings.device
    logits, target = torch.randn(BATCH, classes, device=device), torch.randint(classes, (BATCH,), device=device)
    index = torch.randperm(ITEMS, device=device)[:BATCH]
    start = [0.3 * torch.rand(ITEMS, width, device=device) for width in (1, classes)]
    samples = Samples(ITEMS, u=torch.zeros(1), v=torch.zeros(classes)).to(device)
    correction = OverParameters(samples, 10.0, 10.0)

    def loss_of(u: Tensor, v: Tensor) -> Tensor:
        cross_entropy, squared, _ = corrected_losses(logits, target, u, v)
        return cross_entropy + squared

    def rows() -> Tensor:
        samples.write(index, u=start[0][index], v=start[1][index])
        there = correction.rows(index)
        correction.step(index, there, loss_of(*there))
        return samples["v"][index]

    def everything() -> Tensor:
        u, v = parameters
        with torch.no_grad():
            for parameter, values in zip(parameters, start, strict=True):
                parameter[index] = values[index]
        optimizer.zero_grad()
        loss_of(u[index], v[index]).backward()
        optimizer.step()
        return v.detach()[index]

    parameters = [nn.Parameter(values.clone()) for values in start]
    optimizer = torch.optim.SGD(parameters, lr=10.0)
    u, v = (values[index].double().requires_grad_() for values in start)
    cross_entropy, squared, _ = corrected_losses(logits.double(), target, u, v)
    truth = v.detach() - 10 * torch.autograd.grad(cross_entropy + squared, v)[0]
    return Work(rows, {"all rows": everything}, _off(truth), 1e-5, 1e-5)


def _mixtures(settings: Settings, groups: int) -> Work:
    """The division of an epoch of DivideMix: of two networks, or of each class of both."""
    losses = torch.rand(2 * groups, ITEMS // groups, device=settings.device).pow(4)
    losses[:, ::3] += 2.0

    def ours() -> Tensor:
        return fastkd.select_clean(losses)[0]

    def one_by_one() -> Tensor:
        from sklearn.mixture import GaussianMixture

        masks = []
        for values in losses.cpu().double().numpy():
            scaled = ((values - values.min()) / (values.max() - values.min()))[:, None]
            mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0).fit(scaled)
            masks.append(mixture.predict_proba(scaled)[:, mixture.means_.argmin()] > 0.5)
        return torch.from_numpy(np.stack(masks))

    truth = losses < 1.5

    def error(mask: Tensor) -> float:
        return float((mask.cpu() != truth.cpu()).double().mean())

    return Work(ours, {"scikit-learn": one_by_one}, error, 1e-2, 1e-2)


def _confident(settings: Settings, items: int, classes: int) -> Work:
    """Which labels confident learning calls wrong."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(classes, (items,), generator=generator)
    logits = (
        torch.randn(items, classes, generator=generator)
        .mul_(1.5)
        .scatter_add_(1, truth[:, None], torch.full((items, 1), 4.0))
    )
    wrong = torch.rand(items, generator=generator) < 0.3
    labels = torch.where(wrong, torch.randint(classes, (items,), generator=generator), truth)
    probabilities = logits.softmax(1)
    there = labels.to(settings.device), probabilities.to(settings.device)

    def ours() -> Tensor:
        return fastkd.noise.find(*there, rule="confident").noisy

    def theirs() -> Any:
        from cleanlab.filter import find_label_issues

        return find_label_issues(labels.numpy(), probabilities.numpy(), filter_by="confident_learning", n_jobs=1)

    expected = ours().cpu()

    def error(mask: Any) -> float:
        return float((torch.as_tensor(mask).cpu() != expected).double().mean())

    found = Work(ours, {"cleanlab": theirs}, error, 0.0, 0.0)
    if importlib.util.find_spec("cleanlab") is None:
        found.leave_out("cleanlab", "is not installed")
    return found


# A step of BLDR: both heads on two views, losses, gradients, u and v, what is written of each sample.


class GivenHeads(Given):
    """Stands for a network with two heads: both outputs are given."""

    def forward(self, images: Tensor) -> Heads:  # type: ignore[override]
        positive, negative = self.values
        return Heads(positive, negative, [], positive, [])


class Taken(Updates):
    """Leaves the loss to the trainer."""

    def update(self, loss: Tensor, *parts: str) -> None:
        """As it says."""
        self.loss = loss


def _step(settings: Settings, depth: int, classes: int, most: int, *, networks: bool) -> Case:
    batch = at_most(settings, most)

    def build() -> Work:
        device = settings.device
        views = [torch.randn(batch, 3, SIDE, SIDE, device=device) for _ in range(2)]
        views = [view.to(memory_format=torch.channels_last) for view in views]
        target = torch.randint(classes, (batch,), device=device)
        index = torch.randperm(ITEMS, device=device)[:batch]
        network = resnet(depth, num_classes=classes, seed=0).to(device)
        rates = dict.fromkeys(("learning_rate_u", "learning_rate_v"), 0.0)  # u and v stay as they are over all rounds
        bldr = BLDR(network, views[0][:2], ITEMS, classes, middle=False, **rates).to(device)
        bldr.known["weight"].uniform_()
        for name in "uv":
            bldr.known[name].uniform_(0.1, 0.3)
        authors = _Authors(bldr, index, target)
        first = bldr.student if networks else GivenHeads(torch.randn(2, 2 * batch, classes, device=device))

        def ours(model: nn.Module, _source: Source) -> Iterator[Tensor]:
            bldr.student = model  # type: ignore[assignment]
            step = Taken({})
            bldr.iteration(Batch(views[0], target, index, (views[1],)), step)
            yield step.loss

        def theirs(model: nn.Module, _source: Source) -> Iterator[Tensor]:
            yield from authors.losses(model, views)

        contenders: dict[str, Losses] = {OURS: ours, AUTHORS: theirs}
        return work(settings, first, contenders, theirs)

    name = f"BLDR step ResNet-{depth} of {classes} classes, batch {batch} of {short_count(ITEMS)}"
    return Case(step_name(name, networks), build, 2 * batch * BYTES_OF_AN_IMAGE + 8 * ITEMS * classes)


class _Authors:
    """Each loss from its own softmax, labels as rows of zeros and a one, an optimizer over the u and v of all samples, what is
    known of these in lists."""

    def __init__(self, bldr: BLDR, index: Tensor, target: Tensor) -> None:
        self.u, self.v = (nn.Parameter(bldr.known[name].clone()) for name in "uv")
        self.optimizer = torch.optim.SGD([self.u, self.v], lr=0.0)
        self.weight, self.ratio, self.weights = bldr.known["weight"].clone(), bldr.first_ratio, bldr.weights
        self.index, self.target, self.classes = index, target, bldr.num_classes
        self.rows = torch.arange(len(index), device=index.device)
        self.probabilities: list[float] = []
        self.indices: list[int] = []

    def losses(self, model: nn.Module, views: list[Tensor]) -> Iterator[Tensor]:
        """One step's."""
        first, second = model(torch.cat(views)).halves()
        weight = self.weight[self.index]
        self.optimizer.zero_grad()
        loss = self.positive_loss(first.positive, weight) + self.negative_loss(first.negative, weight)
        for ours, other in ((first.positive, second.positive), (first.negative, second.negative)):
            predicted = ours.softmax(1).detach()
            loss = loss + self.weights["consistency"] * F.kl_div(other.log_softmax(1), predicted, reduction="batchmean")
        yield loss
        self.optimizer.step()
        given = first.negative.softmax(1)[self.rows, self.target]
        self.probabilities.extend(given.detach().cpu().numpy().tolist())
        self.indices.extend(self.index.cpu().numpy().tolist())
        if len(self.indices) >= ITEMS:
            self.probabilities, self.indices = [], []

    def positive_loss(self, logits: Tensor, weight: Tensor) -> Tensor:
        """Cross-entropy and squared error with u and v, balance."""
        label = F.one_hot(self.target, self.classes).float()
        u = (self.u[self.index].square() * label).clamp(0, 1 - 1e-4)
        v = (self.v[self.index].square() * (1 - label)).clamp(0, 1 - 1e-4)
        predicted = F.normalize((logits.softmax(1) + u - v.detach()).clamp(min=1e-4), p=1, dim=1).clamp(1e-4, 1)
        cross_entropy = (weight * -(label * predicted.log()).sum(1)).mean()
        hard = F.one_hot(logits.softmax(1).argmax(1), self.classes).float()
        squared = F.mse_loss(hard + u.detach() - v, label, reduction="sum") / len(label)
        return cross_entropy + self.weights["squared"] * self.ratio**2 * squared + self.balance(predicted)

    def negative_loss(self, logits: Tensor, weight: Tensor) -> Tensor:
        """That a sample is of none of the classes but the given and the predicted one, and balance."""
        predicted = logits.softmax(1)
        wrong = torch.ones_like(predicted)
        wrong[self.rows, self.target] = 0
        wrong[self.rows, logits.argmax(1)] = 0
        loss = -(wrong * (1 - predicted).clamp(1e-5, 1).log()).sum(1)
        return (weight * loss).mean() + self.balance(logits.softmax(1))

    def balance(self, predicted: Tensor) -> Tensor:
        """The divergence of a uniform prediction from the mean one, but for a constant."""
        prior = torch.ones(self.classes, device=predicted.device) / self.classes
        return self.weights["balance"] * -(prior * predicted.mean(0).clamp(1e-4, 1).log()).sum()


def _off(truth: Tensor) -> Any:
    def error(value: Tensor) -> float:
        return float((value.double() - truth).norm() / truth.norm())

    return error


def test_noise(case: Case, contest: Contest) -> None:
    """Each case."""
    contest(case)
