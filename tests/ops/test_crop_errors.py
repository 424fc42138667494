"""What crop refuses: every message names the argument, what was given and what is allowed; nothing crashes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastkd
from fastkd.ops import crop as ops

IMAGES = torch.zeros(2, 3, 8, 10)
BYTES = IMAGES.byte()
OFFSETS = torch.zeros(2, 4, 2, dtype=torch.int64)
FLIP = torch.zeros(2, 4, dtype=torch.bool)
META = torch.device("meta")

Case = tuple[Callable[..., Any], dict[str, Any], type[Exception], str]


def patches(**given: Any) -> Any:
    return fastkd.random_patches(**{"images": IMAGES, "size": 4, **given})


def replay(**given: Any) -> Any:
    return fastkd.crop_patches(**{"images": IMAGES, "offsets": OFFSETS, "size": 4, **given})


def augment(**given: Any) -> Any:
    return fastkd.random_crop_flip(**{"images": BYTES, **given})


PYTHON: list[Case] = [
    (patches, {"images": [1]}, TypeError, "images is list, must be a tensor"),
    (patches, {"images": IMAGES[0]}, ValueError, "images has shape (3, 8, 10), must be [B, C, H, W]; give a mask"),
    (patches, {"images": IMAGES[None]}, ValueError, "images has shape (1, 2, 3, 8, 10), must be [B, C, H, W]"),
    (patches, {"images": IMAGES.to(torch.complex64)}, TypeError, "images has dtype torch.complex64, must be float32, "),
    (patches, {"size": 9}, ValueError, "size is (9, 9), must be at most that of the image, (8, 10)"),
    (patches, {"size": (8, 11)}, ValueError, "size is (8, 11), must be at most that of the image, (8, 10)"),
    (
        patches,
        {"size": (13, 8), "padding": 2},
        ValueError,
        "must be at most that of the image and its padding, (12, 14)",
    ),
    (patches, {"size": 0}, ValueError, "size is 0, must be positive"),
    (patches, {"size": (4, -1)}, ValueError, "size is (4, -1), must be positive"),
    (patches, {"size": 2.0}, TypeError, "size is 2.0, must be an int or a pair of them, (height, width)"),
    (patches, {"size": (2, 2, 2)}, TypeError, "size is (2, 2, 2), must be an int or a pair of them, (height, width)"),
    (patches, {"size": (2, 2.5)}, TypeError, "size is (2, 2.5), must be an int or a pair of them, (height, width)"),
    (patches, {"patches_per_image": 0}, ValueError, "patches_per_image is 0, must be at least 1"),
    (patches, {"patches_per_image": -3}, ValueError, "patches_per_image is -3, must be at least 1"),
    (patches, {"patches_per_image": 1.5}, TypeError, "patches_per_image is float, must be an int"),
    (patches, {"padding": -1}, ValueError, "padding is -1, must be at least 0"),
    (patches, {"padding": "same"}, TypeError, "padding is str, must be an int"),
    (
        patches,
        {"images": IMAGES.to(META), "generator": torch.Generator()},
        ValueError,
        "generator is on cpu, must be on the device of images, meta",
    ),
    (replay, {"offsets": OFFSETS.float()}, TypeError, "offsets has dtype torch.float32, must be torch.int64"),
    (replay, {"offsets": [[0, 0]]}, TypeError, "offsets is list, must be a tensor"),
    (
        replay,
        {"offsets": OFFSETS[:1]},
        ValueError,
        "offsets has shape (1, 4, 2), must be (2, patches, 2) or (2, 2): (y, x) for each of the 2 images",
    ),
    (replay, {"offsets": OFFSETS[..., :1]}, ValueError, "offsets has shape (2, 4, 1), must be (2, patches, 2)"),
    (replay, {"offsets": OFFSETS[0, 0]}, ValueError, "offsets has shape (2,), must be (2, patches, 2)"),
    (replay, {"offsets": OFFSETS.to(META)}, ValueError, "offsets is on meta, must be on the device of images, cpu"),
    (replay, {"flip": FLIP.int()}, TypeError, "flip has dtype torch.int32, must be torch.bool"),
    (replay, {"flip": FLIP[:, :2]}, ValueError, "flip has shape (2, 2), must be (2, 4), one for each patch"),
    (replay, {"flip": FLIP.to(META)}, ValueError, "flip is on meta, must be on the device of images, cpu"),
    (augment, {"images": BYTES.int()}, TypeError, "images has dtype torch.int32, must be float32, float64, bfloat16, "),
    (
        augment,
        {"size": 17},
        ValueError,
        "size is (17, 17), must be at most that of the image and its padding, (16, 18)",
    ),
    (augment, {"padding": -4}, ValueError, "padding is -4, must be at least 0"),
    (augment, {"flip_probability": 1.5}, ValueError, "flip_probability is 1.5, must be in [0, 1]"),
    (augment, {"flip_probability": -0.1}, ValueError, "flip_probability is -0.1, must be in [0, 1]"),
    (augment, {"flip_probability": float("nan")}, ValueError, "flip_probability is nan, must be in [0, 1]"),
    (augment, {"mean": (0.5, 0.5)}, ValueError, "mean has 2 values, must have one, or one for each of the 3 channels"),
    (augment, {"mean": (0.5, 0.5, float("inf"))}, ValueError, "mean is (0.5, 0.5, inf), must be finite"),
    (augment, {"mean": torch.zeros(3)}, TypeError, "mean is a tensor, must be numbers"),
    (augment, {"std": [1.0] * 4}, ValueError, "std has 4 values, must have one, or one for each of the 3 channels"),
    (augment, {"std": (1.0, 0.0, 1.0)}, ValueError, "std is (1.0, 0.0, 1.0), must be positive"),
    (augment, {"std": -1}, ValueError, "std is -1, must be positive"),
    (augment, {"std": float("nan")}, ValueError, "std is nan, must be finite"),
    (augment, {"dtype": torch.int32}, TypeError, "dtype is torch.int32, must be float32, float64, bfloat16 or float16"),
]


def crop(**given: Any) -> Any:
    args = {"images": IMAGES, "offsets": OFFSETS, "flip": FLIP, "height": 4, "width": 4, "center": [], "scale": []}
    return ops._crop(*{**args, "dtype": torch.float32, **given}.values())


def backward(**given: Any) -> Any:
    args = {"grad_patches": torch.zeros(8, 3, 4, 4), "offsets": OFFSETS, "flip": FLIP, "height": 8, "width": 10}
    return ops._crop_backward(*{**args, "scale": [], **given}.values())


def places(**given: Any) -> Any:
    args = {"seed": torch.tensor([1]), "batch": 2, "patches": 4, "y_low": 0, "y_count": 5, "x_low": 0, "x_count": 7}
    return torch.ops.fastkd.crop_offsets(*{**args, "flip_probability": 0.5, **given}.values())


OPERATORS: list[Case] = [
    (crop, {"images": IMAGES[0]}, RuntimeError, "images has shape (3, 8, 10), must have 4 dimensions"),
    (
        crop,
        {"images": BYTES.to(torch.complex64), "dtype": torch.complex64},
        RuntimeError,
        "images has dtype another dtype",
    ),
    (crop, {"dtype": torch.float16}, RuntimeError, "images has dtype float32, must be one of uint8"),
    (crop, {"images": BYTES, "dtype": torch.int32}, RuntimeError, "dtype is int32, must be float32, float64, bfloat16"),
    (
        crop,
        {"images": BYTES, "dtype": torch.uint8, "scale": [1.0] * 3},
        RuntimeError,
        "dtype is uint8, must be float32",
    ),
    (crop, {"offsets": OFFSETS.int()}, RuntimeError, "offsets has dtype int32, must be one of int64"),
    (crop, {"offsets": OFFSETS[:1]}, RuntimeError, "offsets has shape (1, 4, 2), must be (2, 4, 2)"),
    (crop, {"offsets": OFFSETS[0]}, RuntimeError, "offsets has shape (4, 2), must have 3 dimensions"),
    (crop, {"flip": FLIP[:, :3]}, RuntimeError, "flip has shape (2, 3), must be (2, 4)"),
    (crop, {"flip": FLIP.byte()}, RuntimeError, "flip has dtype uint8, must be one of bool"),
    (crop, {"height": 0}, RuntimeError, "size is (0, 4), must be positive"),
    (crop, {"width": -(2**63)}, RuntimeError, "must be positive"),
    (crop, {"height": 2**40, "width": 2**40}, RuntimeError, "patches would have more than 2^59 elements"),
    (crop, {"center": [1.0]}, RuntimeError, "center has 1 values, must have one for each of the 3 channels, or none"),
    (crop, {"scale": [1.0] * 4}, RuntimeError, "scale has 4 values, must have one for each of the 3 channels, or none"),
    (
        backward,
        {"grad_patches": torch.zeros(7, 3, 4, 4)},
        RuntimeError,
        "grad_patches has shape (7, 3, 4, 4), must have 8",
    ),
    (backward, {"grad_patches": torch.zeros(8, 4, 4)}, RuntimeError, "grad_patches has shape (8, 4, 4), must have 4"),
    (backward, {"grad_patches": torch.zeros(8, 3, 4, 4).int()}, RuntimeError, "grad_patches has dtype int32, must be"),
    (backward, {"offsets": OFFSETS[0]}, RuntimeError, "offsets has shape (4, 2), must have 3 dimensions"),
    (backward, {"flip": FLIP[:1]}, RuntimeError, "flip has shape (1, 4), must be (2, 4)"),
    (backward, {"height": -1}, RuntimeError, "size is (-1, 10), must not be negative"),
    (backward, {"height": 2**62, "width": 2**62}, RuntimeError, "grad_images would have more than 2^59 elements"),
    (backward, {"scale": [1.0]}, RuntimeError, "scale has 1 values, must have one for each of the 3 channels, or none"),
    (places, {"seed": torch.tensor([1.0])}, RuntimeError, "seed has dtype float32, must be one of int64"),
    (places, {"seed": torch.tensor([1, 2])}, RuntimeError, "seed has shape (2,), must hold one number"),
    (places, {"batch": -1}, RuntimeError, "batch is -1, must not be negative"),
    (places, {"patches": -1}, RuntimeError, "patches is -1, must not be negative"),
    (places, {"batch": 2**40, "patches": 2**40}, RuntimeError, "offsets would have more than 2^59 elements"),
    (places, {"y_count": 0}, RuntimeError, "y_count is 0, must be in [1, 2^62]"),
    (places, {"x_low": 2**63 - 1}, RuntimeError, "x_low is 9223372036854775807, must be within 2^62 of 0"),
    (places, {"flip_probability": 2.0}, RuntimeError, "flip_probability is 2, must be in [0, 1]"),
    (places, {"flip_probability": float("nan")}, RuntimeError, "flip_probability is nan, must be in [0, 1]"),
]


@pytest.mark.parametrize(
    ("call", "given", "error", "message"), PYTHON + OPERATORS, ids=lambda v: str(v) if isinstance(v, str) else ""
)
def test_errors(call: Callable[..., Any], given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(**given)


def test_what_the_errors_leave_out_works() -> None:
    """The arguments that the cases above start from are fine, so each case fails for the reason it names."""
    for call in (patches, replay, augment, crop, backward, places):
        call()
    for images in (IMAGES, IMAGES.bfloat16()):
        assert augment(images=images, mean=0.5, std=[1, 2, 3], dtype=torch.float16).dtype == torch.float16
