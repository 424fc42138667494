"""How fastkd is built and packed: for which GPUs, from which files, of which objects. Compilers and GPUs are scripts here."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.no_kernels

DEFAULT = ["8.0", "8.6", "8.9", "9.0a", "10.0+PTX"]
KNOWN = "compute_75 compute_80 compute_86 compute_89 compute_90 compute_100 compute_103"
# Writes what it is told to, by -o and -MF, and notes its own name and the source.
COMPILER = """\
#!/usr/bin/env bash
[ "$1" = --list-gpu-arch ] && { printf '%s\\n' KNOWN; exit; }
echo "$(basename "$0") $*" >> LOG
while [ $# -gt 0 ]; do
  case "$1" in -o) object=$2;; -MF) depfile=$2;; esac
  shift
done
echo object > "$object"
[ -z "$depfile" ] || echo "$object:" > "$depfile"
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a folder of programs the only one on PATH but the system's: g++, nvcc and nvidia-smi as scripts."""

    def make(*, nvcc: bool = True, gpus: str | None = None, fails: bool = False) -> Path:
        programs = tmp_path / "programs"
        programs.mkdir(exist_ok=True)
        log = programs / "log"
        text = COMPILER.replace("KNOWN", KNOWN).replace("LOG", str(log))
        scripts = {"compiler": text, "nvcc": text if nvcc else None}
        said = None if gpus is None else f"#!/bin/sh\nprintf '{gpus}'\nexit {int(fails)}\n"
        for name, script in {**scripts, "nvidia-smi": said}.items():
            (programs / name).unlink(missing_ok=True)
            if script is not None:
                (programs / name).write_text(script)
                (programs / name).chmod(0o755)
        # of the system only what the scripts call: its nvcc and nvidia-smi must not be found
        for name in ("bash", "sh", "basename", "cat", "env"):
            if not (programs / name).exists():
                (programs / name).symlink_to(shutil.which(name) or name)
        for name in ("FASTKD_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "FASTKD_OBJECTS", "FASTKD_SANITIZE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", str(programs))
        monkeypatch.setenv("CXX", str(programs / "compiler"))
        log.write_text("")
        return log

    return make


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py, imported, which builds nothing."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("fastkd_setup", ROOT / "setup.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def choice(build: ModuleType, editable: bool) -> list[str]:
    nvcc = build.find_nvcc()
    return build.cuda_architectures(nvcc, editable) if nvcc else []


@pytest.mark.parametrize(
    ("editable", "environment", "gpus", "expected"),
    [
        # an editable build: the GPUs that are here
        (True, {}, None, []),
        (True, {}, "", []),
        (True, {}, "No devices were found\\n", []),
        (True, {}, "[N/A]\\n", []),
        (True, {}, "9.0\\n", ["9.0a"]),
        (True, {}, " 8.6 \\n9.0\\n8.6\\n", ["8.6", "9.0a"]),
        (True, {}, "10.0\\n9.0\\n", ["9.0a", "10.0"]),
        (True, {}, "7.5\\n", []),
        (True, {}, "7.5\\n8.0\\n", ["8.0"]),
        (True, {}, "12.0\\n", ["10.0+PTX"]),
        (True, {}, "8.0\\n12.0\\n", ["8.0", "10.0+PTX"]),
        (True, {}, "10.3\\n", ["10.3"]),
        # asked for, forbidden, named
        (True, {"FASTKD_CUDA": "1"}, None, DEFAULT),
        (True, {"FASTKD_CUDA": "1"}, "7.5\\n", DEFAULT),
        (True, {"FASTKD_CUDA": "1"}, "8.6\\n", ["8.6"]),
        (True, {"FASTKD_CUDA": "0"}, "9.0\\n", []),
        (True, {"FASTKD_CUDA": ""}, None, []),
        (True, {"TORCH_CUDA_ARCH_LIST": "8.0 9.0a"}, None, ["8.0", "9.0a"]),
        (True, {"TORCH_CUDA_ARCH_LIST": "8.0;10.0+PTX"}, "9.0\\n", ["8.0", "10.0+PTX"]),
        (True, {"TORCH_CUDA_ARCH_LIST": " "}, "9.0\\n", ["9.0a"]),
        (True, {"TORCH_CUDA_ARCH_LIST": "8.0", "FASTKD_CUDA": "0"}, "9.0\\n", []),
        (True, {"TORCH_CUDA_ARCH_LIST": "8.0", "FASTKD_CUDA": "1"}, None, ["8.0"]),
        # a wheel is for other machines
        (False, {}, None, DEFAULT),
        (False, {}, "9.0\\n", DEFAULT),
        (False, {"FASTKD_CUDA": "1"}, "8.6\\n", DEFAULT),
        (False, {"FASTKD_CUDA": "0"}, None, []),
        (False, {"TORCH_CUDA_ARCH_LIST": "8.0 9.0a"}, None, ["8.0", "9.0a"]),
    ],
)
def test_which_gpus_it_builds_for(
    editable: bool,
    environment: dict[str, str],
    gpus: str | None,
    expected: list[str],
    machine: Callable[..., Path],
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(gpus=gpus)
    monkeypatch.setattr(build, "ASK_TORCH", "")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choice(build, editable) == expected


@pytest.mark.parametrize("smi", [None, "", "NVIDIA-SMI has failed\\n"])
def test_torch_is_asked_where_nvidia_smi_says_nothing(
    smi: str | None, machine: Callable[..., Path], build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(gpus=smi, fails=True)
    monkeypatch.setattr(build, "ASK_TORCH", "print('8.9'); print('8.9')")
    assert choice(build, True) == ["8.9"]
    monkeypatch.setattr(build, "ASK_TORCH", "raise ImportError('torch')")
    assert choice(build, True) == []


@pytest.mark.parametrize("environment", [{}, {"FASTKD_CUDA": "0"}, {"TORCH_CUDA_ARCH_LIST": "8.0 9.0a"}])
@pytest.mark.parametrize("editable", [False, True])
def test_without_nvcc_there_is_no_cuda(
    environment: dict[str, str],
    editable: bool,
    machine: Callable[..., Path],
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(nvcc=False, gpus="9.0\\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choice(build, editable) == []


@pytest.mark.parametrize(
    ("nvcc", "environment", "message"),
    [
        (False, {"FASTKD_CUDA": "1"}, "fastkd: FASTKD_CUDA=1 asks for CUDA kernels, but nvcc is not on PATH"),
        (True, {"FASTKD_CUDA": "yes"}, "fastkd: FASTKD_CUDA is 'yes', must be 0 (no CUDA kernels) or 1"),
        (True, {"FASTKD_CUDA": "2"}, "fastkd: FASTKD_CUDA is '2', must be"),
        (False, {"FASTKD_CUDA": "off"}, "fastkd: FASTKD_CUDA is 'off', must be"),
        (True, {"TORCH_CUDA_ARCH_LIST": "Hopper"}, "fastkd: TORCH_CUDA_ARCH_LIST has 'Hopper', must have numbers"),
        (True, {"TORCH_CUDA_ARCH_LIST": "8.0 sm_90"}, "fastkd: TORCH_CUDA_ARCH_LIST has 'sm_90', must have numbers"),
        (True, {"TORCH_CUDA_ARCH_LIST": "8.0,9.0"}, "fastkd: TORCH_CUDA_ARCH_LIST has '8.0,9.0', must have numbers"),
    ],
)
def test_what_the_build_refuses(
    nvcc: bool,
    environment: dict[str, str],
    message: str,
    machine: Callable[..., Path],
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(nvcc=nvcc)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        choice(build, True)
    assert str(ended.value.code).startswith(message)


def python(code: str, *arguments: str, folder: Path) -> str:
    """What it prints."""
    done = subprocess.run(
        [sys.executable, *code.split(), *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


HOOK = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def hook(name: str, tree: Path, to: Path) -> Path:
    """What pip does: calls this hook of the build backend; the file that came out."""
    done = subprocess.run([sys.executable, "-c", HOOK, name, str(to)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return to / done.stdout.splitlines()[-1]


def sdist(tree: Path, to: Path) -> Path:
    return hook("build_sdist", tree, to)


def files_of(tree: Path) -> set[str]:
    """Those that are in git, or will be."""
    if not (tree / ".git").exists():
        pytest.skip("this is no git checkout: nothing says which files are the source")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=tree, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name for name in names if (tree / name).exists()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree without anything built."""
    pytest.importorskip("pybind11")
    copied = tmp_path_factory.mktemp("source") / "tree"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("csrc", "fastkd"):
        shutil.copytree(ROOT / name, copied / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy2(ROOT / name, copied / name)
    return copied


def test_the_sdist_is_the_source_tree(tmp_path: Path) -> None:
    """All of it that git has, and of its own only what every sdist has."""
    expected = files_of(ROOT)
    whole = tmp_path / "whole"
    for name in expected:
        (whole / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, whole / name)
    (whole / "fastkd" / "_cuda.so").touch()  # what was built in place stays at home
    (whole / "fastkd" / "__pycache__").mkdir(exist_ok=True)
    (whole / "fastkd" / "__pycache__" / "losses.pyc").touch()
    with tarfile.open(sdist(whole, tmp_path)) as packed:
        held = {name.partition("/")[2] for name in (m.name for m in packed.getmembers() if m.isfile())}
    own = {name for name in held if name.split("/")[0] in ("PKG-INFO", "setup.cfg", "fastkd.egg-info")}
    assert held - own == expected


def test_licence_and_types_are_in_the_sdist(tree: Path, tmp_path: Path) -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "The fastkd authors" in text
    with tarfile.open(sdist(tree, tmp_path)) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert names >= {*sources, "LICENSE", "setup.py", "pyproject.toml", "README.md", "fastkd/py.typed", "fastkd/_C.pyi"}


def test_wheel_of_the_sdist_of_the_objects_of_the_editable_build(
    tree: Path, tmp_path: Path, machine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tree, three builds; each compiles only what the one before has not."""
    log = machine(gpus="")

    def compiled() -> list[str]:
        lines = [line.split() for line in log.read_text().splitlines()]
        log.write_text("")
        return sorted(f"{line[0]} {line[line.index('-c') + 1]}" for line in lines if "-c" in line)

    stranger = tree / "fastkd" / "_cuda.cpython-39-x86_64-linux-gnu.so"
    stranger.touch()
    shown = python("setup.py --quiet build_ext --inplace", folder=tree).splitlines()
    first = compiled()
    # a terminal shows these lines one over the other
    assert shown[0] == "fastkd: no GPU here, so no CUDA kernels; FASTKD_CUDA=1 builds them"
    assert all(re.fullmatch(rf"\[{i}/{len(first) + 1}\] \S+( \w+)?", line) for i, line in enumerate(shown[1:], 1))
    assert not [name for name in first if name.startswith("nvcc")]
    assert not stranger.exists()
    assert [path.name.partition(".")[0] for path in (tree / "fastkd").glob("*.so")] == ["_C"]
    # what pip does for an editable installation finds all of it done
    hook("build_editable", tree, tmp_path)
    assert compiled() == []
    # a wheel, from the sdist: CUDA kernels and the module that says so
    packed = sdist(tree, tmp_path)
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path / "unpacked")
    monkeypatch.setenv("FASTKD_OBJECTS", str(tree / "build" / "objects"))
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = hook("build_wheel", unpacked, tmp_path)
    kernels = sorted(f"nvcc {path.relative_to(ROOT)}" for path in (ROOT / "csrc").glob("*/cuda*.cu"))
    assert compiled() == ["compiler csrc/module.cpp", *kernels]
    ninja = (tree / "build" / "objects" / "build.ninja").read_text()
    assert "arch=compute_90a,code=sm_90a" in ninja
    assert "code=compute_100" in ninja
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition(".")[0] for name in names if name.endswith(".so")} == {"fastkd/_C", "fastkd/_cuda"}
    assert {"fastkd/py.typed", "fastkd/_C.pyi"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("csrc", "tests", "benchmarks"))]
    # in place once more, for a GPU that has come
    machine(gpus="8.6\\n")
    python("setup.py --quiet build_ext --inplace", folder=tree)
    assert compiled() == ["compiler csrc/module.cpp", *kernels]
    assert sorted(path.name.partition(".")[0] for path in (tree / "fastkd").glob("*.so")) == ["_C", "_cuda"]
    # and without: the library of the build before would be loaded
    monkeypatch.setenv("FASTKD_CUDA", "0")
    python("setup.py --quiet build_ext --inplace", folder=tree)
    assert [path.name.partition(".")[0] for path in (tree / "fastkd").glob("*.so")] == ["_C"]


def test_a_compiler_that_fails_ends_the_build_with_what_it_said(tmp_path: Path, machine: Callable[..., Path]) -> None:
    pytest.importorskip("pybind11")
    log = machine(gpus="")
    compiler = log.with_name("compiler")
    compiler.write_text("#!/bin/sh\necho 'error: no such register' >&2\nexit 1\n")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "module.cpp").touch()
    (tmp_path / "fastkd").mkdir()
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: no such register" in done.stdout + done.stderr
    assert done.stderr.endswith("fastkd: a compiler failed; what it said is above\n")
    assert "Traceback" not in done.stderr


def test_make_help_names_every_command() -> None:
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[1] for line in shown.splitlines()] == [
        line.partition(":")[0] for line in text.splitlines() if re.match(r"[a-z-]+:.*## ", line)
    ]
    assert {line.split()[1] for line in shown.splitlines()} == set(phony.split()) - {"FORCE"}


def recipes() -> dict[str, list[str]]:
    """The commands of each target of the Makefile, those over several lines in one."""
    found: dict[str, list[str]] = {}
    target = ""
    for line in (ROOT / "Makefile").read_text().replace("\\\n", " ").splitlines():
        if line.startswith("\t"):
            found[target].append(line[1:])
        elif match := re.match(r"(\S+):(?!=)", line):
            target = match[1]
            found.setdefault(target, [])
    return found


@pytest.mark.parametrize(
    "target",
    ["$(VENV)/.tools", "$(VENV)/.asked", "$(VENV)/.built", "$(VENV)/.dev", "demo", "test", "sdist", "dist/.wheel"],
)
def test_setting_up_says_what_it_does_and_no_commands(target: str) -> None:
    commands = recipes()[target]
    assert commands
    assert not [command for command in commands if not command.startswith(("@", "$(say) "))]
    if target != "$(VENV)/.asked":
        steps = [command for command in commands if command.startswith("$(say)") or '"== ' in command]
        assert steps
        assert all(re.search(r"second|minute", step) for step in steps)  # about how long


def test_other_wishes_build_anew_and_the_same_do_not(tmp_path: Path) -> None:
    asked = tmp_path / "venv" / ".asked"

    def make(**wishes: str) -> bool:
        """Whether what depends on it would be made again."""
        before = asked.stat().st_mtime_ns if asked.exists() else 0
        command = ["make", "--silent", f"VENV={asked.parent}", str(asked)]
        environment = {name: value for name, value in os.environ.items() if name not in ("FASTKD_CUDA", "MAKEFLAGS")}
        subprocess.run(command, cwd=ROOT, env={**environment, **wishes}, check=True)
        return asked.stat().st_mtime_ns != before

    wishes = [{}, {}, {"FASTKD_CUDA": "1"}, {"FASTKD_CUDA": "1"}, {"TORCH_CUDA_ARCH_LIST": "8.0;9.0a"}, {}]
    assert [make(**wish) for wish in wishes] == [True, False, True, False, True, True]


def test_ci_sees_nothing_of_the_home_of_who_starts_it(tmp_path: Path) -> None:
    """All of .ci/run, with a make that notes what it is told."""
    tree, programs = tmp_path / "tree", tmp_path / "programs"
    for folder in (tree / ".ci", programs, tmp_path / "home" / ".cache" / "fastkd" / "data"):
        folder.mkdir(parents=True)
    shutil.copy2(ROOT / ".ci" / "run", tree / ".ci" / "run")
    log = tmp_path / "log"
    note = f'echo "$*|$(ls -A "$HOME" | wc -l)|$HOME|$TORCH_CUDA_ARCH_LIST|$PIP_CACHE_DIR|$FASTKD_DATA$XDG_CACHE_HOME" >> {log}'
    for script in (programs / "make", tree / ".ci" / "check_symbols"):
        script.write_text(f"#!/bin/sh\n{note}\n")
        script.chmod(0o755)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "FASTKD_DATA": str(tmp_path / "data"),
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run([str(tree / ".ci" / "run")], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    calls = [line.split("|") for line in log.read_text().splitlines()]
    assert [call[0] for call in calls] == ["build", "lint", "", "inspect", "wheel", "sanitize", "frameworks", "test"]
    for _, entries, home, architectures, cache, of_the_user in calls:
        assert entries.strip() == "0"
        assert Path(home).parent == tmp_path
        assert home != environment["HOME"]
        assert not Path(home).exists()  # it is gone by now
        assert architectures == "8.0 9.0a"
        assert cache == str(tmp_path / "cache" / "pip")  # what pip has fetched before is not fetched again
        assert of_the_user == ""
