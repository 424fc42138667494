"""Published figures of "Noise-Robust Bidirectional Learning with Dynamic Sample Reweighting" (Zong et al.).

Facts, to be shown beside our own.
"""

from __future__ import annotations

from fastkd.studies.published import table

__all__ = ["ACCURACY", "DETECTION"]

# Table 1: test accuracy in %, mean and standard deviation as of noisylabels.com, of BLDR one figure; by the labels of
# CIFAR-10N, "noisy" are those of CIFAR-100N
ACCURACY = table(
    ("aggre", "random1", "worse", "noisy"),
    """
    cores     95.25 .09  94.45 .14  91.66 .09   55.72 .42
    pes       94.66 .18  95.06 .15  92.68 .22   70.36 .33
    elr+      94.83 .10  94.43 .41  91.09 1.60  66.72 .07
    dividemix 95.01 .71  95.16 .19  92.56 .42   71.13 .48
    sop       95.61 .13  95.28 .13  93.24 .21   67.81 .23
    bldr      96.16 0    96.05 0    94.53 0     - -
    """,
)

# Table 2: how well BLDR finds the wrong labels of CIFAR-10N, in %; by measure
DETECTION = table(
    ("aggre", "random1", "worse"),
    """
    precision 81.42 0  89.21 0  96.42 0
    recall    90.15 0  93.74 0  94.19 0
    f1        85.56 0  91.42 0  95.29 0
    """,
)
