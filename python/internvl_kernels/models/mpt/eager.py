"""``attn_impl='torch'``: dense eager attention with exactly the arithmetic of the original."""

from __future__ import annotations

import math
import warnings

import torch
from einops import rearrange
from torch import Tensor

from ... import semantics
from .bias import AttnBias, crop_to_last
from .cache import CacheSlot, check_layout


def scaled_multihead_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    n_heads: int,
    past_key_value=None,
    softmax_scale: float | None = None,
    attn_bias: Tensor | AttnBias | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    training: bool = False,
    needs_weights: bool = False,
    multiquery: bool = False,
):
    """Attention through a dense score matrix.

    Masked scores are *set* to the smallest finite number of the query's dtype, so a row whose keys are all
    masked attends uniformly (the fused implementations return 0 there).

    Args:
        query: [B, Sq, H * D]; any float dtype.
        key, value: [B, S, Hkv * D], Hkv = 1 with ``multiquery``, else ``n_heads``.
        past_key_value: a slot of ``cache.py``: None, (), (k [B, Hkv, D, T], v [B, Hkv, T, D]) or ``CacheSlot``.
        softmax_scale: applied to the product, before the bias. Default: 1 / sqrt(D).
        attn_bias: [1 or B, 1 or H, rows, columns], cut to its last Sq rows and last Sk columns; or ``AttnBias``.
        key_padding_mask: [B, Sk] bool, True = real key.
        is_causal: query row i sees key j when j <= i + Sk - Sq; without effect when Sq == 1.
    Returns: out [B, Sq, H * D]; weights [B, H, Sq, Sk] or None; the cache slot or None.
    Raises: RuntimeError (a bias that does not fit the scores).
    """
    kv_heads = 1 if multiquery else n_heads
    q = rearrange(query, "b s (h d) -> b h s d", h=n_heads)
    k, v, past_key_value = _append(past_key_value, key, value, kv_heads)
    seqlen_q, seqlen_k = q.shape[-2], v.shape[-2]
    if softmax_scale is None:
        softmax_scale = 1 / math.sqrt(q.shape[-1])

    weight = q @ k * softmax_scale  # [B, H, Sq, Sk]
    if isinstance(attn_bias, AttnBias):
        attn_bias = attn_bias.dense(seqlen_q, seqlen_k, is_causal)
    if attn_bias is not None:
        weight = weight + crop_to_last(attn_bias, seqlen_q, seqlen_k)
    lowest = torch.finfo(q.dtype).min
    if key_padding_mask is not None:
        if attn_bias is not None:
            warnings.warn(
                "key_padding_mask beside attn_bias costs an extra pass over the scores: fold it into attn_bias",
                stacklevel=2,
            )
        weight = weight.masked_fill(~key_padding_mask.view(key_padding_mask.shape[0], 1, 1, -1), lowest)
    if is_causal and seqlen_q != 1:
        seen = semantics.visible_mask(1, seqlen_q, seqlen_k, device=q.device)
        weight = weight.masked_fill(~seen[:, None], lowest)
    weight = torch.softmax(weight, dim=-1)
    if dropout_p:
        weight = torch.nn.functional.dropout(weight, p=dropout_p, training=training)
    out = rearrange(weight.to(v.dtype) @ v, "b h s d -> b s (h d)")
    return out, (weight if needs_weights else None), past_key_value


def _append(past_key_value, key: Tensor, value: Tensor, kv_heads: int):
    """k [B, Hkv, D, T] and v [B, Hkv, T, D] with the cache in front, and the new cache slot."""
    v = rearrange(value, "b s (h d) -> b h s d", h=kv_heads)
    if isinstance(past_key_value, CacheSlot):
        k, v = past_key_value.append(rearrange(key, "b s (h d) -> b h s d", h=kv_heads), v)
        return k.transpose(2, 3), v, past_key_value
    k = rearrange(key, "b s (h d) -> b h d s", h=kv_heads)
    if past_key_value is None:
        return k, v, None
    if len(past_key_value):
        check_layout(past_key_value, "torch")
        k = torch.cat([past_key_value[0], k], dim=3)
        v = torch.cat([past_key_value[1], v], dim=2)
    return k, v, (k, v)
