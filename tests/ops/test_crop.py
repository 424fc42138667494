"""Crops against slicing: values, gradients, memory formats, places outside the image, threads, seeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

import fastkd
from fastkd import _C
from fastkd.ops import crop as ops
from fastkd.reference import crop as reference

pytestmark = pytest.mark.cuda_kernels

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
HUGE = [-(2**63), -(2**63) + 1, -(2**31), 2**31, 2**63 - 41, 2**63 - 1]

# ways to hold the same images
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nchw": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "inside": lambda x: F.pad(x, (2, 3, 1, 4))[:, :, 1 : 1 + x.shape[2], 2 : 2 + x.shape[3]],
    "inside_channels_last": lambda x: F.pad(x, (2, 3, 1, 4)).contiguous(memory_format=torch.channels_last)[
        :, :, 1 : 1 + x.shape[2], 2 : 2 + x.shape[3]
    ],
    "every_second_column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "every_second_image": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "channel_in_the_middle": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}


def make_images(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 120, shape, generator=generator).to(dtype)


def make_places(
    batch: int, patches: int, size: tuple[int, int], extent: tuple[int, int], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets from wholly outside on one side to wholly outside on the other, and flips."""
    y, x = (
        torch.randint(-s - 1, e + 2, (batch, patches), generator=generator) for s, e in zip(size, extent, strict=True)
    )
    return torch.stack([y, x], -1), torch.rand(batch, patches, generator=generator) < 0.5


