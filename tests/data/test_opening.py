"""Collections by what somebody types."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from collection_cases import PIXELS, SHAPE, saved, saved_array
from image_files import cifar10_binary

from fastkd.data import ArrayCollection, FolderCollection, open_collection, registry
from fastkd.data.opening import places_of

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


def test_by_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "photos")
    saved_array(tmp_path / "far.npy")
    cifar10_binary(tmp_path / "data", count=4)
    assert open_collection("far.npy").sources == (("far", 0, 60),)
    assert isinstance(open_collection("photos", SHAPE), FolderCollection)
    assert open_collection(f"{tmp_path}/photos/", SHAPE).sources[0].name == "photos"
    cifar = open_collection("cifar10", root=tmp_path / "data")
    train, _ = registry.load("cifar10", tmp_path / "data")
    assert torch.equal(cifar.read(torch.arange(20)), train.images)
    three = open_collection("near=photos, far.npy,cifar10", root=tmp_path / "data", workers=0, unreadable="skip")
    assert three.shape == SHAPE  # that of the first array, which the folder takes, and the set
    assert [source.name for source in three.sources] == ["near", "far", "cifar10"]
    assert torch.equal(three.read(torch.tensor([61, 1])), PIXELS[[1, 1]])
    small = open_collection("cifar10,digits=digits", (3, 16, 16), root=tmp_path / "data")
    assert [source.stop - source.start for source in small.sources] == [20, 1438]
    few = open_collection("far.npy:6,two=photos:2", workers=0)
    assert [tuple(source) for source in few.sources] == [("far", 0, 6), ("two", 6, 8)]
    far = open_collection("far.npy")
    assert torch.equal(few.read(torch.arange(6)), far.read(torch.arange(0, 60, 10)))  # evenly spaced
    own = open_collection("mine:3", known={"mine": lambda name: ArrayCollection(PIXELS, name=name)})
    assert own.sources == (("mine", 0, 3),)
    for text, message, kind in (
        ("", "collection is '', must be", ValueError),
        ("a,,b", "collection is 'a,,b', must be", ValueError),
        ("photos", r"shape is None, must be \(channels, height, width\)", ValueError),
        ("far.npy,far.npy", "has far twice, must have a name for each: other=far.npy", ValueError),
        ("far.npy:61", "collection is 'far.npy:61', but far.npy has 60 images", ValueError),
        ("far.npy:0", "collection has 0 images of far.npy, must be 1 or more", ValueError),
        ("cifar11", "collection 'cifar11' is unknown, did you mean cifar10", ValueError),
        ("nowhere.npy", "nowhere.npy is not there", FileNotFoundError),
        ("cifar10", "CIFAR10 is not there", FileNotFoundError),
    ):
        with pytest.raises(kind, match="fastkd: .*" + message):
            open_collection(text)


def test_a_file_of_that_name_is_no_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "far.npy:5").touch()
    (tmp_path / "a=b").mkdir()
    assert places_of("x=far.npy:5, a=b, a=b:3,c:7") == [
        ("x", "far.npy:5", None),
        ("a=b", "a=b", None),
        ("a", "b", 3),
        ("c", "c", 7),
    ]


def test_some_of_a_folder_with_images_that_cannot_be_read(tmp_path: Path) -> None:
    saved(tmp_path / "photos")
    names = sorted(path for path in (tmp_path / "photos").rglob("*") if path.is_file())
    names[2].write_bytes(b"no image")
    text = f"{tmp_path / 'photos'}:{len(names) // 2}"
    found = open_collection(text, SHAPE, unreadable="skip")
    assert [item.index for item in found.missing] == [1]  # the third of all
    assert not found.read(torch.tensor([0])).eq(0).all()
    with pytest.raises(ValueError, match="cannot be read"):
        open_collection(text, SHAPE)
