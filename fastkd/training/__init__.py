"""Training: :class:`Trainer` for procedures, with exact resume, several processes, metrics and curves."""

from fastkd.training.distributed import Process, process_group
from fastkd.training.evaluation import evaluate, evaluator
from fastkd.training.frechet import frechet_distance, latents
from fastkd.training.inference import predict
from fastkd.training.metrics import read_metrics
from fastkd.training.segmentation import class_iou, confusion_matrix, mean_iou
from fastkd.training.settings import TrainingSettings
from fastkd.training.trainer import Trainer

__all__ = [
    "Process",
    "Trainer",
    "TrainingSettings",
    "class_iou",
    "confusion_matrix",
    "evaluate",
    "evaluator",
    "frechet_distance",
    "latents",
    "mean_iou",
    "predict",
    "process_group",
    "read_metrics",
]
