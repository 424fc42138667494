"""Launch geometry and index arithmetic of the row kernels, also for sizes that no machine holds."""

from __future__ import annotations

from typing import NamedTuple

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkd.ops.divergence import divergence
from fastkd.reference import divergence as reference

LANES = {0: 4, 1: 32, 3: 8}  # of a row, by team
RESIDENT_ELEMENTS = 32  # of a thread


class Plan(NamedTuple):
    resident: int
    one_launch: int
    team: int
    blocks: int
    threads: int
    cluster: int
    shared_bytes: int


def plan(
    rows: int,
    classes: int,
    size: int = 4,
    *,
    jensen_shannon: bool = False,
    resident: bool = True,
    aligned: bool = True,
    reduced: bool = True,
    max_cluster: int = 16,
) -> Plan:
    emulated.load()
    options = (jensen_shannon, resident, aligned, reduced, max_cluster)
    return Plan(*torch.ops.fastkd_emulated.plan_rows(rows, classes, size, *options))


@settings(max_examples=400)
@given(
    rows=st.integers(0, 2**31) | st.integers(0, 5000),
    classes=st.integers(1, 2**40) | st.integers(1, 300_000),
    size=st.sampled_from([2, 4, 8]),
    jensen_shannon=st.booleans(),
    resident=st.booleans(),
    aligned=st.booleans(),
    reduced=st.booleans(),
    max_cluster=st.sampled_from([1, 16]),
)
def test_every_row_has_a_team_that_holds_it(
    rows: int, classes: int, size: int, max_cluster: int, **options: bool
) -> None:
    if rows * 16 > 2**31 - 1:  # may be refused
        try:
            p = plan(rows, classes, size, max_cluster=max_cluster, **options)
        except RuntimeError as error:
            message = str(error)
            assert "fastkd: rows are" in message
            return
    p = plan(rows, classes, size, max_cluster=max_cluster, **options)
    assert p.cluster <= max_cluster
    assert p.blocks % p.cluster == 0
    assert p.blocks <= 2**31 - 1
    assert p.threads % 32 == 0
    assert p.shared_bytes <= 48 << 10
    if p.team in LANES:
        per_block = p.threads // LANES[p.team]
        held = LANES[p.team] * RESIDENT_ELEMENTS
        passes = -(-rows // (p.blocks * per_block))
        assert not p.one_launch or (p.blocks == p.cluster and passes <= 8)
        assert p.one_launch or p.cluster == 1
        assert p.one_launch or passes <= 1 or p.blocks == 1 << 16  # the rest is a loop
    else:
        assert p.blocks == rows * p.cluster
        assert not p.one_launch
        held = p.cluster * p.threads * RESIDENT_ELEMENTS
    if p.resident:
        pack = 16 // size
        longest = classes if options["aligned"] and classes % pack == 0 else classes + pack - 1
        assert longest <= held
        assert options["resident"]
        assert size <= 4


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("classes", "jensen_shannon", "cluster"),
    [
        (100, False, 1),
        (1000, False, 1),
        (32000, False, 4),
        (128256, False, 16),
        (262144, False, 16),
        (128256, True, 16),
    ],
)
def test_vocabularies_stay_on_chip(classes: int, jensen_shannon: bool, cluster: int, size: int) -> None:
    p = plan(8192, classes, size, jensen_shannon=jensen_shannon, reduced=False)
    assert p.resident
    assert p.cluster == cluster


def test_small_problems_are_one_launch() -> None:
    for max_cluster in (1, 16):
        assert plan(256, 100, max_cluster=max_cluster).one_launch
        assert plan(128, 10, max_cluster=max_cluster).one_launch
    assert plan(256, 1000).one_launch
    assert not plan(100_000, 100).one_launch
    assert not plan(8, 32000).one_launch


@settings(max_examples=200)
@given(classes=st.integers(1, 2**42) | st.integers(1, 50), offset=st.integers(0, 3), data=st.data())
def test_parts_cover_a_row_once(classes: int, offset: int, data: st.DataObject) -> None:
    emulated.load()
    parts, first = torch.ops.fastkd_emulated.row_parts(classes, offset, 0)
    assert parts == -(-(classes + offset) // 4)
    assert first == -offset
    part = data.draw(st.integers(0, parts - 1))
    assert torch.ops.fastkd_emulated.row_parts(classes, offset, part)[1] == 4 * part - offset
    assert 4 * (parts - 1) - offset < classes <= 4 * parts - offset


@pytest.mark.cuda_kernels
@pytest.mark.parametrize(
    ("rows", "classes"), [*((n, 3) for n in (1, 31, 32, 33, 257, 600, 2500)), *((n, 130) for n in (1, 4, 33, 257))]
)
def test_one_loss_of_many_short_rows(rows: int, classes: int, device: torch.device, generator: torch.Generator) -> None:
    """One cluster in one and several passes, and more launches; valid rows counted in each way."""
    student, teacher = (torch.randn(rows, classes, generator=generator).to(device) for _ in range(2))
    target = torch.randint(classes, (rows,), generator=generator).to(device)
    target[::3] = -100
    for reduction in ("batchmean", "mean", "sum"):
        for labels in (None, target):
            options = {"temperature": 2.0, "reduction": reduction, "kd_scale": 0.9}
            options["task_scale"] = 0.0 if labels is None else 0.1
            x = student.clone().requires_grad_()
            loss, _ = divergence(x, teacher, labels, **options)
            loss.backward()
            y = student.cpu().double().requires_grad_()
            on_cpu = None if labels is None else labels.cpu()
            expected = reference.divergence(y, teacher.cpu().double(), on_cpu, **options)
            expected.backward()
            torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(x.grad.cpu().double(), y.grad, rtol=1e-5, atol=3e-7)
