"""The benchmark suite: what it refuses, how contenders take turns, what it counts, what ``--compare`` calls slower."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from fastkd.__main__ import main

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # benchmarks/ is of the source tree, not of the package

pytest.importorskip("pytest_benchmark")

from benchmarks import clock, compare, machine, measure, table  # noqa: E402
from benchmarks.case import BEST_PEER, Case, Settings, Work, on_threads, peers_that_fit, short_count  # noqa: E402
from benchmarks.iterations import Done, First, compared  # noqa: E402

pytestmark = pytest.mark.no_kernels

CPU = torch.device("cpu")


class Times:
    """Stands for pytest-benchmark's statistics."""

    def __init__(self) -> None:
        self.data: list[float] = []

    def update(self, duration: float) -> None:
        self.data.append(duration)

    @property
    def median(self) -> float:
        return sorted(self.data)[len(self.data) // 2]

    q1 = q3 = median

    @property
    def rounds(self) -> int:
        return len(self.data)


def work_of(ours: float, **peers: float) -> Work:
    """Contenders that return a number; 1 is right."""
    return Work(
        lambda: ours,
        {name: lambda value=value: value for name, value in peers.items()},
        lambda result: abs(result - 1.0),
        1e-3,
        1e-1,
        floor_bytes=1000,
    )


def rows_of(work: Work, name: str = "work") -> list[dict[str, Any]]:
    budget = measure.Budget(0.0, least=2)
    return measure.measure(Case(name, lambda: work), Settings(), 1e9, budget, lambda _: Times())


class Paced:
    """A clock by which a run takes what it returns."""

    def __init__(self) -> None:
        self.turns: list[float] = []

    def seconds(self, run: Callable[[], float]) -> float:
        self.turns.append(run())
        return self.turns[-1]


def test_a_wrong_result_fails_and_a_wrong_peer_is_missing() -> None:
    with pytest.raises(ArithmeticError, match=r"fastkd is wrong: relative error 0\.1, allowed 0\.001"):
        rows_of(work_of(1.1, right=1.0))
    rows = rows_of(work_of(1.0, right=1.05, wrong=2.0, nan=float("nan")))
    assert [(row["contender"], sorted(row.keys() & {"missing", "ms"})) for row in rows] == [
        ("fastkd", ["ms"]),
        ("right", ["ms"]),
        ("wrong", ["missing"]),
        ("nan", ["missing"]),
    ]
    assert rows[1]["relative_error"] == pytest.approx(0.05)
    assert rows[2]["missing"] == "its result differs: relative error 1"
    assert rows[0]["percent_of_ceiling"] == pytest.approx(100 * 1000 / (rows[0]["ms"] * 1e-3) / 1e9)


@pytest.mark.parametrize(
    ("losses", "gradients", "alike", "expected"),
    [
        ([100.0, 0.1], [0.6, 0.8], True, 0.0),
        ([100.0, 0.11], [0.6, 0.8], True, 0.1),  # small ones count as large ones do
        ([100.0, 0.1], [0.8, 0.6], True, 0.2 * 2**0.5),
        ([100.0, 0.1], [0.8, 0.6], False, 0.0),  # of other images
        ([100.0, 0.1], [0.6, float("nan")], True, float("nan")),
    ],
)
def test_iterations_are_compared_by_each_loss_and_by_gradients(
    losses: list[float], gradients: list[float], alike: bool, expected: float
) -> None:
    truth = First(torch.tensor([100.0, 0.1]), torch.tensor([0.6, 0.8]))
    done = Done(torch.ones(()), First(torch.tensor(losses), torch.tensor(gradients)), alike)
    work = compared(Settings(), lambda: done, lambda: done, truth, 1e-4)
    assert work.error(done) == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)


def test_a_peer_that_cannot_is_missing_with_the_reason() -> None:
    def absent() -> None:
        raise ModuleNotFoundError("No module named 'kornia'", name="kornia")

    def broken() -> None:
        raise RuntimeError("first line\nsecond line")

    work = work_of(1.0)
    work.peers |= {"absent": absent, "broken": broken}
    missing = {row["contender"]: row["missing"] for row in rows_of(work) if "missing" in row}
    assert missing == {"absent": "kornia is not installed", "broken": "RuntimeError: first line"}


