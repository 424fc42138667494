"""T1000 against a float64 softmax at temperature 1000, its order, its dtypes."""

from __future__ import annotations

import pytest
import torch

from fastkd.scores import max_softmax, negative_energy, negative_entropy, t1000


def exact(logits: torch.Tensor) -> torch.Tensor:
    """The largest softmax probability at temperature 1000, in float64."""
    return torch.softmax(logits.double() / 1000.0, -1).amax(-1)


@pytest.mark.parametrize("classes", [1, 2, 10, 1000])
@pytest.mark.parametrize("scale", [1.0, 10.0, 50.0])
def test_agrees_with_softmax_to_first_order(
    classes: int, scale: float, device: torch.device, generator: torch.Generator
) -> None:
    logits = scale * torch.randn(500, classes, generator=generator).to(device)
    score, truth = t1000(logits), exact(logits)
    spread = (logits.amax(-1) - logits.amin(-1)).double() / 1000.0
    rounding = 4e-7 * scale / 1000.0 / classes  # of the float32 mean that the score starts from
    assert score.dtype == torch.float64
    assert score.shape == (500,)
    assert bool(((score - truth).abs() <= spread**2 / classes + rounding).all())
    if classes > 1:
        signal = (truth - 1.0 / classes).abs()  # what tells two images apart
        assert bool(((score - truth).abs() <= 0.5 * spread.clamp(min=1e-4) * signal + rounding).all())


def test_order_is_that_of_the_margin(device: torch.device, generator: torch.Generator) -> None:
    logits = 8 * torch.randn(2000, 10, generator=generator).to(device)
    margin = (logits.double().amax(-1) - logits.double().mean(-1)).sort()
    score = t1000(logits)[margin.indices]
    apart = margin.values.diff() > 1e-5  # nearer ones may tie in float32 logits
    assert apart.sum() > 1900
    assert bool((score.diff()[apart] > 0).all())


def test_keeps_what_a_float32_softmax_loses(device: torch.device) -> None:
    logits = torch.zeros(2, 1000, device=device)
    logits[:, 0] = torch.tensor([1.0, 1.0001])
    low, high = t1000(logits).tolist()
    assert low < high
    truth = exact(logits).diff().item()
    assert high - low == pytest.approx(truth, rel=0.01)
    rounded = torch.softmax(logits / 1000.0, -1).amax(-1).double().diff().item()
    assert abs(rounded - truth) > 0.1 * truth  # so the linear form is not a luxury


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_leading_shape(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    logits = torch.randn(3, 5, 7, generator=generator).to(device, dtype)
    score = t1000(logits)
    assert score.shape == (3, 5)
    assert score.dtype == torch.float64
    expected = (1 + (logits.double().amax(-1) - logits.double().mean(-1)) / 1000) / 7
    torch.testing.assert_close(score, expected, rtol=0, atol=1e-9)


def test_a_shift_of_the_logits_changes_nothing(device: torch.device, generator: torch.Generator) -> None:
    logits = torch.randn(50, 10, generator=generator, dtype=torch.float64).to(device)
    torch.testing.assert_close(t1000(logits + 100.0), t1000(logits), rtol=0, atol=1e-14)


def test_the_other_scores_are_those_of_the_softmax(device: torch.device, generator: torch.Generator) -> None:
    logits = (5 * torch.randn(300, 7, generator=generator)).to(device)
    p = logits.double().softmax(1)
    torch.testing.assert_close(max_softmax(logits), p.amax(1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(negative_entropy(logits), torch.special.xlogy(p, p).sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(negative_energy(logits), logits.double().logsumexp(1), rtol=1e-5, atol=1e-6)
    for score in (max_softmax, negative_entropy, negative_energy):
        assert score(logits).dtype == torch.float64
        sure, unsure = score(torch.tensor([[9.0, 0.0, 0.0], [1.0, 0.9, 1.0]]))
        assert sure > unsure  # higher = more alike
        with pytest.raises(TypeError, match=r"logits has dtype torch.int64"):
            score(torch.zeros(3, 4, dtype=torch.int64))
