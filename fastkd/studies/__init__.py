"""Experiments of the papers, each of them run by one command."""

from fastkd.studies import collection as collection  # they register themselves
from fastkd.studies import datafree as datafree
from fastkd.studies import mosaic as mosaic
from fastkd.studies import noise as noise
from fastkd.studies import zoo as zoo
from fastkd.studies.study import names

__all__ = ["names"]
