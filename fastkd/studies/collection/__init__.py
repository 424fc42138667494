"""The study of Begon & Geurts, "Distillation from heterogeneous unlabeled collections" (2021)."""

from fastkd.studies.collection.study import CollectionStudy

__all__ = ["CollectionStudy"]
