"""What the commands refuse: every option by itself, before any file or image is looked at, in one line; nothing is written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkd.__main__ import main
from fastkd.cli.distill import command_for
from fastkd.methods import registry as methods

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

# option and value, what the line must name
COMMON = [
    ("--student resnet7", "student 'resnet7'"),
    ("--student wrn-16-0", "student 'wrn-16-0'"),
    ("--student resnet99999998", "student 'resnet99999998' is unknown"),
    ("--teacher wrn-10-99999", "teacher 'wrn-10-99999' is unknown"),
    ("--teacher resnet27", "teacher 'resnet27'"),
    ("--data cifer10", "data name 'cifer10'"),
    ("--device gpu", "--device"),
    ("--device cuda", "--device cuda"),
    ("--train-size 7", "train_size is 7"),
    ("--train-size -10", "train_size is -10"),
    ("--train-size 10.5", "--train-size"),
    ("--test-size -1", "test_size is -1"),
    ("--shrink 0", "shrink is 0"),
    ("--shrink 33", "shrink is 33"),
    ("--noise none", "--noise"),
    ("--imbalance-ratio 0.5", "imbalance_ratio is 0.5"),
    ("--imbalance-ratio nan", "imbalance_ratio is nan"),
    ("--imbalance-ratio inf", "imbalance_ratio is inf"),
    ("--batch-size 1", "batch_size is 1"),
    ("--batch-size 120 --train-size 100", "batch_size is 120"),
    ("--padding -1", "padding is -1"),
    ("--padding 4000000000", "padding is 4000000000"),
    ("--padding 1000000000", "padding is 1000000000"),
    ("--teacher-epochs -1", "teacher_epochs is -1"),
    ("--teacher-learning-rate -0.1", "teacher_learning_rate is -0.1"),
    ("--teacher-batch-size 1", "teacher_batch_size is 1"),
    ("--teacher-seed -2", "teacher_seed is -2"),
    ("--teacher-seed one", "--teacher-seed"),
    ("--epochs 0", "epochs is 0"),
    ("--epochs 100000000000000000000000", "epochs is 100000000000000000000000, must be 1 or more"),
    ("--teacher-epochs 100000000000000000000000", "teacher_epochs is 100000000000000000000000"),
    ("--epochs many", "--epochs"),
    ("--output=", "--output is empty"),
    ("--data-root=", "--data-root is empty"),
    ("--epochs", "--epochs"),
    ("--optimizer lion", "--optimizer"),
    ("--learning-rate 0", "learning_rate is 0"),
    ("--learning-rate nan", "learning_rate is nan"),
    ("--momentum 1", "momentum is 1"),
    ("--momentum 0", "nesterov is True with momentum 0"),
    ("--weight-decay -1", "weight_decay is -1"),
    ("--schedule linear", "--schedule"),
    ("--milestones 2", "milestones is"),
    ("--milestones 0.5 0.4", "milestones is"),
    ("--schedule step --milestones", "milestones is"),
    ("--schedule step --epochs 10 --warmup-epochs 9", "milestones begin at"),
    ("--schedule step --teacher-epochs 2 --warmup-epochs 3 --epochs 20 --milestones 0.2", "milestones begin at"),
    ("--decay 0", "decay is 0"),
    ("--warmup-epochs 200", "warmup_epochs is 200"),
    ("--amp fp8", "--amp"),
    ("--ema 1", "ema is 1"),
    ("--gradient-clip -1", "gradient_clip is -1"),
    ("--checkpoint-every -1", "checkpoint_every is -1"),
    ("--evaluate-every 0", "evaluate_every is 0"),
    ("--epochz 3", "--epochz"),
    ("more", "more"),
    ("--config nowhere.toml", "--config nowhere.toml"),
]
DISTILL = [
    *COMMON,
    ("--method hintn", "method 'hintn'"),
    ("--method HINTON", "method 'HINTON'"),
    ("--temperature 0", "temperature is 0"),
    ("--temperature nan", "temperature is nan"),
    ("--task-weight -1", "task_weight is -1"),
    ("--kd-weight inf", "kd_weight is inf"),
    ("--method dml --feature-weight 1", "--feature-weight"),
    ("--method baseline --temperature 4", "--temperature"),
    ("--method fsp --teacher wrn-10-2", "FSP needs equal numbers of channels"),
    ("--label-noise 1.5", "label_noise is 1.5"),
    ("--label-noise nan", "label_noise is nan"),
    ("--noise instance", "label_noise is 0.0, must be above 0 with the noise 'instance'"),
    ("--noise file", "label_file is None, must be given with the noise 'file'"),
    ("--label-file nowhere.npy", "noise is 'symmetric', must be 'file' with a label_file"),
    ("--label-key worst", "noise is 'symmetric', must be 'file' with a label_key"),
    ("--noise file --label-file nowhere.npy --label-noise 0.2", "label_noise is 0.2, must be 0 with the noise 'file'"),
    ("--label-file=", "--label-file is empty"),
    ("--imbalance -1", "imbalance is -1"),
    ("--seed -1", "seed is -1"),
    ("--threads -1", "--threads is -1"),
    ("--threads 100000", "--threads is 100000, must be 0"),
    ("--threads 99999999999999999999", "--threads is 99999999999999999999, must be 0"),
    ("--teacher-weights=", "--teacher-weights is empty"),
    ("--pictures-every -1", "pictures_every is -1, must be at least 0"),
    ("--pictures-every often", "--pictures-every"),
]
ZOO = [
    *COMMON,
    ("--methods hintn", "method 'hintn'"),
    ("--methods", "methods is empty"),
    ("--settings noise-0.3", "setting 'noise-0.3'"),
    ("--settings", "settings is empty"),
    ("--seeds 0", "--seeds is 0"),
    ("--seeds 1000000000", "--seeds is 1000000000, must be 1 or more, and at most 100"),
    ("--jobs 0", "--jobs is 0"),
    ("--jobs 99999999999999999999", "--jobs is 99999999999999999999, must be 1 or more"),
    ("--runs=", "--runs is empty"),
    ("--seed 1", "--seed has no effect"),
    ("--label-noise 0.2", "--label-noise has no effect"),
    ("--imbalance 1", "--imbalance has no effect"),
    ("--noise file --label-file nowhere.npy", "--label-file has no effect here"),
    # of those methods that the paper's order has later
    ("--methods baseline hinton --teacher resnet27", "teacher 'resnet27'"),
    ("--methods baseline hintn", "method 'hintn'"),
    ("--settings clean nois-0.2", "setting 'nois-0.2'"),
]
CASES = [*((["distill"], *case) for case in DISTILL), *((["study", "zoo"], *case) for case in ZOO)]
# in the place of files that are looked at later
ELSEWHERE = {
    "no data": ["--data", "cifar10"],
    "data and output that is a file's": ["--data", "digits", "--output", "file/x"],
    "data": ["--data", "digits"],
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a file in it; there is no GPU."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that is said; the status is 2 and nothing was written."""
    before = sorted(Path().rglob("*"))
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = int(ended.code or 0)
    said = capsys.readouterr()
    assert status == 2, said
    assert said.out == ""
    assert said.err.startswith("fastkd ")
    assert said.err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    return said.err


