"""Published figures of Begon & Geurts, "Distillation from heterogeneous unlabeled collections" (2021).

Facts, to be shown beside our own, in %: CIFAR-10, mean and standard deviation over 3 networks. Rows are those of the study:
method and IQPR; columns are collections.
"""

from __future__ import annotations

from fastkd.studies.study import Published

__all__ = ["ACCURACY", "EARLY", "IRRELEVANT_PROPORTION", "SKIP_RATIO", "UNIFORMITY"]

# Table 3, ResNet-50 to MobileNet, and of vanilla and without a projection ("2048") Table 5; T1000: Table 7
ACCURACY = {
    "rel+irrel": {
        "fixed-linear-1": Published(91.46, 0.27),
        "fixed-linear-5": Published(91.04, 0.15),
        "fixed-linear-25": Published(89.25, 0.46),
        "no-projection-1": Published(91.34, 0.07),
        "no-projection-5": Published(91.18, 0.00),
        "vanilla-1": Published(89.26, 0.97),
        "vanilla-5": Published(89.04, 0.75),
        "t1000-5": Published(89.57, 0.58),
        "t1000-25": Published(74.69, 1.08),
    },
    "ori+irrel": {
        "fixed-linear-1": Published(93.06, 0.29),
        "fixed-linear-5": Published(93.99, 0.46),
        "fixed-linear-25": Published(93.60, 0.26),
    },
    "ori": {
        "fixed-linear-1": Published(94.15, 0.34),
        "fixed-linear-5": Published(93.73, 0.23),
        "fixed-linear-25": Published(89.44, 0.27),
        "no-projection-1": Published(93.10, 1.37),
        "no-projection-5": Published(91.99, 1.18),
        "vanilla-1": Published(94.97, 0.20),
        "vanilla-5": Published(94.12, 0.20),
    },
}
# Table 5, at 10 % of the training
EARLY = {
    "rel+irrel": {
        "fixed-linear-1": Published(70.33, 2.37),
        "fixed-linear-5": Published(75.77, 0.07),
        "no-projection-1": Published(71.59, 2.65),
        "no-projection-5": Published(75.42, 0.74),
        "vanilla-1": Published(64.02, 2.02),
        "vanilla-5": Published(69.03, 3.22),
    },
    "ori": {
        "fixed-linear-1": Published(87.00, 0.37),
        "fixed-linear-5": Published(85.69, 1.03),
        "no-projection-1": Published(87.96, 0.28),
        "no-projection-5": Published(85.92, 1.15),
        "vanilla-1": Published(86.52, 0.05),
        "vanilla-5": Published(84.91, 0.19),
    },
}
# Table 6, DenseNet-121 to MobileNet; T1000: Table 7, ResNet-50 to MobileNet
SKIP_RATIO = {
    "rel+irrel": {
        "fixed-linear-1": Published(0.00, 0.00),
        "fixed-linear-5": Published(3.53, 0.01),
        "fixed-linear-25": Published(24.99, 0.15),
        "t1000-5": Published(6.85, 0.0),
        "t1000-25": Published(75.76, 0.0),
    },
    "ori+irrel": {
        "fixed-linear-1": Published(0.00, 0.00),
        "fixed-linear-5": Published(1.91, 0.01),
        "fixed-linear-25": Published(40.09, 15.83),
    },
    "ori": {
        "fixed-linear-1": Published(0.00, 0.00),
        "fixed-linear-5": Published(0.37, 0.01),
        "fixed-linear-25": Published(21.48, 7.36),
    },
}
UNIFORMITY = {
    "rel+irrel": {
        "fixed-linear-1": Published(100, 0),
        "fixed-linear-5": Published(97, 0),
        "fixed-linear-25": Published(95, 0),
        "t1000-5": Published(91, 0),
        "t1000-25": Published(55, 0),
    },
    "ori+irrel": {
        "fixed-linear-1": Published(100, 0),
        "fixed-linear-5": Published(96, 0),
        "fixed-linear-25": Published(86, 7),
    },
    "ori": {
        "fixed-linear-1": Published(100, 0),
        "fixed-linear-5": Published(94, 0),
        "fixed-linear-25": Published(60, 18),
    },
}
IRRELEVANT_PROPORTION = {
    "rel+irrel": {
        "fixed-linear-1": Published(58.36, 0.02),
        "fixed-linear-5": Published(42.12, 0.01),
        "fixed-linear-25": Published(38.84, 9.46),
        "t1000-5": Published(48.39, 0.0),
        "t1000-25": Published(7.00, 0.0),
    },
    "ori+irrel": {
        "fixed-linear-1": Published(86.32, 0.00),
        "fixed-linear-5": Published(56.65, 0.01),
        "fixed-linear-25": Published(17.32, 12.81),
    },
}
