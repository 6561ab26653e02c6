"""Attention pooling: one query, the mean of the tokens, over all of them."""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from ...functional import prefix_attention


class CrossAttention(nn.Module):
    """Attention of x over other keys and values; biases of q, k and v are parameters of their own.

    Args:
        dim: width of all inputs. out_dim: width of the result, default ``dim``.
        attn_head_dim: width of one head, default ``dim // num_heads``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn_head_dim: int | None = None,
        out_dim: int | None = None,
    ):
        super().__init__()
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"dim is {dim}; it must be a multiple of num_heads = {num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if attn_head_dim is None else attn_head_dim
        width = self.head_dim * num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.attn_drop = attn_drop
        self.q = nn.Linear(dim, width, bias=False)
        self.k = nn.Linear(dim, width, bias=False)
        self.v = nn.Linear(dim, width, bias=False)
        for name in ("q_bias", "k_bias", "v_bias"):
            self.register_parameter(name, nn.Parameter(torch.zeros(width)) if qkv_bias else None)
        self.proj = nn.Linear(width, dim if out_dim is None else out_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """x [B, Sq, dim], k, v [B, Sk, dim] (default x) -> [B, Sq, out_dim]."""
        if self.attn_drop and self.training:
            raise NotImplementedError(f"attn_drop is {self.attn_drop} while training; the kernels have no dropout")
        k, v = x if k is None else k, x if v is None else v
        inputs = ((x, self.q, self.q_bias), (k, self.k, self.k_bias), (v, self.v, self.v_bias))
        q, k, v = (
            rearrange(nn.functional.linear(t, project.weight, bias), "b s (h d) -> b s h d", d=self.head_dim)
            for t, project, bias in inputs
        )
        out = prefix_attention(q, k, v, prefix_len=k.shape[1], softmax_scale=self.scale)
        return self.proj_drop(self.proj(rearrange(out, "b s h d -> b s (h d)")))


class AttentiveBlock(nn.Module):
    """``CrossAttention`` of separately normalised queries, keys and values."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),  # noqa: B008
        attn_head_dim: int | None = None,
        out_dim: int | None = None,
    ):
        super().__init__()
        if drop_path:
            raise NotImplementedError(f"drop_path is {drop_path}; the pooling block has no residual branch to drop")
        self.norm1_q = norm_layer(dim)
        self.norm1_k = norm_layer(dim)
        self.norm1_v = norm_layer(dim)
        self.cross_attn = CrossAttention(
            dim, num_heads, qkv_bias, qk_scale, attn_drop, drop, attn_head_dim=attn_head_dim, out_dim=out_dim
        )

    def forward(self, x_q: Tensor, x_kv: Tensor, pos_q=0, pos_k=0) -> Tensor:
        """x_q [B, Sq, dim], x_kv [B, Sk, dim]; positions are added before the norms of queries and keys."""
        return self.cross_attn(self.norm1_q(x_q + pos_q), self.norm1_k(x_kv + pos_k), self.norm1_v(x_kv))


class AttentionPoolingBlock(AttentiveBlock):
    """x [B, S, dim] -> [B, out_dim]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean(1, keepdim=True), x).squeeze(1)
