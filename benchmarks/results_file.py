"""A results file that is complete after every step, so that what was killed leaves what it had done."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def slug(name: str) -> str:
    """``NVIDIA H200`` -> ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def name_of(machine: dict[str, Any]) -> str:
    """The name, without ending, of the files of a machine."""
    return slug(machine["gpu"]) if "gpu" in machine else f"{slug(machine['cpu'])}-{machine['threads']}-threads"


def path_of(machine: dict[str, Any], folder: Path = RESULTS, *, full: bool = False) -> Path:
    """Where the results of a machine are, those of the sweeps by themselves."""
    return folder / f"{name_of(machine)}{'-full' if full else ''}.json"


class ResultsFile:
    """JSON under ``path``; keys of other writers (the stages of a check, the rows of a benchmark) are kept."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """What the file holds; nothing if it is not there."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def clear(self) -> None:
        """A new run begins: what an old one left must not be taken for its results."""
        self.path.unlink(missing_ok=True)

    def update(self, **values: Any) -> None:
        """Sets these keys. The file is replaced at once: a reader, or a kill, never meets a half-written one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        draft.write_text(json.dumps({**self.read(), **values}, indent=1) + "\n")
        draft.replace(self.path)
