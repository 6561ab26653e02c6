"""Caches that a LLaVA model accepts: transformers' ``Cache``, and the older tuples of (key, value) pairs."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from ..inputs import check_cache_layers


def cache_length(past_key_values) -> int:
    """Cached tokens, of a transformers cache or of (key, value) pairs whose values are [.., T, hd]."""
    if past_key_values is None:
        return 0
    if hasattr(past_key_values, "get_seq_length"):
        return int(past_key_values.get_seq_length())  # a tensor for static caches of transformers 4
    return past_key_values[-1][1].shape[-2] if len(past_key_values) and len(past_key_values[-1]) else 0


def as_cache(past_key_values, n_layers: int, kv_heads: int, head_dim: int, batch: int) -> Cache | None:
    """The same cache as a ``Cache``; pairs of [B, Hkv, T, hd] are copied into a new one, a ``Cache`` is kept.

    Raises: ValueError (another number of layers, another shape: the cache of another model).
    """
    if past_key_values is None:
        return None
    if isinstance(past_key_values, EncoderDecoderCache) or not isinstance(past_key_values, Cache | list | tuple):
        raise ValueError(
            f"past_key_values is a {type(past_key_values).__name__}; allowed: a transformers Cache of one decoder, or "
            "(key, value) pairs, one for each layer"
        )
    if isinstance(past_key_values, Cache):
        check_cache_layers(past_key_values, n_layers, (batch, kv_heads, head_dim))
        return past_key_values
    if len(past_key_values) != n_layers:
        raise ValueError(f"past_key_values holds {len(past_key_values)} layers; this model has {n_layers}")
    cache = DynamicCache()
    for layer, pair in enumerate(past_key_values):
        if len(pair) == 0:  # an empty slot: start a cache
            continue
        key, value = pair
        _check_pair(layer, key, value, (batch, kv_heads, head_dim))
        cache.update(key, value, layer)
    return cache


def _check_pair(layer: int, key: Tensor, value: Tensor, expected: tuple[int, int, int]) -> None:
    batch, kv_heads, head_dim = expected
    for name, tensor in (("key", key), ("value", value)):
        shape = tensor.shape
        if len(shape) != 4 or (shape[0], shape[1], shape[3]) != expected:
            raise ValueError(
                f"past_key_values, layer {layer}: {name} has shape {list(shape)}; "
                f"expected [{batch}, {kv_heads}, tokens, {head_dim}], the cache of this model and batch"
            )


def buffer_length(cache: Cache | None) -> int | None:
    """Slots of a static cache, whose attention runs over all of them; None for a cache that grows."""
    if cache is None or not getattr(cache, "is_compileable", False):
        return None
    lengths = [getattr(layer, "max_cache_len", None) for layer in cache.layers]
    return lengths[0] if lengths else None
