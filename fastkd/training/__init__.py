"""Training loops: :class:`Trainer` for the methods, with exact resume, several processes, metrics and curves."""

from fastkd.training.distributed import Process, process_group
from fastkd.training.evaluation import evaluate, evaluator
from fastkd.training.metrics import read_metrics
from fastkd.training.settings import TrainingSettings
from fastkd.training.source import BatchSource, LoaderBatches
from fastkd.training.trainer import Trainer

__all__ = [
    "BatchSource",
    "LoaderBatches",
    "Process",
    "Trainer",
    "TrainingSettings",
    "evaluate",
    "evaluator",
    "process_group",
    "read_metrics",
]
