"""Eager prefix attention on top of ``semantics.py``: any device, any float dtype, dense memory.

The oracle of the tests (run it in float64) and the ``reference`` backend. It is differentiable by
ordinary autograd and repeats no mask rule of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import semantics


def prefix_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    prefix_len: Tensor | None = None,
    key_range: Tensor | None = None,
    query_start: Tensor | None = None,
    key_flags: Tensor | None = None,
    segment_ids: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softmax_scale: float | None = None,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as ``torch.ops.internvl.prefix_attn``.

    Scores and softmax run in fp32 (float64 for float64 inputs); P is rounded to ``q.dtype`` before P·V,
    as eager attention in that dtype does.
    Returns: out [B, Sq, Hq, D] in q.dtype; lse [B, Hq, Sq] fp32 (float64 for float64 inputs).
    """
    batch, seqlen_q, heads_q, head_dim = q.shape
    seqlen_k, heads_kv = k.shape[1], k.shape[2]
    compute = torch.promote_types(q.dtype, torch.float32)
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    p = semantics.positions(batch, seqlen_q, seqlen_k, query_start, q.device)
    seen = semantics.visible_mask(
        batch,
        seqlen_q,
        seqlen_k,
        prefix_len=prefix_len,
        key_range=key_range,
        query_start=query_start,
        key_flags=key_flags,
        segment_ids=segment_ids,
        window=window,
        device=q.device,
    )
    # What stands in a slot that no query sees never matters, not even NaN.
    unused_key = ~seen.any(1)[:, :, None, None]
    unused_query = ~seen.any(2)[:, :, None, None]
    group = heads_q // heads_kv
    q_rows = q.masked_fill(unused_query, 0).transpose(1, 2)  # [B, Hq, Sq, D]
    k_cols = k.masked_fill(unused_key, 0).repeat_interleave(group, dim=2).permute(0, 2, 3, 1)  # [B, Hq, D, Sk]
    v_rows = v.masked_fill(unused_key, 0).repeat_interleave(group, dim=2).transpose(1, 2)  # [B, Hq, Sk, D]

    score = (q_rows @ k_cols).to(compute) * scale
    if alibi_slopes is not None:
        score = score + semantics.bias_matrix(alibi_slopes.to(compute), p, seqlen_k)
    score = score.masked_fill(~seen[:, None], -torch.inf)
    empty = ~seen.any(2)[:, None, :, None]  # [B, 1, Sq, 1]
    # Rows without a visible key: softmax of zeros keeps NaN out of the gradient, then P is set to 0.
    probs = torch.softmax(score.masked_fill(empty, 0), dim=-1).masked_fill(~seen[:, None], 0)
    lse = torch.logsumexp(score.masked_fill(empty, 0), dim=-1).masked_fill(empty[..., 0], -torch.inf)
    if seqlen_k == 0:
        lse = torch.full((batch, heads_q, seqlen_q), -torch.inf, dtype=compute, device=q.device)
    out = probs.to(q.dtype) @ v_rows
    return out.transpose(1, 2).contiguous(), lse


def clip_qk_layernorm(
    qkv: Tensor,
    q_width: int,
    k_width: int,
    clip: float | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clamp the fused projection, split it, layer-norm q and k over their full width.

    Statistics in fp32 (float64 for float64 inputs); results in ``qkv.dtype``.
    """
    x = qkv if clip is None else qkv.clamp(-clip, clip)
    q, k, v = x.split([q_width, k_width, qkv.shape[-1] - q_width - k_width], dim=-1)
    return _layernorm(q, q_weight, q_bias, eps), _layernorm(k, k_weight, k_bias, eps), v


def _layernorm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    compute = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(compute)
    return torch.nn.functional.layer_norm(x.to(compute), x.shape[-1:], weight.to(compute), bias, eps).to(x.dtype)
