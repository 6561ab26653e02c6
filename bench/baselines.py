"""What a user would pick instead: dense bias and mask, built once, outside the timing."""

from __future__ import annotations

import torch
from internvl_kernels import semantics
from torch import Tensor

from .cases import AttentionCase


def dense_bias(case: AttentionCase, dtype: torch.dtype, prefix_len: Tensor, alibi_slopes: Tensor) -> Tensor:
    """ALiBi and the prefix mask as one additive tensor [1, H, Sq, Sk] in ``dtype``."""
    seen = semantics.visible_mask(1, case.seqlen_q, case.seqlen_k, prefix_len=prefix_len[:1])
    p = semantics.positions(1, case.seqlen_q, case.seqlen_k, None)
    bias = semantics.bias_matrix(alibi_slopes, p, case.seqlen_k)
    return bias.masked_fill(~seen[:, None], -torch.inf).to(dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """``scaled_dot_product_attention`` with the dense bias; [B, S, H, D] in and out."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Matmul, softmax, matmul with the dense bias; the S x S scores exist."""
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2) if group > 1 else t for t in (k, v))
    score = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5 + bias
    return torch.einsum("bhij,bjhd->bihd", score.softmax(-1), v)


PEERS = {"sdpa": sdpa, "eager": eager}
