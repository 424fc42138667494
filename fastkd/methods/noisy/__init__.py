"""Learning with noisy labels: a file a method, on what they have in common (:mod:`.learner`).

For a loop of your own: :class:`OverParameters` and :func:`corrected_losses`, SOP's correction of each label, on
:class:`Samples`.
"""

from fastkd.methods.noisy.bldr import BLDR
from fastkd.methods.noisy.cores import CORES
from fastkd.methods.noisy.cross_validation import CrossValidation
from fastkd.methods.noisy.dividemix import DivideMix
from fastkd.methods.noisy.elr import ELR
from fastkd.methods.noisy.learner import NoisyLabels
from fastkd.methods.noisy.nlnl import NLNL
from fastkd.methods.noisy.over_parameters import OverParameters, corrected_losses
from fastkd.methods.noisy.pes import PES
from fastkd.methods.noisy.samples import Samples
from fastkd.methods.noisy.sop import SOP

__all__ = [
    "BLDR",
    "CORES",
    "ELR",
    "NLNL",
    "PES",
    "SOP",
    "CrossValidation",
    "DivideMix",
    "NoisyLabels",
    "OverParameters",
    "Samples",
    "corrected_losses",
]
