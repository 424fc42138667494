"""The command line, end to end on real data at a small scale, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd import build_info
from fastkd.__main__ import main
from fastkd._library import OPERATORS
from fastkd.cli import demo
from fastkd.studies.demo import experiment, timing

pytestmark = pytest.mark.no_kernels

SMALL = ["--steps", "60", "--teacher-steps", "100", "--collection-size", "1500", "--repeats", "2"]


def run_demo(folder: Path, *options: str) -> dict[str, Any]:
    assert main(["demo", *SMALL, "--device", "cpu", "--output", str(folder), *options]) == 0
    return json.loads((folder / "fastkd-demo.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("demo") / "made"
    return folder, run_demo(folder, "--seed", "3")


def test_figure_and_numbers_come_out(first: tuple[Path, dict[str, Any]]) -> None:
    folder, numbers = first
    picture = imread(folder / "fastkd-demo.png")
    assert picture.shape[0] > 700
    assert picture.shape[1] > 1200
    assert len(set(map(tuple, picture.reshape(-1, picture.shape[2])[::97].tolist()))) > 50
    assert numbers["teacher"]["test_accuracy"] > 0.8
    assert numbers["settings"]["steps"] == numbers["curve_steps"][-1] == 60
    labelled, biased, uniform = numbers["students"]
    assert labelled["name"] == "labelled digits"
    assert "iqpr" not in labelled
    assert [biased["iqpr"], uniform["iqpr"]] == [5.0, 1.0]
    for student in numbers["students"]:
        assert len(student["curves"]) == len(student["agreement_with_teacher"]) == 2
        assert [curve[-1] for curve in student["curves"]] == student["test_accuracy"]
    assert min(labelled["test_accuracy"]) > 0.3  # 0.1 by chance


def test_draws_have_the_statistics_of_their_distribution(first: tuple[Path, dict[str, Any]]) -> None:
    _, biased, uniform = first[1]["students"]
    assert biased["inverse_temperature"] > 0
    assert uniform["inverse_temperature"] == 0
    for student in (biased, uniform):
        for skipped in student["skip_ratio"]:
            assert skipped == pytest.approx(student["expected_skip_ratio"], abs=0.02)
    for share in uniform["relevant_draws"]:
        assert share == pytest.approx(0.16, abs=0.03)  # 7,680 draws: a standard deviation is 0.004
    assert min(biased["relevant_draws"]) > 2 * max(uniform["relevant_draws"])
    assert max(biased["uniformity"]) < min(uniform["uniformity"])
    assert max(biased["irrelevant_proportion"]) < min(uniform["irrelevant_proportion"])


def test_same_seed_same_numbers_and_nothing_global_changes(
    first: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.rand(5)
    moved = torch.get_rng_state()
    again = run_demo(tmp_path, "--seed", "3")
    assert torch.equal(torch.get_rng_state(), moved)
    assert torch.get_num_threads() == threads
    torch.set_rng_state(state)
    assert {**first[1], "timing": None} == {**again, "timing": None}
    said = capsys.readouterr().out
    accuracy = 100 * sum(again["students"][1]["test_accuracy"]) / 2
    for line in (f"{accuracy:.1f} ±", "IQPR 5", "skip ratio", "uniformity", "irrelevant", "fastkd-demo.json"):
        assert line in said
    assert all(len(line) <= 80 for line in said.splitlines() if "fastkd-demo." not in line)


def test_another_seed_and_no_bias(first: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    figure = tmp_path / "mine.png"
    assert main(["demo", "--quick", "--seed", "4", "--iqpr", "1", "--device", "cpu", "--output", str(figure)]) == 0
    numbers = json.loads(figure.with_suffix(".json").read_text())
    assert figure.stat().st_size > 10_000
    assert numbers["settings"]["repeats"] == 1
    assert numbers["teacher"] != first[1]["teacher"]
    _, biased, uniform = numbers["students"]
    assert biased["inverse_temperature"] == uniform["inverse_temperature"] == 0
    assert biased["expected_skip_ratio"] == uniform["expected_skip_ratio"]


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        pytest.fail("training started")

    monkeypatch.setattr(experiment, "run", run)


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    try:
        status = main(arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    return status, said.out + said.err


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--iqpr", "0.5"], "--iqpr is 0.5, must be 1 (uniform draws) or more"),
        (["--iqpr", "nan"], "--iqpr is nan"),
        (["--iqpr", "inf"], "--iqpr is inf"),
        (["--iqpr", "five"], "--iqpr"),
        (["--steps", "0"], "--steps is 0, must be 1 or more"),
        (["--seed", "-1"], "--seed is -1, must be 0 or more"),
        (["--batch-size", "1"], "--batch-size is 1, must be 2 or more"),
        (["--collection-size", "99"], "--collection-size is 99"),
        (["--relevant-share", "1"], "--relevant-share is 1.0"),
        (["--temperature", "0"], "--temperature is 0.0, must be above 0"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--teacher-steps", "0"], "--teacher-steps is 0"),
        (["--device", "tpu"], "tpu"),
        (["--stpes", "5"], "--steps"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = fails(["demo", *options], capsys)
    assert status == 2
    assert message in said


@pytest.mark.usefixtures("no_training")
def test_output_is_tried_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for output in (tmp_path / "file" / "sub", tmp_path / "file" / "x.png", tmp_path / "folder.png"):
        status, said = fails(["demo", "--output", str(output)], capsys)
        assert status == 2
        assert f"--output {output} cannot be written" in said
        assert said.count("\n") == 1


@pytest.mark.usefixtures("no_training")
def test_cuda_is_refused_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, said = fails(["demo", "--device", "cuda"], capsys)
    assert status == 2
    assert "--device cuda cannot be used: torch finds no CUDA device; take --device cpu" in said


def test_operators_run_where_their_kernels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(demo, "build_info", dict)
    monkeypatch.setattr(demo, "CUDA_OPERATORS", [name for name in OPERATORS if name != "divergence"])
    assert demo._choose_devices("auto") == (cpu, cpu)
    assert demo._choose_devices("cuda") == (cuda, cpu)
    assert demo._why_no_kernels() == "this version has no CUDA kernel for divergence"
    monkeypatch.setattr(demo, "CUDA_OPERATORS", OPERATORS)
    assert demo._choose_devices("auto") == demo._choose_devices("cuda") == (cuda, cuda)
    assert demo._choose_devices("cpu") == (cpu, cpu)
    monkeypatch.setattr(demo, "build_info", lambda: {"cuda_why_not": "fastkd was built without CUDA kernels"})
    assert demo._choose_devices("cuda") == (cuda, cpu)
    assert demo._why_no_kernels() == "fastkd was built without CUDA kernels"


def test_cuda_operators_asked_for_are_those_called() -> None:
    called = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "fastkd":
                called.add(func._schema.name.removeprefix("fastkd::"))
            return func(*args, **(kwargs or {}))

    @contextmanager
    def silent(_phase: str, _steps: int, /) -> Iterator[Callable[[], None]]:
        yield lambda: None

    with Recorder():
        cpu = torch.device("cpu")
        settings = experiment.Settings(steps=2, teacher_steps=2, collection_size=100, repeats=1)
        experiment.run(settings, experiment.Devices(cpu, cpu), silent)
    assert called == set(demo.OPERATORS_CALLED)


def test_unknown_command_help_and_info(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = fails(["dmo"], capsys)
    assert status == 2
    assert "demo, distill, score, detect-noise, cache-teacher, methods, study, bench, info" in said
    for arguments, words in (
        ([], ["demo", "distill", "methods", "study", "info"]),
        (["--help"], ["demo", "distill", "methods", "study", "info"]),
        (["demo", "--help"], ["--iqpr", "--seed", "--output", "default: 5.0"]),
    ):
        status, said = fails(arguments, capsys)
        assert status == 0
        assert all(word in said for word in words)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastkd {build_info()['version']}\n"
    status, said = fails(["demo", "--output", "x.pdf"], capsys)
    assert status == 2
    assert "--output is x.pdf, must be a name that ends in .png" in said
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert build_info()["version"] in said
    assert build_info()["cpu_instruction_set"] in said


def test_missing_extra_says_what_to_install() -> None:
    hide = "import sys; sys.modules['tyro'] = None; from fastkd.__main__ import main; sys.exit(main(['info']))"
    result = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == 'fastkd: the command line needs tyro: pip install "fastkd[cli]"\n'


@pytest.mark.parametrize("arguments", [["info"], ["study", "zoo", "--help"]])
def test_a_reader_that_has_enough(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "fastkd", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()  # before anything is written
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode in (1, 141)  # rich ends by 1 itself


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: list[str]) -> int:
        raise BrokenPipeError(32, "Broken pipe")  # of a process of a pool

    monkeypatch.setattr("fastkd.cli.run", broken)
    with pytest.raises(BrokenPipeError):
        main(["info"])


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastkd", "demo", "--device", "cpu", "--teacher-steps", "1000000"]
    with subprocess.Popen(
        [*command, "--output", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # `make test &` and nohup have it ignored
    ) as process:
        try:
            assert process.stdout is not None
            assert "fastkd demo" in process.stdout.readline()  # the panel is up: options are read, training is next
            process.send_signal(signal.SIGINT)
            _, complaints = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert complaints == "fastkd: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_interleaved_medians_count_and_order() -> None:
    calls: list[str] = []
    medians = timing.interleaved_medians([lambda: calls.append("a"), lambda: calls.append("b")], rounds=3, calls=2)
    assert "".join(calls) == "aabb" * 5
    assert len(medians) == 2
    assert min(medians) > 0
