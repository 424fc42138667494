"""What benchmarks/not_passed.py leaves in pytest's cache, read and written without pytest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

LAST_FAILED = "cache/lastfailed"  # of pytest's own plugin
RUNNING = "fastkd/running"


def read(cache: Path, key: str) -> list[str]:
    """Names of tests that a run with that cache left under ``LAST_FAILED`` or ``RUNNING``."""
    path = cache / "v" / key
    return list(json.loads(path.read_text())) if path.exists() else []


def write(cache: Path, names: Sequence[str]) -> None:
    """Makes these what ``--last-failed`` runs."""
    path = cache / "v" / LAST_FAILED
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict.fromkeys(names, True)))
