"""Mathematical claims, as in test_claims: of the methods and docs/methods.md, networks, data and training."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd import functional
from fastkd.data import digits
from fastkd.data.labels import symmetric_noise
from fastkd.methods import (
    AT,
    BSS,
    DKD,
    DML,
    FSP,
    ONE,
    SP,
    Baseline,
    DataFree,
    FeatureTap,
    Hinton,
    JointLogits,
    Method,
    NoisyLabels,
    Outputs,
    registry,
)
from fastkd.methods.relational import similarities
from fastkd.methods.representation import attention
from fastkd.models import registry as networks
from fastkd.models.convnet import ConvNet, count_parameters
from fastkd.models.resnet import ResNet, resnet
from fastkd.studies.demo.loop import optimize
from fastkd.training import TrainingSettings
from fastkd.training.metrics import Running
from fastkd.training.optimization import make_optimizer

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


# ---- methods, and docs/methods.md ----------------------------------------------------------------

DOCUMENT = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
ROWS = {cells[1]: cells for line in DOCUMENT.splitlines() if len(cells := [c.strip() for c in line.split("|")]) == 8}
WEIGHTS = {"r": "task_weight", "a": "kd_weight", "b": "feature_weight", "T": "temperature"}


@pytest.mark.parametrize("name", [name for name in registry.names() if issubclass(registry.find(name).kind, Method)])
def test_the_weights_of_the_documents_table_are_the_defaults(name: str) -> None:
    sized = "student_channels" in registry.find(name).options()
    settings: dict[str, Any] = {"student_channels": 1, "teacher_channels": 1} if sized else {}
    method = registry.create(name, items=50_000, **settings)
    cells = ROWS[name]
    assert cells[2] == f"`{type(method).__name__}`"
    given = re.findall(r"([rabT]) ([0-9.]+)", cells[3])
    assert given
    for letter, value in given:
        assert getattr(method, WEIGHTS[letter]) == float(value), letter
    if name.startswith("rkd"):
        weights = {"rkd-d": (25, 0), "rkd-a": (0, 50), "rkd-da": (25, 50)}[name]
        assert (method.distance_weight, method.angle_weight) == weights
        assert name == "rkd-da" or f"{max(weights)} \N{MULTIPLICATION SIGN}" in cells[4]
    times = "\N{MULTIPLICATION SIGN}"
    if name == "dkd":
        assert f"{method.target_weight:g} {times} KL" in cells[4]
        assert f"{method.others_weight:g} {times} KL" in cells[4]
        assert "19/240" in cells[4]
        assert method.warmup_share == 19 / 240
    if name == "dist":
        assert cells[4].startswith(f"T\N{SUPERSCRIPT TWO} ({method.inter_weight:g} {times} ")
        assert f"{method.intra_weight:g} {times} (1 - the same of columns)" in cells[4]
    if name == "crd":
        for number in (method.negatives, method.embedding, method.nce_temperature):
            assert f"{number}" in cells[4]
    if name == "sskd":
        assert f"{method.turned_weight:g} {times} T\N{SUPERSCRIPT TWO} KL" in cells[4]
        assert (method.turned_ratio, method.alike_ratio, method.alike_temperature) == (1.0, 0.75, 0.5)
    if name == "srd":
        assert method.exponent == 4
    if name == "one":
        assert f"first {80}/{300}" in cells[4]
        assert method.ramp_share == 80 / 300
        assert method.branches == 3
    if name == "dml":
        assert method.networks == 2


def test_the_documents_table_is_whole() -> None:
    """But for methods that make images or are for noisy labels, which are in guides of their own."""
    apart = (DataFree, NoisyLabels)
    assert {name for name in registry.names() if not issubclass(registry.find(name).kind, apart)} <= set(ROWS)


def outputs(seed: int, *features: tuple[int, ...]) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    return Outputs(logits, {f"f{i}": torch.randn(4, *s, generator=generator).double() for i, s in enumerate(features)})


def distance(method: Method, student: Outputs, teacher: Outputs) -> float:
    return method(student, teacher, torch.zeros(4, dtype=torch.int64)).terms[method.term].item()


def test_dkd_in_a_loop_that_says_no_progress_begins_with_a_twentieth() -> None:
    student, teacher, target = outputs(1), outputs(2), torch.zeros(4, dtype=torch.int64)
    first, whole = DKD()(student, teacher, target).terms, DKD(warmup_share=0.0)(student, teacher, target).terms
    assert whole["others_loss"].item() == pytest.approx(20 * first["others_loss"].item())


def test_fsp_grows_with_the_fourth_power_of_the_activations() -> None:
    method = FSP(["f0", "f1"])
    student, teacher = (outputs(seed, (2, 4, 4), (3, 4, 4)) for seed in (1, 2))
    scaled = [o._replace(features={k: 3 * f for k, f in o.features.items()}) for o in (student, teacher)]
    assert distance(method, *scaled) == pytest.approx(3**4 * distance(method, student, teacher))


@pytest.mark.parametrize("scale", [0.1, 7.0])
def test_attention_and_similarities_have_norm_1_whatever_the_scale(scale: float) -> None:
    feature = outputs(1, (3, 4, 4)).features["f0"]
    for made in (attention(feature), similarities(feature)):
        torch.testing.assert_close(made.norm(dim=1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(attention(scale * feature), attention(feature))
    torch.testing.assert_close(similarities(scale * feature), similarities(feature))


@pytest.mark.parametrize("side", [2, 4, 8])
def test_a_squared_distance_of_attention_weighs_b_over_the_places(side: int) -> None:
    student, teacher = (outputs(seed, (3, side, side)) for seed in (1, 2))
    squared = (attention(student.features["f0"]) - attention(teacher.features["f0"])).square().sum(1).mean().item()
    assert distance(AT(["f0"]), student, teacher) == pytest.approx(1000.0 / side**2 * squared)


def test_at_weighs_191_for_maps_of_14_by_14() -> None:
    images = torch.zeros(1, 1, 14, 14)
    method = registry.create("at", resnet(8, in_channels=1), resnet(8, in_channels=1, seed=1), images)
    assert f"{method.feature_weight:.0f}" == "191"
    assert "(191 for 14 \N{MULTIPLICATION SIGN} 14)" in DOCUMENT
    large = registry.create("at", resnet(8), resnet(8, seed=1), torch.zeros(1, 3, 64, 64))
    assert large.feature_weight == 1000.0


def test_sp_is_the_squared_frobenius_norm_over_b_squared() -> None:
    student, teacher = (outputs(seed, (3, 4, 4)) for seed in (1, 2))
    squared = (similarities(student.features["f0"]) - similarities(teacher.features["f0"])).norm() ** 2
    assert distance(SP(["f0"]), student, teacher) == pytest.approx(3000.0 * squared.item() / 16)


class Largest(TorchDispatchMode):
    """The largest tensor that an operator makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_the_products_of_fsp_are_never_there() -> None:
    student, teacher = (outputs(seed, (8, 6, 6), (10, 6, 6)) for seed in (1, 2))
    with Largest() as made:
        FSP(["f0", "f1"])(student, teacher, torch.zeros(4, dtype=torch.int64))
    assert made.elements < 4 * 8 * 10 * 6 * 6 / 2


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_schedule_of_bss(progress: float) -> None:
    student, teacher = outputs(1), outputs(2)
    terms = BSS()(student, teacher, torch.zeros(4, dtype=torch.int64), progress).terms
    soft = functional.soft_cross_entropy(student.logits, teacher.logits, 3.0).item() / 9.0  # type: ignore[arg-type]
    assert terms["kd_loss"].item() == pytest.approx((3 * (1 - progress) + 1) * soft)
    assert BSS().attack_weight(progress) == pytest.approx(max(2 * (1 - 4 * progress / 3), 0), abs=1e-12)


