"""The mask interface: transformers asks for a mask, and gets a key carrier where the kernels can express it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ... import semantics
from .carrier import Window, encode
from .patterns import Pattern, recognise
from .warn import warn_once

FULL_FLAGS = semantics.FLAG_VALID | semantics.FLAG_BIDIRECTIONAL
_interface: dict[type, bool] = {}  # not functools.cache, at which a tracer warns
OWN_ATTENTION = ("gpt_neo", "gptj")  # not on the attention interface; ``register`` adds their classes


def internvl_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,
    device: torch.device | str | None = None,
    config=None,
    **kwargs,
) -> Tensor:
    """A key carrier, or the dense bool mask [B, 1, Sq, Sk] of a pattern that no carrier expresses.

    ``cache_position`` [Sq] comes from transformers 4, ``q_length`` and ``q_offset`` from transformers 5.
    Raises: ValueError for a model whose attention does not go through the attention interface.
    """
    if config is not None and not _on_interface(type(config)):
        raise ValueError(
            f"attn_implementation='internvl' is set on a model of type {config.model_type!r}, whose attention does not "
            "go through the attention interface of transformers; use 'eager' (BLOOM: convert_hf_causal_lm_to_prefix_lm)"
        )
    if cache_position is not None:
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
    if device is None:
        device = attention_mask.device if attention_mask is not None else "cpu"
    q_offset, kv_offset = _on_host(q_offset), _on_host(kv_offset)
    pattern = recognise(mask_function)
    if pattern is not None and _fits(pattern, config, q_length, kv_length, q_offset, kv_offset):
        j = torch.arange(kv_length, device=device) + kv_offset
        return _carrier(pattern, batch_size, q_length, j, q_offset, kv_offset, attention_mask)
    warn_once(
        "pattern",
        "attn_implementation='internvl': the kernels have no form for this model's mask "
        f"({getattr(mask_function, '__qualname__', mask_function)}); it runs as dense attention",
    )
    if cache_position is not None:
        kwargs["cache_position"] = cache_position
    else:
        kwargs |= {"q_length": q_length, "q_offset": q_offset, "device": device}
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


def _carrier(
    pattern: Pattern, batch: int, q_length: int, j: Tensor, q_offset, kv_offset, attention_mask: Tensor | None
) -> Tensor:
    """``j`` [Sk]: the absolute index of each key."""
    keys = j.shape[0]
    real = torch.ones(batch, keys, dtype=torch.bool, device=j.device)
    if attention_mask is not None:
        real = _per_key(attention_mask.to(j.device, torch.bool), j, kv_offset, False)
    if not pattern.causal:
        return encode(real * FULL_FLAGS)
    written = None
    end = q_offset + q_length
    if isinstance(end, Tensor) or isinstance(kv_offset, Tensor) or end != kv_offset + keys:
        written = j < end
        real = real & written
    blocks = None if pattern.block_ids is None else _per_key(pattern.block_ids.to(j.device), j, kv_offset, -1)
    flags = real * semantics.FLAG_VALID
    if blocks is not None and pattern.window is None and _one_prefix(blocks, real):
        flags, blocks = torch.where(real & (blocks >= 0), FULL_FLAGS, flags), None
    window = Window.NONE
    if pattern.window is not None:
        window = Window.CONFIG_AND_BLOCKS if pattern.blocks_in_window else Window.CONFIG
    return encode(flags, written, pattern.segment_ids, blocks, window)


def _per_key(values: Tensor, j: Tensor, kv_offset: int | Tensor, fill) -> Tensor:
    """[B, total] values of absolute positions -> [B, Sk] of the keys ``j``; beyond the end: ``fill``."""
    if isinstance(kv_offset, int) and kv_offset + j.shape[0] == values.shape[1]:
        return values[:, kv_offset:]
    if isinstance(kv_offset, int):
        missing = max(0, kv_offset + j.shape[0] - values.shape[1])
        return F.pad(values[:, kv_offset:], (0, missing), value=fill)[:, : j.shape[0]]
    inside = j < values.shape[1]
    return torch.where(inside, values[:, torch.where(inside, j, 0)], fill)


def _one_prefix(blocks: Tensor, real: Tensor) -> bool:
    """Whether host memory shows that each row's only block begins with its first real key.

    Every later query then sees the block causally anyway, so that "visible to every query" says the same.
    """
    if blocks.device.type != "cpu" or torch.compiler.is_compiling() or not blocks.shape[1]:
        return False
    inside = real & (blocks >= 0)
    last = torch.where(real, blocks, -1).amax(1, keepdim=True)
    only = (~inside | (blocks == last)).all()
    # no real key outside of the block comes before one inside
    gap = (real & ~inside).cumsum(1) > 0
    return bool(only and not (gap & inside).any())


def _fits(pattern: Pattern, config, q_length, kv_length, q_offset, kv_offset) -> bool:
    if pattern.window is not None and pattern.window != getattr(config, "sliding_window", None):
        return False  # the layer would be asked for another window
    if pattern.segment_ids is not None:
        return (q_length, q_offset, kv_offset) == (kv_length, 0, 0)
    return pattern.block_ids is None or isinstance(kv_offset, int)


def _on_host(offset: int | Tensor) -> int | Tensor:
    """Offsets in host memory as integers; a device is never asked."""
    if isinstance(offset, Tensor) and offset.device.type == "cpu" and not torch.compiler.is_compiling():
        return int(offset)
    return offset


@torch.compiler.assume_constant_result  # a tracer calls it instead of following it through all of transformers
def _on_interface(config_class: type) -> bool:
    """False for the models of transformers that would add the carrier to their scores."""
    if config_class not in _interface:
        _interface[config_class] = _look_up(config_class)
    return _interface[config_class]


def _look_up(config_class: type) -> bool:
    from transformers import MODEL_MAPPING

    if config_class not in MODEL_MAPPING:
        return True  # a text part, or a model from elsewhere
    model = MODEL_MAPPING[config_class]
    model = model[0] if isinstance(model, tuple) else model
    return config_class.model_type in OWN_ATTENTION or model._can_set_attn_implementation()
