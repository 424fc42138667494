"""Figures of what a method makes and chooses, for :meth:`fastkd.methods.Procedure.pictures`. They need matplotlib, so import
this where they are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from fastkd._checks import check_count, check_dtype
from fastkd._figures import BLUE, DASHED, GREEN, GREY, INK, ORANGE, PALE, RED, canvas, plain_axes
from fastkd.patches import channel_values
from fastkd.selection import TwoGaussianMixture

__all__ = ["class_bars", "image_grid", "loss_histogram"]

SELECTED, REJECTED = BLUE, ORANGE
COLOURS = (BLUE, ORANGE, GREEN, RED, GREY)  # of kinds of samples
MOST_TICKS = 20  # that can be read
MOST_COLUMNS = 16
WIDTH, LEAST_TILE, LARGEST_TILE = 10.0, 0.6, 1.0  # inches: of the grid, and of a tile
GAP = 0.06  # between tiles, in widths of one
TITLE, PRINT = 0.3, 0.15  # inches of height: of a block's title, and of the small print below a tile
BINS = 40
POINTS = 400  # of a curve
NARROW = 1e-4  # deviations, as shares of the width of the figure, of which a line is all that can be seen


class _Block(NamedTuple):
    """Tiles below a title."""

    title: str
    colour: str
    rows: Tensor
    """Which of the images, in their order."""


def image_grid(
    images: Tensor,
    *,
    selected: Tensor | None = None,
    confidence: Tensor | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    most: int = 64,
) -> Figure:
    """Images side by side; where some were selected, these above the others.

    Args:
        images: floats ``[B, C, H, W]``, B >= 1, of one channel or three; of other numbers the first channel is drawn. An image
            that is not finite is an empty tile.
        selected: bool ``[B]``.
        confidence: floats ``[B]``, the teacher's: the highest comes first, each is printed below its image.
        mean, std: by which they are normalised, ``(x - mean) / std``, one number or one a channel, as of
            :class:`fastkd.data.ImageSet`: they are drawn as x, in [0, 1]. Without either, black is the least value of all
            images and white the largest.
        most: images at most, the first ones; where some were selected, half are for the others if there are as many.

    Raises:
        TypeError, ValueError: other dtypes or shapes, or numbers out of range; see :class:`fastkd.data.ImageSet` for mean and
            std.
    """
    check_dtype("images", images)
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(
            f"fastkd: images has shape {tuple(images.shape)}, must be [B, C, H, W] with at least one image"
        )
    count, _, height, width = images.shape
    most = check_count("most", most, 1)
    _check_each("selected", selected, count, (torch.bool,))
    if confidence is not None:
        _check_each("confidence", confidence, count)
        confidence = confidence.detach().cpu().double()
    shown = _to_show(images, mean, std)
    blocks = _blocks(_order(count, confidence), None if selected is None else selected.cpu(), most)

    tiles = sum(len(block.rows) for block in blocks)
    columns = min(MOST_COLUMNS, 2 ** math.ceil(math.log2(math.sqrt(2 * tiles))))  # about twice as many as rows
    tile = min(max(WIDTH / columns, LEAST_TILE), LARGEST_TILE)
    across = max(columns, math.ceil(4.0 / tile))  # in tiles: a title must fit
    tall = (1.0 - GAP) * height / width  # of an image, in tiles as all of the axes
    step = tall + GAP + (0.0 if confidence is None else PRINT / tile)
    heights = [TITLE + tile * step * math.ceil(len(block.rows) / columns) for block in blocks]
    figure = canvas(tile * across + 0.2, sum(heights) + 0.1, pad=0.04)
    grid = figure.subplots(len(blocks), 1, height_ratios=heights, squeeze=False)
    for axes, block in zip(grid[:, 0], blocks, strict=True):
        axes.set_title(block.title, loc="left", color=block.colour, fontweight="bold", fontsize=10)
        axes.axis("off")
        for i, row in enumerate(block.rows.tolist()):
            x, y = i % columns, i // columns * step
            _tile(axes, shown[row], x, y, tall)
            if confidence is not None:
                printed = f"{confidence[row]:.2f}"
                centre = x + (1.0 - GAP) / 2
                axes.text(centre, y + tall + GAP / 2, printed, color=INK, fontsize=6, ha="center", va="top")
        axes.set(xlim=(0, across), ylim=(max(step * math.ceil(len(block.rows) / columns), 1e-3), 0))
        axes.set_aspect("equal", anchor="NW")
    return figure


def loss_histogram(losses: Tensor, mixture: TwoGaussianMixture | None = None, selected: Tensor | None = None) -> Figure:
    """How the losses of samples are distributed, the two Gaussians fitted to them, and which were selected.

    Args:
        losses: floats ``[B]``; those that are not finite are left out.
        mixture: fitted to one set of losses; each of its components is drawn as its density times its weight, one of no
            width as a line, one of no weight not at all.
        selected: bool ``[B]``.

    Raises:
        TypeError, ValueError: other dtypes or shapes, or a mixture of several problems.
        AttributeError: a mixture that is not fitted.
    """
    check_dtype("losses", losses)
    if losses.dim() != 1:
        raise ValueError(f"fastkd: losses has shape {tuple(losses.shape)}, must be [B]")
    _check_each("selected", selected, len(losses), (torch.bool,))
    values = losses.detach().cpu().double()
    finite = values.isfinite()
    low, high = _range(values[finite])

    figure = canvas(7.0, 4.0, pad=0.1)
    axes = figure.subplots()
    plain_axes(axes, "Losses of the samples", "loss", "density")
    if selected is None:
        groups = [("", GREY, finite)]
    else:
        chosen = selected.cpu()
        groups = [
            (_title("selected", chosen), SELECTED, finite & chosen),
            (_title("rejected", ~chosen), REJECTED, finite & ~chosen),
        ]
    width = (high - low) / BINS
    share = 1.0 / (max(int(finite.sum()), 1) * width)  # so that the whole area is 1
    heights, _, _ = axes.hist(
        [values[rows].numpy() for _, _, rows in groups],
        bins=torch.linspace(low, high, BINS + 1, dtype=torch.float64).tolist(),
        weights=[torch.full((int(rows.sum()),), share, dtype=torch.float64).numpy() for _, _, rows in groups],
        stacked=True,
        color=[colour for _, colour, _ in groups],
        label=[label for label, _, _ in groups],
        alpha=0.4,
    )
    highest = max(float(torch.as_tensor(heights).max()), 1e-9 / width)
    if mixture is not None:
        highest = max(highest, min(_draw_components(axes, mixture, low, high), 2 * highest))
    axes.set(xlim=(low, high), ylim=(0, 1.08 * highest))
    if left_out := int((~finite).sum()):
        axes.set_title(f"{left_out} of {len(values)} not finite", loc="right", color=GREY, fontsize=9)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    return figure


def class_bars(classes: Mapping[str, Tensor], count: int, title: str = "classes that the teacher predicts") -> Figure:
    """How samples of several kinds are distributed over the classes, side by side: those that a teacher predicts of images
    that were made and of others, for instance.

    Args:
        classes: by name of the kind, int64 ``[N]`` in [0, count), N >= 1.
        count: of the classes.
        title: of the figure.

    Raises:
        TypeError, ValueError: no kind, other dtypes or shapes, a class out of range.
    """
    count = check_count("count", count, 1)
    if not classes:
        raise ValueError("fastkd: classes is empty, must have one kind of samples or more")
    figure = canvas(min(WIDTH, 3.0 + 0.3 * count * len(classes)), 3.2)
    axes = figure.add_subplot()
    width = 0.8 / len(classes)
    for number, (name, values) in enumerate(classes.items()):
        check_dtype(f"classes[{name!r}]", values, (torch.int64,))
        if values.dim() != 1 or not len(values) or int(values.min()) < 0 or int(values.max()) >= count:
            raise ValueError(f"fastkd: classes[{name!r}] must be [N] of classes in [0, {count}), one or more")
        shares = 100 * torch.bincount(values.cpu(), minlength=count).double() / len(values)
        places = torch.arange(count).double() + width * (number - (len(classes) - 1) / 2)
        colour = COLOURS[number % len(COLOURS)]
        axes.bar(places.tolist(), shares.tolist(), 0.9 * width, color=colour, label=f"{name} ({len(values)})")
    axes.axhline(100 / count, color=GREY, linewidth=1, linestyle=DASHED)
    axes.set_xticks(range(count) if count <= MOST_TICKS else [])
    plain_axes(axes, title, "class (dashed: all alike)", "share, %")
    axes.legend(frameon=False, fontsize=9)
    return figure


def _check_each(name: str, values: Tensor | None, count: int, dtypes: Sequence[torch.dtype] | None = None) -> None:
    """One value a sample."""
    if values is None:
        return
    check_dtype(name, values, *([dtypes] if dtypes else []))
    if values.shape != (count,):
        raise ValueError(f"fastkd: {name} has shape {tuple(values.shape)}, must be ({count},), one a sample")


def _to_show(
    images: Tensor, mean: float | Sequence[float] | None, std: float | Sequence[float] | None
) -> list[Tensor | None]:
    """Each image, ``[H, W, 1]`` or ``[H, W, 3]`` in [0, 1]; None for one that is not finite."""
    values = images.detach().cpu().double()
    channels = values.shape[1]
    finite = values.isfinite().flatten(1).all(1)
    drawn = values[:, : channels if channels == 3 else 1]
    if mean is not None or std is not None:
        center, spread = (
            torch.tensor(channel_values(name, value, channels), dtype=torch.float64)[: drawn.shape[1], None, None]
            for name, value in (("mean", 0.0 if mean is None else mean), ("std", 1.0 if std is None else std))
        )
        drawn = drawn * spread + center
    elif bool(finite.any()):
        low, high = (float(bound) for bound in drawn[finite].aminmax())
        half = high / 2 - low / 2  # high - low may be infinite
        drawn = (drawn / 2 - low / 2) / half if half > 0 else torch.full_like(drawn, 0.5)
    drawn = drawn.clamp(0.0, 1.0).permute(0, 2, 3, 1)
    return [image if good else None for image, good in zip(drawn, finite.tolist(), strict=True)]


def _order(count: int, confidence: Tensor | None) -> Tensor:
    """The most confident first, those of no number last."""
    if confidence is None:
        return torch.arange(count)
    return confidence.nan_to_num(nan=-math.inf).argsort(descending=True, stable=True)


def _blocks(order: Tensor, selected: Tensor | None, most: int) -> list[_Block]:
    count = len(order)
    if selected is None:
        title = f"{count} image{'s' if count > 1 else ''}"
        return [_Block(_with_shown(title, count, most), INK, order[:most])]
    ours, others = order[selected[order]], order[~selected[order]]
    room = max(most - len(others), -(-most // 2))  # half, and what the others leave
    upper, lower = ours[:room], others[: most - min(room, len(ours))]
    return [
        _Block(_with_shown(_title("selected", selected), len(ours), len(upper)), SELECTED, upper),
        _Block(_with_shown(_title("rejected", ~selected), len(others), len(lower)), REJECTED, lower),
    ]


def _title(name: str, chosen: Tensor) -> str:
    return f"{name} ({int(chosen.sum())} of {len(chosen)})"


def _with_shown(title: str, there: int, shown: int) -> str:
    return title if shown >= there else f"{title}, {shown} shown"


def _tile(axes: Axes, image: Tensor | None, x: float, y: float, height: float) -> None:
    if image is None:
        axes.add_patch(Rectangle((x, y), 1.0 - GAP, height, facecolor=PALE, edgecolor=GREY, linewidth=0.6))
        return
    # downwards, as images are
    extent = (x, x + 1.0 - GAP, y + height, y)
    axes.imshow(image.numpy(), cmap="gray", vmin=0.0, vmax=1.0, extent=extent, interpolation="nearest", origin="upper")


def _range(values: Tensor) -> tuple[float, float]:
    """Of the axis, wider than nothing."""
    if len(values) == 0:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if high - low > max(1e-9 * max(abs(low), abs(high)), 1e-100):
        return low, high
    around = 0.5 * max(abs(low), 1e-3)
    return low - around, low + around


def _draw_components(axes: Axes, mixture: TwoGaussianMixture, low: float, high: float) -> float:
    """The curves; and the highest point of one."""
    parameters = [mixture.weights_, mixture.means_, mixture.deviations_]
    if parameters[0].dim() == 2 and len(parameters[0]) == 1:
        parameters = [of[0] for of in parameters]
    if parameters[0].dim() != 1:
        raise ValueError(f"fastkd: mixture is of {len(parameters[0])} problems, must be of one")
    highest = 0.0
    names = (("low", SELECTED, "solid"), ("high", REJECTED, DASHED))
    for (name, colour, style), weight, mean, deviation in zip(names, *(of.tolist() for of in parameters), strict=True):
        if not (weight > 0 and math.isfinite(mean) and math.isfinite(deviation)):
            continue
        label = f"{name} component: {100 * weight:.0f} %, mean {mean:.3g}"
        if deviation <= NARROW * (high - low):
            axes.axvline(mean, color=colour, linestyle=style, linewidth=2.2, label=label)
            continue
        near = mean + deviation * torch.linspace(-5, 5, POINTS, dtype=torch.float64)  # however narrow it is
        points = torch.cat([torch.linspace(low, high, POINTS, dtype=torch.float64), near]).sort().values
        points = points[(points >= low) & (points <= high)]
        density = weight * torch.exp(-((points - mean) / deviation).square() / 2) / (deviation * math.sqrt(2 * math.pi))
        axes.plot(points.numpy(), density.numpy(), color=colour, linestyle=style, linewidth=2.2, label=label)
        highest = max(highest, float(density.max()))
    return highest
