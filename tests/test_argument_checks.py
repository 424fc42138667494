"""What every entry refuses, argument by argument: shapes, dtypes and numbers, at construction and at the call alike.

One table an operator, of its entries, and of what is given; an error is a TypeError or ValueError of fastkd's that names the
argument, and what is not refused is written down as accepted.
"""

from __future__ import annotations

import fractions
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from refusals import DTYPES, FLOATS, INF, NAN, refuses
from torch import Tensor, nn

import fastkd
from fastkd import statistics
from fastkd.methods import (
    AT,
    BSS,
    CRD,
    DIST,
    DKD,
    DML,
    FSP,
    ONE,
    RKD,
    SP,
    SRD,
    SSKD,
    Baseline,
    Cohort,
    FeatureTap,
    FitNet,
    Hinton,
    JointLogits,
    Method,
    MultiBranch,
    Objective,
    Outputs,
)

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

# ---- methods ------------------------------------------------------------------------------------

B, K = 4, 3
TARGET = torch.arange(B) % K
FEATURES: dict[str, Callable[[], Method]] = {
    "fitnet": lambda: FitNet(2, 2, ["a"], kd_weight=1.0),
    "srd": lambda: SRD(2, 2, ["a"]),
    "fsp": lambda: FSP(["a", "b"]),
    "at": lambda: AT(["a"], kd_weight=1.0),
    "sp": lambda: SP(["a"], kd_weight=1.0),
    "rkd": lambda: RKD(25, 50, ["a"], kd_weight=1.0),
}
METHODS: dict[str, Callable[[], Method]] = {
    "baseline": Baseline,
    "hinton": Hinton,
    "hinton, no labels": lambda: Hinton(task_weight=0.0),
    "logit-std": lambda: Hinton(standardize=True),
    "dkd": DKD,
    "dist": DIST,
    "bss": BSS,
    "one": ONE,
    "dml": DML,
    **FEATURES,
}


def given() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        side: {
            "logits": torch.randn(B, K, generator=generator),
            "a": torch.randn(B, 2, 4, 4, generator=generator),
            "b": torch.randn(B, 2, 4, 4, generator=generator),
        }
        for side in ("student", "teacher")
    }


def run(method: Method, sides: dict[str, Any], target: Any = TARGET, progress: Any = 0.0) -> Any:
    student, teacher = (Outputs(s["logits"], {"a": s["a"], "b": s["b"]}) for s in sides.values())
    if isinstance(method, (ONE, DML)):
        student = Outputs(JointLogits([student.logits, torch.zeros(B, K), torch.zeros(B, K)]))
    return method(student, teacher, target, progress)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", METHODS)
def test_dtypes_of_methods(name: str, dtype: torch.dtype) -> None:
    method = METHODS[name]()
    for side in ("student", "teacher"):
        for what in ("logits", *method.layers):
            sides = given()
            sides[side][what] = sides[side][what].to(dtype)
            if side == "teacher" and what == "logits" and not (method.reads_teacher and method.needs_teacher):
                assert run(method, sides).total.isfinite()
            else:
                named = f"{side}.logits.* has dtype" if what == "logits" else f"the {side}'s layer '{what}' has dtype"
                refuses(named, lambda s=sides: run(method, s))
    if name == "hinton, no labels":
        assert run(method, given(), TARGET.to(dtype)).total.isfinite()
    elif dtype != torch.int64:
        refuses("target has dtype", lambda: run(method, given(), TARGET.to(dtype)))


@pytest.mark.parametrize("name", METHODS)
def test_a_target_of_floats(name: str) -> None:
    """Labels as floats, and probabilities, which torch's cross-entropy would take."""
    method = METHODS[name]()
    for target in (TARGET.float(), torch.full((B, K), 1 / K), TARGET.double()):
        if name != "hinton, no labels":
            refuses("target has dtype", lambda t=target: run(method, given(), t))
    if name != "hinton, no labels":
        for target in (TARGET.tolist(), None, TARGET.numpy()):
            refuses("target is", lambda t=target: run(method, given(), t))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", METHODS)
