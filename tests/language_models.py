"""Tiny models, a tokenizer, texts and measures that the tests of language models share."""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # of processes that have no conftest.py

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 97
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def model(seed: int, hidden: int = 16, kind: str = "llama", **options: Any) -> Any:
    """Two layers, random weights that are not as small as those of a fresh model, so that its logits tell tokens apart."""
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": hidden // 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **options,
    }
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).float()


def tokenizer() -> Any:
    """Made on the spot, of a text that ships with Python."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    made.train_from_iterator(zen(), trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **names)


def zen() -> list[str]:
    """The lines of ``import this``, which that prints: they are encoded there."""
    import codecs

    with open(os.devnull, "w") as nowhere:
        shown, sys.stdout = sys.stdout, nowhere
        try:
            import this
        finally:
            sys.stdout = shown
    return [line for line in codecs.decode(this.s, "rot13").splitlines() if line]


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: each.grad.clone() for name, each in module.named_parameters() if each.grad is not None}


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most of what torch holds at once of what it allocates while this runs, workspaces of operators included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
