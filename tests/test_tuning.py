"""Numbers of launches that FASTKD_TUNING sets: what is refused, and that every value gives right results."""

from __future__ import annotations

import os
import subprocess
import sys

import emulated
import pytest
import torch
from cuda_cases import DETERMINED, Case, _collection, _crop, _draw_batch_of, _images
from cuda_truth import check
from test_divergence_geometry import plan

from fastkd import _C

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
}


def _of_environment(settings: str) -> subprocess.CompletedProcess[str]:
    code = "import fastkd; print({name: value for name, (value, *_) in fastkd._C.tuning().items()})"
    environment = {**os.environ, "FASTKD_TUNING": settings}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


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


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, value in VALUES if "rounds" in name])
def test_rounds_of_many_vectors(name: str, value: int) -> None:
    with emulated.tuned(f"{name}={value}"):
        check(MANY[name.partition(".")[0]], torch.device("cpu"), lambda: emulated.emulated(0))