def test_float_dtypes_of_methods(name: str, dtype: torch.dtype) -> None:
    sides = {side: {what: x.to(dtype) for what, x in s.items()} for side, s in given().items()}
    method = METHODS[name]()
    if isinstance(method, (ONE, DML)):
        logits = JointLogits([sides["student"]["logits"]] * 3)
        assert method(Outputs(logits), None, TARGET).total.isfinite()
    else:
        assert run(method.to(dtype), sides).total.isfinite()


@pytest.mark.parametrize("progress", [-0.1, 1.1, NAN, INF, "0.5", None, torch.tensor(0.5), 1j, [0.5]])
@pytest.mark.parametrize("name", METHODS)
def test_progress(name: str, progress: Any) -> None:
    refuses("progress is", lambda: run(METHODS[name](), given(), progress=progress))
    for good in (0, 1, np.float32(0.5), fractions.Fraction(1, 3)):
        assert run(METHODS[name](), given(), progress=good).total.isfinite()


# ---- constructors of methods: what is refused at the call is refused there ----------------------

NUMBERS: list[Any] = [-1.0, NAN, INF, -INF, "1", None, 1j, [1.0], torch.tensor(1.0), torch.tensor([1.0]), 10**400]
ABOVE: list[Any] = [*NUMBERS, 0, 0.0, -0.0]
COUNTS: list[Any] = [0, -1, 1.5, 2.0, NAN, "2", None, True, torch.tensor(2.0), [2]]
MAKERS: dict[str, Callable[..., Any]] = {
    "Hinton": Hinton,
    "BSS": BSS,
    "FitNet": lambda **more: FitNet(**{"student_channels": 2, "teacher_channels": 2, "layers": ["a"], **more}),
    "SRD": lambda **more: SRD(**{"student_channels": 2, "teacher_channels": 2, "layers": ["a"], **more}),
    "CRD": lambda **more: CRD(**{"items": 9, "student_channels": 2, "teacher_channels": 2, "layers": ["a"], **more}),
    "SSKD": lambda **more: SSKD(**{"student_channels": 2, "teacher_channels": 2, "layers": ["a"], **more}),
    "DKD": DKD,
    "DIST": DIST,
    "FSP": lambda **more: FSP(**{"layers": ["a", "b"], **more}),
    "AT": lambda **more: AT(**{"layers": ["a"], **more}),
    "SP": lambda **more: SP(**{"layers": ["a"], **more}),
    "RKD": lambda **more: RKD(**{"layers": ["a"], **more}),
    "ONE": ONE,
    "DML": DML,
    "MultiBranch": lambda **more: MultiBranch(
        **{"trunk": nn.Identity(), "branches": [nn.Linear(2, 2), nn.Linear(2, 2)], "channels": 2, **more}
    ),
}
WEIGHTED = ("Hinton", "FitNet", "SRD", "FSP", "AT", "SP", "RKD", "CRD", "SSKD")
CHANNELS = ("FitNet", "SRD", "CRD", "SSKD")
SETTINGS: list[tuple[str, str, list[Any]]] = [
    *[(name, argument, NUMBERS) for name in WEIGHTED for argument in ("task_weight", "kd_weight")],
    *[(name, "feature_weight", NUMBERS) for name in WEIGHTED[1:]],
    *[(name, "temperature", ABOVE) for name in (*WEIGHTED, "DKD", "DIST", "BSS", "ONE", "DML")],
    *[(name, "standardize", [None, 1, 0, "no", torch.tensor(True)]) for name in (*WEIGHTED, "DKD")],
    *[("DKD", argument, NUMBERS) for argument in ("task_weight", "target_weight", "others_weight")],
    ("DKD", "warmup_share", [*NUMBERS, 1.1]),
    *[("DIST", argument, NUMBERS) for argument in ("task_weight", "inter_weight", "intra_weight")],
    ("SRD", "exponent", [*NUMBERS, 0.5]),
    *[("CRD", argument, COUNTS) for argument in ("negatives", "embedding")],
    ("CRD", "items", [*COUNTS, 1]),
    ("CRD", "nce_temperature", ABOVE),
    ("CRD", "memory_momentum", [*NUMBERS, 1.0]),
    *[("SSKD", argument, NUMBERS) for argument in ("turned_weight", "head_weight")],
    *[("SSKD", argument, [*NUMBERS, 1.1]) for argument in ("turned_ratio", "alike_ratio")],
    ("SSKD", "alike_temperature", ABOVE),
    ("BSS", "temperature", [1e-30, 1e30, 1e200, 1e-320]),
    *[("RKD", argument, NUMBERS) for argument in ("distance_weight", "angle_weight")],
    ("BSS", "step_size", ABOVE),
    *[("BSS", argument, COUNTS) for argument in ("attack_size", "attack_steps")],
    ("BSS", "bounds", [None, 1.0, "ab", (1.0,), (1, 2, 3), (2, 1), (1, 1), (NAN, 1), ("a", "b"), (torch.zeros(2))]),
    *[(name, argument, COUNTS) for name in CHANNELS for argument in ("student_channels", "teacher_channels")],
    ("ONE", "branches", [*COUNTS, 1]),
    ("ONE", "ramp_share", [*NUMBERS, 1.1]),
    ("ONE", "branch_at", [None, 3, b"layer3", ["layer3"]]),
    ("DML", "networks", [*COUNTS, 1]),
    ("MultiBranch", "trunk", [None, 3, "trunk", lambda x: x]),
    ("MultiBranch", "branches", [None, 3, "ab", [], [nn.Identity()], [1, 2], [nn.Identity(), None]]),
    ("MultiBranch", "channels", COUNTS),
    ("MultiBranch", "seed", [1.5, "1", None, True]),
    *[
        (name, argument, [3, "a", b"a", {"a"}, [1], [None], *([] if name in ("FSP", "AT") else [["a", "b", "c"]])])
        for name in WEIGHTED[1:]
        for argument in ("layers", "teacher_layers")
    ],
]