def test_the_ramp_of_one_is_from_exp_minus_5_to_1() -> None:
    method = ONE()
    ramp = [method.ramp(epoch / 300) for epoch in range(301)]
    assert ramp[0] == pytest.approx(math.exp(-5))
    assert ramp == sorted(ramp)
    assert ramp[79] < 1.0
    assert set(ramp[80:]) == {1.0}


def test_the_terms_add_up_and_are_weighted() -> None:
    student, teacher = outputs(1), outputs(2)
    target = torch.arange(4)
    one, three = (Hinton(task_weight=w, kd_weight=2 * w)(student, teacher, target) for w in (1.0, 3.0))
    for name in ("task_loss", "kd_loss"):
        assert three.terms[name].item() == pytest.approx(3 * one.terms[name].item())
    assert sum(one.terms.values()).item() == pytest.approx(one.total.item())
    assert one.terms["task_loss"].item() == pytest.approx(Baseline()(student, None, target).total.item())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dml_is_multiplied_by_the_square_of_its_temperature(temperature: float) -> None:
    joint = JointLogits(outputs(seed).logits for seed in (1, 2, 3))  # type: ignore[misc]
    mutual = DML(3, temperature=temperature)(Outputs(joint), None, torch.zeros(4, dtype=torch.int64)).terms
    log_p = [(logits / temperature).log_softmax(1) for logits in joint]
    pairs = [F.kl_div(p, q.exp(), reduction="batchmean") for p in log_p for q in log_p if p is not q]
    assert mutual["mutual_loss"].item() == pytest.approx(temperature**2 * sum(pairs).item() / 2)


def test_a_step_returns_the_logits_of_the_first_network() -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 5))

    with torch.random.fork_rng(devices=[]):
        student, images = DML().build_student(make), torch.randn(3, 1, 2, 2)
    _, logits = DML().step(FeatureTap(student), None, images, torch.arange(3))
    assert torch.equal(logits, student.networks[0](images))


def test_the_gate_of_one_begins_alike_whatever_the_networks() -> None:
    method = ONE(branches=2)
    students = [method.build_student(lambda seed, first=first: resnet(8, seed=first + seed)) for first in (0, 5)]
    assert not torch.equal(*(student.trunk[0].weight for student in students))
    for ours, theirs in zip(*(student.gate.parameters() for student in students), strict=True):
        assert torch.equal(ours, theirs)


