"""Prompts with ``<image>`` in them as token ids."""

from __future__ import annotations

import torch
from torch import Tensor

from .constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX


def tokenizer_image_token(
    prompt: str, tokenizer, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | Tensor:
    """Token ids of ``prompt``, ``image_token_index`` in the place of every ``<image>``.

    The text between images is tokenised piece by piece; of the BOS tokens that a tokenizer puts before each piece the
    first stays, also when the prompt begins with an image.
    Args:
        tokenizer: called with a string, returns an object with ``input_ids``; ``bos_token_id``.
        return_tensors: None, a list; 'pt', an int64 tensor [S].
    Raises: ValueError (return_tensors).
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors is {return_tensors!r}; allowed: None, 'pt'")
    ids: list[int] = []
    for number, piece in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        tokens = list(tokenizer(piece).input_ids)
        bos = tokens[:1] if tokens and tokens[0] == tokenizer.bos_token_id else []
        ids += bos if number == 0 else [image_token_index]
        ids += tokens[len(bos) :]
    return torch.tensor(ids, dtype=torch.long) if return_tensors == "pt" else ids
