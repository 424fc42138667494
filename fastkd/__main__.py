"""``fastkd`` and ``python -m fastkd``: the command line. What it needs beyond torch and numpy is the extra ``cli``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

EXTRA = ("matplotlib", "rich", "sklearn", "tomli", "tyro", "yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command (default: the process's arguments) and returns its exit status."""
    try:
        from fastkd.cli import run

        try:
            return run(sys.argv[1:] if argv is None else list(argv))
        finally:
            sys.stdout.flush()  # here, not when Python ends, so that it is known whether somebody reads it
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA:
            raise
        print(f'fastkd: the command line needs {missing}: pip install "fastkd[cli]"', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastkd: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # "fastkd ... | head" has read enough; what is left is for nobody
        if not _reader_is_gone():
            raise  # another pipe, that of a process of a study for instance
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as the shell has it of a process that SIGPIPE ends


def _reader_is_gone() -> bool:
    """Whether nobody reads the standard output: one more line shows it."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
