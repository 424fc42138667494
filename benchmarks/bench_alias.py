"""The alias table against scipy, numpy and torch: building from scores, and drawing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch

import fastkd
from benchmarks.harness import Case

DRAWS = 1_000_000


def cases() -> Iterator[Case]:
    """N = 1e7 for scipy and numpy, 2^24 for torch.multinomial, which refuses more."""
    from scipy.stats.sampling import DiscreteAliasUrn

    warnings.filterwarnings("ignore", message=".*squared histogram")  # scipy's, about its own rounding

    n = 10_000_000
    scores = torch.randn(n)
    table = fastkd.AliasTable(scores, 1.0, seed=0)
    probabilities = table.probabilities().numpy()
    urn = DiscreteAliasUrn(probabilities, random_state=np.random.default_rng(0))
    # scipy is given ready probabilities; fastkd pays for the exponentials too
    yield Case(
        "alias build N=1e7",
        lambda: fastkd.AliasTable(scores, 1.0, seed=0),
        {"scipy DiscreteAliasUrn": lambda: DiscreteAliasUrn(probabilities)},
        {"scipy DiscreteAliasUrn": 2.0},
        5,
    )
    generator = np.random.default_rng(0)
    share = 10  # numpy draws a tenth of them
    yield Case(
        f"alias draw {DRAWS:.0e} of N=1e7",
        lambda: table.sample(DRAWS),
        {
            "scipy DiscreteAliasUrn": lambda: urn.rvs(DRAWS),
            "numpy choice": lambda: generator.choice(n, DRAWS // share, p=probabilities),
        },
        {"scipy DiscreteAliasUrn": 5.0, "numpy choice": 100.0},
        9,
        {"numpy choice": share},
    )
    n = 2**24
    weights = torch.rand(n)
    table = fastkd.AliasTable.from_weights(weights, seed=0)
    yield Case(
        f"alias draw {DRAWS:.0e} of N=2^24",
        lambda: table.sample(DRAWS),
        {"torch.multinomial": lambda: torch.multinomial(weights, DRAWS, replacement=True)},
        {"torch.multinomial": 40.0},
        5,
    )
