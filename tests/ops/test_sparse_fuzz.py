"""Whatever the operators of sparse teachers are called with, they answer or raise; meant to run under the sanitizers too."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from test_divergence_fuzz import FLOATS, INTEGERS, NUMBERS, RARE, SIZES, call, number, tensors

import fastkd  # noqa: F401  registers the operators

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.cuda_kernels]

fuzz = settings(max_examples=150, suppress_health_check=list(HealthCheck))


@fuzz
@given(st.data())
def test_sparse_divergence(device: torch.device, data: st.DataObject) -> None:
    draw = data.draw
    rows, classes = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES[1:]))
    entries = draw(st.integers(0, classes + 1) if draw(RARE) and draw(RARE) else st.integers(1, classes))
    student = draw(tensors((rows, classes), FLOATS, device))
    log_probs = draw(tensors((rows, entries), FLOATS, device))
    if log_probs.is_floating_point() and log_probs.numel() > 0:
        padding = log_probs == -math.inf
        log_probs = log_probs if draw(RARE) else log_probs.float().log_softmax(-1).to(log_probs.dtype)
        log_probs = log_probs.masked_fill(padding, -math.inf)
    indices = draw(tensors((rows, entries), [torch.int64, torch.int32], device))
    if not draw(RARE) and indices.shape == (rows, entries):
        order = torch.rand(rows, classes, generator=torch.Generator().manual_seed(3)).argsort(-1)
        indices = order[:, :entries].to(device, indices.dtype if indices.dtype == torch.int32 else torch.int64)
    tail_log_prob = draw(st.none() | tensors((rows,), FLOATS, device)) if draw(RARE) else None
    weight, temperatures = (
        draw(st.none() | tensors((rows,), [torch.float32, torch.float64], device)) for _ in range(2)
    )
    if temperatures is not None and temperatures.is_floating_point() and not draw(RARE):
        temperatures = temperatures.abs() + 0.01
    target = draw(st.none() | tensors((rows,), [torch.int64], device))
    if target is not None and target.dtype == torch.int64 and not draw(RARE):
        target = target % classes
    integers = [draw(st.sampled_from(INTEGERS if draw(RARE) and draw(RARE) else INTEGERS[:3])) for _ in range(2)]
    scales = number(draw, [0.0, 1.0, 0.9]), number(draw, [0.0, 0.1, 1.0])
    temperature, beta = number(draw, [1.0, 0.05, 4.0]), number(draw, [0.0, 0.3, 1.0])
    ignore_index, reduction = draw(st.sampled_from(INTEGERS)), draw(st.integers(0, 3))
    gradient = draw(st.booleans())
    result = call(
        torch.ops.fastkd.sparse_divergence,
        *(student, indices, log_probs, tail_log_prob, target, weight, temperatures, temperature, *integers, beta),
        *(*scales, ignore_index, reduction, gradient),
    )
    if result is None:
        return
    loss, terms, made = result
    shape = (student.shape[0],) if reduction == 0 else ()
    assert (loss.shape, terms.shape) == (shape, (2, *shape))
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    assert (made.shape, made.dtype) == (student.shape if gradient else (0,), student.dtype)
    if weight is None and integers[1] < 2:  # two distributions
        kd = terms[1].cpu()
        assert (torch.isnan(kd) | (kd >= 0)).all()


@fuzz
@given(st.data())
def test_sample_teacher(device: torch.device, data: st.DataObject) -> None:
    draw = data.draw
    rows, classes = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES[1:]))
    logits = draw(tensors((rows, classes), FLOATS, device))
    seed = torch.tensor([draw(st.sampled_from(INTEGERS))], device=device)
    draws, temperature = draw(st.sampled_from([1, 2, 7, 40, 0, -1])), draw(st.sampled_from(NUMBERS))
    result = call(torch.ops.fastkd.sample_teacher, logits, seed, draws, temperature)
    if result is None:
        return
    indices, log_probs = result
    assert indices.shape == log_probs.shape == (logits.shape[0], draws)
    assert ((indices >= 0) & (indices < logits.shape[1])).all()
    total = log_probs.double().exp().sum(-1)
    assert (torch.isnan(total) | ((total - 1).abs() < 1e-5)).all()
