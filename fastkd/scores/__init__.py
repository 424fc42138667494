"""Characterizing scores: how much an unlabeled image looks like the teacher's own task. Higher = more alike."""

from fastkd.scores.logits import max_softmax, negative_energy, negative_entropy, t1000
from fastkd.scores.scorers import NAMES, LogitScore, OneClassSum, ScoreName, Scorer, make_scorer

__all__ = [
    "NAMES",
    "LogitScore",
    "OneClassSum",
    "ScoreName",
    "Scorer",
    "make_scorer",
    "max_softmax",
    "negative_energy",
    "negative_entropy",
    "t1000",
]
