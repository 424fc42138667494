"""Published figures of "Mosaicking to Distill: Knowledge Distillation from Out-of-Domain Data" (MosaicKD, NeurIPS 2021).

Facts, to be shown beside our own: students of CIFAR-100, WRN-40-2 to WRN-16-1, in %, without deviations.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastkd.studies.study import Published

__all__ = ["ABLATION", "ACCURACY", "FRECHET_DISTANCE", "SEGMENTATION", "SIZES"]


def _rows(values: Mapping[str, float]) -> dict[str, Published]:
    return {row: Published(value, 0.0) for row, value in values.items()}


# Table 1, column WRN-40-2 to WRN-16-1: by the out-of-domain images; those without data stand beside each
_DATA_FREE = {"dafl": 20.88, "zskt": 36.66, "deep-inversion": 53.77, "dfq": 51.27}
ACCURACY: dict[str, dict[str, Published]] = {
    "cifar-100": _rows({"kd": 64.06}),  # the original images
    "cifar-10": _rows(
        {
            **_DATA_FREE,
            "kd": 47.47,
            "balanced": 50.50,
            "fitnet": 50.31,
            "rkd": 45.37,
            "crd": 47.00,
            "sskd": 49.57,
            "mosaic": 61.01,
        }
    ),
    "imagenet": _rows({"kd": 36.54, "balanced": 31.61, "fitnet": 42.63, "rkd": 31.15, "mosaic": 59.32}),
    "places365": _rows({"kd": 33.28, "balanced": 23.22, "fitnet": 36.33, "rkd": 28.07, "mosaic": 56.70}),
    "svhn": _rows({"kd": 19.77, "balanced": 16.18, "fitnet": 20.02, "rkd": 18.09, "mosaic": 31.87}),
}

SIZES = (1, 2, 4, 8, 18, 22, 32)
"""Of patches of images of 32 x 32 pixels, in pixels: Table 4."""
ABLATION: dict[str, dict[int, float]] = {
    "cifar-10": dict(zip(SIZES, (52.22, 55.58, 58.94, 61.01, 61.03, 58.94, 51.34), strict=True)),
    "places365": dict(zip(SIZES, (46.44, 45.90, 50.67, 56.70, 53.99, 53.44, 40.29), strict=True)),
    "svhn": dict(zip(SIZES, (19.83, 21.86, 32.09, 31.87, 21.05, 22.08, 20.54), strict=True)),
}
FRECHET_DISTANCE: dict[str, dict[int, float]] = {
    "cifar-10": dict(zip(SIZES, (2.43, 4.47, 8.78, 16.82, 22.81, 26.07, 28.30), strict=True)),
    "places365": dict(zip(SIZES, (12.32, 14.77, 21.32, 30.09, 35.54, 38.64, 41.41), strict=True)),
    "svhn": dict(zip(SIZES, (93.39, 146.76, 145.64, 143.72, 148.33, 147.25, 148.94), strict=True)),
}
"""Of patches of out-of-domain images to those of the original ones, by Inception's features."""

SEGMENTATION = _rows({"zskt": 36.4, "dafl": 10.5, "kd": 40.6, "mosaic": 45.4})
"""Table 2: mean IoU in %, NYUv2 with images of ImageNet; the teacher has 51.9."""
