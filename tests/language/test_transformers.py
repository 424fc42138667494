"""Distillation of transformers' models from their hidden states, against the same loss of their logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import language_models as cases
import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]
transformers = pytest.importorskip(
    "transformers", reason='transformers is not installed: pip install "fastkd[language]"'
)

from language_trainers import Rows, Trainer, batch, trained  # noqa: E402

from fastkd.functional import js_div, kd_loss, kl_div  # noqa: E402
from fastkd.integrations.transformers import distillation_loss  # noqa: E402


def shifted(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    given = {name: value for name, value in inputs.items() if name != "labels"}
    return model(**given).logits[:, :-1].float()


def both(
    model: Any,
    teacher: Any,
    inputs: dict[str, Tensor],
    formula: Callable[..., Tensor],
    count: float | None = None,
    **options: Any,
) -> None:
    """The loss and its gradients are those of the formula of the logits."""
    with torch.no_grad():
        given = shifted(teacher.eval(), inputs)
    truth = formula(shifted(model, inputs), given, inputs["labels"][:, 1:])
    truth.backward()
    expected = cases.gradients(model)
    model.zero_grad()
    loss = distillation_loss(model, teacher, inputs, count, **options)
    loss.backward()
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-7)
    found = cases.gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * (1 + gradient.abs().max().item()))
    assert not any(parameter.grad is not None for parameter in teacher.parameters())
    model.zero_grad()


LOSSES: list[tuple[dict[str, Any], Callable[..., Tensor]]] = [
    ({}, lambda s, t, target: kl_div(s, t, target=target)),
    (
        {"temperature": 2.0, "direction": "reverse"},
        lambda s, t, target: kl_div(s, t, 2.0, direction="reverse", target=target),
    ),
    ({"beta": 0.3, "temperature": 1.5}, lambda s, t, target: js_div(s, t, 1.5, beta=0.3, target=target)),
    ({"alpha": 0.7, "temperature": 2.0}, lambda s, t, target: kd_loss(s, t, target, 2.0, 0.7)),
    ({"alpha": 0.0}, lambda s, t, target: torch.nn.functional.cross_entropy(s.flatten(0, 1), target.flatten())),
    ({"count": 50}, lambda s, t, target: kl_div(s, t, target=target, reduction="sum") / 50),
    ({"count": torch.tensor(50)}, lambda s, t, target: kl_div(s, t, target=target, reduction="sum") / 50),
]


@pytest.mark.parametrize(("options", "formula"), LOSSES, ids=[str(options) for options, _ in LOSSES])
def test_losses(options: dict[str, Any], formula: Callable[..., Tensor]) -> None:
    both(cases.model(0), cases.model(1, 24), batch(), formula, **options)


KINDS: list[tuple[str, dict[str, Any]]] = [
    (
        "gpt2",
        {
            "n_embd": 16,
            "n_head": 2,
            "n_layer": 2,
            "tie_word_embeddings": True,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        },
    ),
    ("gemma2", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    ("cohere", {"logit_scale": 0.25}),
    ("granite", {"logits_scaling": 4.0}),
    ("qwen3", {}),
    ("phi", {}),  # a head with a bias
]


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=[kind for kind, _ in KINDS])
def test_models(kind: str, options: dict[str, Any]) -> None:
    """Softcaps, scales, biases, tied heads; each teaches another model, too."""
    model = cases.model(0, kind=kind, **options)
    both(model, cases.model(1, 24), batch(), LOSSES[1][1], temperature=2.0, direction="reverse")
    both(cases.model(1, 24), model, batch(), LOSSES[1][1], temperature=2.0, direction="reverse")


def test_encoder_and_decoder() -> None:
    sizes = {
        "vocab_size": 97,
        "d_model": 16,
        "d_ff": 32,
        "d_kv": 8,
        "num_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.0,
    }
    torch.manual_seed(0)
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=True)
    model, teacher = (transformers.T5ForConditionalGeneration(config) for _ in range(2))
    inputs = batch()
    with torch.no_grad():
        given = teacher.eval()(**inputs).logits
    truth = kl_div(model(**inputs).logits, given, target=inputs["labels"])
    torch.testing.assert_close(distillation_loss(model, teacher, inputs), truth, rtol=1e-5, atol=1e-7)


def test_gradient_checkpointing_and_labels_shifted_before() -> None:
    model = cases.model(0)
    model.gradient_checkpointing_enable()
    model.train()
    both(model, cases.model(1, 24), batch(), LOSSES[0][1])
    inputs = batch()
    moved = {**inputs, "shift_labels": torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)}
    teacher = cases.model(1)
    assert torch.equal(distillation_loss(model, teacher, inputs), distillation_loss(model, teacher, moved))
    loss, terms = distillation_loss(model, teacher, inputs, alpha=0.5, return_terms=True)
    torch.testing.assert_close(loss.detach(), 0.5 * terms["cross_entropy"] + 0.5 * terms["divergence"])


def test_autocast() -> None:
    """The products of the heads are of bfloat16, as they were with the heads in the models; the sums are not."""
    model, teacher, inputs = cases.model(0), cases.model(1, 24), batch()
    exact = distillation_loss(model, teacher, inputs).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation_loss(model, teacher, inputs)
        loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() != exact
    assert abs(loss.item() - exact) < 0.02 * exact
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_vocabularies_of_different_sizes() -> None:
    model, teacher, inputs = cases.model(0), cases.model(1, 24, vocab_size=104), batch()
    with pytest.raises(ValueError, match="97"):
        distillation_loss(model, teacher, inputs)
    both(model, teacher, inputs, lambda s, t, target: kl_div(s, t[..., :97], target=target), classes=97)


def test_no_tokens_at_all() -> None:
    model, inputs = cases.model(0), batch()
    loss = distillation_loss(model, cases.model(1), {**inputs, "labels": torch.full_like(inputs["labels"], -100)})
    loss.backward()
    assert loss == 0
    assert not any(gradient.any() for gradient in cases.gradients(model).values())


def test_the_logits_do_not_exist() -> None:
    model, teacher = cases.model(0, vocab_size=16_001), cases.model(1, 24, vocab_size=16_001)
    inputs = batch(4, 96, vocabulary=16_001)
    logits = 4 * 96 * 16_001 * 4
    assert cases.peak_bytes(lambda: shifted(model, inputs)) > logits
    assert (
        cases.peak_bytes(lambda: distillation_loss(model, teacher, inputs, memory_budget=2**20).backward()) < logits / 2
    )


def test_what_is_refused() -> None:
    model, inputs = cases.model(0), batch()
    with pytest.raises(ValueError, match="inputs has input_ids, attention_mask, must have labels"):
        distillation_loss(model, model, {name: inputs[name] for name in ("input_ids", "attention_mask")})
    with pytest.raises(TypeError, match="fastkd: teacher is Linear, must be a model of transformers"):
        distillation_loss(model, torch.nn.Linear(1, 1), inputs)
    with pytest.raises(TypeError, match="fastkd: teacher, a LlamaModel, has no linear head"):
        distillation_loss(model, model.model, inputs)
    adapted = cases.model(1)
    adapted.lm_head.base_layer = torch.nn.Identity()
    with pytest.raises(TypeError, match="fastkd: model, a LlamaForCausalLM, has an adapter on its head"):
        distillation_loss(adapted, model, inputs)
    silent = cases.model(1)
    silent.config.logit_scale = 0.5  # which a Llama does not look at
    with pytest.raises(
        TypeError, match=r"does something else to its logits than its config says \(scale 0.5, softcap None\)"
    ):
        distillation_loss(silent, model, inputs)
    assert "forward" not in silent.lm_head.__dict__
    with pytest.raises(ValueError, match="direction is 'sideways'"):
        distillation_loss(model, model, inputs, direction="sideways")  # type: ignore[call-overload]


# ---- Trainer --------------------------------------------------------------------------------------------


def test_accumulation_does_not_change_the_step(tmp_path: Any) -> None:
    """Nor is the loss that is shown another; evaluation is over the same denominator."""
    whole, expected = trained(tmp_path, rows=8, accumulate=1)
    parts, found = trained(tmp_path, rows=2, accumulate=4)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    losses = [trainer.state.log_history[0]["loss"] for trainer in (whole, parts)]
    inputs = torch.utils.data.default_collate(list(Rows(8)))
    truth = distillation_loss(cases.model(0), cases.model(1, 24), inputs, temperature=2.0, alpha=0.6).item()
    assert losses == pytest.approx([truth] * 2, rel=1e-5)
    assert whole.evaluate()["eval_loss"] == pytest.approx(truth, rel=1e-5)
    assert not any(parameter.requires_grad for parameter in whole.teacher.parameters())
    assert not whole.teacher.training
    assert whole.model_accepts_loss_kwargs


def test_metrics_have_logits(tmp_path: Any) -> None:
    shapes = []
    trainer, _ = trained(
        tmp_path,
        rows=8,
        accumulate=1,
        compute_metrics=lambda seen: (shapes.append(seen.predictions.shape), {"x": 1.0})[1],
    )
    assert trainer.evaluate()["eval_x"] == 1.0
    assert shapes == [(8, 20, 97)]


def test_mixed_precision(tmp_path: Any) -> None:
    """accelerate wraps the forward pass of the model in autocast: the loss goes through it."""
    seen = []

    class Seeing(Trainer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            for model in (self.model, self.teacher):
                model.lm_head.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))

    trained(tmp_path, rows=8, accumulate=1, base=Seeing, bf16=True)
    assert seen == [True, True]


def test_trainer_refuses(tmp_path: Any) -> None:
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"alpha is 1\.5, must be in \[0, 1\]"):
        Trainer(model=cases.model(0), args=arguments, teacher=cases.model(1), alpha=1.5)
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1, must be 0"):
        Trainer(model=cases.model(0), args=arguments, teacher=cases.model(1))
