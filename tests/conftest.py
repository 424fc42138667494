"""Fixtures: the devices and instruction sets that every op test runs on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import emulated
import pytest
import torch
from hypothesis import HealthCheck, settings

from fastkd import _C, build_info

# The same examples in every run: what fails has been broken since. --hypothesis-profile=explore looks for new ones.
_COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.register_profile("explore", _COMMON)
settings.register_profile("repeatable", _COMMON, derandomize=True)
settings.load_profile("repeatable")

_SETS = ["baseline", "avx2", "avx512"]
_BEST = _SETS.index(build_info()["cpu_instruction_set_best"])
_CPU = [
    pytest.param(f"cpu-{name}", marks=[] if i <= _BEST else [pytest.mark.skip(reason=f"this machine has no {name}")])
    for i, name in enumerate(_SETS)
]


_SCHEDULES = int(os.environ.get("FASTKD_SCHEDULES", "5"))  # of emulated launches
# emulated-<schedule>; the last one as a GPU without thread block clusters, such as the A100
_CUDA_KERNELS = [
    *(f"emulated-{seed}" for seed in range(_SCHEDULES)),
    "emulated-5-no_clusters",
    pytest.param(
        "cuda", marks=[] if torch.cuda.is_available() else [pytest.mark.skip(reason="this machine has no CUDA device")]
    ),
]


# What programs keep for a user: data sets, settings, caches. XDG_CONFIG_DIRS and XDG_DATA_DIRS are the machine's own.
_OF_THE_USER = (
    "FASTKD_DATA",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_STATE_HOME",
    "XDG_RUNTIME_DIR",
)


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty home, for the tests and the processes that they start: none finds, or changes, what the user has.

    Of the session, so that the fixtures of modules see it, too; what a test wants there it puts into a home of its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in _OF_THE_USER:
            patch.delenv(name, raising=False)
        # Caches, not in the home, which stays empty: matplotlib's list of fonts, and what torch.compile has made, of which
        # another checkout would find its own operators' old signatures.
        for name in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(folder))
        yield folder


@contextmanager
def _kernels_of(backend: str) -> Iterator[torch.device]:
    """Has ``backend``, ``kind`` or ``kind-variant``, answer the operators on tensors of the device that it yields."""
    kind, _, variant = backend.partition("-")
    if kind == "cuda":
        yield torch.device("cuda")
    elif kind == "emulated":
        seed, _, no_clusters = variant.partition("-")
        with emulated.emulated(int(seed), max_cluster=1 if no_clusters else 16):
            yield torch.device("cpu")
    else:
        _C.set_instruction_set(variant)
        try:
            yield torch.device("cpu")
        finally:
            _C.set_instruction_set(_SETS[_BEST])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Op tests run on the CPU with each instruction set; those marked ``cuda_kernels`` on those kernels, too."""
    if "backend" in metafunc.fixturenames:
        both = metafunc.definition.get_closest_marker("cuda_kernels") is not None
        metafunc.parametrize("backend", [*_CPU, *(_CUDA_KERNELS if both else [])])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``FASTKD_ONLY_CUDA=1``: nothing but the kernels of a GPU, where time on one is short."""
    if os.environ.get("FASTKD_ONLY_CUDA") != "1":
        return

    def on_gpu(item: pytest.Item) -> bool:
        parameters = getattr(item, "callspec", None)
        backend = parameters.params.get("backend") if parameters else None
        return backend == "cuda" or item.get_closest_marker("cuda") is not None

    config.hook.pytest_deselected(items=[item for item in items if not on_gpu(item)])
    items[:] = [item for item in items if on_gpu(item)]


@pytest.fixture
def device(backend: str) -> Iterator[torch.device]:
    """The devices an op test runs on, with the kernels of ``backend`` in place.

    Inputs are made on the CPU, by ``generator``, and moved; results are compared to the truth there.
    """
    with _kernels_of(backend) as device:
        yield device


@pytest.fixture
def reads_values(backend: str) -> bool:
    """Whether ``device``'s kernels check the numbers in tensors, too, and raise.

    Elsewhere that would wait for the device: a wrong number makes its row NaN there.
    """
    return backend.startswith("cpu-")


@pytest.fixture
def fixed_order(backend: str) -> bool:
    """Whether the sums of a row have one order wherever it lies: CUDA kernels order them by its alignment."""
    return backend.startswith("cpu-")


@pytest.fixture
def few(backend: str) -> bool:
    """Whether threads are emulated, each step of them 100 ns or more: a part of a large input must do."""
    return backend.startswith("emulated-")


@pytest.fixture(params=_CPU)
def cpu(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The CPU alone, with each instruction set: for tests of its threads."""
    with _kernels_of(request.param) as device:
        yield device


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors in plain torch are ten times faster so where other processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves of trainings take half a second each: only the tests of figures draw them."""
    monkeypatch.setattr("fastkd.training.figures.save_curves", lambda lines, path, title: path.touch())


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator for the inputs of a test."""
    return torch.Generator().manual_seed(0)
