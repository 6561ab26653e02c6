// Tile sizes, shared memory and plan of the sm90 decode kernel. Why these numbers: NOTES.md.
#pragma once

#include "cuda/sm90/fwd_operands.cuh"
#include "cuda/tile/attn_decode_schedule.cuh"

namespace internvl::sm90 {

// kRows: query rows of a tile at most, the columns of its products: 8, 32 or 64.
template <class Element_, int kHeadDim_, int kRows_>
struct PrefixAttnDecodeTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = kRows_;
  static constexpr int kBlockN = 64;  // keys: the rows of the product K Q^T

  // One warpgroup multiplies, one warp starts the copies.
  static constexpr int kTeamBarrier = 1;
  using Team = tile::Team<kWarpgroup, 0, kTeamBarrier>;
  static constexpr int kThreads = kWarpgroup + 32;
  static constexpr int kListEntries = Team::kThreads;

  // The product V^T P^T has whole 64s of columns of V as its rows.
  static constexpr int kColumns = (kHeadDim + 63) / 64 * 64;
  static constexpr int kDimBlocks = kColumns / 64;
  using QTile = tile::PanelTile<kBlockM, kColumns>;
  using KvTile = tile::PanelTile<kBlockN, kColumns>;
  using WeightTile = tile::PanelTile<kBlockM, kBlockN>;
  static constexpr int kPitchFloats = kHeadDim + 4;  // of a row of sums: no bank conflicts

  // A multiprocessor has 228 KiB, of which a block may have 227 and each takes one more. Two
  // blocks, so that one's begin and end meet the other's loop, where three slots for K and V are
  // left to each, and the sums to the registers: 168 a lane.
  static constexpr int kOtherBytes = QTile::kBytes + 2 * WeightTile::kBytes + 1280 + 56 * kBlockM;
  static constexpr int kSlotsOfTwo = (113 * 1024 - kOtherBytes) / KvTile::kBytes;
  static constexpr int kSums = kBlockM * kColumns / kWarpgroup;
  static constexpr int kBlocksPerSm = kSlotsOfTwo >= 3 && kSums < 64 ? 2 : 1;
  static constexpr int kMostBytes = (kBlocksPerSm == 2 ? 113 : 227) * 1024;
  static constexpr int kSlotsThatFit = (kMostBytes - kOtherBytes) / KvTile::kBytes;
  static constexpr int kSlots = kSlotsThatFit < 12 ? kSlotsThatFit : 12;

  static_assert(kHeadDim % 32 == 0 && kHeadDim <= 256, "compiled head dims: 32 to 256, step 32");
  static_assert(kBlockM <= 64, "32 scores per lane: one bit each in a word");
  static_assert(kSlots >= 3, "K, V, and the next K on its way");

  INTERNVL_PTX_FN static uint32_t q_offset(int row, int chunk) {
    return QTile::offset(row, 8 * chunk);
  }
};

// The shape for `rows` query rows of a KV head. At head dims above 128 the sums of 64 rows leave
// no registers.
template <class T, int kHeadDim, class F>
auto with_decode_traits(int64_t rows, F f) {
  if (rows <= 8) return f(PrefixAttnDecodeTraits<T, kHeadDim, 8>{});
  if constexpr (kHeadDim <= 128)
    if (rows > 32) return f(PrefixAttnDecodeTraits<T, kHeadDim, 64>{});
  return f(PrefixAttnDecodeTraits<T, kHeadDim, 32>{});
}

struct DecodePlan : tile::DecodePlan {
  HeadMap k, v;  // [batch][heads_kv][seqlen_k][head_dim], boxes of one panel of a tile
};

template <class Traits>
struct DecodeShared {
  static constexpr int kSlots = Traits::kSlots;
  // K, V, K, ... Later the sums, then the factors of the splits.
  alignas(1024) uint8_t kv[kSlots][Traits::KvTile::kBytes];
  alignas(1024) uint8_t q[Traits::QTile::kBytes];
  alignas(1024) uint8_t weights[2][Traits::WeightTile::kBytes];  // of this tile, of the one before
  tile::FwdBlock block;
  tile::FwdRow rows[Traits::kBlockM];
  ptx::F32x2 stats[Traits::Team::kWarps * Traits::kBlockM];  // of each warp's keys, by rows
  alignas(8) float references[Traits::kBlockM];              // of the exponents, base 2
  alignas(16) uint32_t above[2][Traits::Team::kWarps];       // has the warp outgrown a reference?
  int32_t list[Traits::kListEntries];
  int32_t words[Traits::Team::kWarps];
  int32_t listed;    // entries of the list; below 0: as many, of K alone; 0: the end
  uint32_t arrived;  // splits that came before
  // mbarriers. A full one says that a tile has come, an empty one that the products with it are
  // done; landed that the producer may clear rows of it.
  alignas(8) uint64_t list_full;
  uint64_t landed;
  uint64_t full[kSlots], empty[kSlots];

  static constexpr int kSumsBytes = Traits::kBlockM * Traits::kPitchFloats * 4;
  static_assert(kSumsBytes <= int(sizeof(kv)), "the sums fit the tiles");
  static_assert(tile::kMaxSplits * Traits::kBlockM * 4 <= int(sizeof(kv)), "so do the factors");
};

}  // namespace internvl::sm90
