"""TRL's distillation trainers on fastkd's losses: ``fastkd.integrations.trl.patch()``, before or after the trainer is made.

Replaced are these functions of TRL 1.16, which keep their arguments, results, reductions and masks:

============== ================================================================ =====================================
name           function                                                         computed by
============== ================================================================ =====================================
distillation   ``trl.trainer.distillation_trainer._chunked_divergence_loss``    :func:`fastkd.ops.linear.linear_divergence`
gkd            ``trl.experimental.gkd.gkd_trainer.GKDTrainer``                  :func:`fastkd.ops.divergence.divergence`
               ``.generalized_jsd_loss``
gold           ``trl.experimental.gold.gold_trainer.GOLDTrainer``               the same
               ``.generalized_jsd_loss``
iw_opd         ``trl.experimental.iw_opd.iw_opd_trainer.IWOPDTrainer``          the same
               ``.generalized_jsd_loss``
============== ================================================================ =====================================

The losses are TRL's: not multiplied by T^2, means over the tokens of the mask or sums over ``num_items_in_batch``; ``beta`` is
0 for forward KL, 1 for reverse KL, and the weight of the teacher in the mixture between them. ``_chunked_divergence_loss``
returns, as before, the sum of the student's entropies at that temperature and the number of tokens, and only the student gets
gradients. Sums run in float32, so bfloat16 logits give a float32 loss, which TRL rounds to bfloat16.

One gradient is another: a student's head that FSDP2 has wrapped by itself, and so in parts when the loss reads it, is gathered
once, as in TRL, but its gradient is the mean over the ranks. In TRL 1.16 each rank keeps what its own tokens say of its part.

TRL's own function is called, each time, for what fastkd does not compute:

- distillation: heads that DeepSpeed ZeRO-3 has partitioned, devices other than CPU and CUDA.
- gkd, gold, iw_opd: ``reduction="none"`` (a loss for each class), logits that are DTensors or of different shapes,
  a ``beta`` outside of [0, 1].
- gold: ``logits_are_probs=True`` (unnormalised probabilities of the classes that two tokenizers share).
- iw_opd: ``top_k > 0`` of more than ``top_k`` classes.

Everything else of these trainers stays TRL's, and so do the losses of the server, async, SDPO and SDFT trainers, and GOLD's
loss over two tokenizers (ULD).
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._checks import FLOATS, check_choice
from fastkd.integrations._compute import is_dtensor, is_partitioned
from fastkd.ops.divergence import divergence
from fastkd.ops.linear import linear_divergence
from fastkd.ops.linear_head import LinearHead, compute_dtype

__all__ = ["KNOWN_VERSIONS", "patch", "patched", "unpatch"]

KNOWN_VERSIONS = "1.16"
IGNORED = -100

_originals: dict[str, Callable[..., Any]] = {}


def _kind(beta: float) -> str:
    return "forward" if beta == 0 else "reverse" if beta == 1 else "jensen_shannon"


def _per(total: Tensor, count: Tensor | float) -> Tensor:
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def _chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = student_lm_head_weight, teacher_lm_head_weight
    device = student_hidden_states.device
    if not 0 <= beta <= 1 or device.type not in ("cpu", "cuda") or any(is_partitioned(head) for head in heads):
        return _originals["distillation"](  # type: ignore[no-any-return]
            student_hidden_states,
            teacher_hidden_states,
            student_lm_head_weight,
            teacher_lm_head_weight,
            completion_mask,
            beta,
            num_items_in_batch,
            student_lm_head_bias,
            teacher_lm_head_bias,
            student_logit_scale,
            teacher_logit_scale,
            student_final_logit_softcapping,
            teacher_final_logit_softcapping,
            temperature,
        )

    def side(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
    ) -> tuple[Tensor, LinearHead]:
        if not torch.is_grad_enabled():  # the teacher's, which may require gradients
            hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
        dtype = compute_dtype(hidden)
        return hidden.to(dtype), LinearHead(weight, bias, scale, softcap).to(dtype)

    student = side(
        student_hidden_states,
        student_lm_head_weight,
        student_lm_head_bias,
        student_logit_scale,
        student_final_logit_softcapping,
    )
    with torch.no_grad():
        teacher = side(
            teacher_hidden_states,
            teacher_lm_head_weight,
            teacher_lm_head_bias,
            teacher_logit_scale,
            teacher_final_logit_softcapping,
        )
        valid = completion_mask != 0
        count = valid.sum()
    loss, _, entropy = linear_divergence(
        *student,
        *teacher,
        torch.where(valid, 0, IGNORED),
        kind=_kind(beta),
        temperature=temperature,
        beta=beta,
        kd_scale=1.0 / temperature**2,
        ignore_index=IGNORED,
        reduction="sum",
        skip_ignored=True,  # as TRL does, which waits for the number of tokens, too
        student_entropy=True,
    )
    return _per(loss, count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch), entropy.sum(), count


def _computed(student_logits: Any, teacher_logits: Any, beta: Any, reduction: Any, num_items_in_batch: Any) -> bool:
    """Whether a loss of logits is one of fastkd's."""
    logits = student_logits, teacher_logits
    return (
        (num_items_in_batch is not None or reduction in ("batchmean", "sum", "mean"))
        and not isinstance(beta, Tensor)
        and 0 <= beta <= 1
        and not any(is_dtensor(each) for each in logits)
        and all(
            isinstance(each, Tensor) and each.dtype in FLOATS and each.device.type in ("cpu", "cuda") for each in logits
        )
        and student_logits.shape == teacher_logits.shape
    )


