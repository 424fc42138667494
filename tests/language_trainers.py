"""Trainers of tiny models that the tests of language models share, in their process or in two."""

from __future__ import annotations

from typing import Any

import language_models as cases
import torch
import transformers
from torch import Tensor

from fastkd.integrations import trl as integration
from fastkd.integrations.transformers import DistillationMixin


def batch(rows: int = 3, tokens: int = 11, seed: int = 0, vocabulary: int = cases.VOCABULARY) -> dict[str, Tensor]:
    """Padded on the right, the prompts masked."""
    ids = torch.randint(3, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    lengths = tokens - torch.arange(rows) * 2
    seen = torch.arange(tokens) < lengths[:, None]
    labels = torch.where(seen & (torch.arange(tokens) >= 2), ids, -100)
    return {"input_ids": torch.where(seen, ids, 0), "attention_mask": seen.long(), "labels": labels}


class Trainer(DistillationMixin, transformers.Trainer):
    pass


class Rows(torch.utils.data.Dataset):
    """Sequences of unequal numbers of tokens, padded to one length."""

    def __init__(self, count: int) -> None:
        whole = batch(count, 2 * count + 4)
        self.rows = [{name: value[row] for name, value in whole.items()} for row in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return self.rows[row]


def trained(
    folder: Any, *, rows: int, accumulate: int, base: Any = Trainer, bf16: bool = False, **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    """A trainer after its only step, which moves nothing, and the gradient of that step."""
    seen: list[dict[str, Tensor]] = []

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
            seen.append(cases.gradients(model))

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulate,
        learning_rate=0.0, max_grad_norm=0.0, report_to=[], save_strategy="no", use_cpu=True, logging_steps=1,
        per_device_eval_batch_size=8, disable_tqdm=True, bf16=bf16,
    )  # fmt: skip
    trainer = base(
        model=cases.model(0),
        args=arguments,
        train_dataset=Rows(8),
        eval_dataset=Rows(8),
        callbacks=[Keep()],
        **{"teacher": cases.model(1, 24), "temperature": 2.0, "alpha": 0.6, **options},
    )
    trainer.train()
    return trainer, seen[0]


# ---- TRL ------------------------------------------------------------------------------------------------


def sentences(count: int = 16) -> list[tuple[str, str]]:
    """Prompts and completions of unequal lengths."""
    places = ((5, 3), (9, 30), (9, 12), (14, 20))
    lines = [line for line in cases.zen() if len(line) > 20][:count]
    return [(line[:a], line[a : a + b]) for line, (a, b) in zip(lines, places * count, strict=False)]


def distilled(folder: Any, kind: str, patched: bool, **options: Any) -> dict[str, Any]:
    """Two steps of a trainer of TRL: what it logs, the gradients of each step, the weights after them."""
    from datasets import Dataset

    student, teacher = cases.model(0), cases.model(1, 24)
    common = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "seed": 3, "bf16": False,
        "gradient_checkpointing": False, "disable_tqdm": True, "learning_rate": 1e-3, "temperature": 1.3, "max_grad_norm": 0.0,
    }  # fmt: skip
    pairs = sentences()
    chat = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    if kind == "distillation":
        from trl import DistillationConfig, DistillationTrainer

        make, config, own = DistillationTrainer, DistillationConfig, {"max_completion_length": 12}
        data = Dataset.from_dict({"prompt": [a for a, _ in pairs]})
    elif kind == "gkd":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        make, config, own = GKDTrainer, GKDConfig, {"max_new_tokens": 8, "max_length": 64, "lmbda": 0.0}
        data = Dataset.from_dict({"messages": chat})
    else:
        from trl.experimental.gold import GOLDConfig, GOLDTrainer

        make, config, own = GOLDTrainer, GOLDConfig, {"max_completion_length": 8, "max_length": 64, "lmbda": 0.0}
        data = Dataset.from_dict({"messages": chat})

    gradients: list[dict[str, Tensor]] = []
    logs: list[dict[str, float]] = []

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
            gradients.append(cases.gradients(model))

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            kept.append(
                {name: value for name, value in logs.items() if "time" not in name and "per_second" not in name}
            )

    kept = logs
    arguments = config(**{**common, **own, **options})
    trainer = make(
        student, teacher, args=arguments, train_dataset=data, processing_class=cases.tokenizer(), callbacks=[Keep()]
    )
    if patched:  # trainers that are made already, too
        integration.patch(kind)
    try:
        trainer.train()
    finally:
        integration.unpatch()
    return {"logs": logs, "gradients": gradients, "weights": dict(student.named_parameters())}


def assert_same_training(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    assert len(theirs["logs"]) == len(ours["logs"]) == 3
    for their, our in zip(theirs["logs"], ours["logs"], strict=True):
        assert our.keys() == their.keys()
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-7)
    assert len(theirs["gradients"]) == len(ours["gradients"]) == 2
    for place, (their, our) in enumerate(zip(theirs["gradients"], ours["gradients"], strict=True)):
        for name, gradient in their.items():
            size = gradient.abs().max().item()
            torch.testing.assert_close(our[name], gradient, rtol=1e-4, atol=size * (1e-5, 1e-3)[place])
