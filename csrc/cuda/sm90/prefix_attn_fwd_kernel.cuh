// Forward of prefix_attn for compute capability 9.0: TMA, wgmma, warp specialisation.
//
// A block works on query tiles of one head (or of the packed heads of one KV head), one after the
// other: prefix_attn_fwd_launch.cuh says how many. Warpgroup 0 is the producer: one warp of it
// streams key tiles (prefix_attn_fwd_producer.cuh). The other warpgroups are consumers, each with
// 64 query rows, whose scores and output stay in its registers.
//
// The consumers make the list of key tiles together (tile/attn_fwd_schedule.cuh) and hand it to the
// producer by an mbarrier; the next list, of the same query tile or of the next one, is made when
// this one is used up. The producer has then read it: its tiles have come.
//
// A consumer starts Q K^T of an entry, then P V of the entry before, and works on the softmax of
// the former while the tensor cores do the latter. Up to head dim 128 the warpgroups take turns to
// start products, so that one's softmax meets another's products.
//
// Shared memory: FwdShared. Meaning of mask, bias, lse and empty rows:
// python/internvl_kernels/semantics.py.
#pragma once

#include "cuda/ptx/registers.cuh"
#include "cuda/sm90/prefix_attn_fwd_consumer.cuh"
#include "cuda/sm90/prefix_attn_fwd_producer.cuh"

namespace internvl::sm90 {

// One thread.
template <class Traits>
INTERNVL_PTX_FN void init_barriers() {
  using Shared = FwdShared<Traits>;
  const uint32_t shared = ptx::dynamic_shared();
  ptx::mbarrier_init(shared + offsetof(Shared, list_full), 1);
  ptx::mbarrier_init(shared + offsetof(Shared, v_landed), 1);
  for (int stage = 0; stage < Traits::kStages; ++stage) {
    ptx::mbarrier_init(shared + offsetof(Shared, k_full) + 8 * stage, 1);
    ptx::mbarrier_init(shared + offsetof(Shared, v_full) + 8 * stage, 1);
    ptx::mbarrier_init(shared + offsetof(Shared, k_empty) + 8 * stage, Traits::kConsumers);
    ptx::mbarrier_init(shared + offsetof(Shared, v_empty) + 8 * stage, Traits::kConsumers);
  }
  ptx::fence_mbarrier_init();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    prefix_attn_fwd_kernel(const INTERNVL_GRID_CONSTANT FwdPlan plan) {
  if (threadIdx.x == 0) init_barriers<Traits>();
  ptx::sync_threads();
  if (threadIdx.x < kWarpgroup) {
    ptx::set_max_registers_dec<Traits::kProducerRegisters>();
    if (threadIdx.x < 32) FwdProducer<Traits>(plan).run();
  } else {
    ptx::set_max_registers_inc<Traits::kConsumerRegisters>();
    FwdConsumer<Traits>(plan).run();
  }
}

}  // namespace internvl::sm90
