// Tile sizes, roles and shared memory of the sm90 forward, and the plan of one launch. Why these
// numbers: NOTES.md.
#pragma once

#include "cuda/sm90/fwd_operands.cuh"

namespace internvl::sm90 {

template <class Element_, int kHeadDim_>
struct PrefixAttnFwdTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = kHeadDim <= 64 ? 3 : 2;  // warpgroups, of 64 query rows each
  static constexpr int kBlockM = 64 * kConsumers;
  static constexpr int kBlockN = kHeadDim <= 128 ? 128 : kHeadDim <= 192 ? 112 : 80;
  static constexpr int kStages = 2;  // of K and of V
  // Tiles of Q: with two, a block prepares its next query tile before it stores the output of this
  // one. Above, shared memory has room for one, and a block has one query tile.
  static constexpr int kQTiles = kHeadDim <= 128 ? 2 : 1;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kRows = 2;  // of which a lane holds scores

  // Warpgroups take turns to start products where softmax takes about as long as they do.
  static constexpr bool kTakesTurns = kHeadDim <= 128;

  // Masked tiles, too, have their softmax beside the product of the tile before: at 64 and 256
  // there are not the registers for it.
  static constexpr bool kMasksBeside = kHeadDim > 64 && kHeadDim <= 192;

  // Registers per thread: what a block starts with, and how its roles share it.
  static constexpr int kStartRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;

  // Named barriers.
  static constexpr int kTeamBarrier = 1;
  static constexpr int kTurnBarrier = 2;                               // one per consumer
  static constexpr int kWarpgroupBarrier = kTurnBarrier + kConsumers;  // likewise

  using Team = tile::Team<kWarpgroup * kConsumers, kWarpgroup, kTeamBarrier>;  // the consumers
  // Entries of the list; what is left of 227 KiB limits it at head dim 256.
  static constexpr int kListEntries = kHeadDim > 192 ? 128 : Team::kThreads;

  using QTile = tile::PanelTile<kBlockM, kHeadDim>;
  using KvTile = tile::PanelTile<kBlockN, kHeadDim>;

  static_assert(kHeadDim % 32 == 0 && kHeadDim <= 256, "compiled head dims: 32 to 256, step 32");
  static_assert(kBlockN <= 128, "32 columns per lane: one bit each in a word");
  static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <=
                    (kConsumers + 1) * kStartRegisters,
                "more would wait for registers for ever");

  INTERNVL_PTX_FN static uint32_t q_offset(int row, int chunk) {
    return QTile::offset(row, 8 * chunk);
  }
};

template <class Traits>
struct FwdShared {
  alignas(1024) uint8_t q[Traits::kQTiles][Traits::QTile::kBytes];  // later the output
  alignas(1024) uint8_t k[Traits::kStages][Traits::KvTile::kBytes];
  alignas(1024) uint8_t v[Traits::kStages][Traits::KvTile::kBytes];
  tile::FwdBlock block;
  tile::FwdRow rows[Traits::kBlockM];
  int32_t list[Traits::kListEntries];
  int32_t words[Traits::Team::kWarps];
  int32_t listed;  // entries of the list; 0: the end of all lists
  // mbarriers. A full one says that a tile has come, an empty one that every consumer is done with
  // it; v_landed that the producer may clear rows of it.
  alignas(8) uint64_t list_full;
  uint64_t v_landed;
  uint64_t k_full[Traits::kStages], k_empty[Traits::kStages];
  uint64_t v_full[Traits::kStages], v_empty[Traits::kStages];
};

// What the host decided; passed by value.
struct FwdPlan : tile::FwdPlan {
  HeadMap k, v;        // [batch][heads_kv][seqlen_k][head_dim], boxes of one panel of a tile
  ptx::TensorMap out;  // [batch][heads_q][seqlen_q][head_dim], of the rows of a warpgroup
  bool out_mapped = false;
};

}  // namespace internvl::sm90
