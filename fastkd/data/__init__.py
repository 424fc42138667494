"""Data sets that the methods run on."""

from fastkd.data.batches import Batches
from fastkd.data.images import ImageSet
from fastkd.data.registry import load, names

__all__ = ["Batches", "ImageSet", "load", "names"]
