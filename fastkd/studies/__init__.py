"""Experiments of the papers, each of them run by one command."""

from fastkd.studies import zoo as zoo  # registers itself
from fastkd.studies.study import names

__all__ = ["names"]
