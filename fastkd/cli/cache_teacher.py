"""``fastkd cache-teacher``: one pass of a language model over a data set."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from fastkd import _checks
from fastkd.cli._errors import UsageError, usage_errors
from fastkd.cli._output import check_writable
from fastkd.cli._progress import passing
from fastkd.cli.distill import check_device
from fastkd.language import TeacherCache, TokenSequences, cache_teacher, open_tokens
from fastkd.language.cache_pass import SHARD_TOKENS
from fastkd.language.pretrained import load_model, load_tokenizer, transformers
from fastkd.language.token_files import check_kind
from fastkd.training import process_group

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class CacheTeacher:
    """Write what a language model predicts over a data set, once, so that students are trained without it.

    At each position the most probable tokens are kept, their log-probabilities, and that of all others together; or tokens
    drawn at random. Killed, the same command goes on where it was; under torchrun the processes share the work.
    fastkd.language.TeacherCache reads it.
    """

    model: str
    """The teacher: a causal language model of transformers, a folder or a name of the Hub."""
    data: Path
    """A text (.txt), JSON lines (.jsonl), a folder that datasets.save_to_disk wrote, or tokens (.npy)."""
    output: Path
    """The folder of the cache."""
    top_k: int | None = None
    """How many of the most probable tokens to keep at each position; 64 by default."""
    sampled: int | None = None
    """Draws at each position, in place of the most probable tokens (Sparse Logit Sampling); for losses with tail="drop"."""
    seed: int = 0
    """Of the draws."""
    temperature: float = 1.0
    """By which logits are divided."""
    sequence_length: int = 1024
    """Tokens of a sequence, at most."""
    packed: bool = True
    """Texts follow one another and are cut into sequences; else each is one, cut off where it is too long."""
    field: str | None = None
    """With the text, or the tokens, of JSON lines and data sets; input_ids or text by default."""
    tokenizer: str | None = None
    """A folder or a name of the Hub, where it is not that of the model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the model; auto is that in which it was saved."""
    log_prob_dtype: Literal["float16", "float32"] = "float16"
    """Of the log-probabilities in the cache."""
    batch_size: int = 8
    """Sequences at once."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens of a file of the cache, about: what is lost at most, for each process, where it is killed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the teacher runs; auto takes CUDA where there is a GPU."""
    config: Path | None = None
    """A TOML or YAML file with any of these options; those of the command line come before them."""

    def __call__(self, console: Console) -> None:
        counts = (("top_k", 1), ("sampled", 1), ("sequence_length", 2), ("batch_size", 1), ("shard_tokens", 1))
        for name, least in counts:
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} is {value}, must be {least} or more")
        if self.top_k is not None and self.sampled is not None:
            raise UsageError("--top-k and --sampled are given, must be one of them")
        with usage_errors():
            _checks.check_positive("temperature", self.temperature)
            check_device(self.device)
            check_kind(self.data)
        check_writable("--output", self.output, self.output / "cache.json")
        with usage_errors(), process_group(None if self.device == "auto" else self.device) as process:
            transformers().utils.logging.disable_progress_bar()  # a bar of our own comes
            tokenizer = load_tokenizer(self.tokenizer or self.model)
            sequences = open_tokens(
                self.data, tokenizer, sequence_length=self.sequence_length, packed=self.packed, field=self.field
            )
            model = load_model(self.model, dtype=DTYPES.get(self.dtype, self.dtype), device=process.device)
            _check_positions(model, sequences)
            begun = time.perf_counter()
            with passing("caching", "tokens", console, shown=process.rank == 0) as tell:
                cache = cache_teacher(
                    model,
                    sequences,
                    self.output,
                    tokenizer=tokenizer,
                    top_k=self.top_k,
                    sampled=self.sampled,
                    seed=self.seed,
                    temperature=self.temperature,
                    log_prob_dtype=DTYPES[self.log_prob_dtype],
                    batch_size=self.batch_size,
                    shard_tokens=self.shard_tokens,
                    notes={"model": self.model, "data": str(self.data), "tokenizer": self.tokenizer or self.model},
                    on_progress=tell,
                )
            if process.rank == 0:
                _report(cache, time.perf_counter() - begun, console)


def _check_positions(model: Any, sequences: TokenSequences) -> None:
    """Whether the model was made for sequences as long as these."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = sequences.longest
    if positions is not None and longest > positions:
        raise UsageError(
            f"the data has a sequence of {longest} tokens, must be at most the model's {positions}: --sequence-length"
        )


def _report(cache: TeacherCache, seconds: float, console: Console) -> None:
    table = Table("sequences", "tokens", "shards", "bytes a token", "size", "seconds", box=None, pad_edge=False)
    table.add_row(
        f"{len(cache):,}",
        f"{cache.num_tokens:,}",
        f"{len(cache.about['shards']):,}",
        f"{cache.nbytes / cache.num_tokens:.1f}",
        _size(cache.nbytes),
        f"{seconds:.1f}",
    )
    console.print(table)
    if cache.sampled:
        said = f"different tokens among {cache.sampled} draws: {cache.tokens_per_position():.1f} on average"
    else:
        said = f"probability outside the top {cache.top_k}: {100 * cache.tail_mass():.2f} % on average"
    console.print(said, highlight=False)
    console.print(f"\ncache  {cache.path}", highlight=False, soft_wrap=True)


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
