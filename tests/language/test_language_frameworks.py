"""The loss in the loops of others: Lightning, TRL's SFTTrainer, compiled models; and the example."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import language_models as cases
import pytest
import torch

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]
pytest.importorskip("transformers", reason='transformers is not installed: pip install "fastkd[language]"')

from fastkd.integrations.transformers import DistillationMixin, distillation_loss  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "examples" / "distill_language_model.py"


def test_lightning() -> None:
    """DDP wraps the whole module there, so that the models in it are plain."""
    lightning = pytest.importorskip("lightning", reason='lightning is not installed: pip install "fastkd[frameworks]"')
    from language_trainers import Rows

    class Distillation(lightning.LightningModule):
        def __init__(self, student: Any, teacher: Any) -> None:
            super().__init__()
            self.student, self.teacher = student, teacher.requires_grad_(False)
            self.losses: list[float] = []

        def training_step(self, inputs: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            loss = distillation_loss(self.student, self.teacher, inputs, temperature=2.0, alpha=0.7)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.student.parameters(), 1e-2)

    module = Distillation(cases.model(0), cases.model(1, 24))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(Rows(8), 4))
    assert len(module.losses) == 6
    assert module.losses[-1] < module.losses[0]
    assert not module.teacher.training


def test_trainer_of_trl_for_labels(tmp_path: Any) -> None:
    """The mixin makes SFTTrainer, with its chat templates and masks, distil."""
    trl = pytest.importorskip("trl", reason='trl is not installed: pip install "fastkd[language]"')
    from datasets import Dataset
    from language_trainers import sentences

    class Trainer(DistillationMixin, trl.SFTTrainer):
        pass

    chat = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in sentences()]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=16, gradient_accumulation_steps=1, use_cpu=True,
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, bf16=False, learning_rate=0.0,
        per_device_eval_batch_size=16,
    )  # fmt: skip
    data = Dataset.from_dict({"messages": chat})
    student, teacher = cases.model(0), cases.model(1, 24)
    trainer = Trainer(
        student,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        processing_class=cases.tokenizer(),
        teacher=teacher,
    )
    trainer.train()
    inputs = next(iter(trainer.get_eval_dataloader()))
    truth = distillation_loss(student, teacher, inputs).item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(truth, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(truth, rel=1e-5)


def test_compiled_models() -> None:
    """The graph of the whole model, logits included, is not run; layers compiled inside stay so, and nothing compiles here."""
    from language_trainers import batch

    model, teacher = cases.model(0), cases.model(1, 24)
    truth = distillation_loss(model, teacher, batch())
    assert torch.equal(distillation_loss(torch.compile(model), torch.compile(teacher), batch()), truth)
    model.compile()
    assert torch.equal(distillation_loss(model, teacher, batch()), truth)


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_distill_language_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("trainer", [False, True])
def test_example(trainer: bool, capsys: pytest.CaptureFixture[str]) -> None:
    results = example().main(steps=12, trainer=trainer)
    assert results["student after"] < 0.7 * results["student before"]
    shown = capsys.readouterr().out
    assert "in the last of 12" in shown
    assert f"perplexity of the student after: {results['student after']:.1f}" in shown


def test_example_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert ended.value.code == 0
    assert "--trainer" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="this example needs transformers"):
        example()
