"""Batches straight from a table: the bits of a draw and a crop in two steps, safe with any table, placed right beyond 2^31."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_crop import FLOATS, LAYOUTS

import fastkd
from fastkd import AliasTable
from fastkd.ops import alias as alias_ops
from fastkd.ops import batch as ops
from fastkd.reference import batch as reference

pytestmark = pytest.mark.cuda_kernels

NO_ITEM = -(2**63)


def make_table(items: int, device: torch.device, seed: int = 5) -> AliasTable:
    scores = torch.randn(items, generator=torch.Generator().manual_seed(items))
    return AliasTable(scores, 1.5, seed=seed).to(device)


def make_images(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(shape[0]))


def two_steps(table: AliasTable, images: torch.Tensor, n: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    indices = table.sample(n, options.get("generator"))
    return fastkd.random_crop_flip(images[indices], **options), indices


def assert_same(device: torch.device, images: torch.Tensor, n: int, **options: Any) -> None:
    """Batch, indices and what comes next, of the table's own stream and of a generator."""
    items = images.shape[0]
    images = images.to(device)
    for own in (True, False):
        results = []
        for run in (fastkd.draw_batch, two_steps):
            table = make_table(items, device)
            table.sample(3)
            torch.manual_seed(11)
            generator = None if own else torch.Generator(device).manual_seed(7)
            batch, indices = run(table, images, n, generator=generator, **options)
            after = torch.rand(1, device=device, generator=generator)
            results.append((batch, indices, table.sample(2), after))
        for ours, expected in zip(*results, strict=True):
            assert ours.dtype == expected.dtype
            assert torch.equal(ours, expected)


# items, channels, height and width of an image; n; options
CASES: list[tuple[tuple[int, int, int, int], int, dict[str, Any]]] = [
    ((50, 3, 32, 32), 7, {"mean": [0.4, 0.5, 0.6], "std": 0.25}),
    ((1, 1, 1, 1), 5, {"padding": 0}),
    ((41, 4, 5, 33), 9, {"size": (3, 40), "mean": 0.5}),
    ((4097, 1, 3, 7), 33, {"size": (2, 5), "padding": 0, "flip_probability": 1.0}),
    ((10, 2, 9, 16), 3, {"size": (30, 3), "padding": 11, "flip_probability": 0.0, "std": [0.5, 2.0]}),
    ((3, 3, 2, 2), 0, {}),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("shape", "n", "options"), CASES, ids=[str(case[0]) for case in CASES])
