"""Caches as Q-LLaMA sees them: self-attention keys of every layer, and apart from them the vision keys.

Accepted as ``past_key_values``: a transformers ``Cache`` (dynamic, static, quantized; filled in place), an
``EncoderDecoderCache`` (its second half keeps the projected vision states), or the original's tuple of one
(k [B, Hkv, T, D], v [B, Hkv, T, D]) pair per layer (not changed; a new tuple comes back).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache


@dataclass(frozen=True)
class Slot:
    """One layer of a ``Cache`` that held ``start`` tokens before this forward pass."""

    cache: Cache
    layer: int
    start: int | Tensor

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, Hkv, S, D]; returns all of them, [B, Hkv, start + S, D].

        Of a static buffer the empty slots are cut off as a view; with a tensor ``start`` the whole buffer comes back.
        """
        position = torch.arange(key.shape[2], device=key.device) + self.start
        filled = None if isinstance(self.start, Tensor) else self.start + key.shape[2]
        key, value = self.cache.update(key, value, self.layer, {"cache_position": position})
        return key[:, :, :filled], value[:, :, :filled]


@dataclass(frozen=True)
class VisionSlot:
    """One layer's projected vision states (k, v), each [Bv, Hkv, Nv, D], in the second half of the cache."""

    cache: EncoderDecoderCache
    layer: int

    def pair(self) -> tuple[Tensor, Tensor] | None:
        if not self.cache.is_updated.get(self.layer):
            return None
        kept = self.cache.cross_attention_cache.layers[self.layer]
        return kept.keys, kept.values

    def keep(self, key: Tensor, value: Tensor) -> None:
        position = torch.arange(key.shape[2], device=key.device)
        self.cache.cross_attention_cache.update(key, value, self.layer, {"cache_position": position})
        self.cache.is_updated[self.layer] = True


@dataclass(frozen=True)
class Past:
    """The caches of one forward pass."""

    keys: Cache | None  # of self-attention
    given: object  # what the caller passed
    start: int | Tensor

    def slot(self, layer: int) -> Slot | None:
        return None if self.keys is None else Slot(self.keys, layer, self.start)

    def vision_slot(self, layer: int) -> VisionSlot | None:
        return VisionSlot(self.given, layer) if self.keeps_vision() else None

    def keeps_vision(self) -> bool:
        """The caller's cache has a half for projected vision states."""
        return isinstance(self.given, EncoderDecoderCache)

    def has_vision(self) -> bool:
        """Projected vision states are there."""
        return self.keeps_vision() and any(self.given.is_updated.values())

    @property
    def capacity(self) -> int | None:
        """Length of a static cache's buffers; None when they grow."""
        layers = getattr(self.keys, "layers", None)
        return getattr(layers[0], "max_cache_len", None) if layers else None

    def result(self):
        """What ``past_key_values`` of the output holds."""
        if self.keys is None:
            return None
        if isinstance(self.given, tuple | list):
            return tuple((layer.keys, layer.values) for layer in self.keys.layers)
        return self.keys if self.given is None else self.given


def open_past(given, use_cache: bool, config, shape: tuple[int, int]) -> Past:
    """The caches behind ``past_key_values``, for [B, S] new tokens.

    Raises: ValueError (not a cache, another number of layers, other heads, head dims or batch, a window, no room).
    """
    batch, seqlen = shape
    if given is None:
        cache = DynamicCache() if use_cache else None
        return Past(cache, None, 0)
    if isinstance(given, tuple | list):
        return Past(_from_pairs(given, config, batch), given, past_length(given))
    keys = given.self_attention_cache if isinstance(given, EncoderDecoderCache) else given
    if not isinstance(keys, Cache):
        raise ValueError(
            f"past_key_values is a {type(given).__name__}; expected a transformers Cache, or one (k, v) pair per layer"
        )
    _check_layers(keys, config, batch)
    past = Past(keys, given, _length(keys))
    if past.capacity is not None and isinstance(past.start, int) and past.start + seqlen > past.capacity:
        raise ValueError(
            f"past_key_values has room for {past.capacity} tokens and holds {past.start}; {seqlen} more do not fit"
        )
    return past


def past_length(given) -> int:
    """Tokens held by ``past_key_values``."""
    if given is None:
        return 0
    if isinstance(given, tuple | list):
        return given[0][0].shape[2] if given else 0
    return int(given.get_seq_length())


def _length(cache: Cache) -> int | Tensor:
    length = cache.get_seq_length()
    if isinstance(length, Tensor) and torch.compiler.is_compiling():
        return length
    return int(length)


def _from_pairs(pairs, config, batch: int) -> DynamicCache:
    """The tuple form as a ``DynamicCache`` of its own."""
    if len(pairs) != config.num_hidden_layers:
        raise ValueError(f"past_key_values holds {len(pairs)} layers; this model has {config.num_hidden_layers}")
    cache = DynamicCache()
    for layer, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or any(t.dim() != 4 for t in pair):
            raise ValueError(f"past_key_values[{layer}] is no pair of tensors (k, v), each [B, Hkv, T, head_dim]")
        for tensor in pair:
            _check_shape(layer, tensor, config, batch)
        cache.update(pair[0], pair[1], layer)
    return cache


def _check_layers(cache: Cache, config, batch: int) -> None:
    layers = getattr(cache, "layers", None)
    if layers is None:
        return
    if len(layers) > config.num_hidden_layers:
        raise ValueError(f"past_key_values has {len(layers)} layers; this model has {config.num_hidden_layers}")
    for index, layer in enumerate(layers):
        name = type(layer).__name__
        if "Sliding" in name or "Linear" in name:
            raise ValueError(
                f"past_key_values layer {index} is a {name}, which does not keep every key; expected a layer that "
                "does, such as those of DynamicCache and StaticCache"
            )
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.dim() == 4 and keys.shape[2]:
            _check_shape(index, keys, config, batch)
    filled = sum(isinstance(getattr(x, "keys", None), Tensor) and bool(x.keys.numel()) for x in layers)
    if 0 < filled < config.num_hidden_layers:
        raise ValueError(f"past_key_values has {filled} layers; this model has {config.num_hidden_layers}")


def _check_shape(layer: int, tensor: Tensor, config, batch: int) -> None:
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    expected = (batch, config.num_key_value_heads, head_dim)
    if (tensor.shape[0], tensor.shape[1], tensor.shape[3]) != expected:
        raise ValueError(
            f"past_key_values layer {layer} holds tensors of shape {list(tensor.shape)}; expected [batch, "
            f"num_key_value_heads, tokens, head_dim] = [{expected[0]}, {expected[1]}, tokens, {expected[2]}]"
        )