def test_where_nothing_qualifies_for_bss_the_students_statistics_move_for_a_loss_of_0() -> None:
    images, target = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(1)), torch.zeros(4).long()
    teacher, student = (nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 5)) for _ in range(2))
    with torch.no_grad():
        teacher[2].bias[1] = 100.0  # all of another class than the labels'
    loss, _ = BSS().step(FeatureTap(student), FeatureTap(teacher.eval()), images, target)
    assert loss.terms["boundary_loss"] == 0
    assert student[0].num_batches_tracked == 2


def test_optimise_goes_down_half_a_cosine_to_zero() -> None:
    """Of a constant gradient, a step of Adam is as long as the learning rate."""
    model = nn.Linear(1, 1, bias=False)
    places = [model.weight.item()]
    optimize(
        model,
        lambda: 3 * model.weight.sum(),
        steps=20,
        learning_rate=0.5,
        weight_decay=0.0,
        on_step=lambda _: places.append(model.weight.item()),
    )
    rates = [before - after for before, after in pairwise(places)]
    assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * t / 20)) for t in range(20)], abs=1e-5)


# ---- models, data, training ----------------------------------------------------------------------


def test_sizes_of_residual_networks() -> None:
    for depth, parameters in ((8, 80e3), (110, 1.7e6)):
        with torch.device("meta"):
            network = resnet(depth)
        assert count_parameters(network) == pytest.approx(parameters, rel=0.03)
        shortcuts = sum(p.numel() for name, p in network.named_parameters() if "downsample" in name)
        assert f"{shortcuts:,} parameters fewer" in str(ResNet.__doc__)
    depths = [int(name.removeprefix("resnet")) for name in networks.TORCHVISION_RESNETS]
    assert [depth for depth in depths if depth % 6 == 2] == [50, 152]  # of either family


@pytest.mark.parametrize("stages", [2, 3, 4, 5])
def test_a_convnet_halves_the_image_after_each_half_of_its_stages(stages: int) -> None:
    x, sides = torch.zeros(1, 1, 8, 8), []
    for layer in ConvNet([2] * stages).features[:-1]:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            sides.append(x.shape[-1])
    assert sides == [8] * (stages // 2) + [4] * (stages - stages // 2)
    assert x.shape[-1] == 2


def test_variations_of_digits(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """Of two ramps, a pixel is its place in the digit; in the middle nothing outside of it is seen."""
    across = (0.5 + 0.1 * (torch.arange(8) - 3.5)).expand(8, 8)
    ramps = digits.Labelled(torch.stack([across, across.T])[:, None], torch.arange(2))
    noisy = digits.vary(digits.Labelled(torch.full((1, 1, 8, 8), 0.5), torch.zeros(1)), 2000, generator).images
    assert noisy[:, 0, 3:5, 3:5].std().item() == pytest.approx(0.05, rel=0.05)
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape))
    varied = digits.vary(ramps, 4000, generator)
    assert varied.target.tolist() == [0, 1] * 2000
    place = (varied.images[:, 0, 3:5, 3:5] - 0.5) / 0.1
    shift = place.mean((1, 2))
    along, aside = (place.diff(dim=d).mean((1, 2)) for d in (2, 1))  # change of the place by a pixel to the right, down
    along, aside = torch.where(varied.target == 0, along, aside), torch.where(varied.target == 0, aside, -along)
    scale, angle = torch.hypot(along, aside), torch.atan2(aside, along).rad2deg()
    for value, limits in ((scale, (0.85, 1.15)), (angle, (-15.0, 15.0)), (shift, (-1.0, 1.0))):
        low, high = limits
        reach = (value.min().item() - low) / (high - low), (value.max().item() - low) / (high - low)
        assert -1e-4 < reach[0] < 0.01
        assert 0.99 < reach[1] < 1 + 1e-4


def test_symmetric_noise_from_all_classes_at_rate_r_is_ours_at_r_times_9_tenths() -> None:
    target = torch.arange(10).repeat(100)
    theirs = torch.where(torch.arange(1000) < 500, torch.arange(1000) // 10 % 10, target)  # each class as often
    ours, _ = symmetric_noise(target, 0.5 * (10 - 1) / 10, 10, seed=0)
    assert (ours != target).sum() == (theirs != target).sum() == 450


def test_numbers_of_a_training_are_means_over_images_not_batches() -> None:
    running = Running(torch.device("cpu"))
    running.add({"loss": torch.tensor(1.0), "accuracy": torch.tensor(1.0)}, 2)
    running.add({"loss": torch.tensor(3.0), "accuracy": torch.tensor(0.0)}, 6)
    assert running.read() == {"loss": (2 * 1 + 6 * 3) / 8, "accuracy": 2 / 8}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_is_of_all_parameters(optimizer: Any) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 2))
    for parameter in network.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    settings = TrainingSettings(optimizer=optimizer, learning_rate=0.1, momentum=0.0, nesterov=False, weight_decay=0.5)
    make_optimizer(list(network.parameters()), settings).step()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 1 - 0.1 * 0.5), msg=name)
