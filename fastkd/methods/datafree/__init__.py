"""Distillation without data: one procedure, and methods that are choices of its options.

TA-DFKD, and what it is compared with: DAFL, DFAD, ZSKT, DFQ, DeepInversion (ADI), CMI, PRE-DFKD and NAYER (:mod:`.recipes`).
"""

from fastkd.methods.datafree import recipes as recipes
from fastkd.methods.datafree.judged import Judged
from fastkd.methods.datafree.procedure import DataFree

__all__ = ["DataFree", "Judged"]
