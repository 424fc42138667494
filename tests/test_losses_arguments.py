"""What the losses refuse, in calls and at construction, and with which words."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastkd
import fastkd.functional as F  # noqa: N812

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.cuda_kernels]

Error = tuple[dict[str, object], type[Exception], tuple[str, ...]]
S, T = torch.zeros(3, 5), torch.zeros(3, 5)
LABELS = torch.zeros(3, dtype=torch.long)
LEARNED = torch.ones(3, requires_grad=True)
# what differs from a valid call, and what the message must hold: the argument, what was given, what is allowed
ERRORS: dict[str, Error] = {
    "list": ({"student_logits": [[1.0]]}, TypeError, ("student_logits", "list", "tensor")),
    "teacher list": ({"teacher_logits": None}, TypeError, ("teacher_logits", "NoneType", "tensor")),
    "0-d": ({"student_logits": S[0, 0], "teacher_logits": T[0, 0]}, ValueError, ("student_logits", "()", "classes")),
    "no class": ({"student_logits": S[:, :0], "teacher_logits": T[:, :0]}, ValueError, ("(3, 0)", "classes > 0")),
    "vocabulary": ({"teacher_logits": T[:, :4]}, ValueError, ("teacher_logits", "(3, 4)", "(3, 5)", "vocabular")),
    "rows": ({"teacher_logits": T[:2]}, ValueError, ("teacher_logits", "(2, 5)", "(3, 5)")),
    "integers": (
        {"student_logits": S.long(), "teacher_logits": T.long()},
        TypeError,
        ("student_logits", "int64", "float32, float64, bfloat16 or float16"),
    ),
    "teacher elsewhere": ({"teacher_logits": T.to("meta")}, ValueError, ("teacher_logits is on meta", "be where")),
    "T = 0": ({"temperature": 0}, ValueError, ("temperature is 0", "positive and finite")),
    "T < 0": ({"temperature": -1.5}, ValueError, ("temperature is -1.5", "positive and finite")),
    "T nan": ({"temperature": math.nan}, ValueError, ("temperature is nan", "positive and finite")),
    "T inf": ({"temperature": math.inf}, ValueError, ("temperature is inf", "positive and finite")),
    "T string": ({"temperature": "4"}, TypeError, ("temperature is str", "number")),
    "T none": ({"temperature": None}, TypeError, ("temperature is NoneType", "number")),
    "T complex": ({"temperature": 1j}, TypeError, ("temperature is complex", "number")),
    "T shape": ({"temperature": torch.ones(2)}, ValueError, ("temperature", "(2,)", "(3,)")),
    "T dtype": ({"temperature": LABELS}, TypeError, ("temperature", "int64", "float")),
    "T learned": ({"temperature": LEARNED}, ValueError, ("temperature requires grad", "temperature.detach()")),
    "weight list": ({"weight": [1.0]}, TypeError, ("weight is list", "tensor")),
    "weight shape": ({"weight": torch.ones(3, 1)}, ValueError, ("weight", "(3, 1)", "(3,)")),
    "weight dtype": ({"weight": LABELS}, TypeError, ("weight", "int64", "float")),
    "weight learned": ({"weight": LEARNED}, ValueError, ("weight requires grad", "weight.detach()")),
    "weight elsewhere": ({"weight": torch.ones(3, device="meta")}, ValueError, ("weight is on meta", "be where")),
    "target list": ({"target": [0, 1, 2]}, TypeError, ("target is list", "tensor")),
    "target shape": ({"target": LABELS[:2]}, ValueError, ("target", "(2,)", "(3,)")),
    "target dtype": ({"target": LABELS.int()}, TypeError, ("target", "int32", "int64")),
    "ignore_index": ({"target": LABELS, "ignore_index": "x"}, TypeError, ("ignore_index is str", "int")),
    "dim": ({"dim": 2}, ValueError, ("dim is 2", "from -2 to 1", "(3, 5)")),
    "dim True": ({"dim": True}, TypeError, ("dim is bool", "int")),
    "reduction": ({"reduction": "avg"}, ValueError, ("reduction is 'avg'", "none, sum, batchmean")),
    "reduction list": ({"reduction": []}, ValueError, ("reduction is []", "none, sum, batchmean")),
}
# of numbers in tensors: told where kernels read them; elsewhere they make NaN, as the tests of the divergence say
VALUES: dict[str, Error] = {
    "T rows": ({"temperature": torch.tensor([1.0, -2.0, 1.0])}, RuntimeError, ("temperature[1] is -2", "positive")),
    "target high": ({"target": LABELS + 5}, RuntimeError, ("target[0] is 5", "[0, 5)", "ignore_index (-100)")),
    "target low": ({"target": LABELS - 1}, RuntimeError, ("target[0] is -1", "[0, 5)", "ignore_index (-100)")),
}
SPECIFIC: dict[str, tuple[str, dict[str, object], type[Exception], tuple[str, ...]]] = {
    "direction": ("kl_div", {"direction": "sideways"}, ValueError, ("direction is 'sideways'", "forward, reverse")),
    "kd direction": ("kd_loss", {"direction": None}, ValueError, ("direction is None", "forward, reverse")),
    "beta": ("js_div", {"beta": 1.5}, ValueError, ("beta is 1.5", "[0, 1]")),
    "beta nan": ("js_div", {"beta": math.nan}, ValueError, ("beta is nan", "[0, 1]")),
    "beta string": ("js_div", {"beta": "x"}, TypeError, ("beta is str", "number")),
    "alpha": ("kd_loss", {"alpha": -0.1}, ValueError, ("alpha is -0.1", "[0, 1]")),
    "alpha tensor": ("kd_loss", {"alpha": LEARNED}, TypeError, ("alpha is Tensor", "number")),
    "no target": ("kd_loss", {"target": None}, TypeError, ("target is NoneType", "tensor")),
    "mean": ("kd_loss", {"reduction": "mean"}, ValueError, ("reduction is 'mean'", "'batchmean', 'sum' or 'none'")),
}


def check_error(
    function: str,
    change: dict[str, object],
    error: type[Exception],
    parts: tuple[str, ...],
    device: torch.device,
) -> None:
    arguments = {"student_logits": S, "teacher_logits": T, **({"target": LABELS} if function == "kd_loss" else {})}
    arguments |= change
    for name, value in arguments.items():
        if isinstance(value, Tensor) and not value.is_meta:
            arguments[name] = value.to(device)
    with pytest.raises(error) as caught:
        getattr(F, function)(**arguments)
    message = str(caught.value)
    assert message.startswith("fastkd: ")
    for part in parts:
        assert part in message


FUNCTIONS = ["kl_div", "js_div", "soft_cross_entropy", "kd_loss"]


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_errors(function: str, case: Error, device: torch.device) -> None:
    check_error(function, *case, device)


@pytest.mark.parametrize("case", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_errors_of_values(function: str, case: Error, cpu: torch.device) -> None:
    check_error(function, *case, cpu)


@pytest.mark.parametrize("case", SPECIFIC.values(), ids=SPECIFIC)
def test_errors_of_one_function(
    case: tuple[str, dict[str, object], type[Exception], tuple[str, ...]], device: torch.device
) -> None:
    check_error(*case, device)


# ---- what a constructor takes, a call takes -------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    f"{name} {what}": (lambda make=make, value=value: make(value), error, message)
    for name, make in {
        "KLDivLoss": fastkd.KLDivLoss,
        "JSDivLoss": fastkd.JSDivLoss,
        "KDLoss": fastkd.KDLoss,
        "kl_div": lambda t: F.kl_div(S, T, t),
        "js_div": lambda t: F.js_div(S, T, t),
        "kd_loss": lambda t: F.kd_loss(S, T, LABELS, t),
        "soft_cross_entropy": lambda t: F.soft_cross_entropy(S, T, t),
    }.items()
    for what, (value, error, message) in {
        "T = 0": (0, ValueError, "temperature is 0, must be positive"),
        "T nan": (math.nan, ValueError, "temperature is nan, must be positive"),
        "T True": (True, TypeError, "temperature is bool, must be a number"),
        "T 10^400": (10**400, ValueError, "temperature is 1000"),
        "T string": ("4", TypeError, "temperature is str, must be a number"),
        "T of dtype int64": (torch.tensor(4), TypeError, "temperature has dtype torch.int64"),
        "T learned": (torch.tensor(4.0, requires_grad=True), ValueError, "temperature requires grad"),
    }.items()
} | {
    f"{name} tensor {value}": (
        lambda make=make, value=value: make(torch.tensor([1.0, value])),
        ValueError,
        "temperature is .*must be positive and finite",
    )
    for name, make in {"KLDivLoss": fastkd.KLDivLoss, "JSDivLoss": fastkd.JSDivLoss, "KDLoss": fastkd.KDLoss}.items()
    for value in (0.0, -1.0, math.nan, math.inf)
}
REFUSED |= {
    "ignore_index string": (lambda: fastkd.KLDivLoss(ignore_index="a"), TypeError, "ignore_index is str"),
    "ignore_index float": (lambda: fastkd.JSDivLoss(ignore_index=1.5), TypeError, "ignore_index is float"),
    "ignore_index True": (lambda: fastkd.KDLoss(ignore_index=True), TypeError, "ignore_index is bool"),
    "ignore_index 2^70": (lambda: fastkd.KLDivLoss(ignore_index=2**70), ValueError, "ignore_index is"),
    "kl_div ignore_index 2^70": (lambda: F.kl_div(S, T, ignore_index=2**70), ValueError, "ignore_index is"),
    "dim float": (lambda: fastkd.KDLoss(dim=1.0), TypeError, "dim is float"),
    "KDLoss mean": (lambda: fastkd.KDLoss(reduction="mean"), ValueError, "reduction is 'mean'"),
    "beta": (lambda: fastkd.JSDivLoss(beta=True), TypeError, "beta is bool"),
    "alpha": (lambda: fastkd.KDLoss(alpha=math.nan), ValueError, "alpha is nan"),
    "RelationLoss": (lambda: fastkd.RelationLoss(-1.0), ValueError, "distance_weight is -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_constructors_refuse_what_calls_refuse(name: str) -> None:
    make, error, message = REFUSED[name]
    with pytest.raises(error, match="fastkd: .*" + message):
        make()


def calls_with(name: str, odd: Tensor) -> dict[str, Callable[[], object]]:
    """By the argument that is odd."""
    if name == "logit_stats":
        return {"logits": lambda: F.logit_stats(odd)}
    rest = (LABELS,) if name == "kd_loss" else ()
    what = "features" if name == "relation_loss" else "logits"
    return {
        f"student_{what}": lambda: getattr(F, name)(odd, T, *rest),
        f"teacher_{what}": lambda: getattr(F, name)(S, odd, *rest),
    }


@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:.*[Ss]parse")
@pytest.mark.parametrize(
    "made",
    [
        Tensor.to_sparse,
        Tensor.to_sparse_csr,
        Tensor.to_mkldnn,
        lambda x: torch.nested.nested_tensor(list(x)),
        lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    ],
    ids=["sparse", "CSR", "MKLDNN", "nested", "jagged"],
)
@pytest.mark.parametrize("name", ["kl_div", "js_div", "soft_cross_entropy", "kd_loss", "relation_loss", "logit_stats"])
def test_layouts(name: str, made: Callable[[Tensor], Tensor]) -> None:
    for argument, call in calls_with(name, made(S)).items():
        with pytest.raises(TypeError, match=f"fastkd: {argument} .*layout torch.*, must be a dense tensor"):
            call()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int32, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", ["kl_div", "js_div", "soft_cross_entropy", "kd_loss", "relation_loss", "logit_stats"])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """A teacher of one-hot integers is no logits."""
    odd = nn.functional.one_hot(LABELS, 5).to(dtype)
    rest = (LABELS,) if name == "kd_loss" else ()
    calls = calls_with(name, odd)
    if name in ("kl_div", "js_div", "soft_cross_entropy", "kd_loss"):
        calls["weight"] = lambda: getattr(F, name)(S, T, *rest, weight=odd[:, 0])
        calls["temperature"] = lambda: getattr(F, name)(S, T, *rest, temperature=odd[:, 0])
    if name in ("kl_div", "js_div", "soft_cross_entropy") and dtype != torch.int64:
        calls["target"] = lambda: getattr(F, name)(S, T, target=odd[:, 0])
    for argument, call in calls.items():
        with pytest.raises(TypeError, match=f"fastkd: {argument} has dtype {dtype}, must be"):
            call()
