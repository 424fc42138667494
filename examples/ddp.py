"""Mutual learning in several processes: `torchrun --nproc-per-node 2 examples/ddp.py`, over NCCL with GPUs, else gloo.

Each process takes its part of each batch. Interrupted, the same command goes on where it was.
"""

import sys
from pathlib import Path

from fastkd.data.digits import image_sets
from fastkd.data.image_batches import ImageBatches
from fastkd.methods import DML, Objective
from fastkd.models.convnet import ConvNet
from fastkd.training import Trainer, TrainingSettings, evaluator, process_group


def main(folder: Path, epochs: int = 12) -> None:
    settings = TrainingSettings(epochs=epochs, learning_rate=0.05, warmup_epochs=1.0, ema=0.99, checkpoint_every=10)
    with process_group() as process:
        train, test = (part.to(process.device) for part in image_sets())
        method = DML(networks=2)
        student = method.build_student(lambda seed: ConvNet((16, 32), seed=seed))
        batches = ImageBatches(train, 64, seed=0, padding=1, rank=process.rank, world_size=process.world_size)
        trainer = Trainer(
            Objective(method, student).to(process.device),
            batches,
            settings,
            evaluate=evaluator(test.normalised(), test.target),
            folder=folder,
        )
        trainer.fit(resume="auto")
        if process.rank == 0:
            print(f"{process.world_size} processes; weights, metrics and curves are in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/ddp"))
