"""What a call knows of its key tiles before the attention kernels run: O(seqlen_k) memory, no host synchronisation.

``key_summary_kernel``, for key flags and segments, program (tile, b):
    summary[b, tile] = (flag bits, lowest segment, highest segment, 0), see ``tiles.py``;
    used[b, j] = some query sees key j, under segments (the other mask terms are decided where they are read).
``key_norms_kernel``, for distance pruning, program (tile, b * heads_kv + h):
    norms[b, h, tile] = the largest |k_j| of the tile's used keys, by ``prune_norm``; infinite where k or v is not
    finite, so that NaN reaches every row that sees it.
"""

import triton
import triton.language as tl

from . import mask
from .prune import prune_norm
from .tiles import (
    ALL_BIDIRECTIONAL,
    ALL_VALID,
    ANY_BIDIRECTIONAL,
    ANY_VALID,
    SUMMARY_COLUMNS,
    keys_in_reach,
    row_terms,
)


@triton.jit
def _flag_bits(flags, inside):
    valid = inside & mask.flag_valid(flags)
    open_valid = valid & mask.flag_bidirectional(flags)
    any_valid = tl.max(valid.to(tl.int32), 0)
    all_valid = tl.min(valid.to(tl.int32), 0)
    any_open = tl.max(open_valid.to(tl.int32), 0)
    all_open = any_valid & tl.min((open_valid | ~valid).to(tl.int32), 0)
    return any_valid * ANY_VALID + all_valid * ALL_VALID + any_open * ANY_BIDIRECTIONAL + all_open * ALL_BIDIRECTIONAL


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "window", "terms"])
def key_summary_kernel(
    summary_ptr, used_ptr, prefix_len_ptr, key_range_ptr, query_start_ptr, flags_ptr, segment_ids_ptr,
    seqlen_q, seqlen_k, window, terms,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, FLAGS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = j < seqlen_k
    row = summary_ptr + (b * tl.num_programs(0) + tile) * SUMMARY_COLUMNS
    first, prefix_len, _, _ = row_terms(prefix_len_ptr, key_range_ptr, query_start_ptr, terms, b, seqlen_q, seqlen_k)
    if FLAGS:
        flags = tl.load(flags_ptr + b * seqlen_k + j, mask=inside, other=0).to(tl.int32)
        tl.store(row, _flag_bits(flags, inside))
        bidirectional = mask.flag_bidirectional(flags)
    else:
        tl.store(row, 0)
        bidirectional = mask.bidirectional_in_prefix(j, prefix_len)
    if SEGMENTS:
        ids = segment_ids_ptr + b * seqlen_k
        own = tl.load(ids + j, mask=inside, other=0)
        tl.store(row + 1, tl.min(tl.where(inside, own, 2147483647), 0))
        tl.store(row + 2, tl.max(tl.where(inside, own, -2147483648), 0))
        used = tl.zeros((BLOCK_N,), tl.int32)
        begin = tl.maximum(first, 0)
        stop = tl.minimum(first + seqlen_q, seqlen_k)
        for p0 in range(begin, stop, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            segment = tl.load(ids + p, mask=p < stop, other=0)
            seen = mask.visible(
                (p < stop)[:, None],
                segment[:, None] == own[None, :],
                bidirectional[None, :],
                mask.causal(p[:, None], j[None, :], window),
            )
            used |= tl.max(seen.to(tl.int32), 0)
        tl.store(used_ptr + b * seqlen_k + j, used.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "window", "terms"])
def key_norms_kernel(
    norms_ptr, k_ptr, v_ptr, used_ptr, prefix_len_ptr, key_range_ptr, query_start_ptr, flags_ptr,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    heads_kv, seqlen_q, seqlen_k, window, terms,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    FLAGS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    bh = tl.program_id(1)
    b = (bh // heads_kv).to(tl.int64)
    h = (bh % heads_kv).to(tl.int64)
    first, prefix_len, start, end = row_terms(
        prefix_len_ptr, key_range_ptr, query_start_ptr, terms, b, seqlen_q, seqlen_k
    )
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    reach, _, _ = keys_in_reach(
        j, first, first + seqlen_q - 1, prefix_len, start, end, window,
        flags_ptr + b * seqlen_k, used_ptr + b * seqlen_k, seqlen_k, FLAGS, SEGMENTS,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    keep = reach[:, None] & (d < HEAD_DIM)[None, :]
    at_k = k_ptr + b * stride_kb + h * stride_kh + j[:, None].to(tl.int64) * stride_ks + d[None, :]
    at_v = v_ptr + b * stride_vb + h * stride_vh + j[:, None].to(tl.int64) * stride_vs + d[None, :]
    k = tl.load(at_k, mask=keep, other=0.0).to(tl.float32)
    v = tl.load(at_v, mask=keep, other=0.0).to(tl.float32)
    norm = prune_norm(tl.sum(k * k, 1))
    finite = (norm < float("inf")) & (tl.max(tl.where(tl.abs(v) < float("inf"), 0, 1), 1) == 0)
    largest = tl.max(tl.where(finite, norm, float("inf")), 0)
    tl.store(norms_ptr + bh.to(tl.int64) * tl.num_programs(0) + tile, largest)
