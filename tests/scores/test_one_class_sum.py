"""1C-Sum: every component against a formula in numpy, its calibration on noise, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor, nn

from fastkd._seeding import mixed_generator
from fastkd.models.densenet import densenet_bc
from fastkd.models.resnet import resnet
from fastkd.scores import NAMES, LogitScore, OneClassSum, make_scorer, t1000
from fastkd.scores.indicators import COMPONENTS, chi_square_tails

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


class Plain(nn.Module):
    """Batch norms of maps, of maps that are one pixel, and of vectors; a weight and a shift that are not 1 and 0."""

    def __init__(self, *, dead: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(6, 8, 4), nn.BatchNorm2d(8), nn.ReLU())
        self.third = nn.Sequential(nn.Flatten(), nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.head = nn.Linear(12, 5)
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                for tensor in (module.weight, module.bias, module.running_mean):
                    nn.init.normal_(tensor, std=0.5)
                nn.init.uniform_(module.running_var, 0.3, 2.0)
        if dead:  # latent vectors of 0
            nn.init.constant_(self.third[2].weight, 0.0)
            nn.init.constant_(self.third[2].bias, -1.0)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(images))))


def resnet8() -> nn.Module:
    return _trained_a_little(resnet(8, seed=5))


def densenet() -> nn.Module:
    return _trained_a_little(densenet_bc(16, 4, seed=5))


def _trained_a_little(network: nn.Module) -> nn.Module:
    """With running statistics of some images."""
    network.train()
    with torch.no_grad():
        for seed in range(3):
            network(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))
    return network.eval()


def images(count: int = 9) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def recorded(
    network: nn.Module, batch: Tensor
) -> tuple[dict[str, np.ndarray], np.ndarray, list[tuple[Any, np.ndarray]]]:
    """Logits, latents, and the outputs of batch norms with the layers, in float64."""
    network = copy.deepcopy(network).double().eval()
    outputs: list[tuple[Any, np.ndarray]] = []
    latents: list[np.ndarray] = []
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.register_forward_hook(lambda m, _, out: outputs.append((m, out.detach().numpy().copy())))
        if isinstance(module, nn.Linear) and module.out_features in (5, 10):
            module.register_forward_pre_hook(lambda m, inputs: latents.append(inputs[0].detach().numpy().copy()))
            head = module
    with torch.no_grad():
        logits = network(batch.double()).numpy()
    return {"logits": logits, "latent": latents[-1]}, head.weight.detach().numpy(), outputs


def expected_components(network: nn.Module, batch: Tensor) -> dict[str, np.ndarray]:
    """Image by image, channel by channel, out of the outputs of the batch norms."""
    seen, weights, outputs = recorded(network, batch)
    rows = []
    for i in range(len(batch)):
        z, u = seen["logits"][i], seen["latent"][i]
        w = weights[z.argmax()]
        p = special.softmax(z)
        positive = w > 0
        u_plus, w_plus = np.where(positive, u, 0), np.where(positive, w, 0)
        a, a_plus = u @ w, u_plus @ w_plus
        norm = np.linalg.norm

        def share(top: float, bottom: float) -> float:
            return top / bottom if bottom > 0 else 0.0

        row = {
            "uncertainty": 1 - p.max(),
            "entropy": stats.entropy(p),
            "t1000": -(1 + (z.max() - z.mean()) / 1000) / len(z),
            "norm": -norm(u),
            "activation": -a,
            "projection": -share(a, norm(w)),
            "angle": 1 - share(a, norm(u) * norm(w)),
            "positive_norm": -norm(u_plus),
            "positive_activation": -a_plus,
            "positive_angle": 1 - share(a_plus, norm(u_plus) * norm(w_plus)),
            "mixed_angle": 1 - share(a_plus, norm(u) * norm(w)),
        }
        sums, channels = np.zeros(4), 0
        for layer, out in outputs:
            gamma, beta = (t.detach().double().numpy() for t in (layer.weight, layer.bias))
            for c in range(out.shape[1]):
                t = (out[i, c].ravel() - beta[c]) / gamma[c]
                sums[0] += t.mean() ** 2
                sums[1] += (t**2).mean()
                sums[2] += (t.std() - 1) ** 2
                if t.size > 1:
                    below = stats.chi2.cdf((t.size - 1) * t.var(), t.size - 1)
                    sums[3] += below < 0.05 or below > 0.95
                channels += 1
        for name, total in zip(
            ("channel_mean", "channel_square", "channel_spread", "channel_extremes"), sums, strict=True
        ):
            row[name] = total / channels
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in COMPONENTS}


@pytest.mark.parametrize(
    "make", [Plain, lambda: Plain(dead=True), resnet8, densenet], ids=["plain", "dead", "resnet", "densenet"]
)
def test_every_component_is_that_of_the_formula(make: Callable[[], nn.Module]) -> None:
    network = make()
    score = OneClassSum(network)
    found = score.components(images())
    assert score.names == COMPONENTS
    assert len(COMPONENTS) == 15
    assert found.shape == (9, 15)
    assert found.dtype == torch.float64
    dead = isinstance(network, Plain) and not network.third[2].weight.any()
    expected = expected_components(network, images()) if not dead else None
    if expected is None:  # its shift cannot be undone by the outputs: their weight is 0
        assert bool(found.isfinite().all())
        assert found[:, COMPONENTS.index("angle")].tolist() == [1.0] * 9
        return
    for i, name in enumerate(COMPONENTS):
        np.testing.assert_allclose(found[:, i], expected[name], rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("degrees", [1, 2, 3, 8, 15, 63, 1023, 50_175])
def test_tails_are_quantiles_of_chi_square(degrees: int) -> None:
    np.testing.assert_allclose(chi_square_tails(degrees), stats.chi2.ppf([0.05, 0.95], degrees), rtol=1e-9)


def test_the_score_is_the_negative_sum_of_what_noise_standardises() -> None:
    network, mean, std = Plain(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    score = OneClassSum(network).calibrate((3, 8, 8), mean=mean, std=std, images=64, seed=4, batch_size=10)
    generator = mixed_generator("noise", 4)
    parts = [torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator) for n in (*[10] * 6, 4)]
    noise = (torch.cat(parts).double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    of_noise, of_images = expected_components(network, noise.float()), expected_components(network, images())
    expected = np.zeros(9)
    for name in COMPONENTS:
        deviation = of_noise[name].std()  # divided by N
        expected -= (of_images[name] - of_noise[name].mean()) / (deviation if deviation > 1e-9 else 1.0)
    np.testing.assert_allclose(score(images()), expected, rtol=2e-3, atol=2e-3)
    of_itself = score(noise.float())
    assert abs(of_itself.mean().item()) < 1e-3  # noise is the middle


def test_calibration_sees_noise_alone() -> None:
    """No image of the task: all that the teacher sees is noise that follows from the seed, and its bytes are uniform."""
    network = Plain()
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    score = OneClassSum(network, head="head").calibrate((3, 8, 8), images=200, seed=9)
    noise = torch.cat(seen)
    assert noise.shape == (200, 3, 8, 8)
    expected = torch.randint(256, (200, 3, 8, 8), dtype=torch.uint8, generator=mixed_generator("noise", 9))
    torch.testing.assert_close(noise, expected / 255)
    seen.clear()
    again = OneClassSum(network, head="head").calibrate((3, 8, 8), images=200, seed=9)
    assert again.state_dict() == score.state_dict()
    assert OneClassSum(network).calibrate((3, 8, 8), images=200, seed=10).state_dict() != score.state_dict()


def test_it_tells_what_the_teacher_has_learnt_from_noise() -> None:
    """Of a teacher whose batch norms have seen such images."""
    network = resnet8()
    score = OneClassSum(network).calibrate((3, 8, 8), mean=0.5, std=0.2887, images=256)
    noise = (torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)) - 0.5) / 0.2887
    flat = torch.zeros(64, 3, 8, 8)
    assert score(images(64)).mean() > score(flat).mean()
    assert score(noise).shape == (64,)


def test_state_is_that_of_the_calibration() -> None:
    score = OneClassSum(Plain()).calibrate((3, 8, 8), images=50)
    other = OneClassSum(Plain())
    assert other.state_dict() == {"mean": None, "std": None}
    other.load_state_dict(score.state_dict())
    assert torch.equal(other(images()), score(images()))
    other.prepare((3, 8, 8), 0.1, 0.2)  # is calibrated
    assert torch.equal(other(images()), score(images()))
    with pytest.raises(ValueError, match=r"state\['mean'\] has 3 numbers, must have 15"):
        other.load_state_dict({"mean": [0.0] * 3, "std": [1.0] * 3})


def test_a_teacher_without_batch_norm_has_eleven_components() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.Tanh(), nn.Linear(7, 4))
    score = OneClassSum(network).calibrate((3, 8, 8), images=50)
    assert score.names == COMPONENTS[:11]
    assert score(images()).shape == (9,)
    unknown = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(144, 2)
    )
    assert OneClassSum(unknown).names == COMPONENTS[:11]  # it does not know the task's moments


def test_modes_and_gradients_are_put_back() -> None:
    network = Plain().train()
    network.second.eval()
    before = copy.deepcopy(network.state_dict())
    score = OneClassSum(network).calibrate((3, 8, 8), images=20)
    assert not score(images()).requires_grad
    assert network.training
    assert not network.second.training
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("name", NAMES)
def test_scores_by_name(name: str) -> None:
    scorer = make_scorer(name, Plain())
    scorer.prepare((3, 8, 8), None, None)
    scores = scorer(images())
    assert scores.shape == (9,)
    assert scores.dtype == torch.float64
    batched = torch.cat([scorer(part) for part in images().split(4)])
    torch.testing.assert_close(batched, scores, rtol=1e-4, atol=1e-4)
    low = make_scorer(name, Plain(), amp=torch.bfloat16)
    low.prepare((3, 8, 8), None, None)
    assert bool(low(images()).isfinite().all())


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"score '1c-sun' is unknown, did you mean 1c-sum"):
        make_scorer("1c-sun", Plain())
    with pytest.raises(TypeError, match=r"teacher is str, must be a torch.nn.Module"):
        LogitScore("resnet")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"amp is torch.float64"):
        LogitScore(Plain(), amp=torch.float64)
    with pytest.raises(RuntimeError, match="this OneClassSum is not calibrated"):
        OneClassSum(Plain())(images())
    with pytest.raises(ValueError, match="head is 'third', a Sequential, must be the name of its last"):
        OneClassSum(Plain(), head="third")
    with pytest.raises(ValueError, match="head is 'fc', no module of the teacher"):
        OneClassSum(Plain(), head="fc")
    with pytest.raises(ValueError, match=r"shape is \(3, 8\), must be C, H, W"):
        OneClassSum(Plain()).calibrate((3, 8))
    with pytest.raises(ValueError, match="images is 1, must be"):
        OneClassSum(Plain()).calibrate((3, 8, 8), images=1)
    broken = Plain()
    nn.init.constant_(broken.head.weight, float("nan"))
    with pytest.raises(ValueError, match=r"the teacher's uncertainty, entropy.* of noise images are not finite"):
        OneClassSum(broken).calibrate((3, 8, 8), images=20)
    with pytest.raises(ValueError, match=r"the teacher's logits have shape \(9, 3, 8, 8\), must be \(9, K\)"):
        LogitScore(nn.Identity(), t1000)(images())
