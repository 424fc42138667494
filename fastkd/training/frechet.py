"""How far made images are from others, by what a network sees in them: the Frechet distance of its features."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastkd._checks import check_count, check_dtype, check_tensor
from fastkd.methods.features import check_module
from fastkd.models.heads import linear_head, watch_latents
from fastkd.models.modes import evaluating
from fastkd.patches import random_patches

__all__ = ["frechet_distance", "latents", "patches_enlarged"]


@torch.no_grad()
def frechet_distance(features: Tensor, others: Tensor) -> Tensor:
    """``|m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))`` of the Gaussians fitted to two sets of features, whose means are m
    and covariances, with N - 1, S: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (NeurIPS 2017), eq. 6.

    It is the FID where the features are those of Inception; with those of a teacher (:func:`latents`) it is a distance of its
    own, in the squared units of these, to be compared with distances of the same teacher only. It needs no weights from
    elsewhere. Few rows make it larger than it is between the sources of the sets: compare sets of as many rows.

    Args:
        features: floats ``[N, d]``, finite, N >= 2.
        others: floats ``[M, d]``, finite, M >= 2, where the features are.

    Returns:
        A float64 scalar on their device, never negative; 0 is for equal sets, up to rounding. There may be fewer rows than d.

    Raises:
        TypeError: no tensors, or not of floats.
        ValueError: other shapes, fewer than two rows, values that are not finite, two devices. To look at the values waits
            for the device.
    """
    for name, rows in (("features", features), ("others", others)):
        check_dtype(name, rows)
        if rows.dim() != 2 or rows.shape[0] < 2 or rows.shape[1] < 1:
            raise ValueError(
                f"fastkd: {name} has shape {tuple(rows.shape)}, must be [N, d] of two rows or more, for a covariance"
            )
    if others.shape[1] != features.shape[1]:
        raise ValueError(
            f"fastkd: others has {others.shape[1]} features a row, must have as many as features, {features.shape[1]}"
        )
    if others.device != features.device:
        raise ValueError(f"fastkd: others is on {others.device}, must be with features on {features.device}")
    for name, rows in (("features", features), ("others", others)):
        if wrong := int((~rows.isfinite()).sum()):
            raise ValueError(f"fastkd: {name} holds {wrong} values that are not finite, must be finite")
    fewer, more = sorted((features.double(), others.double()), key=len)
    scale = torch.maximum(fewer.abs().amax(), more.abs().amax())  # squares of the largest would be infinite
    scale = scale.where(scale > 0, 1.0)
    (mean, covariance), (other_mean, other_covariance) = _fitted(fewer / scale), _fitted(more / scale)
    shared = _trace_of_root(covariance, other_covariance, rank=len(fewer) - 1)
    apart = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2.0 * shared
    return apart.clamp(min=0.0) * scale * scale  # one after the other: 0 times an infinite square were NaN


@torch.no_grad()
def latents(network: nn.Module, images: Tensor, batch_size: int = 1024) -> Tensor:
    """What goes into the linear layer that the logits come from (:func:`fastkd.models.heads.linear_head`), ``[N, d]``; in
    evaluation mode, without gradients. The mode of each module is put back afterwards.

    Args:
        network: a classifier, images to logits ``[N, K]``, or to an object that has them as ``.logits``.
        images: ``[N, C, H, W]``, N >= 1, as the network takes them, where it is.
        batch_size: images at once.

    Raises:
        TypeError: a network that is no module, images that are no tensor, a batch_size that is no int.
        ValueError: no image, a batch_size below 1, or logits that come from no linear layer.
    """
    check_module("network", network)
    check_tensor("images", images)
    batch_size = check_count("batch_size", batch_size, 1)
    if images.dim() == 0 or len(images) == 0:
        raise ValueError(f"fastkd: images has shape {tuple(images.shape)}, must be one image or more")
    head = linear_head(network, images[:1])
    found = []
    with evaluating(network):
        for batch in images.split(batch_size):
            with watch_latents(head.layer) as seen:
                network(batch)
            found.append(seen[-1])  # a layer that runs more than once makes the logits last
    return torch.cat(found)


def patches_enlarged(images: Tensor, size: int) -> Tensor:
    """A patch at a random place of each image ``[N, C, H, W]``, ``size`` pixels square, enlarged to the image's size: to
    compare what two sets of images consist of, as a network sees it."""
    patches, _ = random_patches(images, size)
    return F.interpolate(patches, images.shape[2:], mode="bilinear", align_corners=False)


def _fitted(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[d]`` and covariance ``[d, d]`` of rows ``[N, d]``."""
    mean = rows.mean(0)
    apart = rows - mean
    return mean, apart.T @ apart / (len(rows) - 1)


def _trace_of_root(covariance: Tensor, other: Tensor, rank: int) -> Tensor:
    """``tr((S_1 S_2)^(1/2))``: that of ``(R S_2 R)^(1/2)``, which is symmetric, with the root R of S_1.

    Of S_1 only so many of the largest eigenvalues are looked at as it can have above 0: the root of what rounding makes of a
    0 is some 1e-8, and there may be many.

    Args:
        rank: of S_1 at most.
    """
    values, vectors = torch.linalg.eigh(covariance)  # rising
    values, vectors = values[-rank:].clamp(min=0.0), vectors[:, -rank:]
    root = vectors * values.sqrt()
    squares: Tensor = torch.linalg.eigvalsh(root.T @ other @ root)
    return squares.clamp(min=0.0).sqrt().sum()
