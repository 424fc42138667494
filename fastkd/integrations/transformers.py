"""Distillation of transformers' language models without their logits: a loss for any loop, and a mixin for ``Trainer``.

    from fastkd.integrations.transformers import DistillationMixin

    class DistillationTrainer(DistillationMixin, transformers.Trainer):
        pass

    trainer = DistillationTrainer(model=student, teacher=teacher, temperature=2.0, alpha=0.9, args=args, train_dataset=...)

Both models run up to their heads, whose weights go, with the hidden states, into :func:`fastkd.ops.linear.linear_divergence`:
the logits of a batch never exist at once. What the models do to their logits behind the head (scale, softcap) is read from
their configs, and checked in the first call against what they do.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fastkd._checks import check_choice, check_share
from fastkd.functional.divergence import DIRECTIONS, Direction
from fastkd.integrations._compute import is_partitioned
from fastkd.ops.linear import linear_divergence
from fastkd.ops.linear_head import LinearHead, compute_dtype

__all__ = ["DistillationMixin", "distillation_loss"]

# of the inputs, what is the loss's and not the models'
_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch", "return_loss")
# Wrappers keep the model in a submodule of this name: DDP and DeepSpeed, torch.compile, FullyShardedDataParallel.
_WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module")
# Configs that name the factor of their logits, and those that name its reciprocal.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@overload
def distillation_loss(
    model: nn.Module,
    teacher: nn.Module,
    inputs: Mapping[str, Any],
    num_items_in_batch: Tensor | float | None = ...,
    *,
    temperature: float | Tensor = ...,
    alpha: float = ...,
    direction: Direction = ...,
    beta: float | None = ...,
    ignore_index: int = ...,
    classes: int | None = ...,
    return_terms: Literal[False] = ...,
    **options: Any,
) -> Tensor: ...


@overload
def distillation_loss(
    model: nn.Module,
    teacher: nn.Module,
    inputs: Mapping[str, Any],
    num_items_in_batch: Tensor | float | None = ...,
    *,
    temperature: float | Tensor = ...,
    alpha: float = ...,
    direction: Direction = ...,
    beta: float | None = ...,
    ignore_index: int = ...,
    classes: int | None = ...,
    return_terms: Literal[True],
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]: ...


def distillation_loss(
    model: nn.Module,
    teacher: nn.Module,
    inputs: Mapping[str, Any],
    num_items_in_batch: Tensor | float | None = None,
    *,
    temperature: float | Tensor = 1.0,
    alpha: float = 1.0,
    direction: Direction = "forward",
    beta: float | None = None,
    ignore_index: int = -100,
    classes: int | None = None,
    return_terms: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """``(1 - alpha) CE(labels) + alpha T^2 D(teacher, student)`` over the tokens of a batch.

    The mean over the tokens whose label is not ``ignore_index``, or, with ``num_items_in_batch``, their sum over that number.
    Take it where a step is of several batches of unequal numbers of tokens: it is that of all batches of the step. Of several
    processes too, if gradients are summed over them; DDP and FSDP average, so divide it by their number.

    Args:
        model: a model of transformers with a head, ``get_output_embeddings()``; also in DDP, in FSDP2 (``fully_shard``), with
            adapters of PEFT that leave the head alone, with gradient checkpointing, under autocast.
        teacher: another; runs without gradients, in evaluation mode, in which it stays. Any hidden size; the vocabulary of the
            model, but for ``classes``.
        inputs: of both models, and ``labels`` ``[B, S]``, which this shifts by one, or ``shift_labels``, which are shifted.
        temperature: T > 0, a number or a tensor that broadcasts to ``[B, S]``. The distillation term is multiplied by T^2.
        alpha: weight of the distillation term, in [0, 1]. At 1 the labels only say which tokens count.
        direction: D, ``forward`` = KL(teacher || student), ``reverse`` = KL(student || teacher).
        beta: D is the generalised Jensen-Shannon divergence of this beta instead, see :func:`fastkd.functional.js_div`.
        classes: only the first so many tokens of both vocabularies, where they are padded to different sizes.
        return_terms: also return ``{"cross_entropy": ..., "divergence": ...}``, the unweighted terms, detached.
        options: of :func:`fastkd.functional.linear_kl_div`: ``weight``, ``logits_dtype``, ``memory_budget``, ``skip_ignored``,
            which is True here: prompts and padding take no time, for one wait for the device.

    Raises:
        TypeError, ValueError: a model without a head, or with an adapter on it, or one that does something to its logits that
        its config does not tell; no labels; and all that the loss of hidden states raises.
    """
    check_choice("direction", direction, DIRECTIONS)
    alpha = check_share("alpha", alpha)
    student, other = _unwrapped("model", model), _unwrapped("teacher", teacher)
    target = _target(inputs, student, ignore_index)
    given = {name: value for name, value in inputs.items() if name not in _OF_THE_LOSS}
    if student.config.is_encoder_decoder and "decoder_input_ids" not in given:
        given["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])

    if teacher.training:
        teacher.eval()
    with torch.no_grad():
        teacher_hidden, teacher_head = _hidden_states("teacher", other, _eager(teacher), given)

    def loss(run: Callable[..., Any], given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        hidden, head = _hidden_states("model", student, run, given)
        value, terms, _ = linear_divergence(
            hidden,
            head,
            teacher_hidden.to(hidden.device),
            teacher_head,
            target.to(hidden.device),
            kind=direction if beta is None else "jensen_shannon",
            temperature=temperature,
            beta=0.5 if beta is None else beta,
            kd_scale=alpha,
            task_scale=1.0 - alpha,
            ignore_index=ignore_index,
            reduction="batchmean" if num_items_in_batch is None else "sum",
            classes=classes,
            **{"skip_ignored": True, **options},
        )
        if num_items_in_batch is not None:
            count = num_items_in_batch
            count = count.to(value.device) if isinstance(count, Tensor) else count
            value, terms = value / count, terms / count
        return value, terms

    value, terms = _through(model, student, loss, given)
    return (value, {"cross_entropy": terms[0], "divergence": terms[1]}) if return_terms else value


def _unwrapped(name: str, model: nn.Module) -> Any:
    """The model in DDP, torch.compile or FSDP."""
    inner: Any = model
    while isinstance(inner, nn.Module) and (kept := [inner._modules[key] for key in _WRAPPED if key in inner._modules]):
        inner = kept[0]
    if not isinstance(inner, nn.Module) or not hasattr(inner, "get_output_embeddings"):
        raise TypeError(f"fastkd: {name} is {type(inner).__name__}, must be a model of transformers")
    return inner


def _target(inputs: Mapping[str, Any], model: Any, ignore_index: int) -> Tensor:
    """The token that each position is to predict; the last one predicts none, and is not cut off, so that nothing is copied."""
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]  # type: ignore[no-any-return]
    labels = inputs.get("labels")
    if labels is None:
        raise ValueError(f"fastkd: inputs has {', '.join(inputs)}, must have labels: they say which tokens count")
    if model.config.is_encoder_decoder:
        return labels  # type: ignore[no-any-return]
    return nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)


def _through(
    model: nn.Module, inner: nn.Module, work: Callable[[Callable[..., Any], dict[str, Any]], Any], given: dict[str, Any]
) -> Any:
    """``work(forward, given)``, ``forward`` being that of the model, in the place of the model's forward pass, so that DDP and
    FSDP do what they do before and after one."""
    if model is inner and not _is_sharded(model):
        return work(_eager(model), given)
    before = inner.__dict__.get("forward")

    def put_back() -> None:
        inner.__dict__.pop("forward", None)
        if before is not None:
            inner.forward = before

    def forward(**given: Any) -> Any:
        put_back()
        return work(inner.forward, given)

    inner.forward = forward
    try:
        return _eager(model)(**given)
    finally:
        put_back()


def _is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "_get_fsdp_state")  # of FSDP2, which is in the model and not around it


def _eager(model: nn.Module) -> Callable[..., Any]:
    """A call of the model without the graph that torch.compile has of the whole forward pass, logits included. What is
    compiled inside stays so."""
    while "_orig_mod" in model._modules:
        model = model._modules["_orig_mod"]  # type: ignore[assignment]
    return model._call_impl


def _hidden_states(name: str, inner: Any, run: Callable[..., Any], given: dict[str, Any]) -> tuple[Tensor, LinearHead]:
    """What goes into the head of a model, ``[B, S, H]``, in the dtype of the product, and the head.

    ``run`` is all of the model, so that everything around its layers does, too (autocast of accelerate, adapters, images,
    factors before the head); only the head notes its input in place of the product.
    """
    head = inner.get_output_embeddings()
    if getattr(head, "weight", None) is None or hasattr(head, "base_layer"):
        what = (
            "has an adapter on its head" if head is not None and hasattr(head, "base_layer") else "has no linear head"
        )
        raise TypeError(
            f"fastkd: {name}, a {type(inner).__name__}, {what}; must have one with a weight [vocabulary, hidden]"
        )
    if is_partitioned(head.weight):
        raise TypeError(
            f"fastkd: {name} has a head that DeepSpeed ZeRO-3 has partitioned; must be whole: take ZeRO-2 or FSDP2"
        )
    scale, softcap = _logit_scale_and_softcap(inner.config.get_text_config(decoder=True))
    forward = inspect.signature(type(inner).forward).parameters
    if "use_cache" in forward or hasattr(inner, "peft_config"):
        given = {**given, "use_cache": False}
    with _tapped(head) as (kept, probes):
        outputs = run(**given)
    if len(kept) != 1:
        raise TypeError(f"fastkd: {name}, a {type(inner).__name__}, calls its head {len(kept)} times; must do so once")
    if inner not in _checked:
        logits = outputs[0] if isinstance(outputs, tuple) else outputs.logits
        _check_logits(name, inner, probes[0], logits, scale, softcap)
        _checked.add(inner)
    hidden = kept[0]
    weight, bias = head.weight, getattr(head, "bias", None)
    if not torch.is_grad_enabled():  # a teacher's head may ask for gradients that nobody wants
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    return hidden, LinearHead(weight, bias, scale, softcap).to(hidden.dtype)


@contextmanager
def _tapped(head: Any) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The head keeps its input and gives one number for each position instead of logits."""
    kept: list[Tensor] = []
    probes: list[Tensor] = []
    before = head.__dict__.get("forward")

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        kept.append(hidden.to(compute_dtype(hidden)))
        rows = hidden.shape[:-1]
        probes.append(torch.linspace(-40.0, 40.0, rows.numel(), device=hidden.device).reshape(*rows, 1))
        return probes[-1].clone()

    head.forward = forward
    try:
        yield kept, probes
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def _logit_scale_and_softcap(config: Any) -> tuple[float, float | None]:
    """What a model multiplies its logits by, and to which size it then bends them."""

    def named(names: tuple[str, ...]) -> float | None:
        values = (getattr(config, name, None) for name in names)
        return next((float(value) for value in values if isinstance(value, (int, float))), None)

    scale = named(_SCALES)
    if scale is None and (by := named(("logits_scaling",))) is not None:
        scale = by if config.model_type == "hyperclovax" else 1.0 / by
    return 1.0 if scale is None else scale, named(_SOFTCAPS)


