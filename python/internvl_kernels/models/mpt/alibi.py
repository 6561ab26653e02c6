"""ALiBi slopes and the dense biases of the eager path, under the names of the original MPT code."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import semantics

ATTN_IMPLS = ("torch", "flash", "triton")


def gen_slopes(n_heads: int, alibi_bias_max: float = 8, device: torch.device | str | None = None) -> Tensor:
    """ALiBi slopes, fp32 [1, H, 1, 1]; the formula stands in ``semantics.mpt_alibi_slopes``."""
    return semantics.mpt_alibi_slopes(n_heads, alibi_bias_max).to(device).view(1, n_heads, 1, 1)


def build_alibi_bias(
    n_heads: int,
    seq_len: int,
    full: bool = False,
    alibi_bias_max: float = 8,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Dense ALiBi bias; fp32 product of int32 distances, cast to ``dtype`` at the very end.

    Returns: [1, H, 1, S] with ``slope * (j - (S - 1))``; with ``full`` [1, H, S, S] with ``-slope * |i - j|``.
    """
    j = torch.arange(seq_len, dtype=torch.int32, device=device)
    p = j.view(seq_len, 1) if full else seq_len - 1
    return semantics.alibi_bias(gen_slopes(n_heads, alibi_bias_max, device), p, j.view(1, 1, 1, seq_len)).to(dtype)


def check_attn_impl(attn_impl: str) -> None:
    """Raises ValueError for an unknown implementation."""
    if attn_impl not in ATTN_IMPLS:
        raise ValueError(f"attn_impl is {attn_impl!r}; allowed: {', '.join(map(repr, ATTN_IMPLS))}")


def attn_bias_shape(
    attn_impl: str,
    n_heads: int,
    seq_len: int,
    alibi: bool,
    prefix_lm: bool,
    causal: bool,
    use_sequence_id: bool,
) -> tuple[int, int, int, int] | None:
    """Shape of the dense bias a caller has to allocate for ``build_attn_bias``; None when there is none.

    Raises: ValueError (unknown ``attn_impl``).
    """
    check_attn_impl(attn_impl)
    if attn_impl == "flash":
        return None
    if alibi:
        one_row = causal and not prefix_lm and not use_sequence_id
        return (1, n_heads, 1 if one_row else seq_len, seq_len)
    if prefix_lm or use_sequence_id:
        return (1, 1, seq_len, seq_len)
    return None


def build_attn_bias(
    attn_impl: str,
    attn_bias: Tensor | None,
    n_heads: int,
    seq_len: int,
    causal: bool = False,
    alibi: bool = False,
    alibi_bias_max: float = 8,
) -> Tensor | None:
    """``attn_bias`` plus ALiBi (a new tensor, in its dtype and device); unchanged without ALiBi; None for flash.

    Raises: ValueError (unknown ``attn_impl``).
    """
    check_attn_impl(attn_impl)
    if attn_impl == "flash":
        return None
    if not alibi:
        return attn_bias
    where = {"device": attn_bias.device, "dtype": attn_bias.dtype}
    return attn_bias + build_alibi_bias(n_heads, seq_len, not causal, alibi_bias_max, **where)
