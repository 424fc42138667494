"""Language models: teachers whose predictions are made once and kept. transformers is imported where a model is loaded."""

from fastkd.language.cache_pass import cache_teacher
from fastkd.language.collator import CacheCollator
from fastkd.language.digests import model_digest, tokenizer_digest
from fastkd.language.targets import top_k_log_probs
from fastkd.language.teacher_cache import TeacherCache
from fastkd.language.token_files import open_tokens
from fastkd.language.tokens import TokenSequences

__all__ = [
    "CacheCollator",
    "TeacherCache",
    "TokenSequences",
    "cache_teacher",
    "model_digest",
    "open_tokens",
    "tokenizer_digest",
    "top_k_log_probs",
]
