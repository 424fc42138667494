"""Sets of images in memory: what they take, parts of them, normalisation, sets made of torch Datasets."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastkd.data import ImageSet, load
from fastkd.data.images import channel_statistics

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


def image_set(count: int = 12, **changes: Any) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    values = {
        "images": torch.randint(0, 256, (count, 3, 6, 8), dtype=torch.uint8, generator=generator),
        "target": torch.arange(count) % 4,
        "class_names": ("a", "b", "c", "d"),
        "mean": (0.5, 0.4, 0.3),
        "std": (0.25, 0.2, 0.3),
    }
    return ImageSet(**{**values, **changes})


def test_properties() -> None:
    data = image_set()
    assert (len(data), data.num_classes, data.device) == (12, 4, torch.device("cpu"))
    assert (data.flip, data.padding) == (False, 4)
    assert data.to("cpu").images is data.images
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.flip = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(12, 3, 6, 8)}, "images is torch.float32, must be a tensor of torch.uint8"),
        ({"images": np.zeros((12, 3, 6, 8), np.uint8)}, "images is ndarray, must be a tensor of torch.uint8"),
        ({"target": torch.zeros(12, dtype=torch.int32)}, "target is torch.int32, must be a tensor of torch.int64"),
        (
            {"images": torch.zeros(12, 6, 8, dtype=torch.uint8)},
            r"images has shape \(12, 6, 8\), must be \[N, C, H, W\] with at least one image",
        ),
        (
            {"images": torch.zeros(0, 3, 6, 8, dtype=torch.uint8), "target": torch.zeros(0, dtype=torch.int64)},
            r"images has shape \(0, 3, 6, 8\), must be \[N, C, H, W\] with at least one image",
        ),
        (
            {"target": torch.zeros(11, dtype=torch.int64)},
            r"target has shape \(11,\), must be \(12,\), one label an image",
        ),
        ({"target": torch.zeros(12, 1, dtype=torch.int64)}, r"target has shape \(12, 1\), must be \(12,\)"),
        ({"mean": (0.5,)}, "mean has 1 values, must have one, or one for each of the 3 channels"),
        ({"mean": (0.5, 0.5, float("nan"))}, r"mean is \(0.5, 0.5, nan\), must be finite"),
        ({"mean": None}, "mean is None, must be a number, or a sequence of one for each channel"),
        ({"mean": ("a", "b", "c")}, r"mean is \('a', 'b', 'c'\), must be a number"),
        ({"std": (0.5, 0.5, 0.0)}, r"std is \(0.5, 0.5, 0.0\), must be positive"),
        ({"std": (1e-320,) * 3}, "std is .*, must be positive, and 1 / std finite"),
        ({"std": torch.ones(3)}, "std is a tensor, must be numbers"),
        ({"flip": "false"}, "flip is str, must be True or False"),
        ({"flip": 1}, "flip is int, must be True or False"),
        ({"padding": 2**30}, "padding is 1073741824, must be less than 1073741824"),
        ({"class_names": 4}, "class_names is int, must be a sequence of names"),
        ({"class_names": "abcd"}, "class_names is str, must be a sequence of names"),
        ({"padding": -1}, "padding is -1, must be at least 0"),
        (
            {"target": torch.tensor([0, 1, 4, 0, -7, 9, 0, 0, 0, 0, 0, 0])},
            r"target\[2\] is 4, must be in \[0, 4\): there are 4 classes",
        ),
        ({"target": torch.tensor([0, -1] + [0] * 10)}, r"target\[1\] is -1, must be in \[0, 4\)"),
        ({"class_names": ()}, r"target\[0\] is 0, must be in \[0, 0\)"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match="fastkd: " + message):
        image_set(**changes)


def test_one_number_for_all_channels() -> None:
    data = image_set(mean=0.5, std=np.float32(0.25), flip=np.True_, class_names=["a", "b", "c", "d"])
    assert (data.mean, data.std, data.flip) == ((0.5,) * 3, (0.25,) * 3, True)
    assert data.class_names == ("a", "b", "c", "d")


def test_target_on_another_device() -> None:
    with pytest.raises(ValueError, match="target is on meta, must be with images on cpu"):
        image_set(target=torch.zeros(12, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize(
    "indices",
    [[3, 0, 3], range(2, 5), torch.tensor([11, 0]), torch.tensor([1, 2], dtype=torch.int32), np.array([4, 5])],
    ids=str,
)
def test_subset(indices: Any) -> None:
    data = image_set()
    part = data.subset(indices)
    wanted = [int(i) for i in indices]
    assert torch.equal(part.images, data.images[wanted])
    assert torch.equal(part.target, data.target[wanted])
    assert (part.class_names, part.mean, part.std) == (data.class_names, data.mean, data.std)


def test_subset_by_mask() -> None:
    data = image_set()
    mask = data.target == 2
    assert torch.equal(data.subset(mask).images, data.images[2::4])
    assert data.subset(mask.tolist()).target.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], r"images has shape \(0, 3, 6, 8\), must be .* with at least one image"),
        ([0, 12], r"indices holds 0 to 12, must be in \[0, 12\)"),
        ([-1, 3], r"indices holds -1 to 3, must be in \[0, 12\)"),
        ([0.5], r"indices is torch.float32 \(1,\), must be ints \[n\] or a mask \(12,\)"),
        ([[0, 1]], r"indices is torch.int64 \(1, 2\), must be ints"),
        (torch.ones(2, dtype=torch.complex64), r"indices is torch.complex64 \(2,\), must be ints"),
        ("ab", "indices is str, must be ints"),
        (None, "indices is NoneType, must be ints"),
        ([True, False], r"indices is torch.bool \(2,\), must be ints \[n\] or a mask \(12,\)"),
    ],
)
def test_subset_errors(indices: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match="fastkd: " + message):
        image_set().subset(indices)


def test_with_target() -> None:
    data = image_set()
    other = data.with_target((data.target + 1) % 4)
    assert other.target.tolist() == [1, 2, 3, 0] * 3
    assert other.images is data.images
    with pytest.raises(ValueError, match=r"target\[3\] is 4"):
        data.with_target(data.target + 1)
    with pytest.raises(TypeError, match="fastkd: target is list, must be a tensor"):
        data.with_target(data.target.tolist())  # type: ignore[arg-type]


def by_hand(data: ImageSet, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (data.mean, data.std))
    return (images.double() / 255 - mean) / std


def test_normalised() -> None:
    data = image_set()
    expected = by_hand(data, data.images)
    whole = data.normalised()
    assert whole.dtype == torch.float32
    assert torch.equal(whole, expected.float())
    assert torch.equal(data.normalised(slice(3, 7)), whole[3:7])
    assert torch.equal(data.normalised(torch.tensor([5, 1])), whole[[5, 1]])
    assert torch.equal(data.normalised([5, 1]), whole[[5, 1]])
    assert torch.equal(data.normalised(data.target == 2), whole[2::4])
    torch.testing.assert_close(data.normalised(dtype=torch.bfloat16), expected.bfloat16())
    last = dataclasses.replace(data, images=data.images.contiguous(memory_format=torch.channels_last))
    assert last.normalised().is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last.normalised(), whole)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (3, r"part is torch.int64 \(\), must be ints \[n\] or a mask \(12,\)"),
        ("ab", "part is str, must be ints"),
        (None, "part is NoneType, must be ints"),
        (torch.tensor([0.5]), r"part is torch.float32 \(1,\), must be ints"),
        (torch.tensor([12]), r"part holds 12 to 12, must be in \[0, 12\)"),
        (slice(0.5, 3), r"part is slice\(0.5, 3, None\), must be a slice of ints"),
        (slice(None, None, -1), r"part.step is -1, must be at least 1"),
    ],
)
def test_normalised_errors(part: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match="fastkd: " + message):
        image_set().normalised(part)


@pytest.mark.parametrize("name", ["cifar10", "mnist", "quickdraw"])
def test_a_root_that_is_no_path(name: str) -> None:
    for root in (3, False, b"data"):
        with pytest.raises(TypeError, match=f"fastkd: root is {type(root).__name__}, must be a path or None"):
            load(name, root)  # type: ignore[arg-type]


def test_channel_statistics() -> None:
    images = image_set(50).images
    channels = images.double().transpose(0, 1).flatten(1) / 255
    mean, std = channel_statistics(images)
    assert mean == pytest.approx(channels.mean(1).tolist(), abs=5.1e-5)
    assert std == pytest.approx(channels.std(1, correction=0).tolist(), abs=5.1e-5)
    assert channel_statistics(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)) == ((0.5,), (0.5,))
    assert channel_statistics(torch.full((4, 1, 2, 2), 51, dtype=torch.uint8)) == ((0.2,), (1.0,))  # can be divided by


class Pairs(torch.utils.data.Dataset[Any]):
    def __init__(self, images: list[Any], labels: list[Any]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.images[index], self.labels[index]


@pytest.mark.parametrize("kind", ["tensor", "array", "PIL", "grey tensor", "grey array", "grey PIL"])
def test_from_dataset(kind: str) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="no Pillow") if "PIL" in kind else None
    expected = image_set().images[:, :1] if "grey" in kind else image_set().images
    images: list[Any] = list(expected)
    if "tensor" not in kind:
        images = [image.permute(1, 2, 0).numpy() for image in images]
    if "grey" in kind:
        images = [image.squeeze() for image in images]
    if image_module is not None:
        images = [image_module.fromarray(image) for image in images]
    dataset = Pairs(images, [0, 2] * 6)
    data = ImageSet.from_dataset(dataset, flip=True, padding=2)
    assert torch.equal(data.images, expected)
    assert data.target.tolist() == [0, 2] * 6
    assert data.class_names == ("0", "1", "2")
    assert (data.flip, data.padding) == (True, 2)
    assert (data.mean, data.std) == channel_statistics(expected)


def test_from_dataset_takes_what_is_given() -> None:
    dataset = Pairs(list(image_set().images), [torch.tensor(1)] * 12)
    dataset.classes = ["cat", "dog", "bird"]  # type: ignore[attr-defined]
    data = ImageSet.from_dataset(dataset, mean=[0.1, 0.2, 0.3], std=[1, 2, 3])
    assert data.class_names == ("cat", "dog", "bird")
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (1, 2, 3))
    assert ImageSet.from_dataset(dataset, ["x", "y"]).class_names == ("x", "y")
    with pytest.raises(ValueError, match=r"target\[0\] is 1, must be in \[0, 1\)"):
        ImageSet.from_dataset(dataset, ["x"])


def test_from_tensor_dataset() -> None:
    data = image_set()
    again = ImageSet.from_dataset(torch.utils.data.TensorDataset(data.images, data.target))
    assert torch.equal(again.images, data.images)
    assert torch.equal(again.target, data.target)


class Palette:
    mode = "P"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "dataset is empty, must have at least one image"),
        ([torch.zeros(3, 4, 4)], r"dataset\[0\] has an image of torch.float32, must be uint8: leave out the transform"),
        ([np.zeros((4, 4), bool)], r"dataset\[0\] has an image of torch.bool, must be uint8"),
        ([np.zeros(4, np.uint8)], r"dataset\[0\] has an image of shape \(4,\), must have 2 or 3 dimensions"),
        (
            [np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8)],
            r"dataset\[1\] has an image of shape \(1, 4, 5\), must be that of dataset\[0\], \(1, 4, 4\)",
        ),
        ([Palette()], r"dataset\[0\] has a palette image, must be converted, by image.convert\('RGB'\)"),
    ],
)
def test_from_dataset_errors(images: list[Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match="fastkd: " + message):
        ImageSet.from_dataset(Pairs(images, [0] * len(images)))


@pytest.mark.parametrize("label", [0.7, "a", None, np.float32(1), torch.tensor(1.0), torch.tensor([1, 2]), 2**63])
def test_from_dataset_label_errors(label: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"fastkd: the label of dataset\[1\] is .*, must be"):
        ImageSet.from_dataset([(image_set().images[0], one) for one in (0, label)])


@pytest.mark.parametrize("label", [1, np.int32(1), np.array(1), np.array([1]), torch.tensor(1), torch.tensor([1])])
def test_from_dataset_labels(label: Any) -> None:
    assert ImageSet.from_dataset([(image_set().images[0], label)]).target.tolist() == [1]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.zeros(3, 4, 4, dtype=torch.uint8), r"dataset\[0\] is Tensor, must be an image and a label"),
        (3, r"dataset\[0\] is int, must be an image and a label"),
        (("image.png", 0), r"dataset\[0\] has an image that is str, must be of PIL, an array or a tensor"),
    ],
)
def test_from_dataset_of_something_else(item: Any, message: str) -> None:
    with pytest.raises(TypeError, match="fastkd: " + message):
        ImageSet.from_dataset([item])


def test_from_endless_dataset() -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([])

    with pytest.raises(TypeError, match="dataset is a Endless without a length, must have one"):
        ImageSet.from_dataset(Endless())
