"""CRD and SSKD against independent formulas, value and gradients; their memory, their selection, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import method_formulas as plain
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastkd.methods import CRD, SSKD, FeatureTap, Method, Objective, Outputs
from fastkd.methods.contrastive import chosen
from fastkd.methods.registry import create
from fastkd.models.resnet import resnet

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

CLASSES, ITEMS = 5, 12


def outputs(seed: int, rows: int, *shape: int, dtype: torch.dtype = torch.float64) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, CLASSES, generator=generator, dtype=torch.float64)
    feature = torch.randn(rows, *shape, generator=generator, dtype=torch.float64)
    return Outputs(logits.to(dtype).requires_grad_(), {"f": feature.to(dtype).requires_grad_()})


def given(seed: int, rows: int, *shape: int, dtype: torch.dtype = torch.float64) -> Outputs:
    made = outputs(seed, rows, *shape, dtype=dtype)
    return Outputs(made.logits.detach(), {"f": made.features["f"].detach()})  # type: ignore[union-attr]


def gradients(loss: Tensor, method: Method, student: Outputs) -> list[Tensor]:
    of = [student.logits, student.features["f"], *method.parameters()]
    return list(torch.autograd.grad(loss, of, materialize_grads=True))  # type: ignore[arg-type]


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-6) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- CRD -----------------------------------------------------------------------------------------


def crd(seed: int = 0, **more: object) -> CRD:
    torch.manual_seed(seed)
    return CRD(ITEMS, 3, 4, ["f"], **{"negatives": 7, "embedding": 6, **more}).double()  # type: ignore[arg-type]


def crd_by_hand(
    method: CRD, student: Outputs, teacher: Outputs, index: Tensor, drawn: Tensor, scales: Tensor
) -> Tensor:
    v, u = (
        plain.embedded(o.features["f"], e.weight, e.bias)
        for o, e in ((student, method.student_embedding), (teacher, method.teacher_embedding))
    )
    t = method.nce_temperature
    ours = plain.contrast(v, method.teacher_memory, index, drawn, scales[0], t)
    return ours + plain.contrast(u, method.student_memory, index, drawn, scales[1], t)


def scales_by_hand(method: CRD, student: Outputs, teacher: Outputs, index: Tensor, drawn: Tensor) -> Tensor:
    pairs = (
        (student, method.student_embedding, method.teacher_memory),
        (teacher, method.teacher_embedding, method.student_memory),
    )
    scales = [
        plain.scale_of_scores(
            plain.embedded(o.features["f"], e.weight, e.bias), memory, index, drawn, method.nce_temperature
        )
        for o, e, memory in pairs
    ]
    return torch.stack(scales).detach()


def draws(seed: int, rows: int, negatives: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randint(ITEMS, (rows, negatives))


@pytest.mark.parametrize("shape", [(), (1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_crd(rows: int, temperature: float, shape: tuple[int, ...]) -> None:
    """Two batches: Z is that of the first, and the memory of the second is what the first left."""
    method = crd(nce_temperature=temperature, kd_weight=0.5)
    scales = None
    for batch in range(2):
        student, teacher = outputs(batch, rows, 3, *shape), given(10 + batch, rows, 4, *shape)
        index, target = torch.randperm(ITEMS)[:rows], torch.arange(rows) % CLASSES
        drawn = draws(batch, rows, 7)
        if scales is None:
            scales = scales_by_hand(method, student, teacher, index, drawn)
        x = crd_by_hand(method, student, teacher, index, drawn, scales)
        kd = plain.hinton(student.logits, teacher.logits, 4.0)  # type: ignore[arg-type]
        expected = F.cross_entropy(student.logits, target) + 0.5 * kd + 0.8 * x  # type: ignore[arg-type]
        wanted = gradients(expected, method, student)
        before = {name: value.clone() for name, value in method.named_buffers()}

        torch.manual_seed(batch)
        loss = method(student, teacher, target, 0.0, index)
        torch.testing.assert_close(loss.total, expected)
        assert_same(gradients(loss.total, method, student), wanted)
        torch.testing.assert_close(method.log_scales.exp(), scales)
        for memory, embed, o in (
            ("student_memory", method.student_embedding, student),
            ("teacher_memory", method.teacher_embedding, teacher),
        ):
            mixed = 0.5 * before[memory]
            mixed[index] += 0.5 * plain.embedded(o.features["f"], embed.weight, embed.bias).detach()
            after = before[memory].clone()
            after[index] = (mixed / mixed.norm(dim=1, keepdim=True))[index]
            torch.testing.assert_close(getattr(method, memory), after)
        assert_terms_add_up(loss)


def assert_terms_add_up(loss: object) -> None:
    torch.testing.assert_close(sum(loss.terms.values()), loss.total.detach())  # type: ignore[attr-defined]
    assert not any(term.requires_grad for term in loss.terms.values())  # type: ignore[attr-defined]


def test_crd_in_float32_and_autocast() -> None:
    results = []
    for dtype, autocast in ((torch.float32, False), (torch.bfloat16, True), (torch.float64, False)):
        method = crd().float() if dtype != torch.float64 else crd().float().double()
        pair = outputs(1, 4, 3, dtype=torch.bfloat16), given(2, 4, 4, dtype=torch.bfloat16)
        cast = [Outputs(o.logits.to(dtype), {"f": o.features["f"].to(dtype)}) for o in pair]  # type: ignore[union-attr]
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(method(*cast, torch.arange(4), 0.0, torch.arange(4)).total)
    for result in results[:2]:
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), results[2], rtol=1e-5, atol=1e-6)


def test_crd_in_evaluation_mode_remembers_nothing() -> None:
    method = crd().eval()
    before = {name: value.clone() for name, value in method.named_buffers()}
    assert method(outputs(1, 4, 3), given(2, 4, 4), torch.arange(4), 0.0, torch.arange(4)).total.isfinite()
    assert all(torch.equal(before[name], value) for name, value in method.named_buffers())


def test_crd_of_another_dtype() -> None:
    method = crd().to(torch.bfloat16)
    cast = [Outputs(o.logits.bfloat16(), {"f": o.features["f"].bfloat16()}) for o in (outputs(1, 4, 3), given(2, 4, 4))]  # type: ignore[union-attr]
    loss = method(*cast, torch.arange(4), 0.0, torch.arange(4)).total
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in method.parameters())


def test_crd_draws_from_the_global_generator() -> None:
    args = outputs(1, 4, 3), given(2, 4, 4), torch.arange(4), 0.0, torch.arange(4)
    totals = []
    for seed in (5, 5, 6):
        method = crd()
        torch.manual_seed(seed)
        totals.append(method(*args).total.item())
    assert totals[0] == totals[1] != totals[2]


def test_crd_without_its_weight() -> None:
    method, student = crd(feature_weight=0.0), outputs(1, 4, 3)
    loss = method(Outputs(student.logits), None, torch.arange(4))
    assert set(loss.terms) == {"task_loss"}
    loss.total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in method.parameters())


def test_crd_by_name() -> None:
    networks = resnet(8, in_channels=1, seed=1), resnet(14, in_channels=1, seed=2)
    images = torch.randn(8, 1, 8, 8)
    method = create("crd", *networks, images, items=50_000, embedding=2)
    assert (method.items, method.negatives, method.student_channels, method.teacher_channels) == (50_000, 16384, 64, 64)
    assert create("crd", *networks, images, items=100).negatives == 99
    assert create("crd", *networks, images, items=100, negatives=300).negatives == 300
    assert create("crd", items=100, student_channels=2, teacher_channels=3).layers == ("avgpool",)
    with pytest.raises(ValueError, match="items is None, must be given for CRD"):
        create("crd", *networks, images)
    with pytest.raises(ValueError, match="crd needs student, teacher and images, or student_channels"):
        create("crd", items=100)
    with pytest.raises(ValueError, match="items is 1, must be at least 2"):
        create("crd", *networks, images, items=1)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (None, ValueError, r"index is None, must be int64 \[4\], which items of the data set the images are"),
        (torch.arange(4).int(), TypeError, "index has dtype torch.int32"),
        (torch.arange(3), ValueError, r"index has shape \(3,\), must be \(4,\)"),
        (torch.zeros(4, 1).long(), ValueError, r"index has shape \(4, 1\)"),
        (torch.tensor([0, 1, -1, 2]), ValueError, "index holds -1, must be items from 0 to 11"),
        (torch.tensor([0, 1, 12, 2]), ValueError, "index holds 12, must be items from 0 to 11"),
        ([0, 1, 2, 3], TypeError, "index is list, must be a tensor"),
    ],
)
def test_indices_that_are_refused(index: Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        crd()(outputs(1, 4, 3), given(2, 4, 4), torch.arange(4), 0.0, index)


def test_labels_and_channels_that_are_refused() -> None:
    with pytest.raises(ValueError, match="target holds 9, must be classes from 0 to 4"):
        crd()(outputs(1, 4, 3), given(2, 4, 4), torch.full((4,), 9), 0.0, torch.arange(4))
    with pytest.raises(ValueError, match="channels must be student_channels, 3, and teacher_channels, 4"):
        crd()(outputs(1, 4, 4), given(2, 4, 4), torch.arange(4), 0.0, torch.arange(4))
    objective = Objective(create("crd", *_networks(), torch.zeros(2, 1, 8, 8), items=9), *_networks())
    with pytest.raises(ValueError, match="index is None"):
        objective(torch.zeros(2, 1, 8, 8), torch.zeros(2).long())


def _networks() -> tuple[nn.Module, nn.Module]:
    return resnet(8, in_channels=1, seed=1), resnet(8, in_channels=1, seed=2)


# ---- SSKD ----------------------------------------------------------------------------------------


def sskd(**more: object) -> SSKD:
    torch.manual_seed(0)
    return SSKD(3, 4, ["f"], **more).double()  # type: ignore[arg-type]


def sskd_by_hand(method: SSKD, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
    images = len(target)
    (s, turned_s), (t, turned_t) = ((o.logits[:images], o.logits[images:]) for o in (student, teacher))  # type: ignore[union-attr]
    label, own = target.repeat(3), torch.arange(images).repeat(3)
    ours = plain.cosines(student.features["f"], method.student_head)
    theirs = plain.cosines(teacher.features["f"], method.teacher_head)
    turned = plain.selected(turned_t, label, method.turned_ratio)
    alike = plain.selected(theirs, own, method.alike_ratio)
    return {
        "task_loss": method.task_weight * F.cross_entropy(s, target),
        "kd_loss": method.kd_weight * plain.hinton(s, t, 4.0),
        "turned_loss": method.turned_weight * plain.of_rows(turned, turned_s, turned_t, 4.0),
        "alike_loss": method.feature_weight * plain.of_rows(alike, ours, theirs.detach(), method.alike_temperature),
        "head_loss": method.head_weight * F.cross_entropy(theirs, own),
    }


@pytest.mark.parametrize("shape", [(), (1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("ratios", [(1.0, 0.75), (0.5, 0.5), (0.75, 1.0), (0.3, 0.0)])
@pytest.mark.parametrize("images", [2, 5])
def test_sskd(images: int, ratios: tuple[float, float], shape: tuple[int, ...]) -> None:
    method = sskd(turned_ratio=ratios[0], alike_ratio=ratios[1])
    student, teacher = outputs(1, 4 * images, 3, *shape), given(2, 4 * images, 4, *shape)
    target = torch.arange(images) % CLASSES
    loss = method(student, teacher, target)
    expected = sskd_by_hand(method, student, teacher, target)
    torch.testing.assert_close(loss.terms, {name: term.detach() for name, term in expected.items()})
    whole = torch.stack(list(expected.values())).sum()
    torch.testing.assert_close(loss.total, whole)
    assert_same(gradients(loss.total, method, student), gradients(whole, method, student))
    assert_terms_add_up(loss)


def test_sskd_of_one_image() -> None:
    method = sskd()
    student = outputs(1, 4, 3)
    loss = method(student, given(2, 4, 4), torch.tensor([1]))
    assert loss.total.isfinite()
    assert loss.terms["alike_loss"] == 0
    assert all(g.isfinite().all() for g in gradients(loss.total, method, student))


def test_only_its_own_loss_trains_the_teachers_head() -> None:
    student, teacher, target = outputs(1, 8, 3), given(2, 8, 4), torch.arange(2)
    grads = []
    for weights in ({}, {"feature_weight": 3.0}, {"head_weight": 0.0}):
        method = sskd(**weights)
        loss = method(student, teacher, target).total
        grads.append(torch.autograd.grad(loss, list(method.teacher_head.parameters())))
    assert_same(list(grads[0]), list(grads[1]))
    assert all(not g.any() for g in grads[2])


def test_the_head_learns_which_image_is_turned() -> None:
    student, teacher = _networks()
    method = create("sskd", student, teacher, torch.zeros(2, 1, 8, 8))
    images = torch.rand(6, 1, 8, 8)
    objective = Objective(method, student, teacher)
    optimizer = torch.optim.SGD(objective.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(20):
        loss, logits = objective(images, torch.arange(6))
        assert logits.shape == (6, 10)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.terms["head_loss"].item())
    assert losses[-1] < losses[0]


def test_views_are_quarter_turns() -> None:
    images = torch.arange(8.0).reshape(2, 1, 2, 2)
    views = sskd().views(images)
    assert torch.equal(views[:2], images)
    assert views[2::2].flatten(1).tolist() == [[1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1]]
    assert torch.equal(views[3::2], views[2::2] + 4)


def test_step_returns_the_logits_of_upright_images() -> None:
    student, teacher = _networks()
    method = create("sskd", student, teacher, torch.zeros(2, 1, 8, 8))
    images, target = torch.randn(3, 1, 8, 8), torch.arange(3)
    taps = FeatureTap(student, method.layers), FeatureTap(teacher.eval(), method.teacher_layers)
    loss, logits = method.step(*taps, images, target)
    views = method.views(images)
    torch.testing.assert_close(logits, student(views)[:3])
    torch.testing.assert_close(method(taps[0](views), taps[1](views), target).total, loss.total)


@pytest.mark.parametrize("weight", ["task_weight", "kd_weight", "turned_weight", "feature_weight"])
def test_sskd_with_one_weight_of_0(weight: str) -> None:
    names = {"task_weight": {"task_loss"}, "kd_weight": {"kd_loss"}, "turned_weight": {"turned_loss"}}
    gone = names.get(weight, {"alike_loss", "head_loss"})
    method, student = sskd(**{weight: 0.0}), outputs(1, 8, 3)
    teacher = given(2, 8, 4)
    if weight == "feature_weight":
        teacher = Outputs(teacher.logits)
    loss = method(student, teacher, torch.arange(2))
    assert set(loss.terms) == {"task_loss", "kd_loss", "turned_loss", "alike_loss", "head_loss"} - gone
    loss.total.backward()
    assert all(p.grad is not None for p in method.parameters())


def test_sskd_without_a_teacher() -> None:
    method = sskd(kd_weight=0.0, turned_weight=0.0, feature_weight=0.0)
    assert not method.reads_teacher
    student = outputs(1, 8, 3)
    loss = method(Outputs(student.logits), None, torch.arange(2))
    torch.testing.assert_close(loss.total, 0.1 * F.cross_entropy(student.logits[:2], torch.arange(2)))  # type: ignore[index]
    alone = sskd(task_weight=0.0, kd_weight=0.0, turned_weight=0.0)
    wrong = Outputs(torch.full((8, CLASSES), torch.nan), given(2, 8, 4).features)
    assert set(alone(student, wrong, None).terms) == {"alike_loss", "head_loss"}
    assert sskd(kd_weight=0.0, feature_weight=0.0).reads_teacher


def test_sskd_under_autocast() -> None:
    method = sskd().float()
    pair = [Outputs(o.logits.bfloat16(), {"f": o.features["f"].bfloat16()}) for o in (given(1, 8, 3), given(2, 8, 4))]  # type: ignore[union-attr]
    wide = [Outputs(o.logits.float(), {"f": o.features["f"].float()}) for o in pair]  # type: ignore[union-attr]
    expected = method(*wide, torch.arange(2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(*pair, torch.arange(2))
    torch.testing.assert_close(loss.terms, expected.terms, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.7, 0.75, 1.0])
def test_chosen_rows(ratio: float) -> None:
    """As the authors count: ``int(wrong * ratio)`` of the wrong ones; of equal ranks the first."""
    generator = torch.Generator().manual_seed(1)
    for n in (1, 2, 10, 31):
        scores, right = torch.randn(n, 4, generator=generator), torch.randint(4, (n,), generator=generator)
        expected = plain.selected(scores, right, ratio)
        assert chosen(scores, right, ratio).nonzero()[:, 0].tolist() == sorted(expected)
    nothing = torch.zeros(3, 2)
    nothing[:, 1] = 1.0
    assert chosen(nothing, torch.zeros(3).long(), 0.0).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sskd().views(torch.zeros(2, 1, 4, 5)),
            r"images has shape \(2, 1, 4, 5\), must be \[B, C, N, N\] for SSKD",
        ),
        (lambda: sskd()(outputs(1, 6, 3), given(2, 6, 4), torch.zeros(1).long()), r"\(6, 5\), must be \[4 B, K\]"),
        (lambda: sskd()(outputs(1, 8, 3), None, torch.arange(2)), "teacher is None, must be its outputs for SSKD"),
        (lambda: sskd()(outputs(1, 8, 3), given(2, 8, 4), torch.arange(8)), r"target has shape \(8,\), must be \(2,\)"),
        (lambda: sskd()(outputs(1, 8, 3), given(2, 8, 4), torch.tensor([0, 7])), "target holds 7"),
        (lambda: sskd(turned_ratio=1.5), r"turned_ratio is 1.5, must be in \[0, 1\]"),
    ],
)
def test_what_sskd_refuses(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
