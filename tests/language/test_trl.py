"""TRL's losses and fastkd's in their place: the same numbers, gradients and metrics."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]
pytest.importorskip("trl", reason='trl is not installed: pip install "fastkd[language]"')

from trl.experimental.gkd import GKDTrainer  # noqa: E402
from trl.experimental.gold import GOLDTrainer  # noqa: E402
from trl.experimental.iw_opd import IWOPDTrainer  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

from fastkd.integrations import trl as integration  # noqa: E402

CLOSE = {"rtol": 1e-5, "atol": 1e-7}
BETAS = [0.0, 0.3, 0.5, 1.0]


@pytest.fixture(autouse=True)
def trl_as_it_was() -> Iterator[None]:
    yield
    integration.unpatch()


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def both(call: Callable[[], tuple[Any, ...]]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What the call gives with TRL's losses and with fastkd's."""
    assert integration._names_now() == ()
    theirs = call()
    with integration.patched() as names:
        assert set(names) == {"distillation", "gkd", "gold", "iw_opd"}
        ours = call()
    return theirs, ours


def assert_same(theirs: Any, ours: Any, **close: float) -> None:
    torch.testing.assert_close(ours, theirs, **(close or CLOSE))


# ---- the loss of DistillationTrainer -------------------------------------------------------------------


def heads_loss(
    student_bias: bool = False, teacher_bias: bool = False, dtype: Any = torch.float32, **options: Any
) -> Any:
    """Loss, sum of entropies, number of tokens, and the gradients of the student's hidden states and head."""
    batch, tokens, width, teacher_width, classes = 3, 7, 16, 24, 301
    leaves = [drawn(batch, tokens, width), drawn(classes, width, seed=1)]
    leaves += [drawn(classes, seed=2)] if student_bias else []
    leaves = [each.to(dtype).requires_grad_() for each in leaves]
    teacher = [drawn(batch, tokens, teacher_width, seed=3).to(dtype), drawn(classes, teacher_width, seed=4).to(dtype)]
    teacher = [each.requires_grad_() for each in teacher]  # which is not to be followed
    options = {"completion_mask": torch.arange(tokens).expand(batch, -1) < torch.tensor([[7], [3], [5]]), **options}
    if student_bias:
        options["student_lm_head_bias"] = leaves[2]
    if teacher_bias:
        options["teacher_lm_head_bias"] = drawn(classes, seed=5).to(dtype)
    function = distillation_trainer._chunked_divergence_loss
    loss, entropy, count = function(leaves[0], teacher[0], leaves[1], teacher[1], **options)
    assert not entropy.requires_grad
    assert torch.autograd.grad(loss, teacher, retain_graph=True, allow_unused=True) == (None, None)
    return loss.detach(), entropy, count, *torch.autograd.grad(loss * 3, leaves)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.5},
        {"num_items_in_batch": 40},
        {"num_items_in_batch": torch.tensor(40.0), "temperature": 0.7},
        {"student_bias": True},
        {"student_bias": True, "teacher_bias": True, "temperature": 1.5},
        {"student_logit_scale": 0.3, "teacher_logit_scale": 0.2},
        {"student_final_logit_softcapping": 6.0, "teacher_final_logit_softcapping": 30.0, "temperature": 2.0},
        {"student_logit_scale": 0.5, "student_final_logit_softcapping": 5.0, "teacher_bias": True},
        {"completion_mask": torch.zeros(3, 7, dtype=torch.long)},
        {"completion_mask": torch.ones(3, 7)},
    ],
    ids=str,
)
def test_loss_of_heads(options: dict[str, Any], beta: float) -> None:
    theirs, ours = both(lambda: heads_loss(beta=beta, **options))
    assert_same(theirs, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_loss_of_heads_in_bfloat16_and_under_autocast(beta: float) -> None:
    theirs, ours = both(lambda: heads_loss(beta=beta, dtype=torch.bfloat16))
    assert [each.dtype for each in ours] == [each.dtype for each in theirs]
    assert_same(theirs[:3], ours[:3])
    assert_same(theirs[3:], ours[3:], rtol=2e-2, atol=2e-3)  # rounded at other places

    def autocast() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return heads_loss(beta=beta)

    theirs, ours = both(autocast)
    assert [each.dtype for each in ours] == [each.dtype for each in theirs]
    assert_same(theirs[:3], ours[:3])
    assert_same(theirs[3:], ours[3:], rtol=2e-2, atol=2e-3)


def test_heads_of_zero_3_are_left_to_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "linear_divergence", None)
    monkeypatch.setattr(integration, "is_partitioned", lambda head: True)
    theirs, ours = both(lambda: heads_loss(beta=0.5, student_bias=True, temperature=2.0))
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


# ---- the losses of logits: GKD, GOLD, IW-OPD -----------------------------------------------------------


def logits_loss(owner: Any, dtype: torch.dtype = torch.float32, masked: bool = True, **options: Any) -> Any:
    leaf = drawn(3, 8, 97, scale=3.0).to(dtype).requires_grad_()
    teacher = drawn(3, 8, 97, seed=1, scale=3.0).to(dtype)
    labels = torch.randint(0, 5000, (3, 7), generator=torch.Generator().manual_seed(2))
    labels[0, :5], labels[2] = -100, -100
    given = {"labels": labels if masked else None, **options}
    loss = owner.generalized_jsd_loss(leaf[:, :-1], teacher[:, :-1], **given)
    return loss.detach(), *torch.autograd.grad((loss * 3).sum(), leaf)


