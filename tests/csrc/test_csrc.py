"""csrc/README.md: what it names is there, and what it says of all sources holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
README = CSRC / "README.md"
SOURCES = {path: path.read_text() for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cpp", ".cu", ".cuh")}
DEVICE_SOURCES = {path: text for path, text in SOURCES.items() if path.suffix in (".cu", ".cuh")}
ABSENT = ("__restrict__", "__ldg", "ld.global.nc")  # named to say that they do not occur
OF_CUDA = (".aligned", ".cu")  # a qualifier, an ending

pytestmark = pytest.mark.no_kernels


def names() -> list[str]:
    return sorted(set(re.findall(r"`([^`\n]+)`", README.read_text())))


def layout() -> list[str]:
    """The first column of the table."""
    return re.findall(r"^\| `([^`]+)` \|", README.read_text(), re.MULTILINE)


def comments_left_out(text: str) -> str:
    return re.sub(r"//.*", "", text)


def found(name: str) -> Iterator[bool]:
    """One answer for each part of a name."""
    if name.startswith("make "):
        yield re.search(rf"^{name.removeprefix('make ')}:", (ROOT / "Makefile").read_text(), re.MULTILINE) is not None
    elif name in layout():
        yield any(CSRC.glob(f"*/{name}"))
    elif "/" in name:
        yield (CSRC / name).exists() or (ROOT / name).exists()
    else:  # functions, members, constants, in one file
        words = [re.compile(rf"\b{word}\b") for word in name.split("::")]
        yield any(all(word.search(text) for word in words) for text in SOURCES.values())


@pytest.mark.parametrize("name", names())
def test_what_is_named_exists(name: str) -> None:
    if name in ABSENT:
        assert not [path for path, text in DEVICE_SOURCES.items() if name in comments_left_out(text)]
    elif name not in OF_CUDA:
        assert all(found(name)), f"csrc/README.md names {name}, which is nowhere"


def test_every_file_of_a_primitive_is_in_the_table() -> None:
    files = [path for path in SOURCES if path.parent.parent == CSRC and path.parent.name != "common"]
    assert files
    assert not [path for path in files if not any(fnmatch(path.name, pattern) for pattern in layout())]


@pytest.mark.parametrize(
    ("pattern", "where"),
    [
        (r"__shared__", ["common/device.cuh"]),  # one declaration: no static shared memory
        (r"\b(threadIdx|blockIdx|blockDim|gridDim)\b", ["common/device.cuh", "common/launch.cuh"]),
        (r"\basm\b|__sync\w+\(|__shfl\w*\(|__ballot\w*\(|\batomic(Add|Max)\(", ["common/device.cuh"]),
        (r"<<<|cudaLaunch|cudaFunc", ["common/launch.cuh"]),
        (r"\.store_remote\(", ["common/reduce.cuh"]),
        (r"cluster_(arrive|wait|barrier)\(\);", ["common/reduce.cuh"]),
        (r"\b(assert|printf)\(|__trap\(|\bmalloc\(", []),
    ],
)
def test_only_there(pattern: str, where: list[str]) -> None:
    holders = [path for path, text in DEVICE_SOURCES.items() if re.search(pattern, comments_left_out(text))]
    assert [str(path.relative_to(CSRC)) for path in holders] == where
