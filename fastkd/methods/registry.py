"""Methods by name: of which family each is, what it needs, what it trains, its options, and how it is made.

>>> @register("mine", family="response", needs=("labels", "teacher"), paper="A. Author, 2026")
... class Mine(WeightedMethod):
...     def __init__(self, temperature: float = 4.0) -> None: ...

The options of a method are the arguments of its class, but for those that :class:`Given` has. Methods of others are found by
entry points of the group ``fastkd.methods``, whose modules register them, and by :func:`load_plugin`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from fastkd._checks import check_text
from fastkd._names import unknown_name
from fastkd.methods.given import Given, arguments_of
from fastkd.methods.method import Method
from fastkd.methods.objective import Objective
from fastkd.methods.procedure import Procedure

__all__ = [
    "FAMILIES",
    "NEEDS",
    "Entry",
    "Given",
    "Option",
    "create",
    "create_procedure",
    "find",
    "load_plugin",
    "names",
    "register",
]

NEEDS = ("labels", "images", "collection", "out-of-domain images", "teacher")
"""What a method may need: the images of the task with their labels or without, an unlabeled collection, images of another
domain, a teacher that is there before. Without images of any kind it makes its own."""

FAMILIES = (
    "response",
    "representation",
    "relational",
    "contrastive",
    "online",
    "collections",
    "data-free",
    "out-of-domain",
    "noisy labels",
)
"""Kinds of distillation, in the order in which they are listed; others come after them."""

ENTRY_POINTS = "fastkd.methods"
Kind = TypeVar("Kind", bound=type[Method] | type[Procedure])


class Option(NamedTuple):
    """What can be set of a method."""

    name: str
    kind: Any
    """Its type, as annotated."""
    default: Any
    """None where it follows from the networks."""
    help: str
    """From the docstring of the class."""


@dataclass(frozen=True)
class Entry:
    """A method that was registered."""

    name: str
    kind: type[Method] | type[Procedure]
    family: str
    needs: tuple[str, ...]
    trains: str
    paper: str
    defaults: dict[str, Any] = field(default_factory=dict)
    summary: str = ""
    """What it does, in one line."""

    @property
    def needs_teacher(self) -> bool:
        """Whether it learns from a teacher that is there before."""
        return "teacher" in self.needs

    @property
    def needs_images(self) -> bool:
        """Whether it is given images, of any kind."""
        return any(need != "teacher" for need in self.needs)

    def options(self) -> dict[str, Option]:
        """By name; those of the class that :class:`Given` does not have."""
        said = _argument_docs(self.kind)
        found = {}
        for name, (parameter, hint) in arguments_of(self.kind).items():
            if name in _GIVEN:
                continue
            default = None if parameter.default is parameter.empty else parameter.default
            found[name] = Option(name, hint, self.defaults.get(name, default), said.get(name, ""))
        return found

    def make(self, given: Given, settings: dict[str, Any]) -> Method | Procedure:
        """The method for what is given.

        Raises:
            ValueError: an option that it does not have, answered with the nearest; what it needs is not given.
        """
        allowed = self.options()
        for option in settings:
            if option not in allowed:
                raise unknown_name(f"{self.name}'s option", option, allowed, listed=True)
        return self.kind.build(given, **{**self.defaults, **settings})


def register(
    name: str,
    *,
    family: str,
    needs: tuple[str, ...] = ("labels", "teacher"),
    trains: str = "student",
    paper: str = "",
    summary: str = "",
    **defaults: Any,
) -> Callable[[Kind], Kind]:
    """Gives a class of :class:`fastkd.methods.Method` or :class:`fastkd.methods.Procedure` a name.

    Args:
        family: the kind of distillation: one of :data:`FAMILIES`, or another.
        needs: of :data:`NEEDS`.
        trains: the networks that learn, in words.
        paper: the source.
        summary: what it does, in a line; that of the class by default.
        defaults: of its options, where they are others under this name.

    Raises:
        TypeError: another class.
        ValueError: a name that another class has; needs that are none, or do not say what the class says of its teacher.
    """
    for need in needs:
        if need not in NEEDS:
            raise unknown_name("needs", need, NEEDS)

    def decorate(kind: Kind) -> Kind:
        if not isinstance(kind, type) or not issubclass(kind, (Method, Procedure)):
            raise TypeError(f"fastkd: {kind!r} cannot be registered, must be a subclass of Method or Procedure")
        if issubclass(kind, Method) and kind.needs_teacher != ("teacher" in needs):
            raise ValueError(
                f"fastkd: needs of {name!r} is {needs}, must have a teacher where {kind.__name__}.needs_teacher says so, "
                f"{kind.needs_teacher}"
            )
        other = _entries.get(check_text("name", name))
        if other is not None and (other.kind.__module__, other.kind.__qualname__) != (
            kind.__module__,
            kind.__qualname__,
        ):
            raise ValueError(f"fastkd: name {name!r} is taken by {other.kind.__module__}.{other.kind.__qualname__}")
        said = summary or next(iter((inspect.getdoc(kind) or "").splitlines()), "")
        _entries[name] = Entry(name, kind, family, tuple(needs), trains, paper, defaults, said)
        return kind

    return decorate


def names() -> tuple[str, ...]:
    """Of all methods, family by family."""
    _load_entry_points()
    families = [*FAMILIES, *dict.fromkeys(entry.family for entry in _entries.values())]
    return tuple(sorted(_entries, key=lambda name: families.index(_entries[name].family)))


def find(name: str) -> Entry:
    """The method of this name.

    Raises:
        ValueError: an unknown name, answered with the nearest right ones.
    """
    _load_entry_points()
    if check_text("name", name) not in _entries:
        raise unknown_name("method", name, names())
    return _entries[name]


def create(
    name: str,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    images: Tensor | None = None,
    *,
    batch_size: int | None = None,
    items: int | None = None,
    **settings: Any,
) -> Method:
    """The method of this name, reading the layers that the networks have for it.

    Args:
        name: one of :func:`names`.
        student, teacher: whose layers are taken (:func:`fastkd.models.layers.feature_layers`); not needed for methods without
            features.
        images: a batch ``[B, C, H, W]`` on the networks' device, for methods that must know the shapes of features: the
            networks run on it once, in evaluation mode.
        batch_size, items: images of a batch, and of the training set, for methods that depend on them.
        settings: options of the method, in the place of the published ones: ``temperature``, ``feature_weight``, ``layers``,
            ...

    Raises:
        ValueError: an unknown name, or option of the method, answered with the nearest right ones; one of a whole procedure.
    """
    entry = find(name)
    if not issubclass(entry.kind, Method):
        raise ValueError(f"fastkd: {name} is a procedure, not a Method: create_procedure makes it")
    made = entry.make(Given(student, teacher, images, batch_size=batch_size, items=items), settings)
    assert isinstance(made, Method)
    return made


def create_procedure(name: str, given: Given, **settings: Any) -> Procedure:
    """The method of this name with its networks, to be trained.

    Raises:
        ValueError: as of :func:`create`; or no student is given.
    """
    made = find(name).make(given, settings)
    if isinstance(made, Procedure):
        return made
    return Objective(made, made.build_student(given.network_of_seed), given.teacher, class_dim=given.class_dim)


def load_plugin(path: str | Path) -> None:
    """Runs a Python file, which registers methods; once, however often it is asked for.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: it cannot be imported.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise FileNotFoundError(f"fastkd: plugin is {path}, must be a Python file")
    name = f"fastkd_plugin_{file.stem}"
    there = sys.modules.get(name)
    if there is not None and getattr(there, "__file__", None) == str(file):
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"fastkd: plugin is {path}, must be a Python file, *.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception) and not str(error).startswith("fastkd: "):
            raise ImportError(f"fastkd: plugin {path} cannot be imported: {type(error).__name__}: {error}") from error
        raise


_entries: dict[str, Entry] = {}
_GIVEN = frozenset(f.name for f in fields(Given))
_loaded: set[str] = set()


def _load_entry_points() -> None:
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if point.value not in _loaded:
            _loaded.add(point.value)
            try:
                point.load()
            except Exception as error:
                raise ImportError(
                    f"fastkd: the methods of {point.name} ({point.value}) cannot be imported: {error}"
                ) from error


def _argument_docs(kind: type) -> dict[str, str]:
    """What the docstring of a class says of each argument, under ``Args:``, and those of its bases of theirs."""
    said: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        section = re.search(r"^Args:\n((?: {4}.*\n?|\n)+)", text, re.MULTILINE)
        if section is None:
            continue
        for item in re.finditer(r"^ {4}([\w, ]+): (.*(?:\n {8}.*)*)", section[1], re.MULTILINE):
            said |= {name.strip(): " ".join(item[2].split()) for name in item[1].split(",")}
    return said
