"""Batches of prompts and answers: the bidirectional mask of existing batches, and a collator that makes new ones."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
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
    """Prompt and answer pairs -> input_ids, attention_mask, bidirectional_mask and labels, each int64 [B, S].

    The prompt is the prefix and has labels -100; the answer is causal and is what the model learns.

    Args:
        pad_token_id: fills the end of shorter rows (with ``padding_side`` "left": their beginning).
        eos_token_id: ends every answer. Default: none is added.
        prompt, answer: names of the two lists of token ids in an example.
        max_length: longer examples lose tokens from the beginning of the prompt, then from the end of the answer.
        pad_to_multiple_of: rounds S up.
    """

    pad_token_id: int
    eos_token_id: int | None = None
    prompt: str = "prompt"
    answer: str = "answer"
    max_length: int | None = None
    padding_side: str = "right"
    pad_to_multiple_of: int = 1

    def __call__(self, examples: Sequence[MutableMapping]) -> dict[str, Tensor]:
        rows = [self._row(example) for example in examples]
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {name: [] for name in ("input_ids", "attention_mask", "bidirectional_mask", "labels")}
        for prompt, answer in rows:
            missing = length - len(prompt) - len(answer)
            fields = {
                "input_ids": (prompt + answer, self.pad_token_id),
                "attention_mask": ([1] * (len(prompt) + len(answer)), 0),
                "bidirectional_mask": ([1] * len(prompt) + [0] * len(answer), 0),
                "labels": ([IGNORE_INDEX] * len(prompt) + answer, IGNORE_INDEX),
            }
            for name, (values, fill) in fields.items():
                padding = [fill] * missing
                batch[name].append(padding + values if self.padding_side == "left" else values + padding)
        return {name: torch.tensor(values, dtype=torch.long) for name, values in batch.items()}

    def _row(self, example: MutableMapping) -> tuple[list[int], list[int]]:
        prompt, answer = (torch.as_tensor(example[name]).tolist() for name in (self.prompt, self.answer))
        if self.eos_token_id is not None:
            answer = [*answer, self.eos_token_id]
        if self.max_length is not None:
            answer = answer[: self.max_length]
            prompt = prompt[max(0, len(prompt) + len(answer) - self.max_length) :]
        return prompt, answer
