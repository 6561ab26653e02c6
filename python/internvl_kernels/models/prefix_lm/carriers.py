"""The masks of one forward pass, checked, as a key carrier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from ... import semantics
from ..hf_attention.carrier import Window, encode


class PrefixLMError(ValueError, AssertionError):
    """Wrong input of a converted model. (The original converter raised AssertionError for some of it.)"""


def check_bidirectional_mask(mask: Tensor, batch: int, config) -> None:
    """Raises TypeError (not a bool or integer tensor) or ValueError (shape, longer than the model's positions)."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"bidirectional_mask is a {type(mask).__name__}; expected a tensor [batch, keys]")
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"bidirectional_mask has dtype {mask.dtype}; expected bool or an integer dtype")
    if mask.dim() != 2 or mask.shape[0] != batch:
        raise PrefixLMError(
            f"bidirectional_mask has shape {list(mask.shape)}; expected [batch, keys] with batch {batch}"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and mask.shape[1] > positions:
        raise PrefixLMError(f"bidirectional_mask covers {mask.shape[1]} keys; the model has {positions} positions")


def cache_sizes(past: Cache | None, seqlen_q: int) -> tuple[int | Tensor, int]:
    """(keys cached before this pass, keys that attention will see). A static cache shows all its slots.

    Raises: TypeError (no transformers Cache); ValueError (a cache that drops old keys, and with them the prefix).
    """
    if past is None:
        return 0, seqlen_q
    if not isinstance(past, Cache):
        raise TypeError(f"past_key_values is a {type(past).__name__}; expected a transformers Cache")
    if any(getattr(past, "is_sliding", None) or ()):
        raise PrefixLMError(
            "past_key_values has sliding-window layers, which drop the prefix when it is older than the window; "
            "use DynamicCache() without a config, or generate with cache_implementation='static', which builds one "
            "without windows"
        )
    seen = past.get_seq_length()
    if past.is_compileable:
        slots = past.get_max_length() if hasattr(past, "get_max_length") else past.get_max_cache_shape()
        return seen, slots
    return int(seen), int(seen) + seqlen_q


def carrier_of(
    bidirectional_mask: Tensor,
    attention_mask: Tensor | None,
    past: Cache | None,
    seqlen_q: int,
    device: torch.device,
    segment_ids: Tensor | None = None,
    same_shape: bool = False,
    weights: bool = False,
) -> Tensor:
    """The key carrier of a checked mask; both masks end where the input ends or earlier, then the rest is 0.

    segment_ids: [B, Sq] of packed documents, without a cache.
    Raises: ValueError (shape of attention_mask; with ``same_shape`` a shorter bidirectional_mask without a cache).
    """
    seen, keys = cache_sizes(past, seqlen_q)
    batch, given = bidirectional_mask.shape
    static = past is not None and past.is_compileable
    bidirectional = _fit(bidirectional_mask.to(device), keys)
    real = torch.ones(1, 1, dtype=torch.bool, device=device)
    if attention_mask is not None:
        shape = tuple(attention_mask.shape)
        if len(shape) != 2 or shape[0] != batch or (shape[1] > keys if static else shape[1] != keys):
            raise PrefixLMError(
                f"attention_mask has shape {list(shape)}; with bidirectional_mask it must be [batch, keys] = "
                f"{[batch, keys]}, cached keys included"
            )
        real = _fit(attention_mask.to(device), keys)
    if same_shape and past is None and given != seqlen_q:
        raise PrefixLMError(
            f"bidirectional_mask covers {given} keys; this model expects as many as attention_mask, {seqlen_q}"
        )
    written = None
    if static:
        written = (torch.arange(keys, device=device) < seen + seqlen_q).expand(batch, -1)
        real = real & written
    flags = real * (semantics.FLAG_VALID + semantics.FLAG_BIDIRECTIONAL * bidirectional)
    return encode(flags, written, segment_ids, window=Window.LAYER, weights=weights)


def packed_segments(position_ids: Tensor, batch: int) -> Tensor:
    """int [B, S]: a new segment wherever a position does not follow the one before, as transformers reads packing."""
    position_ids = position_ids.expand(batch, -1)
    return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1).cumsum(1)


def _fit(mask: Tensor, keys: int) -> Tensor:
    """[B, n] -> bool [B, keys]: cut, or filled with 0 on the right."""
    return F.pad(mask[:, :keys] != 0, (0, max(0, keys - mask.shape[1])))
