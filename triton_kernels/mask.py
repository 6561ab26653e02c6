"""Mirror of ``semantics.py``: same names, argument order and integer arithmetic, on scalars and vectors.

``tests/interpreter/test_mask.py`` holds it to the specification exhaustively; the causal comparison is written in no
other Triton file. Python's ``min``, ``max`` and ``if`` become elementwise, so a whole vector of tiles is classified
at once.
"""

import triton
import triton.language as tl

FLAG_VALID = tl.constexpr(1)
FLAG_BIDIRECTIONAL = tl.constexpr(2)

TILE_EMPTY = tl.constexpr(0)
TILE_PARTIAL = tl.constexpr(1)
TILE_FULL = tl.constexpr(2)


@triton.jit
def query_position(query_start, i):
    return query_start + i


@triton.jit
def valid_in_range(j, start, end):
    return (j >= start) & (j < end)


@triton.jit
def bidirectional_in_prefix(j, prefix_len):
    return j < prefix_len


@triton.jit
def flag_valid(flags):
    return (flags & FLAG_VALID) != 0


@triton.jit
def flag_bidirectional(flags):
    return (flags & FLAG_BIDIRECTIONAL) != 0


@triton.jit
def causal(p, j, window):
    in_past = j <= p
    return tl.where(window == 0, in_past, in_past & (p - j < window))


@triton.jit
def visible(valid, same_segment, bidirectional, is_causal):
    return valid & same_segment & (bidirectional | is_causal)


@triton.jit
def alibi_bias(slope, p, j):
    return -slope * tl.abs(p - j).to(tl.float32)


@triton.jit
def causal_reaches(p_lo, p_hi, j_lo, j_hi, window):
    begun = j_lo <= p_hi
    return tl.where(window == 0, begun, begun & (p_lo - (j_hi - 1) < window))


@triton.jit
def causal_covers(p_lo, p_hi, j_lo, j_hi, window):
    past = j_hi - 1 <= p_lo
    return tl.where(window == 0, past, past & (p_hi - j_lo < window))


@triton.jit
def visible_key_end(p_hi, prefix_len, end):
    return tl.minimum(end, tl.maximum(prefix_len, p_hi + 1))


@triton.jit
def causal_key_begin(p_lo, window):
    return tl.where(window == 0, 0, tl.maximum(p_lo - window + 1, 0))


@triton.jit
def classify_tile(p_lo, p_hi, j_lo, j_hi, prefix_len, start, end, window):
    a = tl.maximum(j_lo, start)
    b = tl.minimum(j_hi, end)
    reached = bidirectional_in_prefix(a, prefix_len) | causal_reaches(p_lo, p_hi, a, b, window)
    covered = causal_covers(p_lo, p_hi, tl.maximum(j_lo, prefix_len), j_hi, window)
    whole = (a <= j_lo) & (b >= j_hi) & (bidirectional_in_prefix(j_hi - 1, prefix_len) | covered)
    return tl.where((a >= b) | ~reached, TILE_EMPTY, tl.where(whole, TILE_FULL, TILE_PARTIAL))


@triton.jit
def classify_tile_flags(p_lo, p_hi, j_lo, j_hi, any_valid, all_valid, any_bidirectional, all_bidirectional, window):
    reached = any_valid & (any_bidirectional | causal_reaches(p_lo, p_hi, j_lo, j_hi, window))
    whole = all_valid & (all_bidirectional | causal_covers(p_lo, p_hi, j_lo, j_hi, window))
    return tl.where(reached, tl.where(whole, TILE_FULL, TILE_PARTIAL), TILE_EMPTY)


@triton.jit
def classify_tile_segments(q_lo, q_hi, k_lo, k_hi):
    apart = (q_hi < k_lo) | (k_hi < q_lo)
    one = (q_lo == q_hi) & (k_lo == k_hi)
    return tl.where(apart, TILE_EMPTY, tl.where(one, TILE_FULL, TILE_PARTIAL))


@triton.jit
def combine_classes(a, b):
    return tl.minimum(a, b)


@triton.jit
def clamp_position(p, seqlen_k, window):
    """``p`` as int32 such that every ``causal`` answer stays the same; csrc/common/mask.h has it too."""
    return tl.maximum(tl.minimum(p, seqlen_k + window), -1).to(tl.int32)
