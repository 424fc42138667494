"""Scores of whole collections: the pass of a teacher, and its file."""

from fastkd.scoring.score_file import ScoreFile, open_scores
from fastkd.scoring.score_pass import score_collection

__all__ = ["ScoreFile", "open_scores", "score_collection"]