def _divergence_of_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    beta: float,
    temperature: float,
    reduction: str,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    valid = None if labels is None else labels != IGNORED
    total, _ = divergence(
        student_logits,
        teacher_logits,
        None if valid is None else torch.where(valid, 0, IGNORED),
        kind=_kind(beta),
        temperature=temperature,
        beta=beta,
        kd_scale=1.0 / temperature**2,
        ignore_index=IGNORED,
        reduction="sum",
    )
    if num_items_in_batch is not None:
        return _per(total, num_items_in_batch)
    if reduction == "batchmean":
        return total / (max(student_logits.shape[0], 1) if valid is None else valid.sum().clamp(min=1))
    if reduction == "mean":
        rows = student_logits.shape[:-1].numel() if valid is None else valid.sum()
        return total / (rows * student_logits.shape[-1])
    return total


def _gkd_loss(
    student_logits: Any,
    teacher_logits: Any,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Any:
    arguments = student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch
    if _computed(student_logits, teacher_logits, beta, reduction, num_items_in_batch):
        return _divergence_of_logits(*arguments)
    return _originals["gkd"](*arguments)


def _gold_loss(
    student_logits: Any,
    teacher_logits: Any,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    logits_are_probs: bool = False,
    num_items_in_batch: Tensor | int | None = None,
) -> Any:
    arguments = student_logits, teacher_logits, labels, beta, temperature, reduction
    if not logits_are_probs and _computed(student_logits, teacher_logits, beta, reduction, num_items_in_batch):
        return _divergence_of_logits(*arguments, num_items_in_batch)
    return _originals["gold"](*arguments, logits_are_probs, num_items_in_batch)


def _iw_opd_loss(
    student_logits: Any,
    teacher_logits: Any,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    top_k: int = 0,
    add_tail: bool = True,
    num_items_in_batch: Tensor | int | None = None,
) -> Any:
    arguments = student_logits, teacher_logits, labels, beta, temperature, reduction
    every_class = top_k <= 0 or student_logits.shape[-1] <= top_k
    if every_class and _computed(student_logits, teacher_logits, beta, reduction, num_items_in_batch):
        return _divergence_of_logits(*arguments, num_items_in_batch)
    return _originals["iw_opd"](*arguments, top_k, add_tail, num_items_in_batch)


class _Place(NamedTuple):
    """A function of TRL, of a module or static in a class, and what takes its place."""

    module: str
    owner: str | None
    function: str
    replacement: Callable[..., Any]

    def holder(self) -> Any:
        with warnings.catch_warnings():  # that trl.experimental may change: what changes is refused, below
            warnings.simplefilter("ignore")
            module = importlib.import_module(self.module)
        return module if self.owner is None else getattr(module, self.owner)

    def __str__(self) -> str:
        return ".".join(part for part in (self.module, self.owner, self.function) if part)


_LOSS = "generalized_jsd_loss"
PLACES = {
    "distillation": _Place(
        "trl.trainer.distillation_trainer", None, "_chunked_divergence_loss", _chunked_divergence_loss
    ),
    "gkd": _Place("trl.experimental.gkd.gkd_trainer", "GKDTrainer", _LOSS, _gkd_loss),
    "gold": _Place("trl.experimental.gold.gold_trainer", "GOLDTrainer", _LOSS, _gold_loss),
    "iw_opd": _Place("trl.experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer", _LOSS, _iw_opd_loss),
}


def patch(*names: str) -> tuple[str, ...]:
    """Replace these losses of TRL by fastkd's, or all: names are ``distillation``, ``gkd``, ``gold``, ``iw_opd``.

    A second call changes nothing. Modules that have imported a function by name get the new one, too, and so do trainers that
    are made already. Without names, trainers that cannot be imported here (for a package that they need) are left out.

    Returns:
        the names of the losses that are fastkd's now.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: a function has other arguments than those that are known; then nothing is replaced.
    """
    for name in names:
        check_choice("names", name, PLACES)
    _version()
    found = {}
    for name in names or PLACES:
        try:
            found[name] = _find(name)
        except ImportError:
            if names:
                raise
    for name, original in found.items():
        place = PLACES[name]
        if original is not place.replacement:
            _originals[name] = original
            _replace(place, original, place.replacement)
    return _names_now()


def unpatch(*names: str) -> None:
    """Put TRL's own functions back, these or all; where nothing was replaced, nothing happens."""
    for name in names:
        check_choice("names", name, PLACES)
    for name in names or tuple(_originals):
        if name in _names_now():
            _replace(PLACES[name], PLACES[name].replacement, _originals[name])


@contextmanager
def patched(*names: str) -> Iterator[tuple[str, ...]]:
    """:func:`patch` for a block; what was replaced before stays so."""
    before = _names_now()
    now = patch(*names)
    try:
        yield now
    finally:
        for name in now:
            if name not in before:
                unpatch(name)


def _version() -> str:
    try:
        return str(importlib.import_module("trl").__version__)
    except ImportError:
        raise ImportError('fastkd: TRL is not installed: pip install "fastkd[language]"') from None


def _find(name: str) -> Callable[..., Any]:
    """The function that is there now, if its arguments are those of TRL 1.16."""
    place = PLACES[name]
    other = (
        f"fastkd: trl {_version()} has another {place} than trl {KNOWN_VERSIONS}, the version known: {{}}; "
        "nothing is replaced" + ("" if name == "distillation" else "; patch() takes the names of those that are to be")
    )
    try:
        function = inspect.getattr_static(place.holder(), place.function)
    except AttributeError:
        raise RuntimeError(other.format("it is not there")) from None
    if place.owner is not None:
        if not isinstance(function, staticmethod):
            raise RuntimeError(other.format("it is no static method"))
        function = function.__func__
    if _arguments(function) != _arguments(place.replacement):
        raise RuntimeError(other.format(f"it takes {', '.join(inspect.signature(function).parameters)}"))
    return function  # type: ignore[no-any-return]


def _arguments(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


def _replace(place: _Place, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """In its place, and in every module that has imported it by name."""
    setattr(place.holder(), place.function, new if place.owner is None else staticmethod(new))
    for module in list(sys.modules.values()):
        if module is None or getattr(module, "__name__", None) == __name__:
            continue
        for key, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                setattr(module, key, new)


def _names_now() -> tuple[str, ...]:
    names = []
    for name, place in PLACES.items():
        if name in _originals and sys.modules.get(place.module) is not None:
            now = inspect.getattr_static(place.holder(), place.function, None)
            if (now.__func__ if isinstance(now, staticmethod) else now) is place.replacement:
                names.append(name)
    return tuple(names)
