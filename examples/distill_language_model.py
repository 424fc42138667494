"""Distil a language model, in seconds on a CPU: `pip install "fastkd[language]"`, `python examples/distill_language_model.py`.

Text and tokenizer are made here, of Python's own documentation; a small Llama learns it, then teaches a smaller one, whose
logits never exist. With --trainer the loop is that of transformers' Trainer.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from torch import Tensor

try:
    import transformers
    from tokenizers import ByteLevelBPETokenizer
except ModuleNotFoundError:
    raise SystemExit('this example needs transformers: pip install "fastkd[language]"') from None

from fastkd.integrations.transformers import DistillationMixin, distillation_loss

VOCABULARY, LENGTH, BATCH = 2048, 64, 8


def token_rows() -> tuple[Tensor, Tensor]:
    """Sequences to learn from and others, `[rows, LENGTH]`."""
    text = "\n".join(topics.values())
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=VOCABULARY, show_progress=False)
    ids = torch.tensor(tokenizer.encode(text).ids)
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    rows = rows[torch.randperm(len(rows))]
    return rows[256:], rows[:256]


def language_model(hidden: int) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def drawn(rows: Tensor, steps: int) -> Iterator[dict[str, Tensor]]:
    for _ in range(steps):
        ids = rows[torch.randint(len(rows), (BATCH,))]
        yield {"input_ids": ids, "labels": ids}


@torch.no_grad()
def perplexity(model: transformers.PreTrainedModel, rows: Tensor) -> float:
    losses = [model.eval()(input_ids=part, labels=part).loss for part in rows.split(32)]
    return math.exp(torch.stack(losses).mean())


def learn(model: transformers.PreTrainedModel, rows: Tensor, steps: int) -> None:
    """Plain training, of the teacher."""
    optimizer = torch.optim.AdamW(model.train().parameters(), 3e-3)
    for inputs in drawn(rows, steps):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def distil(
    student: transformers.PreTrainedModel, teacher: transformers.PreTrainedModel, rows: Tensor, steps: int
) -> list[float]:
    """A loop of one's own: two batches a step, whose losses are sums over the tokens of both."""
    optimizer = torch.optim.AdamW(student.train().parameters(), 3e-3)
    losses = []
    for _ in range(steps):
        batches = list(drawn(rows, 2))
        count = sum(int((inputs["labels"][:, 1:] != -100).sum()) for inputs in batches)
        total = 0.0
        for inputs in batches:
            loss = distillation_loss(student, teacher, inputs, count, temperature=2.0, alpha=0.7)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


class DistillationTrainer(DistillationMixin, transformers.Trainer):
    pass


def distil_with_trainer(
    student: transformers.PreTrainedModel, teacher: transformers.PreTrainedModel, rows: Tensor, steps: int
) -> list[float]:
    """The same by transformers' Trainer, which counts the tokens by itself."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        data = [{"input_ids": row, "labels": row} for row in rows]
        trainer = DistillationTrainer(
            student, arguments, train_dataset=data, teacher=teacher, temperature=2.0, alpha=0.7
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(steps: int = 80, trainer: bool = False) -> dict[str, float]:
    torch.manual_seed(0)
    train, test = token_rows()
    teacher, student = language_model(128), language_model(48)
    learn(teacher, train, 4 * steps)
    results = {"teacher": perplexity(teacher, test), "student before": perplexity(student, test)}
    losses = (distil_with_trainer if trainer else distil)(student, teacher, train, steps)
    results["student after"] = perplexity(student, test)
    print(f"loss: {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last of {steps}")
    for name, value in results.items():
        print(f"perplexity of the {name}: {value:.1f}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.split(":")[0] + ".", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=80, help="updates of the student; the teacher takes four times as many"
    )
    parser.add_argument(
        "--trainer", action="store_true", help="with transformers' Trainer instead of a loop of one's own"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # what is so small takes longer on more
    main(**vars(arguments))
