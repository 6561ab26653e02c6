// Prepass over the flags and segments of a call: which keys some query sees, and what the key tiles
// look like as a whole. One block per key tile and batch row, one thread per key and round.
#pragma once

#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/warp.cuh"
#include "cuda/tile/mask_tile.cuh"
#include "cuda/tile/reduce.cuh"

namespace internvl::tile {

constexpr int kSummaryThreads = 64;

struct KeySummaryPlan {
  PrefixAttnParams params;
  int block_n = 0;  // keys per tile
  int64_t tile_count = 0;
  ptx::U32x4* tiles = nullptr;
  uint8_t* used = nullptr;
};

// With segments: is there a query that sees the key? Its own position answers nearly always.
INTERNVL_PTX_FN bool seen_in_segment(const KeyMask& mask, const Key& key, int32_t segment,
                                     int64_t seqlen_q) {
  const int64_t first = larger(0, mask.first_position);
  const int64_t last =
      smaller(mask.seqlen_k - 1, query_position(mask.first_position, seqlen_q - 1));
  const auto sees_it = [&](int64_t p) {
    return ptx::ld_global_nc(mask.segments + p) == segment &&
           sees(mask, static_cast<int32_t>(p), key);
  };
  const int64_t nearest = larger(first, smaller(key.j, last));
  for (int64_t p = nearest; p <= last; ++p)
    if (sees_it(p)) return true;
  for (int64_t p = nearest - 1; p >= first && key.bidirectional; --p)
    if (sees_it(p)) return true;
  return false;
}

INTERNVL_PTX_FN bool is_used(const KeyMask& mask, const Key& key, int32_t segment,
                             int64_t seqlen_q) {
  if (!key.valid || seqlen_q == 0) return false;
  if (mask.segments) return seen_in_segment(mask, key, segment, seqlen_q);
  return key.bidirectional ||
         causal_reaches(mask.p_first, mask.p_last, key.j, int64_t{key.j} + 1, mask.window);
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) key_summary_kernel(const KeySummaryPlan plan) {
  const uint32_t tiles = static_cast<uint32_t>(plan.tile_count);
  const int64_t b = blockIdx.x / tiles;
  const int tile = static_cast<int>(blockIdx.x % tiles);
  const int thread = static_cast<int>(threadIdx.x);
  const KeyMask mask = key_mask(plan.params, {}, 0, b);
  const int64_t j_lo = int64_t{tile} * plan.block_n;
  const int64_t j_hi = smaller(j_lo + plan.block_n, mask.seqlen_k);
  bool any_valid = false, all_valid = true, any_open = false, all_open = true;
  int32_t lo = INT32_MAX, not_hi = INT32_MAX;  // ~x turns the largest into the smallest
  for (int64_t j = j_lo + thread; j < j_hi; j += kThreads) {
    const Key key = key_at(mask, static_cast<int32_t>(j));
    const int32_t segment = mask.segments ? key_segment(mask, key.j) : 0;
    ptx::st_global(plan.used + b * mask.seqlen_k + j,
                   static_cast<uint8_t>(is_used(mask, key, segment, plan.params.seqlen_q)));
    any_valid |= key.valid;
    all_valid &= key.valid;
    any_open |= key.valid && key.bidirectional;
    all_open &= !key.valid || key.bidirectional;
    lo = segment < lo ? segment : lo;
    not_hi = ~segment < not_hi ? ~segment : not_hi;
  }
  any_valid = ptx::sync_threads_or(any_valid);
  all_valid = ptx::sync_threads_and(all_valid);
  any_open = ptx::sync_threads_or(any_open);
  all_open = ptx::sync_threads_and(all_open);
  const uint32_t shared = ptx::dynamic_shared();
  lo = warp_min(lo);
  not_hi = warp_min(not_hi);
  if (thread % 32 == 0)
    ptx::st_shared(shared + thread / 32 * 8, ptx::U32x2{uint32_t(lo), uint32_t(not_hi)});
  ptx::sync_threads();
  if (thread != 0) return;
  for (int warp = 1; warp < kThreads / 32; ++warp) {
    const ptx::U32x2 other = ptx::ld_shared<ptx::U32x2>(shared + warp * 8);
    lo = int32_t(other.x) < lo ? int32_t(other.x) : lo;
    not_hi = int32_t(other.y) < not_hi ? int32_t(other.y) : not_hi;
  }
  KeyTileSummary summary;
  summary.any_valid = any_valid;
  summary.all_valid = all_valid;
  summary.any_bidirectional = any_open;
  summary.all_bidirectional = any_valid && all_open;
  summary.segment_lo = lo;
  summary.segment_hi = ~not_hi;
  ptx::st_global(plan.tiles + blockIdx.x, pack_summary(summary));
}

}  // namespace internvl::tile
