"""Two-component mixtures against scikit-learn's GaussianMixture, one problem and a batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch

import fastkd
from benchmarks.harness import Case

SETTINGS = {"max_iter": 10, "tol": 1e-2, "reg_covar": 5e-4}


def losses(problems: int, n: int) -> torch.Tensor:
    """Min-max normalised losses of clean and noisy samples, ``[problems, n]``."""
    noisy = torch.rand(problems, n) < 0.3
    x = torch.where(noisy, torch.randn(problems, n) * 0.5 + 2.5, torch.rand(problems, n) ** 2)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    return (x - low) / (high - low)


def cases() -> Iterator[Case]:
    """1 x 1024, 1 x 50,000 and 1,000 x 1024."""
    from sklearn.mixture import GaussianMixture

    def sklearn_fit(x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for row in x.numpy():
                GaussianMixture(2, random_state=0, **SETTINGS).fit(row[:, None])

    ours = fastkd.TwoGaussianMixture(**SETTINGS)
    for problems, n, target, rounds in ((1, 1024, 30.0, 101), (1, 50_000, None, 15), (1000, 1024, 60.0, 5)):
        x = losses(problems, n)
        part = min(problems, 50)  # scikit-learn fits a part of a large batch
        yield Case(
            f"GMM {problems}x{n}",
            lambda x=x: ours.fit(x),
            {"scikit-learn": lambda x=x[:part]: sklearn_fit(x)},
            {} if target is None else {"scikit-learn": target},
            rounds,
            {"scikit-learn": problems / part},
        )
