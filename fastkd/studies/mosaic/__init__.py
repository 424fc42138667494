"""The study of Fang et al., "Mosaicking to Distill: Knowledge Distillation from Out-of-Domain Data" (NeurIPS 2021)."""

from fastkd.studies.mosaic.study import MosaicStudy

__all__ = ["MosaicStudy"]
