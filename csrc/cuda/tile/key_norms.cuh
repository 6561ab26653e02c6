// Prepass for ALiBi distance pruning: the largest |k| of every key tile, rounded up
// (common/prune.h). One block per key tile, KV head and batch row; eight lanes read a row together.
#pragma once

#include "common/prune.h"
#include "cuda/ptx/cvt.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/warp.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/mask_tile.cuh"
#include "cuda/tile/reduce.cuh"

namespace internvl::tile {

constexpr int kNormThreads = 128;
constexpr int kNormLanes = 8;  // per row

struct KeyNormPlan {
  PrefixAttnParams params;
  KeySummaries summaries;
  int block_n = 0;
  int64_t tile_count = 0;
  float least_slope = 0.0f;  // norms of KV heads with flatter query heads are infinite
  float* norms = nullptr;    // [batch][heads_kv][tile_count]
};

// Sum of squares of elements [8 * chunk, ...) of a row, no further than head_dim.
template <class T>
INTERNVL_PTX_FN float chunk_squares(const char* row, int chunk, int head_dim) {
  float sum = 0.0f;
  if ((chunk + 1) * 8 <= head_dim)
    return chunk_squares<T>(ptx::ld_global_nc(reinterpret_cast<const ptx::U32x4*>(row) + chunk));
  for (int d = chunk * 8; d < head_dim; ++d) {
    const float x = ptx::to_float<T>(ptx::ld_global_nc(reinterpret_cast<const uint16_t*>(row) + d));
    sum = ptx::fma(x, x, sum);
  }
  return sum;
}

// Is some query head of KV head `h` less steep than the plan asks for?
INTERNVL_PTX_FN bool has_flat_head(const KeyNormPlan& plan, int64_t h) {
  if (plan.least_slope == 0.0f) return false;
  const int group = static_cast<int>(plan.params.heads_q / plan.params.heads_kv);
  for (int i = 0; i < group; ++i)
    if (!(ptx::ld_global_nc(plan.params.alibi_slopes + h * group + i) >= plan.least_slope))
      return true;
  return false;
}

// Infinite where it is NaN: such a tile is never skipped.
INTERNVL_PTX_FN float finite_norm(float sum_of_squares) {
  const float norm = prune_norm(sum_of_squares);
  return norm < INFINITY ? norm : INFINITY;
}

template <class T>
__global__ void __launch_bounds__(kNormThreads, 8) key_norm_kernel(const KeyNormPlan plan) {
  const PrefixAttnParams& params = plan.params;
  const uint32_t tiles = static_cast<uint32_t>(plan.tile_count);
  const uint32_t heads = static_cast<uint32_t>(params.heads_kv);
  const uint32_t head = blockIdx.x / tiles;
  const int64_t tile = blockIdx.x % tiles;
  const int64_t b = head / heads, h = head % heads;
  const int thread = static_cast<int>(threadIdx.x);
  if (has_flat_head(plan, h)) {
    if (thread == 0) ptx::st_global(plan.norms + blockIdx.x, INFINITY);
    return;
  }
  const KeyMask mask = key_mask(params, plan.summaries, plan.tile_count, b);
  const Rows rows = rows_of(params.k, b, h);
  const int head_dim = static_cast<int>(params.head_dim);
  float largest = 0.0f;
  for (int row = thread / kNormLanes; row < plan.block_n; row += kNormThreads / kNormLanes) {
    const int64_t j = tile * plan.block_n + row;
    float sum = 0.0f;
    if (needs_key(mask, static_cast<int32_t>(j)))
      for (int chunk = thread % kNormLanes; chunk * 8 < head_dim; chunk += kNormLanes)
        sum += chunk_squares<T>(rows.data + j * rows.stride_bytes, chunk, head_dim);
    INTERNVL_UNROLL
    for (int lanes = 1; lanes < kNormLanes; lanes *= 2) sum += ptx::shfl_bfly(sum, lanes);
    largest = ptx::fmax(largest, finite_norm(sum));
  }
  INTERNVL_UNROLL
  for (int lanes = kNormLanes; lanes < 32; lanes *= 2)
    largest = ptx::fmax(largest, ptx::shfl_bfly(largest, lanes));
  const uint32_t shared = ptx::dynamic_shared();
  if (thread % 32 == 0) ptx::st_shared(shared + thread / 32 * 4, largest);
  ptx::sync_threads();
  if (thread != 0) return;
  for (int warp = 1; warp < kNormThreads / 32; ++warp)
    largest = ptx::fmax(largest, ptx::ld_shared<float>(shared + warp * 4));
  ptx::st_global(plan.norms + blockIdx.x, largest);
}

}  // namespace internvl::tile
