"""What benchmarks/not_passed.py leaves in pytest's cache, read and written without pytest."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

LAST_FAILED = "cache/lastfailed"  # of pytest's own plugin
RUNNING = "fastkd/running"


def read(cache: Path, key: str) -> list[str]:
    """Names of tests under ``LAST_FAILED`` or ``RUNNING``; none where pytest itself was killed while it wrote them."""
    path = cache / "v" / key
    try:
        return list(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError):
        return []


def write(cache: Path, key: str, names: Iterable[str]) -> None:
    """Sets them. The file is replaced at once: a kill leaves the one before."""
    path = cache / "v" / key
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(dict.fromkeys(names, True)))
    draft.replace(path)
