"""Distillation under Lightning: `pip install lightning`, then `python examples/lightning_module.py`."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

try:
    import lightning
except ModuleNotFoundError:
    raise SystemExit("this example needs Lightning: pip install lightning") from None

from fastkd.data.digits import image_sets
from fastkd.methods import Baseline, Hinton, Objective
from fastkd.models.convnet import ConvNet


class Distillation(lightning.LightningModule):
    """Trains any method: an Objective is an nn.Module, so Lightning moves it, checkpoints it and wraps it for DDP."""

    def __init__(self, objective: Objective, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.objective, self.learning_rate = objective, learning_rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        images, target = batch
        progress = self.current_epoch / (self.trainer.max_epochs or 1)  # BSS and ONE change with it
        loss, logits = self.objective(images, target, progress)
        self.log_dict(
            {**loss.terms, "loss": loss.total.detach(), "accuracy": (logits.argmax(-1) == target).float().mean()}
        )
        return loss.total

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        images, target = batch
        network = self.objective.method.deployed(self.objective.student.model)
        self.log("test_accuracy", (network(images).argmax(1) == target).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.objective.parameters(), self.learning_rate)  # the student's, and the method's


def loaders() -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    train, test = (TensorDataset(part.normalised(), part.target) for part in image_sets())
    return DataLoader(train, 128, shuffle=True, drop_last=True), DataLoader(test, 512)


def main(epochs: int = 8) -> None:
    lightning.seed_everything(0)
    train, test = loaders()
    teacher = Distillation(Objective(Baseline(), ConvNet((32, 64))))
    fit(teacher, train, test, epochs)
    # made afterwards, as an Objective freezes its teacher
    student = Distillation(Objective(Hinton(), ConvNet((8, 16)), teacher.objective.student.model))
    fit(student, train, test, epochs)


def fit(module: Distillation, train: DataLoader[Any], test: DataLoader[Any], epochs: int) -> None:
    trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False)
    trainer.fit(module, train, test)


if __name__ == "__main__":
    main()
