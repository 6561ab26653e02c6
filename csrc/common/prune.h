// ALiBi distance pruning: which key tiles a query row may leave unread. Host and device.
//
// A row at position p with slope m > 0 skips the key tile T when
//     |scale| * |q| * max_{j in T} |k_j| - m * distance(p, T) < lower - (ln(seqlen_k) + ln(1 /
//     eps)),
// where `lower` is at most the row's lse over its visible keys: any visible score will do, so the
// running row maximum of a forward, and the lse itself in a backward. By Cauchy-Schwarz the left
// side is at least every score in T. Each skipped key therefore weighs less than exp(lse) * eps /
// seqlen_k, and all skipped keys of a row together less than eps of its sum: out moves by less than
// eps * (|out| + max |v|), below the rounding of its dtype.
//
// A query tile skips T when every row of it may. Nothing is skipped for slopes <= 0, for rows that
// have met no visible key yet (lower = -inf), and where a norm is NaN or infinite. A caller that
// wants NaN and infinities of V to reach every row that sees them gives such a tile an infinite
// norm.
#pragma once

#include <math.h>

#include "common/mask.h"
#include "common/params.h"

namespace internvl {

// ln(1 / eps): eps is 2^-30 for fp32, 2^-20 for bf16 and fp16.
INTERNVL_MASK_FN float prune_log_inverse_eps(DType dtype) {
  return (dtype == DType::kFloat32 ? 30.0f : 20.0f) * 0.6931472f;
}

// How far below `lower` every score of a skipped tile must lie.
INTERNVL_MASK_FN float prune_threshold(DType dtype, int64_t seqlen_k) {
  return prune_log_inverse_eps(dtype) + logf(static_cast<float>(larger(seqlen_k, 1)));
}

// |x| from the fp32 sum of its squares, never too small: 2^-14 covers the rounding of 256 sums,
// 2^-118 what 256 squares lose by underflow (flushed to zero or not).
INTERNVL_MASK_FN float prune_norm(float sum_of_squares) {
  return sqrtf(sum_of_squares + 3.0092655e-36f) * (1.0f + 6.1035156e-5f);
}

// The smallest |p - j| of positions [p_lo, p_hi] and keys [j_lo, j_hi).
INTERNVL_MASK_FN int64_t tile_distance(int64_t p_lo, int64_t p_hi, int64_t j_lo, int64_t j_hi) {
  return larger(0, larger(p_lo - (j_hi - 1), j_lo - p_hi));
}

// The largest distance at which a row must still visit keys of norm at most k_norm: +inf (or NaN)
// when nothing may be skipped. The 2^-20 margins cover the rounding of this function and of the
// distance itself as fp32.
INTERNVL_MASK_FN float prune_cutoff(float slope, float softmax_scale, float q_norm, float k_norm,
                                    float lower, float threshold) {
  constexpr float kMargin = 9.5367432e-7f;
  if (!(slope > 0.0f && fabsf(lower) < INFINITY)) return INFINITY;
  const float score = fabsf(softmax_scale) * q_norm * k_norm;
  const float reach = score - lower + threshold + kMargin * (score + fabsf(lower) + threshold);
  return reach / slope * (1.0f + (reach > 0.0f ? kMargin : -kMargin));
}

// May a row with this cutoff skip keys that are at least `distance` away?
INTERNVL_MASK_FN bool prune_tile(float cutoff, int64_t distance) {
  return static_cast<float>(distance) > cutoff;
}

}  // namespace internvl
