"""Linear losses whose classes lie on several ranks: truth, chunks, masks, padded vocabularies, errors.

The ranks are threads here; test_linear_shard_ranks.py has processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_cases import NAMES, Heads, assert_right, make_heads
from shard_cases import in_lockstep
from torch import Tensor

from fastkd.ops._rank_group import RankGroup
from fastkd.ops.divergence import REDUCTIONS

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]  # the kernels: test_divergence_shard.py

KINDS = {
    "forward": {"kind": "forward"},
    "reverse": {"kind": "reverse"},
    "soft_cross_entropy": {"kind": "soft_cross_entropy"},
    "jsd": {"kind": "jensen_shannon", "beta": 0.3},
}
SIZES = (60, 3, 68)
ROW = 2 * 4 * 68  # bytes of both sides' logits of the rank that has most classes
TARGET = torch.tensor([0, -100, 130, 61, 77, 60] * 4)[:23]
ONE = torch.tensor(1.0)


def run(heads: Heads, upstream: Tensor = ONE, sizes: Sequence[int] = SIZES, **options: Any) -> dict[str, Tensor]:
    """The loss, and the gradients of all classes, from ranks that have so many each."""
    parts = [heads.of_rank(rank, sizes) for rank in range(len(sizes))]
    made = in_lockstep(
        len(sizes), lambda group: parts[group.rank].run(parts[group.rank].fused, upstream, group=group, **options)
    )
    whole = {}
    for name in made[0]:
        values = [of[name] for of in made]
        if name == "loss" or (name.endswith("hidden") and not (heads.ready and name == "teacher_hidden")):
            assert all(torch.equal(value, values[0]) for value in values), name
            whole[name] = values[0]
        else:
            whole[name] = torch.cat(values, -1 if name == "teacher_hidden" else 0)
    return whole


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_truth(kind: str, ready: bool, device: torch.device, generator: torch.Generator) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        heads = make_heads(generator, dtype=dtype, ready=ready, device=device)
        heads.options = {**KINDS[kind], "temperature": 2.0}
        for budget in (1, 5 * ROW, 1 << 30):
            assert_right(heads, ONE, run(heads, memory_budget=budget))


@pytest.mark.parametrize("skip_ignored", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_with_the_task(kind: str, reduction: str, skip_ignored: bool, generator: torch.Generator) -> None:
    weight = torch.rand(23, generator=generator)
    weight[4] = 0.0
    heads = make_heads(generator, student_numbers=(0.7, 4.0), teacher_numbers=(1.3, 5.0))
    temperature = torch.rand(23, generator=generator) + 0.5
    scales = {"task_scale": 0.4, "kd_scale": 0.6}
    heads.options = {**KINDS[kind], **scales, "target": TARGET, "weight": weight, "temperature": temperature}
    heads.options["reduction"] = reduction
    upstream = torch.rand(23, generator=generator) if reduction == "none" else ONE
    assert_right(heads, upstream, run(heads, upstream, skip_ignored=skip_ignored, memory_budget=5 * ROW))


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_the_same_on_both_sides_is_exactly_zero(kind: str, generator: torch.Generator) -> None:
    heads = make_heads(generator, (23, 16, 16, 131))
    heads.tensors[3:] = [x.clone() for x in heads.tensors[:3]]
    heads.options = {**KINDS[kind], "reduction": "none", "temperature": 0.7}
    results = run(heads, memory_budget=5 * ROW)
    assert (results["loss"] == 0).all()
    for name in NAMES[:3] if kind == "forward" else []:
        assert (results[name] == 0).all()


def test_classes_of_this_rank(generator: torch.Generator) -> None:
    """The last rank's padding takes no part, and has no gradient."""
    heads = make_heads(generator, options={"target": TARGET, "task_scale": 0.5, "reduction": "mean"})
    whole = run(heads)
    for i in (1, 2, 4, 5):
        heads.tensors[i] = torch.cat([heads.tensors[i], torch.full_like(heads.tensors[i][:9], torch.nan)])
    sizes = (60, 3, 77)
    parts = [heads.of_rank(rank, sizes) for rank in range(3)]
    made = in_lockstep(3, lambda g: parts[g.rank].run(parts[g.rank].fused, ONE, group=g, classes=SIZES[g.rank]))
    for name in ("loss", "student_hidden", "teacher_hidden"):
        torch.testing.assert_close(made[0][name], whole[name])
    for name in ("student_weight", "student_bias", "teacher_weight", "teacher_bias"):
        gradient = torch.cat([of[name] for of in made])
        assert (gradient[131:] == 0).all()
        torch.testing.assert_close(gradient[:131], whole[name])


def test_errors(generator: torch.Generator) -> None:
    heads = make_heads(generator)
    parts = [heads.of_rank(rank, SIZES) for rank in range(3)]
    heads.options = {"target": TARGET.clone(), "task_scale": 0.5}
    heads.options["target"][7] = 131
    with pytest.raises(RuntimeError, match=r"target\[7\] is 131, must be in \[0, 131\)"):
        run(heads, memory_budget=5 * ROW)
    parts[1].tensors[4:] = [x[:2] for x in parts[1].tensors[4:]]
    with pytest.raises(ValueError, match="this rank has 3 classes of the student's head, 2 of the teacher's"):
        in_lockstep(3, lambda group: parts[group.rank].fused(parts[group.rank].leaves(), group=group))


def test_what_must_be_the_same_on_all_ranks(generator: torch.Generator) -> None:
    """Budgets need not: the least counts. What would leave ranks waiting for one another is the same error on all."""
    heads = make_heads(generator, options={"target": TARGET, "reduction": "none"})
    parts = [heads.of_rank(rank, SIZES) for rank in range(3)]
    of_one = heads.fused(heads.tensors)
    budgets = [5 * ROW, 1, 1 << 30]
    for loss in in_lockstep(
        3, lambda g: parts[g.rank].fused(parts[g.rank].tensors, group=g, memory_budget=budgets[g.rank])
    ):
        torch.testing.assert_close(loss, of_one)

    def frozen_on_one(group: RankGroup) -> Tensor:
        leaves = parts[group.rank].leaves()
        leaves[1].requires_grad_(group.rank != 1)
        leaves[2].requires_grad_(group.rank != 1)
        leaves[3:] = [x.detach() for x in leaves[3:]]
        return parts[group.rank].fused(leaves, group=group)

    def fewer_rows_on_one(group: RankGroup) -> Tensor:
        hidden, *rest = parts[group.rank].tensors
        rest[2] = rest[2][: len(hidden) - group.rank]
        part = replace(parts[group.rank], options={})
        return part.fused([hidden[: len(hidden) - group.rank], *rest], group=group)

    for work, said in (
        (frozen_on_one, "requires_grad of hidden states and heads: must be the same on all ranks"),
        (fewer_rows_on_one, "rows: must be the same on all ranks"),
        (lambda g: parts[g.rank].fused(parts[g.rank].tensors, group=g, skip_ignored=g.rank == 1), "skip_ignored: must"),
    ):
        wrong = []

        def each(group: RankGroup, work: Callable[[RankGroup], Tensor] = work, wrong: list[str] = wrong) -> None:
            try:
                work(group)
            except ValueError as error:
                wrong.append(str(error))

        in_lockstep(3, each)
        assert len(wrong) == 3
        assert all(said in text for text in wrong)
    with pytest.raises(ValueError, match="group is given, must be None where the student's entropy is wanted"):
        in_lockstep(1, lambda group: heads.fused(heads.tensors, group=group, student_entropy=True))