@pytest.mark.parametrize(("name", "argument", "values"), SETTINGS)
def test_constructors(name: str, argument: str, values: list[Any]) -> None:
    for value in values:
        refuses(argument, lambda v=value: MAKERS[name](**{argument: v}))


def test_modules_of_cohorts_and_objectives() -> None:
    for wrong in (None, 3, "ab", [], [nn.Identity()], [1, 2]):
        refuses("networks", lambda w=wrong: Cohort(w))
    linear = nn.Linear(2, 2)
    refuses("method is 'hinton'", lambda: Objective("hinton", linear, linear))  # type: ignore[arg-type]
    refuses("student is int", lambda: Objective(Baseline(), 3))  # type: ignore[arg-type]
    refuses("teacher is function", lambda: Objective(Hinton(), linear, refuses))  # type: ignore[arg-type]
    refuses("model is int", lambda: FeatureTap(3))  # type: ignore[arg-type]
    for wrong in (None, 3, "a", {"a"}, [1]):
        refuses("layers", lambda w=wrong: FeatureTap(nn.Sequential(linear), w))


@pytest.mark.parametrize("temperature", [1e-18, 1e-6, 1, 1e6, 1e18])
def test_temperatures_of_bss(temperature: float) -> None:
    """What it takes it can compute."""
    assert run(BSS(temperature), given()).total.isfinite()


# the module, the function and the method take and refuse the same numbers (tensors: the first two alone)
TEMPERATURES: list[Any] = [
    0,
    -1,
    NAN,
    INF,
    "4",
    None,
    4j,
    [4.0],
    np.ones(2),
    4,
    4.0,
    np.float32(4),
    fractions.Fraction(4),
    True,
]


@pytest.mark.parametrize("temperature", TEMPERATURES, ids=repr)
def test_temperatures_of_all_entries(temperature: Any) -> None:
    s, t = given()["student"]["logits"], given()["teacher"]["logits"]
    entries = (
        lambda: fastkd.functional.kd_loss(s, t, TARGET, temperature, 0.9),
        lambda: fastkd.KDLoss(temperature)(s, t, TARGET),
        lambda: Hinton(temperature)(Outputs(s), Outputs(t), TARGET).total,
    )
    results = []
    for entry in entries:
        try:
            results.append(entry())
        except (TypeError, ValueError, RuntimeError) as error:
            results.append("refused" if "fastkd: temperature is" in str(error) else str(error))
    assert all(r == results[0] if isinstance(r, str) else torch.allclose(r, results[0]) for r in results), results


# ---- statistics, scores, patches ----------------------------------------------------------------