def _check_logits(name: str, model: Any, probe: Tensor, logits: Tensor, scale: float, softcap: float | None) -> None:
    """Whether the model has done to the numbers that came out of its head what its config says. Once for a model."""
    expected = probe * scale
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    same = logits.shape == expected.shape and torch.allclose(logits.float(), expected, rtol=0.02, atol=0.02)
    if not same:
        raise TypeError(
            f"fastkd: {name}, a {type(model).__name__}, does something else to its logits than its config says (scale "
            f"{scale:g}, softcap {softcap}); must do that alone behind its head: give its logits to fastkd.functional.kl_div"
        )


class DistillationMixin:
    """Makes a trainer of transformers, or one that is made of it (TRL's ``SFTTrainer``), distil a teacher.

    The loss is :func:`distillation_loss`, in training and in evaluation over the same denominator: the tokens of all batches of
    a step, over all processes. So gradient accumulation and the number of processes do not change it.

    Args:
        teacher: is moved to the device of the training, frozen, and not saved.
        temperature, alpha, direction, beta, classes: as in :func:`distillation_loss`.
        other arguments: the trainer's.
    """

    args: Any
    accelerator: Any
    model: Any

    def __init__(
        self,
        *arguments: Any,
        teacher: nn.Module,
        temperature: float = 1.0,
        alpha: float = 1.0,
        direction: Direction = "forward",
        beta: float | None = None,
        classes: int | None = None,
        **options: Any,
    ) -> None:
        check_choice("direction", direction, DIRECTIONS)
        check_share("alpha", alpha)
        super().__init__(*arguments, **options)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"fastkd: n_gpu is {self.args.n_gpu}, must be 1: start a process for each GPU, with torchrun"
            )
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"fastkd: label_smoothing_factor is {self.args.label_smoothing_factor}, must be 0 in distillation"
            )
        self.distillation = {
            "temperature": temperature,
            "alpha": alpha,
            "direction": direction,
            "beta": beta,
            "classes": classes,
        }
        teacher.requires_grad_(False).eval()
        # mixed precision as the student has it; one that lies on several devices, or in parts, stays where it is
        placed = not hasattr(teacher, "hf_device_map") and not _is_sharded(_unwrapped("teacher", teacher))
        self.teacher = self.accelerator.prepare_model(teacher, device_placement=placed, evaluation_mode=True)
        # what makes Trainer count the tokens of a step, shifted as the loss shifts them, and not divide by the batches of it
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = not getattr(self.model.config, "is_encoder_decoder", False)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss = distillation_loss(model, self.teacher, inputs, num_items_in_batch, **self.distillation)  # type: ignore[call-overload]
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            tensor_parallel = getattr(self, "get_tp_size", lambda: 1)()  # ranks that have the same batch
            loss = loss * (self.accelerator.num_processes // tensor_parallel)
        if not return_outputs:
            return loss
        outputs: dict[str, Any] = {"loss": loss}
        if getattr(self, "compute_metrics", None) is not None and not model.training:  # who wants logits, in evaluation
            given = {name: value for name, value in inputs.items() if name not in _OF_THE_LOSS}
            outputs["logits"] = model(**given).logits
        return loss, outputs
