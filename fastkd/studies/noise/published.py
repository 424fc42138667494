"""Published figures of "Noise-Robust Bidirectional Learning with Dynamic Sample Reweighting" (Zong et al.).

Facts, to be shown beside our own: Table 1, test accuracy in %, mean and standard deviation of 5 runs (BLDR: one figure), the
others as of noisylabels.com; Table 2, how well BLDR finds the wrong labels, in %.
"""

from __future__ import annotations

from fastkd.studies.study import Published

__all__ = ["ACCURACY", "DETECTION"]

_METHODS = ("cores", "pes", "elr+", "dividemix", "sop")

ACCURACY: dict[str, dict[str, Published]] = {
    "aggre": {
        **dict(
            zip(
                _METHODS,
                map(Published, (95.25, 94.66, 94.83, 95.01, 95.61), (0.09, 0.18, 0.10, 0.71, 0.13)),
                strict=True,
            )
        ),
        "bldr": Published(96.16, 0.0),
    },
    "random1": {
        **dict(
            zip(
                _METHODS,
                map(Published, (94.45, 95.06, 94.43, 95.16, 95.28), (0.14, 0.15, 0.41, 0.19, 0.13)),
                strict=True,
            )
        ),
        "bldr": Published(96.05, 0.0),
    },
    "worse": {
        **dict(
            zip(
                _METHODS,
                map(Published, (91.66, 92.68, 91.09, 92.56, 93.24), (0.09, 0.22, 1.60, 0.42, 0.21)),
                strict=True,
            )
        ),
        "bldr": Published(94.53, 0.0),
    },
    "noisy": dict(
        zip(_METHODS, map(Published, (55.72, 70.36, 66.72, 71.13, 67.81), (0.42, 0.33, 0.07, 0.48, 0.23)), strict=True)
    ),
}
"""By the labels of CIFAR-10N; "noisy" are those of CIFAR-100N. By method."""

DETECTION: dict[str, dict[str, float]] = {
    "aggre": {"precision": 81.42, "recall": 90.15, "f1": 85.56},
    "random1": {"precision": 89.21, "recall": 93.74, "f1": 91.42},
    "worse": {"precision": 96.42, "recall": 94.19, "f1": 95.29},
}
"""Of BLDR, by the labels of CIFAR-10N."""
