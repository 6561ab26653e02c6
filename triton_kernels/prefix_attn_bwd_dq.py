"""Backward of prefix_attn, second half: dq and the gradient of the slopes; ``prefix_attn_bwd.py`` has the whole plan.

dq           program (query tile, head), walked like the forward: dQ = scale * sum dS·K, and the tile's share of the
             slopes' gradient, - sum dS * distance
slopes       program h: the shares of head h, in order
"""

import triton
import triton.language as tl

from . import mask
from .prefix_attn_fwd import chunk_of, key_tile_bounds, row_tile
from .prune import prune_cutoff, prune_norm, prune_threshold, prune_tile, tile_distance
from .tiles import (
    LOG2E,
    classify_keys,
    dot,
    keys_in_reach,
    load_full,
    lowest,
    narrow,
    one_sided,
    own_segments,
    row_terms,
    visible_tile,
    word_of,
)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "window", "terms", "row_tiles", "section"])
def bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, dq_ptr, slope_shares_ptr,
    prefix_len_ptr, key_range_ptr, query_start_ptr, flags_ptr, segment_ids_ptr, slopes_ptr,
    summary_ptr, used_ptr, norms_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh,
    heads_q, heads_kv, seqlen_q, seqlen_k, softmax_scale, window, terms, row_tiles, section,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, ALIBI: tl.constexpr, SLOPE_GRAD: tl.constexpr, FLAGS: tl.constexpr, SEGMENTS: tl.constexpr,
    PRUNE: tl.constexpr,
):  # fmt: skip
    tile, bh = row_tile(row_tiles, tl.num_programs(0) // row_tiles, section)
    b = (bh // heads_q).to(tl.int64)
    h = (bh % heads_q).to(tl.int64)
    head_kv = h // (heads_q // heads_kv)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = i < seqlen_q
    first, prefix_len, start, end = row_terms(
        prefix_len_ptr, key_range_ptr, query_start_ptr, terms, b, seqlen_q, seqlen_k
    )
    p_lo = mask.query_position(first, tile * BLOCK_M)
    p_hi = mask.query_position(first, tl.minimum((tile + 1) * BLOCK_M, seqlen_q) - 1)
    p = mask.query_position(first, i)
    head = b * heads_q + h
    lse = tl.load(lse_ptr + head * seqlen_q + i, mask=inside, other=-float("inf"))
    used = lse != -float("inf")
    delta = tl.load(delta_ptr + head * seqlen_q + i, mask=inside, other=0.0)
    lse_log2 = tl.where(used, lse * LOG2E, float("inf"))  # exp2 gives 0 on rows without a key, and past the last row

    d = tl.arange(0, BLOCK_D)
    in_dim = (d < HEAD_DIM)[None, :]
    row = i[:, None].to(tl.int64)
    keep = used[:, None] & in_dim
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + row * stride_qs + d[None, :], mask=keep, other=0.0)
    grad = tl.load(grad_out_ptr + b * stride_gb + h * stride_gh + row * stride_gs + d[None, :], mask=keep, other=0.0)
    scale = softmax_scale * LOG2E
    columns = tl.arange(0, BLOCK_N)
    k_at = k_ptr + b * stride_kb + head_kv * stride_kh + columns[:, None].to(tl.int64) * stride_ks + d[None, :]
    v_at = v_ptr + b * stride_vb + head_kv * stride_vh + columns[:, None].to(tl.int64) * stride_vs + d[None, :]
    summary_ptr += b * tl.cdiv(seqlen_k, BLOCK_N) * 4
    flags_ptr += b * seqlen_k
    used_ptr += b * seqlen_k
    segment_ids_ptr += b * seqlen_k
    near = p_lo
    p_near = (p - near).to(tl.float32)
    p_key = mask.clamp_position(p, seqlen_k, window)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + h)
    slope_log2 = slope * LOG2E
    own, own_inside, q_lo, q_hi = i, inside, first, first
    if SEGMENTS:
        own, own_inside, q_lo, q_hi = own_segments(segment_ids_ptr, p, inside, seqlen_k)
    if PRUNE:
        squares = tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)
        q_norm = prune_norm(tl.max(tl.where(squares == squares, squares, float("inf")), 0))
        lower = tl.min(tl.where(used, tl.where(lse == lse, lse, -float("inf")), float("inf")), 0)
        threshold = prune_threshold(q_ptr.dtype.element_ty == tl.float32, seqlen_k)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dslope = tl.zeros((BLOCK_M,), tl.float32)
    begin, stop = key_tile_bounds(p_lo, p_hi, prefix_len, start, end, window, seqlen_k, BLOCK_N, FLAGS)
    num_chunks = tl.cdiv(stop - begin, CHUNK)
    lane = tl.arange(0, CHUNK)
    for step in tl.range(0, num_chunks, num_stages=1):
        base = chunk_of(step, num_chunks, begin, p_lo, BLOCK_N, CHUNK)
        n = base + lane
        j_lo = n.to(tl.int64) * BLOCK_N
        found = classify_keys(
            n, stop, p_lo, p_hi, prefix_len, start, end, window, summary_ptr, q_lo, q_hi, seqlen_k,
            BLOCK_N, FLAGS, SEGMENTS,
        )  # fmt: skip
        if PRUNE:
            norms_at = norms_ptr + (b * heads_kv + head_kv) * tl.cdiv(seqlen_k, BLOCK_N) + n
            norms = tl.load(norms_at, mask=n < stop, other=0.0)
            cutoff = prune_cutoff(slope, softmax_scale, q_norm, norms, lower, threshold)
            far = prune_tile(cutoff, tile_distance(p_lo, p_hi, j_lo, j_lo + BLOCK_N))
            found = tl.where(far, mask.TILE_EMPTY, found)
        hot = found == mask.TILE_FULL
        if ALIBI:
            hot &= one_sided(p_lo, p_hi, j_lo, j_lo + BLOCK_N)
        word, number = word_of((found != mask.TILE_EMPTY) & ~hot, lane)
        for _ in tl.range(0, number):
            j0 = (base + lowest(word)) * BLOCK_N
            word &= word - 1
            j = j0 + columns
            reach, valid, bidirectional = keys_in_reach(
                j, p_lo, p_hi, prefix_len, start, end, window, flags_ptr, used_ptr, seqlen_k, FLAGS, SEGMENTS
            )
            k = tl.load(k_at + j0.to(tl.int64) * stride_ks, mask=reach[:, None] & in_dim, other=0.0)
            v = tl.load(v_at + j0.to(tl.int64) * stride_vs, mask=reach[:, None] & in_dim, other=0.0)
            distance = tl.abs(p_near[:, None] - (j - near).to(tl.float32)[None, :])
            x = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale
            if ALIBI:
                x += mask.alibi_bias(slope_log2, distance, 0.0)
            ids = j
            if SEGMENTS:
                ids = tl.load(segment_ids_ptr + j, mask=j < seqlen_k, other=0)
            seen = visible_tile(
                p_key[:, None], j[None, :], valid[None, :], bidirectional[None, :],
                own[:, None], own_inside[:, None], ids[None, :], seqlen_k, window, SEGMENTS,
            )  # fmt: skip
            prob = tl.math.exp2(x - lse_log2[:, None])
            dp = dot(grad, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            ds = tl.where(seen & used[:, None], prob * (dp - delta[:, None]), 0.0)
            if SLOPE_GRAD:
                dslope -= tl.sum(ds * distance, 1)
            dq = dot(narrow(ds, k.dtype), k, dq)
        word, number = word_of(hot, lane)
        for _ in tl.range(0, number):
            j0 = (base + lowest(word)) * BLOCK_N
            word &= word - 1
            k = load_full(k_at + j0.to(tl.int64) * stride_ks, in_dim, BLOCK_D == HEAD_DIM)
            v = load_full(v_at + j0.to(tl.int64) * stride_vs, in_dim, BLOCK_D == HEAD_DIM)
            x = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale
            row_part = -lse_log2
            if ALIBI:
                left = j0 < near
                nearest = (tl.where(left, j0 + BLOCK_N - 1, j0) - near).to(tl.float32)
                row_part += mask.alibi_bias(slope_log2, p_near, nearest)
                offset = tl.where(left, BLOCK_N - 1 - columns, columns).to(tl.float32)
                x -= (slope_log2 * offset)[None, :]
            prob = tl.math.exp2(x + row_part[:, None])
            dp = dot(grad, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            ds = prob * (dp - delta[:, None])
            if SLOPE_GRAD:
                dslope -= tl.sum(ds * offset[None, :], 1) + tl.sum(ds, 1) * tl.abs(p_near - nearest)
            dq = dot(narrow(ds, k.dtype), k, dq)

    at = (b * seqlen_q * heads_q + h + row * heads_q) * HEAD_DIM + d[None, :]
    tl.store(dq_ptr + at, narrow(dq * softmax_scale, dq_ptr.dtype.element_ty), mask=inside[:, None] & in_dim)
    if SLOPE_GRAD:
        tl.store(slope_shares_ptr + head * row_tiles + tile, tl.sum(tl.where(used, dslope, 0.0), 0))


@triton.jit(do_not_specialize=["batch", "row_tiles"])
def bwd_slopes_kernel(shares_ptr, dslopes_ptr, batch, heads_q, row_tiles, BLOCK: tl.constexpr):
    """dalibi_slopes[h] = the sum of its shares [batch, heads_q, row_tiles], in an order that only shapes decide."""
    h = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for b in range(batch):
        for t0 in range(0, row_tiles, BLOCK):
            t = t0 + tl.arange(0, BLOCK)
            total += tl.load(shares_ptr + (h + b * heads_q) * row_tiles + t, mask=t < row_tiles, other=0.0)
    tl.store(dslopes_ptr + h, tl.sum(total, 0))
