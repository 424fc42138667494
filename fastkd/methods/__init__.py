"""The distillation methods: one file a family.

The zoo of Sarfraz et al., "Knowledge Distillation Beyond Model Compression" (ICPR 2020): Hinton and BSS (:mod:`.response`),
FitNet, FSP and AT (:mod:`.representation`), RKD and SP (:mod:`.relational`), ONE and DML (:mod:`.online`). Beside them DKD and
DIST (:mod:`.logits`), SRD (:mod:`.representation`), CRD and SSKD (:mod:`.contrastive`), fixed-linear distillation on
unlabeled collections (:mod:`.collections`), distillation without data (:mod:`.datafree`), and from images of another domain,
MosaicKD (:mod:`.mosaic`) and what it is compared with (:mod:`.out_of_domain`).

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
from fastkd.methods.noisy import BLDR, PES, DivideMix
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
    "CRD",
    "DIST",
    "DKD",
    "DML",
    "FSP",
    "ONE",
    "PES",
    "RKD",
    "SP",
    "SRD",
    "SSKD",
    "Attacked",
    "Baseline",
    "Cohort",
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
    "Objective",
    "Outputs",
    "Part",
    "Procedure",
    "Step",
    "WeightedMethod",
]
