"""The executable specification of prefix-masked, ALiBi-biased attention.

Plain torch on integer positions, elementwise, smaller than any kernel. ``csrc/common/mask.h`` (and every
later mirror) repeats these functions with the same names, argument order and integer arithmetic;
``tests/test_semantics.py`` holds the mirrors to this file exhaustively. Kernels, the reference, the FLOP
counter and the documentation call these functions: the causal comparison is written here and in the
mirrors, nowhere else.

Vocabulary: ``p`` is the absolute position of a query row, ``j`` an absolute key index, both counted in
keys. ``window == 0`` means no window. All functions broadcast.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLAG_VALID = 1
FLAG_BIDIRECTIONAL = 2

TILE_EMPTY = 0
TILE_PARTIAL = 1
TILE_FULL = 2


def query_position(query_start, i):
    """Position of query row ``i``: ``query_start + i``."""
    return query_start + i


def valid_in_range(j, start, end):
    """Key ``j`` is real: ``start <= j < end`` (left and right padding)."""
    return (j >= start) & (j < end)


def bidirectional_in_prefix(j, prefix_len):
    """Key ``j`` belongs to the prefix: every query may see it."""
    return j < prefix_len


def flag_valid(flags):
    """Bit 0 of the general form's key flags."""
    return (flags & FLAG_VALID) != 0


def flag_bidirectional(flags):
    """Bit 1 of the general form's key flags."""
    return (flags & FLAG_BIDIRECTIONAL) != 0


def causal(p, j, window):
    """Key ``j`` is not in the future of position ``p`` and not older than the window."""
    in_window = (p - j < window) | (window == 0)
    return (j <= p) & in_window


def visible(valid, same_segment, bidirectional, is_causal):
    """The mask rule of the whole package."""
    return valid & same_segment & (bidirectional | is_causal)


def alibi_bias(slope, p, j):
    """``-slope * |p - j|``: one fp32 multiplication, so one rounding."""
    return -slope * abs(p - j)


def causal_reaches(p_lo, p_hi, j_lo, j_hi, window):
    """Some position in [p_lo, p_hi] sees some of the causal keys [j_lo, j_hi). Python integers."""
    return j_lo <= p_hi and (window == 0 or p_lo - (j_hi - 1) < window)


def causal_covers(p_lo, p_hi, j_lo, j_hi, window):
    """Every position in [p_lo, p_hi] sees every one of the causal keys [j_lo, j_hi). Python integers."""
    return j_hi - 1 <= p_lo and (window == 0 or p_hi - j_lo < window)


def visible_key_end(p_hi, prefix_len, end):
    """One past the last key that a query at or below position ``p_hi`` can see (compact form)."""
    return min(end, max(prefix_len, p_hi + 1))


def causal_key_begin(p_lo, window):
    """The first key that some query at or above position ``p_lo`` can see causally."""
    return 0 if window == 0 else max(0, p_lo - window + 1)


def classify_tile(p_lo, p_hi, j_lo, j_hi, prefix_len, start, end, window):
    """Class of the tile of query positions ``[p_lo, p_hi]`` (all of them) and keys ``[j_lo, j_hi)``.

    Exact for the compact form without segments. Python integers; both sides are non-empty.
    """
    a, b = max(j_lo, start), min(j_hi, end)
    if a >= b:
        return TILE_EMPTY
    if not bidirectional_in_prefix(a, prefix_len) and not causal_reaches(p_lo, p_hi, a, b, window):
        return TILE_EMPTY
    if a > j_lo or b < j_hi:
        return TILE_PARTIAL
    if bidirectional_in_prefix(j_hi - 1, prefix_len):
        return TILE_FULL
    return TILE_FULL if causal_covers(p_lo, p_hi, max(j_lo, prefix_len), j_hi, window) else TILE_PARTIAL


def classify_tile_flags(p_lo, p_hi, j_lo, j_hi, any_valid, all_valid, any_bidirectional, all_bidirectional, window):
    """Class under key flags, from what the tile's flags look like as a whole; conservative.

    ``any``/``all`` of bidirectional are over the valid keys of the tile.
    """
    if not any_valid:
        return TILE_EMPTY
    if not any_bidirectional and not causal_reaches(p_lo, p_hi, j_lo, j_hi, window):
        return TILE_EMPTY
    if not all_valid:
        return TILE_PARTIAL
    if all_bidirectional or causal_covers(p_lo, p_hi, j_lo, j_hi, window):
        return TILE_FULL
    return TILE_PARTIAL


