"""The fewest bytes that each kernel must move through device memory: each input read once, each output written once.

A floor is of the work and not of an implementation; ``sweeps`` gives the figure of a kernel that reads its rows more
than once. benchmarks/README.md has the same formulas as a table.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

OFFSET_BYTES = 16  # (y, x), int64
FLIP_BYTES = 1
DRAW_BYTES = 8
BIN_BYTES = 8
BLOCK_ITEMS = 4096
SECTOR_BYTES = 32  # the smallest read of device memory
MIXTURE_BYTES = 9 * 8  # weights, means, deviations; iterations, log-likelihood, status
STATISTICS_BYTES = 4 * 4 + 8  # max, mean, logsumexp and entropy in float32, argmax in int64


def divergence(
    rows: int,
    classes: int,
    student_bytes: int,
    teacher_bytes: int | None = None,
    *,
    student_gradient: bool = True,
    teacher_gradient: bool = False,
    sweeps: int = 1,
    row_bytes: int = 0,
) -> int:
    """Logits read ``sweeps`` times, the gradients asked for written once.

    Args:
        student_bytes, teacher_bytes: of one element; the teacher's are the student's if None.
        sweeps: 1 where rows stay on the chip; 2 for the online path (maximum and sum, then gradient), 3 for Jensen-Shannon
            on that path, whose gradient needs the divergence of the row first.
        row_bytes: of what else a row has: target 8, weight 4, temperature 4; without a reduction loss 4 and terms 8.
    """
    teacher_bytes = student_bytes if teacher_bytes is None else teacher_bytes
    element = sweeps * (student_bytes + teacher_bytes)
    element += student_bytes * student_gradient + teacher_bytes * teacher_gradient
    return rows * classes * element + rows * row_bytes


def divergence_backward(rows: int, classes: int, element_bytes: int) -> int:
    """The gradient read and written; nothing where the incoming gradient is 1."""
    return 2 * rows * classes * element_bytes


def sparse_divergence(
    rows: int, classes: int, entries: int, student_bytes: int, *, student_gradient: bool = True, whole: bool = True
) -> int:
    """Logits read once, where the divergence is of all of them (``whole``), the gradient written once; k entries a row."""
    element = (whole + student_gradient) * student_bytes
    return rows * classes * element + rows * entries * (8 + 4)  # int64 and float32


def logit_stats(rows: int, classes: int, element_bytes: int) -> int:
    """The logits read, five statistics of each row written."""
    return rows * (classes * element_bytes + STATISTICS_BYTES)


def logit_stats_backward(rows: int, classes: int, element_bytes: int, gradients: int = 4) -> int:
    """Logits read, gradient written; argmax, logsumexp, entropy and the incoming gradients of each row read."""
    return rows * (2 * classes * element_bytes + 8 + 4 + 4 + 4 * gradients)


def covered_pixels(offsets: Tensor, size: tuple[int, int], extent: tuple[int, int]) -> int:
    """Pixels of all images that at least one patch covers; offsets int64 ``[B, k, 2]``, patches of any place."""
    batch = offsets.shape[0]
    top_left = torch.stack([offsets[..., i].clamp(0, extent[i]) for i in (0, 1)], -1)
    bottom_right = torch.stack([(offsets[..., i] + size[i]).clamp(0, extent[i]) for i in (0, 1)], -1)
    empty = (top_left >= bottom_right).any(-1)
    # +1 and -1 at the corners, summed along both axes: how many patches cover each pixel
    count = torch.zeros(batch, extent[0] + 1, extent[1] + 1, dtype=torch.int32, device=offsets.device)
    image = torch.arange(batch, device=offsets.device)[:, None].expand(empty.shape)
    sign = torch.where(empty, 0, 1).to(torch.int32)
    for rows, row_sign in ((top_left, 1), (bottom_right, -1)):
        for columns, column_sign in ((top_left, 1), (bottom_right, -1)):
            count.index_put_((image, rows[..., 0], columns[..., 1]), sign * (row_sign * column_sign), accumulate=True)
    return int((count.cumsum(1).cumsum(2) > 0).sum())


def crop(covered: int, channels: int, patches: int, size: tuple[int, int], pixel_bytes: int, out_bytes: int) -> int:
    """Covered pixels (of one channel, over all images) read, all patches written, offsets read.

    ``patches`` counts those of all images; ``out_bytes`` is that of an output pixel, where bytes become floats.
    """
    written = patches * channels * size[0] * size[1] * out_bytes
    return covered * channels * pixel_bytes + written + patches * OFFSET_BYTES


def crop_backward(
    images: int, channels: int, extent: tuple[int, int], patches: int, size: tuple[int, int], pixel_bytes: int
) -> int:
    """All patches read, all images written, offsets read."""
    pixels = patches * size[0] * size[1] + images * extent[0] * extent[1]
    return channels * pixels * pixel_bytes + patches * OFFSET_BYTES


def crop_offsets(patches: int) -> int:
    """Offsets and flips written."""
    return patches * (OFFSET_BYTES + FLIP_BYTES)


def draw_batch(draws: int, covered: int, channels: int, size: tuple[int, int], out_bytes: int) -> int:
    """Covered pixels of the images drawn (of one channel) read, the batch written; for each draw a sector of the table
    read and its index written."""
    written = draws * channels * size[0] * size[1] * out_bytes
    return covered * channels + written + draws * (DRAW_BYTES + SECTOR_BYTES)


def gmm_fit(problems: int, n: int, element_bytes: int) -> int:
    """The values read; nine numbers of 8 bytes of each problem written. A fit is bound by arithmetic: see README.md."""
    return problems * (n * element_bytes + MIXTURE_BYTES)


def gmm_select(problems: int, n: int, element_bytes: int) -> int:
    """The values read; posterior in float32 and mask written."""
    return problems * n * (element_bytes + 4 + 1)


def relation(points: int, features: int, element_bytes: int, teacher_features: int | None = None) -> int:
    """Features of both sides read, the student's gradient written. It is bound by arithmetic, B^3 cosines: see README.md."""
    teacher_features = features if teacher_features is None else teacher_features
    return points * (2 * features + teacher_features) * element_bytes


