"""Backward of prefix_attn: no atomics, every sum in a fixed order, O(seqlen) memory beyond the gradients.

With P = exp(score - lse), dP = dO·Vᵀ and dS = P (dP - delta), delta = rowsum(dO * out) - grad_lse:

    preprocess   program (query tile, b * heads_q + h): delta; per tile the largest |q| and the smallest lse (for
                 pruning), and the segment bounds (for tile classes)
    dkdv         program (key tile, b * heads_kv + h): dV = sum PᵀdO, dK = scale * sum dSᵀQ over the query tiles of
                 every query head of the group, one head after the other
    dq, slopes   ``prefix_attn_bwd_dq.py``

Tiles are classified CHUNK at a time and walked in two loops, masked and full, as in ``prefix_attn_fwd.py``; the
pruning bound is the tile's smallest lse. Keys that no query sees and queries that see no key count as zeros.
"""

import triton
import triton.language as tl

from . import mask
from .prune import prune_cutoff, prune_norm, prune_threshold, prune_tile, tile_distance
from .tiles import (
    LOG2E,
    NO_SEGMENT_HI,
    NO_SEGMENT_LO,
    dot,
    keys_in_reach,
    lowest,
    narrow,
    one_sided,
    own_segments,
    row_terms,
    summary_of,
    tile_class,
    visible_tile,
    word_of,
)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "terms"])
def bwd_preprocess_kernel(
    q_ptr, out_ptr, grad_out_ptr, lse_ptr, grad_lse_ptr, delta_ptr, query_norm_ptr, query_lse_ptr, query_segments_ptr,
    query_start_ptr, segment_ids_ptr,
    stride_qb, stride_qs, stride_qh, stride_ob, stride_os, stride_oh, stride_gb, stride_gs, stride_gh,
    heads_q, seqlen_q, seqlen_k, terms,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    GRAD_LSE: tl.constexpr, PRUNE: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads_q
    h = bh % heads_q
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = i < seqlen_q
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + bh * seqlen_q + i, mask=inside, other=-float("inf"))
    used = inside & (lse != -float("inf"))
    keep = used[:, None] & (d < HEAD_DIM)[None, :]
    step = i[:, None].to(tl.int64)
    out = tl.load(out_ptr + b * stride_ob + h * stride_oh + step * stride_os + d[None, :], mask=keep, other=0.0)
    grad = tl.load(grad_out_ptr + b * stride_gb + h * stride_gh + step * stride_gs + d[None, :], mask=keep, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + bh * seqlen_q + i, mask=used, other=0.0)
    tl.store(delta_ptr + bh * seqlen_q + i, delta, mask=inside)
    at = bh * tl.num_programs(0) + tile
    if PRUNE:
        q = tl.load(q_ptr + b * stride_qb + h * stride_qh + step * stride_qs + d[None, :], mask=keep, other=0.0)
        squares = tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)
        norm = prune_norm(tl.where(squares == squares, squares, float("inf")))
        tl.store(query_norm_ptr + at, tl.max(norm, 0))
        lse = tl.where(lse == lse, lse, -float("inf"))
        tl.store(query_lse_ptr + at, tl.min(tl.where(used, lse, float("inf")), 0))
    if SEGMENTS:
        has_start = (terms & 4) != 0
        first = tl.load(query_start_ptr + b, mask=has_start, other=0).to(tl.int64)
        first = tl.where(has_start, first, (seqlen_k - seqlen_q).to(tl.int64))
        p = mask.query_position(first, i)
        _, _, q_lo, q_hi = own_segments(segment_ids_ptr + b * seqlen_k, p, inside, seqlen_k)
        tl.store(query_segments_ptr + at * 2, q_lo)
        tl.store(query_segments_ptr + at * 2 + 1, q_hi)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "window", "terms", "row_tiles"])
def bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    prefix_len_ptr, key_range_ptr, query_start_ptr, flags_ptr, segment_ids_ptr, slopes_ptr,
    summary_ptr, used_ptr, query_norm_ptr, query_lse_ptr, query_segments_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh,
    heads_q, heads_kv, seqlen_q, seqlen_k, softmax_scale, window, terms, row_tiles,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, ALIBI: tl.constexpr, FLAGS: tl.constexpr, SEGMENTS: tl.constexpr, PRUNE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    bh = tl.program_id(1)
    b = (bh // heads_kv).to(tl.int64)
    head_kv = (bh % heads_kv).to(tl.int64)
    group = heads_q // heads_kv
    first, prefix_len, start, end = row_terms(
        prefix_len_ptr, key_range_ptr, query_start_ptr, terms, b, seqlen_q, seqlen_k
    )
    flags_ptr += b * seqlen_k
    used_ptr += b * seqlen_k
    segment_ids_ptr += b * seqlen_k
    j_lo = tile * BLOCK_N
    j_hi = j_lo + BLOCK_N
    columns = tl.arange(0, BLOCK_N)
    j = j_lo + columns
    d = tl.arange(0, BLOCK_D)
    in_dim = (d < HEAD_DIM)[None, :]
    p_end = mask.query_position(first, seqlen_q - 1)
    reach, valid, bidirectional = keys_in_reach(
        j, first, p_end, prefix_len, start, end, window, flags_ptr, used_ptr, seqlen_k, FLAGS, SEGMENTS
    )
    keep = reach[:, None] & in_dim
    row_k = j[:, None].to(tl.int64)
    k = tl.load(k_ptr + b * stride_kb + head_kv * stride_kh + row_k * stride_ks + d[None, :], mask=keep, other=0.0)
    v = tl.load(v_ptr + b * stride_vb + head_kv * stride_vh + row_k * stride_vs + d[None, :], mask=keep, other=0.0)
    ids = j
    bits, k_lo, k_hi = j_lo, j_lo, j_lo
    if FLAGS or SEGMENTS:
        bits, k_lo, k_hi = summary_of(summary_ptr + b * tl.num_programs(0) * 4, tile, tl.num_programs(0))
    if SEGMENTS:
        ids = tl.load(segment_ids_ptr + j, mask=j < seqlen_k, other=0)
    if PRUNE:
        squares = tl.sum(k.to(tl.float32) * k.to(tl.float32), 1)
        k_norm = prune_norm(tl.max(tl.where(squares == squares, squares, float("inf")), 0))
        k_norm = tl.where(tl.max(tl.where(tl.abs(v.to(tl.float32)) < float("inf"), 0, 1)) == 0, k_norm, float("inf"))
        threshold = prune_threshold(q_ptr.dtype.element_ty == tl.float32, seqlen_k)
    scale = softmax_scale * LOG2E

    # Query tiles that can see a key of this tile: all of them when one is bidirectional, else those in causal reach.
    some_open = tl.max((reach & bidirectional).to(tl.int32), 0) != 0
    begin = tl.where(some_open, 0, tl.maximum(j_lo - first, 0) // BLOCK_M).to(tl.int32)
    last = tl.where(some_open | (window == 0), seqlen_q, tl.minimum(j_hi - 1 + window - first, seqlen_q))
    stop = tl.maximum(tl.cdiv(last, BLOCK_M), begin).to(tl.int32)
    num_chunks = tl.cdiv(stop - begin, CHUNK)
    lane = tl.arange(0, CHUNK)
    offs_m = tl.arange(0, BLOCK_M)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for walk in tl.range(0, group * num_chunks, num_stages=1):
        h = head_kv * group + walk // num_chunks
        head = b * heads_q + h
        base = begin + (walk % num_chunks) * CHUNK
        q_at = q_ptr + b * stride_qb + h * stride_qh + offs_m[:, None].to(tl.int64) * stride_qs + d[None, :]
        g_at = grad_out_ptr + b * stride_gb + h * stride_gh + offs_m[:, None].to(tl.int64) * stride_gs + d[None, :]
        lse_at = lse_ptr + head * seqlen_q
        delta_at = delta_ptr + head * seqlen_q
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_ptr + h)
        slope_log2 = slope * LOG2E
        m = base + lane
        p_lo = mask.query_position(first, m.to(tl.int64) * BLOCK_M)
        p_hi = mask.query_position(first, tl.minimum((m.to(tl.int64) + 1) * BLOCK_M, seqlen_q) - 1)
        here = m < stop
        at = head * row_tiles + m
        q_lo, q_hi = p_lo, p_hi
        if SEGMENTS:
            q_lo = tl.load(query_segments_ptr + at * 2, mask=here, other=NO_SEGMENT_LO)
            q_hi = tl.load(query_segments_ptr + at * 2 + 1, mask=here, other=NO_SEGMENT_HI)
        this = lane * 0  # this one key tile, in every lane: the interpreter cannot mix bool scalars and vectors
        found = tile_class(
            p_lo, p_hi, this + j_lo, this + j_hi, prefix_len, start, end, window, this + bits, q_lo, q_hi, k_lo, k_hi,
            FLAGS, SEGMENTS,
        )  # fmt: skip
        found = tl.where(here, found, mask.TILE_EMPTY)
        if PRUNE:
            lower = tl.load(query_lse_ptr + at, mask=here, other=float("inf"))
            q_norm = tl.load(query_norm_ptr + at, mask=here, other=0.0)
            cutoff = prune_cutoff(slope, softmax_scale, q_norm, k_norm, lower, threshold)
            found = tl.where(prune_tile(cutoff, tile_distance(p_lo, p_hi, j_lo, j_hi)), mask.TILE_EMPTY, found)
        hot = found == mask.TILE_FULL
        if ALIBI:
            hot &= one_sided(p_lo, p_hi, j_lo, j_hi)
        word, number = word_of((found != mask.TILE_EMPTY) & ~hot, lane)
        for _ in tl.range(0, number, num_stages=1):  # few tiles: registers matter more
            i0 = (base + lowest(word)) * BLOCK_M
            word &= word - 1
            i = i0 + offs_m
            p = mask.query_position(first, i)
            lse = tl.load(lse_at + i, mask=i < seqlen_q, other=-float("inf"))
            delta = tl.load(delta_at + i, mask=i < seqlen_q, other=0.0)
            used = lse != -float("inf")
            rows = used[:, None] & in_dim
            q = tl.load(q_at + i0.to(tl.int64) * stride_qs, mask=rows, other=0.0)
            grad = tl.load(g_at + i0.to(tl.int64) * stride_gs, mask=rows, other=0.0)
            x = dot(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), tl.float32)) * scale
            if ALIBI:
                p_near = (p - j_lo).to(tl.float32)
                x += mask.alibi_bias(slope_log2, p_near[None, :], columns.to(tl.float32)[:, None])
            own, own_inside = i, used
            if SEGMENTS:
                own_inside = used & (p >= 0) & (p < seqlen_k)
                own = tl.load(segment_ids_ptr + p, mask=own_inside, other=0)
            seen = used[None, :] & visible_tile(
                mask.clamp_position(p, seqlen_k, window)[None, :], j[:, None], valid[:, None], bidirectional[:, None],
                own[None, :], own_inside[None, :], ids[:, None], seqlen_k, window, SEGMENTS,
            )  # fmt: skip
            prob = tl.where(seen, tl.math.exp2(x - (lse * LOG2E)[None, :]), 0.0)
            dv = dot(narrow(prob, grad.dtype), grad, dv)
            dp = dot(v, tl.trans(grad), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
            ds = prob * (dp - delta[None, :])
            ds = tl.where(seen, ds, 0.0)
            dk = dot(narrow(ds, q.dtype), q, dk)
        word, number = word_of(hot, lane)
        for _ in tl.range(0, number):
            i0 = (base + lowest(word)) * BLOCK_M
            word &= word - 1
            i = i0 + offs_m
            inside = i < seqlen_q
            rows = inside[:, None] & in_dim
            q = tl.load(q_at + i0.to(tl.int64) * stride_qs, mask=rows, other=0.0)
            grad = tl.load(g_at + i0.to(tl.int64) * stride_gs, mask=rows, other=0.0)
            lse = tl.load(lse_at + i, mask=inside, other=float("inf"))
            delta = tl.load(delta_at + i, mask=inside, other=0.0)
            x = dot(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), tl.float32)) * scale
            row_part = -tl.where(lse != -float("inf"), lse * LOG2E, float("inf"))
            if ALIBI:  # as in the forward: to the tile's nearest key, and from there
                left = mask.query_position(first, i0) > j_lo
                nearest = tl.where(left, j_hi - 1, j_lo)
                p_near = (mask.query_position(first, i) - nearest).to(tl.float32)
                row_part += mask.alibi_bias(slope_log2, p_near, 0.0)
                offset = tl.where(left, BLOCK_N - 1 - columns, columns).to(tl.float32)
                x -= (slope_log2 * offset)[:, None]
            prob = tl.math.exp2(x + row_part[None, :])
            dv = dot(narrow(prob, grad.dtype), grad, dv)
            dp = dot(v, tl.trans(grad), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
            ds = prob * (dp - delta[None, :])
            dk = dot(narrow(ds, q.dtype), q, dk)

    at = (b * seqlen_k * heads_kv + head_kv + row_k * heads_kv) * HEAD_DIM + d[None, :]
    keep = (j < seqlen_k)[:, None] & in_dim
    tl.store(dk_ptr + at, narrow(dk * softmax_scale, dk_ptr.dtype.element_ty), mask=keep)
    tl.store(dv_ptr + at, narrow(dv, dv_ptr.dtype.element_ty), mask=keep)
