"""Cached teachers of transformers, by the command and from Python. Without transformers the tests say so and are left out."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_cases import INF, wait_for
from torch.utils.data import DataLoader
from training_processes import start_ranks

import fastkd.functional
from fastkd.__main__ import main
from fastkd.language import CacheCollator, TeacherCache, cache_teacher, open_tokens, tokenizer_digest

NEEDED = 'is not installed: pip install "fastkd[language]"'
transformers = pytest.importorskip("transformers", reason=f"transformers {NEEDED}")
pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

GUIDE = Path(__file__).parents[2] / "docs" / "language-models.md"
VOCABULARY = 300


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """What Python's help says of its language."""
    from pydoc_data.topics import topics

    return [" ".join(text.split()[:60]) for text in list(topics.values())[:40]]


def train_tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<end>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>")


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> Any:
    return train_tokenizer(texts)


def make_model(seed: int = 0, size: int = VOCABULARY) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], tokenizer: Any, model: Any) -> Path:
    """The working directory, with a model and a tokenizer in it, and texts."""
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("teacher")
    tokenizer.save_pretrained("teacher")
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    Path("text.txt").write_text("\n".join(texts))
    return tmp_path


def command(*options: str, data: str = "texts.jsonl", output: str = "cache") -> list[str]:
    return [
        *("cache-teacher", "--model", "./teacher", "--data", data, "--output", output, "--device", "cpu"),
        *("--top-k", "8", "--sequence-length", "32", "--shard-tokens", "500", *options),
    ]


def content(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("shard-*"))}


