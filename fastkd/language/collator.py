"""Batches of a cache of a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastkd import _checks

__all__ = ["CacheCollator"]

IGNORED = -100


class CacheCollator:
    """Pads sequences of :class:`fastkd.language.TeacherCache` on the right, for ``DataLoader(collate_fn=...)``.

    A batch has, for B sequences of which the longest has S tokens:

    - ``input_ids`` int64 ``[B, S]``, padded with ``pad_token_id``, and ``attention_mask`` int64 ``[B, S]``, 0 there;
    - ``labels`` int64 ``[B, S]``, as models of transformers take them, which shift them themselves: ``labels[:, i]`` belongs
      to token i; -100 in padding;
    - ``target`` int64 ``[B, S]``, shifted: ``target[:, i]`` is what position i predicts, ``labels[:, i + 1]``, and -100 at the
      last position. It lies as logits and teacher do, so that ``fastkd.functional.sparse_kl_div(logits, ..., target=target)``
      leaves out what is padding, or masked, without a slice;
    - ``teacher_indices`` int64 ``[B, S, k]``, 0 in padding, ``teacher_log_probs`` float32 ``[B, S, k]``, -inf there, and
      ``teacher_tail_log_prob`` float32 ``[B, S]``, 0 there. Row i is the teacher's prediction at position i, of token i + 1.
      Batches of a cache of draws have no ``teacher_tail_log_prob``: give the loss ``tail=cache.tail``.

    Args:
        pad_token_id: any token, as nothing is learned from padding.
        pad_to_multiple_of: S is rounded up to a multiple of it.
    """

    def __init__(self, pad_token_id: int, *, pad_to_multiple_of: int = 1) -> None:
        self.pad_token_id = _checks.check_count("pad_token_id", pad_token_id, 0, 2**31)
        self.pad_to_multiple_of = _checks.check_count("pad_to_multiple_of", pad_to_multiple_of, 1)

    def __call__(self, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        longest = max(len(item["input_ids"]) for item in items)
        size = len(items), -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        k = items[0]["teacher_indices"].shape[-1]
        batch = {
            "input_ids": torch.full(size, self.pad_token_id),
            "attention_mask": torch.zeros(size, dtype=torch.int64),
            "labels": torch.full(size, IGNORED),
            "target": torch.full(size, IGNORED),
            "teacher_indices": torch.zeros(*size, k, dtype=torch.int64),
            "teacher_log_probs": torch.full((*size, k), -torch.inf, dtype=torch.float32),
        }
        if "teacher_tail_log_prob" in items[0]:
            batch["teacher_tail_log_prob"] = torch.zeros(size, dtype=torch.float32)
        for row, item in enumerate(items):
            length = len(item["input_ids"])
            for name, value in item.items():
                batch[name][row, :length] = value
            batch["attention_mask"][row, :length] = 1
            batch["target"][row, : length - 1] = item["labels"][1:]
        return batch
