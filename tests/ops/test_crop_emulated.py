"""The CUDA kernels of crop, on the host: the CPU's bits for anything, and where their threads are in tensors beyond 2^31."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_crop import DTYPES, FLOATS, LAYOUTS, make_images, make_places, place

from fastkd.ops import crop as ops

emulated.load()
kernels = torch.ops.fastkd_emulated
SCHEDULES = range(5)


def same(call: Callable[[], torch.Tensor], seed: int = 0) -> None:
    """The CPU's kernels and the emulated ones give the same bits."""
    expected = call()
    with emulated.emulated(seed):
        result = call()
    assert result.stride() == expected.stride()
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)


# ---- bits ------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(data=st.data())
def test_any_crop_is_that_of_the_cpu(data: st.DataObject) -> None:
    batch, channels, height, width = (data.draw(st.integers(lo, hi)) for lo, hi in ((1, 3), (1, 9), (1, 17), (1, 40)))
    size = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 40)))
    patches = data.draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    dtype = data.draw(st.sampled_from(DTYPES))
    images = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](
        make_images((batch, channels, height, width), dtype, generator)
    )
    places = data.draw(st.lists(st.tuples(place, place), min_size=batch * patches, max_size=batch * patches))
    offsets = torch.tensor(places, dtype=torch.int64).reshape(batch, patches, 2)
    flip = torch.rand(batch, patches, generator=generator) < 0.5 if data.draw(st.booleans()) else None
    outs = FLOATS if dtype == torch.uint8 else [dtype] if dtype in FLOATS else []
    out = data.draw(st.sampled_from([dtype, *outs]))
    center, scale = [], []
    if out in FLOATS and data.draw(st.booleans()):
        center = torch.randn(channels, generator=generator, dtype=torch.float64).tolist()
    if out in FLOATS and data.draw(st.booleans()):
        scale = torch.randn(channels, generator=generator, dtype=torch.float64).tolist()
    same(lambda: ops._crop(images, offsets, flip, *size, center, scale, out), data.draw(st.integers(0, 4)))


