"""Collections: every kind gives the same images, in any order, in blocks, and says what it is; bad ones are refused."""

from __future__ import annotations

import mmap
import multiprocessing
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from collection_cases import FORKS, ITEMS, KINDS, PIXELS, SHAPE, Images, saved, saved_array
from PIL import Image
from refusals import refuses
from torch.utils.data import Dataset

from fastkd.data import (
    ArrayCollection,
    ConcatCollection,
    DatasetCollection,
    FolderCollection,
    Unreadable,
    conformed,
    decoding,
)

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

EVERY = [pytest.param(kind, marks=pytest.mark.forks if kind in FORKS else []) for kind in KINDS]
INDEX = torch.tensor([59, 3, 3, 0, 41, 25, 24, 3, 58])


def background() -> tuple[int, int]:
    """Threads and processes that read ahead."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("fastkd")]
    return len(threads), len(multiprocessing.active_children())


# ---- reading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
def test_every_kind_reads_alike(kind: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collection = KINDS[kind](tmp_path)
        assert len(collection) == ITEMS
        assert collection.shape == SHAPE
        assert collection.device == torch.device("cpu")
        assert collection.sources[0].start == 0
        assert collection.sources[-1].stop == ITEMS
        images = collection.read(INDEX)
        assert images.dtype == torch.uint8
        assert torch.equal(images, PIXELS[INDEX])
        images.zero_()  # it is the reader's own
        assert torch.equal(collection.read(torch.arange(ITEMS)), PIXELS)
        assert collection.read(INDEX[:0]).shape == (0, *SHAPE)
        assert "60 images" in repr(collection) or "25 images" in repr(collection)


@pytest.mark.parametrize("kind", EVERY)
def test_blocks_are_one_pass(kind: str, tmp_path: Path) -> None:
    collection = KINDS[kind](tmp_path)
    for start, stop, size in ((0, None, 16), (0, None, 60), (7, 50, 9), (5, 5, 4), (60, None, 1)):
        blocks = list(collection.blocks(size, start, stop))
        end = ITEMS if stop is None else stop
        assert [block.start for block in blocks] == list(range(start, end, size))
        assert all(block.unreadable == () for block in blocks)
        assert torch.equal(torch.cat([PIXELS[:0], *(block.images for block in blocks)]), PIXELS[start:end])
    assert background() == (0, 0)


@pytest.mark.parametrize("kind", EVERY)
def test_streams_leave_nothing_behind(kind: str, tmp_path: Path) -> None:
    collection = KINDS[kind](tmp_path)
    state = torch.random.get_rng_state()
    indices = [INDEX.roll(i) for i in range(9)]
    for index, (images, _) in zip(indices, collection.stream(iter(indices)), strict=True):
        assert torch.equal(images, PIXELS[index])
    stream = collection.stream(iter(indices), 3)
    for _ in range(2):
        next(stream)
    del stream  # left early
    blocks = collection.blocks(4)
    next(blocks)
    del blocks
    assert background() == (0, 0)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", EVERY)
def test_what_is_no_index(kind: str, tmp_path: Path) -> None:
    collection = KINDS[kind](tmp_path)
    refuses(r"index holds -1 to 3, must be in \[0, 60\)", lambda: collection.read(torch.tensor([3, -1])))
    refuses(r"index holds 3 to 60, must be in \[0, 60\)", lambda: collection.read(torch.tensor([60, 3])))
    refuses("index has dtype torch.int32, must be torch.int64", lambda: collection.read(INDEX.int()))
    refuses(r"index has shape \(1, 9\), must be \[n\]", lambda: collection.read(INDEX[None]))
    refuses("index is list, must be a tensor", lambda: collection.read([1]))  # type: ignore[arg-type]
    refuses("index holds 3 to 60", lambda: list(collection.stream(iter([torch.tensor([60, 3])]))))
    refuses("batch_size is 0, must be at least 1", lambda: collection.blocks(0))
    refuses("stop is 61, must be less than 61", lambda: collection.blocks(1, 0, 61))
    refuses("start is 9, must be less than 9", lambda: collection.blocks(1, 9, 8))
    refuses("prefetch is -1", lambda: collection.stream(iter([]), -1))


class Broken(Dataset[Any]):
    """Three items that cannot be read: an error, floats, and another size."""

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, i: int) -> Any:
        if i == 7:
            raise OSError("the disk is gone")
        return PIXELS[i].float() if i == 8 else PIXELS[i, :, :4] if i == 30 else {"label": 3, "image": PIXELS[i]}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.forks)])
def test_unreadable_items(workers: int) -> None:
    strict = DatasetCollection(Broken(), workers=workers)
    message = r"image 7 of the collection, dataset\[7\], cannot be read: the disk is gone"
    with pytest.raises(ValueError, match=message):
        list(strict.blocks(16))
    with pytest.raises(ValueError, match=r"image 30 of .* has shape \(3, 4, 8\), must be \(3, 8, 8\)"):
        strict.read(torch.tensor([30]))
    assert torch.equal(strict.read(torch.tensor([6, 9])), PIXELS[[6, 9]])

    lenient = DatasetCollection(Broken(), workers=workers, unreadable="skip")
    blocks = list(lenient.blocks(16))
    missing = [item for block in blocks for item in block.unreadable]
    assert missing[0] == Unreadable(7, "dataset[7]", "the disk is gone")
    assert [item.index for item in missing] == [7, 8, 30]
    assert "is of torch.float32, must be uint8" in missing[1].why
    expected = PIXELS.clone()
    expected[[7, 8, 30]] = 0
    assert torch.equal(torch.cat([block.images for block in blocks]), expected)
    with pytest.raises(ValueError, match="fastkd: " + message):
        lenient.read(torch.tensor([7]))

    both = ConcatCollection(first=ArrayCollection(PIXELS[:5]), second=lenient)
    assert [item.index for block in both.blocks(16) for item in block.unreadable] == [12, 13, 35]
    with pytest.raises(ValueError, match=r"image 12 of the collection, dataset\[7\]"):
        both.read(torch.tensor([3, 12]))
    loaded = both.to("cpu")
    assert [item.index for block in loaded.blocks(16) for item in block.unreadable] == [12, 13, 35]
    assert loaded.fingerprint() == both.fingerprint()
    assert loaded.sources == both.sources
    with pytest.raises(ValueError, match=r"image 35 of the collection, dataset\[30\]"):
        loaded.read(torch.tensor([35]))
    nested = ConcatCollection(zero=ArrayCollection(PIXELS[:1]), one=ConcatCollection(two=strict))
    with pytest.raises(ValueError, match=r"image 8 of the collection, dataset\[7\]"):
        list(nested.blocks(16))


def test_an_unreadable_file(tmp_path: Path) -> None:
    folder = saved(tmp_path / "folder")
    content = (folder / "a" / "0003.png").read_bytes()
    (folder / "a" / "0003.png").write_bytes(content[: len(content) // 2])
    (folder / "b" / "0050.png").write_bytes(b"")
    (folder / "b" / "0051.png").unlink()
    (folder / "b" / "0051.png").symlink_to(tmp_path / "nowhere")
    blocks = list(FolderCollection(folder, SHAPE, unreadable="skip").blocks(60))
    assert [item.name for item in blocks[0].unreadable] == ["a/0003.png", "b/0050.png", "b/0051.png"]
    with pytest.raises(ValueError, match=r"image 3 of the collection, a/0003.png, cannot be read: .*truncated"):
        list(FolderCollection(folder, SHAPE).blocks(60))


# ---- kinds --------------------------------------------------------------------------------------------


def test_memory_is_not_copied(tmp_path: Path) -> None:
    collection = ArrayCollection(PIXELS)
    assert collection.resident is PIXELS
    assert next(collection.blocks(60)).images.data_ptr() == PIXELS.data_ptr()
    assert ArrayCollection(PIXELS.numpy()).resident.data_ptr() == PIXELS.data_ptr()  # type: ignore[union-attr]
    mapped = ArrayCollection(saved_array(tmp_path / "x.npy"))
    assert mapped.resident is None
    assert torch.equal(mapped.to("cpu").resident, PIXELS)  # type: ignore[arg-type]
    assert mapped.sources[0].name == "x"
    last = ArrayCollection(PIXELS.permute(0, 2, 3, 1).contiguous(), layout="NHWC")
    assert last.read(INDEX).is_contiguous(memory_format=torch.channels_last)
    assert ArrayCollection(PIXELS[:, 0]).shape == (1, 8, 8)
    assert ArrayCollection(PIXELS.numpy()[::-1]).read(torch.tensor([0])).equal(PIXELS[-1:])


def test_maps_are_read_in_order_and_once(tmp_path: Path) -> None:
    read: list[Any] = []

    class Spy(np.memmap):
        def __getitem__(self, key: Any) -> Any:
            read.append(key)
            return np.asarray(self)[key]

    saved_array(tmp_path / "x.npy")
    collection = ArrayCollection(tmp_path / "x.npy")
    collection._rows.array = collection._rows.array.view(Spy)  # type: ignore[union-attr]
    assert torch.equal(collection.read(INDEX), PIXELS[INDEX])
    (key,) = read
    assert key.tolist() == [0, 3, 24, 25, 41, 58, 59]
    list(collection.blocks(30))
    assert read[1:] == [slice(0, 30), slice(30, 60)]


@pytest.mark.parametrize("skipped", [0, 7])
def test_the_system_is_told_of_rows_that_will_be_read(
    skipped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of large maps, and views of them, whose rows are no pages."""
    monkeypatch.setattr("fastkd.data.mapped_rows._ADVISED", 0)
    mapped = np.load(saved_array(tmp_path / "x.npy"), mmap_mode="r")[skipped:]
    collection = ArrayCollection(mapped)
    expected, advised = torch.from_numpy(np.array(mapped)), []

    class Spy:
        def madvise(self, option: int, start: int, length: int) -> None:
            assert start % mmap.PAGESIZE == 0
            assert start + length <= mapped._mmap.size()
            mapped._mmap.madvise(option, start, length)
            advised.append((start, start + length))

    assert collection._rows is not None
    collection._rows._map = Spy()  # type: ignore[assignment]
    index = INDEX.clamp(max=len(mapped) - 1)
    assert torch.equal(collection.read(index), expected[index])
    rows = [mapped.offset + (i + skipped) * 192 for i in sorted(set(index.tolist()))]
    assert [stop - 192 for _, stop in advised] == rows
    assert all(start <= row for (start, _), row in zip(advised, rows, strict=True))


