"""The comparison of CUDA's results with the truth: what is right passes, what is wrong does not, whichever result it is."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from cuda_cases import ONCE, RANDOM
from cuda_truth import CHECKS, check
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [
    "kl_div 7x129xfloat64",
    "kl_div reverse 256x100xfloat32", "js_div 33x4099xbfloat16", "soft_cross_entropy 7x129xfloat64",
    "kd_loss 256x100xfloat32", "kl_div rows 5x50257xfloat16", "divergence_backward_",
    "sparse_kl_div 9x41xfloat32x5", "sparse_kd_loss 3x5003xbfloat16x64",
    "linear_kl_div bias, rows 23x16x24x131xfloat32", "linear_js_div softcap 70x64x96x1271xbfloat16",
    "linear_kd_loss of teacher_logits 9x48x40x5003xfloat16",
    "sample_teacher 33x4099xbfloat16", "logit_stats 33x4099xbfloat16",
    "relation_loss 41x17x20xbfloat16", "relation_loss 64x128x300xfloat32", "channel_moments 3x5x5000xfloat32",
    "channel_moments channels_last 4100x41xbfloat16", "gmm_fit 5x33xfloat16",
    "gmm_fit weighted 3x1271xfloat64",
    "select_clean 5x33xfloat16", "crop_offsets", "crop_patches", "crop_patches bfloat16",
    "crop_patches uint8", "draw_batch float32",
    "alias 41 bfloat16", "AliasTable.to",
]  # fmt: skip


def test_every_case_is_checked() -> None:
    assert {case.run for case in ONCE if case not in RANDOM} == set(CHECKS)
    names = [case.name for case in ONCE]
    assert len(set(names)) == len(names)
    assert {case.run for case in ONCE if case.name in NAMES} == set(CHECKS)


def spoiled(value: Tensor) -> Tensor:
    """Wrong by a twentieth, or by one, or the other of two."""
    if value.dtype == torch.bool:
        return ~value
    return value * 1.05 if value.is_floating_point() else value + 1


@pytest.mark.parametrize("name", NAMES)
def test_what_is_wrong_is_noticed(name: str) -> None:
    case = next(case for case in ONCE if case.name == name)
    inputs = case.inputs("cpu")
    results = case(*(x.clone() for x in inputs))
    CHECKS[case.run](case, inputs, results)
    for i, value in enumerate(results):
        if value.is_floating_point() and not value.nan_to_num().any():
            continue  # all of it is 0, and stays that
        wrong = (*results[:i], spoiled(value), *results[i + 1 :])
        with pytest.raises(AssertionError):
            CHECKS[case.run](case, inputs, wrong)


@pytest.mark.parametrize("case", RANDOM, ids=lambda case: case.name)
def test_random_cases_run(case: object) -> None:
    check(case, torch.device("cpu"), nullcontext)
