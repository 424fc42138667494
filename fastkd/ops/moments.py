"""Mean and variance of each channel: ``torch.ops.fastkd.channel_moments`` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import _library as _library  # registers the operators
from fastkd._checks import check_dtype, check_flag
from fastkd.ops._autograd import call_in_backward, register_autograd, save_tensors
from fastkd.ops._fake import register_fake

_channel_moments = torch.ops.fastkd.channel_moments.default
_channel_moments_backward = torch.ops.fastkd.channel_moments_backward.default

_ONCE = (
    "fastkd: the gradient of channel_moments cannot be differentiated again (create_graph=True); "
    "use the plain-torch form in fastkd.reference.moments for second derivatives"
)


def channel_moments(x: Tensor, per_sample: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and biased variance; the core of :func:`fastkd.functional.channel_moments`."""
    check_dtype("x", x)
    if not 2 <= x.dim() <= 5 or x.numel() == 0:
        raise ValueError(
            f"fastkd: x has shape {tuple(x.shape)}, must be [samples, channels, ...] with up to 3 more dimensions, "
            "none of them 0"
        )
    mean, var = _channel_moments(x, check_flag("per_sample", per_sample))
    return mean, var


def _is_channels_last(x: Tensor) -> bool:
    """Packed with its channels side by side, and not with its pixels, as the kernels see it (csrc/moments/operator.h)."""
    samples, channels, *spatial = x.shape
    if not spatial or channels == 1 or x.stride(1) != 1:
        return False
    stride = channels
    for d in range(x.dim() - 1, 1, -1):
        if x.shape[d] > 1 and x.stride(d) != stride:
            return False
        stride = stride * x.shape[d]
    return stride > channels and (samples == 1 or x.stride(0) == stride)


@register_fake("channel_moments")
def _channel_moments_fake(x: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = list(x.shape[:2] if per_sample else x.shape[1:2])
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


@register_fake("channel_moments_backward")
def _channel_moments_backward_fake(
    x: Tensor, mean: Tensor, grad_mean: Tensor | None, grad_var: Tensor | None
) -> Tensor:
    if _is_channels_last(x):
        samples, channels, *spatial = x.shape
        return x.new_empty([samples, *spatial, channels]).movedim(-1, 1)
    return x.new_empty(list(x.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    save_tensors(ctx, (inputs[0], output[0]))


def _backward(ctx: Any, grad_mean: Tensor | None, grad_var: Tensor | None) -> tuple[Tensor, None]:
    x, mean = ctx.saved_tensors
    return call_in_backward(_channel_moments_backward, x, mean, grad_mean, grad_var), None


register_autograd("channel_moments", _backward, setup_context=_setup_context)


def _no_second_derivative(*_: Any) -> None:
    raise RuntimeError(_ONCE)


register_autograd("channel_moments_backward", _no_second_derivative, setup_context=lambda *_: None)
