// prefix_attn for few query rows, for compute capability 9.0: TMA, wgmma, a warp that only copies.
//
// One block per KV head (all query heads of its group share a tile, so K and V are read once) and
// split of the keys. Everything is transposed: a warpgroup computes S^T = K Q^T, whose 64 rows are
// the keys of a tile and whose 8, 32 or 64 columns are the query rows, and O^T += V^T P^T, whose
// rows are columns of V. So the tensor cores' 64 rows are always full, and a lane has 2 keys of
// kBlockM / 4 rows to look at. P^T goes through shared memory, twice buffered.
//
// The warps share the references of the exponents. A tile's weights are written before anyone knows
// whether a score has outgrown its reference; if the barrier after them says so, the tile starts
// over from its product, and the references move before the weights.
//
// Key tiles come from a list in shared memory, made by the warpgroup and handed to the producer by
// an mbarrier, as in the forward; K and V follow one another through one ring of slots. What
// distance pruning needs first, scores of the two nearest tiles, is a list of K alone. The splits
// of a head merge as in sm80 (tile/attn_decode_merge.cuh).
//
// Shared memory: DecodeShared. Meaning of mask, bias, lse and empty rows:
// python/internvl_kernels/semantics.py.
#pragma once

#include "cuda/sm90/prefix_attn_decode_consumer.cuh"
#include "cuda/sm90/prefix_attn_decode_producer.cuh"

namespace internvl::sm90 {

// One thread.
template <class Traits>
INTERNVL_PTX_FN void init_decode_barriers() {
  using Shared = DecodeShared<Traits>;
  const uint32_t shared = ptx::dynamic_shared();
  ptx::mbarrier_init(shared + offsetof(Shared, list_full), 1);
  ptx::mbarrier_init(shared + offsetof(Shared, landed), 1);
  for (int slot = 0; slot < Traits::kSlots; ++slot) {
    ptx::mbarrier_init(shared + offsetof(Shared, full) + 8 * slot, 1);
    ptx::mbarrier_init(shared + offsetof(Shared, empty) + 8 * slot, 1);
  }
  ptx::fence_mbarrier_init();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    prefix_attn_decode_kernel(const INTERNVL_GRID_CONSTANT DecodePlan plan) {
  if (threadIdx.x == kWarpgroup) init_decode_barriers<Traits>();
  ptx::sync_threads();
  if (threadIdx.x < kWarpgroup)
    DecodeConsumer<Traits>(plan).run();
  else
    DecodeProducer<Traits>(plan).run();
}

}  // namespace internvl::sm90