def test_bits_of_a_draw_and_a_crop(
    device: torch.device, shape: tuple[int, int, int, int], n: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    assert_same(device, make_images(*shape), n, dtype=dtype, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_formats(device: torch.device, layout: str) -> None:
    images = LAYOUTS[layout](make_images(9, 3, 6, 11))
    assert_same(device, images, 6, mean=[0.1, 0.2, 0.3], std=0.5)
    batch, _ = fastkd.draw_batch(make_table(9, device), images.to(device), 6)
    assert batch.is_contiguous(
        memory_format=torch.channels_last if "channels_last" in layout else torch.contiguous_format
    )


def test_many_short_images(device: torch.device) -> None:
    """A block meets two thousand of them; blocks begin within images of three elements."""
    assert_same(device, make_images(300, 1, 1, 1), 5000, padding=1, dtype=torch.float16)
    assert_same(device, make_images(300, 1, 1, 3), 900)


def test_many_channels(device: torch.device) -> None:
    """More constants than travel as parameters of a launch."""
    assert_same(device, make_images(6, 40, 2, 3), 3, mean=[c / 40 for c in range(40)], std=0.5)


@pytest.mark.parametrize("seed", [0, -(2**62) - 12345])
def test_against_the_reference(device: torch.device, seed: int, generator: torch.Generator) -> None:
    scores, images = torch.randn(60, generator=generator), make_images(60, 2, 5, 6)
    center, scale = [100.0, -3.5], [0.01, 1 / 255]
    for first, crop_seed in ((0, 3), (2**40, -(2**63))):
        batch, indices = ops.draw_batch(
            AliasTable(scores, 1.0).to(device)._table,
            torch.tensor([seed, first], device=device),
            torch.tensor([crop_seed], device=device),
            images.to(device),
            12,
            (4, 7),
            2,
            0.5,
            center=center,
            scale=scale,
            dtype=torch.float64,
        )
        expected, drawn = reference.draw_batch(
            scores.numpy(), 1.0, seed, first, crop_seed, images, 12, (4, 7), 2, 0.5, center, scale
        )
        assert torch.equal(indices.cpu(), drawn)
        assert torch.equal(batch.cpu(), expected)


def test_without_normalisation_pixels_stay(device: torch.device) -> None:
    images, table = make_images(20, 3, 4, 4).to(device), make_table(20, device)
    seed = torch.tensor([1], device=device)
    batch, indices = ops.draw_batch(table._table, table._stream, seed, images, 6, (4, 4), 0, 0.0, dtype=torch.bfloat16)
    assert torch.equal(batch, images[indices].bfloat16())


def test_items_of_weight_zero_never_come_out(device: torch.device, generator: torch.Generator) -> None:
    scores = torch.where(torch.rand(9000, generator=generator) < 0.7, -math.inf, 0.0)
    scores[:4096] = -math.inf  # a whole block
    table = AliasTable(scores, 1.0, seed=0).to(device)
    batch, indices = fastkd.draw_batch(table, torch.full((9000, 1, 1, 1), 255, dtype=torch.uint8, device=device), 2000)
    assert torch.isfinite(scores.to(device)[indices]).all()
    assert ((batch == 0) | (batch == 1)).all()


# ---- broken tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [math.nan, 0.0, -1.0, -math.inf, math.inf])
def test_a_table_without_weight_gives_no_item(device: torch.device, reads_values: bool, total: float) -> None:
    table, images = make_table(50, device), make_images(50, 3, 8, 8).to(device)
    table._table.scale[3] = total
    if reads_values:
        with pytest.raises(RuntimeError, match=r"table_scale\[3\], the total weight, is .*, must be that of a table"):
            fastkd.draw_batch(table, images, 3)
        return
    for dtype in FLOATS:
        batch, indices = fastkd.draw_batch(table, images, 3, dtype=dtype)
        assert (indices == NO_ITEM).all()
        assert batch.isnan().all()


def test_any_words_make_images_of_the_collection_or_nan(device: torch.device, generator: torch.Generator) -> None:
    """An image outside the collection would be of 255s, or a fault."""
    storage = torch.full((3 * 4200, 1, 2, 2), 255, dtype=torch.uint8, device=device)
    images = storage[4200:8400].zero_()  # two blocks of the table, the second a short one
    found = set()
    for _ in range(5):
        words = torch.randint(-(2**63), 2**63 - 1, (4206,), generator=generator)
        table = alias_ops.Table(
            *(t.clone().to(device) for t in (words[:4200], words[4200:4202], words[4202:].reshape(2, 2))),
            torch.tensor([0.0, 1.0, 0.0, 2.0**40], dtype=torch.float64, device=device),
        )
        stream, seed = torch.tensor([3, 0], device=device), torch.tensor([1], device=device)
        batch, indices = ops.draw_batch(table, stream, seed, images, 200, (2, 2), 0, 0.5)
        inside = (indices >= 0) & (indices < 4200)
        assert (batch[inside] == 0).all()
        assert batch[~inside].isnan().all()
        found |= set(inside.tolist())
    assert found == {True, False}


# ---- errors ------------------------------------------------------------------------------------------

TABLE, IMAGES = AliasTable(torch.zeros(5), 1.0, seed=1), torch.zeros(5, 3, 4, 6, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f(TABLE._table, IMAGES, 2), TypeError, "table is Table, must be an AliasTable"),
        (lambda f: f(TABLE, IMAGES.tolist(), 2), TypeError, "images is list, must be a tensor"),
        (lambda f: f(TABLE, IMAGES[0], 2), ValueError, "images has shape \\(3, 4, 6\\), must be \\[B, C, H, W\\]"),
        (lambda f: f(TABLE, IMAGES.float(), 2), TypeError, "images has dtype torch.float32, must be .*uint8"),
        (lambda f: f(TABLE, IMAGES[1:], 2), ValueError, "images has shape \\(4, 3, 4, 6\\), must have 5 images"),
        (lambda f: f(TABLE, IMAGES.to("meta"), 2), ValueError, "images is on meta, must be on the device of the table"),
        (lambda f: f(TABLE, IMAGES[:, :0], 2), RuntimeError, "images has shape .*, must have at least one channel"),
        (lambda f: f(TABLE, IMAGES, -1), ValueError, "n is -1, must be at least 0"),
        (lambda f: f(TABLE, IMAGES, 2.0), TypeError, "n is float, must be an int"),
        (lambda f: f(TABLE, IMAGES, 2, size=13), ValueError, "size is \\(13, 13\\), must be at most .* \\(12, 14\\)"),
        (lambda f: f(TABLE, IMAGES, 2, size=0), ValueError, "size is 0, must be positive"),
        (lambda f: f(TABLE, IMAGES, 2, padding=-1), ValueError, "padding is -1, must be at least 0"),
        (
            lambda f: f(TABLE, IMAGES, 2, padding=2**30),
            ValueError,
            "padding is 1073741824, must be less than 1073741824",
        ),
        (
            lambda f: f(TABLE, IMAGES, 2, padding=2**29),
            ValueError,
            "padding is 536870912, must leave images of .* at most",
        ),
        (lambda f: f(TABLE, IMAGES, 2, flip_probability=1.5), ValueError, "flip_probability is 1.5, must be in"),
        (lambda f: f(TABLE, IMAGES, 2, mean=[0.5]), ValueError, "mean has 1 values, must have one"),
        (lambda f: f(TABLE, IMAGES, 2, std=0.0), ValueError, "std is 0.0, must be positive"),
        (lambda f: f(TABLE, IMAGES, 2, dtype=torch.int32), TypeError, "dtype is torch.int32, must be float32"),
    ],
)
def test_errors(call: Callable[[Any], object], error: type[Exception], message: str) -> None:
    state = TABLE.state_dict()
    with pytest.raises(error, match=message):
        call(fastkd.draw_batch)
    assert TABLE.state_dict() == state


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        (0, torch.zeros(5), "table has dtype float32, must be one of int64"),
        (0, torch.zeros(0, dtype=torch.int64), "table has shape \\(0,\\), must hold at least one item"),
        (1, torch.zeros(2, dtype=torch.int64), "block_weight has shape \\(2,\\), must be \\(1,\\)"),
        (2, torch.zeros(3, dtype=torch.int64)[1:].reshape(1, 2), "top must begin at a multiple of 16 bytes"),
        (3, torch.zeros(3, dtype=torch.float64), "table_scale has shape \\(3,\\), must be \\(4,\\)"),
        (3, torch.zeros(4), "table_scale has dtype float32, must be one of float64"),
        (4, torch.zeros(1, dtype=torch.int64), "stream has shape \\(1,\\), must be \\(2,\\)"),
        (5, torch.zeros(2, dtype=torch.int64), "crop_seed has shape \\(2,\\), must hold one number"),
        (6, IMAGES.int(), "images has dtype int32, must be one of uint8"),
        (6, IMAGES[:4], "images has shape \\(4, 3, 4, 6\\), must have 5 images, one for each item of the table"),
        (7, -1, "count is -1, must be at least 0"),
        (7, 2**60, "patches would have more than 2\\^59 elements"),
        (8, 0, "size is \\(0, 6\\), must be positive"),
        (9, 9, "size is \\(4, 9\\), must be at most that of an image and its padding, \\(6, 8\\)"),
        (10, -1, "padding is -1, must be in \\[0, 1073741824\\]"),
        (11, math.nan, "flip_probability is -?nan, must be in \\[0, 1\\]"),
        (12, [0.0], "center has 1 values, must have one for each of the 3 channels, or none"),
        (14, torch.int64, "dtype is int64, must be float32, float64, bfloat16 or float16"),
    ],
)
def test_errors_of_the_operator(device: torch.device, argument: int, value: object, message: str) -> None:
    arguments = [*TABLE._table, TABLE._stream, torch.zeros(1, dtype=torch.int64), IMAGES, 2, 4, 6, 1, 0.5, [], []]
    arguments.append(torch.float32)
    arguments[argument] = value
    moved = [a.to(device) if isinstance(a, torch.Tensor) and device.type != "cpu" else a for a in arguments]
    if device.type != "cpu" and argument == 2:
        moved[2] = torch.zeros(3, dtype=torch.int64, device=device)[1:].reshape(1, 2)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastkd.draw_batch(*moved)


