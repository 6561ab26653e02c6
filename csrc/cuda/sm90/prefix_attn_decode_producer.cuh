// The producer of the sm90 decode kernel: one warp that streams the key tiles of the list.
#pragma once

#include "cuda/sm90/prefix_attn_decode_traits.cuh"
#include "cuda/tile/copy.cuh"

namespace internvl::sm90 {

template <class Traits>
struct DecodeProducer {
  using Shared = DecodeShared<Traits>;
  using KvTile = typename Traits::KvTile;

  const DecodePlan& plan;
  const uint32_t shared;
  const int lane;
  Stage<Traits::kSlots> slot;
  uint32_t landed_parity = 0;

  INTERNVL_PTX_FN explicit DecodeProducer(const DecodePlan& launch)
      : plan(launch), shared(ptx::dynamic_shared()), lane(static_cast<int>(threadIdx.x) % 32) {}

  INTERNVL_PTX_FN uint32_t slot_addr() const {
    return shared + offsetof(Shared, kv) + slot.index * KvTile::kBytes;
  }
  INTERNVL_PTX_FN uint32_t full() const { return shared + offsetof(Shared, full) + slot.index * 8; }

  // Starts the copy of keys [j0, j0 + kBlockN) to the next slot, as soon as it is free.
  INTERNVL_PTX_FN void load(const HeadMap& from, int j0, uint32_t barrier) const {
    if (lane != 0) return;
    const uint32_t rows = shared + offsetof(Shared, block) + offsetof(tile::FwdBlock, rows);
    const int b = ptx::ld_shared<int32_t>(rows + offsetof(tile::FwdRows, b));
    const int head = ptx::ld_shared<int32_t>(rows + offsetof(tile::FwdRows, head_kv));
    ptx::mbarrier_wait_parity(shared + offsetof(Shared, empty) + slot.index * 8, slot.parity ^ 1);
    load_keys<KvTile>(slot_addr(), from, j0, head, b, barrier);
  }

  INTERNVL_PTX_FN void load_values(int32_t entry, int j0) {
    if (!(entry & tile::kUnseenKeys)) {
      load(plan.v, j0, full());
      return;
    }
    const uint32_t landed = shared + offsetof(Shared, landed);
    load(plan.v, j0, landed);
    ptx::mbarrier_wait_parity(landed, landed_parity);
    landed_parity ^= 1;
    clear_unseen<KvTile>(tile::load_struct<tile::KeyMask>(shared + offsetof(Shared, block) +
                                                          offsetof(tile::FwdBlock, mask)),
                         slot_addr(), j0);
    if (lane == 0) ptx::mbarrier_arrive(full());
  }

  INTERNVL_PTX_FN void run() {
    if (lane == 0 && plan.fwd.tile_count > 0) {
      ptx::prefetch_tensor_map(&plan.k.map);
      ptx::prefetch_tensor_map(&plan.v.map);
    }
    for (uint32_t parity = 0;; parity ^= 1) {
      ptx::mbarrier_wait_parity(shared + offsetof(Shared, list_full), parity);
      const int listed = ptx::ld_shared<int32_t>(shared + offsetof(Shared, listed));
      if (listed == 0) return;
      for (int i = 0; i < (listed < 0 ? -listed : listed); ++i) {
        const int32_t entry = ptx::ld_shared<int32_t>(shared + offsetof(Shared, list) + 4 * i);
        ptx::sync_warp();  // all have read it before the consumers can get on
        const int j0 = tile::entry_tile(entry) * Traits::kBlockN;
        load(plan.k, j0, full());
        slot.advance();
        if (listed < 0) continue;
        load_values(entry, j0);
        slot.advance();
      }
    }
  }
};

}  // namespace internvl::sm90
