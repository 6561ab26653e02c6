// Copies a [batch, seqlen, heads, head_dim] tensor whose rows do not start at 16-byte addresses to
// one whose rows do; the kernels read 16 bytes at a time. One thread per 8 elements.
#pragma once

#include "common/params.h"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/types.cuh"

namespace internvl::tile {

constexpr int kPackThreads = 256;

struct PackRowsPlan {
  View from, to;  // 16-bit elements; the rows of `to` at 16-byte addresses
  int64_t batch = 0, seqlen = 0, heads = 0, head_dim = 0;

  int64_t chunks_per_row() const { return (head_dim + 7) / 8; }
};

INTERNVL_PTX_FN uint16_t* row_of(const View& view, int64_t b, int64_t s, int64_t h) {
  return static_cast<uint16_t*>(view.data) + b * view.stride_b + s * view.stride_s +
         h * view.stride_h;
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) pack_rows_kernel(const PackRowsPlan plan) {
  const int64_t chunks = (plan.head_dim + 7) / 8;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = index / chunks, chunk = index % chunks;
  const int64_t h = row % plan.heads, s = row / plan.heads % plan.seqlen;
  const int64_t b = row / plan.heads / plan.seqlen;
  if (b >= plan.batch) return;
  const uint16_t* from = row_of(plan.from, b, s, h) + chunk * 8;
  uint32_t words[4] = {};
  INTERNVL_UNROLL
  for (int e = 0; e < 8; ++e)
    if (chunk * 8 + e < plan.head_dim)
      words[e / 2] |= uint32_t{ptx::ld_global_nc(from + e)} << (e % 2 * 16);
  ptx::st_global(reinterpret_cast<ptx::U32x4*>(row_of(plan.to, b, s, h) + chunk * 8),
                 ptx::U32x4{words[0], words[1], words[2], words[3]});
}

}  // namespace internvl::tile
