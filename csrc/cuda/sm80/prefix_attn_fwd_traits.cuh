// Tile sizes of the sm80 forward and the plan of one launch. Why these numbers: NOTES.md.
#pragma once

#include "common/params.h"
#include "cuda/ptx/types.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/mask_tile.cuh"

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

  using Layout = tile::Swizzle<kHeadDim>;
  using QCopy = tile::TileCopy<kHeadDim, kBlockM, kThreads>;
  using KvCopy = tile::TileCopy<kHeadDim, kBlockN, kThreads>;

  static_assert(kHeadDim % 32 == 0 && kHeadDim <= 256, "compiled head dims: 32 to 256, step 32");
  static_assert(kBlockM % (16 * kWarps) == 0, "every warp holds whole 16-row tiles");
  static_assert(kStages == 2 || kStages == 3, "the loop loads one tile ahead, K and V in turn");
  static_assert(kThreads >= kBlockM, "one thread per query row finds the row's norm");
};

// What the host decided; passed by value.
struct FwdPlan {
  PrefixAttnParams params;
  tile::KeySummaries summaries;
  const float* key_norms = nullptr;  // [batch][heads_kv][tile_count], null: no distance pruning
  float prune_threshold = 0.0f;
  int tile_count = 0;  // of keys
  int row_tiles = 0;   // of query rows
  int pack = 1;   // query heads whose rows share a tile: row r is row r / pack of head r % pack
  int heads = 0;  // (batch, query head) pairs, or (batch, KV head) pairs when packed
  int heads_per_section = 0;  // their K and V fit the second-level cache together
  bool out_aligned = false;   // 16-byte rows
};

}  // namespace internvl::sm80
