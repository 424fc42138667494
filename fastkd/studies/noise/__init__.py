"""The study of noisy labels: BLDR and the methods that it is compared with."""

from fastkd.studies.noise.study import SETTINGS, Noise

__all__ = ["SETTINGS", "Noise"]