def test_a_peer_with_places_of_its_own_must_only_be_able() -> None:
    work = work_of(1.0, elsewhere=5.0)
    work.incomparable = ("elsewhere",)
    assert [(row["contender"], row["relative_error"]) for row in rows_of(work)] == [
        ("fastkd", 0.0),
        ("elsewhere", None),
    ]


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    paced, order = Paced(), []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: sum(paced.turns))
    runs = {"quick": lambda: 0.1, "slow": lambda: 0.3}
    measure.take_turns(runs, paced, measure.Budget(0.61, least=2), lambda name, _: order.append(name))
    assert order == ["quick", "quick", "quick", "slow", "quick", "quick", "quick", "slow"]
    assert paced.turns[:2] == [0.1, 0.3]  # how long a turn takes is asked first


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-9, 501), (0.01, 100), (0.5, 5), (1.5, 3)])
def test_rounds_fit_the_budget(seconds: float, rounds: int) -> None:
    assert measure.Budget(1.0).rounds(seconds) == rounds


@pytest.mark.parametrize(
    ("seconds", "runs", "time"), [(2.0, 1, 2.0), (0.5, 2, 0.4), (1e-3, 3, 0.9e-3), (1e-9, 100, 0.9e-9)]
)
def test_short_work_is_timed_at_later_runs(
    seconds: float, runs: int, time: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run takes so long, those after it less."""
    times = iter([seconds, 0.4 if seconds == 0.5 else 0.9 * seconds, *[0.9 * seconds] * 98])
    monkeypatch.setattr(clock.WallClock, "_once", lambda *_: next(times))
    assert clock.WallClock().seconds(lambda: None) == pytest.approx(time)
    assert len(list(times)) == 100 - runs


def test_of_runs_in_a_row_the_shortest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.4, 0.02, 0.03, 5.0])
    monkeypatch.setattr(clock.WallClock, "_once", lambda *_: next(times))
    assert clock.clock_for(CPU, in_a_row=3).seconds(lambda: None) == 0.02
    assert next(times) == 5.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an allocator of its own")
def test_pages_are_kept_for_the_case_alone() -> None:
    """In a process of its own: the thresholds of the allocator are the process's."""
    program = """
import ctypes, os, torch
from benchmarks.machine import pages_kept

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def left(before):
    torch.ones(1 << 24)  # 64 MiB, freed at once
    return resident() - before

if hasattr(ctypes.CDLL(None), "mallopt"):
    left(0)
    with pages_kept():
        assert left(resident()) > 48 << 20
    assert left(resident()) < 16 << 20
"""
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_draws_that_are_wrong_are_seen() -> None:
    from benchmarks import bench_sparse

    logits = 3 * torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    error, draws = bench_sparse._wrong_draws(logits), (bench_sparse.DRAWS, bench_sparse.TEMPERATURE)
    assert error(bench_sparse.torch_draws(logits, *draws)) < 1e-5
    assert error(bench_sparse.torch_draws(logits, 64, 3.0)) == float("inf")
    indices, log_probs = bench_sparse.torch_draws(logits, *draws)
    there = log_probs > -torch.inf
    assert ((indices[:, 1:] > indices[:, :-1]) | ~there[:, 1:]).all()
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(64))


def test_targets_and_the_best_peer() -> None:
    ours = {"contender": "fastkd", "ms": 1.0, "percent_of_ceiling": 80.0}
    rows: list[dict[str, Any]] = [ours, {"contender": "a", "ms": 9.0}, {"contender": "b", "ms": 5.0}]
    work = work_of(1.0)
    work.targets, work.target_percent, work.target_ms = {"a": 8.0, BEST_PEER: 8.0, "absent": 2.0}, 85.0, 2.0
    work.reason, work.floor_bytes = "The reason.", 900_000
    measure._compare_with_peers(rows, work, 1e9)
    assert (rows[0]["best_peer"], rows[0]["ratio"], rows[1]["ratio"]) == ("b", 5.0, 9.0)
    met = {target["of"]: target["met"] for target in rows[0]["targets"]}  # type: ignore[attr-defined]
    assert met == {"a": True, BEST_PEER: False, "absent": None, "% of ceiling": False, "ms": True}
    assert rows[0]["reason"].startswith("The 0.9 MB that must move take 0.9 ms at the rate of a copy in this run")
    assert rows[0]["reason"].endswith("no more than 5.6 times as fast as b is possible. The reason.")
    work.targets, work.target_percent = {"a": 8.0}, None
    rows = [{"contender": "fastkd", "ms": 1.0}, {"contender": "a", "ms": 9.0}]
    measure._compare_with_peers(rows, work, 1e9)
    assert "reason" not in rows[0]  # nothing is missed