OWNERS = [GKDTrainer, GOLDTrainer, IWOPDTrainer]


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 3.0},
        {"masked": False},
        {"reduction": "sum", "temperature": 0.5},
        {"reduction": "mean"},
        {"reduction": "mean", "masked": False},
        {"num_items_in_batch": 31},
        {"num_items_in_batch": torch.tensor(31), "reduction": "none"},
        {"labels": torch.full((3, 7), -100)},
        {"reduction": "none"},  # TRL's
    ],
    ids=str,
)
def test_losses_of_logits(owner: Any, options: dict[str, Any], beta: float) -> None:
    theirs, ours = both(lambda: logits_loss(owner, beta=beta, **options))
    assert_same(theirs, ours, rtol=1e-5, atol=1e-6)


def test_losses_of_bfloat16_logits() -> None:
    theirs, ours = both(lambda: logits_loss(GKDTrainer, torch.bfloat16))
    exact = logits_loss(GKDTrainer)
    assert (ours[0].dtype, ours[1].dtype) == (torch.float32, torch.bfloat16)
    assert abs(ours[0] - exact[0]) < abs(theirs[0] - exact[0])
    assert (ours[1] - exact[1]).abs().max() <= (theirs[1] - exact[1]).abs().max()


def test_what_fastkd_does_not_compute_is_left_to_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    divergence = integration.divergence
    monkeypatch.setattr(
        integration, "divergence", lambda *given, **named: (called.append(1), divergence(*given, **named))[1]
    )
    probabilities = drawn(5, 97).softmax(-1)
    left = [
        lambda: logits_loss(IWOPDTrainer, top_k=5),
        lambda: logits_loss(IWOPDTrainer, top_k=5, add_tail=False, beta=0.0),
        lambda: logits_loss(GKDTrainer, reduction="none"),
        lambda: (GOLDTrainer.generalized_jsd_loss(probabilities, probabilities.flip(0), logits_are_probs=True),),
    ]
    for case in left:
        theirs, ours = both(case)
        assert not called
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    both(lambda: logits_loss(IWOPDTrainer, top_k=97))  # all of them
    assert len(called) == 1


# ---- patch and unpatch ----------------------------------------------------------------------------------


def functions() -> list[Any]:
    owners = (distillation_trainer, "_chunked_divergence_loss"), *((owner, "generalized_jsd_loss") for owner in OWNERS)
    return [getattr(owner, name) for owner, name in owners]


def test_patch_and_unpatch(monkeypatch: pytest.MonkeyPatch) -> None:
    importer = ModuleType("importer")  # by name, before
    importer.loss = distillation_trainer._chunked_divergence_loss  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "importer", importer)
    before = functions()
    assert integration.patch() == ("distillation", "gkd", "gold", "iw_opd")
    now = functions()
    assert not set(now) & set(before)
    assert importer.loss is now[0]
    assert integration.patch() == ("distillation", "gkd", "gold", "iw_opd")
    assert functions() == now
    integration.unpatch("gkd")
    assert functions() == [now[0], before[1], *now[2:]]
    with integration.patched("gkd", "gold"):
        assert functions() == now
    assert functions() == [now[0], before[1], *now[2:]]
    integration.unpatch()
    assert functions() == before
    assert importer.loss is before[0]
    integration.unpatch()
    assert integration.patch("gold") == ("gold",)
    assert functions() == [*before[:2], now[2], before[3]]
    integration.unpatch()
    with pytest.raises(ZeroDivisionError), integration.patched():
        raise ZeroDivisionError
    assert functions() == before


def test_subclasses_follow_and_their_own_stay() -> None:
    class Same(GKDTrainer):
        pass

    class Own(GKDTrainer):
        @staticmethod
        def generalized_jsd_loss() -> None: ...

    own = Own.generalized_jsd_loss
    with integration.patched():
        assert Same.generalized_jsd_loss is GKDTrainer.generalized_jsd_loss
        assert Own.generalized_jsd_loss is own


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda loss: lambda student, teacher: None, "it takes student, teacher"),
        (lambda loss: lambda student_logits, teacher_logits, labels=None, beta=0.1: None, "it takes student_logits, "),
        (lambda loss: None, "it is not there"),
    ],
)
def test_another_trl_is_refused(monkeypatch: pytest.MonkeyPatch, change: Any, why: str) -> None:
    monkeypatch.setattr("trl.__version__", "1.99.0")
    before = functions()
    if (new := change(before[1])) is None:
        monkeypatch.delattr(GKDTrainer, "generalized_jsd_loss")
    else:
        monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(new))
    with pytest.raises(RuntimeError) as raised:
        integration.patch()
    assert str(raised.value).startswith(
        "fastkd: trl 1.99.0 has another trl.experimental.gkd.gkd_trainer.GKDTrainer.generalized_jsd_loss than trl 1.16, "
        f"the version known: {why}"
    )
    assert "\n" not in str(raised.value)
    assert distillation_trainer._chunked_divergence_loss is before[0]  # nothing is replaced
    assert integration.patch("distillation") == ("distillation",)
    assert distillation_trainer._chunked_divergence_loss is not before[0]


def test_a_method_where_a_static_one_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", integration._gkd_loss)
    with pytest.raises(RuntimeError, match="it is no static method"):
        integration.patch("gkd")


def test_names_and_trl_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (integration.patch, integration.unpatch):
        with pytest.raises(ValueError, match=r"fastkd: names is 'sft', must be one of distillation, gkd, gold, iw_opd"):
            call("sft")
    monkeypatch.setitem(sys.modules, "trl.experimental.iw_opd.iw_opd_trainer", None)  # needs what is not there
    assert integration.patch() == ("distillation", "gkd", "gold")
    with pytest.raises(ImportError):
        integration.patch("iw_opd")
    integration.unpatch()
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r'fastkd: TRL is not installed: pip install "fastkd\[language\]"'):
        integration.patch()