def test_generator_of_another_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    with pytest.raises(ValueError, match="generator is on cuda:0, must be on the device of images, cpu"):
        fastkd.draw_batch(TABLE, IMAGES, 2, generator=torch.Generator("cuda"))


def test_opcheck(device: torch.device) -> None:
    table, images = make_table(50, device), make_images(50, 3, 8, 8).to(device)
    seed = torch.tensor([3], device=device)
    for held in (images, images.contiguous(memory_format=torch.channels_last)):
        arguments = (*table._table, table._stream, seed, held, 4, 6, 7, 2, 0.5, [], [0.1, 0.2, 0.3], torch.bfloat16)
        torch.library.opcheck(torch.ops.fastkd.draw_batch.default, arguments)


# ---- the kernel where only large tensors take it -----------------------------------------------------------


@pytest.mark.parametrize("narrow", [1, 2**29], ids=["64 bits", "long runs"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "n", "size"),
    [((30, 3, 9, 11), 240, (8, 12)), ((20, 3, 32, 32), 25, (32, 32)), ((9, 1, 1, 1), 70000, (1, 1))],
    ids=str,
)
def test_other_paths(shape: tuple[int, ...], n: int, size: tuple[int, int], layout: str, narrow: int) -> None:
    """As if the GPU had one multiprocessor, and as if images were too large for 32 bits."""
    emulated.load()
    table, images = make_table(shape[0], torch.device("cpu")), LAYOUTS[layout](make_images(*shape))
    scale = [0.1, 0.2, 0.3][: shape[1]]
    arguments = (*table._table, table._stream, torch.tensor([3]), images, n, *size, 2, 0.5, [], scale, torch.float32)
    if narrow == 1:
        arguments = (*arguments[:7], n // 8, *arguments[8:])
    batch, indices = torch.ops.fastkd_emulated.draw_batch_within(*arguments, narrow)
    expected, drawn = torch.ops.fastkd.draw_batch(*arguments)
    assert torch.equal(indices, drawn)
    assert torch.equal(batch, expected)


@settings(max_examples=60)
@given(data=st.data())
def test_any_batch_is_that_of_the_cpu(data: st.DataObject) -> None:
    items, channels, height, width = (data.draw(st.integers(1, most)) for most in (9000, 5, 9, 40))
    padding = data.draw(st.integers(0, 6))
    size = tuple(data.draw(st.integers(1, extent + 2 * padding)) for extent in (height, width))
    layout = LAYOUTS[data.draw(st.sampled_from(["nchw", "channels_last", "inside", "transposed"]))]
    images = layout(make_images(items, channels, height, width)[:, :, :height])
    stream, seed = (torch.tensor(data.draw(st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * k))) for k in (2, 1))
    table = make_table(items, torch.device("cpu"))._table
    scale = [0.1 * (c + 1) for c in range(channels)] if data.draw(st.booleans()) else []
    dtype, n, flips = data.draw(st.sampled_from(FLOATS)), data.draw(st.integers(0, 40)), data.draw(st.floats(0, 1))
    arguments = (*table, stream, seed, images, n, *size, padding, flips, [], scale, dtype)
    expected, drawn = torch.ops.fastkd.draw_batch(*arguments)
    with emulated.emulated(data.draw(st.integers(0, 4))):
        batch, indices = torch.ops.fastkd.draw_batch(*arguments)
    assert torch.equal(indices, drawn)
    assert batch.stride() == expected.stride()
    assert torch.equal(batch, expected)