def test_read_only_arrays_are_read() -> None:
    array = PIXELS.numpy().copy()
    array.setflags(write=False)
    collection = ArrayCollection(array)
    assert collection.resident is None
    assert torch.equal(collection.read(INDEX), PIXELS[INDEX])
    assert collection.fingerprint() == ArrayCollection(PIXELS).fingerprint()


def test_arrays_of_another_size(tmp_path: Path) -> None:
    grey = PIXELS[:, :1, :7, :7].contiguous()
    expected = conformed(grey, (3, 12, 10))
    for images in (grey, grey[:, 0].numpy(), saved_array(tmp_path / "grey.npy", grey)):
        collection = ArrayCollection(images, (3, 12, 10))
        assert collection.shape == (3, 12, 10)
        assert torch.equal(collection.read(INDEX), expected[INDEX])
        assert torch.equal(torch.cat([block.images for block in collection.blocks(7)]), expected)
        assert torch.equal(collection.to("cpu").resident, expected)  # type: ignore[arg-type]
    refuses(r"shape is \(1, 8, 8\), must have 2 channels", lambda: ArrayCollection(PIXELS[:, :2], (1, 8, 8)))


def test_conformed() -> None:
    """Against the definition in float64, and against Pillow, whose weights have 8 bits."""
    for shape in ((3, 8, 8), (3, 12, 5), (1, 8, 8), (1, 3, 4)):
        made = conformed(PIXELS, shape)
        assert made.shape == (ITEMS, *shape)
        pixels = PIXELS.double()
        if shape[0] == 1:
            pixels = (pixels * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]).sum(1, True)
        exact = F.interpolate(pixels, shape[1:], mode="bilinear", antialias=True)
        assert float((made - exact).abs().max()) < 1.01
        assert torch.equal(conformed(PIXELS.permute(0, 2, 3, 1), shape, layout="NHWC"), made)
        mode = {1: "L", 3: "RGB"}[shape[0]]
        for image, ours in zip(Images(PIXELS), made[:5], strict=False):
            theirs = np.array(image[0].convert(mode).resize(shape[:0:-1], Image.Resampling.BILINEAR))
            ours = ours[0] if shape[0] == 1 else ours.permute(1, 2, 0)
            assert int((ours.int() - torch.from_numpy(theirs).int()).abs().max()) <= (0 if shape[1:] == (8, 8) else 1)
    assert conformed(PIXELS, SHAPE) is PIXELS
    grey = conformed(PIXELS[:, 0], SHAPE)
    assert torch.equal(grey, PIXELS[:, :1].expand(-1, 3, -1, -1))
    large = torch.randint(256, (5, 3, 900, 1300), dtype=torch.uint8)  # of more than one chunk
    assert torch.equal(conformed(large, (3, 9, 9)), torch.cat([conformed(one[None], (3, 9, 9)) for one in large]))
    refuses(r"shape is \(2, 8, 8\), must have 3 channels, as images has, or 1", lambda: conformed(PIXELS, (2, 8, 8)))
    refuses("shape is 3, must be", lambda: conformed(PIXELS, 3))  # type: ignore[arg-type]
    refuses("images has dtype torch.float32, must be uint8", lambda: conformed(PIXELS.float(), SHAPE))


