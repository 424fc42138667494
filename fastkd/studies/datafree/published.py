"""Published figures of "Teacher as a Lenient Expert: Teacher-Agnostic Data-Free Knowledge Distillation" (TA-DFKD, AAAI 2024).

Facts, to be shown beside our own, in %: ResNet-34 to ResNet-18, by data set, teacher and method. Without deviations: of 4
runs the paper has the best peak (Table 3), and the mean of its ablation (the detailed one of the appendix).
"""

from __future__ import annotations

from collections.abc import Mapping

from fastkd.studies.study import Published

__all__ = ["CONVERGING", "GAP", "INSTABILITY", "PEAK", "TEACHERS", "Table"]

Table = Mapping[str, Mapping[str, Published]]
"""Teacher -> method."""

NAMES = ("T1", "T2", "T3", "T4", "T5")
# Table 3, in the heads of its columns
TEACHERS: dict[str, dict[str, float]] = {
    "cifar10": dict(zip(NAMES, (95.46, 93.46, 92.01, 94.43, 91.36), strict=True)),
    "cifar100": dict(zip(NAMES, (77.98, 75.01, 76.01, 78.42, 77.04), strict=True)),
}


def _by_teacher(rows: Mapping[str, tuple[float, ...]]) -> Table:
    return {
        teacher: {row: Published(values[i], 0.0) for row, values in rows.items()} for i, teacher in enumerate(NAMES)
    }


# Table 3: the first of each pair
CONVERGING = {
    "cifar10": _by_teacher(
        {
            "dafl": (83.60, 85.94, 68.87, 89.21, 72.85),
            "dfad": (93.23, 87.72, 87.83, 92.27, 87.66),
            "cmi": (92.54, 89.84, 89.40, 93.26, 89.62),
            "pre-dfkd": (89.22, 85.16, 80.55, 90.80, 83.93),
            "ta-dfkd": (94.24, 91.99, 90.21, 93.61, 90.27),
        }
    ),
    "cifar100": _by_teacher(
        {
            "dafl": (74.08, 70.31, 72.22, 73.96, 74.66),
            "dfad": (69.51, 66.31, 71.55, 69.61, 70.33),
            "cmi": (74.10, 71.81, 73.55, 74.40, 74.18),
            "pre-dfkd": (76.13, 73.11, 74.75, 75.58, 75.37),
            "ta-dfkd": (76.55, 73.61, 75.74, 76.73, 76.58),
        }
    ),
}
# Table 3: the second of each pair; of baseline and no-prior the detailed ablation of the appendix
PEAK = {
    "cifar10": _by_teacher(
        {
            "dafl": (92.07, 88.43, 88.08, 92.90, 85.59),
            "dfad": (93.60, 88.69, 88.77, 92.82, 89.22),
            "cmi": (94.80, 90.16, 89.81, 93.61, 90.37),
            "pre-dfkd": (94.10, 86.59, 83.15, 91.56, 88.05),
            "ta-dfkd": (94.43, 92.15, 90.69, 93.79, 91.08),
            "baseline": (93.25, 90.54, 88.52, 92.88, 88.90),
            "no-prior": (93.06, 90.61, 88.71, 92.84, 90.55),
        }
    ),
    "cifar100": _by_teacher(
        {
            "dafl": (75.22, 71.27, 73.73, 74.82, 75.32),
            "dfad": (70.03, 66.75, 71.97, 70.26, 71.33),
            "cmi": (74.85, 72.43, 74.03, 77.00, 74.77),
            "pre-dfkd": (76.57, 73.53, 75.44, 77.10, 76.01),
            "ta-dfkd": (76.76, 73.89, 76.02, 76.99, 76.84),
            "baseline": (73.67, 71.09, 74.22, 73.14, 73.64),
            "no-prior": (73.96, 71.23, 74.43, 76.08, 76.67),
        }
    ),
}
# The appendix's detailed values of Figure 8: the teacher's accuracy less the peak
GAP = {
    "cifar10": _by_teacher(
        {
            "dafl": (3.39, 5.03, 3.93, 1.53, 5.77),
            "dfad": (1.86, 4.77, 3.24, 1.61, 2.14),
            "cmi": (0.66, 3.30, 2.20, 0.82, 0.99),
            "pre-dfkd": (1.36, 6.87, 8.86, 2.87, 3.31),
            "ta-dfkd": (1.03, 1.31, 1.32, 0.64, 0.28),
        }
    ),
    "cifar100": _by_teacher(
        {
            "dafl": (2.76, 3.74, 2.28, 3.60, 1.72),
            "dfad": (7.95, 8.26, 4.04, 8.16, 5.71),
            "cmi": (3.13, 2.58, 1.98, 1.42, 2.27),
            "pre-dfkd": (1.41, 1.48, 0.57, 1.32, 1.03),
            "ta-dfkd": (1.22, 1.12, -0.01, 1.43, 0.20),
        }
    ),
}
# And of the figure beside it: the peak less the converging accuracy
INSTABILITY = {
    "cifar10": _by_teacher(
        {
            "dafl": (8.47, 2.49, 19.21, 3.69, 12.74),
            "dfad": (0.37, 0.97, 0.94, 0.55, 1.56),
            "cmi": (2.26, 0.32, 0.41, 0.35, 0.75),
            "pre-dfkd": (4.88, 1.43, 2.60, 0.76, 4.12),
            "ta-dfkd": (0.19, 0.16, 0.48, 0.18, 0.82),
        }
    ),
    "cifar100": _by_teacher(
        {
            "dafl": (1.14, 0.96, 1.51, 0.86, 0.66),
            "dfad": (0.52, 0.44, 0.42, 0.65, 1.00),
            "cmi": (0.75, 0.62, 0.48, 2.60, 0.59),
            "pre-dfkd": (0.44, 0.42, 0.69, 1.52, 0.64),
            "ta-dfkd": (0.21, 0.28, 0.28, 0.26, 0.26),
        }
    ),
}
