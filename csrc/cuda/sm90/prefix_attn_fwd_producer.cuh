// The producer of the sm90 forward: one warp that streams the key tiles of the list.
#pragma once

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/prefix_attn_fwd_traits.cuh"

namespace internvl::sm90 {

template <class Traits>
struct FwdProducer {
  using Shared = FwdShared<Traits>;
  using KvTile = typename Traits::KvTile;

  const FwdPlan& plan;
  const uint32_t shared;
  const int lane;
  Stage<Traits::kStages> stage;
  uint32_t landed_parity = 0;

  INTERNVL_PTX_FN explicit FwdProducer(const FwdPlan& launch)
      : plan(launch), shared(ptx::dynamic_shared()), lane(static_cast<int>(threadIdx.x) % 32) {}

  // Starts the copy of keys [j0, j0 + kBlockN) of a head.
  INTERNVL_PTX_FN void load(uint32_t to, const HeadMap& from, int j0, uint32_t full) const {
    const uint32_t rows = shared + offsetof(Shared, block) + offsetof(tile::FwdBlock, rows);
    const int b = ptx::ld_shared<int32_t>(rows + offsetof(tile::FwdRows, b));
    const int head = ptx::ld_shared<int32_t>(rows + offsetof(tile::FwdRows, head_kv));
    load_keys<KvTile>(to, from, j0, head, b, full);
  }

  INTERNVL_PTX_FN void clear_values(uint32_t v, int j0) {
    ptx::mbarrier_wait_parity(shared + offsetof(Shared, v_landed), landed_parity);
    landed_parity ^= 1;
    const tile::KeyMask mask = tile::load_struct<tile::KeyMask>(shared + offsetof(Shared, block) +
                                                                offsetof(tile::FwdBlock, mask));
    clear_unseen<KvTile>(mask, v, j0);
  }

  INTERNVL_PTX_FN void load_tile(int32_t entry) {
    const uint32_t barrier = stage.index * 8, offset = stage.index * KvTile::kBytes;
    const uint32_t v_full = shared + offsetof(Shared, v_full) + barrier;
    const uint32_t v = shared + offsetof(Shared, v) + offset;
    const int j0 = tile::entry_tile(entry) * Traits::kBlockN;
    const bool clears = entry & tile::kUnseenKeys;
    if (lane == 0) {
      ptx::mbarrier_wait_parity(shared + offsetof(Shared, k_empty) + barrier, stage.parity ^ 1);
      load(shared + offsetof(Shared, k) + offset, plan.k, j0,
           shared + offsetof(Shared, k_full) + barrier);
      ptx::mbarrier_wait_parity(shared + offsetof(Shared, v_empty) + barrier, stage.parity ^ 1);
      load(v, plan.v, j0, clears ? shared + offsetof(Shared, v_landed) : v_full);
    }
    if (clears) {
      clear_values(v, j0);
      if (lane == 0) ptx::mbarrier_arrive(v_full);
    }
    stage.advance();
  }

  INTERNVL_PTX_FN void run() {
    if (lane == 0 && plan.tile_count > 0) {
      ptx::prefetch_tensor_map(&plan.k.map);
      ptx::prefetch_tensor_map(&plan.v.map);
    }
    for (uint32_t parity = 0;; parity ^= 1) {
      ptx::mbarrier_wait_parity(shared + offsetof(Shared, list_full), parity);
      const int listed = ptx::ld_shared<int32_t>(shared + offsetof(Shared, listed));
      if (listed == 0) return;
      for (int i = 0; i < listed; ++i) {
        const int32_t entry = ptx::ld_shared<int32_t>(shared + offsetof(Shared, list) + 4 * i);
        ptx::sync_warp();  // all have read it before the consumers can get on
        load_tile(entry);
      }
    }
  }
};

}  // namespace internvl::sm90
