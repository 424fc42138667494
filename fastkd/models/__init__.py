"""The networks that the methods and the demo need to run end to end, and those that the papers name."""

from fastkd.models.layers import FeatureLayers, feature_layers
from fastkd.models.registry import create, names

__all__ = ["FeatureLayers", "create", "feature_layers", "names"]