def classify_tile_segments(q_lo, q_hi, k_lo, k_hi):
    """Class under segments: queries hold ids in [q_lo, q_hi], keys in [k_lo, k_hi]; conservative."""
    if q_hi < k_lo or k_hi < q_lo:
        return TILE_EMPTY
    return TILE_FULL if q_lo == q_hi and k_lo == k_hi else TILE_PARTIAL


def combine_classes(a, b):
    """Class of a tile under two rules at once."""
    if TILE_EMPTY in (a, b):
        return TILE_EMPTY
    return TILE_FULL if a == b == TILE_FULL else TILE_PARTIAL


def visible_mask(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    *,
    prefix_len: Tensor | None = None,
    key_range: Tensor | None = None,
    query_start: Tensor | None = None,
    key_flags: Tensor | None = None,
    segment_ids: Tensor | None = None,
    window: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """``visible(b, i, j)`` as a bool tensor [B, Sq, Sk]; arguments as in ``prefix_attention``."""
    j = torch.arange(seqlen_k, device=device, dtype=torch.int64)
    p = positions(batch, seqlen_q, seqlen_k, query_start, device)
    if key_flags is not None:
        valid, bidirectional = flag_valid(key_flags), flag_bidirectional(key_flags)
    else:
        valid = torch.ones(batch, seqlen_k, dtype=torch.bool, device=device)
        if key_range is not None:
            valid = valid_in_range(j, key_range[:, 0, None].long(), key_range[:, 1, None].long())
        bidirectional = torch.zeros(batch, seqlen_k, dtype=torch.bool, device=device)
        if prefix_len is not None:
            bidirectional = bidirectional_in_prefix(j, prefix_len[:, None].long())
    same_segment = torch.ones((), dtype=torch.bool, device=device)
    if segment_ids is not None:
        inside = (p >= 0) & (p < seqlen_k)
        own = segment_ids.long().gather(1, p.clamp(0, max(seqlen_k - 1, 0))) if seqlen_k else p
        same_segment = inside[:, :, None] & (own[:, :, None] == segment_ids[:, None, :])
    seen = visible(valid[:, None, :], same_segment, bidirectional[:, None, :], causal(p[:, :, None], j, window))
    return seen.expand(batch, seqlen_q, seqlen_k)


def positions(batch: int, seqlen_q: int, seqlen_k: int, query_start: Tensor | None, device=None) -> Tensor:
    """int64 query positions [B, Sq]; the default start lets the last query meet the last key."""
    i = torch.arange(seqlen_q, device=device, dtype=torch.int64)
    if query_start is None:
        return query_position(seqlen_k - seqlen_q, i).expand(batch, seqlen_q)
    return query_position(query_start.long()[:, None], i)


def bias_matrix(alibi_slopes: Tensor, p: Tensor, seqlen_k: int) -> Tensor:
    """ALiBi bias [B, H, Sq, Sk] in the dtype of ``alibi_slopes`` for positions ``p`` [B, Sq]."""
    j = torch.arange(seqlen_k, device=p.device, dtype=torch.int64)
    slope = alibi_slopes[None, :, None, None]
    return alibi_bias(slope, p[:, None, :, None], j)


def count_visible_pairs(seqlen_q: int, seqlen_k: int, *, batch: int = 1, **mask) -> int:
    """Visible (query, key) pairs of one head: the unit of the package's FLOP figures.

    Row by row in O(B * (Sq + Sk)) memory, so that long sequences can be counted.
    """
    total = 0
    for b in range(batch):
        own = {k: (v[b : b + 1] if isinstance(v, Tensor) else v) for k, v in mask.items()}
        start = own.pop("query_start", None)
        first = int(start[0]) if start is not None else seqlen_k - seqlen_q
        for i0 in range(0, seqlen_q, 256):
            rows = min(256, seqlen_q - i0)
            chunk_start = torch.tensor([first + i0], dtype=torch.int64)
            total += int(visible_mask(1, rows, seqlen_k, query_start=chunk_start, **own).sum())
    return total


def mpt_alibi_slopes(n_heads: int, alibi_bias_max: float = 8) -> Tensor:
    """MPT's slopes, fp32 [H], before any use: ``2 ** -(i * alibi_bias_max / N)`` over the next power of two N.

    When H is no power of two the even-numbered entries come first (Press et al. 2022, as MPT orders them).
    """
    n = 1 << max(n_heads - 1, 0).bit_length()
    exponents = torch.arange(1, n + 1, dtype=torch.float32) * (alibi_bias_max / n)
    slopes = 1.0 / torch.pow(2, exponents)
    if n != n_heads:
        slopes = torch.cat([slopes[1::2], slopes[0::2]])[:n_heads]
    return slopes
