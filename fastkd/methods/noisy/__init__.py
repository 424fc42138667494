"""Learning with noisy labels: a file a method, on what they have in common (:mod:`.learner`)."""

from fastkd.methods.noisy.bldr import BLDR
from fastkd.methods.noisy.learner import NoisyLabels

__all__ = ["BLDR", "NoisyLabels"]
