"""The answer to a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(
    argument: str, name: object, allowed: Iterable[str], hint: str = "", *, listed: bool = False
) -> ValueError:
    """A ValueError that offers the names like it, or all of them where none is like it or they are to be ``listed``; ``hint``
    ends its message."""
    allowed = list(allowed)
    every = f"must be one of {', '.join(allowed)}" if allowed else "there are none"
    near = difflib.get_close_matches(str(name).lower(), allowed, n=3, cutoff=0.5)
    right = f"did you mean {' or '.join(near)}?" if near else every
    if listed and near:
        hint = f"{every}; {hint}" if hint else every
    return ValueError(f"fastkd: {argument} {name!r} is unknown, {right}" + (f" ({hint})" if hint else ""))
