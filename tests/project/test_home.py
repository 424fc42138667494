"""The tests do not see what the user has at home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastkd.data.files import data_root

pytestmark = pytest.mark.no_kernels

ASK = """
import json, os, pathlib
print(json.dumps([str(pathlib.Path.home()), os.listdir(pathlib.Path.home()), sorted(os.environ)]))
"""


@pytest.fixture(scope="module")
def home_of_a_module() -> str:
    """What a fixture that serves all tests of a module sees."""
    return os.environ["HOME"]


def test_the_home_is_empty(home: Path, home_of_a_module: str) -> None:
    assert Path.home() == home == Path(home_of_a_module)
    assert list(home.iterdir()) == []
    assert data_root() == home / ".cache" / "fastkd" / "data"
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert Path(cache_dir()).parent == home.parent  # not the one that all programs of the user share


def test_so_it_is_in_processes(home: Path) -> None:
    """Those of the tests, and those of a program that puts more into the environment."""
    for environment in (None, {**os.environ, "FASTKD_ISA": "baseline"}):
        done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True)
        folder, content, names = json.loads(done.stdout)
        assert (folder, content) == (str(home), [])
        assert not [name for name in names if name == "FASTKD_DATA" or (name.startswith("XDG_") and "DIRS" not in name)]


@pytest.mark.parametrize(
    "variables", [{}, {"FASTKD_DATA": "data"}, {"XDG_CACHE_HOME": "cache", "XDG_CONFIG_HOME": "config"}]
)
def test_whatever_the_user_has(variables: dict[str, str], tmp_path: Path) -> None:
    """pytest as a user with data sets and settings would start it."""
    for name in (".cache/fastkd/data/cifar-10-batches-bin", "data/cifar-10-batches-bin", "cache", "config"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    given = {name: str(tmp_path / folder) for name, folder in variables.items()}
    chosen = [f"{Path(__file__)}::{test.__name__}" for test in (test_the_home_is_empty, test_so_it_is_in_processes)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(
        command, env={**os.environ, **given, "HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert "2 passed" in done.stdout, done.stdout
