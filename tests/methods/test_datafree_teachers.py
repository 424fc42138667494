"""Teachers whose inside is not as that of a plain chain of layers, watched while they look at generated images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from datafree_cases import BATCH, QUICK, Steps, teacher
from torch import Tensor, nn
from training_cases import CLASSES, Batches, small, small_resnet

from fastkd._seeding import seeded
from fastkd.methods.datafree import terms
from fastkd.methods.datafree.watched_teacher import WatchedTeacher
from fastkd.methods.registry import Given, create_procedure

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


class Norms(nn.Module):
    """Three batch norms, run in the order that is said."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.last = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        for i in self.order:
            x = 1.5 * self.norms[i](x).relu()
        return self.last(x.mean((2, 3)))  # type: ignore[no-any-return]


class Flat(nn.Sequential):
    """With a batch norm of rows without pixels."""

    def __init__(self) -> None:
        layers = nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)
        super().__init__(*layers)


TEACHERS: dict[str, Callable[[], nn.Module]] = {
    "resnet, whose shortcuts run first": lambda: small_resnet(77),
    "out of order": lambda: Norms(2, 0, 1),
    "one runs twice": lambda: Norms(0, 1, 0, 2),
    "one does not run": lambda: Norms(2, 0),
    "rows": Flat,
}


@pytest.mark.parametrize("name", TEACHERS)
def test_moments_are_held_against_the_statistics_of_the_same_batch_norm(name: str) -> None:
    with seeded(3):
        network = teacher(lambda _: TEACHERS[name]())
    images = Batches().of(5)[0]
    watched = WatchedTeacher(network, images, statistics=True, instances=True)
    seen = watched.look(images)
    expected, means = torch.zeros(()), []

    def look(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal expected
        rows = inputs[0].transpose(0, 1).flatten(1)
        differences = rows.mean(1) - norm.running_mean, rows.var(1, correction=0) - norm.running_var
        expected = expected + sum(difference.norm() for difference in differences)
        means.append(inputs[0].flatten(2).mean(2) if inputs[0].dim() > 2 else inputs[0])

    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.register_forward_pre_hook(look)
    with torch.no_grad():
        network(images)
    torch.testing.assert_close(terms.bn_statistics(seen.moments, seen.running), expected)
    torch.testing.assert_close(seen.description, torch.cat(means, 1))


@pytest.mark.parametrize("name", TEACHERS)
def test_an_iteration_of_cmi(name: str) -> None:
    """Which asks for statistics and descriptions."""
    with seeded(3):
        given = Given(small(0), teacher(lambda _: TEACHERS[name]()), Batches().of(0)[0], BATCH)
        procedure = create_procedure("cmi", given, **QUICK, generator_steps=1, capacity=BATCH)
    assert procedure.iteration(None, Steps())["loss"].isfinite()  # type: ignore[arg-type]
