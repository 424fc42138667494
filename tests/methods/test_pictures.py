"""Figures of images and of losses, by what is in them."""

from __future__ import annotations

import io
import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from refusals import refuses
from torch import Tensor

from fastkd import TwoGaussianMixture
from fastkd._figures import BLUE, ORANGE
from fastkd.methods.pictures import class_bars, image_grid, loss_histogram

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

NAN, INF = math.nan, math.inf


def made(count: int = 6, channels: int = 1, height: int = 4, width: int = 4) -> Tensor:
    """Image i is i / 10 all over, so that it is known by its colour."""
    return (torch.arange(count) / 10).reshape(-1, 1, 1, 1).expand(-1, channels, height, width).clone()


def tiles(figure: Figure, block: int = 0) -> list[float]:
    """The colours of the tiles in their order, from the upper left; of an empty one NaN."""
    axes = figure.axes[block]
    found = [(im.get_extent()[3], im.get_extent()[0], float(np.mean(im.get_array()))) for im in axes.images]
    found += [(patch.get_y(), patch.get_x(), NAN) for patch in axes.patches]  # type: ignore[attr-defined]
    return [colour for _, _, colour in sorted(found, key=lambda tile: tile[:2])]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def printed(figure: Figure, block: int = 0) -> list[str]:
    return [text.get_text() for text in figure.axes[block].texts]