def test_peers_that_take_too_much_are_left_out() -> None:
    work = peers_that_fit(work_of(1.0, a=1.0, b=1.0), 2e9, Settings(memory=1e9), ["a"])
    assert list(work.peers) == ["b"]
    assert peers_that_fit(work, 2e9, Settings(memory=1e9)).missing["b"] == "needs about 2 GB, 1 GB may be taken"
    assert peers_that_fit(work_of(1.0, a=1.0), 2e9, Settings()).missing == {}


def test_threads_are_set_for_the_case_alone() -> None:
    before, seen = torch.get_num_threads(), []
    one, three = on_threads(Case("work", lambda: work_of(1.0)), [1, 3])
    assert (one.name, three.name) == ("work, 1 thread", "work, 3 threads")
    work = work_of(1.0)
    work.ours = lambda: seen.append(torch.get_num_threads()) or 1.0  # type: ignore[func-returns-value]
    case = Case("work", lambda: work, threads=3)
    rows = measure.measure(case, Settings(), 1e9, measure.Budget(0.0, least=1), lambda _: Times())
    assert set(seen) == {3}
    assert rows[0]["threads"] == 3
    assert torch.get_num_threads() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system does not tell")
def test_peak_memory_counts_what_is_freed_again() -> None:
    def run() -> torch.Tensor:
        return (torch.ones(1 << 24) + 1)[:10].clone()

    peak = machine.peak_memory(run, CPU)
    if peak is None:
        pytest.skip("resetting the peak is not allowed here")
    slack = 1 << 20  # the kernel counts pages of a thread in lots
    assert (2 << 26) - slack <= peak < 3 << 26


def test_copy_ceiling_counts_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.WallClock, "seconds", lambda *_: 0.5)
    assert machine.copy_ceiling(CPU, nbytes=1000, rounds=3) == 4000.0


@pytest.mark.parametrize(("n", "name"), [(10**7, "1e7"), (2**24, "2^24"), (1000, "1000"), (50_000, "50000")])
def test_short_count(n: int, name: str) -> None:
    assert short_count(n) == name


@pytest.mark.parametrize(
    ("ms", "text"), [(0.0123, "12.3 us"), (0.5, "500 us"), (1.234, "1.23 ms"), (34_561.0, "34.6 s")]
)
def test_times_have_three_digits(ms: float, text: str) -> None:
    assert table.time_text(ms) == text


