// What a forward does with the scores of its query rows between the two products, whichever
// instruction computes those: mask, bias, online softmax, lse.
#pragma once

#include "cuda/tile/attn_fwd_schedule.cuh"
#include "cuda/tile/online_softmax.cuh"

namespace internvl::tile {

// Self is the kernel's class, and says which scores a lane holds: of the rows tile_row(0), ...
// tile_row(Traits::kRows - 1) of the tile each_score(r, f) calls f(score, column after the lane's
// first). Columns are those of mma accumulators: lane l begins at column 2 (l % 4), and has two of
// every eight.
template <class Self, class Traits, class Shared>
struct FwdScores : FwdSchedule<Traits, Shared> {
  using Base = FwdSchedule<Traits, Shared>;
  using Base::lane, Base::mask, Base::plan, Base::row;
  static constexpr int kRows = Traits::kRows;
  static constexpr int kBlockN = Traits::kBlockN;

  OnlineSoftmax<kRows> softmax;

  INTERNVL_PTX_FN explicit FwdScores(const FwdPlan& launch) : Base(launch) {}

  INTERNVL_PTX_FN Self& self() { return static_cast<Self&>(*this); }
  INTERNVL_PTX_FN const Self& self() const { return static_cast<const Self&>(*this); }

  INTERNVL_PTX_FN float scale_log2() const { return plan.params.softmax_scale * kLog2e; }

  // The lane's first key of an entry.
  INTERNVL_PTX_FN int32_t lane_key(int32_t entry) const {
    return entry_tile(entry) * kBlockN + 2 * (lane % 4);
  }

  // How far a key lies on the left of position0.
  INTERNVL_PTX_FN float distance_to(int32_t j) const {
    return static_cast<float>(this->position0() - j);
  }

  // Bit i of seen[r]: is column i of the lane's visible to row r? Found before the scores need the
  // registers, in a loop that is not unrolled.
  INTERNVL_PTX_FN void see_keys(int32_t entry, uint32_t (&seen)[kRows]) const {
    const KeyMask keys = mask();
    const int32_t j_lane = lane_key(entry);
    FwdRow rows[kRows];
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      rows[r] = row(self().tile_row(r));
      seen[r] = 0;
    }
    INTERNVL_NO_UNROLL
    for (int i = 0; i < kBlockN / 4; ++i) {
      const int32_t j = j_lane + i / 2 * 8 + i % 2;
      const Key key = key_at(keys, j);
      const int32_t segment = keys.segments ? key_segment(keys, j) : 0;
      INTERNVL_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const bool same = !keys.segments || (rows[r].inside && rows[r].segment == segment);
        seen[r] |= uint32_t{same && sees(keys, rows[r].p, key)} << i;
      }
    }
  }

  // The bias of a tile on one side of its queries, one fma per score: the score becomes
  // scale_log2 * (s + side * slope / scale * column) + offset.
  INTERNVL_PTX_FN void linear_bias(int32_t entry, float (&offset)[kRows]) {
    const float distance = distance_to(lane_key(entry));
    const float inverse_scale = ptx::rcp(scale_log2());
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const FwdRow own = row(self().tile_row(r));
      const float step = entry & kRightOfQueries ? -own.slope_log2 : own.slope_log2;
      const float z_step = step * inverse_scale;
      offset[r] = -step * (distance + static_cast<float>(own.offset));
      self().each_score(
          r, [&](float& z, int column) { z = ptx::fma(z_step, static_cast<float>(column), z); });
    }
  }

  // Turns scores scale * z + offset into weights exp2(score - reference). rescale(factor): the
  // outputs so far follow the reference.
  template <class Rescale>
  INTERNVL_PTX_FN void find_weights(float scale, const float (&offset)[kRows], Rescale rescale) {
    float tile_max[kRows];
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float largest = -INFINITY;
      self().each_score(r, [&](float& z, int) { largest = ptx::fmax(largest, z); });
      tile_max[r] = quad_max(ptx::fma(largest, scale, offset[r]));
    }
    softmax.update_max(tile_max, rescale);
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float shift = offset[r] - softmax.reference(r);
      self().each_score(r, [&](float& x, int) {
        x = ptx::ex2(ptx::fma(x, scale, shift));
        softmax.row_sum[r] += x;
      });
    }
  }

  // A lower bound of every row's lse, in natural units; -inf while some row has met no key.
  INTERNVL_PTX_FN float lower_bound(const FwdRows& rows) const {
    float lower = INFINITY;
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float lse = softmax.lse_log2(r) * kLn2;
      lower = rows.exists(self().tile_row(r)) ? ptx::fmin(lower, lse) : lower;
    }
    return this->team_min(lower);
  }

  INTERNVL_PTX_FN void refill() {
    Base::refill([&](const FwdRows& rows) { return lower_bound(rows); });
  }

  // Stores the lse of row r, and returns the factor that makes its output a mean: zero where no key
  // is visible.
  INTERNVL_PTX_FN float finish_row(const FwdRows& rows, int r) const {
    const float sum = quad_sum(softmax.row_sum[r]);
    const bool empty = sum == 0.0f;
    const int own = self().tile_row(r);
    if (lane % 4 == 0 && rows.exists(own)) {
      const PrefixAttnParams& params = plan.params;
      const int64_t head = rows.b * params.heads_q + rows.head0 + rows.head(own);
      ptx::st_global(params.lse + head * params.seqlen_q + rows.query0 + rows.query(own),
                     empty ? -INFINITY : (softmax.row_max[r] + ptx::lg2(sum)) * kLn2);
    }
    return empty ? 0.0f : 1.0f / sum;
  }
};

}  // namespace internvl::tile