def drawn(figure: Figure) -> Any:
    """Without a warning, as PNG; the pixels."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(file, format="png")
    file.seek(0)
    pixels = imread(file)
    assert np.ptp(pixels[..., :3]) > 0
    return pixels


# ---- images --------------------------------------------------------------------------------------------


def test_images_in_their_order() -> None:
    figure = image_grid(made(), mean=0.0, std=1.0)
    assert titles(figure) == ["6 images"]
    assert tiles(figure) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert printed(figure) == []
    drawn(figure)
    assert titles(image_grid(made(1))) == ["1 image"]


def test_the_most_confident_first() -> None:
    confidence = torch.tensor([0.5, NAN, 0.25, 1.0, 0.125, 0.5])
    figure = image_grid(made(), confidence=confidence, mean=0.0)
    assert tiles(figure) == pytest.approx([0.3, 0.0, 0.5, 0.2, 0.4, 0.1])
    assert printed(figure) == ["1.00", "0.50", "0.50", "0.25", "0.12", "nan"]
    drawn(figure)


def test_selected_above_rejected() -> None:
    selected = torch.tensor([True, False, True, False, True, False])
    confidence = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    figure = image_grid(made(), selected=selected, confidence=confidence, mean=0.0)
    assert titles(figure) == ["selected (3 of 6)", "rejected (3 of 6)"]
    assert tiles(figure) == pytest.approx([0.4, 0.2, 0.0])
    assert tiles(figure, 1) == pytest.approx([0.5, 0.3, 0.1])
    assert printed(figure, 1) == ["0.60", "0.40", "0.20"]
    drawn(figure)
    upper, lower = (axes.get_window_extent() for axes in figure.axes)
    assert upper.y0 >= lower.y1


@pytest.mark.parametrize("selected", [True, False])
def test_all_or_none_are_selected(selected: bool) -> None:
    figure = image_grid(made(), selected=torch.full((6,), selected))
    assert titles(figure) == [f"selected ({6 * selected} of 6)", f"rejected ({6 - 6 * selected} of 6)"]
    assert [len(tiles(figure, block)) for block in (0, 1)] == [6 * selected, 6 - 6 * selected]
    drawn(figure)


@pytest.mark.parametrize(
    ("count", "chosen", "most", "upper", "lower"),
    [(100, 10, 64, 10, 54), (100, 90, 64, 54, 10), (100, 50, 64, 32, 32), (9, 5, 1, 1, 0), (9, 5, 3, 2, 1)],
)
def test_as_many_as_are_asked_for(count: int, chosen: int, most: int, upper: int, lower: int) -> None:
    figure = image_grid(made(count), selected=torch.arange(count) < chosen, most=most)
    assert (len(tiles(figure)), len(tiles(figure, 1))) == (upper, lower)
    expected = [
        f"{name} ({there} of {count})" + (f", {shown} shown" if shown < there else "")
        for name, there, shown in (("selected", chosen, upper), ("rejected", count - chosen, lower))
    ]
    assert titles(figure) == expected
    alone = image_grid(made(count), most=most)
    assert len(tiles(alone)) == most
    assert titles(alone) == [f"{count} images, {most} shown"]


def test_normalised_images_are_brought_back() -> None:
    mean, std = (0.5, 0.4, 0.25), (0.2, 0.3, 0.1)
    as_they_are = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    normalised = (as_they_are - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    shown = image_grid(normalised, mean=mean, std=std).axes[0].images
    for image, expected in zip(shown, as_they_are, strict=True):
        np.testing.assert_allclose(image.get_array(), expected.permute(1, 2, 0), atol=1e-6)
    # what is too dark or too bright is black or white
    beyond = image_grid(torch.tensor([-9.0, 9.0]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4), mean=mean, std=std)
    assert tiles(beyond) == [0.0, 1.0]


def test_without_mean_and_std_by_the_least_and_the_largest() -> None:
    images = made() * 100 - 20
    images[2, 0, 0, 0] = NAN  # which has no say
    images[5] = INF
    figure = image_grid(images)
    np.testing.assert_allclose(tiles(figure), [0.0, 0.25, NAN, 0.75, 1.0, NAN])
    drawn(figure)
    assert tiles(image_grid(torch.full((2, 1, 4, 4), 7.0))) == [0.5, 0.5]
    large = torch.finfo(torch.float64).max
    extremes = torch.tensor([-large, 0.0, large], dtype=torch.float64).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert tiles(image_grid(extremes)) == [0.0, 0.5, 1.0]


def test_none_is_finite() -> None:
    for options in ({}, {"mean": 0.5}, {"confidence": torch.full((6,), NAN)}):
        figure = image_grid(torch.full((6, 3, 4, 4), NAN), **options)
        assert len(tiles(figure)) == 6
        assert not figure.axes[0].images
        drawn(figure)


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 8, 8), (2, 8, 8), (7, 8, 8), (3, 4, 12)])
def test_channels_and_sides(channels: int, height: int, width: int) -> None:
    images = made(5, channels, height, width)
    images[:, 1:] += 0.01
    figure = image_grid(images, confidence=torch.linspace(1, 0, 5), mean=(0.0,) * channels)
    last = 3 if channels == 3 else 1
    image = figure.axes[0].images[1]
    assert np.asarray(image.get_array()).reshape(height, width, -1).shape[-1] == last
    assert np.asarray(image.get_array()).reshape(height, width, -1)[..., 0] == pytest.approx(0.1)
    drawn(figure)
    box = image.get_window_extent()
    assert box.width / box.height == pytest.approx(width / height, rel=0.02)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 64, 300])
def test_tiles_do_not_overlap_and_are_in_the_figure(count: int) -> None:
    figure = image_grid(made(count), confidence=torch.linspace(1, 0, count), most=256)
    drawn(figure)
    boxes = [image.get_window_extent() for image in figure.axes[0].images]
    assert len(boxes) == min(count, 256)
    whole = figure.bbox
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1 for box in boxes)
    for box, text in zip(boxes, figure.axes[0].texts, strict=True):
        small_print = text.get_window_extent()
        assert small_print.y1 <= box.y0 + 1
        assert small_print.y0 >= 0
        assert small_print.width <= box.width
    rows = {round(box.y0) for box in boxes}
    assert len(rows) == math.ceil(len(boxes) / len({round(box.x0) for box in boxes}))


def test_of_other_dtypes_and_with_gradients() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert tiles(image_grid(made().to(dtype), mean=0.0)) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], abs=0.01)
    images = made().requires_grad_()
    before = images.detach().clone()
    image_grid(images, confidence=images.flatten(1).mean(1))
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((2, 1, 4, 4))}, "images is ndarray, must be a tensor"),
        ({"images": made().byte()}, "images has dtype torch.uint8"),
        ({"images": made()[0]}, r"images has shape \(1, 4, 4\), must be \[B, C, H, W\]"),
        ({"images": made()[:0]}, r"images has shape \(0, 1, 4, 4\)"),
        ({"images": made()[:, :0]}, r"images has shape \(6, 0, 4, 4\)"),
        ({"selected": torch.zeros(6)}, "selected has dtype torch.float32, must be torch.bool"),
        ({"selected": torch.zeros(5, dtype=torch.bool)}, r"selected has shape \(5,\), must be \(6,\), one a sample"),
        ({"confidence": torch.zeros(6, 1)}, r"confidence has shape \(6, 1\), must be \(6,\)"),
        ({"confidence": [0.5] * 6}, "confidence is list"),
        ({"confidence": torch.zeros(6, dtype=torch.int64)}, "confidence has dtype torch.int64"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean has 3 values, must have one"),
        ({"std": "1"}, "std is '1'"),
        ({"std": INF}, "std is inf, must be finite"),
        ({"most": 0}, "most is 0, must be at least 1"),
        ({"most": 2.0}, "most is float"),
    ],
)
def test_what_a_grid_refuses(changes: dict[str, Any], message: str) -> None:
    refuses(message, lambda: image_grid(**{"images": made(), **changes}))


# ---- losses --------------------------------------------------------------------------------------------


def two_groups() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    low, high = torch.randn(300, generator=generator), torch.randn(100, generator=generator)
    return torch.cat([0.5 + 0.1 * low, 2.0 + 0.3 * high]).abs()


def bars(figure: Figure) -> dict[str, float]:
    """The area of the bars by their colour."""
    found: dict[str, float] = {}
    for patch in figure.axes[0].patches:
        colour = patch.get_facecolor()[:3]  # type: ignore[index]
        name = {to_rgb(BLUE): "selected", to_rgb(ORANGE): "rejected"}.get(colour, "all")
        area = patch.get_width() * patch.get_height()  # type: ignore[attr-defined]
        found[name] = found.get(name, 0.0) + area
    return found


def legend(figure: Figure) -> list[str]:
    found = figure.axes[0].get_legend()
    return [] if found is None else [text.get_text() for text in found.get_texts()]


def test_a_histogram_alone() -> None:
    figure = loss_histogram(two_groups())
    assert bars(figure) == pytest.approx({"all": 1.0})
    assert legend(figure) == []
    assert not figure.axes[0].lines
    drawn(figure)


def test_the_selected_share_is_coloured() -> None:
    losses = two_groups()
    figure = loss_histogram(losses, selected=losses < 1.0)
    assert bars(figure) == pytest.approx({"selected": 0.75, "rejected": 0.25})
    assert legend(figure) == ["selected (300 of 400)", "rejected (100 of 400)"]
    drawn(figure)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_densities_of_the_mixture(normalize: bool) -> None:
    losses = two_groups()
    mixture = TwoGaussianMixture(normalize=normalize).fit(losses)
    figure = loss_histogram(losses, mixture, mixture.predict(losses) == 0)
    lines = figure.axes[0].lines
    assert len(lines) == 2
    for i, line in enumerate(lines):
        x, y = (torch.as_tensor(np.asarray(values)) for values in line.get_data())
        weight, mean, deviation = (of[i] for of in (mixture.weights_, mixture.means_, mixture.deviations_))
        expected = weight * torch.distributions.Normal(mean, deviation).log_prob(x).exp()
        torch.testing.assert_close(y, expected)
        assert torch.trapezoid(y, x).item() == pytest.approx(weight.item(), abs=0.02)
        assert x.diff().min() >= 0
    low, high = (f"{mean:.3g}" for mean in mixture.means_.tolist())
    assert legend(figure)[2:] == [f"low component: 75 %, mean {low}", f"high component: 25 %, mean {high}"]
    assert figure.axes[0].get_ylim()[1] >= max(line.get_ydata().max() for line in lines)  # type: ignore[union-attr]
    drawn(figure)


def parameters(weights: Any, means: Any, deviations: Any) -> Any:
    """As of a fitted mixture, of any numbers."""
    named = {"weights_": weights, "means_": means, "deviations_": deviations}
    return SimpleNamespace(**{name: torch.tensor(value, dtype=torch.float64) for name, value in named.items()})


@pytest.mark.parametrize(
    ("mixture", "lines"),
    [
        (parameters([1.0, 0.0], [0.5, 0.5], [0.1, 0.1]), 1),
        (parameters([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]), 0),
        (parameters([0.5, 0.5], [0.5, 2.0], [0.0, 0.0]), 2),
        (parameters([0.5, 0.5], [0.5, 2.0], [1e-300, 1e-9]), 2),
        (parameters([0.5, 0.5], [0.5, 2.0], [1e-3, 1e300]), 2),
        (parameters([0.5, 0.5], [-1e300, 1e300], [1e-3, 1e-3]), 2),
        (parameters([NAN, 0.5], [0.5, NAN], [0.1, 0.1]), 0),
        (parameters([[0.5, 0.5]], [[0.5, 2.0]], [[0.1, 0.3]]), 2),
    ],
)
def test_degenerate_mixtures(mixture: Any, lines: int) -> None:
    losses = two_groups()
    figure = loss_histogram(losses, mixture, losses < 1.0)
    assert len(figure.axes[0].lines) == lines
    assert legend(figure)[:2] == ["selected (300 of 400)", "rejected (100 of 400)"]
    assert all(np.isfinite(line.get_data()).all() for line in figure.axes[0].lines)
    low, high = figure.axes[0].get_ylim()
    assert low == 0.0
    assert 0 < high < 100  # the bars can be seen beside a peak
    drawn(figure)


@pytest.mark.parametrize(
    "losses",
    [
        [],
        [0.3],
        [0.3] * 20,
        [0.0] * 20,
        [-2.0] * 3,
        [0.3, math.nextafter(0.3, 1.0)],
        [1e30, 2e30],
        [1e-30, 2e-30],
        [0.0, 5e-324],
        [1e15] * 3,
        [NAN, INF, -INF],
        [NAN, 0.5, 0.6],
        [0.1, 0.2],
        [0.0, 1e300],
    ],
)
def test_degenerate_losses(losses: list[float]) -> None:
    values = torch.tensor(losses, dtype=torch.float64)
    mixture = TwoGaussianMixture().fit(values)
    for selected in (None, torch.ones(len(values), dtype=torch.bool), torch.zeros(len(values), dtype=torch.bool)):
        figure = loss_histogram(values, mixture, selected)
        there = 1.0 if values.isfinite().any() else 0.0
        assert sum(bars(figure).values()) == pytest.approx(there)
        wrong = int((~values.isfinite()).sum())
        assert figure.axes[0].get_title(loc="right") == (f"{wrong} of {len(values)} not finite" if wrong else "")
    drawn(figure)


def test_losses_of_other_dtypes_and_with_gradients() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        losses = two_groups().to(dtype).requires_grad_()
        assert bars(loss_histogram(losses)) == pytest.approx({"all": 1.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": [0.5]}, "losses is list, must be a tensor"),
        ({"losses": torch.zeros(400, dtype=torch.int64)}, "losses has dtype torch.int64"),
        ({"losses": torch.zeros(2, 200)}, r"losses has shape \(2, 200\), must be \[B\]"),
        ({"selected": torch.ones(400)}, "selected has dtype torch.float32"),
        ({"selected": torch.ones(3, dtype=torch.bool)}, r"selected has shape \(3,\), must be \(400,\)"),
        ({"mixture": TwoGaussianMixture().fit(torch.rand(3, 50))}, "mixture is of 3 problems, must be of one"),
    ],
)
def test_what_a_histogram_refuses(changes: dict[str, Any], message: str) -> None:
    refuses(message, lambda: loss_histogram(**{"losses": two_groups(), **changes}))


def test_a_mixture_that_is_not_fitted() -> None:
    with pytest.raises(AttributeError, match="this TwoGaussianMixture is not fitted"):
        loss_histogram(two_groups(), TwoGaussianMixture())


def test_class_bars() -> None:
    kinds = {"made": torch.tensor([0, 0, 2, 2]), "others": torch.tensor([1])}
    (axes,) = class_bars(kinds, 3).axes
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]  # type: ignore[union-attr]
    assert heights == [[50.0, 0.0, 50.0], [0.0, 100.0, 0.0]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["made (4)", "others (1)"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("classes", "count", "message"),
    [
        ({}, 3, "classes is empty, must have one kind of samples or more"),
        ({"a": torch.tensor([0, 3])}, 3, r"classes\['a'\] must be \[N\] of classes in \[0, 3\), one or more"),
        ({"a": torch.tensor([], dtype=torch.int64)}, 3, r"classes\['a'\] must be \[N\]"),
        ({"a": torch.tensor([0.5])}, 3, r"classes\['a'\] has dtype torch.float32, must be torch.int64"),
        ({"a": torch.tensor([0])}, 0, "count is 0, must be at least 1"),
    ],
)
def test_wrong_classes(classes: dict[str, Tensor], count: int, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        class_bars(classes, count)