def in_a_process(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As users start it: pytest-benchmark measures nothing where tests run side by side."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    inherited["OMP_NUM_THREADS"] = "1"  # tests that run side by side have the other cores
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def pytest_suite(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    """The rows of a run in a process of its own, as users start it."""
    output = tmp_path / "results.json"
    command = ["pytest", "-p", "no:cacheprovider", "-q", "benchmarks", "--no-compile", "--output", str(output)]
    run = in_a_process(*command, "--case-seconds", "0.001", "--least-rounds", "1", *options)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    rows: list[dict[str, Any]] = json.loads(output.read_text())["rows"]
    assert all(row["case"] in run.stdout for row in rows)
    return rows


def kind(row: dict[str, Any]) -> str:
    return row["case"].split("x")[0].rstrip("0123456789")


SMALL_CASES = "not 224 and not ResNet and not 10000 and not 50257 and not 152064 and not 262144"


def test_cases_of_a_gpu_on_the_cpu(tmp_path: Path) -> None:
    """Inputs, peers, comparisons and rows of the GPU's cases, at sizes that say nothing about speed."""
    rows = pytest_suite(tmp_path, "--sizes", "gpu", "--large", "4096", "--memory", "0.02", "-k", SMALL_CASES)
    names = {kind(row) for row in rows}
    assert names >= {
        "KL ", "JSD ", "KL forward only ", "logit_stats ", "crop forward ", "crop backward ", "random_crop_flip ",
        "draw_batch ", "GMM fit ", "select_clean ", "alias build N=", "alias draw 2^18 of N=", "alias IQPR N=",
        "patch discriminator, ", "RKD ", "sparse KL ", "sample teacher ", "moments ",
        "moments of samples ", "moments and gradient ",
        "TA-DFKD lenet5 to lenet5-half, ", "TA-DFKD ", "MosaicKD lenet5 to lenet5-half, ", "MosaicKD ",
    }  # fmt: skip
    ours = [row for row in rows if row["contender"] == "fastkd" and "not_measured" not in row]
    assert all(row["ms"] > 0 and row["relative_error"] < 1e-2 for row in ours)
    refused = [row for row in rows if "not_measured" in row]
    assert refused
    assert all("GB may be taken" in row["not_measured"] for row in refused)
    measured = {row["contender"] for row in rows if "ms" in row}
    assert measured >= {"torch eager", "advanced-index gather", "grid_sample, nearest", "unfold and gather"}
    assert measured >= {
        "scikit-learn",
        "torch EM, batched",
        "scipy DiscreteAliasUrn",
        "numpy choice",
        "WeightedRandomSampler",
    }
    named = {row["contender"] for row in rows}
    assert named >= {
        "Liger-Kernel",
        "kornia RandomCrop",
        "torchvision crop, one by one",
    }  # measured or missing, never silent


def test_out_of_time_is_said(tmp_path: Path) -> None:
    rows = pytest_suite(tmp_path, "--seconds", "0", "-k", "gmm")
    assert {row.get("not_measured") for row in rows} == {"out of time"}
    assert len(rows) > 2


@pytest.mark.parametrize("keep", [False, True])
def test_a_case_that_fails_is_a_row_and_the_exit_code(keep: bool, tmp_path: Path) -> None:
    """Of rows of before, --keep-rows keeps those of other cases."""
    (tmp_path / "bench_broken.py").write_text(
        "from benchmarks.case import Case\n"
        "def cases(settings):\n    yield Case('broken', lambda: 1 / 0)\n"
        "def test_broken(case, contest):\n    contest(case)\n"
    )
    output = tmp_path / "out.json"
    before = [{"primitive": "broken", "case": name, "contender": "fastkd"} for name in ("broken", "whole")]
    output.write_text(json.dumps({"rows": before}))
    suite = [
        "pytest",
        "-q",
        *(["--keep-rows"] if keep else []),
        "-p",
        "no:cacheprovider",
        "-p",
        "benchmarks.conftest",
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    run = in_a_process(*suite, "--large", "4096", "--output", str(output), str(tmp_path / "bench_broken.py"))
    assert run.returncode == 1, run.stdout + run.stderr
    *kept, row = json.loads(output.read_text())["rows"]
    assert kept == (before[1:] if keep else [])
    assert row["error"] == "ZeroDivisionError: division by zero"


FAST_CASE = ("bench", "gmm", "-k", "fit and 1x1024", "--case-seconds", "0.05")


def bench(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``fastkd bench`` of one case."""
    return in_a_process("fastkd", *FAST_CASE, *options, **environment)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A results file, and what was printed."""
    path = tmp_path_factory.mktemp("bench") / "results.json"
    run = bench("--output", str(path))
    assert run.returncode == 0, run.stdout + run.stderr
    return path, run.stdout


def test_bench_prints_a_table_and_writes_numbers_and_figures(measured: tuple[Path, str]) -> None:
    path, printed = measured
    document = json.loads(path.read_text())
    assert document["ceiling_gb_per_s"] > 0
    assert document["machine"]["torch"] == torch.__version__
    assert document["command"].startswith("pytest benchmarks/bench_gmm.py --device cpu")
    assert str(ROOT) not in document["command"]
    assert [row["contender"] for row in document["rows"]] == ["fastkd", "scikit-learn", "torch EM, batched"]
    ours = document["rows"][0]
    assert (ours["rounds"], ours["primitive"]) == (501, "gmm") or ours["rounds"] > 5
    assert ours["ratio"] == min(row["ratio"] for row in document["rows"][1:])
    for word in ("GMM fit 1x1024 fp32", "scikit-learn", "ceiling", ">= 30x", str(path)):
        assert word in printed
    for figure in ("speedup", "ceiling"):
        picture = imread(path.with_name(f"results-{figure}.png"))
        assert picture.shape[0] > 100
        assert len(set(map(tuple, picture.reshape(-1, picture.shape[2]).tolist()))) > 20


def test_a_slowed_kernel_is_caught(measured: tuple[Path, str], tmp_path: Path) -> None:
    """5 ms on top of some 20 us, by a plugin of the test."""
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    slowed = {"PYTEST_PLUGINS": "slowed", "FASTKD_TEST_SLOWED": "gmm_fit 0.005", "PYTHONPATH": path}
    run = bench("--output", str(tmp_path / "new.json"), "--compare", str(measured[0]), **slowed)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "slower or failed: GMM fit 1x1024 fp32" in run.stdout


def test_a_file_is_shown_and_compared_without_measuring(
    measured: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    begun = measured[0].read_text()
    assert main(["bench", "--show", str(measured[0]), "--compare", str(measured[0])]) == 0
    assert "nothing became slower" in capsys.readouterr().out
    assert measured[0].read_text() == begun


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tiles"],
            "nothing is measured for 'tiles'; choose from alias, batch, collections, crop, datafree, divergence, "
            "divergence_shard, gmm, linear, moments, mosaic, noise, relation, sparse, training",
        ),
        (["--device", "tpu"], "--device is 'tpu', must be cpu, cuda or cuda:<n>"),
        (["--output", "here.txt"], "--output is here.txt, must be a name that ends in .json"),
        (["--tolerance", "0"], "--tolerance is 0.0, must be above 0"),
        (["--compare", "no/such.json"], "--compare no/such.json cannot be used"),
        (["--show", __file__], "it is not a results file of this suite"),
        (["--show", __file__, "gmm"], "--show shows all of a file: leave out the primitives, --match and --output"),
        (["--output", "/dev/null/x.json"], "--output /dev/null/x.json cannot be written"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used: torch finds"),
    ],
)
def test_what_bench_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_layers_of_a_small_call(tmp_path: Path) -> None:
    output = tmp_path / "layers.json"
    run = in_a_process("benchmarks.layers", "--seconds", "0.001", "--output", str(output))
    assert run.returncode == 0, run.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [row["layer"] for row in rows if row["layer"]][1:3] == ["kernel", "autograd's node"]
    assert all(row["us"] > 0 and row["call"] in run.stdout for row in rows)


def test_an_empty_selection_is_said_and_takes_nothing_away(measured: tuple[Path, str]) -> None:
    begun = measured[0].read_text()
    run = in_a_process("fastkd", "bench", "gmm", "-k", "nosuchcase", "--output", str(measured[0]))
    assert run.returncode == 2
    assert "fastkd bench: nothing was measured: no tests collected" in run.stderr
    assert measured[0].read_text() == begun


def test_the_baseline_is_not_replaced(measured: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--output", str(measured[0]), "--compare", str(measured[0])]) == 2
    assert "which this run would replace" in capsys.readouterr().err


def document(**cases: dict[str, float | tuple[float, float]]) -> dict[str, Any]:
    """Medians, or medians and half the spread between the quartiles, of contenders of cases."""
    rows = []
    for case, contenders in cases.items():
        for contender, given in contenders.items():
            ms, spread = given if isinstance(given, tuple) else (given, 0.01)
            rows.append({"case": case, "contender": contender, "ms": ms, "quartiles_ms": [ms - spread, ms + spread]})
    return {"machine": {"date": "today", "fastkd": "0"}, "rows": rows}


def verdicts(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    return {change.case: change.verdict for change in compare.changes(old, new, 0.25)}


def test_what_compare_calls_slower() -> None:
    """The drift of a case is that of its peers and of all peers, in the median."""
    old = document(
        a={"fastkd": 1.0, "peer": 10.0}, b={"fastkd": 1.0}, c={"fastkd": (1.0, 0.5), "peer": 5.0}, d={"fastkd": 1.0}
    )
    # the machine is twice as slow today
    new = document(
        a={"fastkd": 2.0, "peer": 20.0}, b={"fastkd": 2.1}, c={"fastkd": (2.9, 0.5), "peer": 10.0}, e={"fastkd": 1.0}
    )
    assert verdicts(old, new) == {"a": "same", "b": "same", "c": "same", "d": "gone", "e": "new"}
    new = document(
        a={"fastkd": 2.6, "peer": 20.0}, b={"fastkd": 3.0}, c={"fastkd": (4.0, 0.5), "peer": 10.0}, d={"fastkd": 1.0}
    )
    assert verdicts(old, new) == {"a": "slower", "b": "slower", "c": "slower", "d": "faster"}
    new["rows"][0] = {"case": "a", "contender": "fastkd", "error": "ArithmeticError: wrong"}
    assert verdicts(old, new)["a"] == "failed"


def test_peers_made_of_fastkd_are_no_drift() -> None:
    old, new = document(a={"fastkd": 1.0, "own": 10.0}), document(a={"fastkd": 2.0, "own": 20.0})
    assert verdicts(old, new) == {"a": "same"}
    new["rows"][1]["own"] = True
    assert verdicts(old, new) == {"a": "slower"}


def test_nothing_compared_is_no_success() -> None:
    old, new = document(a={"fastkd": 1.0}), document(b={"fastkd": 1.0})
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    assert compare.report(old, new, 0.25, console) is True
    assert "nothing was compared" in console.export_text()
    new["rows"] = [{"case": "a", "contender": "fastkd", "not_measured": "out of time"}]
    assert verdicts(old, new) == {"a": "not measured"}
    assert compare.report(old, new, 0.25, console) is True


def test_compare_names_what_differs_besides() -> None:
    old, new = document(a={"fastkd": 1.0}), document(a={"fastkd": 1.0})
    old["machine"]["torch"], new["machine"]["torch"] = "2.12", "2.13"
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    assert compare.report(old, new, 0.25, console) is False
    assert "torch was 2.12, is 2.13" in console.export_text()


GPU_RESULTS = "benchmarks/results/nvidia-h100-80gb-hbm3"


def test_the_readme_shows_the_committed_results() -> None:
    """The table between two marks is what the command above it prints, of the file that it names."""
    text = (ROOT / "README.md").read_text()
    tables = re.findall(r"<!-- fastkd bench --show (\S+) --markdown -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert len(tables) == 2
    for name, shown in tables:
        document = json.loads((ROOT / name).read_text())
        assert shown == table.markdown(document)
        assert document["machine"]["date"] in text
    for figure in re.findall(r"\((benchmarks/results/\S+\.png)\)", text):
        assert (ROOT / figure).is_file()
        assert figure.startswith((*(name.removesuffix(".json") for name, _ in tables), GPU_RESULTS))


def test_the_gpu_rows_in_the_documents_are_the_committed_ones() -> None:
    text = (ROOT / "README.md").read_text()
    document = json.loads((ROOT / f"{GPU_RESULTS}.json").read_text())
    ours = {row["case"]: row for row in document["rows"] if row["contender"] == measure.OURS and "ms" in row}
    shown = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|x]+)x ([^|;]+) \| ([^|]+) \|$", text, re.MULTILINE)
    rows = [row for row in shown if row[0] in ours]
    assert len(rows) == 11
    for case, time, ratio, peer, share in rows:
        row = ours[case]
        _, _, _, percent, _ = table.cells(row)
        assert (time, ratio, share) == (table.time_text(row["ms"]), table.three_digits(row["ratio"]), percent)
        assert row["best_peer"].startswith(peer)
    variants = json.loads((ROOT / "benchmarks/results/nvidia-h200-divergence-variants.json").read_text())["rows"]
    text = (ROOT / "benchmarks/README.md").read_text()
    for row in variants:
        if row["classes"] in (1000, 32000, 128256):
            times = " | ".join(f"{row[name]:.3f}" for name in ("kl_ms", "js_ms", "kl_without_gradient_ms"))
            assert f"| {row['dtype']}, {row['classes']} classes | {row['variant']} | {times} |" in text


def test_the_layers_in_the_documents_are_the_committed_ones() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    name = re.search(r"\((results/\S+-layers\.json)\)", text).group(1)  # type: ignore[union-attr]
    for row in json.loads((ROOT / "benchmarks" / name).read_text())["rows"]:
        assert f"| {row['call']} | {row['us']} | {row['layer_us'] if row['layer'] else ''} | {row['layer']} |" in text
