"""Mirror of ``csrc/common/prune.h``, which states the rule: the key tiles that no row of a query tile needs to read.

``tests/interpreter/test_mask.py`` compares the two.
"""

import triton
import triton.language as tl


@triton.jit
def prune_log_inverse_eps(FULL_PRECISION: tl.constexpr):
    return (30.0 if FULL_PRECISION else 20.0) * 0.6931472


@triton.jit
def prune_threshold(FULL_PRECISION: tl.constexpr, seqlen_k):
    keys = tl.maximum(seqlen_k, 1).to(tl.float32)
    return prune_log_inverse_eps(FULL_PRECISION) + 0.6931472 * tl.math.log2(keys)


@triton.jit
def prune_norm(sum_of_squares):
    return tl.sqrt(sum_of_squares + 3.0092655e-36) * (1.0 + 6.1035156e-5)


@triton.jit
def tile_distance(p_lo, p_hi, j_lo, j_hi):
    return tl.maximum(tl.maximum(p_lo - (j_hi - 1), j_lo - p_hi), 0)


@triton.jit
def prune_cutoff(slope, softmax_scale, q_norm, k_norm, lower, threshold):
    MARGIN: tl.constexpr = 9.5367432e-7
    score = tl.abs(softmax_scale) * q_norm * k_norm
    reach = score - lower + threshold + MARGIN * (score + tl.abs(lower) + threshold)
    cutoff = reach / slope * (1.0 + tl.where(reach > 0.0, MARGIN, -MARGIN))
    return tl.where(slope > 0.0, tl.where(tl.abs(lower) < float("inf"), cutoff, float("inf")), float("inf"))


@triton.jit
def prune_tile(cutoff, distance):
    return distance.to(tl.float32) > cutoff
