"""The losses as users call them: modules, autograd, compilation, transforms, memory, errors."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastkd
import fastkd.functional as F  # noqa: N812
from fastkd.ops.divergence import divergence
from fastkd.reference import divergence as reference

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.cuda_kernels]

ROWS, CLASSES = 6, 11
TARGET, TEMPERATURES, WEIGHT = torch.tensor([0, 10, -100, 3, 4, 5]), torch.arange(1, ROWS + 1) / 2, torch.arange(6.0)
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": lambda s, t: F.kl_div(s, t, 4.0),
    "reverse": lambda s, t: F.kl_div(s, t, 4.0, direction="reverse", reduction="sum"),
    "js": lambda s, t: F.js_div(s, t, 2.0, beta=0.3, reduction="mean"),
    "js0": lambda s, t: F.js_div(s, t, 2.0, beta=0.0),
    "js1": lambda s, t: F.js_div(s, t, 2.0, beta=1.0),
    "soft_ce": lambda s, t: F.soft_cross_entropy(s, t, 2.0),
    "kd": lambda s, t: F.kd_loss(s, t, TARGET.to(s.device), 4.0, 0.7),
    "rows": lambda s, t: F.kl_div(s, t, TEMPERATURES.to(s.device), reduction="none", weight=WEIGHT.to(s.device)),
    "KLDivLoss": lambda s, t: fastkd.KLDivLoss(4.0)(s, t, TARGET.to(s.device)),
    "JSDivLoss": lambda s, t: fastkd.JSDivLoss(2.0, 0.3)(s, t, weight=WEIGHT.to(s.device)),
    "KDLoss": lambda s, t: fastkd.KDLoss()(s, t, TARGET.to(s.device)),
}
TRUTHS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": lambda s, t: reference.divergence(s, t, temperature=4.0),
    "reverse": lambda s, t: reference.divergence(s, t, temperature=4.0, kind="reverse", reduction="sum"),
    "js": lambda s, t: reference.divergence(s, t, temperature=2.0, kind="jensen_shannon", beta=0.3, reduction="mean"),
    "js0": lambda s, t: reference.divergence(s, t, temperature=2.0),
    "js1": lambda s, t: reference.divergence(s, t, temperature=2.0, kind="reverse"),
    "soft_ce": lambda s, t: reference.divergence(s, t, temperature=2.0, kind="soft_cross_entropy"),
    "kd": lambda s, t: reference.divergence(s, t, TARGET, temperature=4.0, kd_scale=0.7, task_scale=0.3),
    "rows": lambda s, t: reference.divergence(s, t, temperature=TEMPERATURES, reduction="none", weight=WEIGHT),
    "KLDivLoss": lambda s, t: reference.divergence(s, t, TARGET, temperature=4.0),
    "JSDivLoss": lambda s, t: reference.divergence(
        s, t, temperature=2.0, kind="jensen_shannon", beta=0.3, weight=WEIGHT
    ),
    "KDLoss": lambda s, t: reference.divergence(s, t, TARGET, temperature=4.0, kd_scale=0.9, task_scale=0.1),
}


@pytest.fixture
def pair(device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    s, t = torch.randn(2, ROWS, CLASSES, generator=generator, dtype=torch.float64).to(device).unbind()
    return s.requires_grad_(), t


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients(name: str, pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair[0], pair[1].requires_grad_()
    ours, expected = LOSSES[name](student, teacher).cpu(), TRUTHS[name](student.cpu(), teacher.cpu())
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn_like(expected)
    for wanted in ([student], [teacher], [student, teacher]):
        theirs = torch.autograd.grad(expected, wanted, upstream, retain_graph=True)
        mine = torch.autograd.grad(LOSSES[name](student, teacher).cpu(), wanted, upstream)
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(3 * ours.sum(), student), torch.autograd.grad(3 * expected.sum(), student)
    )


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str, pair: tuple[Tensor, Tensor], few: bool) -> None:
    assert torch.autograd.gradcheck(LOSSES[name], (pair[0], pair[1].requires_grad_()), fast_mode=few)


def test_leading_dimensions(device: torch.device, generator: torch.Generator) -> None:
    """[..., K]: one row, and sequences, with a temperature, weights and targets that have or broadcast to [...]."""
    s, t = torch.randn(2, 2, 3, CLASSES, generator=generator).to(device).unbind()
    target, temperature = torch.arange(6, device=device).reshape(2, 3), torch.tensor([[2.0], [3.0]], device=device)
    weight = torch.rand(3, generator=generator).to(device)
    options = {"temperature": temperature, "weight": weight, "reduction": "none"}
    rows, terms = F.kd_loss(s, t, target, return_terms=True, **options)
    assert rows.shape == terms["kl_div"].shape == terms["cross_entropy"].shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one = {"temperature": float(temperature[i]), "weight": weight[j], "reduction": "none"}
            row, row_terms = F.kd_loss(s[i, j], t[i, j], target[i, j], return_terms=True, **one)
            assert row.shape == ()
            torch.testing.assert_close(row, rows[i, j])
            torch.testing.assert_close(row_terms["cross_entropy"], terms["cross_entropy"][i, j])
    assert F.kl_div(s[:0], t[:0], reduction="none").shape == (0, 3)
    assert F.kl_div(s[:, :0], t[:, :0]).item() == 0.0


def test_terms_are_detached_and_unweighted(pair: tuple[Tensor, Tensor]) -> None:
    target = TARGET.to(pair[0].device)
    loss, terms = F.kd_loss(*pair, target, 4.0, 0.7, return_terms=True)
    assert not terms["kl_div"].requires_grad
    torch.testing.assert_close(terms["kl_div"], F.kl_div(*pair, 4.0, target=target).detach())
    task = nn.functional.cross_entropy(pair[0].cpu(), TARGET).detach()
    torch.testing.assert_close(terms["cross_entropy"].cpu(), task)
    torch.testing.assert_close(0.7 * terms["kl_div"] + 0.3 * terms["cross_entropy"], loss.detach())


def test_modules_copy_and_print() -> None:
    for module in (fastkd.KLDivLoss(2.0), fastkd.JSDivLoss(beta=0.3), fastkd.KDLoss(alpha=0.5)):
        assert repr(copy.deepcopy(module)) == repr(module)
        assert "temperature=" in repr(module)


# ---- autograd ----------------------------------------------------------------------------------


def test_second_backward_through_a_kept_graph(
    pair: tuple[Tensor, Tensor], device: torch.device, generator: torch.Generator
) -> None:
    """Right again, also after the first gradient was modified in place, as optimizers and clipping do."""
    for dtype in (torch.float32, torch.float16, torch.float64):
        student, teacher = pair[0].detach().to(dtype).requires_grad_(), pair[1].to(dtype)
        temperature, weight = torch.rand(2, ROWS, generator=generator).to(device).unbind()
        loss = F.kd_loss(student, teacher, TARGET.to(device), temperature + 1, weight=weight)
        (first,) = torch.autograd.grad(loss, student, retain_graph=True)
        expected = first.clone()
        first.zero_()
        for scale in (1.0, 3.0):
            (again,) = torch.autograd.grad(scale * loss, student, retain_graph=True)
            torch.testing.assert_close(again, scale * expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_gradients_accumulate(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    (F.kl_div(student, teacher) + 2 * F.js_div(student, teacher)).backward()
    F.kl_div(student, teacher).backward()
    other, teacher = student.detach().cpu().clone().requires_grad_(), teacher.cpu()
    js = reference.divergence(other, teacher, kind="jensen_shannon")
    (2 * reference.divergence(other, teacher) + 2 * js).backward()
    torch.testing.assert_close(student.grad.cpu(), other.grad)


def test_changed_logits(pair: tuple[Tensor, Tensor]) -> None:
    """No backward needs the logits any more, but for float16: autograd says so."""
    student = pair[0] * 1
    loss = F.kl_div(student, pair[1])
    (expected,) = torch.autograd.grad(F.kl_div(*pair), pair[0])
    student.zero_()
    for retain_graph in (True, True, False):
        (gradient,) = torch.autograd.grad(loss, pair[0], retain_graph=retain_graph)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    student = pair[0].half()
    loss = F.kl_div(student, pair[1].half())
    student.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_double_backward_raises(pair: tuple[Tensor, Tensor]) -> None:
    for value in (F.kl_div(*pair), F.kl_div(*pair, reduction="none").square().sum()):
        (gradient,) = torch.autograd.grad(value, pair[0], create_graph=True)
        with pytest.raises(RuntimeError, match="fused divergence cannot be differentiated again"):
            gradient.sum().backward()


def test_create_graph_alone_is_no_error(pair: tuple[Tensor, Tensor]) -> None:
    """Another loss in the same graph may have second derivatives."""
    student, teacher = pair
    (gradient,) = torch.autograd.grad(F.kl_div(student, teacher), student, create_graph=True)
    torch.testing.assert_close(gradient.detach(), torch.autograd.grad(F.kl_div(student, teacher), student)[0])


def test_inference_and_no_grad(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    expected = torch.autograd.grad(reference.divergence(student.cpu(), teacher.cpu()), student)[0]
    with torch.inference_mode():
        frozen = teacher.clone()
        weight = torch.ones(ROWS, device=teacher.device)
        assert not F.kl_div(student, frozen).requires_grad
    with torch.no_grad():
        assert not F.kl_div(student, frozen).requires_grad
    loss = F.kl_div(student, frozen, weight=weight)  # a teacher run under inference_mode, trained on outside
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(loss, student, retain_graph=True)[0], expected)


def test_autocast(device: torch.device, generator: torch.Generator) -> None:
    """Logits come as the layers made them; the loss is float32, the gradient in the dtype of the logits."""
    layer, x = nn.Linear(8, CLASSES).to(device), torch.randn(ROWS, 8, generator=generator).to(device)
    teacher = torch.randn(ROWS, CLASSES, generator=generator).to(device, torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logits = layer(x)
        logits.retain_grad()
        loss = F.kd_loss(logits, teacher, TARGET.to(device))
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad.dtype == logits.dtype == torch.bfloat16
    assert torch.isfinite(layer.weight.grad).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fastkd.KLDivLoss(temperature=0.0), "temperature is 0.0, must be positive"),
        (lambda: fastkd.JSDivLoss(temperature=float("nan")), "temperature is nan, must be positive"),
        (lambda: fastkd.KLDivLoss(direction="fwd"), "direction is 'fwd', must be one of forward, reverse"),
        (lambda: fastkd.KLDivLoss(reduction="avg"), "reduction is 'avg', must be one of none, sum"),
        (lambda: fastkd.JSDivLoss(beta=2.0), "beta is 2.0, must be in"),
        (lambda: fastkd.KDLoss(alpha=-1.0), "alpha is -1.0, must be in"),
    ],
)
def test_modules_refuse_wrong_settings_at_once(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_tensor_temperature_moves_with_its_module(pair: tuple[Tensor, Tensor]) -> None:
    criterion = fastkd.KLDivLoss(TEMPERATURES).to(pair[0])
    temperature = TEMPERATURES.to(pair[0])
    assert criterion.temperature.dtype == torch.float64
    assert torch.equal(criterion.state_dict()["temperature"], temperature)
    assert torch.equal(criterion(*pair), F.kl_div(*pair, temperature))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_dtypes_meet_in_the_wider_one(pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """A student under autocast, its teacher outside of it."""
    narrow = pair[0].detach().to(dtype).requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    teacher = pair[1].float()
    loss, expected = F.kl_div(narrow, teacher, 2.0), F.kl_div(wide, teacher, 2.0)
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(narrow.grad, wide.grad.to(dtype))


def test_nothing_is_kept_alive(pair: tuple[Tensor, Tensor]) -> None:
    """No reference cycle: logits go with the last name, collector off, whether or not backward ran."""
    gc.collect()
    gc.disable()
    try:
        for run in (lambda loss: loss.backward(), lambda loss: loss.backward(retain_graph=True), lambda loss: None):
            for dtype in (torch.float64, torch.float16):
                student = pair[0].detach().to(dtype, copy=True).requires_grad_()
                teacher = pair[1].to(dtype, copy=True)
                names = [weakref.ref(student), weakref.ref(teacher)]
                loss = F.kd_loss(student, teacher, TARGET.to(student.device))
                run(loss)
                del loss, student, teacher
                assert [name() for name in names] == [None, None]
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not [x for x in gc.garbage if type(x) is Tensor or "fastkd" in type(x).__name__]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair[0].detach(), pair[1]
    f, g = (lambda s: 3 * F.kl_div(s, teacher)), (lambda s: 3 * reference.divergence(s.cpu(), teacher.cpu()))
    torch.testing.assert_close(torch.func.grad(f)(student), torch.func.grad(g)(student))
    stacked = torch.stack([student, teacher]), torch.stack([teacher, student])
    each = torch.vmap(torch.func.grad(lambda s, t: F.js_div(s, t, 2.0)))(*stacked)
    theirs = [torch.func.grad(lambda s, t: F.js_div(s, t, 2.0))(s, t) for s, t in zip(*stacked, strict=True)]
    torch.testing.assert_close(each, torch.stack(theirs))
    for second in (
        lambda: torch.func.grad(lambda s: torch.func.grad(f)(s).sum())(student),
        lambda: torch.func.jacrev(torch.func.jacrev(f))(student),
    ):
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            second()
    for forward in (lambda: torch.func.jvp(f, (student,), (student,)), lambda: torch.func.hessian(f)(student)):
        with pytest.raises(RuntimeError, match="divergence has no forward-mode derivative"):
            forward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_tangent_in_the_gradient_is_refused(pair: tuple[Tensor, Tensor], reduction: str) -> None:
    """Torch would lose it in silence where the gradient is scaled in place."""
    student, teacher = pair[0].detach().requires_grad_(), pair[1]
    loss = F.kl_div(student, teacher, reduction=reduction)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(loss), torch.ones_like(loss))
        with pytest.raises(RuntimeError, match="divergence_backward has no forward-mode derivative"):
            torch.autograd.grad(loss, student, upstream)


# ---- compilation, registration -----------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", LOSSES)
def test_compile(name: str, dynamic: bool | None, generator: torch.Generator) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for dtype in (torch.float32, torch.float16):
        for classes in (CLASSES, CLASSES + 2):
            s, t = torch.randn(2, ROWS, classes, generator=generator).to(dtype).unbind()
            results = []
            for loss in (LOSSES[name], compiled):
                student, teacher = s.clone().requires_grad_(), t.clone().requires_grad_()
                value = loss(student, teacher)
                (2 * value).sum().backward()
                results.append((value.detach(), student.grad, teacher.grad))
            torch.testing.assert_close(results[0], results[1])


@pytest.mark.compiles
def test_compile_with_inductor(generator: torch.Generator) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def step(s: Tensor, t: Tensor) -> Tensor:
        return fastkd.KDLoss()(s * 2, t, TARGET) + F.js_div(s, t, reduction="none").square().sum()

    s, t = torch.randn(2, ROWS, CLASSES, generator=generator).unbind()
    s.requires_grad_()
    (compiled,) = torch.autograd.grad(step(s, t), s)
    (eager,) = torch.autograd.grad(step._torchdynamo_orig_callable(s, t), s)
    torch.testing.assert_close(compiled, eager)


def opcheck_cases() -> dict[str, tuple[str, tuple[object, ...]]]:
    s, t = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).unbind()
    target, rows = torch.tensor([0, -100, 6]), torch.rand(3) + 0.5
    s = s.requires_grad_()
    both = (s, t.clone().requires_grad_())
    tail = (2.0, 2, 0.3, 0.9, 0.1, -100)
    stats = torch.ops.fastkd.logit_stats(t, 2.0)
    backward = (t, 2.0, stats[1], stats[3], stats[4])
    return {
        "forward": ("divergence", (s, t, None, None, None, *tail, 2, True, False)),
        "none": ("divergence", (*both, target, rows, rows, *tail, 0, True, True)),
        "later": ("divergence", (*both, target, rows.double(), None, *tail, 3, False, False)),
        "no gradient": ("divergence", (t, t, None, None, None, *tail, 1, False, False)),
        "float16": ("divergence", (t.half(), t.half(), None, None, None, *tail, 1, True, True)),
        "scale": ("divergence_backward_", (t.clone(), torch.tensor(3.0))),
        "scale rows": ("divergence_backward_", (t.clone().bfloat16(), rows.double())),
        "stats": ("logit_stats", (s, 2.0)),
        "stats backward": ("logit_stats_backward", (*backward, rows, None, rows, rows)),
        "stats backward of one": ("logit_stats_backward", (*backward, None, rows, None, None)),
    }


@pytest.mark.parametrize("case", opcheck_cases().values(), ids=opcheck_cases())
def test_opcheck(case: tuple[str, tuple[object, ...]], device: torch.device) -> None:
    name, arguments = case
    moved = [x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in arguments]
    torch.library.opcheck(getattr(torch.ops.fastkd, name).default, tuple(moved))


def test_meta_tensors_have_the_shapes() -> None:
    student, teacher = torch.empty(2, ROWS, CLASSES, dtype=torch.bfloat16, device="meta").unbind()
    loss, terms = divergence(student, teacher, reduction="none")
    assert (loss.device.type, loss.shape, loss.dtype) == ("meta", (ROWS,), torch.float32)
    assert terms.shape == (2, ROWS)
