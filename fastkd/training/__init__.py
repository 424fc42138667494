"""Training loops: :class:`Trainer` for the methods, with exact resume, several processes, metrics and curves."""

from fastkd.training.distributed import Process, process_group
from fastkd.training.evaluation import evaluate, evaluator
from fastkd.training.metrics import read_metrics
from fastkd.training.segmentation import class_iou, confusion_matrix, mean_iou
from fastkd.training.settings import TrainingSettings
from fastkd.training.source import BatchSource, LoaderBatches
from fastkd.training.trainer import Trainer

__all__ = [
    "BatchSource",
    "LoaderBatches",
    "Process",
    "Trainer",
    "TrainingSettings",
    "class_iou",
    "confusion_matrix",
    "evaluate",
    "evaluator",
    "mean_iou",
    "process_group",
    "read_metrics",
]
