"""Eager attention for what the kernels do not express: dropout, returned weights, soft caps, sinks, dense masks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import semantics


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    alibi_slopes: Tensor | None = None,
    query_start: Tensor | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    head_mask: Tensor | None = None,
    output_attentions: bool = False,
    **_,
) -> tuple[Tensor, Tensor | None]:
    """Scores in fp32, softmax over the visible keys and the sinks ``s_aux`` [Hq], weights rounded to the values' dtype.

    Args:
        query_start: [B] int32, position of the first query, for the bias. Default: the last query meets the last key.
        mask: bool (True = visible; a row without a visible key gives 0) or additive; broadcasts to [B, Hq, Sq, Sk].
    Returns: out [B, Sq, Hq, D]; weights [B, Hq, Sq, Sk] with ``output_attentions``, else None.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) if group > 1 else x for x in (key, value))
    score = (query @ key.transpose(2, 3)).float() * scaling
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    if alibi_slopes is not None:
        p = semantics.positions(query.shape[0], query.shape[2], key.shape[2], query_start, query.device)
        score = score + semantics.bias_matrix(alibi_slopes.float(), p, key.shape[2])
    if position_bias is not None:
        score = score + position_bias
    if mask is not None and mask.dtype == torch.bool:
        score = score.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        score = score + mask[..., : key.shape[2]]
    if s_aux is not None:
        sinks = s_aux.float().reshape(1, -1, 1, 1).expand(*score.shape[:-1], 1)
        score = torch.cat([score, sinks], -1)
    empty = (score == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(score.masked_fill(empty, 0), -1).masked_fill(empty, 0)[..., : key.shape[2]]
    weights = F.dropout(weights.to(value.dtype), dropout)
    if head_mask is not None:
        weights = weights * head_mask
    out = (weights @ value).transpose(1, 2).contiguous()
    return out, weights if output_attentions else None
