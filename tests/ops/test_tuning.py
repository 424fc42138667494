"""Numbers of launches that FASTKD_TUNING sets: what is refused, and that every value gives right results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch
from cuda_cases import DETERMINED, Case, _collection, _crop, _draw_batch_of, _images
from cuda_truth import check
from test_divergence_geometry import plan

from fastkd import _C

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # benchmarks/ is of the source tree, not of the package

from benchmarks import tuning  # noqa: E402
from benchmarks.results_file import ResultsFile  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

KNOBS = _C.tuning()
VALUES = [(name, value) for name, (_, usual, values) in KNOBS.items() for value in values if value != usual]
# small cases whose launches a group of knobs has a part in; those of the others have other numbers below
CASES = {
    "divergence": [
        "kl_div 33x4099xbfloat16",
        "kl_div rows 256x100xfloat32",
        "js_div 2x128257xbfloat16",
        "logit_stats 5x50257xfloat16",
    ],
    "crop": ["crop_patches", "crop_patches bfloat16"],
    "batch": ["draw_batch float32"],
    "alias": ["alias 20000 float16", "alias 4097 float64"],
    "gmm": ["gmm_fit 3x1271xfloat64"],
    "relation": ["relation_loss 41x17x20xbfloat16"],
    "moments": ["channel_moments 3x5x5000xfloat32", "channel_moments channels_last 3x24x900xbfloat16"],
}


def _of_environment(settings: str) -> subprocess.CompletedProcess[str]:
    code = "import fastkd; print({name: value for name, (value, *_) in fastkd._C.tuning().items()})"
    environment = {**os.environ, "FASTKD_TUNING": settings}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.no_kernels
def test_the_environment_is_read_at_import() -> None:
    found = _of_environment("divergence.resident_blocks=1,crop.rounds=2")
    usual = {name: default for name, (_, default, _) in KNOBS.items()}
    assert found.stdout.strip() == str(usual | {"divergence.resident_blocks": 1, "crop.rounds": 2})
    found = _of_environment("crop.rounds=3")
    assert found.returncode == 1
    assert "fastkd: FASTKD_TUNING sets crop.rounds to '3', must be one of 1, 2, 4, 8" in found.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("crop.rounds=", "sets crop.rounds to '', must be one of 1, 2, 4, 8"),
        ("crop.rounds", "sets crop.rounds to '', must be"),
        ("crop.rounds=2x", "sets crop.rounds to '2x', must be"),
        ("crop.rounds=0", "sets crop.rounds to '0', must be"),
        ("crop.rounds=-1", "sets crop.rounds to '-1', must be"),
        ("crop.rounds=99999999999999999999", "sets crop.rounds to '99999999999999999999', must be"),
        ("crop.turns=2", "has 'crop.turns=2', must be name=value, .* divergence.resident_blocks, .*, relation.splits"),
        ("crop.rounds=2;batch.rounds=2", "sets crop.rounds to '2;batch.rounds=2', must be"),
        ("crop.rounds=2,,", "has '', must be name=value"),
    ],
)
def test_what_is_refused(settings: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"fastkd: FASTKD_TUNING {message}"), emulated.tuned(settings):
        pass


def test_usual_values_are_allowed() -> None:
    for name, (_, usual, values) in KNOBS.items():
        assert usual in values, name
        assert values == sorted(set(values)), name
        assert min(values) > 0, name


def test_plans_of_rows_change() -> None:
    """What each knob of the divergences is about, on a device of 132 multiprocessors."""
    rows, classes = 8192, 32000
    assert plan(rows, classes, 2).cluster == 4
    with emulated.tuned("divergence.resident_blocks=1"):
        assert (plan(rows, classes, 2).cluster, plan(rows, classes, 2).threads) == (2, 512)
    assert plan(1, 10**6, resident=False).cluster == 8
    with emulated.tuned("divergence.streaming_cluster=2"):
        assert plan(1, 10**6, resident=False).cluster == 2
    assert plan(100, 10**6, resident=False).cluster == 4
    with emulated.tuned("divergence.streaming_blocks=8"):
        assert plan(100, 10**6, resident=False).cluster == 8
    assert not plan(4096, 100).one_launch
    with emulated.tuned("divergence.one_launch_passes=32"):
        assert plan(4096, 100).one_launch
    assert plan(10**6, 1000).blocks == 1 << 16
    with emulated.tuned("divergence.lane_blocks=4096"):
        assert plan(10**6, 1000).blocks == 4096


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_every_value_gives_the_truth(name: str, value: int) -> None:
    names = CASES[name.partition(".")[0]]
    cases = [case for case in DETERMINED if case.name in names]
    assert len(cases) == len(names)
    with emulated.tuned(f"{name}={value}"):
        for case in cases:
            check(case, torch.device("cpu"), lambda: emulated.emulated(0))


# so many vectors that the threads of the emulated device make several, one after the other
MANY = {
    "crop": Case("crop_patches of many images", _images(164, 40, torch.float32), _crop, {"size": 20}),
    "batch": Case("draw_batch of many images", _collection, _draw_batch_of, {"dtype": torch.float32, "count": 12_800}),
}


@pytest.mark.no_kernels  # minutes under the sanitizers, for which other tests have smaller cases
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, value in VALUES if "rounds" in name])
def test_rounds_of_many_vectors(name: str, value: int) -> None:
    with emulated.tuned(f"{name}={value}"):
        check(MANY[name.partition(".")[0]], torch.device("cpu"), lambda: emulated.emulated(0))


# ---- the sweep over them -----------------------------------------------------------------------------


def test_every_knob_has_cases() -> None:
    assert list(tuning.SWEEPS) == list(KNOBS)
    for knob, sweep in tuning.SWEEPS.items():
        assert len(tuning.cases_of(knob, torch.device("cpu"), tuning.SMALL)) == len(sweep.cases), knob


@pytest.mark.no_kernels
def test_the_sweep_measures_each_value_in_its_own_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "TURNS", 2)
        output = tmp_path / "out.json"
        arguments = ["--device", "emulated", "--only", "alias.update_blocks=2", "--output", str(output)]
        assert tuning.main(arguments) == 0
    rows = json.loads(output.read_text())["tuning"]
    assert [(row["knob"], row["value"], row["usual"], row["turns"]) for row in rows] == [
        ("alias.update_blocks", 1, 1, 2),
        ("alias.update_blocks", 2, 1, 2),
    ]
    assert all(row["ms"] > 0 and "alias update" in row["case"] for row in rows)
    assert rows[0]["of_usual"] == 1.0
    assert "alias.update_blocks: " in capsys.readouterr().out.splitlines()[-2]


# In the place of a process: value 1 is the usual one, 2 is twice as fast, 3 twice as slow, 4 wrong, 5 hangs, 6 crashes.
STUB = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.worker import serve
name, value = os.environ["FASTKD_TUNING"].split("=")
def answer(question):
    if question is None:
        return {{"case": "relative error 0.5" if value == "4" else ""}}
    if value == "5": time.sleep(60)
    if value == "6": os.abort()
    return {{"1": 1.0, "2": 0.5, "3": 2.0}}[value]
serve("imported", answer)
"""


