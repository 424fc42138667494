"""fastkd: fused losses, patch crops, mixtures and weighted sampling for knowledge distillation."""

from fastkd import functional, noise, scores, statistics
from fastkd._build_info import build_info
from fastkd.alias_table import AliasTable
from fastkd.collection_samplers import CollectionBatchSampler, CollectionSampler
from fastkd.draw import draw_batch
from fastkd.functional import channel_moments, logit_stats
from fastkd.losses import (
    JSDivLoss,
    KDLoss,
    KLDivLoss,
    LinearJSDivLoss,
    LinearKDLoss,
    LinearKLDivLoss,
    RelationLoss,
    SparseJSDivLoss,
    SparseKDLoss,
    SparseKLDivLoss,
    SparseLinearJSDivLoss,
    SparseLinearKDLoss,
    SparseLinearKLDivLoss,
)
from fastkd.ops.linear_head import LinearHead
from fastkd.patches import crop_patches, random_crop_flip, random_patches
from fastkd.selection import FitStatus, TwoGaussianMixture, select_clean
from fastkd.sharded_alias_table import ShardedAliasTable
from fastkd.weighted_random_sampler import WeightedRandomSampler

__all__ = [
    "AliasTable",
    "CollectionBatchSampler",
    "CollectionSampler",
    "FitStatus",
    "JSDivLoss",
    "KDLoss",
    "KLDivLoss",
    "LinearHead",
    "LinearJSDivLoss",
    "LinearKDLoss",
    "LinearKLDivLoss",
    "RelationLoss",
    "ShardedAliasTable",
    "SparseJSDivLoss",
    "SparseKDLoss",
    "SparseKLDivLoss",
    "SparseLinearJSDivLoss",
    "SparseLinearKDLoss",
    "SparseLinearKLDivLoss",
    "TwoGaussianMixture",
    "WeightedRandomSampler",
    "build_info",
    "channel_moments",
    "crop_patches",
    "draw_batch",
    "functional",
    "logit_stats",
    "noise",
    "random_crop_flip",
    "random_patches",
    "scores",
    "select_clean",
    "statistics",
]
__version__: str = build_info()["version"]
