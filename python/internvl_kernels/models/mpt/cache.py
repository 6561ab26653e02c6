"""Key-value caches as the attention functions see them: one slot per layer.

A slot is None (no cache wanted), an empty tuple (start one), a pair of tensors in the layout of the
implementation, or a ``CacheSlot`` over one layer of a transformers ``Cache``.

    torch           k [B, Hkv, head_dim, T], v [B, Hkv, T, head_dim]
    flash, triton   k, v [B, T, Hkv * head_dim]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from ..inputs import check_cache_layers, check_room


@dataclass(frozen=True)
class CacheSlot:
    """One layer of a transformers ``Cache`` that held ``start`` tokens before this forward pass."""

    cache: Cache
    layer: int
    start: int

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, Hkv, S, head_dim]; returns everything filled so far, [B, Hkv, start + S, head_dim].

        A static cache hands back its whole buffer: the empty slots are cut off as a view.
        """
        filled = self.start + key.shape[2]
        position = torch.arange(self.start, filled, device=key.device)  # static caches before transformers 5 ask
        key, value = self.cache.update(key, value, self.layer, {"cache_position": position})
        return key[:, :, :filled], value[:, :, :filled]


Past = Cache | Sequence | None


def cached_length(past: Past, attn_impl: str) -> int:
    """Tokens held by a model's ``past_key_values``.

    Raises: ValueError when the tensors are not in the layout of ``attn_impl``.
    """
    if past is None:
        return 0
    if isinstance(past, Cache):
        return int(past.get_seq_length())
    if len(past) == 0 or past[0] is None or len(past[0]) == 0:
        return 0
    check_layout(past[0], attn_impl)
    return past[0][0].shape[3 if attn_impl == "torch" else 1]


def check_layout(pair: Sequence[Tensor], attn_impl: str) -> None:
    """Raises ValueError when a cached pair does not have the rank that ``attn_impl`` writes."""
    wanted, layout = (
        (4, "k [B, Hkv, head_dim, T], v [B, Hkv, T, head_dim]") if attn_impl == "torch" else (3, "[B, T, width]")
    )
    if len(pair) != 2 or any(t.dim() != wanted for t in pair):
        shapes = [list(t.shape) for t in pair]
        raise ValueError(
            f"past_key_value holds tensors of shapes {shapes}; attn_impl={attn_impl!r} caches {layout}. "
            "A transformers Cache fits every implementation."
        )


def check_past(past: Past, config, batch: int, seqlen: int, attn_impl: str) -> None:
    """Raises ValueError for what is no cache of this model and batch, and for a static one that is full."""
    if past is None:
        return
    if isinstance(past, EncoderDecoderCache) or not isinstance(past, Cache | list | tuple):
        raise ValueError(
            f"past_key_values is a {type(past).__name__}; allowed: a transformers Cache of one decoder, or one slot "
            "for each layer"
        )
    heads, head_dim = config.num_key_value_heads, config.head_dim
    if isinstance(past, Cache):
        check_cache_layers(past, config.n_layers, (batch, heads, head_dim))
        check_room(past, seqlen)
        return
    for layer, pair in enumerate(past):
        if pair is None or len(pair) == 0 or isinstance(pair, CacheSlot):
            continue
        check_layout(pair, attn_impl)
        value = pair[1]
        found = (value.shape[0], *((value.shape[1], value.shape[3]) if value.dim() == 4 else value.shape[2:]))
        wanted = (batch, heads, head_dim) if value.dim() == 4 else (batch, heads * head_dim)
        if found != wanted or pair[0].shape[0] != batch:
            raise ValueError(
                f"past_key_values, layer {layer}: value has shape {list(value.shape)}; expected batch {batch}, "
                f"{heads} key-value heads of {head_dim}"
            )


def layer_slots(past: Past, n_layers: int, use_cache: bool, start: int) -> list | None:
    """One slot per layer, or None when nothing is cached. The caller's sequence is not changed.

    Raises: ValueError when ``past`` holds another number of layers.
    """
    if past is None:
        return [()] * n_layers if use_cache else None
    if isinstance(past, Cache):
        return [CacheSlot(past, layer, start) for layer in range(n_layers)]
    if len(past) != n_layers:
        raise ValueError(f"past_key_values holds {len(past)} layers; this model has {n_layers}")
    return [() if slot is None else slot for slot in past]
