"""What the attention kernels share: the terms of a batch row, tile classes as bit words, masked tiles, products.

Names: ``i`` query row, ``p`` its position, ``j`` key, ``tile`` index of a tile; positions are int64 where they stand
for themselves and int32 (``clamp_position``) where they are compared key by key.
"""

import triton
import triton.language as tl

from . import mask

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)  # kernels run on CPU tensors, in numpy
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Bits of the kernels' argument `terms`: which of the per-row int32 tensors were given.
HAS_PREFIX_LEN = tl.constexpr(1)
HAS_KEY_RANGE = tl.constexpr(2)
HAS_QUERY_START = tl.constexpr(4)
# Columns of a key tile's summary, and bits of the first.
SUMMARY_COLUMNS = tl.constexpr(4)  # flag bits, lowest and highest segment, unused
ANY_VALID = tl.constexpr(1)
ALL_VALID = tl.constexpr(2)
ANY_BIDIRECTIONAL = tl.constexpr(4)
ALL_BIDIRECTIONAL = tl.constexpr(8)
NO_SEGMENT_LO = tl.constexpr(2147483647)  # bounds of no segment at all: apart from every other
NO_SEGMENT_HI = tl.constexpr(-2147483648)


@triton.jit
def dot(a, b, acc):
    """acc + a·b in fp32. The interpreter multiplies the bits of bf16, so it gets fp32."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """fp32 to the nearest ``DTYPE``, ties to even. The interpreter truncates to bf16, so it gets rounded bits."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(DTYPE)


@triton.jit
def row_terms(prefix_len_ptr, key_range_ptr, query_start_ptr, terms, b, seqlen_q, seqlen_k):
    """Position of query row 0, prefix length, first and one past the last real key of batch row ``b``; int64."""
    has_range = (terms & HAS_KEY_RANGE) != 0
    start = tl.load(key_range_ptr + 2 * b, mask=has_range, other=0).to(tl.int64)
    end = tl.load(key_range_ptr + 2 * b + 1, mask=has_range, other=2147483647).to(tl.int64)
    prefix_len = tl.load(prefix_len_ptr + b, mask=(terms & HAS_PREFIX_LEN) != 0, other=0).to(tl.int64)
    has_start = (terms & HAS_QUERY_START) != 0
    first = tl.load(query_start_ptr + b, mask=has_start, other=0).to(tl.int64)
    first = tl.where(has_start, first, (seqlen_k - seqlen_q).to(tl.int64))
    return first, prefix_len, tl.maximum(start, 0), tl.minimum(end, seqlen_k)


