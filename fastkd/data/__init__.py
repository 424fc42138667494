"""Data sets, and sources of batches for a training."""

from fastkd.data.batch import Batch
from fastkd.data.drawn_batches import DrawnBatches
from fastkd.data.image_batches import ImageBatches
from fastkd.data.images import ImageSet
from fastkd.data.loader_batches import LoaderBatches
from fastkd.data.registry import load, names
from fastkd.data.source import BatchSource, NoBatches, ParallelBatches

__all__ = [
    "Batch",
    "BatchSource",
    "DrawnBatches",
    "ImageBatches",
    "ImageSet",
    "LoaderBatches",
    "NoBatches",
    "ParallelBatches",
    "load",
    "names",
]
