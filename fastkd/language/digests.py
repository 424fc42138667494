"""Which model and which tokenizer it was, in a few letters."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn

from fastkd.models.digests import weights_digest

__all__ = ["model_digest", "tokenizer_digest"]

# Where a model lies, who saved it and how it is called: the same model has others after it was copied.
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
# What a call of the tokenizer leaves in its serialized form.
_NOT_OF_THE_TOKENIZER = ("truncation", "padding")


def model_digest(model: nn.Module) -> str:
    """sha256 over the configuration, where it has one, and all weights as they are loaded: hex. Weights are read one tensor
    at a time, on any device."""
    made = hashlib.sha256()
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        said = {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_THE_MODEL}  # type: ignore[union-attr]
        made.update(json.dumps(said, sort_keys=True, default=str).encode())
    made.update(weights_digest(model).encode())
    return made.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 over its serialized form: hex.

    Args:
        tokenizer: of ``transformers``, or ``tokenizers.Tokenizer``. Of a slow one, which has no such form, the vocabulary
            and the special tokens count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        said = json.loads(backend.to_str())
        said = {name: value for name, value in said.items() if name not in _NOT_OF_THE_TOKENIZER}
    elif hasattr(tokenizer, "get_vocab"):
        special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
        said = {"kind": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "special": special}
    else:
        raise TypeError(f"fastkd: tokenizer is {type(tokenizer).__name__}, must be one of transformers or tokenizers")
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
