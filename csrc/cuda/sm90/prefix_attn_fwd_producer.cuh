// The producer of the sm90 forward: one warp that streams the key tiles of the list.
#pragma once

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/prefix_attn_fwd_traits.cuh"

namespace internvl::sm90 {

// A stage of a ring of kStages, and the parity of its barriers' phase.
template <int kStages>
struct Stage {
  uint32_t index = 0, parity = 0;

  INTERNVL_PTX_FN void advance() {
    if (++index < kStages) return;
    index = 0;
    parity ^= 1;
  }
};

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
    ptx::mbarrier_arrive_expect_tx(full, KvTile::kBytes);
    INTERNVL_UNROLL
    for (int panel = 0; panel < KvTile::kPanels; ++panel)
      ptx::tma_load_4d(to + panel * KvTile::kPanelBytes, &from.map, panel * KvTile::kPanel, j0,
                       head * from.head_step, b * from.batch_step, full);
  }

  // Zeros in place of the values of keys that no query sees: 0 * NaN would be NaN.
  INTERNVL_PTX_FN void clear_unseen(uint32_t v, int j0) {
    ptx::mbarrier_wait_parity(shared + offsetof(Shared, v_landed), landed_parity);
    landed_parity ^= 1;
    const tile::KeyMask mask = tile::load_struct<tile::KeyMask>(shared + offsetof(Shared, block) +
                                                                offsetof(tile::FwdBlock, mask));
    INTERNVL_NO_UNROLL
    for (int row = lane; row < Traits::kBlockN; row += 32) {
      if (tile::needs_key(mask, j0 + row)) continue;
      INTERNVL_NO_UNROLL
      for (int column = 0; column < Traits::kHeadDim; column += 8)
        ptx::st_shared(v + KvTile::offset(row, column), ptx::U32x4{0, 0, 0, 0});
    }
    ptx::fence_proxy_async_shared();
    ptx::sync_warp();
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
      clear_unseen(v, j0);
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
