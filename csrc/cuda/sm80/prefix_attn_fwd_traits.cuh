// Tile sizes and shared memory of the sm80 forward. Why these numbers: NOTES.md.
#pragma once

#include "cuda/tile/attn_fwd_schedule.cuh"

namespace internvl::sm80 {

template <class Element_, int kHeadDim_>
struct PrefixAttnFwdTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  // 32 rows per warp use every K and V fragment twice; with 256 columns the accumulators of 32 rows
  // would not fit the registers.
  static constexpr int kBlockM = kHeadDim <= 128 ? 128 : 64;
  static constexpr int kBlockN = 64;
  static constexpr int kStages = kHeadDim <= 128 ? 3 : 2;  // K and V tiles in flight or in use
  static constexpr int kBlocksPerSm = 2;

  static constexpr int kRowTiles = kBlockM / kWarps / 16;  // 16-row tiles of a warp
  static constexpr int kRows = 2 * kRowTiles;              // rows of which a lane holds scores
  static constexpr int kColTiles = kBlockN / 8;            // 8-column tiles of the scores
  static constexpr int kDimTiles = kHeadDim / 8;           // 8-column tiles of the output

  using Team = tile::Team<kThreads>;
  static constexpr int kListEntries = kThreads;
  using Layout = tile::Swizzle<kHeadDim>;
  using QCopy = tile::TileCopy<kHeadDim, kBlockM, kThreads>;
  using KvCopy = tile::TileCopy<kHeadDim, kBlockN, kThreads>;

  static_assert(kHeadDim % 32 == 0 && kHeadDim <= 256, "compiled head dims: 32 to 256, step 32");
  static_assert(kBlockM % (16 * kWarps) == 0, "every warp holds whole 16-row tiles");
  static_assert(kStages == 2 || kStages == 3, "the loop loads one tile ahead, K and V in turn");

  INTERNVL_PTX_FN static uint32_t q_offset(int row, int chunk) {
    return Layout::offset(row, chunk);
  }
};

template <class Traits>
struct FwdShared {
  alignas(128) uint16_t q[Traits::kBlockM * Traits::kHeadDim];  // later the output
  alignas(128) uint16_t kv[Traits::kStages][Traits::kBlockN * Traits::kHeadDim];  // K, V, K, ...
  tile::FwdBlock block;
  tile::FwdRow rows[Traits::kBlockM];
  int32_t list[Traits::kListEntries];
  int32_t words[Traits::kWarps];
};

}  // namespace internvl::sm80
