"""TRL's trainers, whole, with their losses and with fastkd's: what they log, their gradients, what they need."""

from __future__ import annotations

from typing import Any

import language_models as cases
import pytest
import torch

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]
pytest.importorskip("trl", reason='trl is not installed: pip install "fastkd[language]"')

from language_trainers import assert_same_training, distilled  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

from fastkd.integrations import trl as integration  # noqa: E402


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("distillation", {"beta": 0.0}),
        ("distillation", {"beta": 1.0, "gradient_accumulation_steps": 1}),
        ("distillation", {"beta": 0.5}),
        ("distillation", {"beta": 0.3, "gradient_accumulation_steps": 4}),
        ("gkd", {"beta": 0.5}),
        ("gkd", {"beta": 1.0, "lmbda": 1.0}),
        ("gkd", {"beta": 0.0, "seq_kd": True, "gradient_accumulation_steps": 1}),
        ("gold", {"beta": 0.5}),
        ("gold", {"beta": 0.0, "gradient_accumulation_steps": 1}),
    ],
    ids=str,
)
def test_the_same_training(tmp_path: Any, kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    real = integration.linear_divergence if kind == "distillation" else integration.divergence
    name = "linear_divergence" if kind == "distillation" else "divergence"
    monkeypatch.setattr(integration, name, lambda *given, **named: (counts.append(1), real(*given, **named))[1])
    theirs = distilled(tmp_path, kind, False, **options)
    assert not counts
    ours = distilled(tmp_path, kind, True, **options)
    assert len(counts) == 2 * options.get("gradient_accumulation_steps", 2)  # fastkd's was what ran
    assert_same_training(theirs, ours)


def needed(batch: int, tokens: int, classes: int) -> int:
    """Bytes that the loss of hidden states and its gradients take."""
    hidden, head = (torch.randn(*shape, 16).requires_grad_() for shape in ((batch, tokens), (classes,)))
    other, others = torch.randn(batch, tokens, 16), torch.randn(classes, 16)

    def work() -> None:
        mask = torch.ones(batch, tokens)
        distillation_trainer._chunked_divergence_loss(hidden, other, head, others, mask, 0.5)[0].backward()

    return cases.peak_bytes(work)


def test_memory() -> None:
    """TRL's tiles are of up to 4096 tokens and 32,768 classes, 512 MiB each; fastkd's chunks are of 32 MiB on a CPU."""
    shape = 2, 128, 32_768
    theirs = needed(*shape)
    with integration.patched("distillation"):
        ours = needed(*shape)
    print(f"{theirs:,} bytes with TRL's loss, {ours:,} with fastkd's")
    assert ours < theirs / 5
