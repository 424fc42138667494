"""``divergence_``, whose gradients take the place of logits: the bits of ``divergence``; on a GPU nearly, with labels,
as rows do not stay on chip there."""

from __future__ import annotations

import emulated
import pytest
import torch
from divergence_cases import KINDS, assert_same, logits, off_alignment
from torch import Tensor

from fastkd.ops.divergence import KINDS as NUMBERS

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.cuda_kernels]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def both(
    student: Tensor, teacher: Tensor, kind: dict[str, object], sides: tuple[bool, bool], label: str, temperature: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Terms and what is wanted of both sides, in place and not."""
    rows, classes = student.shape
    target = torch.arange(rows, device=student.device) * 7 % classes if label != "none" else None
    if target is not None:
        target[1::4] = -100
    weight = torch.linspace(0.5, 2.0, rows, device=student.device)
    scalars = (
        temperature,
        NUMBERS[str(kind["kind"])],
        kind.get("beta", 0.5),
        0.7,
        0.3 if label == "task" else 0.0,
        -100,
    )
    arguments = (target, weight, None, *scalars)
    _, terms, *gradients = torch.ops.fastkd.divergence(student, teacher, *arguments, 0, *sides)
    replaced = [student.clone(), teacher.clone()]
    if student.data_ptr() % 16:
        replaced = [off_alignment(x) for x in replaced]
    in_place = torch.ops.fastkd.divergence_(*replaced, *arguments, *sides)
    expected = [gradient if side else x for gradient, side, x in zip(gradients, sides, (student, teacher), strict=True)]
    return [in_place, *replaced], [terms, *expected]


@pytest.mark.parametrize("sides", [(True, False), (True, True), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("label", ["none", "ignored", "task"])
@pytest.mark.parametrize("kind", ["forward", "reverse", "soft_cross_entropy", "jsd0.3"])
def test_equals_the_gradients_out_of_place(
    kind: str, label: str, sides: tuple[bool, bool], device: torch.device, generator: torch.Generator
) -> None:
    for shape in ((5, 1), (6, 7), (9, 41), (5, 401), (3, 1271)):
        for dtype in DTYPES:
            for dist in ("normal", "close"):
                student, teacher = logits(*shape, dist, dtype, generator, device)
                for temperature in (1.0, 2.0):
                    ours, expected = both(student, teacher, KINDS[kind], sides, label, temperature)
                    for a, b in zip(ours, expected, strict=True):
                        assert_same(
                            a,
                            b,
                            a.dtype,
                            fixed_order=label != "task" or (device.type == "cpu" and not emulated.running()),
                        )
                # a gradient that lies elsewhere is spread over threads in another way: sums take another order
                ours, expected = both(off_alignment(student), off_alignment(teacher), KINDS[kind], sides, label, 2.0)
                for a, b in zip(ours, expected, strict=True):
                    assert_same(a, b, dtype, fixed_order=device.type == "cpu" and not emulated.running())


@pytest.mark.parametrize("sides", [(True, False), (True, True)], ids=str)
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd0.3"])
def test_large_vocabularies(
    kind: str, sides: tuple[bool, bool], device: torch.device, generator: torch.Generator
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = logits(2, 128257, "normal", dtype, generator, device)
        for a, b in zip(*both(student, teacher, KINDS[kind], sides, "task", 2.0), strict=True):
            assert_same(a, b, a.dtype, fixed_order=device.type == "cpu" and not emulated.running())


def test_a_row_is_replaced_only_where_its_gradient_can_lie() -> None:
    wide = torch.randn(3, 8)
    arguments = (None, None, None, 1.0, 0, 0.5, 1.0, 0.0, -100)
    with pytest.raises(RuntimeError, match="must be contiguous, as its gradient replaces it"):
        torch.ops.fastkd.divergence_(wide[:, :5], torch.randn(3, 5), *arguments, True, False)
    before = wide.clone()
    terms = torch.ops.fastkd.divergence_(
        torch.randn(3, 5), wide[:, :5], *arguments, True, False
    )  # read with its stride
    assert terms.shape == (2, 3)
    assert torch.equal(wide, before)
