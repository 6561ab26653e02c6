// Before and after the two big kernels of a backward. All take its Traits: each backward has copies
// of its own, compiled for its own architecture.
//
// bwd_rows_kernel: delta = sum_d dO * O - grad_lse and lse in base 2 of every query row (padded to
//   whole blocks; rows without a visible key get lse = +inf, so that their P vanishes), and what
//   the pruning rule needs of each query tile. Grid: x = (b, head, tile of kBlockM rows); 8 lanes a
//   row.
// bwd_segments_kernel: smallest and largest segment of each query tile. Grid: x = (b, tile).
// bwd_slopes_kernel: dalibi_slopes from the blocks' sums, in a fixed order. Grid: x = head.
#pragma once

#include "common/prune.h"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/warp.cuh"
#include "cuda/tile/attn_grad.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/key_norms.cuh"
#include "cuda/tile/key_summary.cuh"
#include "cuda/tile/vector.cuh"

namespace internvl::tile {

constexpr int kRowThreads = 256;
constexpr int kRowLanes = 8;  // per row
constexpr int kSlopeThreads = 128;

template <class T>
INTERNVL_PTX_FN float chunk_dot(const T* a, bool a_aligned, const T* b, bool b_aligned, int64_t d,
                                int64_t width) {
  float x[8], y[8], sum = 0.0f;
  unpack_vector<T>(x, load_vector(a, d, width, a_aligned));
  unpack_vector<T>(y, load_vector(b, d, width, b_aligned));
  INTERNVL_UNROLL
  for (int e = 0; e < 8; ++e) sum = ptx::fma(x[e], y[e], sum);
  return sum;
}

template <class T>
INTERNVL_PTX_FN const T* element_row(const View& view, int64_t b, int64_t h, int64_t row) {
  return reinterpret_cast<const T*>(rows_of(view, b, h, row).data);
}

struct BwdRowsShared {
  ptx::F32x2 norms[kRowThreads / 32];
};

template <class Traits>
__global__ void __launch_bounds__(kRowThreads, 4) bwd_rows_kernel(const BwdArgs args) {
  using T = typename Traits::Element;
  constexpr int kBlockM = Traits::kBlockM;
  const PrefixAttnParams& params = args.params;
  const uint32_t tiles = static_cast<uint32_t>(args.padded_rows / kBlockM);
  const uint32_t heads = static_cast<uint32_t>(params.heads_q);
  const int64_t head = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t b = blockIdx.x / tiles / heads, h = blockIdx.x / tiles % heads;
  const int lane = static_cast<int>(threadIdx.x) % kRowLanes;
  const bool whole = params.head_dim % 8 == 0;  // no chunk of a row is cut off
  float q_norm = 0.0f, lowest = INFINITY;
  for (int r = static_cast<int>(threadIdx.x) / kRowLanes; r < kBlockM;
       r += kRowThreads / kRowLanes) {
    const int64_t row = tile * kBlockM + r;
    const bool inside = row < params.seqlen_q;
    const int64_t place = head * params.seqlen_q + row;
    const float lse = inside ? ptx::ld_global_nc(params.lse + place) : -INFINITY;
    const bool empty = lse == -INFINITY;
    float dot = 0.0f, squares = 0.0f;
    if (!empty) {
      const T* out = element_row<T>(params.out, b, h, row);
      const T* grad = element_row<T>(args.grads.grad_out, b, h, row);
      const T* q = element_row<T>(params.q, b, h, row);
      for (int64_t d = lane * 8; d < params.head_dim; d += kRowLanes * 8) {
        dot += chunk_dot(grad, whole, out, args.aligned_out, d, params.head_dim);
        if (args.row_norms) squares += chunk_dot(q, whole, q, whole, d, params.head_dim);
      }
    }
    INTERNVL_UNROLL
    for (int mask = 1; mask < kRowLanes; mask *= 2) {
      dot += ptx::shfl_bfly(dot, mask);
      squares += ptx::shfl_bfly(squares, mask);
    }
    if (!empty && args.grads.grad_lse) dot -= ptx::ld_global_nc(args.grads.grad_lse + place);
    if (lane == 0) {
      const int64_t padded = head * args.padded_rows + row;
      ptx::st_global(args.lse_log2 + padded, empty ? INFINITY : lse * kLog2e);
      ptx::st_global(args.delta + padded, empty ? 0.0f : dot);
    }
    if (!empty) {
      q_norm = ptx::fmax(q_norm, finite_norm(squares));
      lowest = lse < lowest ? lse : lowest == lowest && lse == lse ? lowest : -INFINITY;
    }
  }
  if (!args.row_norms || tile >= args.row_tiles) return;
  INTERNVL_UNROLL
  for (int mask = kRowLanes; mask < 32; mask *= 2) {
    q_norm = ptx::fmax(q_norm, ptx::shfl_bfly(q_norm, mask));
    lowest = ptx::fmin(lowest, ptx::shfl_bfly(lowest, mask));
  }
  const uint32_t shared = ptx::dynamic_shared();
  if (threadIdx.x % 32 == 0)
    ptx::st_shared(shared + threadIdx.x / 32 * 8, ptx::F32x2{q_norm, lowest});
  ptx::sync_threads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kRowThreads / 32; ++warp) {
    const ptx::F32x2 other = ptx::ld_shared<ptx::F32x2>(shared + warp * 8);
    q_norm = ptx::fmax(q_norm, other.x);
    lowest = ptx::fmin(lowest, other.y);
  }
  ptx::st_global(args.row_norms + head * args.row_tiles + tile, ptx::F32x2{q_norm, lowest});
}

