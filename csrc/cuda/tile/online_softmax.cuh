// The online softmax of rows whose scores lie in mma accumulators: lane l of a warp holds, of every
// 16 x 8 tile, columns 2 (l % 4) and the next of rows l / 4 and l / 4 + 8. Base 2 throughout: a
// score is x = scale_log2 * z + offset, z what stands in the registers.
#pragma once

#include <math.h>

#include "cuda/ptx/cvt.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/warp.cuh"

namespace internvl::tile {

// Of the four lanes that share a row.
INTERNVL_PTX_FN float quad_max(float x) {
  x = ptx::fmax(x, ptx::shfl_bfly(x, 1));
  return ptx::fmax(x, ptx::shfl_bfly(x, 2));
}

INTERNVL_PTX_FN float quad_sum(float x) {
  x += ptx::shfl_bfly(x, 1);
  return x + ptx::shfl_bfly(x, 2);
}

// kRows rows per lane: rows 2m and 2m + 1 are l / 4 and l / 4 + 8 of 16-row tile m.
template <int kRows>
struct OnlineSoftmax {
  // exp2 of at most 8 more than the reference: far from overflow in fp16, so the accumulators need
  // not follow every small change of the maximum.
  static constexpr float kSlack = 8.0f;

  float
      row_max[kRows];  // the reference of the exponents: a score, at most kSlack below the maximum
  float row_sum[kRows];  // of this lane's columns

  INTERNVL_PTX_FN void clear() {
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      row_max[r] = -INFINITY;
      row_sum[r] = 0.0f;
    }
  }

  // Moves the references where some row of the warp outgrew its own, and calls rescale(factor[r]).
  // tile_max: of the row over all lanes.
  template <class Rescale>
  INTERNVL_PTX_FN void update_max(const float (&tile_max)[kRows], Rescale rescale) {
    bool grown = false;
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) grown |= tile_max[r] > row_max[r] + kSlack;
    if (!ptx::vote_any(grown)) return;
    float factor[kRows];
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float old = row_max[r];
      row_max[r] = ptx::fmax(old, tile_max[r]);
      // Equal where both are -inf, whose difference is NaN.
      factor[r] = old == row_max[r] ? 1.0f : ptx::ex2(old - row_max[r]);
      row_sum[r] *= factor[r];
    }
    rescale(factor);
  }

  // A row that has met no visible key has scores of -inf only; any finite reference makes them 0.
  INTERNVL_PTX_FN float reference(int r) const {
    return row_max[r] == -INFINITY ? 0.0f : row_max[r];
  }

  // log2 of the sum so far, reference included: at most the row's final lse. Not yet met: -inf.
  INTERNVL_PTX_FN float lse_log2(int r) const {
    const float sum = quad_sum(row_sum[r]);
    return sum == 0.0f ? -INFINITY : row_max[r] + ptx::lg2(sum);
  }
};

// Two neighbouring 16 x 8 accumulators as the A operand of the next product.
template <class T>
INTERNVL_PTX_FN void to_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = ptx::pack2<T>(left[0], left[1]);
  a[1] = ptx::pack2<T>(left[2], left[3]);
  a[2] = ptx::pack2<T>(right[0], right[1]);
  a[3] = ptx::pack2<T>(right[2], right[3]);
}

}  // namespace internvl::tile
