"""Forward of prefix_attn: online softmax over key tiles; prefill, and decoding with split keys.

out and lse as in ``semantics.py``. A program owns BLOCK_M rows. With PACK = 1 they are queries of one head; with
PACK = heads_q / heads_kv the rows are (query, head of the group) pairs, so that a group reads its keys once.

    grid    (row tiles * row heads, splits); axis 0 runs through the heads of a section that fits in the L2 cache, and
            within it from the last row tile to the first: the longest rows of a causal call start first
    keys    CHUNK tiles at a time. Their classes come from mask.py as one vector and become two bit words: `general`
            (masked, or on both sides of the diagonal) and `hot` (full: no mask, ALiBi linear in the key). Each word has
            its own loop, so that the hot one is pipelined and holds no mask code; empty tiles cost nothing.
    order   the chunk of the diagonal first, then to the left, then from the right end: by then every row has a running
            maximum, and distance pruning (prune.py) clears bits of `hot` before they are walked
    split   program (_, s) takes an equal share of the row tile's reachable key tiles and leaves out and lse in fp32;
            ``combine_kernel`` merges the shares in a fixed order

Scores are in the base-2 domain. Keys that nobody sees are never loaded; rows without a visible key give 0 and -inf.
"""

import triton
import triton.language as tl

from . import mask
from .prune import prune_cutoff, prune_norm, prune_threshold, prune_tile, tile_distance
from .tiles import (
    LN2,
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


@triton.jit
def row_tile(num_tiles, heads, section):
    """Row tile and head of this program; ``section`` heads are walked together."""
    program = tl.program_id(0)
    part = program // (section * num_tiles)
    rest = program - part * (section * num_tiles)
    here = tl.minimum(section, heads - part * section)
    return num_tiles - 1 - rest // here, part * section + rest % here


@triton.jit
def key_tile_bounds(
    p_lo, p_hi, prefix_len, start, end, window, seqlen_k, BLOCK_N: tl.constexpr, FLAGS: tl.constexpr
):  # fmt: skip
    """First and one past the last key tile that may not be empty."""
    if FLAGS:
        begin = 0
        stop = tl.cdiv(seqlen_k, BLOCK_N)
    else:
        nearest = tl.where(prefix_len > start, start, tl.maximum(start, mask.causal_key_begin(p_lo, window)))
        begin = (nearest // BLOCK_N).to(tl.int32)
        stop = tl.cdiv(mask.visible_key_end(p_hi, prefix_len, end), BLOCK_N).to(tl.int32)
    return begin, tl.maximum(stop, begin)


@triton.jit
def chunk_of(step, num_chunks, begin, p_lo, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):
    """First tile of the step-th chunk: from the diagonal's to the left, then from the right end."""
    nearest = (p_lo // BLOCK_N - begin) // CHUNK
    chunk = tl.minimum(tl.maximum(nearest, 0), num_chunks - 1).to(tl.int32) - step
    return begin + tl.where(chunk < 0, chunk + num_chunks, chunk) * CHUNK


@triton.jit
def softmax_step(x, v, row_max, row_sum, acc, row_bias):
    """One tile of scores ``x`` + ``row_bias`` (base 2): the running maximum, sum and weighted values of each row."""
    largest = tl.maximum(row_max, tl.max(x, 1) + row_bias)
    reference = tl.where(largest == -float("inf"), 0.0, largest)
    p = tl.math.exp2(x - (reference - row_bias)[:, None])
    decay = tl.math.exp2(row_max - reference)
    row_sum = row_sum * decay + tl.sum(p, 1)
    return largest, row_sum, dot(narrow(p, v.dtype), v, acc * decay[:, None])


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "window", "terms", "row_tiles", "section"])
def prefix_attn_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    prefix_len_ptr, key_range_ptr, query_start_ptr, flags_ptr, segment_ids_ptr, slopes_ptr,
    summary_ptr, used_ptr, norms_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, stride_osplit, stride_lsplit,
    heads_q, heads_kv, seqlen_q, seqlen_k, softmax_scale, window, terms, row_tiles, section,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, PACK: tl.constexpr, ALIBI: tl.constexpr, FLAGS: tl.constexpr, SEGMENTS: tl.constexpr,
    PRUNE: tl.constexpr,
):  # fmt: skip
    row_heads = heads_q // PACK
    tile, bh = row_tile(row_tiles, tl.num_programs(0) // row_tiles, section)
    b = (bh // row_heads).to(tl.int64)
    first_head = (bh % row_heads) * PACK
    head_kv = (first_head // (heads_q // heads_kv)).to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < seqlen_q * PACK
    i = rows // PACK
    h = first_head + rows % PACK
    first, prefix_len, start, end = row_terms(
        prefix_len_ptr, key_range_ptr, query_start_ptr, terms, b, seqlen_q, seqlen_k
    )
    p_lo = mask.query_position(first, tile * BLOCK_M // PACK)
    p_hi = mask.query_position(first, (tl.minimum((tile + 1) * BLOCK_M, seqlen_q * PACK) - 1) // PACK)
    p = mask.query_position(first, i)

    d = tl.arange(0, BLOCK_D)
    row = i[:, None].to(tl.int64)
    q_at = q_ptr + b * stride_qb + row * stride_qs + h[:, None].to(tl.int64) * stride_qh + d[None, :]
    q = tl.load(q_at, mask=row_inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    scale = softmax_scale * LOG2E
    columns = tl.arange(0, BLOCK_N)
    k_at = k_ptr + b * stride_kb + head_kv * stride_kh + columns[:, None].to(tl.int64) * stride_ks + d[None, :]
    v_at = v_ptr + b * stride_vb + head_kv * stride_vh + columns[:, None].to(tl.int64) * stride_vs + d[None, :]
    in_dim = (d < HEAD_DIM)[None, :]
    summary_ptr += b * tl.cdiv(seqlen_k, BLOCK_N) * 4
    flags_ptr += b * seqlen_k
    used_ptr += b * seqlen_k
    segment_ids_ptr += b * seqlen_k
    near = p_lo  # distances count from here in fp32: exact within 2^24 keys of the tile
    p_near = (p - near).to(tl.float32)
    p_key = mask.clamp_position(p, seqlen_k, window)
    slope = 0.0
    if ALIBI:
        if PACK == 1:
            slope = tl.load(slopes_ptr + first_head)
            slope_log2 = slope * LOG2E
            slope_rows = tl.full((BLOCK_M,), 1.0, tl.float32) * slope_log2
        else:
            slope_rows = tl.load(slopes_ptr + h, mask=row_inside, other=0.0) * LOG2E
    own = i
    own_inside = row_inside
    q_lo = first
    q_hi = first
    if SEGMENTS:
        own, own_inside, q_lo, q_hi = own_segments(segment_ids_ptr, p, row_inside, seqlen_k)
    if PRUNE:
        q_norm = prune_norm(tl.max(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1), 0))
        threshold = prune_threshold(q_ptr.dtype.element_ty == tl.float32, seqlen_k)

    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    no_bias = tl.zeros((BLOCK_M,), tl.float32)

    begin, stop = key_tile_bounds(p_lo, p_hi, prefix_len, start, end, window, seqlen_k, BLOCK_N, FLAGS)
    count = (stop - begin).to(tl.int64)
    stop = begin + (count * (tl.program_id(1) + 1) // tl.num_programs(1)).to(tl.int32)
    begin += (count * tl.program_id(1) // tl.num_programs(1)).to(tl.int32)
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
        hot = found == mask.TILE_FULL
        if ALIBI:
            hot &= one_sided(p_lo, p_hi, j_lo, j_lo + BLOCK_N)
        word, number = word_of((found != mask.TILE_EMPTY) & ~hot, lane)
        for _ in tl.range(0, number, num_stages=1):  # few tiles: registers matter more
            j0 = (base + lowest(word)) * BLOCK_N
            word &= word - 1
            j = j0 + columns
            reach, valid, bidirectional = keys_in_reach(
                j, p_lo, p_hi, prefix_len, start, end, window, flags_ptr, used_ptr, seqlen_k, FLAGS, SEGMENTS
            )
            k = tl.load(k_at + j0.to(tl.int64) * stride_ks, mask=reach[:, None] & in_dim, other=0.0)
            v = tl.load(v_at + j0.to(tl.int64) * stride_vs, mask=reach[:, None] & in_dim, other=0.0)
            x = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale
            if ALIBI:
                x += mask.alibi_bias(slope_rows[:, None], p_near[:, None], (j - near).to(tl.float32)[None, :])
            ids = j
            if SEGMENTS:
                ids = tl.load(segment_ids_ptr + j, mask=j < seqlen_k, other=0)
            seen = visible_tile(
                p_key[:, None], j[None, :], valid[None, :], bidirectional[None, :],
                own[:, None], own_inside[:, None], ids[None, :], seqlen_k, window, SEGMENTS,
            )  # fmt: skip
            x = tl.where(seen, x, -float("inf"))
            row_max, row_sum, acc = softmax_step(x, v, row_max, row_sum, acc, no_bias)
        if PRUNE:
            lower = tl.min(tl.where(row_inside, row_max, float("inf")), 0) * LN2
            norms = tl.load(norms_ptr + (b * heads_kv + head_kv) * tl.cdiv(seqlen_k, BLOCK_N) + n, mask=hot, other=0.0)
            cutoff = prune_cutoff(slope, softmax_scale, q_norm, norms, lower, threshold)
            hot &= ~prune_tile(cutoff, tile_distance(p_lo, p_hi, j_lo, j_lo + BLOCK_N))
        word, number = word_of(hot, lane)
        for _ in tl.range(0, number):
            j0 = (base + lowest(word)) * BLOCK_N
            word &= word - 1
            k = load_full(k_at + j0.to(tl.int64) * stride_ks, in_dim, BLOCK_D == HEAD_DIM)
            v = load_full(v_at + j0.to(tl.int64) * stride_vs, in_dim, BLOCK_D == HEAD_DIM)
            x = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale
            row_bias = no_bias
            if ALIBI:  # -slope * distance = row part, to the tile's nearest key, + column part, from there
                left = j0 < near
                nearest = tl.where(left, j0 + BLOCK_N - 1, j0)
                row_bias = mask.alibi_bias(slope_rows, p_near, (nearest - near).to(tl.float32))
                offset = tl.where(left, BLOCK_N - 1 - columns, columns).to(tl.float32)
                if PACK == 1:
                    x -= (slope_log2 * offset)[None, :]
                else:
                    x -= slope_rows[:, None] * offset[None, :]
            row_max, row_sum, acc = softmax_step(x, v, row_max, row_sum, acc, row_bias)

    split = tl.program_id(1).to(tl.int64)
    some = row_sum != 0.0
    out = acc / tl.where(some, row_sum, 1.0)[:, None]
    out_at = out_ptr + split * stride_osplit + b * stride_ob + i[:, None].to(tl.int64) * stride_os
    out_at += h[:, None].to(tl.int64) * stride_oh + d[None, :]
    tl.store(out_at, narrow(out, out_ptr.dtype.element_ty), mask=row_inside[:, None] & (d < HEAD_DIM)[None, :])
    lse = tl.where(some, (row_max + tl.math.log2(tl.where(some, row_sum, 1.0))) * LN2, -float("inf"))
    tl.store(lse_ptr + split * stride_lsplit + (b * heads_q + h) * seqlen_q + i, lse, mask=row_inside)


@triton.jit(do_not_specialize=["splits", "seqlen_q"])
def combine_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, splits, rows, heads_q, seqlen_q,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out and lse of one row (b, i, h) from the shares of its keys, weighted by exp(lse of the share)."""
    row = tl.program_id(0).to(tl.int64)  # in out's order [b, i, h]
    i = (row // heads_q) % seqlen_q
    lse_row = (row // heads_q // seqlen_q * heads_q + row % heads_q) * seqlen_q + i
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(partial_lse_ptr + s.to(tl.int64) * rows + lse_row, mask=s < splits, other=-float("inf"))
    largest = tl.max(lse, 0)
    reference = tl.where(largest == -float("inf"), 0.0, largest)
    weight = tl.math.exp2((lse - reference) * LOG2E)
    total = tl.sum(weight, 0)
    share_at = partial_ptr + (s[:, None].to(tl.int64) * rows + row) * HEAD_DIM + d[None, :]
    keep = (s < splits)[:, None] & (d < HEAD_DIM)[None, :]
    shares = tl.load(share_at, mask=keep, other=0.0)
    some = total != 0.0
    out = tl.sum(shares * weight[:, None], 0) / tl.where(some, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + d, narrow(out, out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
    merged = reference + tl.math.log2(tl.where(some, total, 1.0)) * LN2
    tl.store(lse_ptr + lse_row, tl.where(some, merged, -float("inf")))