@triton.jit
def tile_class(
    p_lo, p_hi, j_lo, j_hi, prefix_len, start, end, window, flag_bits, q_lo, q_hi, k_lo, k_hi,
    FLAGS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """The class of tiles under every rule of the call; segment bounds that span no segment mean empty."""
    if FLAGS:
        found = mask.classify_tile_flags(
            p_lo,
            p_hi,
            j_lo,
            j_hi,
            (flag_bits & ANY_VALID) != 0,
            (flag_bits & ALL_VALID) != 0,
            (flag_bits & ANY_BIDIRECTIONAL) != 0,
            (flag_bits & ALL_BIDIRECTIONAL) != 0,
            window,
        )
    else:
        found = mask.classify_tile(p_lo, p_hi, j_lo, j_hi, prefix_len, start, end, window)
    if SEGMENTS:
        found = mask.combine_classes(found, mask.classify_tile_segments(q_lo, q_hi, k_lo, k_hi))
    return found


@triton.jit
def summary_of(summary_ptr, tile, num_tiles):
    """Flag bits and segment bounds of key tiles; those past the end are invalid and empty."""
    inside = tile < num_tiles
    row = summary_ptr + tile * SUMMARY_COLUMNS
    bits = tl.load(row, mask=inside, other=0)
    return bits, tl.load(row + 1, mask=inside, other=NO_SEGMENT_LO), tl.load(row + 2, mask=inside, other=NO_SEGMENT_HI)


@triton.jit
def one_sided(p_lo, p_hi, j_lo, j_hi):
    """All keys on one side of all positions, so that the distance is linear."""
    return (j_hi - 1 <= p_lo) | (j_lo >= p_hi)


@triton.jit
def word_of(chosen, lane):
    """The chosen lanes as bits of one int64, and how many there are: a list of tiles in a register."""
    return tl.sum(tl.where(chosen, tl.full(lane.shape, 1, tl.int64) << lane, 0), 0), tl.sum(chosen.to(tl.int32), 0)


@triton.jit
def lowest(word):
    """Index of the lowest set bit: the exponent of that bit as a float."""
    bit = (word & -word).to(tl.float32)
    return ((bit.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def keys_in_reach(
    j, p_lo, p_hi, prefix_len, start, end, window, flags_ptr, used_ptr, seqlen_k,
    FLAGS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N] keys that some query in [p_lo, p_hi] sees: the only ones loaded. And validity, bidirectionality."""
    inside = j < seqlen_k
    if FLAGS:
        flags = tl.load(flags_ptr + j, mask=inside, other=0).to(tl.int32)
        valid = mask.flag_valid(flags)
        bidirectional = mask.flag_bidirectional(flags)
    else:
        valid = mask.valid_in_range(j, start, end)
        bidirectional = mask.bidirectional_in_prefix(j, prefix_len)
    reach = inside & valid & (bidirectional | mask.causal_reaches(p_lo, p_hi, j, j + 1, window))
    if SEGMENTS:
        reach &= tl.load(used_ptr + j, mask=inside, other=0) != 0
    return reach, valid, bidirectional


@triton.jit
def own_segments(segment_ids_ptr, p, row_inside, seqlen_k):
    """Segment ids at positions ``p``, whether there is one, and the bounds of a tile's classes.

    Rows that stand outside the keys see nothing: their tile is never full, so its bounds are kept apart.
    """
    inside = row_inside & (p >= 0) & (p < seqlen_k)
    own = tl.load(segment_ids_ptr + p, mask=inside, other=0)
    q_lo = tl.min(tl.where(inside, own, NO_SEGMENT_LO), 0).to(tl.int64)
    q_hi = tl.max(tl.where(inside, own, NO_SEGMENT_HI), 0).to(tl.int64)
    outside = tl.sum((row_inside & ~inside).to(tl.int32), 0) > 0
    q_hi = tl.where(outside & (q_lo == q_hi), q_hi + 1, q_hi)
    return own, inside, q_lo, q_hi


@triton.jit
def classify_keys(
    n, stop, p_lo, p_hi, prefix_len, start, end, window, summary_ptr, q_lo, q_hi, seqlen_k,
    BLOCK_N: tl.constexpr, FLAGS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Classes of the key tiles ``n`` [CHUNK] for one query tile; those at ``stop`` and beyond are empty."""
    j_lo = n.to(tl.int64) * BLOCK_N
    bits, k_lo, k_hi = n, n, n
    if FLAGS or SEGMENTS:
        bits, k_lo, k_hi = summary_of(summary_ptr, n, tl.cdiv(seqlen_k, BLOCK_N))
    found = tile_class(
        p_lo, p_hi, j_lo, j_lo + BLOCK_N, prefix_len, start, end, window, bits, q_lo, q_hi, k_lo, k_hi, FLAGS, SEGMENTS
    )
    return tl.where(n < stop, found, mask.TILE_EMPTY)


@triton.jit
def visible_tile(p, j, valid, bidirectional, own, own_inside, ids, seqlen_k, window, SEGMENTS: tl.constexpr):
    """Which query sees which key; every argument comes expanded to a row or a column of the tile."""
    same = j < seqlen_k
    if SEGMENTS:
        same = same & own_inside & (own == ids)
    return mask.visible(valid, same, bidirectional, mask.causal(p, j, window))


@triton.jit
def load_full(at, in_dim, WHOLE: tl.constexpr):
    """Rows of a full tile: masked only where the head dim does not fill the block."""
    return tl.load(at) if WHOLE else tl.load(at, mask=in_dim, other=0.0)
