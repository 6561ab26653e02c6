"""Checks of what a forward pass is given: each names the argument, what was found and what is expected."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def token_embeddings(table: nn.Embedding, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """[B, S, hidden_size] from exactly one of ``input_ids`` and ``inputs_embeds``.

    Raises: ValueError (both, neither, rank, width; an id outside the table, where the host can read it).
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"{given} of input_ids and inputs_embeds were given; pass exactly one of them")
    if inputs_embeds is not None:
        width = table.embedding_dim
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != width:
            raise ValueError(
                f"inputs_embeds has shape {list(inputs_embeds.shape)}; expected [batch, tokens, hidden_size = {width}]"
            )
        return inputs_embeds
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}; expected [batch, tokens]")
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (input_ids < 0) | (input_ids >= table.num_embeddings)
        if bool(outside.any()):
            sample, token = outside.nonzero()[0].tolist()
            raise ValueError(
                f"input_ids[{sample}, {token}] is {int(input_ids[sample, token])}; expected 0 to "
                f"{table.num_embeddings - 1} (vocab_size = {table.num_embeddings})"
            )
    return table(input_ids)


def check_mask(
    attention_mask: Tensor | None, shape: tuple[int, int], start: int | Tensor, capacity: int | None
) -> Tensor | None:
    """The padding mask over the keys that attention will see.

    A static cache also takes a mask over its whole buffer (``capacity``); what stands behind the new tokens is cut.
    Raises: ValueError (shape, float dtype).
    """
    if attention_mask is None:
        return None
    batch, seqlen = shape
    if attention_mask.dtype.is_floating_point or attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask is {attention_mask.dtype} {list(attention_mask.shape)}; expected bool or an integer dtype "
            "and [batch, keys], 1 = real (forward_train takes additive [batch, 1, queries, keys])"
        )
    total = capacity if isinstance(start, Tensor) else start + seqlen
    if attention_mask.shape[0] == batch and attention_mask.shape[1] == capacity:
        return attention_mask[:, :total]
    if tuple(attention_mask.shape) != (batch, total):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; expected [batch, keys] = {[batch, total]}, "
            "cached keys included"
        )
    return attention_mask


def check_positions(
    position_ids: Tensor | None, shape: tuple[int, int], start: int | Tensor, device: torch.device
) -> Tensor:
    """Positions [1 or B, S] of the new tokens; those after the cached ones unless given.

    Raises: ValueError (shape).
    """
    batch, seqlen = shape
    if position_ids is None:
        return (torch.arange(seqlen, device=device) + start)[None]
    if position_ids.dim() == 1:
        position_ids = position_ids[None]
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != seqlen:
        raise ValueError(
            f"position_ids has shape {list(position_ids.shape)}; expected [1 or {batch}, tokens = {seqlen}]"
        )
    return position_ids


def check_vision(
    config, vision_hidden_states: Tensor | None, repeat_time: int, embeds: Tensor, kept: bool
) -> Tensor | None:
    """The vision states, checked against the texts.

    Args:
        kept: projected vision states are in the cache.
    Raises: ValueError (rank, width, batch; repeat_time without vision states).
    """
    if not isinstance(repeat_time, int) or repeat_time < 1:
        raise ValueError(f"repeat_time is {repeat_time!r}; expected an integer of at least 1")
    if vision_hidden_states is None:
        if repeat_time != 1 and not kept:
            raise ValueError(f"repeat_time is {repeat_time} without vision_hidden_states; pass them, or repeat_time=1")
        return None
    width, batch = config.vision_hidden_size, embeds.shape[0]
    if vision_hidden_states.dim() != 3 or vision_hidden_states.shape[2] != width:
        raise ValueError(
            f"vision_hidden_states has shape {list(vision_hidden_states.shape)}; expected [images, patches, "
            f"vision_hidden_size = {width}]"
        )
    if vision_hidden_states.shape[0] * repeat_time != batch:
        raise ValueError(
            f"vision_hidden_states holds {vision_hidden_states.shape[0]} images with repeat_time={repeat_time}; the "
            f"{batch} texts need {batch} / repeat_time of them"
        )
    return vision_hidden_states


def block_rows(num_query_token: int, past, seqlen: int, has_vision: bool, zero_mask: bool) -> int:
    """How many of the new tokens are query tokens that attend to vision states.

    Args:
        past: ``cache.Past``; a tensor start (a compiled step on a static cache) stands behind the block.
    Raises: ValueError (a chunk inside the block, where the earlier part cannot be as in one pass; no vision states for
        a cache that keeps them).
    """
    if isinstance(past.start, Tensor) or past.start >= num_query_token:
        return 0
    if past.keeps_vision():
        if not has_vision and not past.has_vision():
            raise ValueError(
                "vision_hidden_states is None and past_key_values, an EncoderDecoderCache, holds no projected vision "
                f"states; the first {num_query_token} tokens need them"
            )
        if zero_mask and (past.start or seqlen < num_query_token):
            raise ValueError(
                f"tokens {past.start} to {past.start + seqlen} cut the block of {num_query_token} query tokens under "
                "use_zero_attention_mask, where each sees all others; encode the block in one chunk"
            )
        return min(num_query_token - past.start, seqlen)
    if past.start == 0:
        return num_query_token if seqlen >= num_query_token else 0
    if has_vision and seqlen > 1:
        raise ValueError(
            f"vision_hidden_states were given for tokens {past.start} to {past.start + seqlen}, inside the block of "
            f"{num_query_token} query tokens whose first {past.start} did not see them; encode the block in one chunk, "
            "or use an EncoderDecoderCache, which keeps the projected vision states from the first chunk on"
        )
    return 0
