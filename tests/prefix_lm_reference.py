"""What a prefix LM must compute: the unconverted model in eager mode with dense masks, written out here."""

from __future__ import annotations

import math

import torch
from transformers.models.bloom.modeling_bloom import BloomModel

from tests.hf_models import model_of

WINDOW = 5  # of the models of tests/hf_models.py that have one


def allowed(attention_mask, bidirectional_mask, queries, window=None, prefix=True):
    """bool [B, Sq, Sk]: who sees whom, the last query at the last key; loops, on purpose."""
    batch, keys = attention_mask.shape
    seen = torch.zeros(batch, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for i in range(queries):
            p = i + keys - queries
            for j in range(keys):
                causal = j <= p and (window is None or p - j < window)
                opened = prefix and j < bidirectional_mask.shape[1] and bool(bidirectional_mask[b, j])
                seen[b, i, j] = bool(attention_mask[b, j]) and (causal or opened)
    return seen


def additive(seen, dtype=torch.float32):
    return torch.where(seen, 0.0, torch.finfo(dtype).min)[:, None].to(dtype)


def bloom_slopes(heads):
    """2 ** (-8 i / P) for the first P heads, the odd steps of the next power of two for the others."""
    power = 2 ** int(math.log2(heads))
    first = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return torch.tensor(first + [2.0 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)])


class SymmetricBloom(BloomModel):
    """BLOOM whose bias is -slope * |distance|."""

    def build_alibi_tensor(self, attention_mask, num_heads, dtype):
        keys = attention_mask.shape[-1]
        distance = (torch.arange(keys)[:, None] - torch.arange(keys)).abs()
        bias = -bloom_slopes(num_heads)[:, None, None] * distance
        return bias.repeat(attention_mask.shape[0], 1, 1).to(dtype)


def reference_model(name, **fields):
    """The eager model with every causal table opened, so that only the mask it is given counts."""
    model = model_of(name, "eager", **fields)
    for module in model.modules():
        if isinstance(getattr(module, "bias", None), torch.Tensor) and module.bias.dim() == 4:
            module.bias = torch.ones_like(module.bias)
        if type(module) is BloomModel:
            module.__class__ = SymmetricBloom
    return model


def reference(model, name, ids, attention_mask, bidirectional_mask, **kwargs):
    """Logits and the rest of ``reference_model(name)`` for [B, S] masks."""
    queries = ids.shape[1]
    full = additive(allowed(attention_mask, bidirectional_mask, queries))
    mask = full
    if name == "mistral":
        mask = additive(allowed(attention_mask, bidirectional_mask, queries, WINDOW))
    elif name == "gemma3_text":
        sliding = additive(allowed(attention_mask, bidirectional_mask, queries, WINDOW))
        mask = {"full_attention": full, "sliding_attention": sliding}
    elif name == "gpt_neo":
        local = additive(allowed(attention_mask, bidirectional_mask, queries, WINDOW, prefix=False))
        for block, layer_type in zip(model.transformer.h, model.config.attention_layers, strict=True):
            attend = block.attn.attention
            masks = {"global": full, "local": local}
            attend._attn = _with_mask(type(attend)._attn.__get__(attend), masks[layer_type])
    if name == "opt" and "position_ids" not in kwargs:
        real = attention_mask.long()
        kwargs["position_ids"] = real.cumsum(1) * real - 1
    return model(ids, attention_mask=mask, use_cache=False, **kwargs)


def _with_mask(function, mask):
    def attend(query, key, value, _, *rest):
        return function(query, key, value, mask, *rest)

    return attend
