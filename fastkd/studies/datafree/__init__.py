"""The study of Shin & Choi, "Teacher as a Lenient Expert: Teacher-Agnostic Data-Free Knowledge Distillation" (AAAI 2024)."""

from fastkd.studies.datafree.study import DataFree

__all__ = ["DataFree"]