@pytest.mark.parametrize("method", methods.names())
def test_every_method_has_a_command(method: str) -> None:
    """With options of its own, none of which is called as one of the command's."""
    command_for(["--method", method])


@pytest.mark.parametrize("where", ELSEWHERE)
@pytest.mark.parametrize(("command", "wrong", "named"), CASES, ids=[f"{c[-1]} {wrong}" for c, wrong, _ in CASES])
def test_a_wrong_option_is_named_first(
    command: list[str], wrong: str, named: str, where: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is missing, too. The wrong option stands last, or it would be the one that counts less."""
    said = refused([*command, *ELSEWHERE[where], *wrong.split()], capsys)
    assert named in said
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("command", [["distill"], ["study", "zoo"]], ids=lambda command: command[-1])
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (
            "--data cifar10 --train-size 50010",
            "train_size is 50010, must be a multiple of the 10 classes and at most 50000",
        ),
        ("--data cifar100 --train-size 110", "train_size is 110, must be a multiple of the 100 classes"),
        (
            "--data mnist --train-size 54220",
            "train_size is 54220, must be a multiple of the 10 classes and at most 54210",
        ),
        ("--data kmnist --test-size 10001", "test_size is 10001, must be at most the 10000 test images"),
        ("--data mnist --shrink 29", "shrink is 29, must be at most the side of the images, 28"),
        ("--data quickdraw --shrink 29", "shrink is 29"),
        ("--data cifar10 --batch-size 50001", "batch_size is 50001, must be at most the 50000 images"),
        ("--data fashion-mnist --batch-size 60001", "batch_size is 60001"),
    ],
)
def test_sizes_of_a_set_are_known_without_it(
    command: list[str], wrong: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused([*command, *wrong.split()], capsys)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("--padding 2", "padding is 2, must be 0 for scenes, where each pixel has a class"),
        ("--label-noise 0.2", "label_noise is 0.2, must be 0.0 for scenes"),
        ("--train-size 4001", "train_size is 4001, must be at most the 4000 training images"),
        ("--method ood-kd --collection nowhere --iqpr 5", "iqpr is 5.0, must be 1.0 for scenes"),
        ("--student resnet8", "student 'resnet8' is a classifier, must be a dense network"),
        (
            "--method dafl",
            "activation is asked of a Segmenter whose logits come out of no linear layer, must be 0 for it",
        ),
    ],
)
def test_what_a_class_for_each_pixel_rules_out(wrong: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    """None of the images are made, and no collection is looked for."""
    command = ["distill", "--data", "scenes", "--teacher", "segmenter-4-4", "--student", "segmenter-4-4"]
    assert named in refused([*command, *wrong.split()], capsys)


@pytest.mark.parametrize("command", [["distill"], ["study", "zoo"]], ids=lambda command: command[-1])
@pytest.mark.parametrize("name", ["cifar10", "CIFAR10", "cifar100", "mnist", "fashion-mnist", "kmnist", "quickdraw"])
def test_data_that_is_not_there_is_all_that_is_wrong(
    command: list[str], name: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused([*command, "--data", name, "--output", "made/here"], capsys)
    assert "is not there, looked for" in said
    assert str(home) in said


@pytest.mark.parametrize("content", [None, b"no weights", "other"], ids=["none", "damaged", "of another network"])
@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_weights_are_looked_at_before_the_images(
    content: bytes | str | None, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = Path("weights.pt")
    if content == "other":
        torch.save({"layer": torch.zeros(1)}, weights)
    elif isinstance(content, bytes):
        weights.write_bytes(content)
    said = refused(["distill", "--data", data, "--teacher-weights", "weights.pt"], capsys)
    assert "weights weights.pt" in said
    # and what is wrong among the options before the weights
    said = refused(["distill", "--data", data, "--teacher-weights", "weights.pt", "--method", "hintn"], capsys)
    assert "method 'hintn'" in said


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "there is no label file labels.csv"),
        ("1\n2\n", "labels.csv has 2 labels"),
        ("1\nx\n", "labels.csv has 'x'"),
    ],
)
def test_label_files_are_looked_at_before_the_images(
    content: str | None, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        Path("labels.csv").write_text(content)
    command = ["distill", "--data", "cifar10", "--noise", "file", "--label-file", "labels.csv"]
    assert named in refused(command, capsys)
    assert "method 'hintn'" in refused([*command, "--method", "hintn"], capsys)


@pytest.mark.parametrize("data", ["digits", "cifar10"])
@pytest.mark.parametrize("output", ["file", "file/x", "file/x/y", "/proc/nowhere/x"])
@pytest.mark.parametrize("command", [["distill"], ["study", "zoo"]], ids=lambda command: command[-1])
def test_folders_are_tried_before_the_images(
    command: list[str], output: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"--output {output} cannot be written" in refused([*command, "--data", data, "--output", output], capsys)
    if command[-1] == "zoo":
        assert f"--runs {output} cannot be written" in refused([*command, "--data", data, "--runs", output], capsys)


def test_old_results_do_not_hide_a_wrong_name(capsys: pytest.CaptureFixture[str]) -> None:
    Path("made").mkdir()
    Path("made/result.json").write_text('{"digest": "of others", "test_accuracy": 0.5, "teacher_accuracy": null}')
    arguments = ["distill", "--data", "digits", "--output", "made"]
    assert "student 'resnet7'" in refused([*arguments, "--student", "resnet7"], capsys)
    assert "is of other settings" in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("demo --iqpr 0.5", "--iqpr is 0.5"),
        ("demo --iqpr five", "--iqpr"),
        ("demo --iqpr", "--iqpr"),
        ("demo --steps 0", "--steps is 0"),
        ("demo --seed -1", "--seed is -1"),
        ("demo --device tpu", "--device"),
        ("demo --device cuda", "--device cuda"),
        ("demo --output x.pdf", "--output is x.pdf"),
        ("demo --output x.pdf --repeats 0", "--repeats is 0"),
        ("demo --output made/x.pdf", "--output is made/x.pdf"),
        ("demo --output file/x", "--output file/x"),
        ("demo --output file/x --device cuda", "--device cuda"),
        ("demo --output file/x --temperature 0", "--temperature is 0"),
        ("demo --stpes 3", "--steps"),
        ("bench nothing", "'nothing'"),
        ("bench --match (", "--match is '(', must be an expression as pytest's -k takes"),
        ("bench -k and", "--match is 'and'"),
        ("bench --show=", "--show is empty"),
        ("demo --output=", "--output is empty"),
        ("bench --device tpu", "--device is 'tpu'"),
        ("bench --device cuda", "--device cuda"),
        ("bench --seconds -1", "--seconds is -1"),
        ("bench --seconds nan", "--seconds is nan"),
        ("bench --seconds soon", "--seconds"),
        ("bench --tolerance 0", "--tolerance is 0"),
        ("bench --output made/x.txt", "--output is made/x.txt"),
        ("bench --output file/x.json", "--output file/x.json"),
        ("bench --output file/x.json --seconds -1", "--seconds is -1"),
        ("bench --compare nowhere.json", "--compare nowhere.json"),
        ("bench --compare nowhere.json --seconds -1", "--seconds is -1"),
        ("bench --show nowhere.json", "--show nowhere.json"),
        ("bench --show nowhere.json --match KL", "--show shows all of a file"),
        ("bench --tolerence 1", "--tolerance"),
        ("detect-noise", "--values"),
        ("detect-noise --values x.npy", "--labels"),
        ("detect-noise --values x.npy --labels y.npy --rule confidnt", "--rule"),
        ("detect-noise --values x.npy --labels y.npy --kind loss", "--kind"),
        ("detect-noise --values x.npy --labels y.npy --threshold 1.5", "threshold is 1.5"),
        ("detect-noise --values x.npy --labels y.npy --threshold nan", "threshold is nan"),
        (
            "detect-noise --values x.npy --labels y.npy --rule confident --threshold 0.5",
            "threshold is 0.5, must be None",
        ),
        ("detect-noise --values x.npy --labels y.npy --rule confident --by-class", "by_class is True"),
        ("detect-noise --values x.npy --labels y.npy --kind losses --rule confident", "rule is 'confident'"),
        ("detect-noise --values x.csv --labels y.npy --output file/x", "--values is x.csv"),
        ("detect-noise --values x.npy --labels y.pkl --output file/x", "--labels is y.pkl"),
        ("detect-noise --values x.npy --labels y.npy --output=", "--output is empty"),
        ("detect-noise --values x.npy --labels y.npy --output file/x", "--output file/x cannot be written"),
        ("detect-noise --values x.npy --labels y.npy", "--values x.npy cannot be read"),
        ("cache-teacher", "--model"),
        ("cache-teacher --model x", "--data"),
        ("cache-teacher --model x --data file --output y --top-k 0", "--top-k is 0, must be 1 or more"),
        ("cache-teacher --model x --data file --output y --top-k many", "--top-k"),
        ("cache-teacher --model x --data file --output y --sampled 0", "--sampled is 0, must be 1 or more"),
        (
            "cache-teacher --model x --data file --output y --sampled 50 --top-k 64",
            "--top-k and --sampled are given, must be one of them",
        ),
        ("cache-teacher --model x --data file --output y --temperature 0", "temperature is 0"),
        ("cache-teacher --model x --data file --output y --temperature nan", "temperature is nan"),
        ("cache-teacher --model x --data file --output y --sequence-length 1", "--sequence-length is 1, must be 2"),
        ("cache-teacher --model x --data file --output y --batch-size 0", "--batch-size is 0"),
        ("cache-teacher --model x --data file --output y --shard-tokens 0", "--shard-tokens is 0"),
        ("cache-teacher --model x --data file --output y --dtype fp8", "--dtype"),
        ("cache-teacher --model x --data file --output y --log-prob-dtype bfloat16", "--log-prob-dtype"),
        ("cache-teacher --model x --data file --output y --device cuda", "--device cuda"),
        ("cache-teacher --model x --data file --output=", "--output is empty"),
        ("cache-teacher --model x --data nowhere.txt --output file/x", "there is no nowhere.txt"),
        (
            "cache-teacher --model x --data file --output file/x",
            "file is unknown, must be .txt, .jsonl, .npy or a folder",
        ),
        ("cache-teacher --model x --data . --output file", "--output file cannot be written"),
        ("cache-teacher --model x --data . --output file/x", "--output file/x cannot be written"),
        ("info --all", "--all"),
        ("info more", "more"),
        ("study zoology", "zoology"),
        ("dmo", "dmo"),
        ("--verbose", "--verbose"),
    ],
)
def test_of_the_other_commands(arguments: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in refused(arguments.split(), capsys)


@pytest.mark.parametrize(
    ("arguments", "encoding", "said"),
    [
        ("distill --epochs 0", "ascii", "epochs is 0, must be 1 or more, and at most 1000000000"),
        (
            "distill --epochs ten",
            "ascii",
            "--epochs: invalid literal for int() with base 10: 'ten'; must be --epochs INT",
        ),
        ("distill --epochz 3", "ascii", "unrecognized options: --epochz, 3; perhaps you meant: --epochs INT"),
        ("distill --epochz 3", "utf-8", "unrecognized options: --epochz, 3; perhaps you meant: --epochs INT"),
        ("distill --epochz 3", "latin-1", "unrecognized options: --epochz, 3; perhaps you meant: --epochs INT"),
        ("info more", "ascii", "unrecognized options: more"),
    ],
)
def test_whatever_letters_the_terminal_has(arguments: str, encoding: str, said: str) -> None:
    """tyro draws its frames in other letters there."""
    command = [sys.executable, "-m", "fastkd", *arguments.split()]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.decode(encoding) == f"fastkd {arguments.split()[0]}: {said}\n"


@pytest.mark.parametrize("wrong", ["--seconds -1", "--device tpu", "--tolerance 0", "--output made/x.txt"])
def test_bench_looks_at_its_options_before_it_looks_for_its_packages(
    wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    assert f"{wrong.split()[0]} is" in refused(["bench", *wrong.split()], capsys)


@pytest.mark.parametrize("name", ["output", "runs", "config"])
def test_empty_values(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As a shell makes them of a variable that is not set: not the working directory."""
    said = refused(["study", "zoo", "--data", "digits", f"--{name}", ""], capsys)
    assert f"--{name} is" in said
    Path("empty.toml").write_text(f'data = "digits"\n{name} = ""\n')
    assert name in refused(["study", "zoo", "--config", "empty.toml"], capsys)


@pytest.mark.parametrize("name", ["config", "help"])
def test_what_no_file_can_say(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.toml").write_text("epochs = 1\n")
    Path("options.toml").write_text(f'{name} = "x.toml"\n')
    said = refused(["distill", "--data", "digits", "--config", "options.toml"], capsys)
    assert f"--config options.toml: unrecognized options: {name}" in said


def test_a_network_that_memory_does_not_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def create(*_: object, **__: object) -> None:
        raise RuntimeError("can't allocate memory: you tried to allocate 9 bytes\nmore")

    monkeypatch.setattr("fastkd.models.registry.create", create)
    said = refused(["distill", "--data", "digits", "--student", "wrn-10-900"], capsys)
    assert "student 'wrn-10-900' cannot be made: can't allocate memory" in said


def test_language_models_need_their_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    Path("x.txt").write_text("text")
    said = refused(["cache-teacher", "--model", "x", "--data", "x.txt", "--output", "y", "--device", "cpu"], capsys)
    assert said == 'fastkd cache-teacher: language models need transformers: pip install "fastkd[language]"\n'


def test_bench_leaves_no_folder_of_its_tools(capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    assert main(["bench", "gmm", "--match", "zzzz", "--output", "x.json"]) == 2
    assert "nothing was measured" in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before


def test_what_is_made_where_all_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders that are not there yet, several deep."""
    options = "--data digits --train-size 20 --test-size 10 --batch-size 10 --teacher resnet8 --epochs 1 --method at"
    assert main(["distill", *options.split(), "--output", "made/there/deep", "--device", "cpu"]) == 0
    assert (tmp_path / "made" / "there" / "deep" / "result.json").is_file()
    shutil.rmtree(tmp_path / "made")
    assert main(["demo", "--quick", "--steps", "10", "--teacher-steps", "10", "--output", "made/there/x.png"]) == 0
    assert (tmp_path / "made" / "there" / "x.json").is_file()
    capsys.readouterr()