COUNTED, RELEVANT = torch.tensor([3, 0, 1, 2]), torch.tensor([True, False, True, False])
SHARES, SCORES = COUNTED / 6, torch.tensor([0.5, 0.1, 0.2, -INF])
IMAGES, OFFSETS, FLIP = torch.rand(2, 3, 8, 8), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
INT64, BOOL = [torch.int64], [torch.bool]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
# entry and argument: a right value, the dtypes that it takes, the call, whether only its own shape will do
TENSORS: dict[str, tuple[Tensor, list[torch.dtype], Callable[[Any], object], bool]] = {
    "draw_counts indices": (COUNTED, INT64, lambda x: statistics.draw_counts(x, 4), False),
    "draw_counts out": (
        COUNTED,
        INT64,
        lambda x: statistics.draw_counts(COUNTED, out=x.clone() if torch.is_tensor(x) else x),
        True,
    ),
    "skip_ratio counts": (COUNTED, INT64, statistics.skip_ratio, True),
    "uniformity counts": (COUNTED, INT64, statistics.uniformity, True),
    "expected_skip_ratio probabilities": (SHARES, FLOATS, lambda x: statistics.expected_skip_ratio(x, 6), True),
    "expected_skip_ratio draws": (torch.tensor(6), INTEGERS, lambda x: statistics.expected_skip_ratio(SHARES, x), True),
    "irrelevant_proportion counts": (COUNTED, INT64, lambda x: statistics.irrelevant_proportion(x, RELEVANT), True),
    "irrelevant_proportion relevant": (RELEVANT, BOOL, lambda x: statistics.irrelevant_proportion(COUNTED, x), True),
    "relevant_draws counts": (COUNTED, INT64, lambda x: statistics.relevant_draws(x, RELEVANT), True),
    "relevant_draws relevant": (RELEVANT, BOOL, lambda x: statistics.relevant_draws(COUNTED, x), True),
    "effective_sample_size weights": (SHARES, FLOATS + INTEGERS, statistics.effective_sample_size, True),
    "underflowed scores": (SCORES, FLOATS, lambda x: statistics.underflowed(x, COUNTED), True),
    "underflowed weights": (COUNTED, INT64, lambda x: statistics.underflowed(SCORES, x), True),
    "underflow_ratio scores": (SCORES, FLOATS, lambda x: statistics.underflow_ratio(x, COUNTED), True),
    "underflow_ratio weights": (COUNTED, INT64, lambda x: statistics.underflow_ratio(SCORES, x), True),
    "t1000 logits": (torch.rand(2, 3), FLOATS, fastkd.scores.t1000, False),
    "random_patches images": (IMAGES, [*FLOATS, *INTEGERS, *BOOL], lambda x: fastkd.random_patches(x, 4), True),
    "random_crop_flip images": (IMAGES, [*FLOATS, torch.uint8], fastkd.random_crop_flip, True),
    "crop_patches images": (IMAGES, [*FLOATS, *INTEGERS, *BOOL], lambda x: fastkd.crop_patches(x, OFFSETS, 4), True),
    "crop_patches offsets": (OFFSETS, INT64, lambda x: fastkd.crop_patches(IMAGES, x, 4), True),
    "crop_patches flip": (FLIP, BOOL, lambda x: fastkd.crop_patches(IMAGES, OFFSETS, 4, flip=x), True),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name: str) -> None:
    value, dtypes, call, one_shape = TENSORS[name]
    argument = name.split()[1]
    for dtype in {*DTYPES, *FLOATS, *INTEGERS}:
        if dtype in dtypes:
            call(value.to(dtype))
        else:
            refuses(f"{argument} has dtype", lambda d=dtype: call(value.to(d)))
    for wrong in (None, "a", 1.5) if argument != "flip" else ("a", 1.5):
        refuses(argument, lambda w=wrong: call(w))
    for shape in (value[None], value[..., None]) if one_shape else ():
        refuses(f"{argument} has shape", lambda s=shape: call(s))


LAYOUTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "sparse": ("has layout torch.sparse_coo", Tensor.to_sparse),
    "nested": ("is nested, of layout torch.strided", lambda x: torch.nested.nested_tensor([x, x])),
    "jagged": ("is nested, of layout torch.jagged", lambda x: torch.nested.nested_tensor([x], layout=torch.jagged)),
    "mkldnn": ("has layout torch._mkldnn", lambda x: x.float().to_mkldnn()),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:.*sparse")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TENSORS)