class Given(Dataset[Any]):
    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


def test_items_of_data_sets() -> None:
    """Whatever an image may be, and where in an item it may be; converted where a shape is given."""
    one = PIXELS[0]
    rows = one.permute(1, 2, 0).numpy()
    pil = Image.fromarray(rows)
    items = (one, rows, pil, (pil, 3), [one], {"image": one}, {"pixels": rows, "label": 1}, (one,))
    collection = DatasetCollection(Given(*items))
    assert collection.shape == SHAPE
    assert torch.equal(collection.read(torch.arange(8)), one.expand(8, *SHAPE))
    grey = pil.convert("L")
    assert DatasetCollection(Given(grey)).shape == (1, 8, 8)
    assert DatasetCollection(Given(one[0])).shape == (1, 8, 8)
    expected = torch.from_numpy(np.array(grey))[None]
    palette = pil.quantize(64)
    palette.info["transparency"] = 0
    sixteen = Image.fromarray((np.array(grey).astype(np.uint16) << 8) + 77)
    alpha = pil.convert("RGBA")
    assert torch.equal(
        DatasetCollection(Given(grey, one, rows, pil, alpha, np.array(alpha), sixteen), (1, 8, 8)).read(
            torch.arange(7)
        ),
        expected.expand(7, 1, 8, 8),
    )
    colour = DatasetCollection(Given(grey, expected, alpha, palette), SHAPE).read(torch.arange(4))
    assert torch.equal(colour[:2], expected.expand(2, *SHAPE))
    assert torch.equal(colour[2], one)
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 20, 3), np.uint8))
    resized = torch.from_numpy(np.array(large.resize((8, 8), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    as_tensor = torch.from_numpy(np.array(large)).permute(2, 0, 1)
    assert torch.equal(
        DatasetCollection(Given(large, as_tensor), SHAPE).read(torch.arange(2)), resized.expand(2, *SHAPE)
    )
    for item, why in (
        (3, "is int, must be an image of PIL, an array or a tensor"),
        (one.float(), "is of torch.float32, must be uint8"),
        (one[None], "must have 2 or 3 dimensions"),
        (one[:2], "must have 1, 3 or 4 channels"),
        (Image.fromarray(np.ones((8, 8), np.float32)), "has Pillow's mode F, must have values of 8 or 16 bits"),
    ):
        with pytest.raises(ValueError, match=f"image 0 of the collection, .* cannot be read: .*{why}"):
            DatasetCollection(Given(item), SHAPE).read(torch.tensor([0]))
        with pytest.raises(ValueError, match="dataset has no image that can be read"):
            DatasetCollection(Given(3), unreadable="skip")


def test_folders(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    image = Image.fromarray(PIXELS[0].permute(1, 2, 0).numpy())
    names = ["z.png", "B/1.JPG", "B/10.jpeg", "B/2.webp", "a/deep/x.bmp", "a/y.gif", "a/t.tif"]
    for name in [*names, "a/.hidden.png", ".cache/x.png"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    (folder / "a" / "notes.txt").write_text("no image")
    (folder / "a" / "loop").symlink_to(folder)
    collection = FolderCollection(folder, (1, 4, 4))
    assert list(collection.files) == sorted(names)
    assert collection.sources == (("photos", 0, 7),)
    assert collection.read(torch.arange(7)).shape == (7, 1, 4, 4)
    before = collection.fingerprint()
    assert FolderCollection(folder, (1, 4, 4), workers=1, name="other").fingerprint() == before
    assert FolderCollection(folder, SHAPE).fingerprint() != before
    (folder / "z.png").write_bytes(b"longer than it was" * 99)
    assert collection.fingerprint() != before
    (folder / "z.png").unlink()
    assert collection.fingerprint() != before
    (folder / "B" / "2.webp").rename(folder / "B" / "3.webp")
    assert FolderCollection(folder, (1, 4, 4)).fingerprint() not in (before, collection.fingerprint())


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r'need Pillow: pip install "fastkd\[images\]"'):
        FolderCollection(tmp_path, SHAPE)
    with pytest.raises(ModuleNotFoundError, match="need Pillow"):
        decoding.pillow()
    assert torch.equal(DatasetCollection(Given(PIXELS[0])).read(torch.tensor([0])), PIXELS[:1])


def test_sources() -> None:
    inner = ConcatCollection({"x 1": ArrayCollection(PIXELS[:5]), "x 2": ArrayCollection(PIXELS[5:7])})
    whole = ConcatCollection({"far": ArrayCollection(PIXELS[:2], name="unheard")}, near=inner)
    assert whole.sources == (("far", 0, 2), ("near/x 1", 2, 7), ("near/x 2", 7, 9))
    assert len(whole) == 9


# ---- fingerprints -------------------------------------------------------------------------------------


def test_fingerprints(tmp_path: Path) -> None:
    arrays = ("tensor", "array", "channels last", "mapped", "mapped channels last")
    (one,) = {KINDS[kind](tmp_path).fingerprint() for kind in arrays}
    assert len(one) == 64
    assert ArrayCollection(PIXELS, name="other").fingerprint() == one
    changed = PIXELS.clone()
    changed[31, 2, 7, 7] += 1
    folder = KINDS["folder"](tmp_path)
    others = [
        ArrayCollection(changed),
        ArrayCollection(PIXELS[:-1]),
        ArrayCollection(PIXELS.reshape(ITEMS, 3, 4, 16)),
        ArrayCollection(PIXELS, (3, 9, 9)),
        KINDS["dataset"](tmp_path),
        folder,
        KINDS["concatenated"](tmp_path),
        ConcatCollection(one=ArrayCollection(PIXELS[:25]), second=ArrayCollection(PIXELS[25:])),
        ConcatCollection(first=ArrayCollection(PIXELS[:24]), second=ArrayCollection(PIXELS[24:])),
    ]
    assert len({one, *(other.fingerprint() for other in others)}) == 10
    assert folder.to("cpu").fingerprint() == folder.fingerprint()  # type: ignore[attr-defined]
    assert KINDS["dataset"](tmp_path).fingerprint() == DatasetCollection(Images(PIXELS)).fingerprint()
    assert DatasetCollection(Images(changed)).fingerprint() != DatasetCollection(Images(PIXELS)).fingerprint()


def test_a_fingerprint_of_many_looks_at_some() -> None:
    many = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(10**9, 1, 1, 1)  # one byte
    assert len(ArrayCollection(many).fingerprint()) == 64
    assert len(ArrayCollection(many).read(torch.tensor([999_999_999]))) == 1


# ---- what is refused ----------------------------------------------------------------------------------


def test_files_that_are_no_arrays(tmp_path: Path) -> None:
    path = saved_array(tmp_path / "images.npy")
    content = path.read_bytes()
    for broken in (content[:-1], content[:100], content[:40], b"", b"something else"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"fastkd: .*images.npy is broken: no whole .npy file"):
            ArrayCollection(path)
    np.savez(tmp_path / "two.npz", a=PIXELS.numpy())
    np.save(tmp_path / "objects.npy", np.array([{}, None]), allow_pickle=True)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(PIXELS.numpy()))
    np.save(tmp_path / "floats.npy", PIXELS.float().numpy())
    np.save(tmp_path / "empty.npy", PIXELS[:0].numpy())
    np.save(tmp_path / "flat.npy", PIXELS.flatten().numpy())
    for name, message, kind in (
        ("two.npz", "two.npz is no .npy file, must hold one array", ValueError),
        ("objects.npy", "objects.npy is broken", ValueError),
        ("fortran.npy", "fortran.npy is in Fortran's order, must be in C's", ValueError),
        ("floats.npy", "images has dtype float32, must be uint8", TypeError),
        ("empty.npy", r"images has shape \(0, 3, 8, 8\), must be .* with at least one image", ValueError),
        ("flat.npy", r"images has shape \(11520,\), must be \[N, C, H, W\]", ValueError),
        ("nowhere.npy", "nowhere.npy is not there", FileNotFoundError),
    ):
        with pytest.raises(kind, match="fastkd: .*" + message):
            ArrayCollection(tmp_path / name)


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    whole, grey = ArrayCollection(PIXELS), ArrayCollection(PIXELS[:, 0])
    unlike: Any = ArrayCollection(PIXELS)
    unlike.device = torch.device("meta")
    data = Images(PIXELS)
    for message, call in (
        ("images has dtype torch.float32, must be uint8", lambda: ArrayCollection(PIXELS.float())),
        ("images has dtype int64, must be uint8", lambda: ArrayCollection(np.ones((2, 1, 8, 8), int))),
        ("images is list, must be a tensor", lambda: ArrayCollection([1])),  # type: ignore[arg-type]
        ("layout is 'CHWN', must be one of NCHW, NHWC", lambda: ArrayCollection(PIXELS, layout="CHWN")),
        ("name is int, must be text", lambda: ArrayCollection(PIXELS, name=3)),  # type: ignore[arg-type]
        (r"shape is \(3, 0, 8\), must be \(channels, height, width\)", lambda: ArrayCollection(PIXELS, (3, 0, 8))),
        ("dataset is list_iterator, must be map-style", lambda: DatasetCollection(iter([]))),
        ("dataset is empty, must have at least one image", lambda: DatasetCollection([])),
        ("workers is -1, must be at least 0", lambda: DatasetCollection(data, workers=-1)),
        ("unreadable is 'leave', must be one of error, skip", lambda: DatasetCollection(data, unreadable="leave")),
        ("path is .*empty, must hold at least one image", lambda: FolderCollection(tmp_path / "empty", SHAPE)),
        ("shape is .*, must have 1 or 3 channels", lambda: FolderCollection(tmp_path, (2, 8, 8))),
        ("parts is empty, must be one collection or more", ConcatCollection),
        ("a is Tensor, must be a Collection", lambda: ConcatCollection(a=PIXELS)),  # type: ignore[arg-type]
        ("b has images of .1, 8, 8., must be those of a, .3, 8, 8.", lambda: ConcatCollection(a=whole, b=grey)),
        ("b is on meta, must be on cpu", lambda: ConcatCollection(a=whole, b=unlike)),
        ("a is given twice", lambda: ConcatCollection({"a": whole}, a=whole)),
    ):
        refuses(message, call)
    for path in (tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(NotADirectoryError, match=f"path is .*{path.name}, must be a folder of images"):
            FolderCollection(path, SHAPE)
