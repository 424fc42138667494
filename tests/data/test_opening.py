"""Collections by what somebody types."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from collection_cases import PIXELS, SHAPE, saved, saved_array
from image_files import cifar10_binary

from fastkd.data import FolderCollection, open_collection, registry

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
    for text, message, kind in (
        ("", "text is '', must be", ValueError),
        ("a,,b", "text is 'a,,b', must be", ValueError),
        ("photos", r"shape is None, must be \(channels, height, width\)", ValueError),
        ("far.npy,far.npy", "has far twice, must have a name for each: other=far.npy", ValueError),
        ("cifar11", "collection 'cifar11' is unknown, did you mean cifar10", ValueError),
        ("nowhere.npy", "nowhere.npy is not there", FileNotFoundError),
        ("cifar10", "CIFAR10 is not there", FileNotFoundError),
    ):
        with pytest.raises(kind, match="fastkd: .*" + message):
            open_collection(text)
