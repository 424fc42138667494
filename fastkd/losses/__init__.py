"""Loss modules: drop-in for the losses that a distillation loop already has. Maths: :mod:`fastkd.functional`."""

from fastkd.losses.divergence import JSDivLoss, KDLoss, KLDivLoss
from fastkd.losses.linear import LinearJSDivLoss, LinearKDLoss, LinearKLDivLoss
from fastkd.losses.relation import RelationLoss
from fastkd.losses.sparse import SparseJSDivLoss, SparseKDLoss, SparseKLDivLoss
from fastkd.losses.sparse_linear import SparseLinearJSDivLoss, SparseLinearKDLoss, SparseLinearKLDivLoss

__all__ = [
    "JSDivLoss",
    "KDLoss",
    "KLDivLoss",
    "LinearJSDivLoss",
    "LinearKDLoss",
    "LinearKLDivLoss",
    "RelationLoss",
    "SparseJSDivLoss",
    "SparseKDLoss",
    "SparseKLDivLoss",
    "SparseLinearJSDivLoss",
    "SparseLinearKDLoss",
    "SparseLinearKLDivLoss",
]
