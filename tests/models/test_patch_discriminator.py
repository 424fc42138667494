"""The patch discriminator: what each of its logits sees, and what it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd.models.patch_discriminator import PatchDiscriminator

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


def seen(network: nn.Module, side: int, row: int, column: int) -> Tensor:
    """Which pixels of an image a logit depends on, bool ``[side, side]``."""
    images = torch.randn(1, 1, side, side, dtype=torch.float64, requires_grad=True)
    logits = network.double().eval()(images)
    (gradient,) = torch.autograd.grad(logits[0, 0, row, column], images)
    return gradient[0, 0] != 0


@pytest.mark.parametrize("size", [*range(1, 34), 64])
def test_a_logit_sees_its_patch_and_no_more(size: int) -> None:
    network = PatchDiscriminator(1, size, width=2)
    assert network(torch.randn(3, 1, size, size)).shape == (3, 1, 1, 1)
    mask = seen(network, size + 8, 0, 0)
    rows, columns = (mask.any(dim).nonzero().flatten() for dim in (1, 0))
    assert (int(rows.min()), int(rows.max())) == (0, size - 1)
    assert (int(columns.min()), int(columns.max())) == (0, size - 1)
    assert mask[:size, :size].double().mean() > 0.9  # of a leaky ReLU's two slopes none is 0


@pytest.mark.parametrize("size", [2, 8, 10, 18, 22, 32])
def test_padded_logits_see_as_much(size: int) -> None:
    network = PatchDiscriminator(1, size, width=2, padded=True)
    logits = network(torch.randn(1, 1, 96, 96))
    row = logits.shape[2] // 2
    mask = seen(network, 96, row, row)
    rows = mask.any(1).nonzero().flatten()
    assert int(rows.max() - rows.min()) == size - 1


def test_that_of_the_paper() -> None:
    """Conv4 s2 p1 to 128, leaky ReLU, Conv4 s2 p1 to 256 without bias, batch norm, leaky ReLU, Conv1: 64 logits an image."""
    network = PatchDiscriminator(3, 10, padded=True)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 1, 8, 8)
    theirs = nn.Sequential(
        nn.Conv2d(3, 128, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(128, 256, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(256),
        nn.LeakyReLU(0.2),
        nn.Conv2d(256, 1, 1),
    )
    theirs.load_state_dict(dict(zip(theirs.state_dict(), network.state_dict().values(), strict=True)))
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(network(images), theirs(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 0), "size is 0, must be"),
        ((0, 8), "channels is 0, must be"),
        ((3, 8.5), "size is float, must be an int"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        PatchDiscriminator(*arguments)
