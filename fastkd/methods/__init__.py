"""The distillation methods: one file a family.

The zoo of Sarfraz et al., "Knowledge Distillation Beyond Model Compression" (ICPR 2020): Hinton and BSS (:mod:`.response`),
FitNet, FSP and AT (:mod:`.representation`), RKD and SP (:mod:`.relational`), ONE and DML (:mod:`.online`). Beside them DKD and
DIST (:mod:`.logits`), SRD (:mod:`.representation`), CRD and SSKD (:mod:`.contrastive`), fixed-linear distillation on
unlabeled collections (:mod:`.collections`), distillation without data (:mod:`.datafree`), from images of another domain,
MosaicKD (:mod:`.mosaic`) and what it is compared with (:mod:`.out_of_domain`), and learning with noisy labels, BLDR and what
it is compared with (:mod:`.noisy`).

A method with its networks is an
:class:`Objective`, one of the procedures (:mod:`.procedure`) that a trainer trains.
"""

from fastkd.methods.collections import FixedLinear
from fastkd.methods.contrastive import CRD, SSKD
from fastkd.methods.datafree import DataFree
from fastkd.methods.features import FeatureTap, JointLogits, Outputs
from fastkd.methods.logits import DIST, DKD
from fastkd.methods.method import Loss, Method, WeightedMethod
from fastkd.methods.mosaic import Mosaic
from fastkd.methods.noisy import BLDR, CORES, ELR, NLNL, PES, SOP, CrossValidation, DivideMix, NoisyLabels
from fastkd.methods.objective import Objective
from fastkd.methods.online import DML, ONE, Cohort, MultiBranch
from fastkd.methods.out_of_domain import BASELINES as BASELINES
from fastkd.methods.procedure import Part, Procedure, Step
from fastkd.methods.relational import RKD, SP
from fastkd.methods.representation import AT, FSP, SRD, FitNet
from fastkd.methods.response import BSS, Attacked, Baseline, Hinton

__all__ = [
    "AT",
    "BLDR",
    "BSS",
    "CORES",
    "CRD",
    "DIST",
    "DKD",
    "DML",
    "ELR",
    "FSP",
    "NLNL",
    "ONE",
    "PES",
    "RKD",
    "SOP",
    "SP",
    "SRD",
    "SSKD",
    "Attacked",
    "Baseline",
    "Cohort",
    "CrossValidation",
    "DataFree",
    "DivideMix",
    "FeatureTap",
    "FitNet",
    "FixedLinear",
    "Hinton",
    "JointLogits",
    "Loss",
    "Method",
    "Mosaic",
    "MultiBranch",
    "NoisyLabels",
    "Objective",
    "Outputs",
    "Part",
    "Procedure",
    "Step",
    "WeightedMethod",
]
