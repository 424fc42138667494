"""``torch.set_flush_denormal``: it sets the mode of the thread that calls it, and must not show in results."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import fastkd
from fastkd import functional as F  # noqa: N812

pytestmark = pytest.mark.no_kernels

TINY = torch.rand(2, 4096, 40, generator=torch.Generator().manual_seed(0)) * 1e-41  # subnormal numbers of float32

LOGITS = (torch.rand(TINY.shape, generator=torch.Generator().manual_seed(1)) * 9).unbind()
SCALES = {scale: torch.tensor(scale) for scale in (1.0, 1e-37, 1e-40)}  # made before the mode is set


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def _gradients(loss: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0) -> tuple[Tensor, ...]:
    s, t = (x.detach().requires_grad_() for x in LOGITS)
    y = loss(s, t)
    return (y.detach(), *torch.autograd.grad(y, (s, t), SCALES[scale].expand_as(y)))


CALLS: dict[str, Callable[[], object]] = {
    "kl_div": lambda: _gradients(lambda s, t: F.kl_div(s, t, reduction="none"), 1e-40),
    "js_div": lambda: _gradients(lambda s, t: F.js_div(s, t, reduction="none", weight=TINY[0, :, 0]), 1.0),
    "sparse_kl_div": lambda: _gradients(
        lambda s, t: F.sparse_kl_div(s + t, torch.arange(3).repeat(4096, 1), torch.log(TINY[0, :, :3])), 1e-40
    ),
    "subnormal logits": lambda: F.kl_div(TINY[0], TINY[1], 1e-41, reduction="none"),
    "logit_stats": lambda: fastkd.logit_stats(TINY[0], 1e-42),
    "relation_loss": lambda: _gradients(lambda s, t: F.relation_loss(s[:64], t[:64]), 1e-37),
    "channel_moments": lambda: (
        fastkd.channel_moments(TINY[0, :, :40].reshape(-1, 10, 4), per_sample=True),
        _gradients(lambda s, t: fastkd.channel_moments(s).mean + fastkd.channel_moments(t).var, 1e-37),
    ),
    "crop_patches": lambda: fastkd.crop_patches(
        TINY.view(512, 1, 16, 40), torch.zeros(512, 1, 2, dtype=torch.int64), 16
    ),
    "normalised images": lambda: fastkd.random_crop_flip(TINY.view(512, 1, 16, 40), 0, flip_probability=0.0, std=0.5),
    "select_clean": lambda: fastkd.select_clean(TINY[0].flatten()[:100_000], normalize=False, reg_covar=0.0),
    "AliasTable": lambda: fastkd.AliasTable(TINY[0].flatten(), 1e41, seed=1).weights(),
    "iqpr": lambda: fastkd.AliasTable(TINY[0].flatten(), iqpr=5.0, seed=1).weights(),
}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on_it(name: str) -> None:
    expected = pytree.tree_leaves(CALLS[name]())
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        ours = pytree.tree_leaves(CALLS[name]())
        one = torch.tensor(1e-38) * 0.01
        assert one == 0  # the caller's mode is the caller's again
    finally:
        torch.set_flush_denormal(False)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