// A block, which is one warp, per query tile of a batch row.
template <class Traits>
__global__ void __launch_bounds__(32) bwd_segments_kernel(const BwdArgs args) {
  constexpr int kBlockM = Traits::kBlockM;
  const uint32_t tiles = static_cast<uint32_t>(args.row_tiles);
  const int64_t b = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const KeyMask mask = key_mask(args.params, {}, 0, b);
  int32_t lo = INT32_MAX, not_hi = INT32_MAX;  // ~x turns the largest into the smallest
  bool any_inside = false, all_inside = true;
  for (int r = static_cast<int>(threadIdx.x); r < kBlockM; r += 32) {
    const int64_t row = tile * kBlockM + r;
    if (row >= args.params.seqlen_q) continue;
    const QuerySegment own = query_segment(mask, row);
    any_inside |= own.inside;
    all_inside &= own.inside;
    if (!own.inside) continue;
    lo = own.id < lo ? own.id : lo;
    not_hi = ~own.id < not_hi ? ~own.id : not_hi;
  }
  any_inside = ptx::vote_any(any_inside);
  all_inside = ptx::vote_all(all_inside);
  lo = warp_min(lo);
  not_hi = warp_min(not_hi);
  if (threadIdx.x == 0)
    ptx::st_global(args.row_segments + b * args.row_tiles + tile,
                   ptx::U32x4{static_cast<uint32_t>(lo), static_cast<uint32_t>(~not_hi),
                              any_inside ? 1u : 0u, all_inside ? 1u : 0u});
}

// `count` sums of each head.
template <class Traits>
__global__ void __launch_bounds__(kSlopeThreads)
    bwd_slopes_kernel(const BwdArgs args, const int64_t count) {
  const float* sums = args.slope_sums + blockIdx.x * count;
  float total = 0.0f;
  for (int64_t n = threadIdx.x; n < count; n += kSlopeThreads) total += ptx::ld_global_nc(sums + n);
  INTERNVL_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) total += ptx::shfl_bfly(total, mask);
  const uint32_t shared = ptx::dynamic_shared();
  if (threadIdx.x % 32 == 0) ptx::st_shared(shared + threadIdx.x / 32 * 4, total);
  ptx::sync_threads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kSlopeThreads / 32; ++warp)
    total += ptx::ld_shared<float>(shared + warp * 4);
  ptx::st_global(args.grads.dalibi_slopes + blockIdx.x, -total);
}

}  // namespace internvl::tile
