"""Learning with noisy labels: a file a method, on what they have in common (:mod:`.learner`)."""

from fastkd.methods.noisy.bldr import BLDR
from fastkd.methods.noisy.dividemix import DivideMix
from fastkd.methods.noisy.learner import NoisyLabels
from fastkd.methods.noisy.pes import PES

__all__ = ["BLDR", "PES", "DivideMix", "NoisyLabels"]