@pytest.mark.no_kernels
def test_values_that_hang_crash_or_are_wrong_do_not_end_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub, results = tmp_path / "stub.py", ResultsFile(tmp_path / "out.json")
    stub.write_text(STUB)
    monkeypatch.setattr(tuning, "PATIENCE", 3.0)
    monkeypatch.setattr(tuning, "command_of", lambda *_: [sys.executable, str(stub)])
    rows = tuning.sweep({"knob": [1, 2, 3, 4, 5, 6], "another": [1, 3]}, "stub", 60.0, results)
    assert results.read()["tuning"] == rows
    assert {row["value"]: row["of_usual"] for row in rows if row["knob"] == "knob" and "error" not in row} == {
        1: 1.0,
        2: 0.5,
        3: 2.0,
    }
    errors = {row["value"]: row["error"] for row in rows if "error" in row}
    assert errors == {4: "relative error 0.5", 5: "it hung", 6: "it died of SIGABRT"}
    assert tuning.verdict([row for row in rows if row["knob"] == "knob"]) == "knob: 2 wins, 50.0 % less time than 1"
    assert tuning.verdict([row for row in rows if row["knob"] == "another"]) == "another: 1 stays"


@pytest.mark.no_kernels
def test_the_sweep_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    monkeypatch.setattr(tuning, "command_of", lambda *_: [sys.executable, str(stub)])
    rows = tuning.sweep({"a": [1, 2], "b": [1, 2], "c": [1, 2]}, "stub", 0.0, ResultsFile(tmp_path / "out.json"))
    assert {row["knob"] for row in rows} == {"a"}
    assert {row["turns"] for row in rows} == {tuning.LEAST_TURNS}


@pytest.mark.parametrize("entry", ["crop.turns", "crop.rounds=3", "crop.rounds=x"])
def test_what_the_sweep_refuses(entry: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tuning.main(["--only", entry])
    assert f"--only: '{entry}' is none of divergence.resident_blocks (1, 2, 3, 4), " in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tuning.main(["--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--device", "--seconds", "--output", "--only"))
