"""Batches of prompts and answers: the bidirectional mask of existing batches, and a collator that makes new ones."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100


def add_bidirectional_mask_if_missing(batch: MutableMapping) -> None:
    """Put ``bidirectional_mask`` into a batch that has none.

    Evaluation batches (``mode == "icl_task"``): attention_mask without the columns of ``continuation_indices``.
    Otherwise the attended tokens (attention_mask == 1) that carry no label, in the dtype of attention_mask.
    Raises: KeyError when the entries that this needs are missing.
    """
    if "bidirectional_mask" in batch:
        return
    if batch.get("mode") == "icl_task":
        mask = batch["attention_mask"].clone()
        for row, columns in enumerate(batch["continuation_indices"]):
            mask[row, torch.as_tensor(columns, dtype=torch.long, device=mask.device)] = 0
    elif "labels" in batch and "attention_mask" in batch:
        attended, labels = batch["attention_mask"], batch["labels"]
        mask = ((attended == 1) & (labels == IGNORE_INDEX)).to(attended.dtype)
    else:
        raise KeyError("bidirectional_mask: the batch has neither it nor both labels and attention_mask")
    batch["bidirectional_mask"] = mask


@dataclass
class PrefixLMCollator:
    """Prompt and answer pairs -> a batch of a converted model, each entry int64 [B, S].

    The prompt is the prefix and has labels -100; the answer is causal and is what the model learns.

    Padded, one pair in a row: input_ids, attention_mask, bidirectional_mask, labels.
    Packed, several pairs in a row: input_ids, position_ids that begin again with each pair, bidirectional_mask, labels;
    no pair sees another.

    Args:
        pad_token_id: fills the end of shorter rows (with ``padding_side`` "left": their beginning).
        eos_token_id: ends every answer. Default: none is added.
        prompt, answer: names of the two lists of token ids in an example.
        max_length: longer pairs lose tokens from the beginning of the prompt, then from the end of the answer.
        packed: fill rows of ``max_length`` tokens with as many pairs as fit, in order.
        pad_to_multiple_of: rounds S up.
    """

    pad_token_id: int
    eos_token_id: int | None = None
    prompt: str = "prompt"
    answer: str = "answer"
    max_length: int | None = None
    padding_side: str = "right"
    packed: bool = False
    pad_to_multiple_of: int = 1

    def __post_init__(self):
        if self.packed and self.max_length is None:
            raise ValueError("packed is True and max_length is None; packing needs the length of a row")
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {self.padding_side!r}; allowed: 'left', 'right'")

    def __call__(self, examples: Sequence[Mapping]) -> dict[str, Tensor]:
        """examples: mappings with ``prompt`` and ``answer``. Raises: KeyError; ValueError (no examples)."""
        if not examples:
            raise ValueError("no examples were given")
        rows = []
        for example in examples:
            pair = self._pair(example)
            if self.packed and rows and len(rows[-1]["input_ids"]) + len(pair["input_ids"]) <= self.max_length:
                rows[-1] = {name: rows[-1][name] + pair[name] for name in pair}
            else:
                rows.append(pair)
        length = max(len(row["input_ids"]) for row in rows)
        length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        # padding of packed rows: the position never moves on, so that every such token is a document of its own
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
        batch = {
            name: torch.tensor([self._padded(row[name], length, fill.get(name, 0)) for row in rows]) for name in rows[0]
        }
        del batch["attention_mask" if self.packed else "position_ids"]
        return batch

    def _pair(self, example: Mapping) -> dict[str, list[int]]:
        prompt, answer = (torch.as_tensor(example[name]).long().tolist() for name in (self.prompt, self.answer))
        if self.eos_token_id is not None:
            answer = [*answer, self.eos_token_id]
        if self.max_length is not None:
            answer = answer[: self.max_length]
            prompt = prompt[max(0, len(prompt) + len(answer) - self.max_length) :]
        length = len(prompt) + len(answer)
        return {
            "input_ids": prompt + answer,
            "attention_mask": [1] * length,
            "position_ids": list(range(length)),
            "bidirectional_mask": [1] * len(prompt) + [0] * len(answer),
            "labels": [IGNORE_INDEX] * len(prompt) + answer,
        }

    def _padded(self, values: list[int], length: int, fill: int) -> list[int]:
        padding = [fill] * (length - len(values))
        return padding + values if self.padding_side == "left" else values + padding
