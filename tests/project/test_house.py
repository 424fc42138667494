"""The house: imports run one way, downwards, and no two modules import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.no_kernels

PACKAGE = Path(__file__).parents[2] / "fastkd"
# From the top down: a module imports from its own floor and those below.
FLOORS = (
    ("__main__", "cli"),
    ("studies",),
    ("language", "scoring"),
    ("training",),
    ("methods",),
    ("scores",),
    ("data", "models"),
    ("integrations",),
    (
        "_build_info",
        "alias_table",
        "collection_samplers",
        "draw",
        "functional",
        "iqpr_schedule",
        "losses",
        "noise",
        "noise_figures",
        "noise_measures",
        "owned_draws",
        "patches",
        "selection",
        "sharded_alias_table",
        "statistics",
        "weighted_random_sampler",
    ),
    ("ops",),
    ("reference",),
    (
        "_checks",
        "_figures",
        "_files",
        "_group",
        "_library",
        "_locks",
        "_names",
        "_ranks",
        "_seeding",
        "_table_content",
        "_threads",
        "_C",
    ),
)
# which a module of a floor may not, as the rooms of one floor are apart
APART = {"data": ("models",), "models": ("data",), "language": ("scoring",), "scoring": ("language",)}


def modules() -> dict[str, Path]:
    files = {path.relative_to(PACKAGE.parent).with_suffix(""): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {".".join(part for part in name.parts if part != "__init__"): path for name, path in files.items()}


MODULES = modules()


def imported(name: str) -> Iterator[str]:
    """Modules of fastkd that a module imports, wherever in its text."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "fastkd")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastkd":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES or alias.name == "_C" else node.module


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room(name) in rooms)


def test_every_room_has_a_floor() -> None:
    rooms = {room(name) for name in MODULES} - {""}
    assert rooms <= {name for rooms in FLOORS for name in rooms}


@pytest.mark.parametrize("name", [name for name in MODULES if room(name)])
def test_imports_run_downwards(name: str) -> None:
    for other in imported(name):
        if other == "fastkd":  # what the command line shows of the whole
            assert room(name) == "cli", f"{name} imports {other}"
            continue
        assert floor(other) >= floor(name), f"{name} imports {other}, from above"
        assert room(other) not in APART.get(room(name), ()), f"{name} imports {other}, of the room beside it"


def test_no_two_modules_import_each_other() -> None:
    """Nor more of them in a circle; a package's ``__init__`` counts as what it imports."""
    graph = {name: [other for other in imported(name) if other != name] for name in MODULES if room(name)}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in graph.get(name, []):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_every_public_name_is_there() -> None:
    for name in MODULES:
        module = __import__(name, fromlist=["x"]) if room(name) not in ("_figures", "__main__") else None
        for public in getattr(module, "__all__", ()):
            assert hasattr(module, public), f"{name} has no {public}"
