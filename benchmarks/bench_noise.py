"""What methods for noisy labels keep of every sample: weights, corrections, mixtures of an epoch, and which labels are wrong;
against the authors' code, scikit-learn and cleanlab.

None of it needs a network: what networks put out is given. An epoch of a network takes seconds or minutes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastkd
from benchmarks.case import Case, Contest, Settings, Work, short_count
from fastkd.methods import BLDR
from fastkd.methods.noisy.over_parameters import OverParameters, corrected_losses
from fastkd.methods.noisy.samples import Samples
from fastkd.models.resnet import resnet

ITEMS, BATCH = 50_000, 256  # CIFAR-10, and a batch of BLDR
CLASSES = {"quick": (10,), "full": (10, 100), "gpu": (10, 100)}
CONFIDENT = {
    "quick": ((50_000, 10),),
    "full": ((1_000_000, 10), (50_000, 100)),
    "gpu": ((1_000_000, 10), (1_000_000, 100)),
}


def cases(settings: Settings) -> Iterator[Case]:
    """Weights, corrections, mixtures, wrong labels."""
    yield Case(f"weights of {short_count(ITEMS)} samples", partial(_weights, settings), 40 * ITEMS)
    for classes in CLASSES[settings.sizes]:
        name = f"step of u and v, {short_count(ITEMS)} samples of {classes} classes"
        yield Case(name, partial(_corrections, settings, classes), 40 * ITEMS * classes)
    yield Case(f"mixtures of two networks, {short_count(ITEMS)} losses", partial(_mixtures, settings, 1), 200 * ITEMS)
    yield Case(f"the same by class, {2 * CLASSES['quick'][0]} mixtures", partial(_mixtures, settings, 10), 200 * ITEMS)
    for items, classes in CONFIDENT[settings.sizes]:
        name = f"wrong labels of {short_count(items)} samples of {classes} classes"
        yield Case(name, partial(_confident, settings, items, classes), 40 * items * classes)


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

    work = Work(ours, {"cleanlab": theirs}, error, 0.0, 0.0)
    if importlib.util.find_spec("cleanlab") is None:
        work.leave_out("cleanlab", "is not installed")
    return work


def _off(truth: Tensor) -> Any:
    def error(value: Tensor) -> float:
        return float((value.double() - truth).norm() / truth.norm())

    return error


def test_noise(case: Case, contest: Contest) -> None:
    """Each case."""
    contest(case)
