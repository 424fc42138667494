"""Data sets, collections without labels, and sources of batches for a training."""

from fastkd.data.array_collection import ArrayCollection
from fastkd.data.batch import Batch
from fastkd.data.collection import Block, Collection, Source, Unreadable
from fastkd.data.concat_collection import ConcatCollection
from fastkd.data.conforming import conformed
from fastkd.data.dataset_collection import DatasetCollection, FolderCollection
from fastkd.data.drawn_batches import DrawnBatches
from fastkd.data.image_batches import ImageBatches
from fastkd.data.images import ImageSet
from fastkd.data.loader_batches import LoaderBatches
from fastkd.data.opening import open_collection
from fastkd.data.registry import load, names
from fastkd.data.source import BatchSource, NoBatches, ParallelBatches
from fastkd.data.source_statistics import SourceStatistics

__all__ = [
    "ArrayCollection",
    "Batch",
    "BatchSource",
    "Block",
    "Collection",
    "ConcatCollection",
    "DatasetCollection",
    "DrawnBatches",
    "FolderCollection",
    "ImageBatches",
    "ImageSet",
    "LoaderBatches",
    "NoBatches",
    "ParallelBatches",
    "Source",
    "SourceStatistics",
    "Unreadable",
    "conformed",
    "load",
    "names",
    "open_collection",
]
