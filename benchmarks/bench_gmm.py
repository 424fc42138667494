"""Two-component mixtures against scikit-learn's GaussianMixture and a batched EM in plain torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import fastkd
from benchmarks import floors
from benchmarks.case import Case, Contest, Settings, Work, on_threads, relative_error, thread_counts
from benchmarks.clock import graph_replay
from fastkd.reference import gmm as reference

SETTINGS = {"max_iter": 10, "tol": 1e-2, "reg_covar": 5e-4}
REFERENCE_ROWS = 5  # compared with the numpy reference
SKLEARN_ROWS = 50  # of a large batch: it fits a part, its time is scaled

QUICK = ((1, 1024), (1, 50_000), (1000, 1024))
FULL = ((1, 64), (1, 1_000_000), (100, 1024), (10_000, 64), (100_000, 64), (100, 50_000))
GPU = ((1, 1024), (1, 50_000), (1000, 1024), (100_000, 64))
TARGETS = {(1, 1024): 30.0, (1000, 1024): 60.0}  # against scikit-learn, on a CPU
GPU_TARGETS_MS = {(1, 1024): 0.03, (1, 50_000): 0.15, (100_000, 64): 0.15}


def losses(problems: int, n: int) -> torch.Tensor:
    """Min-max normalised losses of clean and noisy samples, ``[problems, n]``."""
    noisy = torch.rand(problems, n) < 0.3
    x = torch.where(noisy, torch.randn(problems, n) * 0.5 + 2.5, torch.rand(problems, n) ** 2)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    return (x - low) / (high - low)


def sklearn_means(x: Tensor) -> Tensor:
    """Means, in order, of scikit-learn's fits, one row after the other; the transfer to the host is part of it."""
    from sklearn.mixture import GaussianMixture

    means = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in x.cpu().numpy():
            means.append(sorted(GaussianMixture(2, random_state=0, **SETTINGS).fit(row[:, None]).means_[:, 0]))
    return torch.tensor(means)


def torch_means(x: Tensor, lloyd_steps: int = 10) -> Tensor:
    """Means of a batch of fits in plain torch: Lloyd's algorithm from (min, max), then EM; no step waits for the host."""
    threshold = (x.amin(1, keepdim=True) + x.amax(1, keepdim=True)) / 2
    for _ in range(lloyd_steps):
        below = (x <= threshold).to(x.dtype)
        low, high = ((side * x).sum(1, keepdim=True) / side.sum(1, keepdim=True) for side in (below, 1 - below))
        threshold = (low + high) / 2
    responsibility = torch.stack([below, 1 - below], -1)
    for _ in range(SETTINGS["max_iter"] + 1):
        mass = responsibility.sum(1)
        means = (responsibility * x[..., None]).sum(1) / mass
        offset = x[..., None] - means[:, None]
        variance = (responsibility * offset.square()).sum(1) / mass + SETTINGS["reg_covar"]
        log_joint = (mass.log() - 0.5 * variance.log())[:, None] - offset.square() / (2 * variance[:, None])
        responsibility = log_joint.softmax(-1)
    return means


PEERS: dict[str, Callable[[Tensor], Tensor]] = {"scikit-learn": sklearn_means, "torch EM, batched": torch_means}


def cases(settings: Settings) -> Iterator[Case]:
    """Fits of one and of many problems, then selections."""
    for problems, n in settings.pick(QUICK, FULL, GPU):
        yield _fit(settings, problems, n)
    yield _selection(settings, 1, 1024, graph=False)
    if settings.device.type == "cuda":
        yield _selection(settings, 1, 1024, graph=True)
        yield _selection(settings, 100_000, 64, graph=True)
    if settings.sizes == "full":
        yield from on_threads(_fit(settings, 1000, 1024), thread_counts())


def _fit(settings: Settings, problems: int, n: int) -> Case:
    def build() -> Work:
        x = losses(problems, n)
        few = x[:REFERENCE_ROWS].double().numpy()
        truth = torch.tensor(np.stack([reference.fit(row, **SETTINGS).mixture.in_order().means for row in few]))
        x = x.to(settings.device)
        part = min(problems, SKLEARN_ROWS)
        inputs = {peer: x[:part] if peer == "scikit-learn" else x for peer in PEERS}
        on_gpu = settings.device.type == "cuda"
        return Work(
            lambda: fastkd.TwoGaussianMixture(**SETTINGS).fit(x).means_,
            {peer: lambda peer=peer, fit=fit: fit(inputs[peer]) for peer, fit in PEERS.items()},
            lambda means: relative_error(means[: len(truth)].cpu(), truth),
            1e-5,
            0.3,  # other starts, another number of iterations
            floor_bytes=floors.gmm_fit(problems, n, 4),
            targets={"scikit-learn": TARGETS[problems, n]} if (problems, n) in TARGETS and not on_gpu else {},
            target_ms=GPU_TARGETS_MS.get((problems, n)) if on_gpu else None,
            scale={"scikit-learn": problems / part},
        )

    return Case(f"GMM fit {problems}x{n} fp32", build, 40 * problems * n)


def _selection(settings: Settings, problems: int, n: int, *, graph: bool) -> Case:
    replays = 20

    def build() -> Work:
        x = losses(problems, n).to(settings.device)
        few = x[:REFERENCE_ROWS].double().cpu().numpy()
        fits = [reference.fit(row, normalize=True, **SETTINGS).mixture for row in few]
        truth = torch.tensor(np.stack([reference.posterior(row, fit) for row, fit in zip(few, fits, strict=True)]))

        def select() -> Tensor:
            return fastkd.select_clean(x)[1]

        return Work(
            graph_replay(select, replays) if graph else select,
            {},
            lambda posterior: relative_error(posterior[: len(truth)].cpu(), truth),
            1e-5,
            0.0,
            floor_bytes=floors.gmm_select(problems, n, 4),
            scale={"fastkd": 1 / replays} if graph else {},
            latency=not graph,
        )

    return Case(f"select_clean {problems}x{n} fp32, {'CUDA graph replay' if graph else 'eager loop'}", build)


def test_gmm(case: Case, contest: Contest) -> None:
    """Each case."""
    contest(case)
