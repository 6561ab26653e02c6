// What a block of a decode kernel (few query rows, the keys of a KV head split over blocks) knows
// beside its rows and mask: which part of the walk over key tiles is its own, and where distance
// pruning finds its bound.
#pragma once

#include "cuda/tile/attn_fwd_schedule.cuh"

namespace internvl::tile {

constexpr int kMaxSplits = 128;
constexpr int kBoundTiles = 2;  // nearest key tiles, whose scores bound every row's lse from below

struct DecodePlan {
  FwdPlan fwd;
  int splits = 1;            // blocks that share the keys of a row tile
  float least_slope = 0.0f;  // distance pruning is for heads that are at least as steep
  // Of blocks with their splits side by side; null without splits.
  float* sums = nullptr;        // [tile][split][kBlockM][kHeadDim]
  ptx::F32x2* stats = nullptr;  // [tile][kBlockM][split]: reference, row sum
  uint32_t* tickets = nullptr;  // [tile]: splits that have arrived
};

template <class Traits, class Shared>
struct DecodeSchedule : FwdSchedule<Traits, Shared> {
  using Base = FwdSchedule<Traits, Shared>;
  using Base::listed, Base::shared, Base::taken, Base::thread;

  const DecodePlan& decode;

  INTERNVL_PTX_FN explicit DecodeSchedule(const DecodePlan& launch)
      : Base(launch.fwd), decode(launch) {}

  INTERNVL_PTX_FN FwdBlock block() const { return load_struct<FwdBlock>(this->block_addr()); }

  INTERNVL_PTX_FN int32_t entry(int index) const {
    return ptx::ld_shared<int32_t>(shared + offsetof(Shared, list) + index * 4);
  }
  INTERNVL_PTX_FN void put_entry(int index, int32_t entry) const {
    ptx::st_shared(shared + offsetof(Shared, list) + index * 4, entry);
  }

  // The first step of the walk that is split `split`'s: all have equal shares.
  INTERNVL_PTX_FN int first_step(uint32_t split) const {
    const uint32_t all =
        ptx::ld_shared<uint32_t>(this->block_addr() + offsetof(FwdBlock, candidates));
    return static_cast<int>(all * split / decode.splits);  // tiles have 64 keys: at most 2^31
  }
  INTERNVL_PTX_FN void take_share() { taken = first_step(blockIdx.y); }
  INTERNVL_PTX_FN int share_end() const { return first_step(blockIdx.y + 1); }

  // Of key tiles whose best scores are to bound every row's lse; 0: nothing is to be pruned. All
  // splits look at the same ones, whoever's they are: far keys say nothing about the lse.
  INTERNVL_PTX_FN int bound_tiles(const FwdBlock& block) const {
    if (taken >= share_end() ||
        !(block.cutoff_slope > 0.0f && block.cutoff_slope >= decode.least_slope))
      return 0;
    return block.candidates < kBoundTiles ? block.candidates : kBoundTiles;
  }
  INTERNVL_PTX_FN int32_t bound_entry(const FwdBlock& block, int step) const {
    const int place = step < block.left ? block.nearest - step : block.nearest + 1;
    return place * 8 + kNeedsMask;
  }

  // Fills the list with the next tiles of this block's part of the walk; empty: there are none.
  // lower: at most every row's lse, in natural units.
  INTERNVL_PTX_FN void next_list(float lower) {
    listed = 0;
    const int end = share_end();
    if (taken >= end) return;
    const FwdBlock own = block();
    while (listed == 0 && taken < end) {
      const int round = end - taken < Traits::kListEntries ? end - taken : Traits::kListEntries;
      const int32_t found = thread < round ? this->judge(own, taken + thread, lower) : -1;
      const Place place = team_place<typename Traits::Team>(found >= 0, this->words());
      if (found >= 0) put_entry(place.index, found);
      listed = place.count;
      Traits::Team::sync();
      taken += round;
    }
  }
};

}  // namespace internvl::tile