@settings(max_examples=200)
@given(data=st.data())
def test_any_gradient_is_that_of_the_cpu(data: st.DataObject) -> None:
    batch, channels, height, width = (data.draw(st.integers(lo, hi)) for lo, hi in ((1, 4), (1, 9), (1, 17), (1, 40)))
    size = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 40)))
    patches = data.draw(st.one_of(st.integers(1, 8), st.integers(30, 70)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    shape = (batch * patches, channels, *size)
    layout = LAYOUTS[data.draw(st.sampled_from(["nchw", "channels_last", "inside", "transposed"]))]
    grad = layout(make_images(shape, data.draw(st.sampled_from(FLOATS)), generator))
    offsets, flip = make_places(batch, patches, size, (height, width), generator)
    if data.draw(st.booleans()):
        offsets[0, 0] = torch.tensor(data.draw(st.tuples(place, place)))
    mirror = flip if data.draw(st.booleans()) else None
    scale = torch.randn(channels, generator=generator, dtype=torch.float64).tolist() if data.draw(st.booleans()) else []
    same(lambda: ops._crop_backward(grad, offsets, mirror, height, width, scale), data.draw(st.integers(0, 4)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [16, 20, 21, 33])
@pytest.mark.parametrize("begin", [0, 1, 3])
def test_alignments(generator: torch.Generator, dtype: torch.dtype, width: int, begin: int) -> None:
    """Rows of whole vectors, of whole words, of neither; images that begin between vectors; patches at every column."""
    storage = make_images((begin + 2 * 3 * 9 * width,), dtype, generator)
    images = storage[begin:].reshape(2, 3, 9, width)
    offsets = torch.stack([torch.arange(-8, 8) // 2, torch.arange(-8, 8) + width // 4], -1).expand(2, 16, 2)
    flip = torch.arange(32).reshape(2, 16) % 3 == 0
    for mirror in (None, flip):
        for size in ((4, 16), (5, 8), (3, 7), (9, width)):
            same(lambda size=size, mirror=mirror: ops._crop(images, offsets, mirror, *size, [], [], dtype))
            if dtype == torch.uint8:
                for out in FLOATS:
                    same(lambda size=size, mirror=mirror, out=out: ops._crop(
                        images, offsets, mirror, *size, [], [0.1, 0.2, 0.3], out))  # fmt: skip


@pytest.mark.parametrize("seed", SCHEDULES)
@pytest.mark.parametrize("channels", [1, 31, 32, 33, 300])
def test_constants_of_few_and_many_channels(generator: torch.Generator, channels: int, seed: int) -> None:
    """Up to 32 channels travel as kernel parameters, and wait for a barrier in shared memory; more by a workspace."""
    center, scale = torch.randn(2, channels, generator=generator, dtype=torch.float64).tolist()
    offsets, flip = make_places(2, 3, (3, 4), (5, 6), generator)
    for layout in ("nchw", "channels_last"):
        images = LAYOUTS[layout](torch.randn(2, channels, 5, 6, generator=generator))
        same(lambda images=images: ops._crop(images, offsets, flip, 3, 4, center, scale, torch.float32), seed)
        same(lambda images=images: ops._crop(images, offsets, flip, 3, 4, center, [], torch.float32), seed)
        grad = LAYOUTS[layout](torch.randn(6, channels, 3, 4, generator=generator))
        same(lambda grad=grad: ops._crop_backward(grad, offsets, flip, 5, 6, scale), seed)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "inside"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8], ids=str)
def test_the_64_bit_paths(generator: torch.Generator, layout: str, dtype: torch.dtype) -> None:
    """What serves images of more than 2^29 elements, at the size of ordinary ones."""
    images = LAYOUTS[layout](make_images((2, 3, 9, 11), dtype, generator))
    for size in ((4, 8), (3, 5), (12, 15)):
        offsets, flip = make_places(2, 5, size, (9, 11), generator)
        for out in {dtype, torch.float16} if dtype == torch.uint8 else {dtype}:
            scale = [0.5, -1.0, 3.0] if out in FLOATS else []
            args = (images, offsets, flip, *size, [], scale, out)
            assert torch.equal(kernels.crop_narrow(*args, 1), ops._crop(*args))


@pytest.mark.parametrize("shape", [(100, 3, 33, 32), (100, 1, 37, 61), (300, 3, 16, 21)], ids=str)
def test_long_runs(generator: torch.Generator, shape: tuple[int, ...]) -> None:
    """Large batches, of which each thread makes several vectors one after the other."""
    offsets, flip = make_places(shape[0], 2, (32, 40), shape[2:], generator)
    images = make_images(shape, torch.float32, generator)
    args = (images, offsets, flip, 32, 40, [], [], torch.float32)
    out = ops._crop(*args)
    assert torch.equal(kernels.crop_narrow(*args, 2**29), out)
    back = (out, offsets, flip, *shape[2:], [])
    assert torch.equal(kernels.crop_backward_within(*back, 15 << 10, 256, 0), ops._crop_backward(*back))


# ---- where threads are, against Python's integers -----------------------------------------------------


@settings(max_examples=500)
@given(data=st.data())
def test_division(data: st.DataObject) -> None:
    narrow = data.draw(st.booleans())
    bits = 31 if narrow else 63
    divisor = data.draw(st.one_of(st.integers(1, 2**bits - 1), st.integers(0, bits - 1).map(lambda e: 2**e)))
    n = data.draw(
        st.one_of(st.integers(0, 2**bits - 1), st.integers(0, (2**bits - 1) // divisor).map(lambda q: q * divisor))
    )
    for i in {max(n - 1, 0), n}:
        assert kernels.divide(i, divisor, narrow) == i // divisor


axis = st.one_of(st.integers(1, 2**29), st.integers(1, 40))


@settings(max_examples=300)
@given(st.tuples(axis, axis, axis), st.integers(0, 2**62), st.one_of(st.integers(-1, 2**29), st.integers(-1, 2**14)))
def test_radix(sizes: tuple[int, int, int], index: int, step: int) -> None:
    expected, rest = [], index + max(step, 0)
    for size in sizes:
        expected.append(rest % size)
        rest //= size
    assert kernels.radix(list(sizes), index, step).tolist() == [*expected, rest]


def threads(blocks: int, rounds: int, total: int, generator: torch.Generator) -> Iterator[tuple[int, int, int, int]]:
    """Block, round and thread of some threads, and the first element of each, counted through the first parts."""
    random = [int(x * blocks) for x in torch.rand(40, generator=generator, dtype=torch.float64)]
    for block in (0, 1, blocks // 2, blocks - 1, *random):
        for turn, thread in ((0, 0), (rounds - 1, 255), (0, 77)):
            first = ((block * rounds + turn) * 256 + thread) * 4
            if first < total:
                yield block, turn, thread, first


# images, patches, planes, unit, image height and width, patch height and width
@pytest.mark.parametrize(
    "sizes",
    [
        (70000, 8, 3, 1, 256, 256, 224, 224),  # 8.4e10 elements
        (40, 50000, 1, 3, 64, 64, 33, 37),  # rows of no whole vectors
        (3, 5, 1, 3, 13000, 13000, 12000, 12007),  # few patches of 4.3e8 elements, few images of 5e8
        (1, 9, 3, 1, 13000, 13000, 13000, 13000),
        (300000, 4, 64, 1, 9, 9, 8, 8),
    ],
    ids=str,
)
def test_threads_beyond_2_to_31(sizes: tuple[int, ...], generator: torch.Generator) -> None:
    images, patches, planes, unit, image_height, image_width, height, width = sizes
    assert images * patches * planes * unit * height * width > 2**31
    offsets, _ = make_places(images, patches, (height, width), (image_height, image_width), generator)
    row, image_row = width * unit, image_width * unit

    def where(*at: int) -> list[int]:
        return kernels.crop_where(offsets, list(sizes), *at).tolist()

    *_, narrow, repeats, part, source_step, rounds, blocks, total = where(0, 0, 0)
    assert narrow
    assert total * repeats == images * patches * planes * height * row
    assert blocks == math.ceil(total / (256 * 4 * rounds))
    rows, further = divmod(part, row)  # of a part: some of a plane, or whole planes
    assert further == 0
    image_rows = rows if rows < height else rows // height * image_height
    assert repeats == 1 or source_step == image_rows * image_row
    for *at, first in threads(blocks, rounds, total, generator):
        index, end, row_at, plane, byte, *_ = where(*at)
        assert index == first // part * part * repeats + first % part
        column, r, c = index % row, index // row % height, index // row // height % planes
        patch = index // row // height // planes
        y, x = offsets.reshape(-1, 2)[patch].tolist()  # as far as it makes a difference
        y, x = max(-height, min(y, image_height)), max(-width, min(x, image_width))
        assert (end, row_at, plane) == (min(4, row - column), y + r, c)
        assert byte == 4 * (((patch // patches * planes + c) * image_height + row_at) * image_row + x * unit + column)


# images, patches, planes, unit, image height and width, patch height and width
@pytest.mark.parametrize(
    "sizes",
    [
        (70000, 8, 3, 1, 256, 256, 224, 224),
        (3, 5, 1, 3, 13000, 13001, 12000, 12007),  # wide boxes of several channels
        (2**31 + 5, 8, 3, 1, 32, 32, 8, 8),
        (2**31, 1, 64, 1, 8, 8, 8, 8),
        (2**30, 3, 5, 1, 7, 7, 5, 3),
        (2, 3, 1, 1, 2**33, 3, 2**32 + 5, 2),  # more rows than 32 bits count
        (2, 3, 1, 1, 3, 2**33, 2, 2**32 + 5),
        (2, 3, 2, 1, 3, 2**33, 2, 5),
        (5, 3, 1, 1000, 700, 7000, 600, 7),  # units longer than a box
        (5, 3, 1, 5, 2**20, 2**20, 30, 30),
    ],
    ids=str,
)
@pytest.mark.parametrize("flip", [False, True])
def test_tiles_of_the_gradient_beyond_2_to_31(sizes: tuple[int, ...], flip: bool, generator: torch.Generator) -> None:
    """Tiles cover the gradient, and boxes lie where the patch's elements belong."""
    images, patches, planes, unit, image_height, image_width, height, width = sizes
    row, image_row = width * unit, image_width * unit

    def where(place: tuple[int, int], tile: int, patch: int) -> list[int]:
        return kernels.crop_backward_where(torch.tensor(place), list(sizes), flip, tile, patch).tolist()

    tiles, box_planes, box_rows, box_columns = where((0, 0), 0, 0)[-4:]
    assert box_planes * box_rows * box_columns <= 256
    random = [int(x * tiles) for x in torch.rand(40, generator=generator, dtype=torch.float64)]
    end = 0  # of the tile before, where they follow one another
    for tile in (0, 1, 2, 3, tiles - 1, *random):
        image, plane, y, x, tile_planes, rows, columns, out, *_ = where((0, 0), tile, 0)
        assert out == ((image * planes + plane) * image_height + y) * image_row + x
        assert plane + tile_planes <= planes
        assert y + rows <= image_height
        assert x + columns <= image_row
        if tile in (0, 1, 2, 3) and columns == image_row:
            assert out == end
            end += tile_planes * rows * columns
        if tile == tiles - 1:
            assert (image, plane + tile_planes, y + rows, x + columns) == (images - 1, planes, image_height, image_row)
        for dy, dx in ((0, 0), (-1, 1), (2, -2), (-height // 2, -width // 2), (1 - height, 0), (0, 1 - width)):
            top, left = y + dy, x // unit + dx  # of the patch: near the tile
            patch = image * patches + 1
            *_, source, first, column, count, box, mirrored, clipped, _, _, _, _ = where((top, left), tile, patch)
            begin, stop = max(top, y), min(top + height, y + rows)
            from_, to = max(left * unit, x), min(left * unit + row, x + columns)
            if begin >= stop or from_ >= to:
                assert count == 0
                continue
            line, at = divmod(source, row)  # of the patches
            assert line // height == patch * planes + plane
            assert first + y == top + line % height  # the row of the image that the first one is added to
            if row > 256:
                assert (first + y, box, count) == (begin, to - from_, box_columns * (stop - begin))
            elif row * height <= 256:
                assert (first + y, at, count) == (top, 0, tile_planes * height * row)
            else:
                assert (first + y, at, count) == (begin, 0, row * (stop - begin))
            length = box if row > 256 else row
            for e in {0, 1 % length, length - 1}:
                within = column - e + 2 * (e % unit) if mirrored else column + e
                stored, channel = divmod(at + e, unit)
                expected = left + (width - 1 - stored if flip else stored)
                assert x + within == expected * unit + channel
                assert clipped or 0 <= within < columns


@pytest.mark.parametrize("box", [8, 40, 256])
@pytest.mark.parametrize("tile_bytes", [512, 1300, 15 << 10])
@pytest.mark.parametrize("channels", [1, 3, 5, 20])
def test_tiles_and_boxes_of_any_size(generator: torch.Generator, channels: int, tile_bytes: int, box: int) -> None:
    """Parts of rows, rows, planes: patches larger than a tile, several tiles of an image, pieces of a patch's row."""
    for layout in ("nchw", "channels_last"):
        for shape, size, patches in (((2, 9, 11), (4, 8), 3), ((2, 33, 7), (3, 5), 40), ((1, 6, 50), (9, 41), 2)):
            offsets, flip = make_places(shape[0], patches, size, shape[1:], generator)
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                grad = LAYOUTS[layout](make_images((shape[0] * patches, channels, *size), dtype, generator))
                scale = torch.randn(channels, generator=generator, dtype=torch.float64).tolist()
                for mirror, by in ((None, []), (flip, scale)):
                    back = (grad, offsets, mirror, *shape[1:], by)
                    result = kernels.crop_backward_within(*back, tile_bytes, box, 3)
                    assert torch.equal(result, ops._crop_backward(*back)), (layout, shape, dtype)


@pytest.mark.parametrize("rounds", [1, 2, 5, 8])
@pytest.mark.parametrize("patches", [1, 3, 8, 14, 15, 28, 33])
def test_patches_of_several_images_at_once(generator: torch.Generator, patches: int, rounds: int) -> None:
    """Few patches of small images are looked at for some images together, the last of which may be missing."""
    offsets, flip = make_places(11, patches, (3, 4), (5, 8), generator)
    grad = torch.randn(11 * patches, 3, 3, 4, generator=generator)
    back = (grad, offsets, flip, 5, 8, [])
    assert torch.equal(kernels.crop_backward_within(*back, 15 << 10, 256, rounds), ops._crop_backward(*back))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("begin", [0, 1, 3])
def test_gradients_that_begin_anywhere(generator: torch.Generator, dtype: torch.dtype, begin: int) -> None:
    """Boxes of all lanes and of some, full and not, on patches that lie between vectors; rows of no whole vectors."""
    for channels, size, extent in (
        (3, (8, 8), (32, 32)),
        (1, (16, 16), (17, 19)),
        (2, (33, 64), (40, 224)),
        (5, (3, 7), (9, 13)),
    ):
        storage = make_images((begin + 6 * channels * size[0] * size[1],), dtype, generator)
        grad = storage[begin:].reshape(6, channels, *size)
        offsets = torch.tensor(
            [[[0, 0], [1, 3], [extent[0] - size[0], extent[1] - size[1]]], [[-1, 2], [2, -3], [5, 5]]]
        )
        same(lambda grad=grad, offsets=offsets, extent=extent: ops._crop_backward(grad, offsets, None, *extent, []))