@pytest.mark.parametrize(
    "sizes",
    [
        (10**10, 70000, 3, 256, 256, 224, 224),
        (2**33, 2**31 + 5, 3, 32, 32, 32, 32),
        (2**31, 2**30, 4, 33, 31, 35, 29),
        (5, 2**32, 1, 1, 1, 1, 1),
        (10**6, 3, 3, 12000, 12007, 11000, 11003),
    ],
    ids=str,
)
def test_threads_beyond_2_to_31(sizes: tuple[int, ...], generator: torch.Generator) -> None:
    emulated.load()
    items, count, planes, image_height, image_width, height, width = sizes

    def where(item: tuple[int, int, int], *at: int) -> list[int]:
        return torch.ops.fastkd_emulated.draw_batch_where(list(sizes), list(item), *at).tolist()

    *_, most, elements, total, part, repeats, rounds, blocks = where((0, 0, 0), 0, 0, 0)
    run = rounds * 256 * 4
    assert elements * repeats == planes * height * width
    assert total == count * elements
    assert blocks == -(-total // run)
    assert most <= 2050  # that many draws fit into shared memory
    picks = {0, blocks - 1, *(int(torch.randint(blocks, (), generator=generator)) for _ in range(40))}
    for block in picks:
        first = block * run
        last = min(first + run, total) - 1
        for element in {first, last // 4 * 4, int(torch.randint(first, last + 1, (), generator=generator)) // 4 * 4}:
            vector = (element - first) // 4
            item = (items - 1, int(torch.randint(2, (), generator=generator)), -1)
            index, end, row, plane, byte, base, *_ = where(item, block, vector // 256, vector % 256)
            assert index == element // part * part * repeats + element % part
            image, inside = divmod(index, planes * height * width)
            assert base == first // elements
            assert base <= image < base + most
            assert last // elements < base + most
            c, r, column = inside // (height * width), inside // width % height, inside % width
            assert (plane, row, end) == (c, item[1] + r, min(4, width - column))
            start = ((item[0] * planes + c) * image_height + row) * image_width + item[2] + column
            assert byte == start or row >= image_height
