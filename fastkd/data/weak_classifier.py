"""A classifier that errs where images are hard, for label noise that depends on the image: ridge regression on random
convolutional features, in closed form.

Random filters with a nonlinearity and pooling are a fair classifier without any training of theirs (Saxe et al., "On Random
Weights and Unsupervised Feature Learning", ICML 2011; Rahimi & Recht, "Random Features for Large-Scale Kernel Machines",
NeurIPS 2007). Each image is judged by a regression of images other than it, so that the labels are not known by heart.

Pixels, filters and features are whole numbers, and all sums of them are exact, those of products in float64, too: neither
threads nor the size of the parts that are computed at once change a bit of what is solved.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastkd._checks import check_count, check_dtype
from fastkd._seeding import mixed_generator
from fastkd.data.images import check_labels

__all__ = ["weak_classifier"]

SIDE = 16  # pixels, to which larger images are averaged
FILTERS = 128
FIELD = 3  # pixels on a side of a filter
THRESHOLD = 15.0  # grey levels times the norm of a filter: what counts as a response
PLACES = 2  # on each side, over which responses are averaged
RIDGE, LEAST_RIDGE = 0.01, 50.0  # of a standardised feature: a share of the images of the fit, and what is added to it
TEMPERATURE = 0.1  # of the least cross-entropy on CIFAR-10, where the probabilities are about as high as they are right
PART = 64  # images at once, on each thread: their maps stay in the cache
MOST_FOLDS = 16  # each has a matrix of D x D
ROWS = 1024  # of features at once in a product of matrices


def weak_classifier(images: Tensor, target: Tensor, num_classes: int, seed: int, folds: int = 2) -> Tensor:
    """Class probabilities of each image by a classifier that was fitted without it (cross-fitting).

    ``softmax(s / 0.1)`` of the scores s of a ridge regression of one-hot labels. Its features: images, averaged to at most 16
    pixels on a side, under 128 random filters of 3x3 pixels whose weights sum to 0; what a response exceeds a threshold by, on
    either side of 0, averaged over quarters of the image: 1024 numbers.

    It is right about 59 % of CIFAR-10's training images, 56 % of 10,000 of them, 83 % of Fashion-MNIST's and 98 % of
    scikit-learn's digits. The features take 2 KiB of memory an image, CIFAR-10 some ten seconds of a core.

    Args:
        images: uint8 ``[N, C, H, W]``, N >= 2.
        target: int64 ``[N]``, in [0, num_classes). A class may have few images, or none.
        num_classes: K >= 2.
        seed: of the filters and the folds.
        folds: in [2, 16], at most N: the images of each are judged by a fit on those of the others. Each fold has its share
            of every class.

    Returns:
        float64 ``[N, K]``, rows sum to 1; on the device of target. It is computed on the CPU.

    Raises:
        TypeError, ValueError: dtypes, shapes and numbers other than these.
    """
    check_dtype("images", images, (torch.uint8,))
    if images.dim() != 4 or 0 in images.shape or len(images) < 2:
        raise ValueError(
            f"fastkd: images has shape {tuple(images.shape)}, must be [N, C, H, W] with at least two images"
        )
    check_dtype("target", target, (torch.int64,))
    if target.shape != images.shape[:1]:
        raise ValueError(
            f"fastkd: target has shape {tuple(target.shape)}, must be ({len(images)},), one label an image"
        )
    num_classes = check_count("num_classes", num_classes, 2, 2**31)
    check_labels(target, num_classes)
    folds = check_count("folds", folds, 2, min(len(images), MOST_FOLDS) + 1)
    generator = mixed_generator("weak classifier", seed)
    filters = _filters(images.shape[1], generator)
    pixels, labels = images.cpu(), target.cpu()
    fold = _folds(labels, folds, generator)
    features = _features(pixels, filters)
    members = [(fold == k).nonzero().flatten() for k in range(folds)]
    sums = [_sums(features, labels, part, num_classes) for part in members]
    moments, by_class = (sum(of, torch.zeros_like(of[0])) for of in zip(*sums, strict=True))
    scores = torch.empty(len(pixels), num_classes, dtype=torch.float64, device="cpu")
    for part, (own_moments, own_by_class) in zip(members, sums, strict=True):
        weights = _fit(moments - own_moments, by_class - own_by_class)
        for few in part.split(ROWS):
            scores[few] = _with_one(features[few]) @ weights
    return (scores / TEMPERATURE).softmax(1).to(target.device)


def _filters(channels: int, generator: torch.Generator) -> Tensor:
    """Whole numbers in [-2, 2], each filter the same ones in an order of its own: their sum is 0, their norm the same."""
    count = channels * FIELD**2
    half = 1.0 + torch.arange(count // 2, dtype=torch.float32, device="cpu") % 2
    values = torch.cat([half, -half, torch.zeros(count % 2, dtype=torch.float32, device="cpu")])
    orders = [torch.randperm(count, generator=generator, device="cpu") for _ in range(FILTERS)]
    return values[torch.stack(orders)].reshape(FILTERS, channels, FIELD, FIELD)


def _folds(labels: Tensor, folds: int, generator: torch.Generator) -> Tensor:
    """Of each image, int64 ``[N]``: those of a class in turns, in a random order, so that none is without images."""
    shuffled = torch.randperm(len(labels), generator=generator, device="cpu")
    by_class = shuffled[labels[shuffled].sort(stable=True).indices]
    fold = torch.empty_like(labels)
    fold[by_class] = torch.arange(len(labels), device="cpu") % folds
    return fold


def _features(pixels: Tensor, filters: Tensor) -> Tensor:
    """Whole numbers, int16 or, of many channels, int32: ``[N, D]``."""
    threshold = round(THRESHOLD * float(filters[0].norm()))
    highest = 255 * float(filters[0].clamp(min=0.0).sum())
    kind = torch.int16 if highest <= torch.iinfo(torch.int16).max else torch.int32
    return torch.cat(
        [_of_part(part, filters, threshold).to(kind) for part in pixels.split(PART * torch.get_num_threads())]
    )


def _of_part(pixels: Tensor, filters: Tensor, threshold: int) -> Tensor:
    factor = -(-max(pixels.shape[2:]) // SIDE)
    small = F.avg_pool2d(pixels.float(), factor, ceil_mode=True).round() if factor > 1 else pixels.float()
    responses = F.conv2d(F.pad(small, (FIELD // 2,) * 4, mode="replicate"), filters)
    window = [-(-side // PLACES) for side in responses.shape[2:]]
    above = F.avg_pool2d((responses - threshold).clamp_(min=0.0), window, ceil_mode=True)
    below = F.avg_pool2d(responses.add_(threshold).clamp_(max=0.0), window, ceil_mode=True)
    return torch.cat([above.flatten(1), -below.flatten(1)], 1).round_()


def _with_one(features: Tensor) -> Tensor:
    """float64 ``[n, D + 1]``, of which the last is 1."""
    return F.pad(features.double(), (0, 1), value=1.0)


def _sums(features: Tensor, labels: Tensor, part: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Of these images: of the products of features with each other ``[D + 1, D + 1]``, and of the features of each class
    ``[D + 1, K]``."""
    width = features.shape[1] + 1
    moments = torch.zeros(width, width, dtype=torch.float64, device="cpu")
    by_class = torch.zeros(num_classes, width, dtype=torch.float64, device="cpu")
    for few in part.split(ROWS):
        rows = _with_one(features[few])
        moments.addmm_(rows.T, rows)
        by_class.index_add_(0, labels[few], rows)
    return moments, by_class.T


def _fit(moments: Tensor, sums: Tensor) -> Tensor:
    """Weights ``[D + 1, K]`` of the regression of sums on features, of which the last is 1, by their second moments.

    Features are centred and standardised in the matrix; one that never changes has no weight.
    """
    count = moments[-1, -1]
    mean, share = moments[-1, :-1] / count, sums[-1] / count
    covariance = moments[:-1, :-1] - count * mean[:, None] * mean
    deviation = (covariance.diagonal() / count).clamp(min=0.0).sqrt()
    scale = torch.where(deviation > 1e-3, 1.0 / deviation, 0.0)  # of whole numbers that differ it is more
    covariance = covariance * scale[:, None] * scale
    covariance.diagonal().add_(RIDGE * count + LEAST_RIDGE)
    right = (sums[:-1] - count * mean[:, None] * share) * scale[:, None]
    weights = torch.cholesky_solve(right, torch.linalg.cholesky(covariance)) * scale[:, None]
    return torch.cat([weights, (share - mean @ weights)[None]])
