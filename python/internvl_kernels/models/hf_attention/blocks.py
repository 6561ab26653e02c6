"""Blocks that see each other in both directions inside a causal sequence (Gemma 3's images), from three fused calls.

    A = causal keys          B = keys of the query's own block          C = those of B that are causal
    out = (e^a A + e^b B - e^c C) / (e^a + e^b - e^c)                   a, b, c: the log-sum-exp of each call

B outside of C is the part that causal attention misses. C is inside A and B, so nothing cancels: the denominator is at
least as large as its largest term. A query in no block sees nothing in B and C, which then weigh 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import semantics
from ...functional import prefix_attention
from .carrier import KeyCarrier


def attend_with_blocks(
    q: Tensor, k: Tensor, v: Tensor, carrier: KeyCarrier, window: int, past_window: int, terms: dict
) -> Tensor:
    """out [B, Sq, Hq, D].

    window: of A, in keys. past_window: of C; equal to ``window`` when every key of the own block is visible, 0 when the
    window also limits the block's past keys.
    """
    flags, blocks = carrier.key_flags, carrier.block_ids
    in_block = flags * (blocks >= 0)
    full = in_block * (semantics.FLAG_VALID | semantics.FLAG_BIDIRECTIONAL)
    calls = (
        {"key_flags": flags, "segment_ids": carrier.segment_ids, "window": window},
        {"key_flags": full, "segment_ids": blocks},
        {"key_flags": in_block, "segment_ids": blocks, "window": past_window},
    )
    outs, lses = zip(*(prefix_attention(q, k, v, **call, **terms, return_lse=True) for call in calls), strict=True)
    peak = torch.stack(lses).amax(0).detach()
    peak = torch.where(peak == -torch.inf, 0, peak)
    a, b, c = ((lse - peak).exp() for lse in lses)  # [B, Hq, Sq]
    total = a + b - c
    empty = total <= 0  # no visible key
    total = total.masked_fill(empty, 1)
    weights = (a / total, b / total, -c / total)
    out = sum(w.transpose(1, 2)[..., None] * o.float() for w, o in zip(weights, outs, strict=True))
    return out.to(q.dtype)
