"""Data sets that the methods run on."""

from fastkd.data.image_batches import ImageBatches
from fastkd.data.images import ImageSet
from fastkd.data.registry import load, names

__all__ = ["ImageBatches", "ImageSet", "load", "names"]
