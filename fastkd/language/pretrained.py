"""Models and tokenizers of transformers, which is imported where one is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

__all__ = ["load_model", "load_tokenizer", "transformers"]


def transformers() -> Any:
    """The package.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ModuleNotFoundError('fastkd: language models need transformers: pip install "fastkd[language]"') from None


def load_model(name: str, *, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu") -> Any:
    """A causal language model in eval mode: a folder, or a name of the Hub.

    Raises:
        ValueError: it cannot be loaded.
    """
    kind = transformers().AutoModelForCausalLM
    return _load("model", name, lambda: kind.from_pretrained(name, dtype=dtype).to(device).eval())


def load_tokenizer(name: str) -> Any:
    """The same of tokenizers."""
    kind = transformers().AutoTokenizer
    return _load("tokenizer", name, lambda: kind.from_pretrained(name))


def _load(what: str, name: str, load: Callable[[], T]) -> T:
    if name.startswith(("/", ".", "~")) and not Path(name).exists():
        raise FileNotFoundError(f"fastkd: {what} {name} is not there")
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"fastkd: {what} {name} cannot be loaded: {why.strip()}") from None
