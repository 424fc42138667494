"""Functional forms of the losses: of logits, and of embeddings (:func:`relation_loss`).

Logits go in raw: no softmax before the call.

Conventions, the same everywhere: ``p = softmax(teacher_logits / T)``, ``q = softmax(student_logits / T)``; every
divergence is multiplied by ``T^2`` (Hinton et al., 2015), so that gradients keep their size as T grows; sums run in
float32 or better, and losses of bfloat16 and float16 logits come back in float32. The teacher gets a gradient where
its logits require one; wrap the teacher in ``torch.no_grad()`` where they should not.

Masked classes may be ``-inf`` on either side or both (0 log 0 = 0). Where the divergence itself is infinite (the "to"
side gives a class probability 0 that the "from" side does not), the loss of that row is ``inf``; the gradient of the
"to" side (the student's, in forward KL) is still ``T (q - p)``, finite and pointing back to a finite loss, while the
"from" side has no derivative there and gets ``nan`` or ``inf`` in that row. Mask such classes on both sides.
Probabilities below the smallest normal number of the arithmetic (2^-126; float64: 2^-1022) count as 0.

Maps: with ``dim=1``, logits ``[B, K, H, W]`` have a row a pixel, and so on for any number of dimensions. What is ``[...]``
below (target, weight, temperature, losses without a reduction) is then ``[B, H, W]``, and "batchmean" is the mean over the
valid pixels, not their sum over the number of images. Channels-last logits are taken as they lie, and so are their
gradients. Of logits in NCHW order each side is copied, once, to have the classes of a pixel side by side, and its gradient
is copied back. Each gradient has the memory format of its logits; student and teacher may have different ones.

Sharded vocabularies, as tensor parallelism has them: with ``group``, logits are ``[..., K of this rank]``, and softmaxes run
over the classes of all its ranks, in the order of the ranks, which may have different numbers of them. A ``DTensor`` that is
sharded over the classes is taken as what it has here. Rows, ``target`` (classes of the whole vocabulary), ``weight`` and
``temperature`` are the same on all ranks, and so is the loss; each rank gets the gradient of its own logits. The ranks exchange
at most ten numbers of each row, in three all-reduces in the forward pass, and none in the backward, which computes the gradient
from the logits; they are kept for it.

Sparse teachers, of which k classes of each row are known, have losses of their own: :mod:`fastkd.functional.sparse`.

A row that holds ``nan``, ``+inf``, or ``-inf`` only has a loss and gradients of ``nan``; rows that are ignored or have
weight 0 are not looked at. First derivatives only, in reverse mode (``backward``, ``torch.func.grad``).
"""

from fastkd.functional.divergence import js_div, kd_loss, kl_div, soft_cross_entropy
from fastkd.functional.linear import linear_js_div, linear_kd_loss, linear_kl_div
from fastkd.functional.relation import relation_loss
from fastkd.functional.sparse import sample_teacher, sparse_js_div, sparse_kd_loss, sparse_kl_div
from fastkd.functional.sparse_linear import sparse_linear_js_div, sparse_linear_kd_loss, sparse_linear_kl_div
from fastkd.functional.statistics import ChannelMoments, LogitStats, channel_moments, logit_stats

__all__ = [
    "ChannelMoments",
    "LogitStats",
    "channel_moments",
    "js_div",
    "kd_loss",
    "kl_div",
    "linear_js_div",
    "linear_kd_loss",
    "linear_kl_div",
    "logit_stats",
    "relation_loss",
    "sample_teacher",
    "soft_cross_entropy",
    "sparse_js_div",
    "sparse_kd_loss",
    "sparse_kl_div",
    "sparse_linear_js_div",
    "sparse_linear_kd_loss",
    "sparse_linear_kl_div",
]