def test_the_cache_is_what_the_model_says(
    folder: Path, texts: list[str], tokenizer: Any, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sequences of different lengths side by side, padded, have the logits that they have alone."""
    assert main(command("--no-packed", "--log-prob-dtype", "float32")) == 0
    shown = capsys.readouterr().out
    assert "bytes a token" in shown
    assert "probability outside the top 8: " in shown
    cache = TeacherCache("cache", tokenizer=tokenizer, data="texts.jsonl", model=model)
    cache.verify()
    assert len(cache) == len(texts)
    assert cache.about["notes"] == {"model": "./teacher", "data": "texts.jsonl", "tokenizer": "./teacher"}
    assert (cache.vocab_size, cache.about["model_dtype"], cache.about["packed"]) == (VOCABULARY, "float32", False)
    for index, text in enumerate(texts):
        item = cache[index]
        ids = tokenizer(text)["input_ids"][:32]
        assert item["input_ids"].tolist() == ids
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        there = item["teacher_indices"].long()
        torch.testing.assert_close(item["teacher_log_probs"].double(), expected.gather(-1, there), rtol=0, atol=1e-5)
        assert (expected.topk(8).values[:, -1] - expected.gather(-1, there)[:, -1]).abs().max() < 1e-5
        rest = expected.scatter(-1, there, -INF).logsumexp(-1)
        torch.testing.assert_close(item["teacher_tail_log_prob"].double(), rest, rtol=0, atol=1e-5)


def test_draws_by_the_command(folder: Path, tokenizer: Any, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = [option for option in command("--sampled", "20", "--seed", "3") if option not in ("--top-k", "8")]
    assert main(options) == 0
    assert re.search(r"different tokens among 20 draws: 1?\d\.\d on average", capsys.readouterr().out)
    cache = TeacherCache("cache", tokenizer=tokenizer, data="texts.jsonl", model=model)
    assert (cache.sampled, cache.about["seed"], cache.tail) == (20, 3, "drop")
    assert main([*options, "--seed", "4"]) == 2
    assert "cache holds a cache with seed 3, given is 4; choose another folder" in capsys.readouterr().err
    assert main(command()) == 2
    assert "cache holds a cache with targets sampled, given is top_k" in capsys.readouterr().err


def test_other_tools_read_the_shards(folder: Path, tokenizer: Any, model: Any) -> None:
    safetensors = pytest.importorskip("safetensors.numpy", reason=f"safetensors {NEEDED}")
    cache_teacher(model, open_tokens("text.txt", tokenizer), "cache", tokenizer=tokenizer, top_k=8)
    cache = TeacherCache("cache")
    found = safetensors.load_file("cache/shard-00000.safetensors")
    assert {name: str(array.dtype) for name, array in found.items()} == {
        "offsets": "int64",
        "input_ids": "int32",
        "teacher_tail_log_prob": "float32",
        "teacher_indices": "int32",
        "teacher_log_probs": "float16",
    }
    assert np.array_equal(found["teacher_indices"][: len(cache[0]["input_ids"])], cache[0]["teacher_indices"])
    assert cache.nbytes / cache.num_tokens == pytest.approx(8 * 6 + 8, rel=0.1)


def test_all_kinds_of_data_give_the_same(folder: Path, texts: list[str], tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets", reason=f"datasets {NEEDED}")
    end = tokenizer.eos_token_id
    ids = [[*ids, end] for ids in tokenizer(texts)["input_ids"]]
    stream = [token for row in ids for token in row]
    np.save("stream.npy", np.array(stream, np.uint16))
    datasets.Dataset.from_dict({"text": texts}).save_to_disk("texts")
    datasets.Dataset.from_dict({"tokens": [stream[i : i + 32] for i in range(0, len(stream), 32)]}).save_to_disk("ids")
    options = {"tokenizer": tokenizer, "sequence_length": 32}
    first = open_tokens("texts.jsonl", **options)
    assert first[0].input_ids.tolist() == stream[:32]
    for name, more in (("texts", {}), ("ids", {"field": "tokens"}), ("stream.npy", {})):
        assert open_tokens(name, **options, **more).digest() == first.digest(), name
    datasets.DatasetDict({"train": datasets.load_from_disk("texts")}).save_to_disk("splits")
    with pytest.raises(ValueError, match="splits holds train, must be one of them, splits/train"):
        open_tokens("splits", tokenizer)
    with pytest.raises(ValueError, match=r"teacher is no folder that datasets.save_to_disk wrote"):
        open_tokens("teacher", tokenizer)


def test_the_digest_of_a_tokenizer(texts: list[str], tokenizer: Any, folder: Path) -> None:
    before = tokenizer_digest(tokenizer)
    tokenizer(texts, truncation=True, max_length=3, padding=True)  # which it remembers
    assert tokenizer_digest(tokenizer) == before
    assert tokenizer_digest(tokenizer.backend_tokenizer) == before
    assert tokenizer_digest(transformers.AutoTokenizer.from_pretrained("./teacher")) == before
    assert tokenizer_digest(train_tokenizer(texts[:20])) != before


@pytest.mark.forks
def test_killed_the_command_goes_on_in_two_processes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(output="whole")) == 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    slow = command("--batch-size", "1")
    process = subprocess.Popen([sys.executable, "-m", "fastkd", *slow], env=environment, stdout=subprocess.DEVNULL)
    try:
        assert wait_for(Path("cache/shard-00001.safetensors"))
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    there = content("cache")
    assert 2 <= len(there) < len(content("whole"))
    capsys.readouterr()
    # other options are refused, and nothing is changed
    assert main(command("--temperature", "2")) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "fastkd cache-teacher: cache holds a cache with temperature 1.0, given is 2.0; choose another"
    )
    assert content("cache") == there
    start_ranks(run_in_rank, command())
    made = content("cache")
    assert {name: made[name] for name in there} == there  # as they were
    cache, whole = TeacherCache("cache"), TeacherCache("whole")
    cache.verify()
    assert len(cache) == len(whole)
    for index in range(len(whole)):  # batches of another size round otherwise
        for name, value in whole[index].items():
            if name != "teacher_indices":
                torch.testing.assert_close(cache[index][name], value, rtol=1e-2, atol=1e-2)


def run_in_rank(rank: int, arguments: list[str]) -> None:
    assert main(arguments) == 0


def test_one_line_for_what_is_wrong(folder: Path, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def refused(arguments: list[str]) -> str:
        assert main(arguments) == 2, capsys.readouterr()
        said = capsys.readouterr().err
        assert said.startswith("fastkd cache-teacher: ")
        assert said.count("\n") == 1, said
        return said

    assert "top_k is 301, must be at most the 300 tokens of the vocabulary" in refused(command("--top-k", "301"))
    config = transformers.AutoConfig.from_pretrained("./teacher")
    config.max_position_embeddings = 31
    config.save_pretrained("./teacher")
    assert "the data has a sequence of 32 tokens, must be at most the model's 31: --seq" in refused(command())
    config.max_position_embeddings = 2048
    config.save_pretrained("./teacher")
    Path("empty.jsonl").touch()
    assert "empty.jsonl is empty" in refused(command(data="empty.jsonl"))
    assert "model ./nowhere is not there" in refused([*command(), "--model", "./nowhere", "--tokenizer", "./teacher"])
    Path("hollow").mkdir()
    assert "model hollow cannot be loaded: " in refused([*command(), "--model", "hollow", "--tokenizer", "./teacher"])
    assert "tokenizer hollow cannot be loaded: " in refused([*command(), "--tokenizer", "hollow"])
    make_model(size=280).save_pretrained("small")
    said = refused([*command(), "--model", "./small", "--tokenizer", "./teacher"])
    assert re.search(r"token \d+ of sequence \d+ is none of the model's, must be in \[0, 280\)", said)
    broken = make_model()
    with torch.no_grad():
        broken.lm_head.weight[7] = torch.nan
    broken.save_pretrained("broken")
    said = refused([*command(output="b"), "--model", "./broken", "--tokenizer", "./teacher"])
    assert "the teacher's logits at position 0 of sequence " in said
    assert not Path("cache").exists()

    assert main(command()) == 0
    train_tokenizer(texts[:20]).save_pretrained("other")
    assert "cache holds a cache of another tokenizer: its digest is " in refused([*command(), "--tokenizer", "other"])
    assert "cache holds a cache of other data: its digest is " in refused(command(data="text.txt"))
    make_model(1).save_pretrained("teacher")
    assert "cache holds a cache of another model: its digest is " in refused(command())


def test_the_loop_of_the_guide(folder: Path, tokenizer: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(fastkd.functional, "sparse_kl_div"):
        pytest.skip("this fastkd has no sparse_kl_div, which the loop of the guide calls")
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text().split("## Cached teachers")[1], re.DOTALL)
    cache_teacher(
        model, open_tokens("texts.jsonl", tokenizer, sequence_length=32), "cache", tokenizer=tokenizer, top_k=8
    )
    student = make_model(3)
    names = {
        "DataLoader": DataLoader,
        "tokenizer": tokenizer,
        "teacher": model,
        "student": student,
        "optimizer": torch.optim.Adam(student.parameters(), 0.01),
    }
    before = student.lm_head.weight.detach().clone()
    exec(compile(blocks[1], "docs/language-models.md", "exec"), names)
    assert len(TeacherCache("small-cache")) == 2
    exec(compile(blocks[0], "docs/language-models.md", "exec"), names)
    assert not torch.equal(student.lm_head.weight, before)
    shutil.rmtree("cache")  # the same loop takes draws
    data = open_tokens("texts.jsonl", tokenizer, sequence_length=32)
    cache_teacher(model, data, "cache", tokenizer=tokenizer, sampled=8)
    before = student.lm_head.weight.detach().clone()
    exec(compile(blocks[0], "docs/language-models.md", "exec"), names)
    assert not torch.equal(student.lm_head.weight, before)


def test_the_collator_fits_the_model(tokenizer: Any, model: Any, tmp_path: Path) -> None:
    """``labels`` are what models of transformers shift, ``target`` what they compare with then."""
    cache = cache_teacher(model, [[5, 3, 8, 2], [2, 9]], tmp_path / "cache", tokenizer=tokenizer, top_k=16)
    batch = CacheCollator(tokenizer.pad_token_id)([cache[0], cache[1]])
    with torch.no_grad():
        result = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    ours = torch.nn.functional.cross_entropy(result.logits.flatten(0, 1), batch["target"].flatten())
    torch.testing.assert_close(result.loss, ours)
