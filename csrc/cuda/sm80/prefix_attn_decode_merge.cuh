// How the sums of a decode block's warps become the block's.
#pragma once

#include "cuda/sm80/prefix_attn_decode_traits.cuh"
#include "cuda/tile/attn_decode_merge.cuh"
#include "cuda/tile/online_softmax.cuh"

namespace internvl::sm80 {

template <class Traits>
struct DecodeMerge : tile::DecodeMerge<Traits, DecodeShared<Traits>> {
  using Base = tile::DecodeMerge<Traits, DecodeShared<Traits>>;
  using Base::lane, Base::thread;

  const int row_warps;
  const int warp_row;  // first query row of this warp

  INTERNVL_PTX_FN explicit DecodeMerge(const DecodePlan& launch)
      : Base(launch),
        row_warps(launch.row_warps),
        warp_row(this->thread / 32 % launch.row_warps * 16) {}

  // Row `row` of warp `warp`, by columns.
  INTERNVL_PTX_FN uint32_t sums_addr(int warp, int row, int column) const {
    return this->kv_addr() + ((warp * 16 + row) * Traits::kPitchFloats + column) * 4;
  }

  // Reference and row sum of the warp's keys for row r of this lane.
  INTERNVL_PTX_FN void put_stats(int r, const ptx::F32x2& stats) const {
    const int row = thread / 32 * 16 + r * 8 + lane / 4;
    if (lane % 4 == 0) ptx::st_shared(this->stats_addr(row), stats);
  }

  // f(warp) for the warps that hold query row `row`, each with other keys.
  template <class F>
  INTERNVL_PTX_FN void each_holder(int row, F f) const {
    for (int warp = row / 16; warp < Traits::kWarps; warp += row_warps) f(warp);
  }

  // Of all keys of the block: reference and row sum of query row `row`.
  INTERNVL_PTX_FN ptx::F32x2 warp_stats(int row) const {
    ptx::F32x2 all{-INFINITY, 0.0f};
    const auto stats = [&](int warp) {
      return ptx::ld_shared<ptx::F32x2>(this->stats_addr(warp * 16 + row % 16));
    };
    each_holder(row, [&](int warp) { all.x = ptx::fmax(all.x, stats(warp).x); });
    each_holder(row, [&](int warp) {
      const ptx::F32x2 part = stats(warp);
      all.y = ptx::fma(part.y, Base::weight(part.x, all.x), all.y);
    });
    return all;
  }

  // Warps' sums relative to their rows' common reference, to shared memory. The first barrier also
  // says that nobody needs the tiles any more.
  template <class Softmax, int kDimTiles>
  INTERNVL_PTX_FN void put_sums(const Softmax& softmax, const float (&o)[kDimTiles][4]) const {
    INTERNVL_UNROLL
    for (int r = 0; r < 2; ++r)
      put_stats(r, {softmax.row_max[r], tile::quad_sum(softmax.row_sum[r])});
    ptx::sync_threads();
    INTERNVL_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = r * 8 + lane / 4;
      const float factor = Base::weight(softmax.row_max[r], warp_stats(warp_row + row).x);
      INTERNVL_UNROLL
      for (int d = 0; d < kDimTiles; ++d)
        ptx::st_shared(sums_addr(thread / 32, row, d * 8 + lane % 4 * 2),
                       ptx::F32x2{o[d][r * 2] * factor, o[d][r * 2 + 1] * factor});
    }
    ptx::sync_threads();
  }

  template <class Softmax, int kDimTiles>
  INTERNVL_PTX_FN void merge(const tile::FwdRows& rows, const Softmax& softmax,
                             const float (&o)[kDimTiles][4]) const {
    // A block without key tiles has not waited for Q yet.
    ptx::cp_async_wait_group<0>();
    put_sums(softmax, o);
    Base::merge(
        rows, [&](int row) { return warp_stats(row); },
        [&](float (&x)[8], int row, int chunk) {
          each_holder(row,
                      [&](int warp) { Base::add_shared(x, sums_addr(warp, row % 16, chunk * 8)); });
        });
  }
};

}  // namespace internvl::sm80