def with_threads(threads: int, call: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_slicing(device: torch.device, generator: torch.Generator, layout: str, dtype: torch.dtype) -> None:
    for channels, extent, size, patches in [
        (3, (8, 8), (3, 5), 2),
        (1, (1, 1), (1, 1), 1),
        (2, (3, 41), (2, 17), 9),
        (3, (41, 3), (41, 2), 3),
        (5, (41, 70), (33, 67), 4),
        (4, (7, 6), (9, 11), 5),  # patches larger than the image
    ]:
        images = make_images((3, channels, *extent), dtype, generator)
        offsets, flip = make_places(3, patches, size, extent, generator)
        held = LAYOUTS[layout](images.to(device))
        assert torch.equal(held.cpu(), images)
        for mirror in (None, flip):
            out = fastkd.crop_patches(held, offsets.to(device), size, None if mirror is None else mirror.to(device))
            assert out.dtype == dtype
            assert torch.equal(out.cpu(), reference.crop(images, offsets, size, mirror))
            channels_last = layout.endswith("channels_last") and channels > 1
            assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_random_patches_are_slices_of_the_padded_image(
    device: torch.device, generator: torch.Generator, padding: int
) -> None:
    images = torch.rand(5, 3, 9, 11, generator=generator).to(device)
    patches, offsets = fastkd.random_patches(images, (6, 7), 4, padding=padding)
    assert offsets.shape == (5, 4, 2)
    padded = F.pad(images, [padding] * 4)
    for b in range(5):
        for j in range(4):
            y, x = (offsets[b, j] + padding).tolist()
            assert torch.equal(patches[b * 4 + j], padded[b, :, y : y + 6, x : x + 7])


def test_offsets_without_a_patch_dimension(device: torch.device, generator: torch.Generator) -> None:
    images = torch.rand(3, 2, 5, 5, generator=generator).to(device)
    offsets = torch.tensor([[0, 1], [2, 2], [1, 0]], device=device)
    flip = torch.tensor([True, False, True], device=device)
    assert torch.equal(
        fastkd.crop_patches(images, offsets, 3, flip), fastkd.crop_patches(images, offsets[:, None], 3, flip[:, None])
    )


@pytest.mark.parametrize("y", HUGE)
@pytest.mark.parametrize("x", HUGE)
def test_far_places_are_empty(device: torch.device, y: int, x: int) -> None:
    images = torch.ones(1, 2, 5, 6, device=device, requires_grad=True)
    for place in ([y, x], [0, x], [y, 0]):
        out = fastkd.crop_patches(images, torch.tensor([[place, [1, 1]]], device=device), (4, 3))
        assert not out[0].any()
        assert out[1].all()
        (gradient,) = torch.autograd.grad(out.sum(), images)
        assert gradient.sum() == 2 * 4 * 3


def test_more_than_2_to_31_elements(device: torch.device) -> None:
    side = 46400  # 2.15e9 pixels, of which only the touched pages exist
    images = torch.empty(1, 1, side, side, dtype=torch.uint8, device=device)
    images[0, 0, -3:, -3:] = torch.arange(1, 10, dtype=torch.uint8).reshape(3, 3)
    out = fastkd.crop_patches(images, torch.tensor([[side - 3, side - 3]], device=device), 4)
    assert torch.equal(out[0, 0, :3, :3].cpu(), torch.arange(1, 10, dtype=torch.uint8).reshape(3, 3))
    assert not out[0, 0, 3].any()


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_empty(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    images = torch.zeros(shape, dtype=dtype, device=device, requires_grad=dtype.is_floating_point)
    patches, offsets = fastkd.random_patches(images, 4, 3)
    assert patches.shape == (3 * shape[0], shape[1], 4, 4)
    assert offsets.shape == (shape[0], 3, 2)
    assert fastkd.random_crop_flip(images).shape == shape
    assert fastkd.crop_patches(images, offsets[:, :0], 4).shape == (0, shape[1], 4, 4)
    if images.requires_grad:
        assert torch.autograd.grad(patches.sum(), images)[0].shape == shape


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_gradient_is_that_of_slices_bit_for_bit(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype, layout: str
) -> None:
    """Three and more overlapping patches, summed in autograd's order; 16-bit floats in fp32, rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for channels, extent, size, patches in [
        (3, (8, 8), (6, 5), 5),
        (2, (3, 41), (2, 39), 9),
        (4, (70, 66), (47, 33), 7),
        (1, (9, 300), (9, 290), 4),
        (3, (32, 32), (8, 8), 8),
        (3, (5, 6), (7, 9), 6),
    ]:
        images = make_images((2, channels, *extent), dtype, generator)
        offsets, flip = make_places(2, patches, size, extent, generator)
        grad = torch.randn(2 * patches, channels, *size, generator=generator, dtype=torch.float64)
        grad = (grad * torch.exp(2 * torch.randn(grad.shape, generator=generator, dtype=torch.float64))).to(dtype)
        for mirror in (None, flip):
            leaf = images.to(wide).clone().requires_grad_()
            (expected,) = torch.autograd.grad(reference.crop(leaf, offsets, size, mirror), leaf, grad.to(wide))
            held = LAYOUTS[layout](images.to(device)).requires_grad_()
            out = fastkd.crop_patches(held, offsets.to(device), size, None if mirror is None else mirror.to(device))
            (gradient,) = torch.autograd.grad(out, held, LAYOUTS[layout](grad.to(device)))
            assert torch.equal(gradient.cpu(), expected.to(dtype))
            assert gradient.stride() == held.stride()


def test_gradient_of_many_small_images(device: torch.device, generator: torch.Generator) -> None:
    """So many that a GPU's thread makes several, one after the other; and of no patches."""
    grad = torch.randn(1100, 2, 1, 2, 3, generator=generator)
    offsets = torch.zeros(1100, 2, 2, dtype=torch.int64)
    result = ops._crop_backward(grad.flatten(0, 1).to(device), offsets.to(device), None, 2, 3, [])
    assert torch.equal(result.cpu(), grad[:, 0] + grad[:, 1])
    none = ops._crop_backward(grad[:0].flatten(0, 1).to(device), offsets[:, :0].to(device), None, 2, 3, [])
    assert torch.equal(none.cpu(), torch.zeros(1100, 1, 2, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_any_layout(device: torch.device, generator: torch.Generator, layout: str) -> None:
    offsets, flip = make_places(2, 3, (4, 5), (6, 7), generator)
    grad = torch.randn(6, 3, 4, 5, generator=generator)
    offsets, flip, grad = offsets.to(device), flip.to(device), grad.to(device)
    one = ops._crop_backward(grad, offsets, flip, 6, 7, [])
    assert torch.equal(one, ops._crop_backward(LAYOUTS[layout](grad), offsets, flip, 6, 7, []))
    expanded = torch.ones((), device=device).expand(6, 3, 4, 5)
    dense = torch.ones(6, 3, 4, 5, device=device)
    assert torch.equal(*(ops._crop_backward(ones, offsets, None, 6, 7, []) for ones in (expanded, dense)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradcheck(
    device: torch.device, few: bool, generator: torch.Generator, memory_format: torch.memory_format
) -> None:
    images = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64).to(device)
    images = images.contiguous(memory_format=memory_format).requires_grad_()
    offsets, flip = (t.to(device) for t in make_places(2, 4, (3, 3), (5, 4), generator))

    def normalised(x: torch.Tensor) -> torch.Tensor:
        return ops.crop(x, offsets, (3, 3), flip, center=[0.5, -1.0, 2.0], scale=[2.0, -0.25, 3.0])

    for function in (lambda x: fastkd.crop_patches(x, offsets, (3, 3), flip), normalised):
        assert torch.autograd.gradcheck(function, images, fast_mode=few)
        assert torch.autograd.gradgradcheck(function, images, fast_mode=few)


def test_a_tangent_in_the_backward_is_refused(device: torch.device, generator: torch.Generator) -> None:
    images = torch.randn(1, 1, 5, 5, generator=generator).to(device).requires_grad_()
    patches = fastkd.crop_patches(images, torch.zeros(1, 1, 2, dtype=torch.int64, device=device), 4)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(patches), torch.ones_like(patches))
        with pytest.raises(RuntimeError, match="crop_backward has no forward-mode derivative"):
            torch.autograd.grad(patches, images, upstream)


def test_opcheck(device: torch.device, generator: torch.Generator) -> None:
    seed = torch.tensor([7], device=device)
    torch.library.opcheck(torch.ops.fastkd.crop_offsets.default, (seed, 2, 3, -1, 9, 0, 5, 0.5))
    offsets, flip = (t.to(device) for t in make_places(2, 3, (3, 2), (6, 5), generator))
    for layout in ("nchw", "inside_channels_last"):
        images = LAYOUTS[layout](torch.randn(2, 3, 6, 5, generator=generator).to(device))
        grad = LAYOUTS[layout](torch.randn(6, 3, 3, 2, generator=generator).to(device))
        byte = LAYOUTS[layout](torch.ones(2, 3, 6, 5, dtype=torch.uint8, device=device))
        for args in [
            (images.requires_grad_(), offsets, None, 3, 2, [], [], torch.float32),
            (images, offsets, flip, 3, 2, [0.5] * 3, [2.0] * 3, torch.float32),
            (byte, offsets, flip, 3, 2, [], [0.25] * 3, torch.bfloat16),
        ]:
            torch.library.opcheck(torch.ops.fastkd.crop.default, args)
        for flips, scale in ((None, []), (flip, [2.0] * 3)):
            torch.library.opcheck(
                torch.ops.fastkd.crop_backward.default, (grad.requires_grad_(), offsets, flips, 6, 5, scale)
            )


@pytest.mark.compiles
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compile(memory_format: torch.memory_format) -> None:
    images = torch.randn(4, 3, 10, 9).contiguous(memory_format=memory_format).requires_grad_()

    @torch.compile(fullgraph=True)
    def compiled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        patches, offsets = fastkd.random_patches(x * 2, (5, 4), 3, padding=1)
        return patches, fastkd.crop_patches(x * 2, offsets, (5, 4)), offsets

    patches, replay, offsets = compiled(images)
    expected = fastkd.crop_patches(images * 2, offsets, (5, 4))
    assert torch.equal(patches, expected)
    assert torch.equal(replay, expected)
    assert patches.is_contiguous(memory_format=memory_format)
    grad = torch.randn(patches.shape)
    (gradient,) = torch.autograd.grad([patches, replay], images, [grad, 2 * grad])
    torch.testing.assert_close(gradient, 3 * torch.autograd.grad(expected, images, grad)[0])

    def augment(x: torch.Tensor) -> torch.Tensor:
        return fastkd.random_crop_flip(x, padding=2, mean=(0.1, 0.2, 0.3), std=0.5, flip_probability=1.0)

    byte = torch.full((4, 3, 10, 9), 51, dtype=torch.uint8)
    out = torch.compile(augment, fullgraph=True)(byte)
    inside = (0.2 - torch.tensor([0.1, 0.2, 0.3])) / 0.5
    assert out.shape == byte.shape
    torch.testing.assert_close(out[:, :, 5, 4], inside.expand(4, 3))


# ---- the same bits everywhere ----------------------------------------------------------------------


def everything(device: torch.device) -> tuple[torch.Tensor, ...]:
    """One result of each path, from fixed inputs, large enough for several threads."""
    generator = torch.Generator().manual_seed(1)
    results = list(ops.crop_offsets(torch.tensor([3], device=device), 40, 60, (-3, 27), (-5, 2**61), 0.3))
    offsets, flip = (t.to(device) for t in make_places(9, 7, (31, 37), (40, 43), generator))
    for layout in ("nchw", "channels_last"):
        byte = torch.randint(0, 256, (9, 3, 40, 43), generator=generator, dtype=torch.uint8)
        byte = LAYOUTS[layout](byte.to(device))
        for dtype in FLOATS:
            images = LAYOUTS[layout](make_images((9, 3, 40, 43), dtype, generator).to(device))
            constants = {"center": [0.3, -0.1, 7.7], "scale": [1 / 3, 1.7, -0.01]}
            results.append(ops.crop(images, offsets, (31, 37), flip))
            results.append(ops.crop(images, offsets, (31, 37), flip, **constants))
            results.append(ops.crop(byte, offsets, (31, 37), flip, **constants, dtype=dtype))
            results.append(ops._crop_backward(results[-1], offsets, flip, 40, 43, constants["scale"]))
            results.append(ops._crop_backward(results[-2], offsets, None, 40, 43, []))
    return tuple(result.cpu() for result in results)


@pytest.fixture(scope="module")
def truth() -> tuple[torch.Tensor, ...]:
    _C.set_instruction_set("baseline")
    result = with_threads(1, lambda: everything(torch.device("cpu")))
    _C.set_instruction_set(fastkd.build_info()["cpu_instruction_set_best"])
    return result


def test_devices_instruction_sets_and_threads_agree(
    truth: tuple[torch.Tensor, ...], device: torch.device, few: bool
) -> None:
    for threads in (2,) if few else (1, 2, 5):  # CUDA kernels do not know of them
        for one, other in zip(truth, with_threads(threads, lambda: everything(device)), strict=True):
            assert torch.equal(one, other)


# ---- normalisation ---------------------------------------------------------------------------------

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def all_bytes() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)


def test_bytes_become_x_over_255_exactly(device: torch.device) -> None:
    out = fastkd.random_crop_flip(all_bytes().to(device), padding=0, flip_probability=0.0)
    assert torch.equal(out.cpu(), all_bytes().float() / 255)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("source", [torch.uint8, *FLOATS], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_normalisation(
    device: torch.device, generator: torch.Generator, source: torch.dtype, dtype: torch.dtype, layout: str
) -> None:
    images = all_bytes() if source == torch.uint8 else torch.rand(2, 3, 16, 16, generator=generator).to(source)
    held = LAYOUTS[layout](images.to(device))
    for mean, std in ((MEAN, STD), (0.5, None), (None, STD), (None, 2.0)):
        out = fastkd.random_crop_flip(held, 0, None, 0.0, mean, std, dtype)
        assert out.dtype == dtype
        truth = reference.normalise(images, mean, std, torch.float64)
        ours = (out.cpu().double() - truth).abs().max()
        arithmetic = dtype if source == torch.uint8 else source
        if arithmetic == torch.float64:  # the truth is not better than that
            assert ours <= 4 * torch.finfo(dtype).eps * truth.abs().max()
        else:
            torchs = reference.normalise(images, mean, std, arithmetic).to(dtype)
            assert ours <= 2 * (torchs.double() - truth).abs().max()


def test_crop_flip_normalise_together(device: torch.device, generator: torch.Generator) -> None:
    """Padding is black before normalisation, so (0 - mean) / std after it."""
    images = torch.randint(0, 256, (50, 3, 9, 8), generator=generator, dtype=torch.uint8)
    random = torch.Generator(device).manual_seed(3)
    out = fastkd.random_crop_flip(images.to(device), 3, (8, 10), 0.5, MEAN, STD, generator=random).cpu()
    limits = torch.iinfo(torch.int64)
    seed = torch.randint(
        limits.min, limits.max, (1,), device=device, generator=torch.Generator(device).manual_seed(3)
    ).item()
    offsets, flip = reference.crop_offsets(int(seed), 50, 1, (-3, 8), (-3, 5), 0.5)
    expected = reference.normalise(reference.crop(images, offsets, (8, 10), flip), MEAN, STD, torch.float32)
    assert 0 < flip.sum() < 50
    torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-7)


# ---- anything --------------------------------------------------------------------------------------

place = st.one_of(st.integers(-12, 12), st.sampled_from(HUGE), st.integers(-(2**63), 2**63 - 1))


@settings(max_examples=80)
@given(data=st.data())
def test_fuzz(device: torch.device, data: st.DataObject) -> None:
    batch, channels, height, width = (data.draw(st.integers(lo, hi)) for lo, hi in ((0, 3), (0, 5), (0, 9), (0, 12)))
    size = data.draw(st.tuples(st.integers(1, 11), st.integers(1, 35)))
    patches = data.draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    dtype = data.draw(st.sampled_from(FLOATS))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    images = make_images((batch, channels, height, width), dtype, generator)
    count = batch * patches
    places = data.draw(st.lists(st.tuples(place, place), min_size=count, max_size=count))
    offsets = torch.tensor(places, dtype=torch.int64).reshape(batch, patches, 2)
    flip = torch.rand(batch, patches, generator=generator) < 0.5 if data.draw(st.booleans()) else None
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
    held = LAYOUTS[layout](images.to(device)).detach().requires_grad_()
    leaf = images.to(wide).clone().requires_grad_()
    out = fastkd.crop_patches(held, offsets.to(device), size, None if flip is None else flip.to(device))
    expected = reference.crop(leaf, offsets, size, flip)
    assert torch.equal(out.cpu(), expected.to(dtype))
    grad = make_images(tuple(out.shape), dtype, generator)
    (gradient,) = torch.autograd.grad(out, held, LAYOUTS[layout](grad.to(device)))
    if expected.requires_grad:
        assert torch.equal(gradient.cpu(), torch.autograd.grad(expected, leaf, grad.to(wide))[0].to(dtype))
    else:  # nothing but zeros came out
        assert not gradient.any()
