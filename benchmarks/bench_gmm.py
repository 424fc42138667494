"""Two-component mixtures against scikit-learn's GaussianMixture, one problem and a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastkd
from benchmarks import floors
from benchmarks.gpu import Contenders, LazyCase, Settings, graph_replay, relative_error
from benchmarks.harness import Case

SETTINGS = {"max_iter": 10, "tol": 1e-2, "reg_covar": 5e-4}


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


def cases() -> Iterator[Case]:
    """1 x 1024, 1 x 50,000 and 1,000 x 1024."""
    ours = fastkd.TwoGaussianMixture(**SETTINGS)
    for problems, n, target, rounds in ((1, 1024, 30.0, 101), (1, 50_000, None, 15), (1000, 1024, 60.0, 5)):
        x = losses(problems, n)
        part = min(problems, 50)  # scikit-learn fits a part of a large batch
        yield Case(
            f"GMM {problems}x{n}",
            lambda x=x: ours.fit(x),
            {"scikit-learn": lambda x=x[:part]: sklearn_means(x)},
            {} if target is None else {"scikit-learn": target},
            rounds,
            {"scikit-learn": problems / part},
        )


GPU_SHAPES = ((1, 1024), (1, 50_000), (1000, 1024), (100_000, 64))
SKLEARN_ROWS = 20  # of a large batch: scikit-learn fits a part


def gpu_cases(settings: Settings) -> Iterator[LazyCase]:
    """One fit, small and large, and batches; then a selection, as a step of a training loop and as a CUDA graph."""
    for problems, n in GPU_SHAPES:
        yield _fit(settings, problems, n)
    yield _selection(settings, 1, 1024, graph=False)
    if settings.device.type == "cuda":
        yield _selection(settings, 1, 1024, graph=True)
        yield _selection(settings, 100_000, 64, graph=True)


def _fit(settings: Settings, problems: int, n: int) -> LazyCase:
    name = f"GMM fit {problems}x{n} fp32"

    def build() -> Case:
        x = losses(problems, n)
        truth = fastkd.TwoGaussianMixture(**SETTINGS).fit(x).means_
        x = x.to(settings.device)
        part = min(problems, SKLEARN_ROWS)

        def error(means: Tensor) -> float:
            return relative_error(means.cpu(), truth[: len(means)])

        contenders = Contenders(
            lambda: fastkd.TwoGaussianMixture(**SETTINGS).fit(x).means_,
            {"scikit-learn": lambda: sklearn_means(x[:part]), "torch EM": lambda: torch_means(x)},
            error,
            1e-5,
            0.3,  # other starts, another number of iterations
        )
        scale = {"scikit-learn": problems / part}
        return contenders.case(name, settings, rounds=15, scale=scale, floor_bytes=floors.gmm_fit(problems, n, 4))

    return LazyCase(name, build)


def _selection(settings: Settings, problems: int, n: int, *, graph: bool) -> LazyCase:
    replays = 20
    name = f"select_clean {problems}x{n} fp32, {'CUDA graph replay' if graph else 'eager loop'}"

    def build() -> Case:
        x = losses(problems, n).to(settings.device)
        truth = fastkd.select_clean(x.cpu())[1]

        def select() -> Tensor:
            return fastkd.select_clean(x)[1]

        ours: Callable[[], Tensor] = graph_replay(select, replays) if graph else select
        contenders = Contenders(ours, {}, lambda posterior: relative_error(posterior.cpu(), truth), 1e-5, 0.0)
        scale = {"fastkd": 1 / replays} if graph else {}
        floor = floors.gmm_select(problems, n, 4)
        return contenders.case(name, settings, rounds=51, scale=scale, floor_bytes=floor, latency=not graph)

    return LazyCase(name, build)
