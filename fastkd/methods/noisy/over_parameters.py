"""A correction of each sample's label that is learnt along with the network: sparse over-parameterization."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastkd import _checks
from fastkd.methods.noisy import terms
from fastkd.methods.noisy.samples import Samples

__all__ = ["OverParameters", "corrected_losses"]

LEAST, MOST = 1e-4, 1.0 - 1e-4  # of probabilities and of corrections, as in the authors' code
SPREAD = 1e-8  # of the first values


class OverParameters(nn.Module):
    """``u`` and ``v`` of each sample, trained by SGD without momentum and decay, at rates of their own.

    Liu et al., "Robust Training under Label Noise by Over-parameterization" (ICML 2022). Only rows of a batch have a
    gradient, so only these are moved: a step takes as long for a million samples as for a thousand.

    >>> samples = Samples(50_000, u=torch.zeros(1), v=torch.zeros(10)).to(device)
    >>> correction = OverParameters(samples, 10.0, 10.0)
    >>> rows = correction.rows(index)                       # in the loop, with the index of each sample of the batch
    >>> cross_entropy, squared, balance = corrected_losses(student(images), labels, *rows)
    >>> loss = cross_entropy + squared + 0.1 * balance
    >>> correction.step(index, rows, loss)
    >>> loss.backward()

    Args:
        samples: has rows "u", ``[1]``, and "v", ``[K]``.
        learning_rate_u, learning_rate_v: constant.
    """

    def __init__(self, samples: Samples, learning_rate_u: float, learning_rate_v: float) -> None:
        super().__init__()
        self._samples = (samples,)  # in a tuple: it is not this module's state
        self.rates = (
            _checks.check_not_negative("learning_rate_u", learning_rate_u),
            _checks.check_not_negative("learning_rate_v", learning_rate_v),
        )
        for rows in (samples["u"], samples["v"]):
            rows.normal_(std=SPREAD)

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """u ``[B, 1]`` and v ``[B, K]`` of a batch, to be differentiated by."""
        samples = self._samples[0]
        u, v = (samples[name][index].requires_grad_() for name in ("u", "v"))
        return u, v

    def step(self, index: Tensor, rows: tuple[Tensor, Tensor], loss: Tensor, batches_per_step: int = 1) -> None:
        """One step of them down the gradient of the loss of a batch; before the network's update, which frees the graph.

        Args:
            index: int64 ``[B]``, and ``rows``, what :meth:`rows` returned for it.
            loss: their mean over the batch.
            batches_per_step: of the network, over which its gradient is a mean: so is theirs then.
        """
        gradients = torch.autograd.grad(loss, rows, retain_graph=True)
        u, v = (
            row.detach() - (rate / batches_per_step) * gradient
            for row, rate, gradient in zip(rows, self.rates, gradients, strict=True)
        )
        self._samples[0].write(index, u=u, v=v)


def corrected_losses(
    logits: Tensor, target: Tensor, u: Tensor, v: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one head: cross-entropy with the label as corrected by u and v, squared error, and the balance of the classes.

    With ``U = u^2`` at the label and ``V = v^2`` at the other classes, the prediction that is compared with the label is ``p
    + U - V`` over its sum; u learns from this, v from ``|h + U - V - y|^2``, h the predicted class (Liu et al., Eq. 5 and 6).

    Args:
        logits: ``[B, K]``.
        u, v: ``[B, 1]`` and ``[B, K]``.
        weight: ``[B]``, of the cross-entropy.
    """
    p = terms.probabilities(logits)
    label = terms.one_hot(target, p)
    corrected = (u.square() * label).clamp(0.0, MOST)
    other = (v.square() * (1.0 - label)).clamp(0.0, MOST)
    prediction = F.normalize((p + corrected - other.detach()).clamp(min=LEAST), p=1.0, dim=-1).clamp(LEAST, 1.0)
    rows = -prediction.gather(1, target[:, None])[:, 0].log()
    cross_entropy = (rows if weight is None else weight * rows).mean()
    hard = terms.one_hot(p.argmax(-1), p.detach())
    squared = (hard + corrected.detach() - other - label).square().sum() / len(label)
    return cross_entropy, squared, terms.balance(prediction)
