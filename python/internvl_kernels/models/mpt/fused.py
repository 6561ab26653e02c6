"""``attn_impl='flash'`` and ``'triton'``: the compiled kernels behind the original function signatures."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ...functional import prefix_attention
from .bias import AttnBias
from .cache import CacheSlot, check_layout
from .dense_bias import recover


def flash_attn_fn(
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
    """Attention through the compiled kernels of the tensors' device; bias, prefix and padding included.

    Query row i stands at position i + Sk - Sq. A row without a visible key gives 0.

    Args:
        query: [B, Sq, H * D]; fp32, bf16 or fp16; D up to 256.
        key, value: [B, S, Hkv * D], Hkv = 1 with ``multiquery``, else ``n_heads``.
        past_key_value: a slot of ``cache.py``: None, (), (k, v) of [B, T, Hkv * D] or ``CacheSlot``.
        softmax_scale: applied before the bias. Default: 1 / sqrt(D).
        attn_bias: ``AttnBias``, or a dense tensor that is exactly ALiBi, a prefix, padding or a segment mask
            (``dense_bias.recover`` reads it back, so prefer ``AttnBias``).
        key_padding_mask: [B, Sk] bool, True = real key.
        is_causal: hide the future.
    Returns: out [B, Sq, H * D] like query; None (no weights); the cache slot or None.
    Raises: NotImplementedError (dropout while training, needs_weights, another dense bias, no backend);
        ValueError (shape, dtype, device, value).
    """
    return _fused(
        None,
        *(query, key, value, n_heads, past_key_value, softmax_scale, attn_bias, key_padding_mask),
        *(is_causal, dropout_p, training, needs_weights, multiquery),
    )


def triton_flash_attn_fn(
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
    """``flash_attn_fn`` on the Triton backend for CUDA tensors; on CPU tensors the compiled CPU kernel.

    Arguments, results and errors are those of ``flash_attn_fn``.
    """
    return _fused(
        "triton" if query.is_cuda else None,
        *(query, key, value, n_heads, past_key_value, softmax_scale, attn_bias, key_padding_mask),
        *(is_causal, dropout_p, training, needs_weights, multiquery),
    )


def _fused(
    backend: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    n_heads: int,
    past_key_value,
    softmax_scale: float | None,
    attn_bias: Tensor | AttnBias | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    training: bool,
    needs_weights: bool,
    multiquery: bool,
):
    if dropout_p and training:
        raise NotImplementedError(
            f"attention dropout is {dropout_p} while training; the fused kernels have no dropout: "
            "set attn_pdrop to 0 or use attn_impl='torch'"
        )
    if needs_weights:
        raise NotImplementedError(
            "needs_weights is True; the fused kernels never form the weights: use attn_impl='torch'"
        )
    q = rearrange(query, "b s (h d) -> b s h d", h=n_heads)
    k, v, past_key_value = _append(past_key_value, key, value, 1 if multiquery else n_heads)
    if attn_bias is None:
        attn_bias = AttnBias()
    elif isinstance(attn_bias, Tensor):
        attn_bias = recover(attn_bias, n_heads, q.shape[0], q.shape[1], k.shape[1], is_causal)
    arguments = attn_bias.with_padding(key_padding_mask).kernel_arguments(is_causal, k.shape[1])
    out = prefix_attention(q, k, v, softmax_scale=softmax_scale, backend=backend, **arguments)
    return rearrange(out, "b s h d -> b s (h d)"), None, past_key_value


def _append(past_key_value, key: Tensor, value: Tensor, kv_heads: int):
    """k, v [B, T, Hkv, D] with the cache in front (views, no copy beyond the append), and the new cache slot."""
    if isinstance(past_key_value, CacheSlot):
        k = rearrange(key, "b s (h d) -> b h s d", h=kv_heads)
        v = rearrange(value, "b s (h d) -> b h s d", h=kv_heads)
        k, v = past_key_value.append(k, v)
        return k.transpose(1, 2), v.transpose(1, 2), past_key_value
    if past_key_value is not None:
        if len(past_key_value):
            check_layout(past_key_value, "flash")
            key = torch.cat([past_key_value[0], key], dim=1)
            value = torch.cat([past_key_value[1], value], dim=1)
        past_key_value = (key, value)
    k = rearrange(key, "b s (h d) -> b s h d", h=kv_heads)
    v = rearrange(value, "b s (h d) -> b s h d", h=kv_heads)
    return k, v, past_key_value