def channel_moments(samples: int, elements: int, element_bytes: int, *, gradient: bool = False) -> int:
    """Maps of so many elements a sample read; for their gradient read again, and the gradient written."""
    return samples * elements * element_bytes * (3 if gradient else 1)


def lessons(candidates: int, places: int, pixels: int, classes: int, element_bytes: int) -> int:
    """Logits of all candidates read; for each place an image read and written, the student's logits read and their gradient
    written."""
    return element_bytes * (candidates * classes + 2 * places * (pixels + classes))


def alias_build(items: int, element_bytes: int, *, sweeps: int = 1) -> int:
    """Scores read ``sweeps`` times (3 by the kernels: largest score, partition function, weights), a bin of each written."""
    return items * (sweeps * element_bytes + BIN_BYTES)


def alias_quartiles(items: int, element_bytes: int, *, sweeps: int = 1) -> int:
    """Scores read ``sweeps`` times: by the kernels once for 11 bits of an element."""
    return sweeps * items * element_bytes


def alias_update(items: int, changes: int, element_bytes: int = 4) -> int:
    """Index and score of each change read, the bins of the blocks that they touch (of random items) read and written."""
    blocks = -(-items // BLOCK_ITEMS)
    touched = blocks * -math.expm1(changes * math.log1p(-1 / blocks)) if blocks > 1 else 1
    return changes * (8 + element_bytes) + int(touched * min(items, BLOCK_ITEMS)) * 2 * BIN_BYTES


def alias_sample(draws: int, *, top_in_cache: bool = True) -> int:
    """The draw written, and a sector of the table read at random; one more where the table over blocks exceeds L2."""
    return draws * (DRAW_BYTES + SECTOR_BYTES * (1 if top_in_cache else 2))
