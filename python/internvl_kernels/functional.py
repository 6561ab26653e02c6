"""The documented Python calls. No numerics: masks to key terms, one backend choice, one operator call."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, masks


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    prefix_len: Tensor | int | None = None,
    key_range: Tensor | None = None,
    query_start: Tensor | None = None,
    bidirectional_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_flags: Tensor | None = None,
    segment_ids: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softmax_scale: float | None = None,
    window: int = 0,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Prefix-masked, ALiBi-biased multi-head, grouped-query or multi-query attention.

    out[b,i,h] = sum_j softmax_j(score[b,h,i,j]) * v[b,j,h // (Hq / Hkv)],
    score = softmax_scale * <q, k> - alibi_slopes[h] * |p - j| over the visible keys j; ``visible`` and the
    query position p are defined in ``semantics.py``.

    Args:
        q: [B, Sq, Hq, D] fp32, bf16 or fp16; any strides with a contiguous last dim; D from 1 to 256.
        k, v: [B, Sk, Hkv, D] like q; Hq a multiple of Hkv.
        prefix_len: [B] int32 (or one int), in keys; key j is visible to every query when j < prefix_len.
            0 = causal, >= Sk = bidirectional. Default: causal.
        key_range: [B, 2] int32, the real keys [start, end) of each row. Default: all.
        query_start: [B] int32, position of query row 0, in keys. Default: Sk - Sq.
        bidirectional_mask: [B, Sk] bool or int, 1 = visible to every query; instead of prefix_len.
        key_padding_mask: [B, Sk] bool or int, 1 = real key; instead of key_range.
        key_flags: [B, Sk] uint8, both masks at once: bit 0 = real key, bit 1 = visible to every query; instead of
            the four arguments above.
        segment_ids: [B, Sk] int32, packed documents: queries see keys of their own segment only.
        alibi_slopes: [Hq] fp32; learnable. Default: no bias.
        softmax_scale: finite float, applied before the bias. Default: 1 / sqrt(D).
        window: int, in keys; a causal key is visible when p - j < window; 0 = no window.
        backend: name from ``backends.BACKENDS``. Default: INTERNVL_BACKEND, else the first that runs.
        return_lse: also return the log-sum-exp.
    Returns: out [B, Sq, Hq, D] like q; with return_lse also lse [B, Hq, Sq] fp32, natural log, bias
        included, -inf on rows without a visible key (their out and gradients are 0). Both differentiable.
    Raises: ValueError (shape, dtype, device, value); NotImplementedError (no backend, with each reason).
    Numerics: fp32 accumulation; error <= 2x eager attention in the same dtype.
    Backends: triton, cpu, reference (cuda: see ``python -m internvl_kernels.env``).
    Source: Dao 2023 (tiling), Press et al. 2022 (ALiBi), MPT (mask, slopes).
    """
    if isinstance(prefix_len, int):
        prefix_len = min(max(prefix_len, 0), k.shape[1])  # beyond the keys means the same, and fits int32
        prefix_len = torch.full((q.shape[0],), prefix_len, dtype=torch.int32, device=q.device)
    if bidirectional_mask is not None or key_padding_mask is not None:
        if key_flags is not None:
            raise ValueError("prefix_attention: key_flags and boolean masks were both given; pass one of them")
        prefix_len, key_range, key_flags = masks.key_terms(
            bidirectional_mask, key_padding_mask, prefix_len, key_range, tuple(k.shape[:2])
        )
    out, lse = backends.select("prefix_attn", q, backend)(
        q,
        k,
        v,
        prefix_len=prefix_len,
        key_range=key_range,
        query_start=query_start,
        key_flags=key_flags,
        segment_ids=segment_ids,
        alibi_slopes=alibi_slopes,
        softmax_scale=softmax_scale,
        window=window,
    )
    return (out, lse) if return_lse else out


def clip_qk_layernorm(
    qkv: Tensor,
    q_width: int,
    k_width: int,
    clip: float | None = None,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clamp a fused QKV projection, split it, and layer-norm q and k, in one pass.

    x = clamp(qkv, -clip, clip); q = LN(x[..., :q_width]); k = LN(x[..., q_width:q_width + k_width]); v = rest.

    Args:
        qkv: [..., q_width + 2 * k_width] fp32, bf16 or fp16, last dim contiguous.
        q_width, k_width: widths in elements; q and k are normalised over their full width, before any head split.
        clip: positive bound of the clamp (gradient 0 outside). None: off.
        q_weight, q_bias: [q_width] fp32 or qkv's dtype; weight None: no norm; bias None: none.
        k_weight, k_bias: [k_width], likewise.
        eps: added to the variance.
        backend: as in ``prefix_attention``.
    Returns: q [..., q_width], k [..., k_width], v [..., k_width] in qkv's dtype, contiguous.
    Raises: ValueError (shape, dtype, device, value); NotImplementedError (no backend, with each reason).
    Numerics: fp32 statistics (two passes over the row in cache), one rounding at the end.
    Backends: triton, cpu, reference.
    Source: MPT attention (clip_qkv, qk_ln), Ba et al. 2016.
    """
    run = backends.select("clip_qk_layernorm", qkv, backend)
    return run(qkv, q_width, k_width, clip, q_weight, q_bias, k_weight, k_bias, eps)[:3]