def test_layouts(name: str, layout: str) -> None:
    value, dtypes, call, _ = TENSORS[name]
    said, made = LAYOUTS[layout]
    if value.dim() and not (layout == "mkldnn" and torch.float32 not in dtypes):
        refuses(f"{name.split()[1]} {said}, must be a dense tensor", lambda: call(made(value)))


PAIRS = ("irrelevant_proportion relevant", "relevant_draws relevant", "underflowed weights", "underflow_ratio weights")


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("items", [0, 1, 3, 5])
def test_one_for_each_item(name: str, items: int) -> None:
    """One would broadcast to all."""
    value, _, call, _ = TENSORS[name]
    refuses(f"{name.split()[1]} has shape", lambda: call(torch.cat([value, value])[:items]))


def test_no_items_at_all() -> None:
    assert statistics.effective_sample_size(torch.zeros(0)).isnan()
    assert statistics.skip_ratio(torch.zeros(0, dtype=torch.int64)).isnan()


SCALARS: list[tuple[str, list[Any], Callable[[Any], object]]] = [
    ("draws", [-1, 1.5, NAN, "6", True, 2**63, 2**70], lambda v: statistics.expected_skip_ratio(SHARES, v)),
    ("items", [-1, 1.5, "6", True, 2**60, 2**62, 2**70], lambda v: statistics.draw_counts(COUNTED, v)),
    (
        "size",
        [0, -1, 1.5, "44", True, None, 2**60, 2**70, (4,), (4, 4, 4), (4, 1.5), (True, 4), torch.tensor(4.0)],
        lambda v: fastkd.random_patches(IMAGES, v),
    ),
    (
        "size",
        [0, -1, 1.5, "44", True, None, 2**60, 2**70, (4, 2**70)],
        lambda v: fastkd.crop_patches(IMAGES, OFFSETS, v),
    ),
    ("patches_per_image", [*COUNTS, 2**60, 2**70], lambda v: fastkd.random_patches(IMAGES, 4, v)),
    (
        "padding",
        [-1, 2**29, 2**31, 2**60, 2**70, 1.5, "1", True, None],
        lambda v: fastkd.random_patches(IMAGES, 4, padding=v),
    ),
    ("padding", [-1, 2**29, 2**31, 2**60, 2**70, 1.5, "1", True, None], lambda v: fastkd.random_crop_flip(IMAGES, v)),
    (
        "flip_probability",
        [-0.1, 1.1, NAN, "0.5", None, torch.tensor(0.5)],
        lambda v: fastkd.random_crop_flip(IMAGES, flip_probability=v),
    ),
    (
        "mean",
        ["a", "abc", 1j, [1, 2], [None] * 3, NAN, INF, [1, 2, NAN], torch.ones(3)],
        lambda v: fastkd.random_crop_flip(IMAGES, mean=v),
    ),
    (
        "std",
        [0, -1.0, "a", 1j, [1, 2], [None] * 3, NAN, INF, 1e-320, torch.ones(3)],
        lambda v: fastkd.random_crop_flip(IMAGES, std=v),
    ),
    (
        "dtype",
        [torch.int64, torch.bool, torch.complex64, "float32"],
        lambda v: fastkd.random_crop_flip(IMAGES, dtype=v),
    ),
    ("generator", [3, "cpu", torch.zeros(1)], lambda v: fastkd.random_patches(IMAGES, 4, generator=v)),
]


@pytest.mark.parametrize(("argument", "values", "call"), SCALARS)
def test_scalars(argument: str, values: list[Any], call: Callable[[Any], object]) -> None:
    for value in values:
        refuses(argument, lambda v=value: call(v))


def test_numpy_numbers_are_numbers() -> None:
    fastkd.random_patches(IMAGES, np.int64(4), np.int32(2), padding=np.int64(1))
    fastkd.random_crop_flip(IMAGES, np.int64(1), (np.int64(4), 4), np.float32(0.5), np.float32(0.5), np.ones(3))
    assert statistics.draw_counts(COUNTED, np.int64(4)).shape == (4,)
