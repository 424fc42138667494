"""The study of Sarfraz et al., "Knowledge Distillation Beyond Model Compression" (ICPR 2020)."""

from fastkd.studies.zoo.study import SETTINGS, Zoo

__all__ = ["SETTINGS", "Zoo"]
