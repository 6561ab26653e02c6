// Tile sizes, shared memory and plan of the sm80 decode kernel. Why these numbers: NOTES.md.
#pragma once

#include "cuda/tile/attn_decode_schedule.cuh"

namespace internvl::sm80 {

template <class Element_, int kHeadDim_>
struct PrefixAttnDecodeTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  // Query rows of a tile at most: the accumulators of a warp's 16 rows and the scores of its share
  // of the keys fit the registers.
  static constexpr int kBlockM = kHeadDim <= 128 ? 64 : 32;
  static constexpr int kBlockN = 64;
  // K and V tiles in flight or in use. Two blocks fit the 164 KiB of an A100.
  static constexpr int kSlots = kHeadDim <= 64 ? 8 : kHeadDim <= 96 ? 6 : kHeadDim <= 128 ? 4 : 2;
  static constexpr int kBlocksPerSm = 2;
  // Fragments of Q stay in registers, and its memory becomes the last slot.
  static constexpr bool kQInRegisters = kHeadDim <= 128;

  static constexpr int kSlices = kBlockN / 16;                // of 16 keys
  static constexpr int kWarpSlices = kSlices * kBlockM / 64;  // of a warp at most
  static constexpr int kDimTiles = kHeadDim / 8;
  static constexpr int kPitchFloats = kHeadDim + 8;  // of a row of sums: no bank conflicts

  using Team = tile::Team<kThreads>;
  static constexpr int kListEntries = kThreads;
  using Layout = tile::Swizzle<kHeadDim>;
  using QCopy = tile::TileCopy<kHeadDim, kBlockM, kThreads>;
  using KvCopy = tile::TileCopy<kHeadDim, kBlockN, kThreads>;

  static_assert(kHeadDim % 32 == 0 && kHeadDim <= 256, "compiled head dims: 32 to 256, step 32");
  static_assert(kSlots % 2 == 0, "the loop starts a copy of V at each K, and of K at each V");
  static_assert(!kQInRegisters || kBlockM == kBlockN, "Q fills a slot");

  INTERNVL_PTX_FN static uint32_t q_offset(int row, int chunk) {
    return Layout::offset(row, chunk);
  }
};

struct DecodePlan : tile::DecodePlan {
  int row_warps = 1;  // warps that hold 16 query rows each; the others share the keys
};

template <class Traits>
struct DecodeShared {
  static constexpr int kTile = Traits::kBlockN * Traits::kHeadDim;
  static constexpr int kOwnSlots = Traits::kSlots - (Traits::kQInRegisters ? 1 : 0);
  alignas(128) uint16_t kv[kOwnSlots][kTile];  // K, V, K, ...; later sums, or factors of splits
  alignas(128) uint16_t q[Traits::kBlockM * Traits::kHeadDim];  // later the last slot
  tile::FwdBlock block;
  tile::FwdRow rows[Traits::kBlockM];
  ptx::F32x2 stats[Traits::kWarps * 16];  // of each warp's rows: reference, row sum
  int32_t list[Traits::kListEntries];
  int32_t words[Traits::kWarps];
  uint32_t arrived;  // splits that came before

  static constexpr int kSumsBytes = Traits::kWarps * 16 * Traits::kPitchFloats * 4;
  static_assert(kSumsBytes <= int(sizeof(kv) + sizeof(q)), "the sums of all warps fit the tiles");
  static_assert(tile::kMaxSplits * Traits::kBlockM * 4 <= int(sizeof(kv)), "so do the factors");
};

}  // namespace internvl::sm80
