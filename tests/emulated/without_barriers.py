"""``python tests/emulated/without_barriers.py [alias ...]``: shows that no barrier of the CUDA kernels can be left out.

For each line of ``csrc`` that waits at a barrier, the kernels are compiled without it, and the op tests run on them until
one fails. Prints a line for each barrier; exits with 1 if the tests pass without one. Takes a minute or two a barrier.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BARRIER = re.compile(r"^\s*((if \(.*\) )?(\w+\.)?((warp_|block_|cluster_)?barrier|start)\(\);)", re.MULTILINE)
TESTS = {
    "alias": ["tests/ops/test_alias.py", "tests/ops/test_alias_update.py", "tests/ops/test_batch.py"],
    "batch": ["tests/ops/test_batch.py"],
    "crop": ["tests/ops/test_crop.py", "tests/ops/test_batch.py"],
    "divergence": [
        "tests/ops/test_divergence_geometry.py",
        "tests/ops/test_divergence.py",
        "tests/ops/test_logit_stats.py",
    ],
    "gmm": ["tests/ops/test_gmm_kernels.py", "tests/ops/test_gmm.py"],
    "relation": ["tests/ops/test_relation.py"],
    "moments": ["tests/ops/test_moments.py"],
    "sparse": ["tests/ops/test_sparse.py", "tests/ops/test_sparse_draws.py", "tests/ops/test_sparse_arguments.py"],
}


def barriers() -> list[tuple[Path, int, str]]:
    """(file, line, statement) of every barrier that a kernel, or a function of one, waits at."""
    found = []
    for path in sorted([*ROOT.glob("csrc/*/*.cuh"), *ROOT.glob("csrc/*/cuda*.cu")]):
        if path.name != "device.cuh":
            for match in BARRIER.finditer(path.read_text()):
                found.append((path, path.read_text().count("\n", 0, match.start(1)) + 1, match[1]))
    return found


def first_failure(copy: Path, path: Path, line: int) -> str | None:
    """The first test that fails where that line is missing in a copy of ``csrc``, and what it says."""
    target = copy / path.relative_to(ROOT / "csrc")
    lines = path.read_text().split("\n")
    lines[line - 1] = re.sub(r"[\w.]+\(\);", ";", lines[line - 1])
    target.write_text("\n".join(lines))
    files = TESTS.get(path.parent.name) or list(dict.fromkeys(file for files in TESTS.values() for file in files))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-k", "emulated-0", *files]
    environment = {**os.environ, "FASTKD_EMULATED_CSRC": str(copy)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    target.write_text(path.read_text())
    if done.returncode == 0:
        return None
    test = next((text for text in done.stdout.split("\n") if text.startswith(("FAILED", "ERROR"))), "?")
    cause = next((text for text in done.stdout.split("\n") if "Error" in text and "FAILED" not in text), "")
    return f"{test.split(' ')[1] if ' ' in test else test}: {cause.split('Error: ')[-1][:150]}"


def main(folders: Sequence[str]) -> int:
    """Prints what the absence of each barrier makes fail, of all folders of csrc or of those named."""
    needless = 0
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "csrc"  # compiled once: then what a line changes
        shutil.copytree(ROOT / "csrc", copy)
        for path, line, text in barriers():
            if folders and path.parent.name not in folders:
                continue
            failure = first_failure(copy, path, line)
            needless += failure is None
            print(f"{path.relative_to(ROOT)}:{line} `{text}`: {failure or 'NOTHING FAILS'}", flush=True)
    return needless > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
